//! How the first replicas of a group find that there is none yet, and which of them founds it. Pure.
//!
//! All founders are told the same addresses, their own among them. One of them founds, that of the least address, and only once
//! every other one said that it belongs to no group. So a founder whose disk was lost founds nothing while any other
//! replica remembers the group; it waits to be added again. The others found nothing ever: they learn of the group from
//! its leader.
//!
//! Whoever empties the disks of all founders of a group at once has no group any more, and a new one is founded.

// An address is a value; nothing is opened here.
use ::core::net::SocketAddr;
use std::collections::BTreeMap;

use super::{ClusterId, Member, Members, ReplicaId};

/// What a replica says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heard {
    /// Its disk.
    pub id: ReplicaId,
    /// Its group.
    pub cluster: Option<ClusterId>,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Forming {
    itself: (SocketAddr, ReplicaId),
    /// Every other founder, and what it said while it was reached.
    others: BTreeMap<SocketAddr, Option<Heard>>,
}

impl Forming {
    /// A replica without a group, at one of the addresses `founders`.
    #[must_use]
    pub fn new(address: SocketAddr, id: ReplicaId, founders: &[SocketAddr]) -> Self {
        let others = founders.iter().filter(|other| **other != address).map(|other| (*other, None));
        Self { itself: (address, id), others: others.collect() }
    }

    /// A replica said who it is.
    pub fn on_heard(&mut self, address: SocketAddr, heard: Heard) {
        if let Some(other) = self.others.get_mut(&address) {
            *other = Some(heard);
        }
    }

    /// It is not reached any more; what it said may be true no longer.
    pub fn on_lost(&mut self, address: SocketAddr) {
        if let Some(other) = self.others.get_mut(&address) {
            *other = None;
        }
    }

    /// The group to found now, if this replica is to found one.
    #[must_use]
    pub fn group(&self) -> Option<Members> {
        let (address, id) = self.itself;
        if self.others.keys().any(|other| *other < address) {
            return None;
        }
        let member = |address: SocketAddr| Member { address: address.to_string(), voter: true };
        let mut members = Members::from([(id, member(address))]);
        for (address, heard) in &self.others {
            let heard = heard.filter(|heard| heard.cluster.is_none())?;
            members.insert(heard.id, member(*address));
        }
        // One process that answers at two addresses, or a copied disk, is no replica of its own.
        (members.len() == self.others.len() + 1).then_some(members)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(n: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], n))
    }

    fn forming(n: u16) -> Forming {
        Forming::new(address(n), ReplicaId(u64::from(n)), &[address(3), address(1), address(2)])
    }

    fn new_disk(id: u64) -> Heard {
        Heard { id: ReplicaId(id), cluster: None }
    }

    #[test]
    fn only_the_least_founds_and_only_when_all_said_that_there_is_no_group() {
        let mut forming = forming(1);
        assert_eq!(forming.group(), None);
        forming.on_heard(address(2), new_disk(2));
        assert_eq!(forming.group(), None);
        forming.on_heard(address(3), new_disk(3));
        let members = forming.group().expect("all are there");
        assert!(members.len() == 3 && members.values().all(|member| member.voter));
        forming.on_lost(address(2));
        assert_eq!(forming.group(), None);
        for n in [2, 3] {
            let mut other = super::tests::forming(n);
            (1..=3).for_each(|n| other.on_heard(address(n), new_disk(u64::from(n))));
            assert_eq!(other.group(), None);
        }
    }

    #[test]
    fn a_founder_that_lost_its_disk_founds_nothing_while_anybody_remembers() {
        let mut forming = forming(1);
        forming.on_heard(address(2), new_disk(2));
        forming.on_heard(address(3), Heard { id: ReplicaId(3), cluster: Some(ClusterId([1; 16])) });
        assert_eq!(forming.group(), None);
    }

    #[test]
    fn two_addresses_of_one_disk_are_no_two_replicas() {
        let mut forming = forming(1);
        forming.on_heard(address(2), new_disk(2));
        forming.on_heard(address(3), new_disk(2));
        assert_eq!(forming.group(), None);
    }

    #[test]
    fn a_founder_alone_founds_at_once() {
        let alone = Forming::new(address(1), ReplicaId(1), &[address(1)]);
        assert_eq!(alone.group().map(|members| members.len()), Some(1));
    }
}
