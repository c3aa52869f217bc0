//! Frees: places that no version refers to any more, on their way to being used again.
//!
//! A reader may have learned a place and be reading it this moment. So what is freed goes to the *open* batch; the
//! batch is *sealed*, and each session that read a snapshot of one of its volumes by then must confirm that it forgot
//! the places, with no I/O in flight, or end. Only then is the batch reusable. Sessions that come later cannot have
//! learned them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use csnap_proto::ids::{FreeBatchId, SessionId, VolumeId};
use csnap_proto::units::StoreExtent;

use super::Corrupt;

/// Extents after which the open batch is closed: what is told to clients in one message stays far below a frame.
const BATCH_EXTENTS_MAX: usize = 8192;

/// Batch numbers stay below this, so that the next one always exists.
pub(super) const BATCH_ID_MAX: FreeBatchId = FreeBatchId(1 << 48);

/// The extents of one batch, by volume.
pub(super) type Freed = BTreeMap<VolumeId, Vec<StoreExtent>>;

/// The batch that frees go to.
#[derive(Clone, Debug)]
pub(super) struct OpenBatch {
    pub(super) id: FreeBatchId,
    freed: Freed,
    blocks: u64,
    extents: usize,
}

impl OpenBatch {
    pub(super) fn is_empty(&self) -> bool {
        self.freed.is_empty()
    }

    pub(super) fn is_full(&self) -> bool {
        self.extents >= BATCH_EXTENTS_MAX
    }

    pub(super) fn add(&mut self, volume: VolumeId, extents: &[StoreExtent]) {
        if extents.is_empty() {
            return;
        }
        let of_volume = self.freed.entry(volume).or_default();
        let before = of_volume.len();
        for extent in extents {
            push_extent(of_volume, *extent);
            self.blocks += u64::from(extent.blocks);
        }
        self.extents += of_volume.len() - before;
    }
}

/// A closed batch.
#[derive(Clone, Debug)]
pub(super) struct SealedBatch {
    pub(super) freed: Arc<Freed>,
    pub(super) blocks: u64,
    /// Sessions that did not confirm yet.
    pub(super) waiting: BTreeSet<SessionId>,
}

#[derive(Clone, Debug)]
pub(super) struct Frees {
    pub(super) open: OpenBatch,
    pub(super) sealed: BTreeMap<FreeBatchId, SealedBatch>,
}

impl Frees {
    /// Nothing freed; the next batch is `id`.
    pub(super) fn new(id: FreeBatchId) -> Self {
        Self { open: OpenBatch { id, freed: Freed::new(), blocks: 0, extents: 0 }, sealed: BTreeMap::new() }
    }

    /// Blocks in batches that are not reusable yet.
    pub(super) fn blocks(&self) -> u64 {
        self.open.blocks + self.sealed.values().map(|batch| batch.blocks).sum::<u64>()
    }

    /// Closes the open batch; `readers` names the sessions that read a volume's snapshots.
    pub(super) fn seal(
        &mut self,
        batch: FreeBatchId,
        readers: impl Fn(VolumeId) -> BTreeSet<SessionId>,
    ) -> Result<(), Corrupt> {
        if batch != self.open.id || self.open.is_empty() || batch >= BATCH_ID_MAX {
            return Err(Corrupt::new("sealed a batch that is not the open one, or an empty one"));
        }
        let next = Self::new(batch.next()).open;
        let closed = std::mem::replace(&mut self.open, next);
        let waiting = closed.freed.keys().flat_map(|volume| readers(*volume)).collect();
        self.sealed
            .insert(batch, SealedBatch { freed: Arc::new(closed.freed), blocks: closed.blocks, waiting });
        Ok(())
    }

    /// `session` forgot every batch up to `upto`, or, without a number, is over.
    pub(super) fn confirm(&mut self, session: SessionId, upto: Option<FreeBatchId>) {
        let upto = upto.unwrap_or(FreeBatchId(u64::MAX));
        for (_, batch) in self.sealed.range_mut(..=upto) {
            batch.waiting.remove(&session);
        }
    }

    /// Takes a batch out that nobody is waited for.
    pub(super) fn release(&mut self, batch: FreeBatchId) -> Result<Arc<Freed>, Corrupt> {
        match self.sealed.get(&batch) {
            Some(sealed) if sealed.waiting.is_empty() => {
                Ok(self.sealed.remove(&batch).expect("just looked up").freed)
            }
            Some(_) => Err(Corrupt::new("a batch is reused before every session confirmed it")),
            None => Err(Corrupt::new("no such batch of frees")),
        }
    }

    /// All batches, the open one last: number, volume, extents.
    pub(super) fn iter(&self) -> impl Iterator<Item = (FreeBatchId, VolumeId, &[StoreExtent])> {
        let sealed = self.sealed.iter().map(|(id, batch)| (*id, &*batch.freed));
        let all = sealed.chain(std::iter::once((self.open.id, &self.open.freed)));
        all.flat_map(|(id, freed)| {
            freed.iter().map(move |(volume, extents)| (id, *volume, extents.as_slice()))
        })
    }

    /// Loading: extents of a batch; those below the open one are sealed.
    pub(super) fn load(
        &mut self,
        id: FreeBatchId,
        volume: VolumeId,
        extents: &[StoreExtent],
    ) -> Result<(), Corrupt> {
        if id > self.open.id {
            return Err(Corrupt::new("a batch of frees above the open one"));
        }
        if id == self.open.id {
            self.open.add(volume, extents);
            return Ok(());
        }
        let new = || SealedBatch { freed: Arc::default(), blocks: 0, waiting: BTreeSet::new() };
        let batch = self.sealed.entry(id).or_insert_with(new);
        let of_volume = Arc::make_mut(&mut batch.freed).entry(volume).or_default();
        for extent in extents {
            push_extent(of_volume, *extent);
            batch.blocks += u64::from(extent.blocks);
        }
        Ok(())
    }

    /// Loading: sessions that a batch waits for.
    pub(super) fn load_waiting(&mut self, id: FreeBatchId, sessions: &[SessionId]) -> Result<(), Corrupt> {
        let batch =
            self.sealed.get_mut(&id).ok_or_else(|| Corrupt::new("waiting for a batch that is not there"))?;
        batch.waiting.extend(sessions);
        Ok(())
    }
}

/// Appends an extent, joining it to the last where it follows that.
pub(super) fn push_extent(extents: &mut Vec<StoreExtent>, next: StoreExtent) {
    match extents.last_mut() {
        Some(last)
            if (last.at.term, last.at.arena) == (next.at.term, next.at.arena)
                && last.at.block + last.blocks == next.at.block =>
        {
            last.blocks += next.blocks;
        }
        _ => extents.push(next),
    }
}
