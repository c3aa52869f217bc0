//! What a request for a lock does: new, converted, cancelled, adopted, broken.

use csnap_proto::message::lock::{Fenced, Flags, LockEvent, LockReply, Loss, Mode, Owner, Told, ValueChange};
use csnap_proto::{LockId, SessionId, Term};

use super::super::tables::{is_writer, queues_conversion, writes};
use super::{L, Model, invalid};

impl Model {
    pub(super) fn new_lock(
        &mut self,
        session: SessionId,
        resource: &str,
        mode: Mode,
        flags: Flags,
        owner: Option<Owner>,
    ) -> LockReply {
        let only_conversions = Flags::QUECVT | Flags::CONVDEADLK;
        let expedite = flags.has(Flags::EXPEDITE) && (mode != Mode::Nl || flags.has(Flags::NOQUEUE));
        if flags.has_any(only_conversions) || expedite || nonsense(flags) {
            return invalid();
        }
        let before = self.seen(resource);
        let lock = L {
            id: LockId(self.last_lock + 1),
            session: Some(session),
            owner,
            resource: resource.to_owned(),
            granted: None,
            wanted: None,
            flags: Flags::NONE,
            term: Term(0),
            place: 0,
            told: None,
            told_circle: false,
        };
        let id = lock.id;
        let chosen = self.choose(&lock, mode, flags, false);
        if chosen.is_none() && flags.has(Flags::NOQUEUE) {
            return self.would_block(&lock, mode, flags);
        }
        self.last_lock += 1;
        self.locks.push(lock);
        let reply = match chosen {
            Some((mode, alternate)) => self.grant(id, mode, Told { alternate, ..Told::default() }),
            None => {
                self.wait(id, mode, flags);
                let deadlock = self.closes_circle(session, id, flags);
                if deadlock && !flags.has(Flags::NODLCKWT) {
                    self.locks.retain(|l| l.id != id);
                    return LockReply::Deadlock;
                }
                LockReply::Queued { lock: id, told: Told { deadlock, ..Told::default() } }
            }
        };
        self.settle(resource, &before);
        self.tell_circles_if(&reply, session);
        reply
    }

    pub(super) fn convert(
        &mut self,
        session: SessionId,
        id: LockId,
        mode: Mode,
        flags: Flags,
        value: &ValueChange,
    ) -> LockReply {
        let Some(lock) = self.own_lock(session, id) else { return invalid() };
        let (Some(from), None) = (lock.granted, lock.wanted) else { return LockReply::Busy };
        let no_demotion = flags.has(Flags::CONVDEADLK | Flags::NOQUEUE);
        if flags.has(Flags::EXPEDITE) || no_demotion || nonsense(flags) {
            return invalid();
        }
        if flags.has(Flags::QUECVT) && !queues_conversion(from, mode) {
            return invalid();
        }
        if *value != ValueChange::Keep && !writes(from, mode) {
            return invalid();
        }
        let before = self.seen(&lock.resource);
        let mut told = Told::default();
        let mut chosen = self.choose(&lock, mode, flags, false);
        if chosen.is_none() {
            if flags.has(Flags::NOQUEUE) {
                return self.would_block(&lock, mode, flags);
            }
            let place = if flags.has(Flags::HEADQUE) { i64::MIN } else { i64::MAX };
            if self.never_ends(&lock, mode, flags, place) {
                if flags.has(Flags::CONVDEADLK) {
                    told.demoted = true;
                    self.demote(id);
                    while let Some((next, mode, alternate)) =
                        self.next(&lock.resource).filter(|(next, ..)| self.lock(*next).granted.is_some())
                    {
                        self.grant_queued(next, mode, alternate);
                    }
                    let now = self.lock(id).clone();
                    chosen = self.may(&now, mode, flags, false).then_some((mode, false));
                } else if flags.has(Flags::NODLCKWT) {
                    told.deadlock = true;
                } else {
                    return LockReply::Deadlock;
                }
            }
        }
        let reply = if let Some((mode, alternate)) = chosen {
            self.change_value(id, value.clone());
            self.grant(id, mode, Told { alternate, ..told })
        } else {
            self.wait(id, mode, flags);
            let circle = self.closes_circle(session, id, flags);
            if circle && !flags.has(Flags::NODLCKWT) {
                self.stop_waiting(id);
                if told.demoted {
                    self.events.push((session, LockEvent::Demoted { lock: id }));
                }
                LockReply::Deadlock
            } else {
                LockReply::Queued { lock: id, told: Told { deadlock: told.deadlock || circle, ..told } }
            }
        };
        self.settle(&lock.resource, &before);
        self.tell_circles_if(&reply, session);
        reply
    }

