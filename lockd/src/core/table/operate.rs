//! Operations: who does what, and what is answered. What follows for others is `settle`'s.

use csnap_proto::message::lock::{
    Flags, KeyOp, LockEvent, LockOp, LockReply, LockView, Mode, Told, ValueChange, Watched,
};
use csnap_proto::{LockId, Sequence, SessionId, Term};

use super::resource::Lock;
use super::session::StoredReply;
use super::settle::Standing;
use super::{Effect, Table};
use crate::core::canary::Canary;
use crate::core::mode::{Direction, direction, is_writer};

/// A reply, and what is to be done once it is out.
pub(super) struct Outcome {
    pub(super) reply: LockReply,
    /// The resource that changed, and how it stood before.
    pub(super) touched: Option<(String, Standing)>,
    /// Whom to tell directly.
    pub(super) notices: Vec<(SessionId, LockEvent)>,
}

impl From<LockReply> for Outcome {
    fn from(reply: LockReply) -> Self {
        Self { reply, touched: None, notices: Vec::new() }
    }
}

pub(super) fn invalid(why: impl Into<String>) -> LockReply {
    LockReply::Invalid(why.into())
}

impl Table {
    pub(super) fn operate(&mut self, id: SessionId, at: Sequence, op: LockOp, effects: &mut Vec<Effect>) {
        let outcome = match op {
            LockOp::Lock { resource, mode, flags, owner } => self.lock(id, resource, mode, flags, owner),
            LockOp::Convert { lock, mode, flags, value } => {
                self.convert(id, lock, mode, flags, value, effects)
            }
            LockOp::Unlock { lock, flags, value } => self.unlock(id, lock, flags, value),
            LockOp::Cancel { lock } => self.cancel(id, lock),
            LockOp::Adopt { lock, owner } => self.adopt(id, lock, owner),
            LockOp::Break { lock } => self.break_lock(lock),
            LockOp::Unwatch { what } => {
                self.unwatch(id, &what);
                LockReply::Done.into()
            }
            LockOp::SetInfo { info } => {
                self.answer(id, at, StoredReply::Reply(LockReply::Done), effects);
                return self.set_info(id, info, effects);
            }
            LockOp::Key(op @ (KeyOp::Put { .. } | KeyOp::Delete { .. })) => {
                let (reply, changed) = self.change_key(id, op);
                self.answer(id, at, StoredReply::Reply(reply), effects);
                return self.tell_key(changed, effects);
            }
            LockOp::Watch { what, once } => {
                let refusal = self.watch(id, what.clone(), once);
                let op = LockOp::Watch { what, once };
                let stored = match (&refusal, &op) {
                    (Some(refusal), _) => StoredReply::Reply(refusal.clone()),
                    // Short, and told exactly: an owner sees the events after it as the changes that they are.
                    (None, LockOp::Watch { what: Watched::Value(_), .. }) => {
                        StoredReply::Reply(self.look(&op))
                    }
                    (None, _) => StoredReply::Again(op),
                };
                return self.answer(id, at, stored, effects);
            }
            op @ (LockOp::Key(_) | LockOp::Show { .. } | LockOp::Locks { .. }) => {
                return self.answer(id, at, StoredReply::Again(op), effects);
            }
        };
        self.conclude(id, at, outcome, effects);
    }

    fn conclude(&mut self, id: SessionId, at: Sequence, outcome: Outcome, effects: &mut Vec<Effect>) {
        let granted = matches!(outcome.reply, LockReply::Granted { .. });
        self.answer(id, at, StoredReply::Reply(outcome.reply), effects);
        for (session, event) in outcome.notices {
            self.event(session, event, effects);
        }
        if let Some((resource, before)) = outcome.touched {
            self.settle(&resource, before, effects);
            if granted {
                self.tell_circles(id, effects);
            }
        }
    }

    fn unlock(&mut self, session: SessionId, id: LockId, flags: Flags, value: ValueChange) -> Outcome {
        let Some(lock) = self.own_lock(session, id) else { return invalid("no such lock").into() };
        if let Err(why) = crate::core::flags::check_unlock(flags) {
            return invalid(why).into();
        }
        if lock.wanted.is_some() && !flags.has(Flags::FORCEUNLOCK) {
            return LockReply::Busy.into();
        }
        let name = lock.resource.clone();
        let before = self.standing(&name);
        self.drop_lock(id, value);
        Outcome { touched: Some((name, before)), ..LockReply::Done.into() }
    }

