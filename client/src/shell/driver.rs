//! The task that owns the connection of one attachment: gets a socket when the core wants a server, moves frames, and ticks
//! the clock. Ends when the core wants no connection any more.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use csnap_proto::message::volume::FromServer;
use csnap_proto::{FrameDecoder, Term};
use tokio::net::TcpStream;

use super::clock;
use super::link::{Connected, ServerSource};
use super::shared::Shared;
use crate::core::{ConnId, Input};

/// Room for what arrives at a time: a few answers with their pages.
const READ_BYTES: usize = 64 << 10;

/// Sleep when the core has no deadline; it is woken when that changes.
const IDLE: Duration = Duration::from_secs(3600);

/// Runs until the attachment is over.
pub(super) async fn run(shared: Arc<Shared>, source: ServerSource) {
    shared.drive(Input::Tick);
    while !shared.lock().is_over() {
        let wanted = shared.lock().wanted;
        match wanted {
            None => wait(&shared).await,
            Some(suspect) => {
                if let Some(connected) = connect(&shared, &source, suspect).await {
                    serve(&shared, connected).await;
                }
            }
        }
    }
}

/// Sleeps until the core's deadline or until something changes.
async fn wait(shared: &Arc<Shared>) {
    tokio::select! {
        () = shared.wake.notified() => {}
        () = deadline(shared) => shared.drive(Input::Tick),
    }
}

async fn deadline(shared: &Arc<Shared>) {
    let at = {
        let mut state = shared.lock();
        state.deadline = state.core().next_deadline();
        state.deadline
    };
    tokio::time::sleep(at.map_or(IDLE, |at| at.since(clock::now()))).await;
}

/// Gets a socket; `None` when something else happened first that may have changed the wish.
async fn connect(shared: &Arc<Shared>, source: &ServerSource, suspect: Term) -> Option<Connected> {
    let note = |error: &_| tracing::debug!(target = %shared.target, %error, "no server yet");
    let connecting = source.connect(suspect, note);
    tokio::pin!(connecting);
    loop {
        tokio::select! {
            connected = &mut connecting => return Some(connected),
            () = wait(shared) => {
                let state = shared.lock();
                if state.is_over() || state.wanted != Some(suspect) {
                    return None;
                }
            }
        }
    }
}

/// Moves frames until the connection breaks or the core leaves it.
async fn serve(shared: &Arc<Shared>, connected: Connected) {
    let Connected { stream, node, term } = connected;
    let conn = shared.lock().add_conn();
    tracing::info!(target = %shared.target, %node, %term, "connected to the server");
    shared.drive(Input::Connected { conn, node, term });
    let result = exchange(shared, conn, &stream).await;
    if let Err(error) = result {
        tracing::info!(target = %shared.target, %error, "the connection to the server broke");
    }
    shared.lock().conn.take_if(|(mine, _)| *mine == conn);
    shared.drive(Input::Disconnected { conn });
}

async fn exchange(shared: &Arc<Shared>, conn: ConnId, stream: &TcpStream) -> io::Result<()> {
    let mut decoder = FrameDecoder::default();
    let mut unsent = BytesMut::new();
    loop {
        if !shared.lock().take_unsent(conn, &mut unsent) {
            return Ok(());
        }
        send(stream, &mut unsent)?;
        tokio::select! {
            ready = stream.readable() => {
                ready?;
                receive(shared, conn, stream, &mut decoder)?;
            }
            ready = stream.writable(), if !unsent.is_empty() => ready?,
            () = wait(shared) => {}
        }
    }
}

/// Sends what the socket takes.
fn send(stream: &TcpStream, unsent: &mut BytesMut) -> io::Result<()> {
    while !unsent.is_empty() {
        match stream.try_write(unsent) {
            Ok(count) => unsent.advance(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Takes in everything that has arrived.
fn receive(
    shared: &Arc<Shared>,
    conn: ConnId,
    stream: &TcpStream,
    decoder: &mut FrameDecoder,
) -> io::Result<()> {
    loop {
        decoder.buffer().reserve(READ_BYTES);
        match stream.try_read_buf(decoder.buffer()) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
        while let Some(frame) = decoder.next::<FromServer>().map_err(io::Error::other)? {
            shared.drive(Input::Frame { conn, frame });
        }
    }
}
