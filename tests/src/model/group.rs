//! The lockds as the world knows them: which disk each has, and who led which term.

use std::collections::{BTreeMap, BTreeSet};

use csnap_lockd::replica::ReplicaId;

/// See the module.
#[derive(Debug, Default)]
pub struct Group {
    /// Every disk that ever was, and where.
    pub seat_of: BTreeMap<ReplicaId, usize>,
    /// The disk that each seat has now, once it was opened.
    pub disks: BTreeMap<usize, ReplicaId>,
    /// The longest that a client stood in a queue for a lock, microseconds.
    pub longest_turn: u64,
    /// Disks that are gone for good.
    pub lost: BTreeSet<ReplicaId>,
    /// Seats whose disk was made to fail or to be full: a lockd there may end by itself.
    pub failing: BTreeSet<usize>,
    leaders: BTreeMap<u64, ReplicaId>,
}

impl Group {
    /// A lockd opened its disk. Whether it had another one before, which was lost.
    pub fn opened(&mut self, seat: usize, id: ReplicaId) -> bool {
        let new = self.seat_of.insert(id, seat).is_none();
        self.disks.insert(seat, id);
        new && self.lost.iter().any(|lost| self.seat_of.get(lost) == Some(&seat))
    }

    /// A lockd leads. Whether it is another one than in the term before.
    ///
    /// # Errors
    /// If another one leads the same term.
    pub fn leads(&mut self, term: u64, id: ReplicaId) -> Result<bool, String> {
        let known = *self.leaders.entry(term).or_insert(id);
        if known != id {
            return Err(format!("{known:?} and {id:?} lead term {term}"));
        }
        let before = self.leaders.range(..term).next_back();
        Ok(before.is_some_and(|(_, before)| *before != id))
    }
}
