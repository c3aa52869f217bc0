//! One file of the simulated disk: what the running nodes read, and everything that the medium may hold instead.
//!
//! Each sector keeps its synced content and every content written since; a power loss leaves any one of them. The
//! size is kept in the same way. A write of what is there already adds nothing, so that zeroing a fresh segment costs
//! no memory and multiplies no crash states.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};

use super::SECTOR_BYTES;
use super::ranges::RangeSet;
use super::rng::{Digest, Rng};
use super::sectors::Sectors;
use crate::BLOCK_BYTES;

const SECTOR: u64 = SECTOR_BYTES as u64;
const BLOCK: u64 = BLOCK_BYTES as u64;

/// Unsynced contents remembered per sector. More would only multiply states that differ in which of many lost writes
/// was lost last; the newest are kept.
const VERSIONS_MAX: usize = 4;

/// A value that was set and not synced yet.
#[derive(Clone, Debug)]
pub(super) struct Unsynced<T> {
    /// Position among all changes of the disk: a sync covers what came before it.
    pub(super) seq: u64,
    pub(super) value: T,
    /// A sync of it failed: the kernel takes it for clean, so no later sync writes it.
    poisoned: bool,
}

impl<T: Clone> Unsynced<T> {
    fn new(seq: u64, value: T) -> Self {
        Self { seq, value, poisoned: false }
    }

    /// What a good sync of everything up to `upto` makes durable; it goes from the list, with what came before it.
    fn promote(list: &mut Vec<Self>, upto: u64) -> Option<T> {
        let last = list.iter().rposition(|u| u.seq <= upto && !u.poisoned)?;
        let value = list[last].value.clone();
        list.drain(..=last);
        Some(value)
    }

    /// What a failed sync leaves: nothing of it, or content in the cache that no sync will write any more.
    fn fail(list: &mut Vec<Self>, upto: u64, dropped: bool) {
        if dropped {
            list.retain(|u| u.seq > upto);
        } else {
            list.iter_mut().filter(|u| u.seq <= upto).for_each(|u| u.poisoned = true);
        }
    }
}

/// Content, size and space of a file.
#[derive(Clone, Debug, Default)]
pub(super) struct FileData {
    /// Synced content.
    durable: Sectors,
    /// Contents since, oldest first; no list is empty.
    unsynced: BTreeMap<u64, Vec<Unsynced<Bytes>>>,
    size_durable: u64,
    size_unsynced: Vec<Unsynced<u64>>,
    /// Blocks that take space now, and those that a sync made sure of.
    allocated: RangeSet,
    allocated_durable: RangeSet,
}

impl FileData {
    /// Size as the nodes see it, bytes.
    pub(super) fn size(&self) -> u64 {
        self.size_unsynced.last().map_or(self.size_durable, |u| u.value)
    }

    /// Blocks that take space.
    pub(super) fn allocated_blocks(&self) -> u64 {
        self.allocated.count()
    }

    /// Blocks of the byte range that take no space yet: what writing there would need.
    pub(super) fn missing_blocks(&self, offset: u64, len: u64) -> u64 {
        self.allocated.missing(offset / BLOCK..(offset + len).div_ceil(BLOCK))
    }

    /// Up to `len` bytes at `offset`; fewer only at the end of the file.
    pub(super) fn read(&self, offset: u64, len: usize) -> Bytes {
        let end = self.size().min(offset.saturating_add(len as u64));
        if offset >= end {
            return Bytes::new();
        }
        let first = offset / SECTOR;
        let mut out = BytesMut::new();
        for sector in first..end.div_ceil(SECTOR) {
            out.extend_from_slice(self.sector(sector));
        }
        let skip = to_usize(offset - first * SECTOR);
        out.freeze().slice(skip..skip + to_usize(end - offset))
    }

    /// Puts `data` at `offset`. Of its sectors only those are written that `survives` says, in order.
    pub(super) fn write(&mut self, seq: u64, offset: u64, data: &Bytes, mut survives: impl FnMut() -> bool) {
        assert_aligned(offset, data.len());
        let mut end = 0;
        for index in 0..data.len() / SECTOR_BYTES {
            if survives() {
                let at = index * SECTOR_BYTES;
                self.put(seq, offset / SECTOR + index as u64, data.slice(at..at + SECTOR_BYTES));
                end = offset + (at + SECTOR_BYTES) as u64;
            }
        }
        if end > offset {
            self.allocated.insert(offset / BLOCK..end.div_ceil(BLOCK));
        }
        if end > self.size() {
            self.size_unsynced.push(Unsynced::new(seq, end));
        }
    }

