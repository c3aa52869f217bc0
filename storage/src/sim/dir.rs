//! One directory of the simulated disk: the names that nodes see, and the changes that a power loss may undo.

use std::collections::{BTreeMap, BTreeSet};

use super::rng::Digest;

/// Number of a file or directory; never reused.
pub(super) type Inode = u64;

/// A change of names that survives a power loss whole or not at all: one create, link or unlink, or a rename within
/// the directory.
#[derive(Clone, Debug)]
pub(super) struct NameChange {
    pub(super) seq: u64,
    /// Name and what it stands for now.
    sets: Vec<(String, Option<Inode>)>,
    /// A sync of it failed; no later sync makes it durable.
    poisoned: bool,
}

/// Names of a directory.
#[derive(Clone, Debug, Default)]
pub(super) struct DirData {
    names: BTreeMap<String, Inode>,
    durable: BTreeMap<String, Inode>,
    /// Changes since, oldest first.
    unsynced: Vec<NameChange>,
}

impl DirData {
    /// What a name stands for.
    pub(super) fn get(&self, name: &str) -> Option<Inode> {
        self.names.get(name).copied()
    }

    /// Names as nodes see them, sorted.
    pub(super) fn names(&self) -> &BTreeMap<String, Inode> {
        &self.names
    }

    /// Changes names as one step.
    pub(super) fn change(&mut self, seq: u64, sets: Vec<(String, Option<Inode>)>) {
        apply(&mut self.names, &sets);
        self.unsynced.push(NameChange { seq, sets, poisoned: false });
    }

    /// Makes the changes up to `upto` durable.
    pub(super) fn sync(&mut self, upto: u64) {
        let (durable, mut kept): (Vec<_>, Vec<_>) =
            self.unsynced.drain(..).partition(|c| c.seq <= upto && !c.poisoned);
        for change in durable {
            apply(&mut self.durable, &change.sets);
            // A poisoned change of the same name is older than what is durable now: it cannot come back.
            let newer: BTreeSet<&str> = change.sets.iter().map(|(name, _)| name.as_str()).collect();
            for old in kept.iter_mut().filter(|old| old.seq < change.seq) {
                old.sets.retain(|(name, _)| !newer.contains(name.as_str()));
            }
        }
        kept.retain(|change| !change.sets.is_empty());
        self.unsynced = kept;
    }

    /// A sync that failed: nodes go on seeing the names, and no later sync saves them.
    pub(super) fn sync_failed(&mut self, upto: u64) {
        self.unsynced.iter_mut().filter(|c| c.seq <= upto).for_each(|c| c.poisoned = true);
    }

    /// Changes that a power loss may undo.
    pub(super) fn unsynced(&self) -> &[NameChange] {
        &self.unsynced
    }

    /// Power loss: only the changes that `survives` names by index happened.
    pub(super) fn settle(&mut self, survives: impl Fn(usize) -> bool) {
        for (index, change) in self.unsynced.drain(..).enumerate() {
            if survives(index) {
                apply(&mut self.durable, &change.sets);
            }
        }
        self.names = self.durable.clone();
    }

    /// Everything that a name here stands for, may stand for after a power loss, or stood for when last synced.
    pub(super) fn mentioned(&self) -> impl Iterator<Item = Inode> {
        let pending = self.unsynced.iter().flat_map(|c| c.sets.iter().filter_map(|(_, inode)| *inode));
        self.names.values().chain(self.durable.values()).copied().chain(pending)
    }

    pub(super) fn digest(&self, digest: &mut Digest) {
        for names in [&self.names, &self.durable] {
            digest.number(names.len() as u64);
            for (name, inode) in names {
                digest.bytes(name.as_bytes());
                digest.number(*inode);
            }
        }
        digest.number(self.unsynced.len() as u64);
    }
}

fn apply(names: &mut BTreeMap<String, Inode>, sets: &[(String, Option<Inode>)]) {
    for (name, inode) in sets {
        match inode {
            Some(inode) => names.insert(name.clone(), *inode),
            None => names.remove(name),
        };
    }
}
