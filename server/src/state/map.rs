//! The versioned chunk map of one in-place volume: where each chunk's content of each epoch lies.
//!
//! For a chunk that changed since snapshots exist it knows the *head birth*, the epoch in which the content on the head
//! began, and the older *versions*, each with its birth and the place that its content moved to. A version covers the
//! epochs from its birth up to the birth of the next younger one, or of the head. A chunk without a record is on the
//! head, born before all.
//!
//! Invariants:
//! - a chunk has a head birth if and only if it has a version: the head birth goes with the last version, for by then
//!   it is at or before every live snapshot;
//! - births of a chunk ascend strictly, up to the head's;
//! - the index holds exactly the births of heads and versions, but for those before all.
//!
//! So a lookup that finds no younger version than the head's birth allows is never misled by a version that waits to
//! be reaped: the head's birth hides all of them for the epochs from it on.

use csnap_proto::ids::Epoch;
use csnap_proto::limits::CHUNKS_PER_PAGE;
use csnap_proto::message::volume::{Extent, PAGE_BITS_BYTES, Place, UniquePage};
use csnap_proto::units::{Chunk, ChunkRange};

use super::Corrupt;
use super::births::Births;
use super::leaves::Leaves;
use super::record::Kept;

/// Whether overwriting a head chunk would change a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// The head's own: may be overwritten in place.
    Unique,
    /// A live snapshot reads it.
    Shared {
        /// Birth of the content on the head.
        birth: Epoch,
    },
}

#[derive(Clone, Debug, Default)]
pub(super) struct ChunkMap {
    heads: Leaves<Chunk, Epoch>,
    versions: Leaves<(Chunk, Epoch), Kept>,
    births: Births,
    /// Versions that take a place in the store.
    stored: u64,
}

impl ChunkMap {
    /// Birth of the content on the head.
    pub(super) fn head_birth(&self, chunk: Chunk) -> Epoch {
        self.heads.get(chunk).unwrap_or(Epoch::BEFORE_ALL)
    }

    /// Chunks whose version is in the store.
    pub(super) fn stored(&self) -> u64 {
        self.stored
    }

    pub(super) fn births(&self) -> &Births {
        &self.births
    }

