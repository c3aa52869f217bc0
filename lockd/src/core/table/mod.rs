//! The lock table: a deterministic state machine, commands in, effects out.
//!
//! It has no clock, no randomness and no I/O: whoever applies the same commands gets the same table and the same
//! effects, which is what makes it replicable by a log. It knows sessions, not connections, and leases only as numbers
//! that somebody else counts.
//!
//! Invariants, checked by [`Table::check`] and the model test:
//! - any two locks granted on a resource are compatible;
//! - terms and lock ids only grow, over all resources, also over a resource's deletion;
//! - an operation of a session takes effect once;
//! - a value block is valid if and only if a holder wrote it and no holder of PW or EX went away since other than by
//!   its own unlock, nor said that it is not.
//!
//! Files: [`Table`]'s sessions and the way a command takes here; `operate`: locks; `settle`: what follows for everybody
//! else; `watch`: watches and membership; `resource`: queues; `session`: answers and events.

mod command;
mod operate;
mod resource;
mod session;
mod settle;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::BTreeMap;

use csnap_proto::limits::LOCKD_SESSIONS_MAX;
use csnap_proto::message::lock::{LockEvent, LockReply, LockView, Member, QueuedView, UnlockValue};
use csnap_proto::{EventNumber, LockId, Name, Secret, Sequence, SessionId, Term};
use serde::{Deserialize, Serialize};

pub use self::command::{Command, Effect};
use self::resource::{Locks, Resource};
use self::session::{Session, StoredAnswer, StoredReply};

/// Resources that are kept at once: value blocks stay after their locks, so a session could make any number.
pub const RESOURCES_MAX: usize = 65_536;

/// Locks on one resource: every grant looks at all of them.
pub const LOCKS_PER_RESOURCE_MAX: usize = 4096;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Table {
    sessions: BTreeMap<SessionId, Session>,
    resources: BTreeMap<String, Resource>,
    locks: Locks,
    last_lock: LockId,
    /// Highest term ever granted.
    term: Term,
    /// Of the last write or invalidation of any value block, so that a number never comes back.
    value_sequence: u64,
}

/// What a replay to a resumed owner consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missed {
    /// An answer that it may not have got.
    Answer(Sequence, LockReply),
    /// An event after the last that it saw.
    Event(EventNumber, LockEvent),
}

/// A session as its owner gets it back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionView {
    /// Locks that it holds.
    pub locks: Vec<LockView>,
    /// Requests that wait.
    pub queued: Vec<QueuedView>,
    /// Last event made for it.
    pub last_event: EventNumber,
    /// Last operation applied.
    pub last_sequence: Sequence,
}

impl Table {
    /// Applies a command that is durable. Effects are appended in the order in which they happen.
    pub fn apply(&mut self, command: Command, effects: &mut Vec<Effect>) {
        match command {
            Command::Open { session, secret, node, lease_ms, info } => {
                self.open(session, Session::new(secret, node, lease_ms, info), effects);
            }
            Command::Operate { session, sequence, lowest_unanswered, op } => {
                let Some(state) = self.sessions.get_mut(&session) else { return };
                state.answers = state.answers.split_off(&lowest_unanswered);
                if sequence == state.last_sequence.next() {
                    state.last_sequence = sequence;
                    self.operate(session, sequence, op, effects);
                } else if let Some(reply) = self.stored_answer(session, sequence) {
                    effects.push(Effect::Answer { session, sequence, reply });
                }
            }
            Command::Seen { session, last_event } => {
                if let Some(state) = self.sessions.get_mut(&session) {
                    state.forget_events(last_event);
                }
            }
            Command::Jeopardy { session } => self.event(session, LockEvent::Jeopardy, effects),
            Command::Close { session } => self.end(session, false, effects),
            Command::Expire { session } => self.end(session, true, effects),
        }
    }

    fn open(&mut self, id: SessionId, session: Session, effects: &mut Vec<Effect>) {
        match self.sessions.get(&id) {
            Some(known) if known.secret == session.secret => effects.push(Effect::Opened { session: id }),
            Some(_) => {
                effects.push(Effect::Refused { reason: "the session belongs to somebody else".into() })
            }
            None if self.sessions.len() >= LOCKD_SESSIONS_MAX => {
                let reason = format!("lockd has {LOCKD_SESSIONS_MAX} sessions, which is its limit");
                effects.push(Effect::Refused { reason });
            }
            None => {
                let member = session.member(id);
                self.sessions.insert(id, session);
                effects.push(Effect::Opened { session: id });
                self.tell_members(&LockEvent::MemberUp(member), effects);
            }
        }
    }

    /// Ends a session: its locks go as if their holder had died. Whoever waits behind them is served afterwards, once
    /// per resource, so that no lock of a dead session is ever granted.
    fn end(&mut self, id: SessionId, expired: bool, effects: &mut Vec<Effect>) {
        let Some(session) = self.sessions.remove(&id) else { return };
        effects.push(Effect::Ended { session: id, expired });
        let mut before = BTreeMap::new();
        for lock in &session.locks {
            let resource = self.locks[lock].resource.clone();
            let standing = self.standing(&resource);
            before.entry(resource).or_insert(standing);
        }
        for lock in session.locks {
            self.drop_lock(lock, Some(UnlockValue::Invalidate));
        }
        for resource in session.watches {
            self.unwatch_resource(id, &resource);
        }
        for (resource, standing) in before {
            self.settle(&resource, standing, effects);
        }
        self.tell_members(&LockEvent::MemberDown { session: id, node: session.node }, effects);
    }

