//! One resource and its three queues: who holds it, who converts, who waits; and the rules of who is next.
//!
//! The rules are those of Linux's `_can_be_granted`, in its order; docs/lockd.md has them as a list.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use csnap_proto::message::lock::{Flags, Holder, LockRow, Mode, Owner, Told, ValueBlock};
use csnap_proto::{LockId, SessionId, Term};
use serde::{Deserialize, Serialize};

use crate::core::canary::{Broken, Canary};
use crate::core::flags::alternative;
use crate::core::mode::{MODES, compatible, is_writer};

/// One lock, granted or waiting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lock {
    /// Absent of an orphan.
    pub(super) session: Option<SessionId>,
    /// Of a persistent lock.
    pub(super) owner: Option<Owner>,
    pub(super) resource: String,
    /// Mode that it holds; absent while a new request waits.
    pub(super) granted: Option<Mode>,
    /// Mode that it waits for.
    pub(super) wanted: Option<Mode>,
    /// Of the request that waits.
    pub(super) flags: Flags,
    /// Of the grant into PW or EX; 0 in other modes.
    pub(super) term: Term,
    /// Highest mode that its owner was told to be in the way of.
    pub(super) told: Option<Mode>,
    /// Its owner was told that it waits in a circle.
    pub(super) told_circle: bool,
}

pub(super) type Locks = BTreeMap<LockId, Lock>;

impl Lock {
    pub(super) fn holder(&self) -> Holder {
        Holder { session: self.session, owner: self.owner.map(|owner| owner.id) }
    }

    pub(super) fn row(&self, lock: LockId) -> LockRow {
        let (mode, wanted, flags, term) = (self.granted, self.wanted, self.flags, self.term);
        LockRow { lock, holder: self.holder(), mode, wanted, flags, term }
    }

    pub(super) fn is_writer(&self) -> bool {
        self.granted.is_some_and(is_writer)
    }
}

/// See the module. Invariants: locks in `granted` have a granted mode and any two are compatible; those in
/// `converting` are among them and want a mode too; those in `waiting` only want one.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Resource {
    pub(super) granted: BTreeSet<LockId>,
    pub(super) converting: VecDeque<LockId>,
    pub(super) waiting: VecDeque<LockId>,
    pub(super) value: ValueBlock,
}

/// A request, as the rules of granting see it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    /// The lock, unless it is not made yet.
    pub(super) id: Option<LockId>,
    pub(super) wanted: Mode,
    pub(super) flags: Flags,
    /// It has a granted mode.
    pub(super) converts: bool,
    /// It waits in its queue; else it comes just now.
    pub(super) queued: bool,
    pub(super) broken: Broken,
}

impl Resource {
    /// The lock that holds PW or EX; there is at most one.
    pub(super) fn writer(&self, locks: &Locks) -> Option<(LockId, Term)> {
        let writer = self.granted.iter().find(|id| locks[id].is_writer());
        writer.map(|id| (*id, locks[id].term))
    }

    /// Nothing here is worth keeping.
    pub(super) fn is_unused(&self) -> bool {
        self.granted.is_empty() && self.waiting.is_empty() && self.value.bytes.is_empty()
    }

    pub(super) fn lock_count(&self) -> usize {
        self.granted.len() + self.waiting.len()
    }

    /// A granted lock, other than `id` itself, is in the way of `mode`. Those that convert are granted in their old mode.
    pub(super) fn is_blocked(&self, id: Option<LockId>, mode: Mode, locks: &Locks) -> bool {
        self.in_the_way(id, mode, locks).next().is_some()
    }

    /// The granted locks, other than `id` itself, that do not go with `mode`.
    pub(super) fn in_the_way(
        &self,
        id: Option<LockId>,
        mode: Mode,
        locks: &Locks,
    ) -> impl Iterator<Item = LockId> {
        let others = self.granted.iter().copied().filter(move |other| Some(*other) != id);
        others.filter(move |other| locks[other].granted.is_some_and(|granted| !compatible(granted, mode)))
    }

    /// The mode in which the request can be granted now, and what is to be said of it.
    pub(super) fn grantable(&self, asked: &Asked, locks: &Locks) -> Option<(Mode, Told)> {
        if self.may_have(asked, asked.wanted, locks) {
            return Some((asked.wanted, Told::default()));
        }
        let alternative = alternative(asked.wanted, asked.flags)?;
        let told = Told { alternate: true, ..Told::default() };
        self.may_have(asked, alternative, locks).then_some((alternative, told))
    }

