//! One resource and its three queues: who holds it, who converts, who waits; and the rules of who is next.
//!
//! The rules are those of Linux's `_can_be_granted` without the flags that nobody here uses: a conversion is granted in
//! place unless a granted lock is in its way; one that must wait does so behind earlier ones; new requests wait behind
//! every conversion and every earlier request; NL never waits.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use csnap_proto::message::lock::{Mode, ValueBlock};
use csnap_proto::{LockId, SessionId, Term};
use serde::{Deserialize, Serialize};

use crate::core::mode::{MODES, compatible, is_writer};

/// One lock, granted or waiting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lock {
    pub(super) session: SessionId,
    pub(super) resource: String,
    /// Mode that it holds; absent while a new request waits.
    pub(super) granted: Option<Mode>,
    /// Mode that it waits for.
    pub(super) wanted: Option<Mode>,
    /// Of the grant into PW or EX; 0 in other modes.
    pub(super) term: Term,
    /// Highest mode that its owner was told to be in the way of.
    pub(super) told: Option<Mode>,
}

pub(super) type Locks = BTreeMap<LockId, Lock>;

/// See the module. Invariants: locks in `granted` have a granted mode and any two are compatible; those in
/// `converting` are among them and want a mode too; those in `waiting` only want one.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Resource {
    pub(super) granted: BTreeSet<LockId>,
    pub(super) converting: VecDeque<LockId>,
    pub(super) waiting: VecDeque<LockId>,
    pub(super) value: ValueBlock,
    pub(super) watchers: BTreeSet<SessionId>,
}

/// What watchers of a resource are told of when it differs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Standing {
    value_sequence: u64,
    writer: Option<(LockId, Term)>,
}

impl Resource {
    pub(super) fn standing(&self, locks: &Locks) -> Standing {
        Standing { value_sequence: self.value.sequence, writer: self.writer(locks) }
    }

    fn writer(&self, locks: &Locks) -> Option<(LockId, Term)> {
        let holds = |id: &LockId| locks[id].granted.is_some_and(is_writer);
        self.granted.iter().find(|id| holds(id)).map(|id| (*id, locks[id].term))
    }

    /// Nobody holds PW or EX.
    pub(super) fn is_vacant(&self, locks: &Locks) -> bool {
        self.writer(locks).is_none()
    }

    /// Nothing here is worth keeping. An empty value block says as much as none.
    pub(super) fn is_unused(&self) -> bool {
        self.granted.is_empty()
            && self.waiting.is_empty()
            && self.watchers.is_empty()
            && self.value.bytes.is_empty()
    }

    pub(super) fn lock_count(&self) -> usize {
        self.granted.len() + self.waiting.len()
    }

    /// A granted lock, other than `id` itself, is in the way of `mode`.
    pub(super) fn is_blocked(&self, id: Option<LockId>, mode: Mode, locks: &Locks) -> bool {
        let others = self.granted.iter().filter(|other| Some(**other) != id);
        others.filter_map(|other| locks[other].granted).any(|granted| !compatible(granted, mode))
    }

    /// A request for a new lock would be granted at once.
    pub(super) fn takes_new(&self, mode: Mode, locks: &Locks) -> bool {
        let queued = !self.converting.is_empty() || !self.waiting.is_empty();
        mode == Mode::Nl || (!queued && !self.is_blocked(None, mode, locks))
    }

    /// Queueing a conversion of `id` would never end: an earlier one waits for the mode that `id` would keep meanwhile.
    pub(super) fn is_deadlock(&self, id: LockId, locks: &Locks) -> bool {
        let held = locks[&id].granted.expect("only granted locks are converted");
        let mut earlier = self.converting.iter().filter_map(|other| locks[other].wanted);
        earlier.any(|wanted| !compatible(held, wanted))
    }

    /// The queued request that is next and no longer blocked. Only the first conversion is looked at, and the first
    /// waiting request only when none converts: that order keeps the later ones from starving the earlier.
    pub(super) fn next_grantable(&self, locks: &Locks) -> Option<LockId> {
        let first = *self.converting.front().or(self.waiting.front())?;
        let wanted = locks[&first].wanted.expect("queued locks want a mode");
        (!self.is_blocked(Some(first), wanted, locks)).then_some(first)
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
        let held: Vec<Mode> = self.granted.iter().filter_map(|id| locks[id].granted).collect();
        for (at, mode) in held.iter().enumerate() {
            if held[at + 1..].iter().any(|other| !compatible(*mode, *other)) {
                return Err("two locks that do not go together");
            }
        }
        Ok(())
    }
}