    /// Sets the size; what lies beyond it reads as zeros if the file grows again.
    pub(super) fn set_len(&mut self, seq: u64, len: u64) {
        let size = self.size();
        if len < size {
            self.zero(seq, len, size);
            self.allocated.remove(len.div_ceil(BLOCK)..u64::MAX);
        }
        if len != size {
            self.size_unsynced.push(Unsynced::new(seq, len));
        }
    }

    /// Takes the space of the byte range; the size stays.
    pub(super) fn reserve(&mut self, offset: u64, len: u64) {
        self.allocated.insert(offset / BLOCK..(offset + len).div_ceil(BLOCK));
    }

    /// Makes the byte range read as zeros and gives back the blocks that lie in it whole.
    pub(super) fn punch(&mut self, seq: u64, offset: u64, len: u64) {
        self.zero(seq, offset, offset + len);
        self.allocated.remove(offset.div_ceil(BLOCK)..(offset + len) / BLOCK);
    }

    /// Makes durable what was done up to `upto`.
    pub(super) fn sync(&mut self, upto: u64) {
        let Self { durable, unsynced, .. } = self;
        unsynced.retain(|sector, list| {
            if let Some(content) = Unsynced::promote(list, upto) {
                durable.set(*sector, content);
            }
            !list.is_empty()
        });
        if let Some(size) = Unsynced::promote(&mut self.size_unsynced, upto) {
            self.size_durable = size;
        }
        self.allocated_durable = self.allocated.clone();
    }

    /// A sync that failed: everything up to `upto` is gone at once, or stays readable and is never written.
    pub(super) fn sync_failed(&mut self, upto: u64, rng: &mut Rng) {
        let dropped = rng.chance(0.5);
        self.unsynced.retain(|_, list| {
            Unsynced::fail(list, upto, dropped);
            !list.is_empty()
        });
        // The size is metadata of the journalled kind: it stays, and stays undurable.
        Unsynced::fail(&mut self.size_unsynced, upto, false);
    }

    /// Whether a power loss would leave it as it is.
    pub(super) fn is_synced(&self) -> bool {
        let content = self.unsynced.is_empty() && self.size_unsynced.is_empty();
        content && self.allocated == self.allocated_durable
    }

    /// Sectors with more than one possible content, with what they may hold beside the synced one.
    pub(super) fn unsynced_sectors(&self) -> impl Iterator<Item = (u64, &[Unsynced<Bytes>])> {
        self.unsynced.iter().map(|(sector, list)| (*sector, list.as_slice()))
    }

    /// Sizes beside the synced one.
    pub(super) fn unsynced_sizes(&self) -> &[Unsynced<u64>] {
        &self.size_unsynced
    }

    /// The synced size, bytes.
    pub(super) fn durable_size(&self) -> u64 {
        self.size_durable
    }

    /// Which contents of an unsynced sector are the same: for each choice, the first that is like it. Choice 0 is the
    /// synced content, the others are the unsynced ones.
    pub(super) fn alike(&self, sector: u64, versions: &[Unsynced<Bytes>]) -> Vec<usize> {
        let content = |choice: usize| match choice {
            0 => self.durable.get(sector),
            _ => &versions[choice - 1].value[..],
        };
        let first_like =
            |choice| (0..choice).find(|earlier| content(*earlier) == content(choice)).unwrap_or(choice);
        (0..=versions.len()).map(first_like).collect()
    }

