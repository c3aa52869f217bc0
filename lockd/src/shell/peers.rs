//! Connections between replicas: one a direction, so that who sends also connects. Messages may be lost; the replicas
//! bear that. What a peer can make us hold is bounded.
//!
//! The port is for replicas alone: with TLS, whoever comes shows a certificate of role lockd. After both [`Hello`]s and
//! [`Presence`]s, the side that connected sends frames: a length (u32, little endian) and a message. The other
//! side sends nothing more.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::{BufMut, BytesMut};
use csnap_proto::Caller;
use csnap_transport::{Stream, Tls};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::door::{Door, Guest, Listener};
use super::hello::{HELLO_BYTES, Hello};
use super::introduction::{self, Introduction};
use super::places::{Places, Seat};
use super::{Event, Events, socket};
use crate::core::permission::{self, Request};
use crate::replica::{Heard, PeerMessage, ReplicaId, STATE_BYTES_MAX};
use crate::replicated::Presence;

/// Longest frame, bytes: the largest state, and its group.
const FRAME_BYTES_MAX: usize = STATE_BYTES_MAX + (64 << 10);

/// What is longer is a state; one at a time is taken in, from whomever. Messages with entries stay far below.
const SMALL_FRAME_BYTES_MAX: usize = 1 << 20;

/// Read at once, bytes. Nothing is reserved for bytes that did not come.
const PIECE_BYTES: usize = 64 << 10;

/// Unsent messages beyond which new ones are dropped, bytes: what is in flight of entries, four times. A state is sent
/// even so, alone.
const BACKLOG_BYTES_MAX: usize = 16 << 20;

/// Both greetings take no longer than this.
const HELLO_WITHIN: Duration = Duration::from_secs(2);

/// A replica that does not answer is tried again after this.
const AGAIN: Duration = Duration::from_millis(50);

/// What this replica says of itself; it may come to belong to a group.
pub(super) type Own = Rc<Introduction>;

/// Who is at an address.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    pub(super) heard: Heard,
    pub(super) presence: Presence,
}

/// The way to one address, for as long as it lives.
struct Link {
    outgoing: Rc<Outgoing>,
    /// Who is there, while it is reached.
    peer: Option<Peer>,
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
    tls: Option<Tls>,
    events: Events,
    links: BTreeMap<SocketAddr, Link>,
}

impl Peers {
    pub(super) fn new(own: Own, tls: Option<Tls>, events: Events) -> Self {
        Self { own, tls, events, links: BTreeMap::new() }
    }

    /// Keeps a way to each of these addresses, and to no other.
    pub(super) fn keep(&mut self, addresses: impl Iterator<Item = SocketAddr>) {
        let mut old = std::mem::take(&mut self.links);
        // One may be named twice, by the configuration and by the group.
        for address in addresses.collect::<BTreeSet<_>>() {
            let link = old.remove(&address).unwrap_or_else(|| self.link(address));
            self.links.insert(address, link);
        }
    }

    fn link(&self, address: SocketAddr) -> Link {
        let outgoing = Rc::new(Outgoing::default());
        let (own, events) = (Rc::clone(&self.own), self.events.clone());
        let task = stay_connected(address, own, self.tls.clone(), Rc::clone(&outgoing), events);
        let task = tokio::task::spawn_local(task);
        Link { outgoing, peer: None, task }
    }

    /// Somebody is reached at an address, or no more.
    pub(super) fn on_peer(&mut self, address: SocketAddr, peer: Option<Peer>) -> Option<ReplicaId> {
        let link = self.links.get_mut(&address)?;
        let before = std::mem::replace(&mut link.peer, peer);
        before.map(|peer| peer.heard.id)
    }

    /// Who is reached.
    pub(super) fn present(&self) -> Vec<Peer> {
        self.links.values().filter_map(|link| link.peer.clone()).collect()
    }

