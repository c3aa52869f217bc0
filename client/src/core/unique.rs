//! Which chunks are known to be unique in this epoch: may be overwritten in place, without asking.
//!
//! Two levels of 512 bits each: a *page* has a bit for every chunk, a *group* a bit for every page that is unique
//! throughout; such a page needs no bits of its own. What is not here is merely not known: an evicted page costs a
//! message, never correctness. So every operation may forget, and only [`UniqueCache::learn`] may add.
//!
//! Invariant: `bytes() <= limit`, always. Eviction is a clock over the key order, hence deterministic.

use std::collections::{BTreeMap, VecDeque};

use bitvec::array::BitArray;
use bitvec::order::Lsb0;

use csnap_proto::limits::CHUNKS_PER_PAGE;
use csnap_proto::message::volume::{PAGE_BITS_BYTES, UniquePage};
use csnap_proto::{Chunk, ChunkRange};

type Bits = BitArray<[u64; 8], Lsb0>;

const _: () = assert!(CHUNKS_PER_PAGE == 512 && PAGE_BITS_BYTES == 64);

/// What one entry costs at worst, bytes: 80 of key and value, in a leaf of at least 5 out of 11 places (a leaf with
/// its header is about 900 bytes), and its share of inner nodes.
const ENTRY_BYTES: usize = 224;

#[derive(Debug, Default)]
struct Entry {
    bits: Bits,
    /// Looked up since the hand of the clock last passed. Not set by learning: what is never looked up goes first.
    used: bool,
}

/// Where the hand of the clock stands: pages first, then groups.
#[derive(Clone, Copy, Debug)]
enum Hand {
    Page(u64),
    Group(u64),
}

/// The cache of one attachment.
#[derive(Debug)]
pub struct UniqueCache {
    limit_bytes: usize,
    /// Pages that are unique in part, by page number.
    pages: BTreeMap<u64, Entry>,
    /// Bits of pages that are unique throughout, by page number divided by 512.
    groups: BTreeMap<u64, Entry>,
    hand: Hand,
}

impl UniqueCache {
    /// An empty cache of at most `limit_bytes`.
    #[must_use]
    pub fn new(limit_bytes: usize) -> Self {
        Self { limit_bytes, pages: BTreeMap::new(), groups: BTreeMap::new(), hand: Hand::Page(0) }
    }

    /// What it takes at worst, bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        (self.pages.len() + self.groups.len()) * ENTRY_BYTES
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.pages.clear();
        self.groups.clear();
    }

    /// Whether every chunk of `range` is known to be unique.
    pub fn contains(&mut self, range: ChunkRange) -> bool {
        let mut at = range.first.0;
        while at < range.end().0 {
            let (page, from, to) = within_page(at, range.end().0);
            if !self.page_contains(page, from, to) {
                return false;
            }
            at += (to - from) as u64;
        }
        true
    }

    fn page_contains(&mut self, page: u64, from: usize, to: usize) -> bool {
        if let Some(group) = self.groups.get_mut(&(page / CHUNKS_PER_PAGE))
            && group.bits[index(page % CHUNKS_PER_PAGE)]
        {
            group.used = true;
            return true;
        }
        let Some(entry) = self.pages.get_mut(&page) else { return false };
        entry.used = true;
        entry.bits[from..to].all()
    }

    /// Appends the runs of `range` that are not known to be unique, in order.
    pub fn missing(&mut self, range: ChunkRange, into: &mut VecDeque<ChunkRange>) {
        let mut run: Option<ChunkRange> = None;
        let mut at = range.first.0;
        while at < range.end().0 {
            let (page, from, to) = within_page(at, range.end().0);
            if self.page_contains(page, from, to) {
                into.extend(run.take());
            } else {
                let bits = self.pages.get(&page).map(|entry| entry.bits).unwrap_or_default();
                for (chunk, known) in (at..).zip(bits[from..to].iter().by_vals()) {
                    if known {
                        into.extend(run.take());
                    } else {
                        let fresh = ChunkRange { first: Chunk(chunk), count: 0 };
                        run.get_or_insert(fresh).count += 1;
                    }
                }
            }
            at += (to - from) as u64;
        }
        into.extend(run);
    }

    /// Takes in what a grant said of a page. Bits only add: a chunk that was unique stays so within its epoch.
    pub fn learn(&mut self, page: &UniquePage) {
        let mut bits = Bits::ZERO;
        if page.bits.is_empty() {
            bits.fill(true);
        } else {
            for (word, bytes) in bits.data.iter_mut().zip(page.bits.chunks_exact(8)) {
                *word = u64::from_le_bytes(bytes.try_into().expect("chunks of eight bytes"));
            }
        }
        if let Some(known) = self.pages.get(&page.page) {
            bits |= known.bits;
        }
        let group = page.page / CHUNKS_PER_PAGE;
        if bits.all() {
            self.pages.remove(&page.page);
            if !self.groups.contains_key(&group) && !self.make_room() {
                return;
            }
            let entry = self.groups.entry(group).or_default();
            entry.bits.set(index(page.page % CHUNKS_PER_PAGE), true);
        } else if bits.any() && (self.pages.contains_key(&page.page) || self.make_room()) {
            self.pages.insert(page.page, Entry { bits, used: false });
        }
    }

    /// Makes room for one entry; `false` if not even one fits.
    fn make_room(&mut self) -> bool {
        while self.bytes() + ENTRY_BYTES > self.limit_bytes {
            if self.pages.is_empty() && self.groups.is_empty() {
                return false;
            }
            self.turn();
        }
        true
    }

    /// Moves the hand over one entry: evicts it, unless it was used since the last time.
    fn turn(&mut self) {
        let (map, from, same, other): (_, _, fn(u64) -> Hand, _) = match self.hand {
            Hand::Page(key) => (&mut self.pages, key, Hand::Page, Hand::Group(0)),
            Hand::Group(key) => (&mut self.groups, key, Hand::Group, Hand::Page(0)),
        };
        let Some((&key, entry)) = map.range_mut(from..).next() else {
            self.hand = other;
            return;
        };
        if !std::mem::take(&mut entry.used) {
            map.remove(&key);
        }
        self.hand = key.checked_add(1).map_or(other, same);
    }
}

