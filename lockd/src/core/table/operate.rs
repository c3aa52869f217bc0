//! Lock operations: what the asker gets. What follows for others is `settle`'s.

use csnap_proto::limits::LOCKS_PER_SESSION_MAX;
use csnap_proto::message::lock::{LockEvent, LockOp, LockReply, LockView, Mode, UnlockValue, ValueBlock};
use csnap_proto::{LockId, Sequence, SessionId, Term};

use super::resource::{Lock, Resource, Standing};
use super::session::StoredReply;
use super::{Effect, LOCKS_PER_RESOURCE_MAX, RESOURCES_MAX, Table};
use crate::core::mode::{Direction, direction, is_writer};

/// A reply, and what is to be done once it is out.
struct Outcome {
    reply: StoredReply,
    /// The resource that changed, and how it stood before.
    touched: Option<(String, Standing)>,
    /// An event that ends a request of the asker's.
    event: Option<LockEvent>,
}

impl From<LockReply> for Outcome {
    fn from(reply: LockReply) -> Self {
        Self { reply: StoredReply::Reply(reply), touched: None, event: None }
    }
}

fn invalid(why: &str) -> LockReply {
    LockReply::Invalid(why.into())
}

impl Table {
    pub(super) fn operate(&mut self, id: SessionId, at: Sequence, op: LockOp, effects: &mut Vec<Effect>) {
        let outcome = match op {
            LockOp::Lock { resource, mode, no_queue } => self.lock(id, resource, mode, no_queue),
            LockOp::Convert { lock, mode, no_queue, value } => self.convert(id, lock, mode, no_queue, value),
            LockOp::Unlock { lock, value } => self.unlock(id, lock, value),
            LockOp::Cancel { lock } => self.cancel(id, lock),
            LockOp::Watch { resource } => self.watch(id, resource).into(),
            LockOp::Unwatch { resource } => self.unwatch(id, &resource).into(),
            LockOp::WatchMembers => {
                self.watch_members(id);
                Outcome { reply: StoredReply::Members, touched: None, event: None }
            }
            LockOp::SetInfo { info } => {
                self.answer(id, at, StoredReply::Reply(LockReply::Done), effects);
                self.set_info(id, info, effects);
                return;
            }
        };
        self.answer(id, at, outcome.reply, effects);
        if let Some(event) = outcome.event {
            self.event(id, event, effects);
        }
        if let Some((resource, before)) = outcome.touched {
            self.settle(&resource, before, effects);
        }
    }

    fn lock(&mut self, session: SessionId, name: String, mode: Mode, no_queue: bool) -> Outcome {
        if self.sessions[&session].locks.len() >= LOCKS_PER_SESSION_MAX {
            return invalid("the session has as many locks as one may have").into();
        }
        if let Err(full) = self.make_resource(&name) {
            return full.into();
        }
        let before = self.standing(&name);
        let resource = self.resources.get_mut(&name).expect("made above");
        let free = resource.takes_new(mode, &self.locks);
        let refusal = if resource.lock_count() >= LOCKS_PER_RESOURCE_MAX {
            Some(invalid("the resource has as many locks as one may have"))
        } else {
            (!free && no_queue).then_some(LockReply::WouldBlock)
        };
        if let Some(refusal) = refusal {
            return refusal.into();
        }
        self.last_lock = self.last_lock.next();
        let id = self.last_lock;
        let (resource_name, wanted) = (name.clone(), Some(mode));
        let lock =
            Lock { session, resource: resource_name, granted: None, wanted, term: Term(0), told: None };
        self.locks.insert(id, lock);
        self.sessions.get_mut(&session).expect("checked by the caller").locks.insert(id);
        let reply = if free {
            self.grant(id, mode)
        } else {
            resource.waiting.push_back(id);
            LockReply::Queued { lock: id }
        };
        Outcome { touched: Some((name, before)), ..reply.into() }
    }

    fn convert(
        &mut self,
        session: SessionId,
        id: LockId,
        mode: Mode,
        no_queue: bool,
        value: Option<Vec<u8>>,
    ) -> Outcome {
        let Some(lock) = self.own_lock(session, id) else { return invalid("no such lock").into() };
        let (Some(from), None) = (lock.granted, lock.wanted) else {
            return invalid("the lock waits already").into();
        };
        let writes = direction(from, mode) == Direction::Write;
        if value.is_some() && !writes {
            return invalid("this conversion does not write the value block").into();
        }
        let (name, term) = (lock.resource.clone(), lock.term);
        let before = self.standing(&name);
        let resource = self.resources.get_mut(&name).expect("locks have their resource");
        let reply = if !resource.is_blocked(Some(id), mode, &self.locks) {
            if let Some(bytes) = value {
                self.write_value(&name, bytes, term);
            }
            self.grant(id, mode)
        } else {
            assert!(!writes, "a conversion from a writer mode that does not go up is never blocked");
            if no_queue {
                return LockReply::WouldBlock.into();
            }
            if resource.is_deadlock(id, &self.locks) {
                return LockReply::Deadlock.into();
            }
            resource.converting.push_back(id);
            self.locks.get_mut(&id).expect("found above").wanted = Some(mode);
            LockReply::Queued { lock: id }
        };
        Outcome { touched: Some((name, before)), ..reply.into() }
    }

