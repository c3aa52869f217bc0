//! Files that are kept open for the next use, so many at most: the one that was wanted least recently makes room.
//!
//! Only the shelf lets go of a file; whoever is at work with one holds it, and it is closed when the last of them is done.
//! So nothing is closed under an operation, and nobody may look a file up again to sync what it wrote through another
//! description: an error is told to descriptions that were open when it came.

use std::collections::BTreeMap;

/// Files by what they hold. The scan for the oldest costs less than the open that it makes room for.
pub(crate) struct Shelf<K, F> {
    most: usize,
    /// With the number of the last use.
    open: BTreeMap<K, (u64, F)>,
    uses: u64,
}

impl<K: Ord + Copy, F: Clone> Shelf<K, F> {
    /// Nothing open yet, and at most so many later.
    pub(crate) fn new(most: usize) -> Self {
        assert!(most > 0, "a shelf holds something");
        Self { most, open: BTreeMap::new(), uses: 0 }
    }

    pub(crate) fn get(&mut self, key: K) -> Option<F> {
        self.uses += 1;
        let (used, file) = self.open.get_mut(&key)?;
        *used = self.uses;
        Some(file.clone())
    }

    pub(crate) fn put(&mut self, key: K, file: F) {
        if self.open.len() >= self.most && !self.open.contains_key(&key) {
            let oldest = self.open.iter().min_by_key(|(_, (used, _))| *used).map(|(&key, _)| key);
            oldest.and_then(|key| self.open.remove(&key));
        }
        self.uses += 1;
        self.open.insert(key, (self.uses, file));
    }

    pub(crate) fn remove(&mut self, key: K) {
        self.open.remove(&key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_that_was_wanted_least_recently_makes_room() {
        let mut shelf = Shelf::new(2);
        shelf.put(1, "a");
        shelf.put(2, "b");
        assert_eq!(shelf.get(1), Some("a"));
        shelf.put(3, "c");
        assert_eq!((shelf.get(1), shelf.get(2), shelf.get(3)), (Some("a"), None, Some("c")));
        shelf.put(3, "d");
        assert_eq!((shelf.get(1), shelf.get(3)), (Some("a"), Some("d")), "what is there is replaced");
        shelf.remove(1);
        shelf.put(4, "e");
        assert_eq!((shelf.get(1), shelf.get(3), shelf.get(4)), (None, Some("d"), Some("e")));
    }
}