    /// Queues a message. `false` if its receiver is not reached, or does not keep up: then it is lost.
    pub(super) fn send(&self, message: &PeerMessage) -> bool {
        let is_there = |link: &&Link| link.peer.as_ref().is_some_and(|peer| peer.heard.id == message.to);
        let Some(link) = self.links.values().find(is_there) else { return false };
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
async fn stay_connected(
    address: SocketAddr,
    own: Own,
    tls: Option<Tls>,
    outgoing: Rc<Outgoing>,
    events: Events,
) {
    let mut last_error = String::new();
    loop {
        let error = match reach(address, &own, tls.as_ref()).await {
            Ok((stream, peer)) => {
                outgoing.bytes.borrow_mut().clear();
                info!("replica at {address} is reached");
                if events.send(Event::Peer(address, Some(peer))).await.is_err() {
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

async fn reach(address: SocketAddr, own: &Own, tls: Option<&Tls>) -> anyhow::Result<(Stream, Peer)> {
    let greet = async {
        let mut stream = socket::dial(&address.into(), tls).await?;
        let peer = greet(&mut stream, own).await?;
        Ok((stream, peer))
    };
    let greeted: Result<_, String> =
        tokio::time::timeout(HELLO_WITHIN, greet).await.context("it does not answer")?;
    greeted.map_err(anyhow::Error::msg)
}

async fn greet(stream: &mut Stream, own: &Own) -> Result<Peer, String> {
    let explain = |error| csnap_transport::explain(&error);
    stream.write_all(&own.hello.get().encode()).await.map_err(explain)?;
    stream.flush().await.map_err(explain)?;
    let mut bytes = [0; HELLO_BYTES];
    stream.read_exact(&mut bytes).await.map_err(explain)?;
    let Hello { heard, .. } = Hello::decode(&bytes, &own.hello.get())?;
    let presence = introduction::exchange(stream, own).await.map_err(|error| format!("{error:#}"))?;
    Ok(Peer { heard, presence })
}

/// Until the connection breaks, or the other side ends it.
async fn send_all(stream: Stream, outgoing: &Outgoing) -> io::Result<()> {
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
            write.flush().await?;
        }
    }
}

/// Takes in the others.
pub(super) async fn accept(listener: TcpListener, own: Own, tls: Option<Tls>, places: Seats, events: Events) {
    let large = Rc::new(Cell::new(false));
    let greet = async move |stream: &mut Stream, caller: &Caller| {
        may_replicate(caller, stream)?;
        greet(stream, &own).await
    };
    let take_in = async move |guest: Guest, peer: Peer| {
        let leave = Rc::new(Notify::new());
        let seat = Seated::take(&places, peer.heard.id, &leave);
        let ended = tokio::select! {
            ended = receive(guest.stream, peer, &events, &large) => ended,
            () = leave.notified() => Err(anyhow::anyhow!("another connection took its place")),
        };
        drop(seat);
        if let Err(error) = ended {
            warn!("replica from {}: {error:#}", guest.from);
        }
    };
    Door::new(tls).open(Listener::Tcp(listener), greet, take_in).await;
}

/// Whoever shows a certificate must be a replica by it. Without any the port is this machine's alone, and so is trusted.
fn may_replicate(caller: &Caller, stream: &Stream) -> Result<(), String> {
    match stream {
        Stream::Tls(_) => permission::check(caller, Request::Replicate, permission::Broken::NONE)
            .map_err(|denied| denied.to_string()),
        Stream::Tcp(_) | Stream::Unix(_) => Ok(()),
    }
}

/// The places, and how whoever sits there is told to go.
pub(super) type Seats = Rc<RefCell<(Places, BTreeMap<Seat, Rc<Notify>>)>>;

/// A place that is taken; given back when dropped.
struct Seated {
    seats: Seats,
    seat: Seat,
}

impl Seated {
    fn take(seats: &Seats, id: ReplicaId, leave: &Rc<Notify>) -> Self {
        let (places, sitting) = &mut *seats.borrow_mut();
        let (seat, victim) = places.take(id);
        if let Some(told) = victim.and_then(|victim| sitting.remove(&victim)) {
            told.notify_one();
        }
        sitting.insert(seat, Rc::clone(leave));
        Self { seats: Rc::clone(seats), seat }
    }
}

impl Drop for Seated {
    fn drop(&mut self) {
        let (places, sitting) = &mut *self.seats.borrow_mut();
        places.leave(self.seat);
        sitting.remove(&self.seat);
    }
}

async fn receive(
    mut stream: Stream,
    peer: Peer,
    events: &Events,
    large: &Rc<Cell<bool>>,
) -> anyhow::Result<()> {
    let mut buffer = BytesMut::new();
    let mut room = None;
    loop {
        while let Some(frame) = take_frame(&mut buffer)? {
            let message = PeerMessage::decode(&frame).map_err(anyhow::Error::msg)?;
            if message.from != peer.heard.id {
                bail!("it speaks for another replica");
            }
            if events.send(Event::Said(message)).await.is_err() {
                return Ok(());
            }
            room = None;
        }
        if room.is_none() && announced(&buffer).is_some_and(|len| len > SMALL_FRAME_BYTES_MAX) {
            room = Some(LargeFrame::begin(large)?);
        }
        buffer.reserve(PIECE_BYTES);
        if stream.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
    }
}

/// The right to take in a large frame; given back when dropped.
struct LargeFrame(Rc<Cell<bool>>);

impl LargeFrame {
    fn begin(taken: &Rc<Cell<bool>>) -> anyhow::Result<Self> {
        if taken.replace(true) {
            bail!("another replica's state is being taken in");
        }
        Ok(Self(Rc::clone(taken)))
    }
}

impl Drop for LargeFrame {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

/// Length of the next frame, without the length itself.
fn announced(buffer: &BytesMut) -> Option<usize> {
    buffer.first_chunk::<4>().map(|len| u32::from_le_bytes(*len) as usize)
}

fn take_frame(buffer: &mut BytesMut) -> anyhow::Result<Option<BytesMut>> {
    let Some(len) = announced(buffer) else { return Ok(None) };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_large_frame_is_taken_in_at_a_time() {
        let taken = Rc::new(Cell::new(false));
        let first = LargeFrame::begin(&taken).expect("nobody else");
        assert!(LargeFrame::begin(&taken).is_err());
        assert!(LargeFrame::begin(&taken).is_err(), "the refused one gave nothing back");
        drop(first);
        assert!(LargeFrame::begin(&taken).is_ok());
    }

    #[test]
    fn frames_longer_than_any_are_refused_before_they_come() {
        let mut buffer = BytesMut::from(&u32::MAX.to_le_bytes()[..]);
        assert!(take_frame(&mut buffer).is_err());
        let mut buffer = BytesMut::from(&[3, 0, 0, 0, b'a', b'b'][..]);
        assert_eq!(take_frame(&mut buffer).expect("short"), None);
        buffer.extend_from_slice(b"cd");
        assert_eq!(take_frame(&mut buffer).expect("short").as_deref(), Some(&b"abc"[..]));
        assert_eq!(&buffer[..], b"d");
    }
}
