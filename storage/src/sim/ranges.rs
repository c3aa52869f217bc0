//! A set of block numbers, kept as ranges: which blocks of a file take space.

use std::collections::BTreeMap;
use std::ops::Range;

/// Disjoint, non-adjacent ranges: start to end (exclusive).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RangeSet {
    ranges: BTreeMap<u64, u64>,
    count: u64,
}

impl RangeSet {
    /// How many numbers are in the set.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// How many numbers of `range` are not in the set.
    pub(super) fn missing(&self, range: Range<u64>) -> u64 {
        if range.is_empty() {
            return 0;
        }
        let held: u64 = self.overlapping(&range).map(|(s, e)| e.min(range.end) - s.max(range.start)).sum();
        range.end - range.start - held
    }

    /// Adds `range`.
    pub(super) fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        // Touching ranges are merged too, so that appending stays one range.
        let touching: Vec<(u64, u64)> =
            self.overlapping(&(start.saturating_sub(1)..end.saturating_add(1))).collect();
        for (s, e) in touching {
            self.ranges.remove(&s);
            self.count -= e - s;
            start = start.min(s);
            end = end.max(e);
        }
        self.ranges.insert(start, end);
        self.count += end - start;
    }

    /// Takes `range` out.
    pub(super) fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let hit: Vec<(u64, u64)> = self.overlapping(&range).collect();
        for (s, e) in hit {
            self.ranges.remove(&s);
            self.count -= e - s;
            for part in [s..range.start.min(e), range.end.max(s)..e] {
                if !part.is_empty() {
                    self.ranges.insert(part.start, part.end);
                    self.count += part.end - part.start;
                }
            }
        }
    }

    /// The stored ranges that share a number with `range`, which is not empty; in order.
    fn overlapping(&self, range: &Range<u64>) -> impl Iterator<Item = (u64, u64)> {
        let (start, end) = (range.start, range.end);
        let before = self.ranges.range(..start).next_back().filter(|(_, e)| **e > start);
        before.into_iter().chain(self.ranges.range(start..end)).map(|(s, e)| (*s, *e))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::sim::Rng;

    #[test]
    fn agrees_with_a_plain_set() {
        let mut rng = Rng::new(3);
        let (mut ranges, mut plain) = (RangeSet::default(), BTreeSet::new());
        for _ in 0..2000 {
            let start = rng.below(100);
            // Some are empty, and some end before they start: what lies whole in half a block.
            let range = start..(start + rng.below(20)).saturating_sub(2);
            let missing = range.clone().filter(|n| !plain.contains(n)).count() as u64;
            assert_eq!(ranges.missing(range.clone()), missing);
            if rng.chance(0.5) {
                ranges.insert(range.clone());
                plain.extend(range);
            } else {
                ranges.remove(range.clone());
                plain.retain(|n| !range.contains(n));
            }
            assert_eq!(ranges.count(), plain.len() as u64);
        }
    }
}