    /// The file after a power loss, by a choice for each unsynced sector in order, and one for the size. Reservations
    /// that no sync covered are lost.
    pub(super) fn after_power_loss(&self, sector_choices: &[usize], size_choice: usize) -> Self {
        let size =
            if size_choice == 0 { self.size_durable } else { self.size_unsynced[size_choice - 1].value };
        let mut durable = self.durable.clone();
        let mut allocated = self.allocated_durable.clone();
        for ((sector, versions), choice) in self.unsynced.iter().zip(sector_choices) {
            if *choice > 0 && sector * SECTOR < size {
                durable.set(*sector, versions[choice - 1].value.clone());
                let block = sector * SECTOR / BLOCK;
                allocated.insert(block..block + 1);
            }
        }
        durable.truncate(size.div_ceil(SECTOR));
        if !size.is_multiple_of(SECTOR) {
            let mut content = durable.get(size / SECTOR).to_vec();
            content[to_usize(size % SECTOR)..].fill(0);
            durable.set(size / SECTOR, content.into());
        }
        let allocated_durable = allocated.clone();
        Self { durable, size_durable: size, allocated, allocated_durable, ..Self::default() }
    }

    /// Changes bytes in every content that a sector may have, behind all rules.
    pub(super) fn poke(&mut self, offset: u64, bytes: &[u8]) {
        assert!(offset + bytes.len() as u64 <= self.size(), "a poke must lie in the file");
        let end = offset + bytes.len() as u64;
        for sector in offset / SECTOR..end.div_ceil(SECTOR) {
            let start = sector * SECTOR;
            let (from, to) = (offset.max(start), end.min(start + SECTOR));
            let piece = &bytes[to_usize(from - offset)..to_usize(to - offset)];
            let changed = |content: &[u8]| {
                let mut content = content.to_vec();
                content[to_usize(from - start)..to_usize(to - start)].copy_from_slice(piece);
                Bytes::from(content)
            };
            self.durable.set(sector, changed(self.durable.get(sector)));
            for version in self.unsynced.get_mut(&sector).into_iter().flatten() {
                version.value = changed(&version.value);
            }
        }
        self.allocated.insert(offset / BLOCK..end.div_ceil(BLOCK));
        self.allocated_durable = self.allocated.clone();
    }

    /// Everything that a reader, or a reader after a power loss, could tell.
    pub(super) fn digest(&self, digest: &mut Digest) {
        digest.number(self.size_durable);
        for size in &self.size_unsynced {
            digest.number(size.value);
        }
        self.durable.digest(digest);
        for (sector, list) in &self.unsynced {
            digest.number(*sector);
            list.iter().for_each(|u| digest.bytes(&u.value));
        }
    }

    /// What the nodes read in a sector.
    fn sector(&self, sector: u64) -> &[u8] {
        match self.unsynced.get(&sector).and_then(|list| list.last()) {
            Some(newest) => &newest.value,
            None => self.durable.get(sector),
        }
    }

    fn put(&mut self, seq: u64, sector: u64, content: Bytes) {
        let newest = self.unsynced.get(&sector).and_then(|list| list.last());
        let poisoned = newest.is_some_and(|u| u.poisoned);
        if self.sector(sector) == &content[..] && !poisoned {
            return;
        }
        let list = self.unsynced.entry(sector).or_default();
        if list.len() == VERSIONS_MAX {
            list.remove(0);
        }
        list.push(Unsynced::new(seq, content));
    }

    /// Zeros the bytes `from..to`. Only sectors that hold something are looked at: holes may be huge.
    fn zero(&mut self, seq: u64, from: u64, to: u64) {
        if from >= to {
            return;
        }
        let touched = from / SECTOR..to.div_ceil(SECTOR);
        let mut sectors = self.durable.within(touched.clone());
        sectors.extend(self.unsynced.range(touched).map(|(sector, _)| *sector));
        sectors.sort_unstable();
        sectors.dedup();
        for sector in sectors {
            let start = sector * SECTOR;
            let mut content = self.sector(sector).to_vec();
            content[to_usize(from.saturating_sub(start))..to_usize((to - start).min(SECTOR))].fill(0);
            self.put(seq, sector, content.into());
        }
    }
}

/// Every offset and length that is written is a multiple of [`BLOCK_BYTES`]: direct I/O demands it, so the simulation
/// does.
pub(super) fn assert_aligned(offset: u64, len: usize) {
    assert!(offset.is_multiple_of(BLOCK), "write at {offset} is not aligned to a block");
    assert!(len.is_multiple_of(BLOCK_BYTES), "write of {len} bytes is not whole blocks");
}

fn to_usize(n: u64) -> usize {
    usize::try_from(n).expect("a length that was a usize, or less than a sector")
}
