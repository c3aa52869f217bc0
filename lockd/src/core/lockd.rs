//! The daemon's decisions: connections and leases around the table, and the order of log and answers.
//!
//! A request that changes the table becomes a command; the shell appends it to the log, syncs, and says so; only then
//! the command is applied and what follows from it goes out. So nobody ever learns what a crash could undo, and the
//! table in memory is always what the log gives again.
//!
//! Invariants:
//! - commands are applied in the order in which they were appended, each once;
//! - it serves only while it leads; a lockd that follows applies what the leader appended, tells nobody, and closes what
//!   asks it anything but its status, saying who leads; while nobody does, it keeps what asks waiting for a moment;
//! - nothing is done for a caller that the table of permissions does not let ask for it;
//! - a session speaks through one connection, the last that proved its secret;
//! - what is in flight is bounded: [`OPERATIONS_PER_SESSION_MAX`] operations a session, one Open a connection.

// An address is a value; nothing is opened here.
use ::core::net::SocketAddr;
use std::collections::{BTreeMap, VecDeque};
use std::sync::LazyLock;
use std::time::Duration;

use bytes::Bytes;
use csnap_proto::limits::{LEASE_MS_MAX, LEASE_MS_MIN, OPERATIONS_PER_SESSION_MAX};
use csnap_proto::message::lock::{FromLockd, LockdStatus, ToLockd};
use csnap_proto::{Caller, EventNumber, Frame, Name, RequestId, Secret, Sequence, Term, Time};

use super::connection::{Attendee, ConnectionId, Connections, Role};
use super::lease::{Due, Leases, Overslept};
use super::permission::{self, Denied, Request};
use super::spaces::{self, SpaceId, Spaces};
use super::table::{Command, Effect, Missed, SessionView, Table};

mod lockspace;

/// Why a client is sent away, for the log.
const NOBODY_LEADS: &str = "no lockd leads at present";

/// Events that an owner has seen are forgotten in batches of this many: each batch is a command.
const EVENTS_FORGOTTEN_AT_ONCE: u64 = 64;

/// Without a leader, those who ask wait this long for the next one before they are sent away: an election takes half of it.
/// Sent away at once, they would come back again and again, and learn of it later.
const LEADER_AWAITED_FOR: Duration = Duration::from_millis(600);

/// Who leads in place of this lockd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    /// For people.
    pub name: String,
    /// Where clients find it, if that is known.
    pub clients: Vec<SocketAddr>,
}

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// Time passed.
    Tick,
    /// A connection was accepted, and whoever made it proved to be this one.
    Opened(ConnectionId, Caller),
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
    Foreign(spaces::Command),
    /// Another replica's lockspaces take the place of this one's. Only while it follows.
    Installed(Box<Spaces>),
    /// Append this command, which nobody asked for: who moves a lockspace decided it. Only while it leads.
    Decide(spaces::Command),
    /// From now on this lockd leads: its table is what the log makes, and it may append to it.
    Leads,
    /// From now on another one leads, or nobody that is known. What was appended and is not durable may be lost or not.
    Follows {
        /// Who.
        leader: Option<Leader>,
    },
    /// A connection waits for something else than a session: nothing is asked of it while it does.
    Waits {
        /// Which.
        connection: ConnectionId,
        /// From now on, or no more.
        waits: bool,
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
    /// Somebody asked for what they may not, and was told so. For the log.
    Denied(ConnectionId, Denied),
    /// Leases began anew because lockd came late to them. For the log.
    Overslept(Overslept),
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
    command: spaces::Command,
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
    follows: Option<Option<Leader>>,
    /// While nobody leads: until when whoever asks is kept waiting for the next leader.
    awaiting_leader: Option<Time>,
    spaces: Spaces,
    proposals: VecDeque<Proposal>,
    connections: Connections,
    attendance: BTreeMap<Attendee, Attendance>,
    leases: Leases,
    broken: permission::Broken,
    /// Requests about lockspaces that are on their way to the log.
    space_requests: usize,
}

impl Lockd {
    /// Begins to serve a table or several lockspaces, as the log gave them. Every session gets its full lease from `now`.
    #[must_use]
    pub fn new(now: Time, node: Name, pid: u32, spaces: impl Into<Spaces>) -> Self {
        let mut lockd = Self::following(node, pid, spaces);
        lockd.lead(now, &mut Vec::new());
        lockd
    }

