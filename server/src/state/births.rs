//! The index by birth: which chunks have a version, or a head, that was born in an epoch.
//!
//! It is what makes deleting and diffing cost what changed: between two neighbouring snapshots, exactly the chunks with
//! a birth between them changed. Births "before all" are not in it. Kept as one bitmap a page of
//! [`CHUNKS_PER_PAGE`] chunks, under the epoch.

use bitvec::array::BitArray;
use bitvec::order::Lsb0;
use csnap_proto::ids::Epoch;
use csnap_proto::limits::CHUNKS_PER_PAGE;
use csnap_proto::message::volume::PAGE_BITS_BYTES;
use csnap_proto::units::Chunk;

use super::leaves::Leaves;
use super::record::ReapCursor;

/// Words of a page's bitmap.
const PAGE_WORDS: usize = PAGE_BITS_BYTES / 8;

type Bits = BitArray<[u64; PAGE_WORDS], Lsb0>;

#[derive(Clone, Debug, Default)]
pub(super) struct Births {
    pages: Leaves<(Epoch, u64), Bits>,
}

impl Births {
    /// Notes that something of `chunk` was born in `epoch`; whether that was news.
    pub(super) fn add(&mut self, epoch: Epoch, chunk: Chunk) -> bool {
        let (key, bit) = place(epoch, chunk);
        let mut bits = self.pages.get(key).unwrap_or_default();
        let was = bits.replace(bit, true);
        self.pages.insert(key, bits);
        !was
    }

    /// Nothing of `chunk` that was born in `epoch` is left; whether there was something.
    pub(super) fn take(&mut self, epoch: Epoch, chunk: Chunk) -> bool {
        let (key, bit) = place(epoch, chunk);
        let Some(mut bits) = self.pages.get(key) else { return false };
        let was = bits.replace(bit, false);
        if bits.any() {
            self.pages.insert(key, bits);
        } else {
            self.pages.remove(key);
        }
        was
    }

    /// Pages with births in the epochs from the cursor's to `until`, in order: the page's own cursor and its chunks.
    pub(super) fn pages(
        &self,
        from: ReapCursor,
        until: Epoch,
    ) -> impl Iterator<Item = (ReapCursor, impl Iterator<Item = Chunk> + use<>)> + '_ {
        let pages = self.pages.from((from.epoch, from.page));
        pages.take_while(move |((epoch, _), _)| *epoch <= until).map(|((epoch, page), bits)| {
            let first = page * CHUNKS_PER_PAGE;
            let chunks =
                (0..CHUNKS_PER_PAGE).filter(move |&bit| bits[index(bit)]).map(move |bit| Chunk(first + bit));
            (ReapCursor { epoch, page }, chunks)
        })
    }

    /// Every (epoch, chunk), in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Epoch, Chunk)> + '_ {
        let start = ReapCursor { epoch: Epoch(0), page: 0 };
        self.pages(start, Epoch(u64::MAX)).flat_map(|(at, chunks)| chunks.map(move |chunk| (at.epoch, chunk)))
    }
}

fn place(epoch: Epoch, chunk: Chunk) -> ((Epoch, u64), usize) {
    ((epoch, chunk.0 / CHUNKS_PER_PAGE), index(chunk.0 % CHUNKS_PER_PAGE))
}

fn index(bit: u64) -> usize {
    usize::try_from(bit).expect("a page has few bits")
}
