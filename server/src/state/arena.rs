//! One arena of the store: which of its blocks are reserved on disk, taken, and promised.
//!
//! An arena is cut into groups of [`GROUP_BLOCKS`], the step in which space is reserved on disk. Groups are shared by
//! clones until they change, and those that nothing happened in are one and the same.
//!
//! A block is *backed* when the file system has set space aside for it, *taken* when a version or a batch of frees
//! holds it, *promised* when a copy-out or a punch is under way there. Taken implies backed; only what is backed, not
//! taken and not promised may be given out. It is *ahead* while it was reserved by this server and never taken since: it
//! is about to be needed, and not punched. Promises and what is ahead are of this server's memory alone: no record, no
//! checkpoint.

use std::sync::Arc;

use bitvec::array::BitArray;
use bitvec::order::Lsb0;
use csnap_proto::units::BLOCKS_PER_ARENA;

/// Blocks in one group: 16 MiB, so that reserving is rare, and an idle arena holds little.
pub(super) const GROUP_BLOCKS: u32 = 4096;

/// Groups in one arena.
pub(super) const GROUPS: u32 = BLOCKS_PER_ARENA / GROUP_BLOCKS;

/// Words of a group's bitmap.
pub(super) const GROUP_WORDS: usize = GROUP_BLOCKS as usize / 64;

pub(super) type GroupBits = BitArray<[u64; GROUP_WORDS], Lsb0>;

const _: () = assert!(BLOCKS_PER_ARENA.is_multiple_of(GROUP_BLOCKS));

/// What can be said of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    Backed,
    Taken,
    Promised,
    Ahead,
}

#[derive(Clone, Debug)]
struct Group {
    backed: GroupBits,
    taken: GroupBits,
    promised: GroupBits,
    ahead: GroupBits,
    /// Blocks backed, not taken, not promised.
    available: u32,
}

impl Group {
    fn bits(&self, mark: Mark) -> &GroupBits {
        match mark {
            Mark::Backed => &self.backed,
            Mark::Taken => &self.taken,
            Mark::Promised => &self.promised,
            Mark::Ahead => &self.ahead,
        }
    }

    fn fill(&mut self, mark: Mark, start: u32, end: u32, value: bool) {
        let bits = match mark {
            Mark::Backed => &mut self.backed,
            Mark::Taken => &mut self.taken,
            Mark::Promised => &mut self.promised,
            Mark::Ahead => &mut self.ahead,
        };
        bits[start as usize..end as usize].fill(value);
        self.available = (0..GROUP_BLOCKS / 64).map(|word| self.available_word(word).count_ones()).sum();
    }

    fn available_word(&self, word: u32) -> u64 {
        let of = |bits: &GroupBits| bits.as_raw_slice()[word as usize];
        of(&self.backed) & !of(&self.taken) & !of(&self.promised)
    }

    /// Of the available ones, those that were used, or reserved by another server.
    fn left_over_word(&self, word: u32) -> u64 {
        self.available_word(word) & !self.ahead.as_raw_slice()[word as usize]
    }

    /// Blocks that a reservation would make available.
    fn obtainable_word(&self, word: u32) -> u64 {
        let of = |bits: &GroupBits| bits.as_raw_slice()[word as usize];
        !of(&self.taken) & !of(&self.promised)
    }
}

/// Runs of set bits of a group, in order: first block and length.
fn runs(word: impl Fn(u32) -> u64) -> impl Iterator<Item = (u32, u32)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = next_bit(&word, at, false)?;
        at = next_bit(&word, start, true).unwrap_or(GROUP_BLOCKS);
        Some((start, at - start))
    })
}

/// The first block at or after `at` whose bit is set, or clear if `inverted`.
fn next_bit(word: &impl Fn(u32) -> u64, at: u32, inverted: bool) -> Option<u32> {
    let flip = if inverted { u64::MAX } else { 0 };
    let mut index = at / 64;
    let mut mask = u64::MAX << (at % 64);
    while index < GROUP_BLOCKS / 64 {
        let found = (word(index) ^ flip) & mask;
        if found != 0 {
            return Some(index * 64 + found.trailing_zeros());
        }
        mask = u64::MAX;
        index += 1;
    }
    None
}

#[derive(Clone, Debug)]
pub(super) struct Arena {
    groups: Vec<Arc<Group>>,
    /// The blocks below were used once: what is free of them goes back to the file system. The ones above were
    /// reserved ahead and stay, unless the arena is empty.
    touched: u32,
    taken: u32,
    promised: u32,
    available: u32,
    backed: u32,
}

impl Default for Arena {
    fn default() -> Self {
        let none = GroupBits::new([0; GROUP_WORDS]);
        let empty = Arc::new(Group { backed: none, taken: none, promised: none, ahead: none, available: 0 });
        Self {
            groups: vec![empty; GROUPS as usize],
            touched: 0,
            taken: 0,
            promised: 0,
            available: 0,
            backed: 0,
        }
    }
}

impl Arena {
    /// Blocks of versions and of batches.
    pub(super) fn taken(&self) -> u32 {
        self.taken
    }

    /// Blocks that may be given out, as far as the arena is concerned.
    pub(super) fn available(&self) -> u32 {
        self.available
    }

    /// Blocks that take space on disk and hold nothing.
    pub(super) fn idle(&self) -> u32 {
        self.backed - self.taken
    }

    pub(super) fn touched(&self) -> u32 {
        self.touched
    }

    /// Whether every block of the run has the mark (`want`), or none has it.
    pub(super) fn all(&self, mark: Mark, block: u32, blocks: u32, want: bool) -> bool {
        parts(block, blocks).all(|(group, start, end)| {
            let bits = &self.groups[group].bits(mark)[start as usize..end as usize];
            if want { bits.all() } else { bits.not_any() }
        })
    }

