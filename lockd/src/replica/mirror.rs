//! The log in memory, as the library reads it: everything handed to the disk, whether it is durable yet or not.

use raft::eraftpb::{Entry, HardState, Snapshot};
use raft::{Error, GetEntriesContext, RaftState, Storage, StorageError};

use super::disk::{Base, Hard, Saved};
use super::message::{Image, LogEntry, conf_state};
use super::{ClusterId, Members, TRAILING_ENTRIES};

/// See the module. Entries are `compacted + 1 ..`, without gaps; the image is of an entry not before `compacted`.
pub(super) struct Mirror {
    pub(super) cluster: Option<ClusterId>,
    pub(super) hard: HardState,
    compacted: (u64, u64),
    entries: Vec<Entry>,
    image: Image,
}

impl Mirror {
    pub(super) fn new(saved: Saved) -> Self {
        let Base { cluster, hard: Hard { term, vote, commit }, compacted, entries, image } = saved.base;
        let hard = HardState { term, vote, commit, ..HardState::default() };
        Self { cluster, hard, compacted, entries: entries.iter().map(LogEntry::to_raft).collect(), image }
    }

    pub(super) fn last_index(&self) -> u64 {
        self.compacted.0 + self.entries.len() as u64
    }

    /// Takes in what is about to be written. What it replaces is gone.
    pub(super) fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        assert!(
            (self.compacted.0 + 1..=self.last_index() + 1).contains(&first.index),
            "no gap, nothing compacted"
        );
        self.entries.truncate(self.position(first.index));
        self.entries.extend_from_slice(entries);
    }

    /// Replaces everything by another replica's state.
    pub(super) fn install(&mut self, image: Image) {
        self.compacted = (image.index, image.term);
        self.entries.clear();
        self.image = image;
    }

    /// Has a new image, of an entry that is there, and forgets entries long before it; where there is nobody who could
    /// lack them, all before it.
    pub(super) fn compact(&mut self, index: u64, members: Members, state: Vec<u8>) {
        let term = self.term(index).expect("what was applied is kept");
        let trailing = if members.len() > 1 { TRAILING_ENTRIES } else { 0 };
        self.image = Image { index, term, members, state };
        let keep_from = index.saturating_sub(trailing).max(self.compacted.0);
        let term = self.term(keep_from).expect("not before what is kept");
        self.entries.drain(..self.position(keep_from + 1));
        self.compacted = (keep_from, term);
    }

    /// Everything, for the disk.
    pub(super) fn base(&self) -> Base {
        let HardState { term, vote, commit, .. } = self.hard;
        let entries = self.entries.iter().map(LogEntry::from_raft).collect();
        let (cluster, compacted, image) = (self.cluster, self.compacted, self.image.clone());
        Base { cluster, hard: Hard { term, vote, commit }, compacted, entries, image }
    }

    /// Where the entry stands among those kept.
    fn position(&self, index: u64) -> usize {
        usize::try_from(index - self.compacted.0 - 1).expect("what is kept fits memory")
    }
}

impl Storage for Mirror {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard.clone(), conf_state(&self.image.members)))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.compacted.0 {
            return Err(Error::Store(StorageError::Compacted));
        }
        if high > self.last_index() + 1 {
            return Err(Error::Store(StorageError::Unavailable));
        }
        let mut entries = self.entries[self.position(low)..self.position(high)].to_vec();
        raft::util::limit_size(&mut entries, max_size.into());
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.compacted.0 {
            return Ok(self.compacted.1);
        }
        if index < self.compacted.0 {
            return Err(Error::Store(StorageError::Compacted));
        }
        let entry = self.entries.get(self.position(index));
        entry.map(|entry| entry.term).ok_or(Error::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.compacted.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last_index())
    }

    fn snapshot(&self, request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        if self.image.index < request_index {
            return Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable));
        }
        Ok(self.image.to_raft())
    }
}
