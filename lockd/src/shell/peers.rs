//! Connections between replicas: one a direction, so that who sends also connects. Messages may be lost; the replicas
//! bear that. What a peer can make us hold is bounded.
//!
//! After both [`Hello`]s, the side that connected sends frames: a length (u32, little endian) and a message. The other
//! side sends nothing more.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::{BufMut, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::hello::{HELLO_BYTES, Hello};
use super::{ACCEPT_AGAIN, Event, Events, socket};
use crate::replica::{Heard, PeerMessage, ReplicaId, STATE_BYTES_MAX};

/// Longest frame, bytes: the largest state, and its group.
const FRAME_BYTES_MAX: usize = STATE_BYTES_MAX + (64 << 10);

/// Read at once, bytes. Nothing is reserved for bytes that did not come.
const PIECE_BYTES: usize = 64 << 10;

/// Unsent messages beyond which new ones are dropped, bytes: what is in flight of entries, four times. A state is sent
/// even so, alone.
const BACKLOG_BYTES_MAX: usize = 16 << 20;

/// Both greetings take no longer than this.
const HELLO_WITHIN: Duration = Duration::from_secs(2);

/// A replica that does not answer is tried again after this.
const AGAIN: Duration = Duration::from_millis(50);

/// Connections from peers at once: every member twice, while old ones die.
const INCOMING_MAX: usize = 64;

/// What this replica says of itself; it may come to belong to a group.
pub(super) type Own = Rc<Cell<Hello>>;

/// The way to one address, for as long as it lives.
struct Link {
    outgoing: Rc<Outgoing>,
    /// Who is there, while it is reached.
    id: Option<ReplicaId>,
    task: JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Default)]
struct Outgoing {
    bytes: RefCell<BytesMut>,
    filled: Notify,
}

/// See the module.
pub(super) struct Peers {
    own: Own,
    events: Events,
    links: BTreeMap<SocketAddr, Link>,
}

impl Peers {
    pub(super) fn new(own: Own, events: Events) -> Self {
        Self { own, events, links: BTreeMap::new() }
    }

    /// Keeps a way to each of these addresses, and to no other.
    pub(super) fn keep(&mut self, addresses: impl Iterator<Item = SocketAddr>) {
        let mut old = std::mem::take(&mut self.links);
        for address in addresses {
            let link = old.remove(&address).unwrap_or_else(|| self.link(address));
            self.links.insert(address, link);
        }
    }

    fn link(&self, address: SocketAddr) -> Link {
        let outgoing = Rc::new(Outgoing::default());
        let (own, events) = (Rc::clone(&self.own), self.events.clone());
        let task = tokio::task::spawn_local(stay_connected(address, own, Rc::clone(&outgoing), events));
        Link { outgoing, id: None, task }
    }

    /// Somebody is reached at an address, or no more.
    pub(super) fn on_peer(&mut self, address: SocketAddr, heard: Option<Heard>) -> Option<ReplicaId> {
        let link = self.links.get_mut(&address)?;
        std::mem::replace(&mut link.id, heard.map(|heard| heard.id))
    }

    /// Queues a message. `false` if its receiver is not reached, or does not keep up: then it is lost.
    pub(super) fn send(&self, message: &PeerMessage) -> bool {
        let Some(link) = self.links.values().find(|link| link.id == Some(message.to)) else { return false };
        let mut bytes = link.outgoing.bytes.borrow_mut();
        if bytes.len() > BACKLOG_BYTES_MAX {
            return false;
        }
        let encoded = message.encode();
        bytes.put_u32_le(u32::try_from(encoded.len()).expect("a state is bounded"));
        bytes.put_slice(&encoded);
        link.outgoing.filled.notify_one();
        true
    }
}