    /// Stores an answer and lets it out.
    fn answer(&mut self, id: SessionId, sequence: Sequence, reply: StoredReply, effects: &mut Vec<Effect>) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.answers.insert(sequence, StoredAnswer { after: session.last_event, reply });
        let reply = self.stored_answer(id, sequence).expect("stored just now");
        effects.push(Effect::Answer { session: id, sequence, reply });
    }

    /// Queues an event and lets it out.
    fn event(&mut self, id: SessionId, event: LockEvent, effects: &mut Vec<Effect>) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let number = session.push_event(event.clone());
        effects.push(Effect::Event { session: id, number, event });
    }

    /// The answer to an operation that was applied, unless its owner no longer needs it.
    #[must_use]
    pub fn stored_answer(&self, id: SessionId, sequence: Sequence) -> Option<LockReply> {
        match &self.sessions.get(&id)?.answers.get(&sequence)?.reply {
            StoredReply::Reply(reply) => Some(reply.clone()),
            StoredReply::Members => Some(LockReply::Members(self.members())),
        }
    }

    /// What the owner of a session may have missed since it saw `last_event`, in the order in which it happened.
    #[must_use]
    pub fn missed(&self, id: SessionId, last_event: EventNumber) -> Vec<Missed> {
        let Some(session) = self.sessions.get(&id) else { return Vec::new() };
        let mut missed = Vec::new();
        let mut answers = session.answers.iter().peekable();
        let answer = |sequence: &Sequence| {
            let reply = self.stored_answer(id, *sequence).expect("listed just now");
            Missed::Answer(*sequence, reply)
        };
        for (number, event) in session.events_after(last_event) {
            while let Some((sequence, _)) = answers.next_if(|(_, stored)| stored.after < number) {
                missed.push(answer(sequence));
            }
            missed.push(Missed::Event(number, event));
        }
        missed.extend(answers.map(|(sequence, _)| answer(sequence)));
        missed
    }

    /// A session, for an owner that resumes it; `None` when there is none.
    #[must_use]
    pub fn view(&self, id: SessionId) -> Option<SessionView> {
        let session = self.sessions.get(&id)?;
        let locks = session.locks.iter().filter_map(|lock| self.lock_view(*lock)).collect();
        let queued = session.locks.iter().filter_map(|id| {
            let lock = &self.locks[id];
            let wanted = lock.wanted?;
            Some(QueuedView { lock: *id, resource: lock.resource.clone(), wanted })
        });
        let queued = queued.collect();
        let (last_event, last_sequence) = (session.last_event, session.last_sequence);
        Some(SessionView { locks, queued, last_event, last_sequence })
    }

    /// Whether `secret` is the session's; `None` when there is no such session.
    #[must_use]
    pub fn proves(&self, id: SessionId, secret: Secret) -> Option<bool> {
        self.sessions.get(&id).map(|session| session.secret == secret)
    }

    /// Every session with its lease, milliseconds.
    pub fn leases(&self) -> impl Iterator<Item = (SessionId, u64)> {
        self.sessions.iter().map(|(id, session)| (*id, session.lease_ms))
    }

    /// Lease of a session, milliseconds.
    #[must_use]
    pub fn lease_ms(&self, id: SessionId) -> Option<u64> {
        self.sessions.get(&id).map(|session| session.lease_ms)
    }

    /// The last event made for a session.
    #[must_use]
    pub fn last_event(&self, id: SessionId) -> Option<EventNumber> {
        self.sessions.get(&id).map(|session| session.last_event)
    }

    /// The last event of a session that is no longer kept.
    #[must_use]
    pub fn forgotten(&self, id: SessionId) -> Option<EventNumber> {
        self.sessions.get(&id).map(|session| session.forgotten)
    }

    /// Every live session, as others see it.
    #[must_use]
    pub fn members(&self) -> Vec<Member> {
        self.sessions.iter().map(|(id, session)| session.member(*id)).collect()
    }

    /// Node of a session, for people.
    #[must_use]
    pub fn node(&self, id: SessionId) -> Option<&Name> {
        self.sessions.get(&id).map(|session| &session.node)
    }

    /// Highest term ever granted.
    #[must_use]
    pub fn term(&self) -> Term {
        self.term
    }

    /// Whether everything agrees with everything. A table that was read back is checked before it is used.
    pub fn check(&self) -> Result<(), &'static str> {
        for session in self.sessions.values() {
            session.check()?;
            if !session.watches.iter().all(|name| self.resources.contains_key(name)) {
                return Err("a watch on a resource that is not there");
            }
        }
        for (name, resource) in &self.resources {
            resource.check(name, &self.locks)?;
            if resource.is_unused() || resource.value.sequence > self.value_sequence {
                return Err("a resource that should be gone, or a value from the future");
            }
        }
        for (id, lock) in &self.locks {
            let owned = self.sessions.get(&lock.session).is_some_and(|session| session.locks.contains(id));
            let queued = self
                .resources
                .get(&lock.resource)
                .is_some_and(|resource| resource.granted.contains(id) || resource.waiting.contains(id));
            if !owned || !queued || *id > self.last_lock || lock.term > self.term {
                return Err("a lock without its session or resource, or from the future");
            }
        }
        if self.sessions.values().map(|session| session.locks.len()).sum::<usize>() != self.locks.len() {
            return Err("a session with a lock that is not there");
        }
        Ok(())
    }
}
