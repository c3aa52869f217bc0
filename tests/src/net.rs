//! The network: byte streams between processes, as TCP and unix sockets behave.
//!
//! A stream keeps its order; different streams overtake each other. A lost packet shows as delay. A partition, one way or
//! both, holds bytes back until it heals or until the sender's kernel gives up and breaks *its* end: the other end stays
//! half open until it sends or its keepalive notices. A connection may be cut at both ends or at one, with what was under
//! way still delivered: that is how a frame of a connection comes after its successor was made. A killed process closes
//! its ends; a host that lost power says nothing.
//!
//! Lockds speak to each other without streams here: what they say is lost, delayed, doubled and reordered, which is worse than
//! what the daemon's connections do to it.
//!
//! A socket can travel beside a message (SCM_RIGHTS): its end then belongs to whoever receives it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use csnap_storage::sim::Rng;

use crate::queue::Queue;
use crate::sim::{Event, Happening, HostId, ProcId};

/// Data that stays unacknowledged so long breaks the sender's end, microseconds.
const USER_TIMEOUT: u64 = 5_000_000;

/// A silent half-open end is noticed by keepalive after this, microseconds.
const KEEPALIVE: u64 = 8_000_000;

/// A connection that is not made by then is given up, microseconds.
const CONNECT_WITHIN: u64 = 250_000;

/// A lost packet comes again after so long at least, microseconds.
const RETRANSMIT: u64 = 200_000;

/// A connection. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NetConn(pub u64);

/// What travels: the bytes of whole frames, and perhaps a socket.
#[derive(Clone, Debug)]
pub struct Payload {
    /// Frames.
    pub bytes: Bytes,
    /// A socket beside them.
    pub socket: Option<NetConn>,
}

/// Which end of a connection.
pub type Side = usize;

#[derive(Debug)]
enum Item {
    Data(Payload),
    Fin,
}

#[derive(Debug)]
struct End {
    owner: Option<ProcId>,
    host: HostId,
    open: bool,
    /// On its way to this end.
    incoming: VecDeque<Item>,
    /// Nothing arrives here before.
    due: u64,
    /// Arrivals that a partition holds back.
    owed: u32,
    blocked_since: Option<u64>,
}

#[derive(Debug)]
struct Conn {
    ends: [End; 2],
    local: bool,
}

/// Delays and losses of a world.
#[derive(Clone, Debug)]
pub struct Weather {
    /// One way between hosts, microseconds.
    pub delay: u64,
    /// On top, at most.
    pub jitter: u64,
    /// Probability that a message is lost and sent again.
    pub loss: f64,
}

/// See the module.
#[derive(Debug)]
pub struct Net {
    weather: Weather,
    rng: Rng,
    conns: BTreeMap<NetConn, Conn>,
    last: u64,
    listeners: BTreeMap<String, (ProcId, HostId)>,
    /// Directions that nothing passes.
    blocked: BTreeSet<(HostId, HostId)>,
    /// Hosts without power.
    dark: BTreeSet<HostId>,
}

impl Net {
    /// An empty network.
    #[must_use]
    pub fn new(weather: Weather, rng: Rng) -> Self {
        Self {
            weather,
            rng,
            conns: BTreeMap::new(),
            last: 0,
            listeners: BTreeMap::new(),
            blocked: BTreeSet::new(),
            dark: BTreeSet::new(),
        }
    }

    /// A process listens at `address`.
    pub fn listen(&mut self, address: &str, proc: ProcId, host: HostId) {
        self.listeners.insert(address.to_owned(), (proc, host));
    }

    /// Whether nothing passes from one host to the other.
    #[must_use]
    pub fn is_blocked(&self, from: HostId, to: HostId) -> bool {
        from != to && self.blocked.contains(&(from, to))
            || self.dark.contains(&from)
            || self.dark.contains(&to)
    }

    /// Nothing passes any more in this direction.
    pub fn block(&mut self, from: HostId, to: HostId) {
        self.blocked.insert((from, to));
    }

    /// No direction is blocked any more.
    pub fn heal(&mut self, queue: &mut Queue<Happening>) {
        self.blocked.clear();
        self.release(queue);
    }

    /// A host's network goes or comes back.
    pub fn set_dark(&mut self, host: HostId, dark: bool, queue: &mut Queue<Happening>) {
        if dark {
            self.dark.insert(host);
        } else {
            self.dark.remove(&host);
            self.release(queue);
        }
    }

    /// Less hostile from now on.
    pub fn calm(&mut self) {
        self.weather.loss = 0.0;
    }

    /// What was held back where nothing blocks it any more arrives soon.
    fn release(&mut self, queue: &mut Queue<Happening>) {
        let ids: Vec<NetConn> = self.conns.keys().copied().collect();
        for id in ids {
            for side in 0..2 {
                let conn = &self.conns[&id];
                let (from, to) = (conn.ends[1 - side].host, conn.ends[side].host);
                if conn.ends[side].owed == 0 || self.is_blocked(from, to) {
                    continue;
                }
                let wait = self.rng.below(RETRANSMIT);
                let end = &mut self.conns.get_mut(&id).expect("just listed").ends[side];
                let at = end.due.max(queue.now() + wait);
                end.due = at;
                for _ in 0..std::mem::take(&mut end.owed) {
                    queue.push(at, Happening::Arrive { conn: id, side });
                }
                end.blocked_since = None;
            }
        }
    }

