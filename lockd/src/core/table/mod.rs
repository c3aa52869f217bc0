//! The lock table: a deterministic state machine, commands in, effects out.
//!
//! It has no clock, no randomness and no I/O: whoever applies the same commands gets the same table and the same
//! effects, which is what makes it replicable by a log. It knows sessions, not connections, and leases only as numbers
//! that somebody else counts.
//!
//! Invariants, checked by [`Table::check`], the model test and `lockd/tests/proof`:
//! - any two locks granted on a resource are compatible, and no request that could be granted waits;
//! - terms, lock ids, sequences of values and revisions of keys only grow, also over a deletion;
//! - an operation of a session takes effect once;
//! - a value block is valid if and only if a holder wrote it and no holder of PW or EX went away since other than by
//!   its own unlock, nor said that it is not;
//! - no request closes a circle of waits unless its owner asked for that.
//!
//! Files: here sessions and the way a command takes; `operate`: what an operation does; `request`: new locks and
//! conversions; `orphan`: persistent locks; `circle`: deadlocks; `settle`: what follows for everybody else; `key`: the
//! configuration store; `watch`; `resource`: queues and the rules of granting; `session`: answers and events; `view`: what
//! is shown; `foreign`: a table that came from another group.

mod circle;
mod command;
mod foreign;
mod key;
mod operate;
mod orphan;
mod request;
mod resource;
mod session;
mod settle;
#[cfg(test)]
mod tests;
mod view;
mod watch;

use std::collections::BTreeMap;

use csnap_proto::limits::LOCKD_SESSIONS_MAX;
use csnap_proto::message::lock::{LockEvent, LockReply, ValueChange, Watched};
use csnap_proto::{EventNumber, LockId, Sequence, SessionId, Term};
use serde::{Deserialize, Serialize};

pub use self::circle::CIRCLE_REQUESTS_MAX;
pub use self::command::{Command, Effect};
use self::key::Keys;
use self::resource::{Locks, Resource};
use self::session::{Session, StoredAnswer, StoredReply};
pub use self::view::SessionView;
use self::watch::Watchers;
use super::canary::{Broken, Canary};

/// Resources that are kept at once: value blocks stay after their locks, so a session could make any number.
pub const RESOURCES_MAX: usize = 65_536;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Table {
    sessions: BTreeMap<SessionId, Session>,
    resources: BTreeMap<String, Resource>,
    locks: Locks,
    watchers: Watchers,
    keys: Keys,
    last_lock: LockId,
    /// Highest term ever granted.
    term: Term,
    /// Of the last write or invalidation of any value block, so that a number never comes back.
    value_sequence: u64,
    /// Locks that are persistent.
    persistent: usize,
    #[serde(skip)]
    broken: Broken,
}

/// What a replay to a resumed owner consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missed {
    /// An answer that it may not have got.
    Answer(Sequence, LockReply),
    /// An event after the last that it saw.
    Event(EventNumber, LockEvent),
}

impl Table {
    /// A table that breaks a rule.
    #[cfg(feature = "canary")]
    #[must_use]
    pub fn breaking(rule: Canary) -> Self {
        Self { broken: Broken::rule(rule), ..Self::default() }
    }

    /// From now on it breaks this rule.
    #[cfg(feature = "replica")]
    pub(crate) fn break_rule(&mut self, rule: Broken) {
        self.broken = rule;
    }