    /// Sets or clears a mark of the run.
    pub(super) fn mark(&mut self, mark: Mark, block: u32, blocks: u32, value: bool) {
        for (group, start, end) in parts(block, blocks) {
            let shared = &mut self.groups[group];
            let before = shared.available;
            let had = shared.bits(mark)[start as usize..end as usize].count_ones();
            Arc::make_mut(shared).fill(mark, start, end, value);
            self.available = self.available - before + shared.available;
            let count = match mark {
                Mark::Backed => &mut self.backed,
                Mark::Taken => &mut self.taken,
                Mark::Promised => &mut self.promised,
                Mark::Ahead => continue,
            };
            *count = *count - u32::try_from(had).expect("a group has few bits")
                + if value { end - start } else { 0 };
        }
        if mark == Mark::Taken && value {
            self.touched = self.touched.max(block + blocks);
        }
        if self.backed == 0 {
            self.touched = 0;
        }
    }

    /// Treats every block as used once: nobody knows what a dead server wrote ahead.
    pub(super) fn touch_all(&mut self) {
        if self.backed > 0 {
            self.touched = BLOCKS_PER_ARENA;
        }
    }

    /// Forgets what another server had promised and reserved ahead.
    pub(super) fn forget_plans(&mut self) {
        for group in 0..GROUPS {
            for mark in [Mark::Promised, Mark::Ahead] {
                if self.groups[group as usize].bits(mark).any() {
                    self.mark(mark, group * GROUP_BLOCKS, GROUP_BLOCKS, false);
                }
            }
        }
    }

    /// Finds places for up to `slots` slots of `slot` blocks each, aligned to that; `whole` asks for one run that has
    /// them all. Calls `give` with first block and number of blocks of each run; returns how many slots were found.
    pub(super) fn find(&self, slots: u64, slot: u32, whole: bool, give: &mut dyn FnMut(u32, u32)) -> u64 {
        let mut found = 0;
        for (group, first) in self.groups.iter().zip((0..).step_by(GROUP_BLOCKS as usize)) {
            let least = if whole { slots.saturating_mul(slot.into()) } else { slot.into() };
            if found == slots || u64::from(group.available) < least {
                continue;
            }
            for (start, len) in runs(|word| group.available_word(word)) {
                let (aligned, fit) = aligned(start, len, slot);
                if fit == 0 || (whole && u64::from(fit) < slots) {
                    continue;
                }
                let take = u32::try_from(slots - found).unwrap_or(u32::MAX).min(fit);
                give(first + aligned, take * slot);
                found += u64::from(take);
                if found == slots {
                    return found;
                }
            }
        }
        found
    }

    /// The first group whose reservation would add at least `least` blocks and make a slot of `slot` blocks: its first
    /// block.
    pub(super) fn growable(&self, least: u32, slot: u32) -> Option<u32> {
        let grows = |group: &Group| {
            let missing = GROUP_BLOCKS as usize - group.backed.count_ones();
            let fits = |(start, len)| aligned(start, len, slot).1 > 0;
            missing >= least as usize && runs(|word| group.obtainable_word(word)).any(fits)
        };
        let at = self.groups.iter().position(|group| grows(group))?;
        Some(u32::try_from(at).expect("an arena has few groups") * GROUP_BLOCKS)
    }

    /// Calls `give` with runs that take space on disk and will not be needed soon, until it declines.
    pub(super) fn punchable(&self, give: &mut dyn FnMut(u32, u32) -> bool) {
        let is_empty = self.taken == 0 && self.promised == 0;
        let below = if is_empty { BLOCKS_PER_ARENA } else { self.touched };
        for (group, first) in self.groups.iter().zip((0..).step_by(GROUP_BLOCKS as usize)) {
            if first >= below || group.available == 0 {
                continue;
            }
            let unneeded =
                |word| if is_empty { group.available_word(word) } else { group.left_over_word(word) };
            for (start, len) in runs(unneeded) {
                let end = (first + start + len).min(below);
                if first + start < end && !give(first + start, end - first - start) {
                    return;
                }
            }
        }
    }

    /// The backed blocks of each group, for a checkpoint.
    pub(super) fn backing(&self) -> impl Iterator<Item = &GroupBits> {
        self.groups.iter().map(|group| &group.backed)
    }

    /// Loading: what is backed of the group that begins at block `first`.
    pub(super) fn load_backed(&mut self, first: u32, backed: GroupBits) {
        for (start, len) in runs(|word| backed.as_raw_slice()[word as usize]) {
            self.mark(Mark::Backed, first + start, len, true);
        }
    }

    /// Loading: how far it was used.
    pub(super) fn load_touched(&mut self, touched: u32) {
        self.touched = touched;
    }
}

/// The slots of `slot` blocks, aligned to that, in a run: first block and number.
fn aligned(start: u32, len: u32, slot: u32) -> (u32, u32) {
    let first = start.next_multiple_of(slot);
    let fit = (start + len).saturating_sub(first) / slot;
    (first, fit)
}

/// A run of blocks, cut by groups: group, first and end in the group.
fn parts(block: u32, blocks: u32) -> impl Iterator<Item = (usize, u32, u32)> {
    let end = block + blocks;
    let mut at = block;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let group = at / GROUP_BLOCKS;
        let start = at % GROUP_BLOCKS;
        let stop = GROUP_BLOCKS.min(start + (end - at));
        at += stop - start;
        Some((group as usize, start, stop))
    })
}
