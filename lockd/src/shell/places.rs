//! Places of connections from replicas. Pure.
//!
//! A member has [`PER_MEMBER_MAX`] of its own, which nobody else can take. Replicas that are no members (founders of a group
//! that is not there yet, one that is about to be added, one that was removed) share [`OTHERS_MAX`]. When there are too many
//! of either, the oldest of the same kind goes: it is the one that is most likely dead.

use std::collections::{BTreeMap, BTreeSet};

use crate::replica::{MEMBERS_MAX, ReplicaId};

/// Of one member: the connection that it has, and the one before, which may not know yet that it is dead.
const PER_MEMBER_MAX: usize = 2;

/// Of all others: every founder of the largest group.
const OTHERS_MAX: usize = MEMBERS_MAX;

/// A place, in the order in which they were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Seat(u64);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Places {
    members: BTreeSet<ReplicaId>,
    last: u64,
    taken: BTreeMap<Seat, ReplicaId>,
}

impl Places {
    /// The group is these.
    pub(super) fn set_members(&mut self, members: impl Iterator<Item = ReplicaId>) {
        self.members = members.collect();
    }

    /// One that proved to be a replica takes a place. Gives the one that has to go for it.
    pub(super) fn take(&mut self, id: ReplicaId) -> (Seat, Option<Seat>) {
        let member = self.members.contains(&id);
        let same_kind = |other: &ReplicaId| match member {
            true => *other == id,
            false => !self.members.contains(other),
        };
        let max = if member { PER_MEMBER_MAX } else { OTHERS_MAX };
        let mut same = self.taken.iter().filter(|(_, other)| same_kind(other)).map(|(seat, _)| *seat);
        let oldest = same.next();
        let victim = oldest.filter(|_| 1 + same.count() >= max);
        if let Some(victim) = victim {
            self.taken.remove(&victim);
        }
        self.last += 1;
        let seat = Seat(self.last);
        self.taken.insert(seat, id);
        (seat, victim)
    }

    /// It is gone.
    pub(super) fn leave(&mut self, seat: Seat) {
        self.taken.remove(&seat);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_take_no_member_s_place() {
        let mut places = Places::default();
        places.set_members([1, 2, 3].map(ReplicaId).into_iter());
        let members: Vec<Seat> = (1..=3).map(|id| places.take(ReplicaId(id)).0).collect();
        let mut pushed = Vec::new();
        for id in 100..1100 {
            pushed.extend(places.take(ReplicaId(id)).1);
        }
        assert!(pushed.iter().all(|seat| !members.contains(seat)));
        assert_eq!(pushed.len(), 1000 - OTHERS_MAX);
        assert_eq!(places.taken.len(), 3 + OTHERS_MAX);
    }

    #[test]
    fn a_member_that_comes_back_pushes_out_its_own_past() {
        let mut places = Places::default();
        places.set_members([1, 2].map(ReplicaId).into_iter());
        let (other, _) = places.take(ReplicaId(2));
        let (first, none) = places.take(ReplicaId(1));
        assert_eq!(none, None);
        assert_eq!(places.take(ReplicaId(1)).1, None);
        let (third, victim) = places.take(ReplicaId(1));
        assert_eq!(victim, Some(first));
        places.leave(third);
        assert_eq!(places.take(ReplicaId(1)).1, None, "there is room again");
        assert!(places.taken.contains_key(&other));
    }

    #[test]
    fn founders_find_room_before_there_is_a_group() {
        let mut places = Places::default();
        let founders = (0..MEMBERS_MAX as u64).map(ReplicaId);
        assert!(founders.map(|id| places.take(id).1).all(|victim| victim.is_none()));
    }
}
