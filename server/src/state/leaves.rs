//! A sorted map kept in leaves that clones share: the storage of everything in the state that grows with the data.
//!
//! A clone costs one reference count a leaf; the first change of a leaf after it copies that leaf alone. So a checkpoint
//! works on a clone while serving goes on. The places where leaves begin and end depend on history: nothing outside
//! this file sees them, and encodings are made from entries, never from leaves.
//!
//! Invariants: leaves are not empty, entries ascend within and across leaves, and the key under which a leaf is filed
//! is at or before its first entry and after the last entry of the leaf before it.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Most entries in one leaf: what the first change after a clone copies, some 10 KiB of versions.
const LEAF_ENTRIES_MAX: usize = 256;

#[derive(Clone, Debug)]
pub(super) struct Leaves<K, V> {
    leaves: BTreeMap<K, Arc<Vec<(K, V)>>>,
}

impl<K, V> Default for Leaves<K, V> {
    fn default() -> Self {
        Self { leaves: BTreeMap::new() }
    }
}

impl<K: Ord + Copy, V: Copy> Leaves<K, V> {
    pub(super) fn get(&self, key: K) -> Option<V> {
        let (_, leaf) = self.leaves.range(..=key).next_back()?;
        leaf.binary_search_by_key(&key, |entry| entry.0).ok().map(|at| leaf[at].1)
    }

    /// The last entry before `key`.
    pub(super) fn last_before(&self, key: K) -> Option<(K, V)> {
        let (_, leaf) = self.leaves.range(..key).next_back()?;
        match leaf.partition_point(|entry| entry.0 < key) {
            // The leaf's filing key may lie before its first entry: then the answer is in the leaf before.
            0 => {
                let first = leaf[0].0;
                self.leaves.range(..first).rev().find_map(|(_, l)| l.last().filter(|e| e.0 < key)).copied()
            }
            at => Some(leaf[at - 1]),
        }
    }

    /// The last entry at or before `key`.
    pub(super) fn last_until(&self, key: K) -> Option<(K, V)> {
        self.get(key).map(|value| (key, value)).or_else(|| self.last_before(key))
    }

    /// Entries from `key` on, ascending.
    pub(super) fn from(&self, key: K) -> impl Iterator<Item = (K, V)> + '_ {
        let start = self.leaves.range(..=key).next_back().map_or(key, |(filed, _)| *filed);
        self.leaves.range(start..).flat_map(move |(_, leaf)| {
            let skip = if leaf[0].0 < key { leaf.partition_point(|entry| entry.0 < key) } else { 0 };
            leaf[skip..].iter().copied()
        })
    }

    /// All entries, ascending.
    pub(super) fn iter(&self) -> impl Iterator<Item = (K, V)> + '_ {
        self.leaves.values().flat_map(|leaf| leaf.iter().copied())
    }

    /// Sets the value of `key`; returns the one before.
    pub(super) fn insert(&mut self, key: K, value: V) -> Option<V> {
        let filed = match self.leaves.range(..=key).next_back() {
            Some((filed, _)) => *filed,
            None => match self.leaves.pop_first() {
                // Before everything: the first leaf is filed anew under the smaller key.
                Some((_, leaf)) => {
                    self.leaves.insert(key, leaf);
                    key
                }
                None => {
                    self.leaves.insert(key, Arc::new(vec![(key, value)]));
                    return None;
                }
            },
        };
        let leaf = Arc::make_mut(self.leaves.get_mut(&filed).expect("just looked up"));
        let at = match leaf.binary_search_by_key(&key, |entry| entry.0) {
            Ok(at) => return Some(std::mem::replace(&mut leaf[at].1, value)),
            Err(at) => at,
        };
        if leaf.len() < LEAF_ENTRIES_MAX {
            leaf.insert(at, (key, value));
        } else if at == leaf.len() {
            // Ascending insertion leaves full leaves behind.
            self.leaves.insert(key, Arc::new(vec![(key, value)]));
        } else {
            let mut upper = leaf.split_off(LEAF_ENTRIES_MAX / 2);
            match at.checked_sub(LEAF_ENTRIES_MAX / 2) {
                Some(at) if at > 0 => upper.insert(at, (key, value)),
                _ => leaf.insert(at, (key, value)),
            }
            self.leaves.insert(upper[0].0, Arc::new(upper));
        }
        None
    }

    /// Takes `key` out; returns its value.
    pub(super) fn remove(&mut self, key: K) -> Option<V> {
        let (filed, leaf) = self.leaves.range_mut(..=key).next_back()?;
        let filed = *filed;
        let at = leaf.binary_search_by_key(&key, |entry| entry.0).ok()?;
        let leaf = Arc::make_mut(leaf);
        let (_, value) = leaf.remove(at);
        let left = leaf.len();
        if left == 0 {
            self.leaves.remove(&filed);
        } else if left <= LEAF_ENTRIES_MAX / 4 {
            self.join_next(filed);
        }
        Some(value)
    }

    /// Joins the leaf filed under `filed` with the one after it when both are thin, so that deletes leave no crumbs.
    fn join_next(&mut self, filed: K) {
        let mut pair = self.leaves.range(filed..);
        let (Some((_, leaf)), Some((next, after))) = (pair.next(), pair.next()) else { return };
        if leaf.len() + after.len() > LEAF_ENTRIES_MAX / 2 {
            return;
        }
        let next = *next;
        let after = self.leaves.remove(&next).expect("just looked up");
        let leaf = self.leaves.get_mut(&filed).expect("just looked up");
        Arc::make_mut(leaf).extend_from_slice(&after);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn behaves_as_a_sorted_map(steps in prop::collection::vec((0u32..2000, any::<bool>()), 0..3000)) {
            let mut leaves = Leaves::default();
            let mut model = BTreeMap::new();
            for (i, (key, insert)) in steps.into_iter().enumerate() {
                if insert {
                    prop_assert_eq!(leaves.insert(key, i), model.insert(key, i));
                } else {
                    prop_assert_eq!(leaves.remove(key), model.remove(&key));
                }
                prop_assert_eq!(leaves.get(key), model.get(&key).copied());
                let before = model.range(..key).next_back().map(|(k, v)| (*k, *v));
                prop_assert_eq!(leaves.last_before(key), before);
                let next = model.range(key..).next().map(|(k, v)| (*k, *v));
                prop_assert_eq!(leaves.from(key).next(), next);
            }
            prop_assert!(leaves.iter().eq(model.iter().map(|(k, v)| (*k, *v))));
            for key in [0, 1, 777, 1999] {
                prop_assert!(leaves.from(key).eq(model.range(key..).map(|(k, v)| (*k, *v))));
            }
        }
    }

    #[test]
    fn a_clone_does_not_see_later_changes() {
        let mut leaves = Leaves::default();
        for key in 0..1000u32 {
            leaves.insert(key, key);
        }
        let before = leaves.clone();
        for key in 0..1000 {
            leaves.insert(key, 0);
        }
        assert!(before.iter().eq((0..1000).map(|key| (key, key))));
    }
}