    fn delay(&mut self, local: bool) -> u64 {
        if local {
            return 5 + self.rng.below(30);
        }
        let mut delay = self.weather.delay + self.rng.below(self.weather.jitter + 1);
        while self.rng.chance(self.weather.loss) {
            delay += RETRANSMIT + self.rng.below(RETRANSMIT);
        }
        delay
    }

    /// When the copies of a message arrive that is sent without a stream, microseconds from now: late, in another order,
    /// twice, or not at all.
    pub fn datagram(&mut self, from: HostId, to: HostId) -> Vec<u64> {
        if self.is_blocked(from, to) || self.rng.chance(self.weather.loss) {
            return Vec::new();
        }
        let copies = if self.rng.chance(self.weather.loss) { 2 } else { 1 };
        (0..copies).map(|_| self.delay(from == to)).collect()
    }

    /// `proc` connects; it is told with the tag how that went.
    pub fn connect(
        &mut self,
        proc: ProcId,
        host: HostId,
        address: &str,
        tag: u64,
        queue: &mut Queue<Happening>,
    ) {
        let to = self.listeners.get(address).copied();
        let blocked = to.is_some_and(|(_, to)| self.is_blocked(host, to) || self.is_blocked(to, host));
        let local = to.is_some_and(|(_, to)| to == host);
        let wait = if blocked { CONNECT_WITHIN } else { self.delay(local) + self.delay(local) };
        queue.push_in(wait, Happening::Connect { proc, host, address: address.to_owned(), tag });
    }

    /// The time of a connect has come: the connection, and who listens at its other end.
    pub fn establish(&mut self, proc: ProcId, host: HostId, address: &str) -> Option<(NetConn, ProcId)> {
        let (listener, to) = self.listeners.get(address).copied()?;
        if self.is_blocked(host, to) || self.is_blocked(to, host) {
            return None;
        }
        self.last += 1;
        let id = NetConn(self.last);
        let end = |owner, host| End {
            owner: Some(owner),
            host,
            open: true,
            incoming: VecDeque::new(),
            due: 0,
            owed: 0,
            blocked_since: None,
        };
        self.conns.insert(id, Conn { ends: [end(proc, host), end(listener, to)], local: host == to });
        Some((id, listener))
    }

    /// Who holds the other end.
    #[must_use]
    pub fn peer(&self, conn: NetConn, proc: ProcId) -> Option<ProcId> {
        let conn = self.conns.get(&conn)?;
        let side = conn.ends.iter().position(|end| end.owner == Some(proc))?;
        conn.ends[1 - side].owner
    }

    fn side_of(&self, conn: NetConn, proc: ProcId) -> Option<Side> {
        self.conns.get(&conn)?.ends.iter().position(|end| end.owner == Some(proc) && end.open)
    }

    /// `proc` sends; into the void if its end is not open.
    pub fn send(&mut self, conn: NetConn, proc: ProcId, payload: Payload, queue: &mut Queue<Happening>) {
        match (self.side_of(conn, proc), payload.socket) {
            (Some(side), _) => self.post(conn, 1 - side, Item::Data(payload), queue),
            (None, Some(socket)) => self.lose_socket(socket, queue),
            (None, None) => {}
        }
    }

    fn post(&mut self, id: NetConn, to: Side, item: Item, queue: &mut Queue<Happening>) {
        let local = self.conns.get(&id).is_some_and(|conn| conn.local);
        let delay = self.delay(local);
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let end = &mut conn.ends[to];
        end.due = end.due.max(queue.now() + delay);
        end.incoming.push_back(item);
        queue.push(end.due, Happening::Arrive { conn: id, side: to });
    }

    /// `proc` closes its end, or is dead.
    pub fn close(&mut self, conn: NetConn, proc: ProcId, queue: &mut Queue<Happening>) {
        if let Some(side) = self.side_of(conn, proc) {
            self.shut(conn, side);
            self.post(conn, 1 - side, Item::Fin, queue);
        }
    }

