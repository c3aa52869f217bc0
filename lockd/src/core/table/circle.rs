//! Circles of waits: conversions of one resource that can never end, and sessions that wait for each other over any
//! number of resources. All state is in one place, so both are a walk over it.
//!
//! A session waits for another if a request of its waits for a lock of the other: one whose granted mode is in the way,
//! or one that is before it in the queue. It does not wait for itself: it is not a thread, and can let go while it waits.
//! Neither does a request with NODLCKWT count, nor an orphan, whom nobody can expect to do anything.

use std::collections::{BTreeSet, VecDeque};

use csnap_proto::message::lock::{Flags, LockEvent, Mode};
use csnap_proto::{LockId, SessionId};

use super::resource::{Locks, Resource};
use super::{Effect, Table};
use crate::core::canary::Canary;
use crate::core::flags::alternative;
use crate::core::mode::compatible;

/// Waiting requests that one search looks at. A table with more of them in one tangle may not see a circle in it: nobody
/// is refused then, and who waits too long has to give up by itself.
pub const CIRCLE_REQUESTS_MAX: usize = 4096;

impl Resource {
    /// Whether queueing a conversion of `id` to `wanted` would never end: another one waits for the mode that `id` keeps
    /// meanwhile, and `id` for the other, because that one is before it or keeps a mode in its way.
    pub(super) fn is_conversion_deadlock(
        &self,
        id: LockId,
        wanted: Mode,
        flags: Flags,
        locks: &Locks,
    ) -> bool {
        let held = locks[&id].granted.expect("only granted locks are converted");
        let place = self.converting.iter().position(|other| *other == id);
        let place = place.unwrap_or(if flags.has(Flags::HEADQUE) { 0 } else { self.converting.len() });
        let others = self.converting.iter().enumerate().filter(|(_, other)| **other != id);
        others.into_iter().any(|(at, other)| {
            let other = &locks[other];
            let waits_behind = at < place && !flags.has(Flags::NOORDER);
            let waits_for = waits_behind || other.granted.is_some_and(|granted| !compatible(granted, wanted));
            waits_for && other.wanted.is_some_and(|theirs| !compatible(held, theirs))
        })
    }

    /// The locks that the queued request `id` waits for.
    fn waits_for(&self, id: LockId, locks: &Locks) -> Vec<LockId> {
        let lock = &locks[&id];
        let wanted = lock.wanted.expect("queued locks want a mode");
        let other_way = alternative(wanted, lock.flags);
        let closed = |other: &LockId| {
            let granted = locks[other].granted.expect("in the way is what is granted");
            other_way.is_none_or(|mode| !compatible(granted, mode))
        };
        let mut before: Vec<LockId> = self.in_the_way(Some(id), wanted, locks).filter(closed).collect();
        if !lock.flags.has(Flags::NOORDER) {
            let ahead = |queue: &VecDeque<LockId>| -> Vec<LockId> {
                queue.iter().copied().take_while(|other| *other != id).collect()
            };
            before.extend(ahead(&self.converting));
            if lock.granted.is_none() {
                before.extend(ahead(&self.waiting));
            }
        }
        before
    }
}

impl Table {
    /// Whether the session waits for itself through others, beginning with these requests of its.
    pub(super) fn is_in_circle(&self, session: SessionId, from: impl IntoIterator<Item = LockId>) -> bool {
        if self.broken.breaks(Canary::IgnoreCircles) {
            return false;
        }
        let mut requests: Vec<LockId> = from.into_iter().collect();
        let (mut seen, mut looked_at) = (BTreeSet::new(), 0);
        while let Some(request) = requests.pop() {
            looked_at += 1;
            if looked_at > CIRCLE_REQUESTS_MAX {
                return false;
            }
            let asker = self.locks[&request].session;
            for before in self.resources[&self.locks[&request].resource].waits_for(request, &self.locks) {
                let Some(other) = self.locks[&before].session.filter(|other| Some(*other) != asker) else {
                    continue;
                };
                if other == session {
                    return true;
                }
                if seen.insert(other) {
                    requests.extend(self.counted_waits(other));
                }
            }
        }
        false
    }

    /// The waiting requests of a session that count in a circle.
    pub(super) fn counted_waits(&self, session: SessionId) -> impl Iterator<Item = LockId> {
        let waits = self.sessions[&session].waits.iter().copied();
        waits.filter(|lock| !self.locks[lock].flags.has(Flags::NODLCKWT))
    }

    /// After a grant to a session: tells its waiting requests if the grant closed a circle through them, once each. A
    /// grant that follows from the rules is not refused for it.
    pub(super) fn tell_circles(&mut self, session: SessionId, effects: &mut Vec<Effect>) {
        if !self.sessions.contains_key(&session) {
            return;
        }
        let told = |lock: &LockId| self.locks[lock].told_circle;
        let waits: Vec<LockId> = self.counted_waits(session).filter(|lock| !told(lock)).collect();
        for lock in waits {
            if self.is_in_circle(session, [lock]) {
                self.locks.get_mut(&lock).expect("it waits").told_circle = true;
                self.event(session, LockEvent::Deadlock { lock }, effects);
            }
        }
    }
}
