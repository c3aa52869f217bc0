//! The agent's unix socket: who may speak, frames in, frames and sockets out.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use csnap_proto::frame::{FrameDecoder, encode};
use csnap_proto::limits::{CONNECTIONS_MAX, FRAME_BYTES_MAX, HANDSHAKE_MS_MAX};
use csnap_proto::message::local::{FromAgent, ToAgent};
use csnap_proto::{Descriptors, Frame, RequestId, Term};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::process::{Resource, getrlimit};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::{Notify, mpsc};
use tracing::warn;

use super::{Event, Events, identify};
use crate::core::{ConnId, Input, Process};

/// Messages that wait to be read by one peer; one that lets more pile up is cut off.
const OUTGOING_MAX: usize = 1024;

/// Bytes of such messages; one more is taken while there are fewer. A few of the longest statuses.
const OUTGOING_BYTES_MAX: usize = 4 * FRAME_BYTES_MAX;

/// Bytes read at once.
const READ_BYTES: usize = 16 << 10;

/// Binds the socket for owner and group, and accepts for ever. Whoever calls holds the lock of the state directory, so a
/// socket that exists is stale.
pub(super) fn listen(path: &Path, events: Events) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o117));
    let listener = UnixListener::bind(path);
    rustix::process::umask(before);
    let listener = listener?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    if events.send(Event::Accepted(stream)).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    // Out of descriptors, most likely: let some close.
                    warn!("cannot accept: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(())
}

/// Connections at once, as many as leave the agent's own files theirs.
pub(super) fn connections_max() -> usize {
    Descriptors::new(getrlimit(Resource::Nofile).current).connections(CONNECTIONS_MAX)
}

/// Who connected, if they may: our own user or root, while there is room.
pub(super) fn admit(stream: &UnixStream, conns: usize, most: usize) -> Result<Process, String> {
    if conns >= most {
        return Err(format!("{most} connections are open already"));
    }
    let peer = stream.peer_cred().map_err(|error| format!("no credentials: {error}"))?;
    let own = rustix::process::geteuid().as_raw();
    if peer.uid() != own && peer.uid() != 0 {
        return Err(format!("user {} is neither root nor user {own}", peer.uid()));
    }
    let pid = peer.pid().and_then(|pid| u32::try_from(pid).ok()).ok_or("no process id")?;
    identify(pid).ok_or_else(|| format!("process {pid} is gone already"))
}

struct Outgoing {
    bytes: Bytes,
    socket: Option<TcpStream>,
}

/// One peer; dropping it closes the connection.
pub(super) struct Connection {
    outgoing: mpsc::Sender<Outgoing>,
    /// Bytes that wait in it.
    unsent: Arc<AtomicUsize>,
    closed: Arc<Notify>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

impl Connection {
    pub(super) fn start(conn: ConnId, stream: UnixStream, events: Events) -> Self {
        let (outgoing, queue) = mpsc::channel(OUTGOING_MAX);
        let closed = Arc::new(Notify::new());
        let unsent = Arc::new(AtomicUsize::new(0));
        let (until_closed, left) = (closed.clone(), unsent.clone());
        tokio::spawn(async move {
            tokio::select! {
                reason = read(conn, &stream, &events) => if let Some(reason) = reason {
                    warn!("connection {} is closed: {reason}", conn.0);
                },
                result = write(&stream, queue, &left) => if let Err(error) = result {
                    warn!("connection {} is closed: {error}", conn.0);
                },
                () = until_closed.notified() => {}
            }
            drop(stream);
            // The main loop may be gone; then nobody needs to know.
            let _ = events.send(Event::Input(Input::Gone { conn })).await;
        });
        Self { outgoing, unsent, closed }
    }

    /// Queues a message; false when the peer does not read.
    pub(super) fn send(&self, id: RequestId, message: FromAgent, socket: Option<TcpStream>) -> bool {
        let mut bytes = BytesMut::new();
        encode(&Frame { id, term: Term(0), message }, &mut bytes);
        let before = self.unsent.fetch_add(bytes.len(), Ordering::Relaxed);
        before < OUTGOING_BYTES_MAX
            && self.outgoing.try_send(Outgoing { bytes: bytes.freeze(), socket }).is_ok()
    }

    pub(super) fn close(&self) {
        self.closed.notify_one();
    }
}

/// Reads until the end. Returns why, if the peer is to blame.
async fn read(conn: ConnId, stream: &UnixStream, events: &Events) -> Option<String> {
    let mut decoder = FrameDecoder::of_a_stranger();
    let mut introduced = false;
    loop {
        match decoder.next::<ToAgent>() {
            Ok(Some(frame)) => {
                introduced = true;
                let input = Input::Received { conn, id: frame.id, message: frame.message };
                events.send(Event::Input(input)).await.ok()?;
                continue;
            }
            Ok(None) => {}
            Err(error) => return Some(error.to_string()),
        }
        decoder.buffer().reserve(READ_BYTES);
        let patience = if introduced { Duration::MAX } else { Duration::from_millis(HANDSHAKE_MS_MAX) };
        match tokio::time::timeout(patience, read_some(stream, decoder.buffer())).await {
            Err(_) => return Some("it said nothing".to_owned()),
            Ok(Ok(0)) => return None,
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Some(error.to_string()),
        }
    }
}

async fn read_some(stream: &UnixStream, buffer: &mut BytesMut) -> io::Result<usize> {
    loop {
        stream.readable().await?;
        match stream.try_read_buf(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
    }
}

async fn write(
    stream: &UnixStream,
    mut queue: mpsc::Receiver<Outgoing>,
    unsent: &AtomicUsize,
) -> io::Result<()> {
    while let Some(Outgoing { bytes, socket }) = queue.recv().await {
        let mut sent = match &socket {
            Some(socket) => {
                stream.async_io(Interest::WRITABLE, || send_beside(stream, &bytes, socket)).await?
            }
            None => 0,
        };
        while sent < bytes.len() {
            stream.writable().await?;
            match stream.try_write(&bytes[sent..]) {
                Ok(n) => sent += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        unsent.fetch_sub(bytes.len(), Ordering::Relaxed);
    }
    Ok(())
}

/// Sends the first bytes with the socket beside them; the receiver gets both or neither.
fn send_beside(stream: &UnixStream, bytes: &[u8], socket: &TcpStream) -> io::Result<usize> {
    let fds = [socket.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)), "the buffer is made for one descriptor");
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_waits_for_a_peer_that_does_not_read_is_bounded_in_bytes() {
        let (ours, _peer) = UnixStream::pair().expect("two ends");
        let (events, _inbox) = mpsc::channel(16);
        let connection = Connection::start(ConnId(1), ours, events);
        let long = || FromAgent::Failed { reason: "x".repeat(64 << 10) };
        let taken = (0..OUTGOING_MAX).take_while(|_| connection.send(RequestId(1), long(), None)).count();
        assert!(taken * (64 << 10) <= OUTGOING_BYTES_MAX, "{taken}");
        assert!(taken > 16, "{taken}");
    }
}
