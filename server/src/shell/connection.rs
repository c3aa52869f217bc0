//! Client connections: bytes to frames, frames to bytes.
//!
//! A reader task feeds a bounded queue, so that a flood is slowed down at its source; it also stops at
//! [`REQUESTS_PER_CONNECTION_MAX`] unanswered requests. A writer task sends everything that gathered with one call; a
//! peer that does not read is cut off at [`BACKLOG_BYTES_MAX`].

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bytes::BytesMut;
use csnap_proto::Frame;
use csnap_proto::frame::{FrameDecoder, encode};
use csnap_proto::limits::{FRAME_BYTES_MAX, REQUESTS_PER_CONNECTION_MAX};
use csnap_proto::message::volume::{FromServer, ToServer};
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::{JoinHandle, spawn_local};

use super::closings::Closings;
use super::now;
use crate::core::{CloseReason, ConnId, Input};

/// Unsent answers of one connection beyond which its peer is taken for dead: several of the largest frames.
const BACKLOG_BYTES_MAX: usize = 8 * FRAME_BYTES_MAX;

/// How long sent data may stay unacknowledged before the kernel gives a peer up. Its sessions survive that.
const USER_TIMEOUT: Duration = Duration::from_secs(10);

/// Binds the listener. Another server of this node may have had the port a moment ago.
pub(super) fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(1024)?;
    TcpListener::from_std(socket.into())
}

/// One connection, as the serving loop holds it. Dropping it closes the socket.
pub(super) struct Connection {
    peer: SocketAddr,
    outgoing: Rc<Outgoing>,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
}

struct Outgoing {
    bytes: RefCell<BytesMut>,
    /// There are bytes, or the end was reached.
    changed: Notify,
    ending: Cell<bool>,
    /// Counts sockets that are open: this one is until everything queued is sent, longer than its connection.
    _open: Rc<()>,
    /// Requests that may still come before an answer goes out.
    permits: Semaphore,
}

impl Connection {
    /// Starts reading and writing. Frames and the end of the connection go to `events`; `closings` is told of a peer that
    /// does not speak our protocol. `open` is held while the socket is open.
    pub(super) fn start(
        conn: ConnId,
        stream: TcpStream,
        peer: SocketAddr,
        events: mpsc::Sender<Input>,
        closings: Rc<Closings>,
        open: Rc<()>,
    ) -> std::io::Result<Self> {
        tune(&stream)?;
        let (read, write) = stream.into_split();
        let outgoing = Rc::new(Outgoing {
            bytes: RefCell::default(),
            changed: Notify::new(),
            ending: Cell::new(false),
            _open: open,
            permits: Semaphore::new(REQUESTS_PER_CONNECTION_MAX),
        });
        let writer = spawn_local(send_all(write, outgoing.clone()));
        let receive = receive(read, outgoing.clone(), conn, events.clone());
        let reader = spawn_local(async move {
            if let Err(reason) = receive.await {
                closings.note(now(), peer, reason);
            }
            let _ = events.send(Input::Closed { conn }).await;
        });
        Ok(Self { peer, outgoing, reader, writer })
    }

    /// Who is at the other end.
    pub(super) fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Queues a frame; false when the peer leaves too much unread.
    #[must_use]
    pub(super) fn send(&self, frame: &Frame<FromServer>) -> bool {
        let mut bytes = self.outgoing.bytes.borrow_mut();
        if bytes.len() > BACKLOG_BYTES_MAX {
            return false;
        }
        encode(frame, &mut bytes);
        if frame.id.0 != 0 {
            self.outgoing.permits.add_permits(1);
        }
        self.outgoing.changed.notify_one();
        true
    }

    /// Closes the socket at once, whatever is queued.
    pub(super) fn cut(self) {
        self.writer.abort();
    }
}

impl Drop for Connection {
    /// What is queued is still sent.
    fn drop(&mut self) {
        self.reader.abort();
        self.outgoing.ending.set(true);
        self.outgoing.changed.notify_one();
    }
}

fn tune(stream: &TcpStream) -> std::io::Result<()> {
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    socket
        .set_tcp_keepalive(&TcpKeepalive::new().with_time(USER_TIMEOUT).with_interval(Duration::from_secs(2)))
}

async fn send_all(mut socket: OwnedWriteHalf, outgoing: Rc<Outgoing>) {
    loop {
        let mut bytes = outgoing.bytes.take();
        if bytes.is_empty() && outgoing.ending.get() {
            return;
        }
        if bytes.is_empty() {
            outgoing.changed.notified().await;
        } else if socket.write_all_buf(&mut bytes).await.is_err() {
            return; // The reader notices too.
        }
    }
}

/// Reads until the peer ends; why it is to be closed, if it did not.
async fn receive(
    mut socket: OwnedReadHalf,
    outgoing: Rc<Outgoing>,
    conn: ConnId,
    events: mpsc::Sender<Input>,
) -> Result<(), CloseReason> {
    let mut decoder = FrameDecoder::of_a_stranger();
    loop {
        match decoder.next::<ToServer>().map_err(CloseReason::Garbled)? {
            Some(frame) => {
                let Ok(permit) = outgoing.permits.acquire().await else { return Ok(()) };
                permit.forget();
                if events.send(Input::Frame { conn, frame }).await.is_err() {
                    return Ok(());
                }
            }
            None => match socket.read_buf(decoder.buffer()).await {
                Ok(0) | Err(_) => return Ok(()),
                Ok(_) => {}
            },
        }
    }
}