    fn may_have(&self, asked: &Asked, mode: Mode, locks: &Locks) -> bool {
        if asked.flags.has(Flags::EXPEDITE) {
            return true;
        }
        if self.is_blocked(asked.id, mode, locks) {
            return false;
        }
        match (asked.converts, asked.queued) {
            (true, false) => !asked.flags.has(Flags::QUECVT) || self.converting.is_empty(),
            _ if asked.flags.has(Flags::NOORDER) => true,
            (true, true) => self.converting.front().copied() == asked.id,
            (false, true) => self.converting.is_empty() && self.waiting.front().copied() == asked.id,
            (false, false) => {
                let passes = asked.broken.breaks(Canary::PassTheConvertQueue);
                (self.converting.is_empty() || passes) && self.waiting.is_empty()
            }
        }
    }

    /// The next request in the queues that can be granted, the way the rules go through them.
    pub(super) fn next_grantable(&self, locks: &Locks, broken: Broken) -> Option<(LockId, Mode, Told)> {
        let queue = |queue: &VecDeque<LockId>, converts| {
            queue.iter().enumerate().find_map(|(at, id)| {
                let lock = &locks[id];
                // Behind the first only those that mind no order have a chance.
                if at > 0 && !lock.flags.has(Flags::NOORDER) {
                    return None;
                }
                let wanted = lock.wanted.expect("queued locks want a mode");
                let asked =
                    Asked { id: Some(*id), wanted, flags: lock.flags, converts, queued: true, broken };
                self.grantable(&asked, locks).map(|(mode, told)| (*id, mode, told))
            })
        };
        queue(&self.converting, true).or_else(|| queue(&self.waiting, false))
    }

    /// For each granted lock, the highest mode that it keeps others from.
    pub(super) fn blocking(&self, locks: &Locks) -> Vec<(LockId, Option<Mode>)> {
        let mut wanted_by = [0usize; MODES.len()];
        for id in self.converting.iter().chain(&self.waiting) {
            wanted_by[locks[id].wanted.expect("queued locks want a mode") as usize] += 1;
        }
        let highest = |id: &LockId| {
            let lock = &locks[id];
            let held = lock.granted.expect("locks in this set are granted");
            MODES.into_iter().rev().find(|mode| {
                let own = usize::from(lock.wanted == Some(*mode));
                wanted_by[*mode as usize] > own && !compatible(held, *mode)
            })
        };
        self.granted.iter().map(|id| (*id, highest(id))).collect()
    }

    /// Puts a request into its queue.
    pub(super) fn enqueue(&mut self, id: LockId, converts: bool, flags: Flags) {
        let queue = if converts { &mut self.converting } else { &mut self.waiting };
        if flags.has(Flags::HEADQUE) { queue.push_front(id) } else { queue.push_back(id) }
    }

    /// Takes the lock out of every queue.
    pub(super) fn remove(&mut self, id: LockId) {
        self.granted.remove(&id);
        self.unqueue(id);
    }

    /// Takes the lock out of the queues of those that wait.
    pub(super) fn unqueue(&mut self, id: LockId) {
        self.converting.retain(|other| *other != id);
        self.waiting.retain(|other| *other != id);
    }

    /// Whether queues and locks agree; a table that was read back is checked with it.
    pub(super) fn check(&self, name: &str, locks: &Locks) -> Result<(), &'static str> {
        let state = |id: &LockId| {
            let lock = locks.get(id).filter(|lock| lock.resource == name);
            lock.map(|lock| (lock.granted.is_some(), lock.wanted.is_some()))
        };
        if !self.granted.iter().all(|id| matches!(state(id), Some((true, _))))
            || !self.converting.iter().all(|id| state(id) == Some((true, true)))
            || !self.waiting.iter().all(|id| state(id) == Some((false, true)))
        {
            return Err("a lock in a queue where it does not belong");
        }
        // By mode, not by pair: there may be thousands of readers.
        let mut held: BTreeMap<Mode, usize> = BTreeMap::new();
        for mode in self.granted.iter().filter_map(|id| locks[id].granted) {
            *held.entry(mode).or_default() += 1;
        }
        for (mode, count) in &held {
            let others = held.keys().filter(|other| *other != mode || *count > 1);
            if others.into_iter().any(|other| !compatible(*mode, *other)) {
                return Err("two locks that do not go together");
            }
        }
        Ok(())
    }
}
