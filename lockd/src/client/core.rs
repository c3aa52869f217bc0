//! The state of one session as its owner sees it. See the module above for the calling convention.

// An address is a value; nothing is opened here.
use ::core::net::SocketAddr;
use std::time::Duration;

use csnap_proto::limits::{LEASE_MS_MAX, LEASE_MS_MIN, MEMBER_INFO_BYTES_MAX};
use csnap_proto::message::lock::{
    FromLockd, LockEvent, LockOp, LockReply, LockView, LockdStatus, QueuedView, ToLockd,
};
use csnap_proto::{EventNumber, Frame, Name, RequestId, Secret, SessionId, Term, Time};

use super::pending::{Pending, Ticket};

/// Wait before the second attempt, milliseconds. The first follows at once on a connection that was of use: one that
/// carried a renewal.
const RECONNECT_MS_MIN: u64 = 10;

/// Longest wait between two attempts, milliseconds: an operator who restarts lockd should not wait for it.
const RECONNECT_MS_MAX: u64 = 200;

/// Hints followed in a row. Each is good once, so lockds that name each other, or somebody who is gone, are left for the
/// addresses that the owner knows, and those are tried in turn.
const HINTS_MAX: u32 = 3;

/// Why a client that is bound by its lease gave its session up by its own clock. Any other reason is lockd's.
pub const GAVE_UP: &str = "lockd confirmed no renewal for as long as the lease";

/// How a client keeps its session.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Node, for people and for membership.
    pub node: Name,
    /// Time without renewal after which lockd expires the session, milliseconds; moved into the limits of lockd.
    pub lease_ms: u64,
    /// Time between renewals, milliseconds; at most a third of the lease.
    pub renew_ms: u64,
}

/// What makes a session somebody's. Drawn at random by the owner; saved by owners that want to resume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Which session.
    pub session: SessionId,
    /// Proof.
    pub secret: Secret,
}

/// What happened.
#[derive(Debug)]
pub enum ClientInput {
    /// Time passed; also the first input.
    Tick,
    /// The connection that [`ClientOutput::Connect`] asked for is there.
    Connected {
        /// As asked.
        attempt: u64,
    },
    /// It could not be made, or broke.
    Disconnected {
        /// As asked.
        attempt: u64,
    },
    /// A frame came.
    Received {
        /// Connection that it came on.
        attempt: u64,
        /// What.
        frame: Frame<FromLockd>,
    },
    /// The owner wants lockd's status; dropped while not open.
    Status,
    /// The owner ends the session; everything that it holds is released as if the owner died. Tried until answered.
    Close,
}

/// What is to be done, in order.
#[derive(Debug, PartialEq, Eq)]
pub enum ClientOutput {
    /// Connect to any lockd.
    Connect {
        /// Name of the connection from now on.
        attempt: u64,
    },
    /// Drop the connection, or stop trying to make it.
    Disconnect {
        /// Which.
        attempt: u64,
    },
    /// Send this.
    Send {
        /// On which connection.
        attempt: u64,
        /// What.
        frame: Frame<ToLockd>,
    },
    /// Lockds are found there from now on: the session's lockspace moved to another group.
    Moved {
        /// At any of these.
        to: Vec<SocketAddr>,
    },
    /// For the owner.
    Event(ClientEvent),
}

/// What the owner learns.
#[derive(Debug, PartialEq, Eq)]
pub enum ClientEvent {
    /// The session is open on a connection. Answers and events that were missed follow.
    Opened {
        /// Locks that it holds by now: events that follow may be older.
        locks: Vec<LockView>,
        /// Requests that wait.
        queued: Vec<QueuedView>,
        /// It existed before.
        resumed: bool,
    },
    /// An operation is done.
    Answer {
        /// As [`LockClient::operate`] gave it.
        ticket: Ticket,
        /// What was asked.
        op: LockOp,
        /// What came of it.
        reply: LockReply,
    },
    /// Something happened to the session's locks, watches or fellow members. Never [`LockEvent::Jeopardy`].
    Event(LockEvent),
    /// Two thirds of the lease passed since the last renewal that lockd confirmed, or lockd says so. Nothing is lost yet.
    Jeopardy,
    /// The connection is gone; the session lives on, and the client reconnects by itself.
    Disconnected,
    /// Nothing of the session is held any more. [`LockClient::restart`] begins another.
    SessionLost {
        /// One line for people.
        reason: String,
    },
    /// The session is closed, as asked.
    Closed,
    /// As asked.
    Status(LockdStatus),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    /// No connection; the next attempt is due then.
    Down { retry_at: Time },
    /// Asked for; given up then.
    Connecting { give_up_at: Time },
    /// Open or Resume sent.
    Opening { give_up_at: Time },
    /// In use.
    Open,
    /// The session is over.
    Over,
}