    /// Applies a command that is durable. Effects are appended in the order in which they happen.
    pub fn apply(&mut self, command: Command, effects: &mut Vec<Effect>) {
        match command {
            Command::Open { session, secret, node, lease_ms, info } => {
                self.open(session, Session::new(secret, node, lease_ms, info), effects);
            }
            Command::Operate { session, sequence, lowest_unanswered, op } => {
                if self.takes(session, sequence, lowest_unanswered, effects) {
                    self.operate(session, sequence, op, effects);
                }
            }
            Command::Deny { session, sequence, lowest_unanswered, reason } => {
                if self.takes(session, sequence, lowest_unanswered, effects) {
                    self.answer(session, sequence, StoredReply::Reply(LockReply::Invalid(reason)), effects);
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

    /// Whether an operation is the next of its session; one that took its place before is answered again.
    fn takes(
        &mut self,
        session: SessionId,
        sequence: Sequence,
        lowest_unanswered: Sequence,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let Some(state) = self.sessions.get_mut(&session) else { return false };
        state.answers = state.answers.split_off(&lowest_unanswered);
        let resent = sequence == state.last_sequence && self.broken.breaks(Canary::ApplyTwice);
        if sequence == state.last_sequence.next() || resent {
            state.last_sequence = sequence;
            return true;
        }
        if let Some(reply) = self.stored_answer(session, sequence) {
            effects.push(Effect::Answer { session, sequence, reply });
        }
        false
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
                self.tell_watchers(&Watched::Members, &LockEvent::MemberUp(member), effects);
            }
        }
    }

    /// Ends a session: its persistent locks become orphans, its other locks go as if their holder had died, its ephemeral
    /// keys and watches go. Whoever waits is served afterwards, once per resource, so that no lock of a dead session is
    /// ever granted.
    fn end(&mut self, id: SessionId, expired: bool, effects: &mut Vec<Effect>) {
        let Some(mut session) = self.sessions.remove(&id) else { return };
        effects.push(Effect::Ended { session: id, expired });
        for what in std::mem::take(&mut session.watches) {
            self.unwatch(id, &what);
        }
        let mut before = BTreeMap::new();
        for lock in &session.locks {
            let resource = self.locks[lock].resource.clone();
            let standing = self.standing(&resource);
            before.entry(resource).or_insert(standing);
        }
        for lock in std::mem::take(&mut session.locks) {
            let state = &self.locks[&lock];
            let stays = state.owner.is_some() && state.granted.is_some();
            if stays && !self.broken.breaks(Canary::DropOrphans) {
                self.orphan(lock);
            } else {
                let keep = self.broken.breaks(Canary::KeepValidityAtDeath);
                self.drop_lock(lock, if keep { ValueChange::Keep } else { ValueChange::Invalidate });
            }
        }
        for (resource, standing) in before {
            self.settle(&resource, standing, effects);
        }
        let down = LockEvent::MemberDown { session: id, node: session.node.clone() };
        self.end_ephemerals(session, effects);
        self.tell_watchers(&Watched::Members, &down, effects);
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

    /// Whether everything agrees with everything. A table that was read back is checked before it is used.
    pub fn check(&self) -> Result<(), &'static str> {
        for (name, resource) in &self.resources {
            resource.check(name, &self.locks)?;
            if resource.is_unused() || resource.value.sequence > self.value_sequence {
                return Err("a resource that should be gone, or a value from the future");
            }
        }
        for (id, lock) in &self.locks {
            let session = lock.session.map(|session| self.sessions.get(&session));
            let listed = |session: &Session| {
                session.locks.contains(id) && session.waits.contains(id) == lock.wanted.is_some()
            };
            let owned = match session {
                Some(session) => session.is_some_and(listed),
                None => lock.owner.is_some() && lock.granted.is_some() && lock.wanted.is_none(),
            };
            let resource = self.resources.get(&lock.resource);
            let queued = resource.is_some_and(|resource| {
                resource.granted.contains(id) == lock.granted.is_some()
                    && resource.converting.contains(id) == (lock.granted.is_some() && lock.wanted.is_some())
                    && resource.waiting.contains(id) == lock.granted.is_none()
            });
            if !owned || !queued || *id > self.last_lock || lock.term > self.term {
                return Err("a lock without its session or resource, or from the future");
            }
        }
        self.check_sessions()?;
        self.keys.check(&self.sessions)
    }

    fn check_sessions(&self) -> Result<(), &'static str> {
        let mut watches = 0;
        for (id, session) in &self.sessions {
            session.check()?;
            watches += session.watches.len();
            let watching = |what| self.watchers.get(what).is_some_and(|who| who.contains_key(id));
            if !session.watches.iter().all(watching) {
                return Err("a session with a watch that is not there");
            }
        }
        if self.watchers.values().map(BTreeMap::len).sum::<usize>() != watches {
            return Err("a watch without its session");
        }
        let (held, orphans) = (
            self.sessions.values().map(|session| session.locks.len()).sum::<usize>(),
            self.locks.values().filter(|lock| lock.session.is_none()).count(),
        );
        let persistent = self.locks.values().filter(|lock| lock.owner.is_some()).count();
        if held + orphans != self.locks.len() || persistent != self.persistent {
            return Err("a session with a lock that is not there");
        }
        Ok(())
    }
}
