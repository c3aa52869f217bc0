//! The daemon's decisions: connections and leases around the table, and the order of log and answers.
//!
//! A request that changes the table becomes a command; the shell appends it to the log, syncs, and says so; only then
//! the command is applied and what follows from it goes out. So nobody ever learns what a crash could undo, and the
//! table in memory is always what the log gives again.
//!
//! Invariants:
//! - commands are applied in the order in which they were appended, each once;
//! - it serves only while it leads; a lockd that follows applies what the leader appended, tells nobody, and closes what
//!   asks it anything but its status;
//! - a session speaks through one connection, the last that proved its secret;
//! - what is in flight is bounded: [`OPERATIONS_PER_SESSION_MAX`] operations a session, one Open a connection.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use csnap_proto::limits::{LEASE_MS_MAX, LEASE_MS_MIN, OPERATIONS_PER_SESSION_MAX};
use csnap_proto::message::lock::{FromLockd, LockOp, LockdStatus, ToLockd};
use csnap_proto::{EventNumber, Frame, Name, RequestId, Secret, Sequence, SessionId, Term, Time};

use super::connection::{ConnectionId, Connections, Role};
use super::lease::{Due, Leases};
use super::table::{Command, Effect, Missed, SessionView, Table};

/// Events that an owner has seen are forgotten in batches of this many: each batch is a command.
const EVENTS_FORGOTTEN_AT_ONCE: u64 = 64;

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// Time passed.
    Tick,
    /// A connection was accepted.
    Opened(ConnectionId),
    /// It broke, or the peer closed it.
    Closed(ConnectionId),
    /// A frame came.
    Received(ConnectionId, Frame<ToLockd>),
    /// The first `count` of the commands appended and not yet durable are.
    Durable {
        /// How many.
        count: usize,
    },
    /// The log has a command that this lockd did not append since it leads: another one did, or it in an earlier life.
    Foreign(Command),
    /// Another replica's table takes the place of this one's. Only while it follows.
    Installed(Box<Table>),
    /// From now on this lockd leads: its table is what the log makes, and it may append to it.
    Leads,
    /// From now on another one leads, or nobody that is known. What was appended and is not durable may be lost or not.
    Follows {
        /// Where the leader is found, for people.
        leader: Option<String>,
    },
}

/// What is to be done, in order.
#[derive(Debug, PartialEq, Eq)]
pub enum Output {
    /// Append this command to the log, after all earlier ones; tell with [`Input::Durable`] when it is synced.
    Append(Bytes),
    /// Send this.
    Send(ConnectionId, Frame<FromLockd>),
    /// Close the connection after what was sent to it. The text says why, for the log; it is absent where nothing is
    /// wrong.
    Close(ConnectionId, Option<String>),
}

/// Who asked, and as which request.
#[derive(Clone, Copy, Debug)]
struct Origin {
    connection: ConnectionId,
    request: RequestId,
}

/// A command on its way to the log.
#[derive(Debug)]
struct Proposal {
    command: Command,
    origin: Option<Origin>,
}

/// A connection that proved to be the session's and waits until what its owner asked for earlier is done: only then
/// is it true what the owner is told to hold.
#[derive(Clone, Copy, Debug)]
struct Resuming {
    origin: Origin,
    last_event: EventNumber,
    /// The last operation to wait for.
    after: Sequence,
}

/// What is known of a session beside the table.
#[derive(Debug)]
struct Attendance {
    /// Who is told of answers and events.
    connection: Option<ConnectionId>,
    resuming: Option<Resuming>,
    /// Last operation on its way to the log or in it.
    taken: Sequence,
    /// Events up to this one are forgotten, or are about to be.
    forgetting: EventNumber,
    /// The command that ends it is on its way.
    closing: bool,
}

impl Attendance {
    fn new(taken: Sequence, forgetting: EventNumber) -> Self {
        Self { connection: None, resuming: None, taken, forgetting, closing: false }
    }

    /// The one connection of the session.
    fn speaker(&self) -> Option<ConnectionId> {
        self.connection.or(self.resuming.map(|resuming| resuming.origin.connection))
    }
}

/// See the module.
#[derive(Debug)]
pub struct Lockd {
    node: Name,
    pid: u32,
    /// Follows, and then perhaps whom. It serves nobody then: only the leader knows what is true now.
    follows: Option<Option<String>>,
    table: Table,
    proposals: VecDeque<Proposal>,
    connections: Connections,
    attendance: BTreeMap<SessionId, Attendance>,
    leases: Leases,
}

impl Lockd {
    /// Begins to serve `table`, as the log gave it. Every session gets its full lease from `now`.
    #[must_use]
    pub fn new(now: Time, node: Name, pid: u32, table: Table) -> Self {
        let mut lockd = Self::following(node, pid, table);
        lockd.lead(now);
        lockd
    }