    fn shut(&mut self, conn: NetConn, side: Side) {
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.ends[side].open = false;
            conn.ends[side].owner = None;
        }
    }

    /// A process is gone: its ends close, without a word if its host lost its power.
    pub fn bury(&mut self, proc: ProcId, silent: bool, queue: &mut Queue<Happening>) {
        self.listeners.retain(|_, (listener, _)| *listener != proc);
        let owned: Vec<(NetConn, Side)> = self
            .conns
            .iter()
            .flat_map(|(id, conn)| {
                (0..2).filter(|side| conn.ends[*side].owner == Some(proc)).map(|s| (*id, s))
            })
            .collect();
        for (conn, side) in owned {
            self.shut(conn, side);
            if !silent {
                self.post(conn, 1 - side, Item::Fin, queue);
            }
        }
        self.conns.retain(|_, conn| conn.ends.iter().any(|end| end.open || !end.incoming.is_empty()));
    }

    /// Hands an end over with a message: from now on it belongs to `to`.
    pub fn hand_over(&mut self, conn: NetConn, from: Option<ProcId>, to: Option<ProcId>) {
        if let Some(conn) = self.conns.get_mut(&conn)
            && let Some(end) = conn.ends.iter_mut().find(|end| end.owner == from && end.open)
        {
            end.owner = to;
        }
    }

    /// A socket that was under way to someone who is not there any more is closed.
    pub fn lose_socket(&mut self, id: NetConn, queue: &mut Queue<Happening>) {
        let side = self.conns.get(&id).and_then(|c| c.ends.iter().position(|e| e.owner.is_none() && e.open));
        if let Some(side) = side {
            self.shut(id, side);
            self.post(id, 1 - side, Item::Fin, queue);
        }
    }

    /// Something arrives at an end, or is held back. What its owner sees of it.
    pub fn arrive(
        &mut self,
        id: NetConn,
        side: Side,
        queue: &mut Queue<Happening>,
    ) -> Option<(ProcId, Event)> {
        let (from, to) = {
            let conn = self.conns.get(&id)?;
            (conn.ends[1 - side].host, conn.ends[side].host)
        };
        if self.is_blocked(from, to) {
            let end = &mut self.conns.get_mut(&id)?.ends[side];
            end.owed += 1;
            if end.blocked_since.is_none() {
                let since = queue.now();
                end.blocked_since = Some(since);
                queue.push_in(USER_TIMEOUT, Happening::GiveUp { conn: id, side, since });
            }
            return None;
        }
        let end = &mut self.conns.get_mut(&id)?.ends[side];
        let item = end.incoming.pop_front()?;
        let (open, owner) = (end.open, end.owner);
        match item {
            Item::Data(payload) if open => {
                let owner = owner?;
                if let Some(socket) = payload.socket {
                    self.hand_over(socket, None, Some(owner));
                }
                Some((owner, Event::Received { conn: id, payload }))
            }
            Item::Data(payload) => {
                if let Some(socket) = payload.socket {
                    self.lose_socket(socket, queue);
                }
                // Nobody is there: the sender's end is reset.
                self.post(id, 1 - side, Item::Fin, queue);
                None
            }
            Item::Fin if open => {
                self.shut(id, side);
                Some((owner?, Event::Closed { conn: id }))
            }
            Item::Fin => None,
        }
    }

    /// The kernel of the sender towards `side` looks whether what it sent is acknowledged by now.
    pub fn give_up(
        &mut self,
        id: NetConn,
        side: Side,
        since: u64,
        queue: &mut Queue<Happening>,
    ) -> Option<(ProcId, Event)> {
        let end = &mut self.conns.get_mut(&id)?.ends[side];
        if end.blocked_since != Some(since) {
            return None;
        }
        end.incoming.clear();
        (end.owed, end.blocked_since) = (0, None);
        queue.push_in(KEEPALIVE, Happening::Keepalive { conn: id, side });
        self.break_end(id, 1 - side)
    }

    /// Keepalive at `side`: a peer that is gone is noticed.
    pub fn keepalive(
        &mut self,
        id: NetConn,
        side: Side,
        queue: &mut Queue<Happening>,
    ) -> Option<(ProcId, Event)> {
        let conn = self.conns.get(&id)?;
        if !conn.ends[side].open || conn.ends[1 - side].open {
            return None;
        }
        if self.is_blocked(conn.ends[1 - side].host, conn.ends[side].host) && self.rng.chance(0.5) {
            queue.push_in(KEEPALIVE, Happening::Keepalive { conn: id, side });
            return None;
        }
        self.break_end(id, side)
    }

    fn break_end(&mut self, id: NetConn, side: Side) -> Option<(ProcId, Event)> {
        let end = &mut self.conns.get_mut(&id)?.ends[side];
        let owner = std::mem::replace(&mut end.open, false).then(|| end.owner.take()).flatten()?;
        Some((owner, Event::Closed { conn: id }))
    }

    /// Connections between two hosts, or on one, that are open at both ends.
    #[must_use]
    pub fn open_conns(&self) -> Vec<NetConn> {
        let whole = |conn: &&Conn| !conn.local && conn.ends.iter().all(|end| end.open && end.owner.is_some());
        self.conns.iter().filter(|(_, conn)| whole(conn)).map(|(id, _)| *id).collect()
    }

    /// Cuts a connection: at one end only, whose peer then lives in a dream, or at both.
    pub fn cut(&mut self, id: NetConn, sides: &[Side], queue: &mut Queue<Happening>) -> Vec<(ProcId, Event)> {
        if let [side] = sides {
            queue.push_in(KEEPALIVE, Happening::Keepalive { conn: id, side: 1 - side });
        }
        sides.iter().filter_map(|side| self.break_end(id, *side)).collect()
    }

    /// Whether the other end of a connection that `proc` holds is still open.
    #[must_use]
    pub fn is_whole(&self, conn: NetConn, proc: ProcId) -> bool {
        self.side_of(conn, proc).is_some_and(|side| self.conns[&conn].ends[1 - side].open)
    }
}