    /// Begins with a table or several lockspaces, as the log gave them, and waits for what other replicas say.
    #[must_use]
    pub fn following(node: Name, pid: u32, spaces: impl Into<Spaces>) -> Self {
        let (proposals, connections) = (VecDeque::new(), Connections::default());
        let (attendance, leases) = (BTreeMap::new(), Leases::default());
        let (follows, awaiting_leader, spaces, space_requests) = (Some(None), None, spaces.into(), 0);
        let broken = permission::Broken::NONE;
        Self {
            node,
            pid,
            follows,
            awaiting_leader,
            spaces,
            proposals,
            connections,
            attendance,
            leases,
            broken,
            space_requests,
        }
    }

    /// Breaks the rule of permissions.
    #[cfg(feature = "canary")]
    pub fn break_permission(&mut self, rule: permission::Canary) {
        self.broken = permission::Broken::rule(rule);
    }

    /// Breaks a rule of lockspaces.
    #[cfg(feature = "canary")]
    #[must_use]
    pub fn breaking(self, rule: spaces::canary::Canary) -> Self {
        Self { spaces: self.spaces.breaking(rule), ..self }
    }

    /// Takes in what happened. Outputs are to be carried out in order.
    pub fn step(&mut self, now: Time, input: Input, out: &mut Vec<Output>) {
        match input {
            Input::Tick => {}
            Input::Opened(id, caller) => {
                if let Some(victim) = self.connections.admit(now, id, caller) {
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
                self.spaces.apply(command, &mut Vec::new());
            }
            Input::Installed(spaces) => {
                assert!(self.follows.is_some(), "who leads has everything");
                self.spaces = spaces.as_broken_as(&self.spaces);
            }
            Input::Decide(command) => {
                assert!(self.follows.is_none(), "only who leads appends");
                self.propose(command, None, out);
            }
            Input::Leads => self.lead(now, out),
            Input::Follows { leader } => self.follow(now, leader, out),
            Input::Waits { connection, waits } => self.connections.set_waiting(now, connection, waits),
        }
        self.on_time(now, out);
    }

    /// When to step again at the latest, if nothing else happens.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        let deadlines = [self.leases.next_deadline(), self.connections.next_deadline(), self.awaiting_leader];
        deadlines.into_iter().flatten().min()
    }