    /// Begins with `table`, as the log gave it, and waits for what other replicas say.
    #[must_use]
    pub fn following(node: Name, pid: u32, table: Table) -> Self {
        let (proposals, connections) = (VecDeque::new(), Connections::default());
        let (attendance, leases) = (BTreeMap::new(), Leases::default());
        Self { node, pid, follows: Some(None), table, proposals, connections, attendance, leases }
    }

    /// Takes in what happened. Outputs are to be carried out in order.
    pub fn step(&mut self, now: Time, input: Input, out: &mut Vec<Output>) {
        match input {
            Input::Tick => {}
            Input::Opened(id) => {
                if let Some(victim) = self.connections.admit(now, id) {
                    out.push(Output::Close(victim, Some("too many connections".into())));
                }
            }
            Input::Closed(id) => self.forget_connection(id),
            Input::Received(id, frame) => self.on_frame(now, id, frame, out),
            Input::Durable { count } => {
                for _ in 0..count {
                    let proposal = self.proposals.pop_front().expect("what is durable was appended before");
                    self.commit(now, proposal, out);
                }
            }
            Input::Foreign(command) => {
                assert!(self.follows.is_some(), "who leads appends everything itself");
                self.table.apply(command, &mut Vec::new());
            }
            Input::Installed(table) => {
                assert!(self.follows.is_some(), "who leads has everything");
                self.table = *table;
            }
            Input::Leads => self.lead(now),
            Input::Follows { leader } => self.follow(leader, out),
        }
        self.on_time(now, out);
    }

