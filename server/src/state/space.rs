//! The snapshot store's space: arenas, who may allocate in them, and what is held.
//!
//! Only the current term's arenas, and those of terms known dead, are allocated from and punched: an older server that
//! may still run may still write in its own. Everything that is given out is backed on disk first, so that a copy-out
//! does not run out of space half-way.

use std::collections::BTreeMap;
use std::sync::Arc;

use csnap_proto::ids::{FreeBatchId, Name, Term, VolumeId};
use csnap_proto::limits::CHUNK_BYTES_MIN;
use csnap_proto::units::{BLOCKS_PER_ARENA, Location, StoreExtent};

use super::Corrupt;
use super::arena::{Arena, GROUP_BLOCKS, Mark};
use super::free::{Frees, OpenBatch, push_extent};
use super::record::{RUNS_PER_RECORD_MAX, extent_fits_arena};

/// A group with fewer blocks to gain, 1 MiB, is not worth a reservation of its own: the store grows elsewhere.
const GROWTH_BLOCKS_MIN: u32 = 256;

/// Why no places were given out, and what would help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeedSpace {
    /// Chunks that there is no place for; the others could have been had.
    pub missing_chunks: u64,
    /// Reserve this on disk, and record it with `ArenaReserve`.
    pub grow: StoreExtent,
    /// The arena is new: make its file first, exclusively.
    pub new_arena: bool,
}

/// Space that is free, or would be, and must not be used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Bytes.
    pub bytes: u64,
    /// A line a reason, for people.
    pub because: Vec<String>,
}

#[derive(Clone, Debug)]
pub(super) struct Space {
    /// The current one; 0 before the first.
    pub(super) term: Term,
    /// Terms that began and are not known dead, the current one included, with their nodes.
    pub(super) alive: BTreeMap<Term, Name>,
    pub(super) arenas: BTreeMap<(Term, u32), Arc<Arena>>,
    pub(super) frees: Frees,
}

impl Space {
    pub(super) fn new() -> Self {
        let frees = Frees::new(FreeBatchId(1));
        Self { term: Term(0), alive: BTreeMap::new(), arenas: BTreeMap::new(), frees }
    }

    pub(super) fn open_batch(&self) -> &OpenBatch {
        &self.frees.open
    }

    /// Whether space of `term` may be given out and punched: every older server that could do so is dead, which are that
    /// term's own and those after it, for they may have been given the arenas of terms dead before.
    fn is_usable(&self, term: Term) -> bool {
        term == self.term || (term < self.term && self.alive.range(term..self.term).next().is_none())
    }

    pub(super) fn begin_term(&mut self, term: Term, node: Name) -> Result<(), Corrupt> {
        if term <= self.term {
            return Err(Corrupt::new(format!("term {term} begins after term {}", self.term)));
        }
        self.term = term;
        self.alive.insert(term, node);
        // What an older server had under way is not ours; its arenas are not either, until it is known dead.
        self.arenas.values_mut().for_each(|arena| Arc::make_mut(arena).forget_plans());
        Ok(())
    }

    pub(super) fn end_term(&mut self, term: Term) -> Result<(), Corrupt> {
        if term >= self.term {
            return Err(Corrupt::new("the current term cannot be dead"));
        }
        if self.alive.remove(&term).is_some() {
            let arenas = self.arenas.range_mut((term, 0)..=(term, u32::MAX));
            arenas.for_each(|(_, arena)| Arc::make_mut(arena).touch_all());
        }
        Ok(())
    }

    fn usable(&self) -> impl Iterator<Item = (Location, &Arena)> {
        let usable = self.arenas.iter().filter(|((term, _), _)| self.is_usable(*term));
        usable.map(|(&(term, arena), found)| (Location { term, arena, block: 0 }, &**found))
    }

    /// Promises places for `chunks` chunks of `blocks` each, in as few runs as can be: all or none.
    pub(super) fn reserve(&mut self, chunks: u64, blocks: u32) -> Result<Vec<StoreExtent>, NeedSpace> {
        let mut places = Vec::new();
        let mut missing = chunks;
        for whole in [true, false] {
            for (at, arena) in self.usable().filter(|(_, arena)| arena.available() >= blocks) {
                missing -= arena.find(missing, blocks, whole, &mut |block, blocks| {
                    push_extent(&mut places, StoreExtent { at: Location { block, ..at }, blocks });
                });
                if missing == 0 {
                    break;
                }
            }
            if missing == 0 {
                break;
            }
        }
        if missing > 0 {
            return Err(self.growth(missing, blocks));
        }
        places.iter().for_each(|place| self.mark(Mark::Promised, *place, true));
        Ok(places)
    }

    fn growth(&self, missing_chunks: u64, blocks: u32) -> NeedSpace {
        let grown = self.usable().find_map(|(at, arena)| {
            let block = arena.growable(GROWTH_BLOCKS_MIN, blocks)?;
            Some(StoreExtent { at: Location { block, ..at }, blocks: GROUP_BLOCKS })
        });
        let fresh = || {
            let at = Location { term: self.term, arena: self.next_arena(), block: 0 };
            StoreExtent { at, blocks: GROUP_BLOCKS }
        };
        NeedSpace { missing_chunks, grow: grown.unwrap_or_else(fresh), new_arena: grown.is_none() }
    }

    /// The number of the next arena of the current term.
    fn next_arena(&self) -> u32 {
        let last = self.arenas.range((self.term, 0)..=(self.term, u32::MAX)).next_back();
        last.map_or(0, |((_, arena), _)| arena.saturating_add(1))
    }