/// Connects, sends what gathers, and begins again when that ends.
async fn stay_connected(address: SocketAddr, own: Own, outgoing: Rc<Outgoing>, events: Events) {
    let mut last_error = String::new();
    loop {
        let error = match reach(address, &own).await {
            Ok((stream, hello)) => {
                outgoing.bytes.borrow_mut().clear();
                info!("replica at {address} is reached");
                if events.send(Event::Peer(address, Some(hello.heard))).await.is_err() {
                    return;
                }
                let ended = send_all(stream, &outgoing).await;
                if events.send(Event::Peer(address, None)).await.is_err() {
                    return;
                }
                ended.err().map_or("it closed the connection".into(), |error| error.to_string())
            }
            Err(error) => format!("{error:#}"),
        };
        if error != last_error {
            warn!("replica at {address}: {error}");
            last_error = error;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn reach(address: SocketAddr, own: &Own) -> anyhow::Result<(TcpStream, Hello)> {
    let greet = async {
        let mut stream = socket::connect(address).await?;
        let hello = greet(&mut stream, own).await?;
        anyhow::Ok((stream, hello))
    };
    tokio::time::timeout(HELLO_WITHIN, greet).await.context("it does not answer")?
}

async fn greet(stream: &mut TcpStream, own: &Own) -> anyhow::Result<Hello> {
    stream.write_all(&own.get().encode()).await?;
    let mut bytes = [0; HELLO_BYTES];
    stream.read_exact(&mut bytes).await?;
    Hello::decode(&bytes, &own.get()).map_err(anyhow::Error::msg)
}

/// Until the connection breaks, or the other side ends it.
async fn send_all(stream: TcpStream, outgoing: &Outgoing) -> io::Result<()> {
    let (mut read, mut write) = stream.into_split();
    let mut nothing = [0];
    loop {
        let mut bytes = outgoing.bytes.take();
        if bytes.is_empty() {
            tokio::select! {
                () = outgoing.filled.notified() => {}
                ended = read.read(&mut nothing) => return ended.map(|_| ()),
            }
        } else {
            write.write_all_buf(&mut bytes).await?;
        }
    }
}

/// Takes in the others.
pub(super) async fn accept(listener: TcpListener, own: Own, events: Events) {
    let open = Rc::new(Cell::new(0));
    loop {
        match listener.accept().await {
            Ok((stream, from)) if open.get() < INCOMING_MAX => {
                open.set(open.get() + 1);
                let (own, events, open) = (Rc::clone(&own), events.clone(), Rc::clone(&open));
                tokio::task::spawn_local(async move {
                    if let Err(error) = receive(stream, own, events).await {
                        warn!("replica from {from}: {error:#}");
                    }
                    open.set(open.get() - 1);
                });
            }
            Ok((_, from)) => warn!("replica from {from}: too many connections"),
            Err(error) => {
                warn!("cannot accept replicas: {error}");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

async fn receive(mut stream: TcpStream, own: Own, events: Events) -> anyhow::Result<()> {
    socket::tune(&stream)?;
    let hello =
        tokio::time::timeout(HELLO_WITHIN, greet(&mut stream, &own)).await.context("no greeting")??;
    let mut buffer = BytesMut::new();
    loop {
        while let Some(frame) = take_frame(&mut buffer)? {
            let message = PeerMessage::decode(&frame).map_err(anyhow::Error::msg)?;
            if message.from != hello.heard.id {
                bail!("it speaks for another replica");
            }
            if events.send(Event::Said(message)).await.is_err() {
                return Ok(());
            }
        }
        buffer.reserve(PIECE_BYTES);
        if stream.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
    }
}

fn take_frame(buffer: &mut BytesMut) -> anyhow::Result<Option<BytesMut>> {
    let Some(len) = buffer.first_chunk::<4>() else { return Ok(None) };
    let len = u32::from_le_bytes(*len) as usize;
    if len > FRAME_BYTES_MAX {
        bail!("a message of {len} bytes; none is that long");
    }
    if buffer.len() < 4 + len {
        return Ok(None);
    }
    let mut frame = buffer.split_to(4 + len);
    let _ = frame.split_to(4);
    Ok(Some(frame))
}