    /// Waiting: removed. Converting: back to the mode that it has. Granted: the grant came first.
    fn cancel(&mut self, session: SessionId, id: LockId) -> Outcome {
        let Some(lock) = self.own_lock(session, id) else { return invalid("no such lock").into() };
        if lock.wanted.is_none() {
            return self.granted_reply(id, Direction::Read, Told::default()).into();
        }
        let (name, waiting) = (lock.resource.clone(), lock.granted.is_none());
        let before = self.standing(&name);
        if waiting {
            self.drop_lock(id, ValueChange::Keep);
        } else {
            self.dequeue(id);
        }
        let touched = (!self.broken.breaks(Canary::NoWakeupAfterCancel)).then_some((name, before));
        let notices = vec![(session, LockEvent::Cancelled { lock: id })];
        Outcome { reply: LockReply::Done, touched, notices }
    }

    pub(super) fn own_lock(&self, session: SessionId, id: LockId) -> Option<&Lock> {
        self.locks.get(&id).filter(|lock| lock.session == Some(session))
    }

    /// Puts a lock into the queue of its resource.
    pub(super) fn enqueue(&mut self, id: LockId, wanted: Mode, flags: Flags) {
        let lock = self.locks.get_mut(&id).expect("only known locks are queued");
        (lock.wanted, lock.flags) = (Some(wanted), flags);
        let resource = self.resources.get_mut(&lock.resource).expect("locks have their resource");
        resource.enqueue(id, lock.granted.is_some(), flags);
        let session = lock.session.and_then(|session| self.sessions.get_mut(&session));
        session.expect("only live sessions ask").waits.insert(id);
    }

    /// Takes a lock out of the queue: what it waited for is forgotten.
    pub(super) fn dequeue(&mut self, id: LockId) {
        let lock = self.locks.get_mut(&id).expect("only known locks are queued");
        (lock.wanted, lock.flags, lock.told_circle) = (None, Flags::NONE, false);
        self.resources.get_mut(&lock.resource).expect("locks have their resource").unqueue(id);
        if let Some(session) = lock.session.and_then(|session| self.sessions.get_mut(&session)) {
            session.waits.remove(&id);
        }
    }

    /// Gives the lock its mode. A grant into a writer mode from below is a new term; within them the term stays.
    pub(super) fn grant(&mut self, id: LockId, mode: Mode, told: Told) -> LockReply {
        self.dequeue(id);
        let lock = self.locks.get_mut(&id).expect("only known locks are granted");
        self.resources.get_mut(&lock.resource).expect("locks have their resource").granted.insert(id);
        let moves = lock.granted.map_or(Direction::Read, |from| direction(from, mode));
        lock.term = match (lock.is_writer(), is_writer(mode)) {
            (true, true) => lock.term,
            (false, true) => {
                self.term = self.term.next();
                self.term
            }
            (_, false) => Term(0),
        };
        (lock.granted, lock.told) = (Some(mode), None);
        self.granted_reply(id, moves, told)
    }

    pub(super) fn granted_reply(&self, id: LockId, moves: Direction, told: Told) -> LockReply {
        let lock = self.lock_view(id).expect("asked for granted locks only");
        let value = (moves != Direction::Nothing).then(|| self.resources[&lock.resource].value.clone());
        LockReply::Granted { lock, value, told }
    }

    /// A granted lock as its owner sees it.
    pub(super) fn lock_view(&self, id: LockId) -> Option<LockView> {
        let lock = &self.locks[&id];
        let mode = lock.granted?;
        Some(LockView { lock: id, resource: lock.resource.clone(), mode, term: lock.term })
    }

    /// Removes a lock from its resource and its session. From a writer mode `value` says what becomes of the value block.
    pub(super) fn drop_lock(&mut self, id: LockId, value: ValueChange) {
        self.dequeue(id);
        if self.locks[&id].is_writer() {
            self.change_value(id, value);
        }
        let lock = self.locks.remove(&id).expect("looked up above");
        self.resources.get_mut(&lock.resource).expect("locks have their resource").remove(id);
        self.persistent -= usize::from(lock.owner.is_some());
        if let Some(session) = lock.session.and_then(|session| self.sessions.get_mut(&session)) {
            session.locks.remove(&id);
        }
    }

    /// Changes the value block in the name of a lock that holds PW or EX.
    pub(super) fn change_value(&mut self, id: LockId, change: ValueChange) {
        let lock = &self.locks[&id];
        let value = &mut self.resources.get_mut(&lock.resource).expect("locks have their resource").value;
        match change {
            ValueChange::Keep => return,
            ValueChange::Write(bytes) => {
                (value.valid, value.bytes) = (!bytes.is_empty(), bytes);
                (value.writer, value.term) = (lock.holder(), lock.term);
            }
            ValueChange::Invalidate => value.valid = false,
        }
        self.value_sequence += 1;
        value.sequence = self.value_sequence;
    }
}