    pub(super) fn back(&mut self, extent: StoreExtent) -> Result<(), Corrupt> {
        let key = (extent.at.term, extent.at.arena);
        let new = extent.at.term == self.term && extent.at.arena == self.next_arena();
        if !extent_fits_arena(extent) || !self.is_usable(key.0) || !(new || self.arenas.contains_key(&key)) {
            return Err(Corrupt::new("space reserved in an arena that is not this term's to use"));
        }
        self.arenas.entry(key).or_default();
        self.mark(Mark::Backed, extent, true);
        self.mark(Mark::Ahead, extent, true);
        Ok(())
    }

    /// Gives a promise back.
    pub(super) fn unreserve(&mut self, extent: StoreExtent) {
        if extent_fits_arena(extent) && self.arenas.contains_key(&(extent.at.term, extent.at.arena)) {
            self.mark(Mark::Promised, extent, false);
        }
    }

    /// A version is kept here from now on.
    pub(super) fn take(&mut self, extent: StoreExtent) -> Result<(), Corrupt> {
        if !self.is_usable(extent.at.term) {
            return Err(Corrupt::new("a version kept in an arena that is not this term's to use"));
        }
        self.load_taken(extent)?;
        self.mark(Mark::Promised, extent, false);
        Ok(())
    }

    /// Marks a place taken, wherever it is: once only.
    pub(super) fn load_taken(&mut self, extent: StoreExtent) -> Result<(), Corrupt> {
        let arena = self.arenas.get(&(extent.at.term, extent.at.arena));
        let free = arena.filter(|_| extent_fits_arena(extent)).is_some_and(|arena| {
            arena.all(Mark::Backed, extent.at.block, extent.blocks, true)
                && arena.all(Mark::Taken, extent.at.block, extent.blocks, false)
        });
        if !free {
            return Err(Corrupt::new(format!("{:?} is kept where no free space is", extent.at)));
        }
        self.mark(Mark::Taken, extent, true);
        self.mark(Mark::Ahead, extent, false);
        Ok(())
    }

    /// No version is kept here any more: to the open batch.
    pub(super) fn free(&mut self, volume: VolumeId, extents: &[StoreExtent]) {
        self.frees.open.add(volume, extents);
    }

    pub(super) fn release(&mut self, batch: FreeBatchId) -> Result<(), Corrupt> {
        let freed = self.frees.release(batch)?;
        freed.values().flatten().for_each(|extent| self.mark(Mark::Taken, *extent, false));
        Ok(())
    }

    /// Free space that takes room on disk and that nobody will need soon, at most `budget` extents of it; promised
    /// until it is recorded as punched.
    pub(super) fn next_punch(&mut self, budget: usize) -> Option<Vec<StoreExtent>> {
        let budget = budget.clamp(1, RUNS_PER_RECORD_MAX);
        let mut found: Vec<StoreExtent> = Vec::new();
        for (at, arena) in self.usable() {
            arena.punchable(&mut |block, blocks| {
                push_extent(&mut found, StoreExtent { at: Location { block, ..at }, blocks });
                found.len() < budget
            });
            if found.len() >= budget {
                break;
            }
        }
        found.iter().for_each(|extent| self.mark(Mark::Promised, *extent, true));
        (!found.is_empty()).then_some(found)
    }

    pub(super) fn punched(&mut self, extents: &[StoreExtent]) -> Result<(), Corrupt> {
        for extent in extents {
            let arena = self.arenas.get(&(extent.at.term, extent.at.arena));
            let free =
                arena.is_some_and(|arena| arena.all(Mark::Taken, extent.at.block, extent.blocks, false));
            if !free || !self.is_usable(extent.at.term) {
                return Err(Corrupt::new("punched what is not free"));
            }
            self.mark(Mark::Promised, *extent, false);
            self.mark(Mark::Backed, *extent, false);
            self.mark(Mark::Ahead, *extent, false);
        }
        Ok(())
    }

    fn mark(&mut self, mark: Mark, extent: StoreExtent, value: bool) {
        let arena = self.arenas.get_mut(&(extent.at.term, extent.at.arena)).expect("callers looked it up");
        Arc::make_mut(arena).mark(mark, extent.at.block, extent.blocks, value);
    }

    /// Bytes of versions.
    pub(super) fn used_bytes(&self) -> u64 {
        let taken: u64 = self.arenas.values().map(|arena| u64::from(arena.taken())).sum();
        (taken - self.frees.blocks()) * CHUNK_BYTES_MIN
    }

    /// Bytes of arenas that may not be used because their server may live, by term.
    pub(super) fn held_by_terms(&self) -> BTreeMap<Term, u64> {
        let mut held = BTreeMap::new();
        for ((term, _), arena) in self.arenas.iter().filter(|((term, _), _)| !self.is_usable(*term)) {
            *held.entry(*term).or_default() += u64::from(arena.idle()) * CHUNK_BYTES_MIN;
        }
        held.retain(|_, bytes| *bytes > 0);
        held
    }

    /// Loading: an arena with what is reserved of it on disk.
    pub(super) fn load_arena(&mut self, term: Term, number: u32, arena: Arena) -> Result<(), Corrupt> {
        let good = term <= self.term && term > Term(0) && arena.touched() <= BLOCKS_PER_ARENA;
        if !good || self.arenas.insert((term, number), Arc::new(arena)).is_some() {
            return Err(Corrupt::new("an arena that cannot be"));
        }
        Ok(())
    }
}