/// The page of chunk number `at`, and which of its bits lie before chunk number `end`.
fn within_page(at: u64, end: u64) -> (u64, usize, usize) {
    let page = at / CHUNKS_PER_PAGE;
    let first = page * CHUNKS_PER_PAGE;
    (page, index(at - first), index((end - first).min(CHUNKS_PER_PAGE)))
}

fn index(bit: u64) -> usize {
    usize::try_from(bit).expect("positions in a page are at most 512")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn range(first: u64, count: u64) -> ChunkRange {
        ChunkRange { first: Chunk(first), count }
    }

    fn page_with(page: u64, chunks: &[u64]) -> UniquePage {
        let mut bits = vec![0u8; PAGE_BITS_BYTES];
        for &chunk in chunks {
            bits[(chunk / 8) as usize] |= 1 << (chunk % 8);
        }
        UniquePage { page, bits }
    }

    #[test]
    fn full_pages_take_a_bit_of_their_group() {
        let mut cache = UniqueCache::new(ENTRY_BYTES * 2);
        for page in 0..512 {
            cache.learn(&UniquePage { page, bits: vec![] });
        }
        assert_eq!(cache.bytes(), ENTRY_BYTES);
        assert!(cache.contains(range(0, 512 * 512)));
        assert!(!cache.contains(range(512 * 512 - 1, 2)));
    }

    #[test]
    fn a_page_that_fills_up_collapses() {
        let mut cache = UniqueCache::new(ENTRY_BYTES * 4);
        let (even, odd): (Vec<u64>, Vec<u64>) = (0..512).partition(|n| n % 2 == 0);
        cache.learn(&page_with(7, &even));
        assert_eq!(cache.pages.len(), 1);
        cache.learn(&page_with(7, &odd));
        assert_eq!((cache.pages.len(), cache.groups.len()), (0, 1));
        assert!(cache.contains(range(7 * 512, 512)));
    }

    #[test]
    fn the_page_in_use_stays_when_others_go() {
        let mut cache = UniqueCache::new(ENTRY_BYTES * 8);
        cache.learn(&page_with(0, &[1]));
        for page in 1..1000 {
            assert!(cache.contains(range(1, 1)), "before page {page}");
            cache.learn(&page_with(page, &[5]));
            assert!(cache.bytes() <= ENTRY_BYTES * 8);
        }
    }

    #[test]
    fn a_cache_without_room_knows_nothing_and_lives() {
        let mut cache = UniqueCache::new(0);
        cache.learn(&UniquePage { page: 1, bits: vec![] });
        cache.learn(&page_with(1, &[3]));
        assert_eq!(cache.bytes(), 0);
        assert!(!cache.contains(range(512 + 3, 1)));
    }

    #[test]
    fn pages_at_the_end_of_the_numbers_do_not_overflow() {
        let mut cache = UniqueCache::new(ENTRY_BYTES);
        cache.learn(&UniquePage { page: u64::MAX, bits: vec![] });
        cache.learn(&page_with(u64::MAX - 1, &[3]));
        cache.learn(&page_with(u64::MAX - 3, &[3]));
    }

    /// Resident bytes of this process.
    fn resident() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux has it");
        statm.split(' ').nth(1).expect("second field").parse::<usize>().expect("a number") * 4096
    }

    #[test]
    fn the_bound_is_what_the_process_really_takes() {
        let limit = 32 << 20;
        let before = resident();
        let mut cache = UniqueCache::new(limit);
        for n in 0..400_000u64 {
            let page = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 30;
            cache.learn(&page_with(page, &[n % 512]));
            assert!(cache.bytes() <= limit);
        }
        let taken = resident().saturating_sub(before);
        println!("{} MiB resident for a bound of {} MiB", taken >> 20, limit >> 20);
        assert!(taken < limit + (8 << 20), "{taken} bytes resident for a limit of {limit}");
    }

    proptest! {
        #[test]
        fn nothing_is_unique_that_was_not_learnt(
            pages in prop::collection::vec((0..40u64, prop::collection::vec(0..512u64, 0..20), any::<bool>()), 0..80),
            limit in 0..30usize,
            probes in prop::collection::vec((0..20_000u64, 1..1500u64), 20),
        ) {
            let mut cache = UniqueCache::new(limit * ENTRY_BYTES);
            let mut truth = BTreeSet::new();
            for (page, chunks, full) in pages {
                if full {
                    cache.learn(&UniquePage { page, bits: vec![] });
                    truth.extend(page * 512..(page + 1) * 512);
                } else {
                    cache.learn(&page_with(page, &chunks));
                    truth.extend(chunks.iter().map(|c| page * 512 + c));
                }
                prop_assert!(cache.bytes() <= limit * ENTRY_BYTES);
            }
            for (first, count) in probes {
                let probe = range(first, count);
                let mut missing = VecDeque::new();
                cache.missing(probe, &mut missing);
                prop_assert_eq!(cache.contains(probe), missing.is_empty());
                for chunk in probe.chunks() {
                    let gone = missing.iter().any(|m| m.contains(chunk));
                    prop_assert!(gone || truth.contains(&chunk.0));
                    prop_assert!(limit < 29 || gone != truth.contains(&chunk.0));
                }
            }
        }
    }
}