#[derive(Clone, Copy, Debug)]
struct Renewal {
    id: RequestId,
    sent_at: Time,
}

/// One session, kept alive. See the module.
#[derive(Debug)]
pub struct LockClient {
    config: ClientConfig,
    identity: Identity,
    /// Absent for the one that every group has.
    space: Option<Name>,
    info: Vec<u8>,
    /// Lockd has confirmed the session at least once.
    known: bool,
    closing: bool,
    renewing: bool,
    link: Link,
    attempt: u64,
    backoff_ms: u64,
    next_id: u64,
    last_event: EventNumber,
    pending: Pending,
    /// Sent and not confirmed.
    renewal: Option<Renewal>,
    next_renewal: Time,
    /// When the last confirmed renewal was sent.
    confirmed_at: Option<Time>,
    warned: bool,
    /// Nothing is held past the lease by this client's own clock, whatever lockd thinks.
    bound_by_lease: bool,
    /// Where the next attempt goes first.
    hint: Option<SocketAddr>,
    /// Followed since lockd last confirmed a renewal.
    hints: u32,
}

impl LockClient {
    /// A session that lockd does not know yet. `info` is what other members see of it.
    #[must_use]
    pub fn new(config: ClientConfig, identity: Identity, info: Vec<u8>) -> Self {
        let lease_ms = config.lease_ms.clamp(LEASE_MS_MIN, LEASE_MS_MAX);
        let renew_ms = config.renew_ms.clamp(1, lease_ms / 3);
        let mut client = Self {
            config: ClientConfig { lease_ms, renew_ms, ..config },
            identity,
            space: None,
            info: Vec::new(),
            known: false,
            closing: false,
            renewing: true,
            link: Link::Down { retry_at: Time(0) },
            attempt: 0,
            backoff_ms: 0,
            next_id: 1,
            last_event: EventNumber(0),
            pending: Pending::default(),
            renewal: None,
            next_renewal: Time(0),
            confirmed_at: None,
            warned: false,
            bound_by_lease: false,
            hint: None,
            hints: 0,
        };
        client.set_info(info);
        client
    }

    /// A session that an earlier life of the owner left, with the last event that it had acted on (0: none; older ones
    /// than lockd still keeps surface as [`LockEvent::Overrun`]).
    #[must_use]
    pub fn resume(config: ClientConfig, identity: Identity, last_event: EventNumber) -> Self {
        Self { known: true, last_event, ..Self::new(config, identity, Vec::new()) }
    }

    /// The session is given up ([`ClientEvent::SessionLost`]) when no renewal was confirmed for a lease, counted from when
    /// the last one was sent: lockd counts from when it came, and some more, so nobody else was granted anything by then.
    /// For owners that must stop in time; one that is fenced otherwise goes on trying instead.
    #[must_use]
    pub fn bound_by_lease(self) -> Self {
        Self { bound_by_lease: true, ..self }
    }

    /// The same in another lockspace than the one that every group has. Before the first step.
    #[must_use]
    pub fn in_lockspace(self, space: Name) -> Self {
        Self { space: Some(space), ..self }
    }

    /// Takes in what happened. Outputs are to be carried out in order.
    pub fn step(&mut self, now: Time, input: ClientInput, out: &mut Vec<ClientOutput>) {
        match input {
            ClientInput::Tick => {}
            ClientInput::Connected { attempt } if attempt == self.attempt => self.on_connected(now, out),
            ClientInput::Disconnected { attempt } if attempt == self.attempt => {
                self.on_disconnected(now, out)
            }
            ClientInput::Received { attempt, frame } if attempt == self.attempt => {
                self.on_frame(now, frame, out)
            }
            ClientInput::Connected { attempt } => out.push(ClientOutput::Disconnect { attempt }),
            ClientInput::Disconnected { .. } | ClientInput::Received { .. } => {}
            ClientInput::Status if self.link == Link::Open => self.send(ToLockd::Status, out),
            ClientInput::Status => {}
            ClientInput::Close => {
                self.closing = true;
                if self.link == Link::Open {
                    self.send(ToLockd::Close, out);
                }
            }
        }
        self.on_time(now, out);
    }