    /// When to step again at the latest, if nothing else happens.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        self.leases.next_deadline().into_iter().chain(self.connections.next_deadline()).min()
    }

    /// Whether it serves.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.follows.is_none()
    }

    /// The table as of the last durable command.
    #[must_use]
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Commands appended and not yet durable.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.proposals.len()
    }

    /// Every session gets its full lease: the last leader may have renewed it a moment ago.
    fn lead(&mut self, now: Time) {
        if self.follows.take().is_none() {
            return;
        }
        for (session, lease_ms) in self.table.leases() {
            self.leases.start(now, session, lease_ms);
            let view = self.table.view(session).expect("listed just now");
            let forgetting = self.table.forgotten(session).expect("listed just now");
            self.attendance.insert(session, Attendance::new(view.last_sequence, forgetting));
        }
    }

    /// Owners look for the leader, and ask it again for what was not answered.
    fn follow(&mut self, leader: Option<String>, out: &mut Vec<Output>) {
        self.follows = Some(leader);
        self.proposals.clear();
        self.attendance.clear();
        self.leases = Leases::default();
        for id in self.connections.all() {
            self.redirect(id, out);
        }
    }

    fn redirect(&mut self, id: ConnectionId, out: &mut Vec<Output>) {
        let leader = self.follows.clone().flatten();
        let why = leader
            .map_or("no lockd leads at present".into(), |leader| format!("the lockd at {leader} leads"));
        self.close(id, &why, out);
    }

    fn on_time(&mut self, now: Time, out: &mut Vec<Output>) {
        for id in self.connections.overdue(now) {
            self.close(id, "did not say who it is in time", out);
        }
        for due in self.leases.due(now) {
            let command = match due {
                Due::Jeopardy(session) => Command::Jeopardy { session },
                Due::Expired(session) => Command::Expire { session },
            };
            self.propose(command, None, out);
        }
    }

    fn on_frame(&mut self, now: Time, id: ConnectionId, frame: Frame<ToLockd>, out: &mut Vec<Output>) {
        let origin = Origin { connection: id, request: frame.id };
        match (self.connections.role(id), frame.message) {
            (None, _) => {}
            (Some(_), ToLockd::Status) => send(origin, FromLockd::Status(self.status()), out),
            (Some(_), _) if self.follows.is_some() => self.redirect(id, out),
            (Some(Role::Stranger { .. }), ToLockd::Open { session, secret, node, lease_ms, info }) => {
                let lease_ms = lease_ms.clamp(LEASE_MS_MIN, LEASE_MS_MAX);
                self.connections.set_role(id, Role::Opening);
                let command = Command::Open { session, secret, node, lease_ms, info };
                self.propose(command, Some(origin), out);
            }
            (Some(Role::Stranger { .. }), ToLockd::Resume { session, secret, last_event }) => {
                self.on_resume(origin, session, secret, last_event, out);
            }
            (Some(Role::Owner(session)), ToLockd::Renew { last_event }) => {
                self.leases.renew(now, session);
                send(origin, FromLockd::Renewed, out);
                self.forget_events(session, last_event, out);
            }
            (Some(Role::Owner(session)), ToLockd::Close) => self.on_close(origin, session, out),
            (Some(Role::Owner(session)), ToLockd::Operate { sequence, lowest_unanswered, op }) => {
                self.on_operate(origin, session, sequence, lowest_unanswered, op, out);
            }
            (Some(Role::Stranger { .. }), _) => self.close(id, "did not say who it is first", out),
            (Some(Role::Opening | Role::Owner(_)), _) => self.close(id, "said who it is twice", out),
        }
    }

    fn on_resume(
        &mut self,
        origin: Origin,
        session: SessionId,
        secret: Secret,
        last_event: EventNumber,
        out: &mut Vec<Output>,
    ) {
        let reason = match self.table.proves(session, secret) {
            Some(true) => return self.attend(origin, session, last_event, out),
            Some(false) => "the session belongs to somebody else",
            None => "the session is unknown or has expired",
        };
        self.refuse(origin, reason, out);
    }

    fn on_close(&mut self, origin: Origin, session: SessionId, out: &mut Vec<Output>) {
        let attendance = self.attendance.get_mut(&session).expect("owners attend");
        if !std::mem::replace(&mut attendance.closing, true) {
            self.leases.set_ending(session);
            self.propose(Command::Close { session }, Some(origin), out);
        }
    }

    fn on_operate(
        &mut self,
        origin: Origin,
        session: SessionId,
        sequence: Sequence,
        lowest_unanswered: Sequence,
        op: LockOp,
        out: &mut Vec<Output>,
    ) {
        let attendance = self.attendance.get_mut(&session).expect("owners attend");
        let open = sequence.0.checked_sub(lowest_unanswered.0);
        if open.is_none_or(|open| open >= OPERATIONS_PER_SESSION_MAX as u64) {
            return self.close(origin.connection, "leaves more operations unanswered than it may", out);
        }
        // Compared without adding: the sequence is the peer's.
        if sequence > attendance.taken && sequence.0 - attendance.taken.0 == 1 {
            attendance.taken = sequence;
            let command = Command::Operate { session, sequence, lowest_unanswered, op };
            return self.propose(command, Some(origin), out);
        }
        if sequence > attendance.taken {
            return self.close(origin.connection, "left out an operation", out);
        }
        // Sent again. One that is still on its way to the log is answered from there.
        if let Some(reply) = self.table.stored_answer(session, sequence) {
            send(origin, FromLockd::Answer { sequence, reply }, out);
        }
    }

    fn forget_events(&mut self, session: SessionId, seen: EventNumber, out: &mut Vec<Output>) {
        let Some(attendance) = self.attendance.get_mut(&session) else { return };
        let last_event = self.table.last_event(session).unwrap_or_default();
        let seen = seen.min(last_event);
        if seen.0 >= attendance.forgetting.0 + EVENTS_FORGOTTEN_AT_ONCE {
            attendance.forgetting = seen;
            self.propose(Command::Seen { session, last_event: seen }, None, out);
        }
    }

    fn propose(&mut self, command: Command, origin: Option<Origin>, out: &mut Vec<Output>) {
        let bytes = postcard::to_stdvec(&command).expect("writing to memory does not fail");
        out.push(Output::Append(bytes.into()));
        self.proposals.push_back(Proposal { command, origin });
    }

    /// The command is durable: it takes effect.
    fn commit(&mut self, now: Time, proposal: Proposal, out: &mut Vec<Output>) {
        let mut effects = Vec::new();
        let operating = match &proposal.command {
            Command::Operate { session, .. } => Some(*session),
            _ => None,
        };
        self.table.apply(proposal.command, &mut effects);
        for effect in effects {
            self.release(now, effect, proposal.origin, out);
        }
        if let Some(session) = operating {
            self.resume_if_done(session, out);
        }
    }

    fn release(&mut self, now: Time, effect: Effect, origin: Option<Origin>, out: &mut Vec<Output>) {
        match effect {
            Effect::Opened { session } => self.on_opened(now, session, origin, out),
            Effect::Refused { reason } => {
                if let Some(origin) = origin {
                    self.refuse(origin, &reason, out);
                }
            }
            Effect::Answer { session, sequence, reply } => {
                self.tell(session, origin, FromLockd::Answer { sequence, reply }, out);
            }
            Effect::Event { session, number, event } => {
                self.tell(session, None, FromLockd::Event { number, event }, out);
            }
            Effect::Ended { session, expired: true } => {
                let reason = "the session was not renewed within its lease";
                self.part(session, origin, FromLockd::Refused { reason: reason.into() }, out);
                self.on_ended(session, Some(reason), out);
            }
            Effect::Ended { session, expired: false } => {
                self.part(session, origin, FromLockd::Closed, out);
                self.on_ended(session, None, out);
            }
        }
    }

    fn on_ended(&mut self, session: SessionId, reason: Option<&str>, out: &mut Vec<Output>) {
        self.leases.remove(session);
        if let Some(id) = self.attendance.get(&session).and_then(Attendance::speaker) {
            self.forget_connection(id);
            out.push(Output::Close(id, reason.map(Into::into)));
        }
        self.attendance.remove(&session);
    }

    fn on_opened(&mut self, now: Time, session: SessionId, origin: Option<Origin>, out: &mut Vec<Output>) {
        if !self.attendance.contains_key(&session) {
            let lease_ms = self.table.lease_ms(session).expect("opened just now");
            self.leases.start(now, session, lease_ms);
            self.attendance.insert(session, Attendance::new(Sequence(0), EventNumber(0)));
        }
        let waits = |origin: &Origin| self.connections.role(origin.connection) == Some(Role::Opening);
        if let Some(origin) = origin.filter(waits) {
            self.attend(origin, session, EventNumber(0), out);
        }
    }

    /// From now on the connection speaks for the session; an older one does no more.
    fn attend(&mut self, origin: Origin, session: SessionId, last_event: EventNumber, out: &mut Vec<Output>) {
        if let Some(older) = self.attendance.get(&session).and_then(Attendance::speaker) {
            self.close(older, "the session went on through another connection", out);
        }
        self.connections.set_role(origin.connection, Role::Owner(session));
        let attendance = self.attendance.get_mut(&session).expect("every session is attended to");
        attendance.resuming = Some(Resuming { origin, last_event, after: attendance.taken });
        self.resume_if_done(session, out);
    }

    /// Tells a resuming owner where it stands and what it missed.
    fn resume_if_done(&mut self, session: SessionId, out: &mut Vec<Output>) {
        let Some(attendance) = self.attendance.get_mut(&session) else { return };
        let view = self.table.view(session).expect("every session is in the table");
        let Some(resuming) = attendance.resuming.take_if(|resuming| view.last_sequence >= resuming.after)
        else {
            return;
        };
        attendance.connection = Some(resuming.origin.connection);
        let SessionView { locks, queued, last_event, last_sequence } = view;
        send(resuming.origin, FromLockd::Opened { locks, queued, last_event, last_sequence }, out);
        for missed in self.table.missed(session, resuming.last_event) {
            let message = match missed {
                Missed::Answer(sequence, reply) => FromLockd::Answer { sequence, reply },
                Missed::Event(number, event) => FromLockd::Event { number, event },
            };
            self.tell(session, None, message, out);
        }
    }

    /// Says something to whoever is told of the session, as the answer to `origin` if that is who asked.
    fn tell(&self, session: SessionId, origin: Option<Origin>, message: FromLockd, out: &mut Vec<Output>) {
        if let Some(connection) = self.attendance.get(&session).and_then(|a| a.connection) {
            send(address(connection, origin), message, out);
        }
    }

    /// Says the last thing, also to one that still waits to be told where it stands.
    fn part(&self, session: SessionId, origin: Option<Origin>, message: FromLockd, out: &mut Vec<Output>) {
        if let Some(connection) = self.attendance.get(&session).and_then(Attendance::speaker) {
            send(address(connection, origin), message, out);
        }
    }

    fn refuse(&mut self, origin: Origin, reason: &str, out: &mut Vec<Output>) {
        send(origin, FromLockd::Refused { reason: reason.into() }, out);
        self.close(origin.connection, reason, out);
    }

    fn close(&mut self, id: ConnectionId, why: &str, out: &mut Vec<Output>) {
        self.forget_connection(id);
        out.push(Output::Close(id, Some(why.into())));
    }

    fn forget_connection(&mut self, id: ConnectionId) {
        let Some(Role::Owner(session)) = self.connections.remove(id) else { return };
        if let Some(attendance) = self.attendance.get_mut(&session).filter(|a| a.speaker() == Some(id)) {
            (attendance.connection, attendance.resuming) = (None, None);
        }
    }

    fn status(&self) -> LockdStatus {
        let (node, members) = (self.node.clone(), self.table.members());
        LockdStatus { node, pid: self.pid, members, term: self.table.term() }
    }
}

/// The connection, with the request id if it is the one that asked.
fn address(connection: ConnectionId, origin: Option<Origin>) -> Origin {
    let asked = origin.filter(|origin| origin.connection == connection);
    asked.unwrap_or(Origin { connection, request: RequestId(0) })
}

fn send(to: Origin, message: FromLockd, out: &mut Vec<Output>) {
    out.push(Output::Send(to.connection, Frame { id: to.request, term: Term(0), message }));
}