    pub(super) fn cancel(&mut self, session: SessionId, id: LockId) -> LockReply {
        let Some(lock) = self.own_lock(session, id) else { return invalid() };
        if lock.wanted.is_none() {
            let value = self.values.get(&lock.resource).cloned().unwrap_or_default();
            return LockReply::Granted { lock: lock.view(), value: Some(value), told: Told::default() };
        }
        let before = self.seen(&lock.resource);
        if lock.granted.is_none() {
            self.locks.retain(|l| l.id != id);
        } else {
            self.stop_waiting(id);
        }
        self.events.push((session, LockEvent::Cancelled { lock: id }));
        self.settle(&lock.resource, &before);
        LockReply::Done
    }

    pub(super) fn adopt(&mut self, session: SessionId, id: LockId, owner: Owner) -> LockReply {
        let Some(lock) = self.locks.iter().find(|l| l.id == id && l.owner == Some(owner)).cloned() else {
            return invalid();
        };
        if lock.granted.is_none() {
            return invalid();
        }
        let before = self.seen(&lock.resource);
        self.stop_waiting(id);
        if is_writer(lock.granted) {
            self.term = Term(self.term.0 + 1);
            self.lock_mut(id).term = self.term;
        }
        let now = self.lock_mut(id);
        (now.session, now.told) = (Some(session), None);
        let now = now.clone();
        if let Some(earlier) = lock.session {
            if lock.wanted.is_some() {
                self.events.push((earlier, LockEvent::Cancelled { lock: id }));
            }
            if earlier != session {
                let how = Loss::Adopted(now.term);
                self.events.push((earlier, LockEvent::Lost { lock: lock.view(), how }));
            }
        }
        let value = Some(self.values.get(&lock.resource).cloned().unwrap_or_default());
        self.settle(&lock.resource, &before);
        let reply = LockReply::Granted { lock: now.view(), value, told: Told::default() };
        self.tell_circles_if(&reply, session);
        reply
    }

    pub(super) fn break_lock(&mut self, id: LockId) -> LockReply {
        let Some(lock) = self.locks.iter().find(|l| l.id == id && l.granted.is_some()).cloned() else {
            return invalid();
        };
        let before = self.seen(&lock.resource);
        self.remove(id, ValueChange::Invalidate);
        self.term = Term(self.term.0 + 1);
        let fenced = Fenced { lock: lock.view(), holder: lock.holder(), by: self.term };
        if let Some(session) = lock.session {
            let how = Loss::Broken(fenced.clone());
            self.events.push((session, LockEvent::Lost { lock: lock.view(), how }));
        }
        self.settle(&lock.resource, &before);
        LockReply::Broken(fenced)
    }
}

/// Flags that do not go together, on any request.
fn nonsense(flags: Flags) -> bool {
    flags.has(Flags::FORCEUNLOCK)
        || flags.has(Flags::NOQUEUEBAST) && !flags.has(Flags::NOQUEUE)
        || flags.has(Flags::ALTPR | Flags::ALTCW)
        || flags.has(Flags::NOQUEUE) && flags.has_any(Flags::HEADQUE | Flags::NODLCKWT)
}