    fn unlock(&mut self, session: SessionId, id: LockId, value: UnlockValue) -> Outcome {
        let Some(lock) = self.own_lock(session, id) else { return invalid("no such lock").into() };
        let name = lock.resource.clone();
        let before = self.standing(&name);
        self.drop_lock(id, Some(value));
        self.sessions.get_mut(&session).expect("checked by the caller").locks.remove(&id);
        Outcome { touched: Some((name, before)), ..LockReply::Done.into() }
    }

    fn cancel(&mut self, session: SessionId, id: LockId) -> Outcome {
        let Some(lock) = self.own_lock(session, id) else { return invalid("no such lock").into() };
        let name = lock.resource.clone();
        let before = self.standing(&name);
        match (lock.granted, lock.wanted) {
            (_, None) => return self.granted_reply(id).into(),
            (None, Some(_)) => {
                self.drop_lock(id, None);
                self.sessions.get_mut(&session).expect("checked by the caller").locks.remove(&id);
            }
            (Some(_), Some(_)) => {
                self.resources.get_mut(&name).expect("locks have their resource").unqueue(id);
                self.locks.get_mut(&id).expect("found above").wanted = None;
            }
        }
        let event = Some(LockEvent::Cancelled { lock: id });
        Outcome { touched: Some((name, before)), event, ..LockReply::Done.into() }
    }

    fn own_lock(&self, session: SessionId, id: LockId) -> Option<&Lock> {
        self.locks.get(&id).filter(|lock| lock.session == session)
    }

    /// Makes the resource if it is not there; whoever calls settles it or drops it again if it stays unused.
    pub(super) fn make_resource(&mut self, name: &str) -> Result<(), LockReply> {
        if !self.resources.contains_key(name) {
            if self.resources.len() >= RESOURCES_MAX {
                return Err(invalid("lockd has as many resources as it may have"));
            }
            self.resources.insert(name.to_owned(), Resource::default());
        }
        Ok(())
    }

    /// Gives the lock its mode. A grant into a writer mode from below is a new term; within them the term stays.
    pub(super) fn grant(&mut self, id: LockId, mode: Mode) -> LockReply {
        let lock = self.locks.get_mut(&id).expect("only known locks are granted");
        let resource = self.resources.get_mut(&lock.resource).expect("locks have their resource");
        resource.unqueue(id);
        resource.granted.insert(id);
        let wrote = lock.granted.is_some_and(is_writer);
        lock.term = match (wrote, is_writer(mode)) {
            (true, true) => lock.term,
            (false, true) => {
                self.term = self.term.next();
                self.term
            }
            (_, false) => Term(0),
        };
        (lock.granted, lock.wanted, lock.told) = (Some(mode), None, None);
        self.granted_reply(id)
    }

    fn granted_reply(&self, id: LockId) -> LockReply {
        let lock = self.lock_view(id).expect("asked for granted locks only");
        let value = self.resources[&lock.resource].value.clone();
        LockReply::Granted { lock, value }
    }

    /// A granted lock as its owner sees it.
    pub(super) fn lock_view(&self, id: LockId) -> Option<LockView> {
        let lock = &self.locks[&id];
        let mode = lock.granted?;
        Some(LockView { lock: id, resource: lock.resource.clone(), mode, term: lock.term })
    }

    /// Removes a lock from its resource. From a writer mode `value` says what becomes of the value block.
    pub(super) fn drop_lock(&mut self, id: LockId, value: Option<UnlockValue>) {
        let lock = self.locks.remove(&id).expect("only known locks are dropped");
        let resource = self.resources.get_mut(&lock.resource).expect("locks have their resource");
        resource.remove(id);
        match value {
            Some(UnlockValue::Write(bytes)) if lock.granted.is_some_and(is_writer) => {
                self.write_value(&lock.resource, bytes, lock.term);
            }
            Some(UnlockValue::Invalidate) if lock.granted.is_some_and(is_writer) => {
                self.value_sequence += 1;
                (resource.value.valid, resource.value.sequence) = (false, self.value_sequence);
            }
            _ => {}
        }
    }

    fn write_value(&mut self, name: &str, bytes: Vec<u8>, term: Term) {
        self.value_sequence += 1;
        let resource = self.resources.get_mut(name).expect("its lock was there");
        resource.value = ValueBlock { bytes, sequence: self.value_sequence, valid: true, term };
    }
}