    pub(super) fn heads(&self) -> impl Iterator<Item = (Chunk, Epoch)> + '_ {
        self.heads.iter()
    }

    pub(super) fn versions(&self) -> impl Iterator<Item = ((Chunk, Epoch), Kept)> + '_ {
        self.versions.iter()
    }

    /// The youngest version of `chunk` born before `epoch`.
    pub(super) fn version_before(&self, chunk: Chunk, epoch: Epoch) -> Option<(Epoch, Kept)> {
        let ((found, birth), kept) = self.versions.last_before((chunk, epoch))?;
        (found == chunk).then_some((birth, kept))
    }

    /// The epoch in which the content of the version `(chunk, birth)` ended on the head: the birth of its successor.
    pub(super) fn end_of(&self, chunk: Chunk, birth: Epoch) -> Epoch {
        let next = self.versions.from((chunk, birth.next())).next();
        next.filter(|((found, _), _)| *found == chunk)
            .map_or_else(|| self.head_birth(chunk), |((_, end), _)| end)
    }

    /// The old content of a head chunk is kept elsewhere; the head is born anew in `epoch`.
    pub(super) fn supersede(&mut self, chunk: Chunk, epoch: Epoch, kept: Kept) {
        let old = self.heads.insert(chunk, epoch).unwrap_or(Epoch::BEFORE_ALL);
        assert!(old < epoch, "checked by the caller: births of a chunk ascend");
        self.versions.insert((chunk, old), kept);
        self.births.add(epoch, chunk);
        self.stored += u64::from(kept != Kept::Zero);
    }

    /// Takes a version out; with the last one goes the head's birth.
    pub(super) fn remove(&mut self, chunk: Chunk, birth: Epoch) -> Option<Kept> {
        let kept = self.versions.remove((chunk, birth))?;
        self.stored -= u64::from(kept != Kept::Zero);
        self.births.take(birth, chunk);
        let others =
            self.versions.from((chunk, Epoch::BEFORE_ALL)).next().is_some_and(|((c, _), _)| c == chunk);
        if let Some(head) = self.heads.get(chunk).filter(|_| !others) {
            self.heads.remove(chunk);
            self.births.take(head, chunk);
        }
        Some(kept)
    }

    /// Runs of the head within `range`, with their sharing; `youngest` is the youngest live snapshot.
    pub(super) fn head_runs(&self, range: ChunkRange, youngest: Option<Epoch>) -> Vec<(ChunkRange, Sharing)> {
        let Some(youngest) = youngest else { return vec![(range, Sharing::Unique)] };
        let sharing =
            |birth: Epoch| if birth <= youngest { Sharing::Shared { birth } } else { Sharing::Unique };
        let mut runs = Vec::new();
        self.each_head_run(range, |run, birth| push(&mut runs, run, sharing(birth), |a, b, _| a == b));
        runs
    }

    /// Where the chunks of `range` lie in the epoch of a live snapshot; a chunk takes `blocks` of the store.
    pub(super) fn locate(&self, range: ChunkRange, epoch: Epoch, blocks: u32) -> Vec<Extent> {
        let mut places: Vec<(ChunkRange, Place)> = Vec::new();
        let follows = |a: &Place, b: &Place, chunks: u64| match (a, b) {
            (Place::Store(a), Place::Store(b)) => {
                (a.term, a.arena) == (b.term, b.arena)
                    && u64::from(a.block) + chunks * u64::from(blocks) == u64::from(b.block)
            }
            (a, b) => a == b,
        };
        self.each_head_run(range, |run, birth| {
            if birth <= epoch {
                return push(&mut places, run, Place::Origin, follows);
            }
            for chunk in run.chunks() {
                // A chunk whose head is younger than a live snapshot has a version for it.
                let version =
                    self.versions.last_until((chunk, epoch)).filter(|((found, _), _)| *found == chunk);
                let place = version.map_or(Place::Zero, |(_, kept)| kept.into());
                push(&mut places, ChunkRange::one(chunk), place, follows);
            }
        });
        places.into_iter().map(|(range, place)| Extent { range, place }).collect()
    }

    /// Calls `each` with runs of one head birth that cover `range`, in order.
    fn each_head_run(&self, range: ChunkRange, mut each: impl FnMut(ChunkRange, Epoch)) {
        let mut at = range.first;
        for (chunk, birth) in self.heads.from(range.first).take_while(|(chunk, _)| range.contains(*chunk)) {
            if at < chunk {
                each(ChunkRange { first: at, count: chunk.0 - at.0 }, Epoch::BEFORE_ALL);
            }
            each(ChunkRange::one(chunk), birth);
            at = Chunk(chunk.0 + 1);
        }
        if at < range.end() {
            each(ChunkRange { first: at, count: range.end().0 - at.0 }, Epoch::BEFORE_ALL);
        }
    }

    /// The uniqueness bits of a page of a volume of `chunks`. Bits beyond the volume's end count as unique, so that its
    /// last page can be full.
    pub(super) fn unique_page(&self, page: u64, chunks: u64, youngest: Option<Epoch>) -> UniquePage {
        let Some(youngest) = youngest else { return UniquePage { page, bits: Vec::new() } };
        let mut bits = vec![0u8; PAGE_BITS_BYTES];
        let mut unique = 0;
        let mut set = |index: u64| {
            bits[usize::try_from(index / 8).expect("below the page's bytes")] |= 1 << (index % 8);
            unique += 1;
        };
        let first = page.saturating_mul(CHUNKS_PER_PAGE);
        let end = first.saturating_add(CHUNKS_PER_PAGE);
        let heads = self.heads.from(Chunk(first)).take_while(|(chunk, _)| chunk.0 < end.min(chunks));
        heads.filter(|(_, birth)| *birth > youngest).for_each(|(chunk, _)| set(chunk.0 - first));
        (chunks.max(first)..end).for_each(|beyond| set(beyond - first));
        if unique == CHUNKS_PER_PAGE {
            bits.clear();
        }
        UniquePage { page, bits }
    }

    /// Loading: a head birth, in order of chunks.
    pub(super) fn load_head(&mut self, chunk: Chunk, birth: Epoch) -> Result<(), Corrupt> {
        let fresh = birth > Epoch::BEFORE_ALL
            && self.births.add(birth, chunk)
            && self.heads.insert(chunk, birth).is_none();
        if fresh { Ok(()) } else { Err(Corrupt::new("a head birth that cannot be")) }
    }

    /// Loading: a version, in order, after all heads.
    pub(super) fn load_version(&mut self, chunk: Chunk, birth: Epoch, kept: Kept) -> Result<(), Corrupt> {
        let ordered = birth < self.head_birth(chunk);
        let indexed = birth == Epoch::BEFORE_ALL || (ordered && self.births.add(birth, chunk));
        if !ordered || !indexed || self.versions.insert((chunk, birth), kept).is_some() {
            return Err(Corrupt::new("a version that cannot be"));
        }
        self.stored += u64::from(kept != Kept::Zero);
        Ok(())
    }
}

/// Appends a run, joining it to the last where `follows(last, this, chunks of last)`.
fn push<T>(
    runs: &mut Vec<(ChunkRange, T)>,
    range: ChunkRange,
    what: T,
    follows: impl Fn(&T, &T, u64) -> bool,
) {
    match runs.last_mut() {
        Some((last, before)) if last.end() == range.first && follows(before, &what, last.count) => {
            last.count += range.count;
        }
        _ => runs.push((range, what)),
    }
}
