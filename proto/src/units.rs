//! How much of something: time, chunk geometry, ranges, places in the store.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::Term;
use crate::limits::{ARENA_BYTES, CHUNK_BYTES_MAX, CHUNK_BYTES_MIN};

/// A point in time, microseconds since an arbitrary start of this machine (CLOCK_BOOTTIME in shells, virtual in the
/// simulation). Never wall time; never compared between machines.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Time(pub u64);

impl Time {
    /// This point, `by` later; saturates.
    #[must_use]
    pub fn after(self, by: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(by.as_micros()).unwrap_or(u64::MAX)))
    }

    /// How long ago `earlier` was; zero if it was not.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

/// Wall time, milliseconds since the Unix epoch: shown to people, decides nothing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
pub struct WallMillis(pub u64);

/// Size of a volume's chunks: a power of two between [`CHUNK_BYTES_MIN`] and [`CHUNK_BYTES_MAX`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct ChunkSize(u8);

/// Of a power of two.
#[expect(clippy::cast_possible_truncation, reason = "at most 64")]
const fn log2(bytes: u64) -> u8 {
    bytes.trailing_zeros() as u8
}

impl ChunkSize {
    /// 4 KiB.
    pub const MIN: Self = Self(log2(CHUNK_BYTES_MIN));

    /// From a number of bytes; `None` if that is not an allowed chunk size.
    #[must_use]
    pub fn from_bytes(bytes: u64) -> Option<Self> {
        let allowed = bytes.is_power_of_two() && (CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&bytes);
        allowed.then(|| Self(log2(bytes)))
    }

    /// In bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        1 << self.0
    }

    /// Blocks of the store that a chunk takes.
    #[must_use]
    pub fn blocks(self) -> u32 {
        1 << (self.0 - Self::MIN.0)
    }

    /// The chunk that byte `offset` lies in.
    #[must_use]
    pub fn chunk_at(self, offset: u64) -> Chunk {
        Chunk(offset >> self.0)
    }

    /// The first byte of `chunk`. `chunk` must lie in some volume (see `VOLUME_BYTES_MAX`).
    #[must_use]
    pub fn offset_of(self, chunk: Chunk) -> u64 {
        chunk.0 << self.0
    }

    /// The chunks that `len` bytes at `offset` touch. `offset + len` must not overflow; `len` is not zero.
    #[must_use]
    pub fn covering(self, offset: u64, len: u64) -> ChunkRange {
        assert!(len > 0, "an empty range covers no chunk");
        let first = self.chunk_at(offset);
        let last = self.chunk_at(offset + (len - 1));
        ChunkRange { first, count: last.0 - first.0 + 1 }
    }

    /// Chunks of a volume of `size_bytes`; the last may be partial.
    #[must_use]
    pub fn chunks_in(self, size_bytes: u64) -> u64 {
        size_bytes.div_ceil(self.bytes())
    }
}

impl TryFrom<u8> for ChunkSize {
    type Error = &'static str;
    fn try_from(bits: u8) -> Result<Self, Self::Error> {
        1u64.checked_shl(bits.into()).and_then(Self::from_bytes).ok_or("not a chunk size")
    }
}
impl From<ChunkSize> for u8 {
    fn from(size: ChunkSize) -> u8 {
        size.0
    }
}

/// Index of a chunk in its volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Chunk(pub u64);

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// A run of neighbouring chunks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChunkRange {
    /// First chunk of the run.
    pub first: Chunk,
    /// Number of chunks; decoders of messages refuse 0.
    pub count: u64,
}

impl ChunkRange {
    /// A run of one.
    #[must_use]
    pub fn one(chunk: Chunk) -> Self {
        Self { first: chunk, count: 1 }
    }

    /// The chunk after the last; `None` when that is beyond 64 bits (hostile input).
    #[must_use]
    pub fn checked_end(self) -> Option<Chunk> {
        self.first.0.checked_add(self.count).map(Chunk)
    }

    /// The chunk after the last. The range must have been checked to lie in a volume.
    #[must_use]
    pub fn end(self) -> Chunk {
        self.checked_end().expect("checked ranges lie in a volume")
    }

    /// Every chunk of the run, in order.
    pub fn chunks(self) -> impl DoubleEndedIterator<Item = Chunk> + ExactSizeIterator<Item = Chunk> {
        let count = usize::try_from(self.count).expect("ranges are far below the address space");
        (0..count).map(move |i| Chunk(self.first.0 + i as u64))
    }

    /// Whether the two runs share a chunk.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.first < other.end() && other.first < self.end()
    }

    /// Whether `chunk` is one of the run.
    #[must_use]
    pub fn contains(self, chunk: Chunk) -> bool {
        self.first <= chunk && chunk.0 - self.first.0 < self.count
    }
}

impl fmt::Debug for ChunkRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}+{}", self.first.0, self.count)
    }
}

/// A place in the snapshot store: block `block` (of [`CHUNK_BYTES_MIN`] bytes) of arena `arena` that `term` created.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Location {
    /// The term whose arena it is.
    pub term: Term,
    /// Number of the arena in that term, from 0.
    pub arena: u32,
    /// First block of the place in the arena.
    pub block: u32,
}

/// Blocks in one arena.
#[expect(clippy::cast_possible_truncation, reason = "checked below")]
pub const BLOCKS_PER_ARENA: u32 = (ARENA_BYTES / CHUNK_BYTES_MIN) as u32;
const _: () = assert!(ARENA_BYTES / CHUNK_BYTES_MIN <= u32::MAX as u64);

impl Location {
    /// Byte offset of the place in its arena file.
    #[must_use]
    pub fn offset(self) -> u64 {
        u64::from(self.block) * CHUNK_BYTES_MIN
    }

    /// The place `blocks` further on in the same arena.
    #[must_use]
    pub fn plus(self, blocks: u32) -> Self {
        Self { block: self.block + blocks, ..self }
    }
}

impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}:{}", self.term.0, self.arena, self.block)
    }
}

/// A run of blocks in one arena.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct StoreExtent {
    /// First place of the run.
    pub at: Location,
    /// Number of blocks.
    pub blocks: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covering_takes_whole_chunks() {
        let size = ChunkSize::from_bytes(65536).expect("allowed");
        assert_eq!(size.covering(65535, 2), ChunkRange { first: Chunk(0), count: 2 });
        assert_eq!(size.covering(65536, 1), ChunkRange { first: Chunk(1), count: 1 });
        assert_eq!(size.blocks(), 16);
        assert_eq!(size.chunks_in(65537), 2);
    }

    #[test]
    fn only_powers_of_two_within_the_limits_are_chunk_sizes() {
        for bad in [0, 1, 2048, 4097, 12288, 8 << 20] {
            assert_eq!(ChunkSize::from_bytes(bad), None, "{bad}");
        }
        assert!(ChunkSize::try_from(200).is_err());
    }

    #[test]
    fn hostile_ranges_do_not_overflow() {
        let range = ChunkRange { first: Chunk(u64::MAX), count: 2 };
        assert_eq!(range.checked_end(), None);
        assert!(range.contains(Chunk(u64::MAX)));
    }
}
