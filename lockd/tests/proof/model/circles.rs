//! Who waits for whom: circles of waits over any resources.

use std::collections::BTreeSet;

use csnap_proto::message::lock::{Flags, LockEvent, LockReply};
use csnap_proto::{LockId, SessionId};

use super::super::tables::compatible;
use super::{L, Model, other_mode};

impl Model {
    /// The sessions that a waiting request waits for.
    pub(super) fn waits_for(&self, lock: &L) -> BTreeSet<SessionId> {
        let Some(wanted) = lock.wanted else { return BTreeSet::new() };
        let in_the_way = |o: &&L| {
            let modes = [Some(wanted), other_mode(wanted, lock.flags)];
            let closed = |granted| modes.iter().flatten().all(|mode| !compatible(granted, *mode));
            let before = match (lock.granted.is_some(), o.wanted.is_some(), o.granted.is_some()) {
                (_, false, _) => false,
                (true, true, converts) => converts && o.place < lock.place,
                (false, true, true) => true,
                (false, true, false) => o.place < lock.place,
            };
            o.granted.is_some_and(closed) || before && !lock.flags.has(Flags::NOORDER)
        };
        let others = self.others(&lock.resource, lock.id).filter(in_the_way);
        others.filter_map(|o| o.session).filter(|other| Some(*other) != lock.session).collect()
    }

    pub(super) fn counted(&self, session: SessionId) -> Vec<L> {
        let own = self.locks.iter().filter(|l| l.session == Some(session) && l.wanted.is_some());
        own.filter(|l| !l.flags.has(Flags::NODLCKWT)).cloned().collect()
    }

    pub(super) fn comes_back(&self, session: SessionId, from: &[L]) -> bool {
        let mut reached: BTreeSet<SessionId> = from.iter().flat_map(|l| self.waits_for(l)).collect();
        loop {
            if reached.contains(&session) {
                return true;
            }
            let further = reached.iter().flat_map(|other| self.counted(*other));
            let further: BTreeSet<SessionId> = further.flat_map(|l| self.waits_for(&l)).collect();
            if further.is_subset(&reached) {
                return false;
            }
            reached.extend(further);
        }
    }

    pub(super) fn closes_circle(&self, session: SessionId, id: LockId, flags: Flags) -> bool {
        let mut from = vec![self.lock(id).clone()];
        if flags.has(Flags::HEADQUE) {
            from.extend(self.counted(session));
        }
        self.comes_back(session, &from)
    }

    pub(super) fn tell_circles_if(&mut self, reply: &LockReply, session: SessionId) {
        if matches!(reply, LockReply::Granted { .. }) {
            self.tell_circles(session);
        }
    }

    pub(super) fn tell_circles(&mut self, session: SessionId) {
        for lock in self.counted(session) {
            if !lock.told_circle && self.comes_back(session, std::slice::from_ref(&lock)) {
                self.lock_mut(lock.id).told_circle = true;
                self.events.push((session, LockEvent::Deadlock { lock: lock.id }));
            }
        }
    }
}