    /// Whether it serves.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.follows.is_none()
    }

    /// The lockspaces as of the last durable command.
    #[must_use]
    pub fn spaces(&self) -> &Spaces {
        &self.spaces
    }

    /// The table of the default lockspace as of the last durable command; an empty one while another group has it.
    #[must_use]
    pub fn table(&self) -> &Table {
        static EMPTY: LazyLock<Table> = LazyLock::new(Table::default);
        self.spaces.table(SpaceId::DEFAULT).unwrap_or(&EMPTY)
    }

    /// From now on its tables break a rule; see [`super::canary`].
    #[cfg(feature = "replica")]
    pub(crate) fn break_rule(&mut self, rule: super::canary::Broken) {
        self.spaces.break_tables(rule);
    }

    /// Commands appended and not yet durable.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.proposals.len()
    }

    /// Every session gets its full lease: the last leader may have renewed it a moment ago.
    fn lead(&mut self, now: Time, out: &mut Vec<Output>) {
        if self.follows.is_none() {
            return;
        }
        // What they asked for meanwhile was dropped; asked again, it is done.
        self.send_held_away(out);
        (self.follows, self.awaiting_leader) = (None, None);
        let all: Vec<SpaceId> = self.spaces.iter().map(|(id, _)| id).collect();
        for space in all {
            self.attend_all(now, space);
        }
    }

    /// Owners look for the leader, and ask it again for what was not answered. While there is none they wait here.
    fn follow(&mut self, now: Time, leader: Option<Leader>, out: &mut Vec<Output>) {
        let lost = leader.is_none() && !matches!(self.follows, Some(None));
        let known = leader.is_some();
        self.follows = Some(leader);
        self.proposals.clear();
        self.space_requests = 0;
        self.attendance.clear();
        self.leases = Leases::default();
        if known {
            self.awaiting_leader = None;
            for id in self.connections.asking() {
                self.redirect(id, out);
            }
        } else if lost {
            self.awaiting_leader = Some(now.after(LEADER_AWAITED_FOR));
            self.connections.hold_all();
        }
    }

    /// Says who leads, and closes.
    fn redirect(&mut self, id: ConnectionId, out: &mut Vec<Output>) {
        let leader = self.follows.clone().flatten();
        let why = leader
            .as_ref()
            .map_or_else(|| NOBODY_LEADS.into(), |leader| format!("the lockd at {} leads", leader.name));
        let clients = leader.map(|leader| leader.clients).unwrap_or_default();
        send(address(id, None), FromLockd::NotLeader { leader: clients }, out);
        self.close(id, &why, out);
    }

    /// Whoever asks a lockd that does not lead.
    fn turn_away(&mut self, id: ConnectionId, out: &mut Vec<Output>) {
        if self.awaiting_leader.is_some() {
            self.connections.set_role(id, Role::Held);
        } else {
            self.redirect(id, out);
        }
    }

    fn send_held_away(&mut self, out: &mut Vec<Output>) {
        for id in self.connections.held() {
            self.redirect(id, out);
        }
    }

    fn on_time(&mut self, now: Time, out: &mut Vec<Output>) {
        for id in self.connections.overdue(now) {
            self.close(id, "did not say who it is in time", out);
        }
        if self.awaiting_leader.take_if(|until| now >= *until).is_some() {
            self.send_held_away(out);
        }
        for due in self.leases.due(now) {
            let (space, command) = match due {
                Due::Overslept(overslept) => {
                    out.push(Output::Overslept(overslept));
                    continue;
                }
                Due::Jeopardy(Attendee { space, session }) => (space, Command::Jeopardy { session }),
                Due::Expired(Attendee { space, session }) => (space, Command::Expire { session }),
            };
            self.propose(spaces::Command::In(space, command), None, out);
        }
    }

    fn on_frame(&mut self, now: Time, id: ConnectionId, frame: Frame<ToLockd>, out: &mut Vec<Output>) {
        let origin = Origin { connection: id, request: frame.id };
        if let Some(denied) = self.denied(id, &frame.message) {
            return self.deny(origin, frame.message, denied, out);
        }
        match (self.connections.role(id), frame.message) {
            (None, _) => {}
            (Some(_), ToLockd::Status) => send(origin, FromLockd::Status(self.status()), out),
            (Some(Role::Waiting), _) => {
                self.close(id, "said something else while it was being answered", out)
            }
            (Some(_), _) if self.follows.is_some() => self.turn_away(id, out),
            (Some(Role::Held), _) => unreachable!("who was held is sent away before this lockd leads"),
            (Some(_), ToLockd::Space(request)) => self.on_space_request(now, origin, request, out),
            (Some(Role::Stranger { .. }), ToLockd::Enter { space }) => self.on_enter(origin, &space, out),
            (Some(Role::Stranger { space, .. }), ToLockd::Open { .. } | ToLockd::Resume { .. })
                if self.send_on(origin, space, out) => {}
            (Some(Role::Stranger { space, .. }), ToLockd::Open { session, secret, node, lease_ms, info }) => {
                if !self.spaces.is_active(space) {
                    return self.close(id, "the lockspace is being moved, come again", out);
                }
                let lease_ms = lease_ms.clamp(LEASE_MS_MIN, LEASE_MS_MAX);
                self.connections.set_role(id, Role::Opening);
                let command = Command::Open { session, secret, node, lease_ms, info };
                self.propose(spaces::Command::In(space, command), Some(origin), out);
            }
            (Some(Role::Stranger { space, .. }), ToLockd::Resume { session, secret, last_event }) => {
                self.on_resume(origin, Attendee { space, session }, secret, last_event, out);
            }
            // Also while the lockspace is frozen: then nobody's lease runs.
            (Some(Role::Owner(attendee)), ToLockd::Renew { last_event }) => {
                self.leases.renew(now, attendee);
                send(origin, FromLockd::Renewed, out);
                self.forget_events(attendee, last_event, out);
            }
            // Not taken in, so its owner asks again where the lockspace goes on.
            (Some(Role::Owner(attendee)), ToLockd::Close | ToLockd::Operate { .. })
                if !self.takes_operations(attendee.space) => {}
            (Some(Role::Owner(attendee)), ToLockd::Close) => self.on_close(origin, attendee, out),
            (Some(Role::Owner(attendee)), ToLockd::Operate { sequence, lowest_unanswered, op }) => {
                let session = attendee.session;
                let command = Command::Operate { session, sequence, lowest_unanswered, op };
                self.on_operate(origin, attendee, sequence, lowest_unanswered, command, out);
            }
            (Some(Role::Stranger { .. }), _) => self.close(id, "did not say who it is first", out),
            (Some(Role::Opening | Role::Owner(_)), _) => self.close(id, "said who it is twice", out),
        }
    }

    /// Whether whoever is there may not ask for it.
    #[must_use]
    pub fn denied(&self, id: ConnectionId, message: &ToLockd) -> Option<Denied> {
        let caller = self.connections.caller(id)?;
        permission::check(caller, Request::of(caller, message), self.broken).err()
    }

    /// Says no, once and durably to an operation of a session: it is one that took place, and changed nothing.
    fn deny(&mut self, origin: Origin, message: ToLockd, denied: Denied, out: &mut Vec<Output>) {
        let reason = denied.to_string();
        out.push(Output::Denied(origin.connection, denied));
        match (self.connections.role(origin.connection), message) {
            // Not taken in, so its owner asks again where the lockspace goes on, and is told no there.
            (Some(Role::Owner(attendee)), ToLockd::Operate { .. })
                if !self.takes_operations(attendee.space) => {}
            (Some(Role::Owner(attendee)), ToLockd::Operate { sequence, lowest_unanswered, .. }) => {
                let session = attendee.session;
                let command = Command::Deny { session, sequence, lowest_unanswered, reason };
                self.on_operate(origin, attendee, sequence, lowest_unanswered, command, out);
            }
            _ => self.refuse(origin, &reason, out),
        }
    }

    fn on_resume(
        &mut self,
        origin: Origin,
        attendee: Attendee,
        secret: Secret,
        last_event: EventNumber,
        out: &mut Vec<Output>,
    ) {
        let table = self.spaces.table(attendee.space);
        let reason = match table.and_then(|table| table.proves(attendee.session, secret)) {
            Some(true) => return self.attend(origin, attendee, last_event, out),
            Some(false) => "the session belongs to somebody else",
            None => "the session is unknown or has expired",
        };
        self.refuse(origin, reason, out);
    }

    fn on_close(&mut self, origin: Origin, attendee: Attendee, out: &mut Vec<Output>) {
        let attendance = self.attendance.get_mut(&attendee).expect("owners attend");
        if !std::mem::replace(&mut attendance.closing, true) {
            self.leases.set_ending(attendee);
            let command = Command::Close { session: attendee.session };
            self.propose(spaces::Command::In(attendee.space, command), Some(origin), out);
        }
    }

    fn on_operate(
        &mut self,
        origin: Origin,
        attendee: Attendee,
        sequence: Sequence,
        lowest_unanswered: Sequence,
        command: Command,
        out: &mut Vec<Output>,
    ) {
        let Attendee { space, session } = attendee;
        let attendance = self.attendance.get_mut(&attendee).expect("owners attend");
        let open = sequence.0.checked_sub(lowest_unanswered.0);
        if open.is_none_or(|open| open >= OPERATIONS_PER_SESSION_MAX as u64) {
            return self.close(origin.connection, "leaves more operations unanswered than it may", out);
        }
        // Compared without adding: the sequence is the peer's.
        if sequence > attendance.taken && sequence.0 - attendance.taken.0 == 1 {
            attendance.taken = sequence;
            return self.propose(spaces::Command::In(space, command), Some(origin), out);
        }
        if sequence > attendance.taken {
            return self.close(origin.connection, "left out an operation", out);
        }
        // Sent again. One that is still on its way to the log is answered from there.
        let stored = self.spaces.table(space).and_then(|table| table.stored_answer(session, sequence));
        if let Some(reply) = stored {
            send(origin, FromLockd::Answer { sequence, reply }, out);
        }
    }

    fn forget_events(&mut self, attendee: Attendee, seen: EventNumber, out: &mut Vec<Output>) {
        let Attendee { space, session } = attendee;
        let table = self.spaces.table(space).filter(|_| self.spaces.is_active(space));
        let Some(last_event) = table.and_then(|table| table.last_event(session)) else { return };
        let Some(attendance) = self.attendance.get_mut(&attendee) else { return };
        let seen = seen.min(last_event);
        if seen.0 >= attendance.forgetting.0 + EVENTS_FORGOTTEN_AT_ONCE {
            attendance.forgetting = seen;
            let command = Command::Seen { session, last_event: seen };
            self.propose(spaces::Command::In(space, command), None, out);
        }
    }

    fn propose(&mut self, command: spaces::Command, origin: Option<Origin>, out: &mut Vec<Output>) {
        let bytes = postcard::to_stdvec(&command).expect("writing to memory does not fail");
        out.push(Output::Append(bytes.into()));
        self.proposals.push_back(Proposal { command, origin });
    }

    /// The command is durable: it takes effect.
    fn commit(&mut self, now: Time, proposal: Proposal, out: &mut Vec<Output>) {
        let mut effects = Vec::new();
        let operating = match &proposal.command {
            spaces::Command::In(space, Command::Operate { session, .. } | Command::Deny { session, .. }) => {
                Some(Attendee { space: *space, session: *session })
            }
            _ => None,
        };
        self.spaces.apply(proposal.command, &mut effects);
        for effect in effects {
            match effect {
                spaces::Effect::In(space, effect) => self.release(now, space, effect, proposal.origin, out),
                effect => self.release_of_spaces(now, effect, proposal.origin, out),
            }
        }
        if let Some(attendee) = operating {
            self.resume_if_done(attendee, out);
        }
    }

    fn release(
        &mut self,
        now: Time,
        space: SpaceId,
        effect: Effect,
        origin: Option<Origin>,
        out: &mut Vec<Output>,
    ) {
        let of = |session| Attendee { space, session };
        match effect {
            Effect::Opened { session } => self.on_opened(now, of(session), origin, out),
            Effect::Refused { reason } => {
                if let Some(origin) = origin {
                    self.refuse(origin, &reason, out);
                }
            }
            Effect::Answer { session, sequence, reply } => {
                self.tell(of(session), origin, FromLockd::Answer { sequence, reply }, out);
            }
            Effect::Event { session, number, event } => {
                self.tell(of(session), None, FromLockd::Event { number, event }, out);
            }
            Effect::Ended { session, expired: true } => {
                let reason = "the session was not renewed within its lease";
                self.part(of(session), origin, FromLockd::Refused { reason: reason.into() }, out);
                self.on_ended(of(session), Some(reason), out);
            }
            Effect::Ended { session, expired: false } => {
                self.part(of(session), origin, FromLockd::Closed, out);
                self.on_ended(of(session), None, out);
            }
        }
    }

    fn on_ended(&mut self, session: Attendee, reason: Option<&str>, out: &mut Vec<Output>) {
        self.leases.remove(session);
        if let Some(id) = self.attendance.get(&session).and_then(Attendance::speaker) {
            self.forget_connection(id);
            out.push(Output::Close(id, reason.map(Into::into)));
        }
        self.attendance.remove(&session);
    }

    fn on_opened(&mut self, now: Time, session: Attendee, origin: Option<Origin>, out: &mut Vec<Output>) {
        if !self.attendance.contains_key(&session) {
            let table = self.spaces.table(session.space).expect("opened in it just now");
            let lease_ms = table.lease_ms(session.session).expect("opened just now");
            self.leases.start(now, session, lease_ms);
            self.attendance.insert(session, Attendance::new(Sequence(0), EventNumber(0)));
        }
        let waits = |origin: &Origin| self.connections.role(origin.connection) == Some(Role::Opening);
        if let Some(origin) = origin.filter(waits) {
            self.attend(origin, session, EventNumber(0), out);
        }
    }

    /// From now on the connection speaks for the session; an older one does no more.
    fn attend(&mut self, origin: Origin, session: Attendee, last_event: EventNumber, out: &mut Vec<Output>) {
        if let Some(older) = self.attendance.get(&session).and_then(Attendance::speaker) {
            self.close(older, "the session went on through another connection", out);
        }
        self.connections.set_role(origin.connection, Role::Owner(session));
        let attendance = self.attendance.get_mut(&session).expect("every session is attended to");
        attendance.resuming = Some(Resuming { origin, last_event, after: attendance.taken });
        self.resume_if_done(session, out);
    }

    /// Tells a resuming owner where it stands and what it missed.
    fn resume_if_done(&mut self, session: Attendee, out: &mut Vec<Output>) {
        let Some(attendance) = self.attendance.get_mut(&session) else { return };
        let table = self.spaces.table(session.space).expect("only what is here is attended");
        let view = table.view(session.session).expect("every session is in the table");
        let Some(resuming) = attendance.resuming.take_if(|resuming| view.last_sequence >= resuming.after)
        else {
            return;
        };
        attendance.connection = Some(resuming.origin.connection);
        let SessionView { locks, queued, last_event, last_sequence } = view;
        send(resuming.origin, FromLockd::Opened { locks, queued, last_event, last_sequence }, out);
        for missed in table.missed(session.session, resuming.last_event) {
            let message = match missed {
                Missed::Answer(sequence, reply) => FromLockd::Answer { sequence, reply },
                Missed::Event(number, event) => FromLockd::Event { number, event },
            };
            self.tell(session, None, message, out);
        }
    }

    /// Says something to whoever is told of the session, as the answer to `origin` if that is who asked.
    fn tell(&self, session: Attendee, origin: Option<Origin>, message: FromLockd, out: &mut Vec<Output>) {
        if let Some(connection) = self.attendance.get(&session).and_then(|a| a.connection) {
            send(address(connection, origin), message, out);
        }
    }

    /// Says the last thing, also to one that still waits to be told where it stands.
    fn part(&self, session: Attendee, origin: Option<Origin>, message: FromLockd, out: &mut Vec<Output>) {
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
        let (node, table) = (self.node.clone(), self.table());
        LockdStatus { node, pid: self.pid, members: table.members(), term: table.term() }
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
