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

use crate::core::{ConnId, Input};

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
    outgoing: Rc<Outgoing>,
    reader: tokio::task::JoinHandle<()>,
}

struct Outgoing {
    bytes: RefCell<BytesMut>,
    /// There are bytes, or the end was reached.
    changed: Notify,
    ending: Cell<bool>,
    overflown: Cell<bool>,
    /// Requests that may still come before an answer goes out.
    permits: Semaphore,
}

impl Connection {
    /// Starts reading and writing. Frames and the end of the connection go to `events`.
    pub(super) fn start(
        conn: ConnId,
        stream: TcpStream,
        events: mpsc::Sender<Input>,
    ) -> std::io::Result<Self> {
        tune(&stream)?;
        let (read, write) = stream.into_split();
        let outgoing = Rc::new(Outgoing {
            bytes: RefCell::default(),
            changed: Notify::new(),
            ending: Cell::new(false),
            overflown: Cell::new(false),
            permits: Semaphore::new(REQUESTS_PER_CONNECTION_MAX),
        });
        tokio::task::spawn_local(send_all(write, outgoing.clone()));
        let reader = tokio::task::spawn_local(receive(conn, read, outgoing.clone(), events));
        Ok(Self { outgoing, reader })
    }

    /// Queues a frame.
    pub(super) fn send(&self, frame: &Frame<FromServer>) {
        let mut bytes = self.outgoing.bytes.borrow_mut();
        if bytes.len() > BACKLOG_BYTES_MAX {
            self.outgoing.overflown.set(true);
        } else {
            encode(frame, &mut bytes);
        }
        if frame.id.0 != 0 {
            self.outgoing.permits.add_permits(1);
        }
        self.outgoing.changed.notify_one();
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
        if outgoing.overflown.get() || (bytes.is_empty() && outgoing.ending.get()) {
            return;
        }
        if bytes.is_empty() {
            outgoing.changed.notified().await;
        } else if socket.write_all_buf(&mut bytes).await.is_err() {
            return; // The reader notices too.
        }
    }
}

async fn receive(
    conn: ConnId,
    mut socket: OwnedReadHalf,
    outgoing: Rc<Outgoing>,
    events: mpsc::Sender<Input>,
) {
    let mut decoder = FrameDecoder::default();
    loop {
        match decoder.next::<ToServer>() {
            Ok(Some(frame)) => {
                match outgoing.permits.acquire().await {
                    Ok(permit) => permit.forget(),
                    Err(_) => break,
                }
                if events.send(Input::Frame { conn, frame }).await.is_err() {
                    return;
                }
            }
            Ok(None) => match socket.read_buf(decoder.buffer()).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            },
            Err(error) => {
                let peer = socket.peer_addr().map_or_else(|_| "unknown".to_owned(), |a| a.to_string());
                tracing::warn!(%peer, %error, "closing a connection that does not speak our protocol");
                break;
            }
        }
    }
    let _ = events.send(Input::Closed { conn }).await;
}