    /// Asks for a lock operation; the answer comes as [`ClientEvent::Answer`] with this ticket, unless the session ends
    /// first. `None`: too many operations wait already, and this one was not taken.
    pub fn operate(&mut self, now: Time, op: LockOp, out: &mut Vec<ClientOutput>) -> Option<Ticket> {
        if let LockOp::SetInfo { info } = &op {
            self.set_info(info.clone());
        }
        let ticket = self.pending.push(op)?;
        self.send_pending(out);
        self.on_time(now, out);
        Some(ticket)
    }

    /// Whether [`Self::operate`] would take another operation now.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.pending.has_room()
    }

    /// Whether the session is to be kept alive. While false nothing is renewed, and lockd expires the session in time.
    pub fn set_renewing(&mut self, now: Time, renewing: bool, out: &mut Vec<ClientOutput>) {
        if renewing && !self.renewing {
            self.next_renewal = now;
        }
        self.renewing = renewing;
        self.on_time(now, out);
    }

    /// After [`ClientEvent::SessionLost`] or [`ClientEvent::Closed`]: another session. Operations of the old one are
    /// dropped unanswered; attempts are counted on. It begins at once, unless lockd would not have the old one either.
    pub fn restart(&mut self, now: Time, identity: Identity, info: Vec<u8>, out: &mut Vec<ClientOutput>) {
        assert!(identity != self.identity, "a session that is over does not come back");
        let wait = if self.known { Duration::ZERO } else { self.next_backoff() };
        self.identity = identity;
        self.set_info(info);
        (self.known, self.closing, self.warned) = (false, false, false);
        self.last_event = EventNumber(0);
        self.pending.restart();
        (self.renewal, self.confirmed_at, self.hint) = (None, None, None);
        self.drop_link(out);
        self.link = Link::Down { retry_at: now.after(wait) };
        self.on_time(now, out);
    }

    /// When to step again at the latest, if nothing else happens.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        let link = match self.link {
            Link::Down { retry_at } => Some(retry_at),
            Link::Connecting { give_up_at } | Link::Opening { give_up_at } => Some(give_up_at),
            Link::Open => match self.renewal {
                Some(renewal) => Some(renewal.sent_at.after(self.patience())),
                None => self.renewing.then_some(self.next_renewal),
            },
            Link::Over => return None,
        };
        [link, self.jeopardy_at(), self.lost_at()].into_iter().flatten().min()
    }

    /// Where the attempt that [`ClientOutput::Connect`] asks for should go before any other address: a lockd said that
    /// the leader is there.
    #[must_use]
    pub fn hint(&self) -> Option<SocketAddr> {
        self.hint
    }

    /// Last event that surfaced; what an owner saves to resume after a restart.
    #[must_use]
    pub fn last_event(&self) -> EventNumber {
        self.last_event
    }

    /// The session that is kept.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// When the last renewal that lockd confirmed was sent: the lease cannot have begun earlier.
    #[must_use]
    pub fn confirmed_at(&self) -> Option<Time> {
        self.confirmed_at
    }

    /// Whether lockd can be asked right now.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.link == Link::Open
    }

    /// Whether the session ended and [`Self::restart`] is due.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.link == Link::Over
    }

    fn set_info(&mut self, info: Vec<u8>) {
        assert!(info.len() <= MEMBER_INFO_BYTES_MAX, "the owner keeps its description short");
        self.info = info;
    }

    /// How long an unanswered attempt or renewal is waited for: so short that another attempt fits the lease.
    fn patience(&self) -> Duration {
        Duration::from_millis(self.config.lease_ms / 3)
    }

    fn jeopardy_at(&self) -> Option<Time> {
        let confirmed_at = self.confirmed_at.filter(|_| !self.warned)?;
        Some(confirmed_at.after(Duration::from_millis(self.config.lease_ms * 2 / 3)))
    }

    fn lost_at(&self) -> Option<Time> {
        let confirmed_at = self.confirmed_at.filter(|_| self.bound_by_lease)?;
        Some(confirmed_at.after(Duration::from_millis(self.config.lease_ms)))
    }

    fn on_time(&mut self, now: Time, out: &mut Vec<ClientOutput>) {
        if self.link != Link::Over && self.lost_at().is_some_and(|at| now >= at) {
            return self.end(ClientEvent::SessionLost { reason: GAVE_UP.into() }, out);
        }
        match self.link {
            Link::Down { retry_at } if now >= retry_at => {
                self.attempt += 1;
                self.link = Link::Connecting { give_up_at: now.after(self.patience()) };
                out.push(ClientOutput::Connect { attempt: self.attempt });
            }
            Link::Connecting { give_up_at } | Link::Opening { give_up_at } if now >= give_up_at => {
                out.push(ClientOutput::Disconnect { attempt: self.attempt });
                self.on_disconnected(now, out);
            }
            Link::Open => self.on_renewal_time(now, out),
            _ => {}
        }
        if self.link != Link::Over && self.jeopardy_at().is_some_and(|at| now >= at) {
            self.warned = true;
            out.push(ClientOutput::Event(ClientEvent::Jeopardy));
        }
    }

    fn on_renewal_time(&mut self, now: Time, out: &mut Vec<ClientOutput>) {
        match self.renewal {
            Some(renewal) if now >= renewal.sent_at.after(self.patience()) => {
                out.push(ClientOutput::Disconnect { attempt: self.attempt });
                self.on_disconnected(now, out);
            }
            None if self.renewing && now >= self.next_renewal => self.renew(now, out),
            _ => {}
        }
    }

    fn on_connected(&mut self, now: Time, out: &mut Vec<ClientOutput>) {
        if !matches!(self.link, Link::Connecting { .. }) {
            return;
        }
        self.link = Link::Opening { give_up_at: now.after(self.patience()) };
        let Identity { session, secret } = self.identity;
        if let Some(space) = self.space.clone() {
            self.send(ToLockd::Enter { space }, out);
        }
        if self.known {
            self.send(ToLockd::Resume { session, secret, last_event: self.last_event }, out);
            // Sent along, so that a lease about to run out is renewed without another round trip.
            if self.renewing {
                self.renew(now, out);
            }
        } else {
            let (node, lease_ms) = (self.config.node.clone(), self.config.lease_ms);
            self.send(ToLockd::Open { session, secret, node, lease_ms, info: self.info.clone() }, out);
        }
    }

    fn on_disconnected(&mut self, now: Time, out: &mut Vec<ClientOutput>) {
        if matches!(self.link, Link::Down { .. } | Link::Over) {
            return;
        }
        let was_open = self.link == Link::Open;
        self.renewal = None;
        // A hint that led nowhere is not followed again.
        self.hint = None;
        self.link = Link::Down { retry_at: now.after(self.next_backoff()) };
        if was_open {
            out.push(ClientOutput::Event(ClientEvent::Disconnected));
        }
    }

    /// The lockd does not lead. Who does, if it says so, is asked at once.
    fn on_not_leader(&mut self, now: Time, leader: &[SocketAddr], out: &mut Vec<ClientOutput>) {
        out.push(ClientOutput::Disconnect { attempt: self.attempt });
        let backoff_ms = self.backoff_ms;
        self.on_disconnected(now, out);
        if let Some(leader) = leader.first().filter(|_| self.hints < HINTS_MAX) {
            self.hints += 1;
            (self.hint, self.backoff_ms) = (Some(*leader), backoff_ms);
            self.link = Link::Down { retry_at: now };
        }
    }

    /// The wait before the next attempt; each is longer than the last, until a renewal is confirmed.
    fn next_backoff(&mut self) -> Duration {
        let wait = Duration::from_millis(self.backoff_ms);
        self.backoff_ms = (self.backoff_ms * 2).clamp(RECONNECT_MS_MIN, RECONNECT_MS_MAX);
        wait
    }

    fn on_frame(&mut self, now: Time, frame: Frame<FromLockd>, out: &mut Vec<ClientOutput>) {
        match (self.link, frame.message) {
            (Link::Opening { .. }, FromLockd::Opened { locks, queued, last_sequence, .. }) => {
                self.link = Link::Open;
                let resumed = std::mem::replace(&mut self.known, true);
                self.pending.resume_after(last_sequence);
                out.push(ClientOutput::Event(ClientEvent::Opened { locks, queued, resumed }));
                // Before any operation: whoever is granted something knows how long it is its own.
                if self.renewal.is_none() && self.renewing {
                    self.renew(now, out);
                }
                if self.closing {
                    self.send(ToLockd::Close, out);
                }
                self.send_pending(out);
            }
            (Link::Opening { .. } | Link::Open, FromLockd::Refused { reason }) => {
                self.end(ClientEvent::SessionLost { reason }, out);
            }
            (Link::Opening { .. } | Link::Open, FromLockd::NotLeader { leader }) => {
                self.on_not_leader(now, &leader, out);
            }
            (Link::Opening { .. } | Link::Open, FromLockd::Moved { to }) => {
                out.push(ClientOutput::Moved { to });
                out.push(ClientOutput::Disconnect { attempt: self.attempt });
                // The search is over, unless two groups send it to each other.
                self.backoff_ms = self.backoff_ms.min(RECONNECT_MS_MIN);
                self.on_disconnected(now, out);
            }
            (Link::Opening { .. } | Link::Open, FromLockd::Renewed) => self.on_renewed(now, frame.id),
            (Link::Open, FromLockd::Answer { sequence, reply }) => {
                if let Some((ticket, op)) = self.pending.answered(sequence) {
                    out.push(ClientOutput::Event(ClientEvent::Answer { ticket, op, reply }));
                }
                self.send_pending(out);
            }
            (Link::Open, FromLockd::Event { number, event }) => self.on_event(number, event, out),
            (Link::Open, FromLockd::Closed) if self.closing => self.end(ClientEvent::Closed, out),
            (Link::Open, FromLockd::Status(status)) => {
                out.push(ClientOutput::Event(ClientEvent::Status(status)));
            }
            // Anything else is not lockd's to say now; a client that is over, or waits, does not listen.
            _ => {}
        }
    }

    fn on_renewed(&mut self, now: Time, id: RequestId) {
        let Some(renewal) = self.renewal.take_if(|renewal| renewal.id == id) else { return };
        self.confirmed_at = Some(renewal.sent_at);
        (self.backoff_ms, self.hints) = (0, 0);
        self.warned = false;
        self.next_renewal = renewal.sent_at.after(Duration::from_millis(self.config.renew_ms)).max(now);
    }

    fn on_event(&mut self, number: EventNumber, event: LockEvent, out: &mut Vec<ClientOutput>) {
        if number <= self.last_event {
            return;
        }
        self.last_event = number;
        let event = match event {
            LockEvent::Jeopardy => ClientEvent::Jeopardy,
            event => ClientEvent::Event(event),
        };
        out.push(ClientOutput::Event(event));
    }

    fn renew(&mut self, now: Time, out: &mut Vec<ClientOutput>) {
        self.renewal = Some(Renewal { id: RequestId(self.next_id), sent_at: now });
        self.send(ToLockd::Renew { last_event: self.last_event }, out);
    }

    fn send_pending(&mut self, out: &mut Vec<ClientOutput>) {
        while self.link == Link::Open
            && let Some(message) = self.pending.next_to_send()
        {
            self.send(message, out);
        }
    }

    fn send(&mut self, message: ToLockd, out: &mut Vec<ClientOutput>) {
        let frame = Frame { id: RequestId(self.next_id), term: Term(0), message };
        self.next_id += 1;
        out.push(ClientOutput::Send { attempt: self.attempt, frame });
    }

    fn end(&mut self, event: ClientEvent, out: &mut Vec<ClientOutput>) {
        self.drop_link(out);
        self.link = Link::Over;
        self.pending.restart();
        (self.renewal, self.confirmed_at) = (None, None);
        out.push(ClientOutput::Event(event));
    }

    fn drop_link(&mut self, out: &mut Vec<ClientOutput>) {
        if !matches!(self.link, Link::Down { .. } | Link::Over) {
            out.push(ClientOutput::Disconnect { attempt: self.attempt });
        }
    }
}
