//! One connection: bytes to frames, frames to bytes.
//!
//! What a peer can make us hold is bounded: a request of [`REQUEST_BYTES_MAX`], answers up to [`BACKLOG_BYTES_MAX`]. A
//! peer that does not read its answers is not read from either, and in the end cut off.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::BytesMut;
use csnap_proto::Frame;
use csnap_proto::frame::{FrameDecoder, HEADER_BYTES, encode};
use csnap_proto::limits::{FRAME_BYTES_MAX, IMPORT_BYTES_MAX};
use csnap_proto::message::lock::{FromLockd, ToLockd};
use csnap_transport::{ReadHalf, WriteHalf};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::door::Guest;
use super::{Event, Events};
use crate::core::ConnectionId;

/// Longest request, bytes: a piece of a lockspace with its names. An Open with the longest description has a fifth of it.
const REQUEST_BYTES_MAX: usize = IMPORT_BYTES_MAX + (4 << 10);

/// Unsent answers beyond which the peer is not read from, bytes.
const BACKLOG_BYTES_PATIENT: usize = 64 << 10;

/// Unsent answers beyond which the peer is cut off, bytes: a list of all locks, of all members, and every kept event.
const BACKLOG_BYTES_MAX: usize = 4 * FRAME_BYTES_MAX;

/// How long a closed connection may take to get its last answer.
const FAREWELL_MAX: Duration = Duration::from_secs(5);

/// Dropping it closes the socket after what was queued is sent.
pub(super) struct Connection {
    peer: String,
    outgoing: Rc<Outgoing>,
    reader: JoinHandle<()>,
}

#[derive(Default)]
struct Outgoing {
    bytes: RefCell<BytesMut>,
    /// There are bytes, or the end was reached.
    filled: Notify,
    /// Bytes were taken.
    drained: Notify,
    ending: Cell<bool>,
    overflown: Cell<bool>,
}

impl Connection {
    /// Starts reading and writing.
    pub(super) fn start(id: ConnectionId, guest: Guest, events: Events) -> Self {
        let (read, write) = guest.stream.into_split();
        let outgoing = Rc::new(Outgoing::default());
        tokio::task::spawn_local(send_all(write, Rc::clone(&outgoing)));
        let reader = tokio::task::spawn_local(receive_all(id, read, Rc::clone(&outgoing), events));
        Self { peer: guest.from, outgoing, reader }
    }

    /// Who is there, for the log.
    pub(super) fn peer(&self) -> &str {
        &self.peer
    }

    /// Queues a frame.
    pub(super) fn send(&self, frame: &Frame<FromLockd>) {
        let mut bytes = self.outgoing.bytes.borrow_mut();
        if bytes.len() > BACKLOG_BYTES_MAX {
            self.outgoing.overflown.set(true);
            self.outgoing.drained.notify_one();
        } else {
            encode(frame, &mut bytes);
        }
        self.outgoing.filled.notify_one();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reader.abort();
        self.outgoing.ending.set(true);
        self.outgoing.filled.notify_one();
    }
}

/// Sends what gathers, until it is over; the reader notices a peer that is gone.
async fn send_all(mut socket: WriteHalf, outgoing: Rc<Outgoing>) {
    loop {
        let mut bytes = outgoing.bytes.take();
        outgoing.drained.notify_one();
        if bytes.is_empty() {
            if outgoing.ending.get() {
                // One that is gone needs no farewell.
                let _ = tokio::time::timeout(FAREWELL_MAX, socket.shutdown()).await;
                return;
            }
            outgoing.filled.notified().await;
            continue;
        }
        let sent = tokio::select! {
            sent = send(&mut socket, &mut bytes) => sent.is_ok(),
            () = farewell(&outgoing) => false,
        };
        if !sent || outgoing.overflown.get() {
            return;
        }
    }
}

async fn send(socket: &mut WriteHalf, bytes: &mut BytesMut) -> io::Result<()> {
    socket.write_all_buf(bytes).await?;
    socket.flush().await
}

/// Returns when the peer had long enough to take its last answers, or overflowed.
async fn farewell(outgoing: &Outgoing) {
    while !outgoing.ending.get() && !outgoing.overflown.get() {
        outgoing.filled.notified().await;
    }
    if !outgoing.overflown.get() {
        tokio::time::sleep(FAREWELL_MAX).await;
    }
}

/// Reads requests until the peer ends, errs, or is cut off; then says so.
async fn receive_all(id: ConnectionId, socket: ReadHalf, outgoing: Rc<Outgoing>, events: Events) {
    let why = receive(id, socket, &outgoing, &events).await.err();
    let _ = events.send(Event::Closed(id, why)).await;
}

async fn receive(
    id: ConnectionId,
    mut socket: ReadHalf,
    outgoing: &Outgoing,
    events: &Events,
) -> Result<(), String> {
    let mut decoder = FrameDecoder::default();
    loop {
        check_length(decoder.buffer())?;
        while let Some(frame) = decoder.next::<ToLockd>().map_err(|error| error.to_string())? {
            if events.send(Event::Received(id, frame)).await.is_err() {
                return Ok(());
            }
            check_length(decoder.buffer())?;
            while outgoing.bytes.borrow().len() > BACKLOG_BYTES_PATIENT && !outgoing.overflown.get() {
                outgoing.drained.notified().await;
            }
            if outgoing.overflown.get() {
                return Err("does not read its answers".into());
            }
        }
        decoder.buffer().reserve(REQUEST_BYTES_MAX);
        match socket.read_buf(decoder.buffer()).await {
            Ok(0) if decoder.buffer().is_empty() => return Ok(()),
            Ok(0) => return Err("ended within a frame".into()),
            Ok(_) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// Nothing is reserved for a frame longer than requests are.
fn check_length(buffer: &[u8]) -> Result<(), String> {
    let Some(length) = buffer.get(8..12) else { return Ok(()) };
    let length = u32::from_le_bytes(length.try_into().expect("four bytes")) as usize;
    if length > REQUEST_BYTES_MAX - HEADER_BYTES {
        return Err(format!("a request of {length} bytes; none is that long"));
    }
    Ok(())
}
