//! What a replica's disk says: a base, which begins a generation of the log, and items after it.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::message::{Image, LogEntry, check_entries};
use super::{ClusterId, Member, Members, ReplicaId, encode};
use crate::store::{Recovered, StoreError};

/// Version of base and items.
///
/// 1: the first.
const FORMAT: u32 = 1;

/// What a replica must not forget: what it promised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hard {
    /// Latest term that it took part in.
    pub term: u64,
    /// Whom it voted for there; 0 for nobody.
    pub vote: u64,
    /// Known to be committed; a lower bound.
    pub commit: u64,
}

/// Everything, as it begins a generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// The group that it belongs to, once it does.
    pub cluster: Option<ClusterId>,
    /// What it promised.
    pub hard: Hard,
    /// Index and term of the entry before the first one kept.
    pub compacted: (u64, u64),
    /// Kept, without gaps.
    pub entries: Vec<LogEntry>,
    /// The state machine as of an entry from `compacted` on.
    pub image: Image,
}

/// What is appended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Item {
    /// What it promised, from here on.
    Hard {
        /// As in [`Base`].
        cluster: Option<ClusterId>,
        /// The same.
        hard: Hard,
    },
    /// An entry. It replaces the one that has its index, and all after that.
    Entry(LogEntry),
}

impl Item {
    pub(super) fn encode(&self) -> Bytes {
        encode(self)
    }
}

/// What a disk gives back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// The replica that this disk is.
    pub id: ReplicaId,
    /// Everything of it.
    pub base: Base,
}

impl Saved {
    /// Whether it is a member of no group that it knows of: the disk is new, or its content was lost.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.base == Base::empty()
    }

    /// What the log of the replica `id` gave back.
    pub(super) fn replay(id: ReplicaId, recovered: &Recovered) -> Result<Self, StoreError> {
        let corrupt = |what| StoreError::Corrupt { file: "snapshot".into(), at: 0, what };
        let mut base = Base::decode(&recovered.content).map_err(corrupt)?;
        for (at, item) in &recovered.items {
            let corrupt = |what| StoreError::Corrupt { file: recovered.file.clone(), at: *at, what };
            let item = postcard::from_bytes(item).map_err(|_| corrupt("an item that does not decode"))?;
            base.take(item).map_err(corrupt)?;
        }
        // Of one batch the beginning may have been written without the rest: then nobody was told of it.
        base.hard.commit = base.hard.commit.clamp(base.image.index, base.last_index());
        Ok(Self { id, base })
    }
}

impl Base {
    /// Of a replica that belongs to no group yet.
    #[must_use]
    pub fn empty() -> Self {
        let image = Image { index: 0, term: 0, members: Members::new(), state: Vec::new() };
        Self { cluster: None, hard: Hard::default(), compacted: (0, 0), entries: Vec::new(), image }
    }

    /// Of the first replicas of a new group, all alike: `members`, whose state machine is `state`.
    #[must_use]
    pub fn founding(cluster: ClusterId, members: Members, state: Vec<u8>) -> Self {
        let image = Image { index: 1, term: 1, members, state };
        let hard = Hard { term: 1, vote: 0, commit: 1 };
        Self { cluster: Some(cluster), hard, compacted: (1, 1), entries: Vec::new(), image }
    }

    /// Of a group of one.
    #[must_use]
    pub fn alone(cluster: ClusterId, id: ReplicaId, address: String, state: Vec<u8>) -> Self {
        Self::founding(cluster, Members::from([(id, Member { address, voter: true })]), state)
    }

    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        encode(&(FORMAT, self))
    }

    /// Reads and checks one.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let (format, rest) = postcard::take_from_bytes::<u32>(bytes).map_err(|_| "it does not decode")?;
        if format != FORMAT {
            return Err("it is of another version of lockd, or was made before it had replicas");
        }
        let base: Self = postcard::from_bytes(rest).map_err(|_| "it does not decode")?;
        base.check()?;
        Ok(base)
    }

    fn check(&self) -> Result<(), &'static str> {
        let (index, term) = self.compacted;
        check_entries(&self.entries, index, term)?;
        self.image.check()?;
        let image = (self.image.index, self.image.term);
        if self.term(image.0) != Some(image.1) {
            return Err("its image is of no entry that it has");
        }
        let last_term = self.entries.last().map_or(term, |last| last.term);
        if self.hard.term < last_term {
            return Err("it has entries of a term that it did not take part in");
        }
        Ok(())
    }

    fn last_index(&self) -> u64 {
        self.compacted.0 + self.entries.len() as u64
    }

    fn term(&self, index: u64) -> Option<u64> {
        if index == self.compacted.0 {
            return Some(self.compacted.1);
        }
        let position = usize::try_from(index.checked_sub(self.compacted.0 + 1)?).ok()?;
        self.entries.get(position).map(|entry| entry.term)
    }

    fn take(&mut self, item: Item) -> Result<(), &'static str> {
        match item {
            Item::Hard { cluster, hard } => {
                if hard.term < self.hard.term {
                    return Err("a term that falls");
                }
                (self.cluster, self.hard) = (cluster, hard);
            }
            Item::Entry(entry) => {
                let before = entry.index.checked_sub(1).ok_or("an entry without a place")?;
                let term = self.term(before).ok_or("an entry after one that is missing")?;
                if before < self.image.index {
                    return Err("an entry in place of one that was applied");
                }
                check_entries(std::slice::from_ref(&entry), before, term)?;
                if entry.term > self.hard.term {
                    return Err("an entry of a term that it did not take part in");
                }
                let keep = usize::try_from(before - self.compacted.0).map_err(|_| "an entry too far")?;
                self.entries.truncate(keep);
                self.entries.push(entry);
            }
        }
        Ok(())
    }
}
