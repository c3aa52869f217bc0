//! Reaping: the versions that only deleted snapshots held go, in slices, in the background.
//!
//! A version dies when no live snapshot's epoch lies between its birth and its end (the birth of its successor). Call
//! an epoch of a snapshot that is live, or deleted and not reaped yet, a *boundary*. Reaping snapshot `s` looks at
//! everything that was born after `s` and up to the next boundary: of each such chunk, the versions that are older than
//! that birth and younger than the youngest live snapshot before `s` are dead. So deleting costs what changed between
//! two neighbours, and any number of snapshots deleted together cost one look at each birth.
//!
//! Nothing dead is missed: the last boundary inside a dead version's span is a deleted snapshot, and reaping that one
//! comes upon the version's end. This needs the next boundary to stay where it is while `s` is reaped, hence one
//! snapshot of a volume at a time, finished once begun; those deleted meanwhile wait, oldest first.

use csnap_proto::ids::{Epoch, FreeBatchId, VolumeId};
use csnap_proto::units::{Chunk, ChunkRange, StoreExtent};

use super::free::push_extent;
use super::record::{DeadRun, Kept, RUNS_PER_RECORD_MAX, ReapCursor, Record};
use super::volume::{Reaping, Volume};
use super::{Corrupt, State};

/// Pages of births that one slice looks at, at most: when nothing dies, this bounds its work.
const PAGES_PER_SLICE_MAX: usize = 256;

impl State {
    /// The next slice of background work, if there is any: versions to reap, at most `versions` of them, or a batch
    /// of frees to close. To be recorded as it is.
    #[must_use]
    pub fn next_reap(&self, versions: usize) -> Option<Record> {
        let open = self.space.open_batch();
        if open.is_full() {
            return Some(Record::FreeBatchSealed { batch: open.id });
        }
        let budget = versions.clamp(1, RUNS_PER_RECORD_MAX);
        let slice = self.volumes.values().find_map(|volume| volume.next_slice(budget, open.id));
        slice.or_else(|| (!open.is_empty()).then_some(Record::FreeBatchSealed { batch: open.id }))
    }

    pub(super) fn apply_reaped(
        &mut self,
        volume: VolumeId,
        snapshot: Epoch,
        dead: &[DeadRun],
        next: ReapCursor,
        batch: FreeBatchId,
    ) -> Result<(), Corrupt> {
        if batch != self.space.open_batch().id {
            return Err(Corrupt::new("reaped into a batch that is not the open one"));
        }
        let reaped = self.any_volume_mut(volume)?;
        reaped.advance(snapshot, next)?;
        let blocks = reaped.chunk.blocks();
        let mut freed: Vec<StoreExtent> = Vec::new();
        for run in dead {
            reaped.check_range(run.range)?;
            for chunk in run.range.chunks() {
                if let Kept::Store(at) = reaped.reap(chunk, run.birth)? {
                    push_extent(&mut freed, StoreExtent { at, blocks });
                }
            }
        }
        self.space.free(volume, &freed);
        Ok(())
    }

    pub(super) fn apply_snapshot_reaped(&mut self, volume: VolumeId, snapshot: Epoch) -> Result<(), Corrupt> {
        self.any_volume_mut(volume)?.finish_reaping(snapshot)
    }
}

impl Volume {
    /// The next slice of this volume's work.
    fn next_slice(&self, budget: usize, batch: FreeBatchId) -> Option<Record> {
        let start =
            |snapshot: Epoch| Reaping { snapshot, next: ReapCursor { epoch: snapshot.next(), page: 0 } };
        let reaping = self.reaping.or_else(|| self.dying.first().copied().map(start))?;
        let snapshot = reaping.snapshot;
        let mut dead: Vec<(Epoch, Chunk)> = Vec::new();
        let mut next = reaping.next;
        let pages = self.map.births().pages(reaping.next, self.next_boundary(snapshot));
        for (looked, (page, chunks)) in pages.enumerate() {
            if looked == PAGES_PER_SLICE_MAX {
                return Some(self.reaped(snapshot, dead, next, batch));
            }
            for chunk in chunks {
                self.collect_dead(snapshot, chunk, page.epoch, &mut dead);
                if dead.len() >= budget {
                    // Those beyond the budget are found again: the cursor stays on this page.
                    dead.truncate(budget);
                    return Some(self.reaped(snapshot, dead, page, batch));
                }
            }
            next = ReapCursor { epoch: page.epoch, page: page.page + 1 };
        }
        if dead.is_empty() {
            return Some(Record::SnapshotReaped { volume: self.id, snapshot });
        }
        Some(self.reaped(snapshot, dead, next, batch))
    }

    /// The dead versions of `chunk` that end at or before `end`, a birth in the stretch that reaping `snapshot` looks at.
    fn collect_dead(&self, snapshot: Epoch, chunk: Chunk, end: Epoch, dead: &mut Vec<(Epoch, Chunk)>) {
        let last_live = self.snapshots.youngest_before(snapshot);
        let mut end = end;
        while let Some((birth, _)) = self.map.version_before(chunk, end) {
            if last_live.is_some_and(|live| birth <= live) {
                break;
            }
            dead.push((birth, chunk));
            end = birth;
        }
    }

    fn reaped(
        &self,
        snapshot: Epoch,
        mut dead: Vec<(Epoch, Chunk)>,
        next: ReapCursor,
        batch: FreeBatchId,
    ) -> Record {
        dead.sort_unstable();
        dead.dedup();
        let mut runs: Vec<DeadRun> = Vec::new();
        for (birth, chunk) in dead {
            match runs.last_mut() {
                Some(run) if run.birth == birth && run.range.end() == chunk => run.range.count += 1,
                _ => runs.push(DeadRun { range: ChunkRange::one(chunk), birth }),
            }
        }
        Record::Reaped { volume: self.id, snapshot, dead: runs, next, batch }
    }

    /// The next epoch after `snapshot` of a snapshot that is live or not reaped yet; the current one if there is none.
    fn next_boundary(&self, snapshot: Epoch) -> Epoch {
        let dying = self.dying.range(snapshot.next()..).next().copied();
        let live = self.snapshots.oldest_after(snapshot);
        [dying, live].into_iter().flatten().min().unwrap_or(self.epoch)
    }

    fn advance(&mut self, snapshot: Epoch, next: ReapCursor) -> Result<(), Corrupt> {
        let fits = match self.reaping {
            Some(reaping) => reaping.snapshot == snapshot && reaping.next <= next,
            None => self.dying.contains(&snapshot) && snapshot < next.epoch,
        };
        if !fits {
            return Err(Corrupt::new("reaped for a snapshot that is not being reaped, or backwards"));
        }
        self.reaping = Some(Reaping { snapshot, next });
        Ok(())
    }

    fn reap(&mut self, chunk: Chunk, birth: Epoch) -> Result<Kept, Corrupt> {
        if birth < self.epoch && self.snapshots.any_within(birth, self.map.end_of(chunk, birth)) {
            return Err(Corrupt::new("reaped a version that a live snapshot reads"));
        }
        self.map.remove(chunk, birth).ok_or_else(|| Corrupt::new("reaped a version that is not there"))
    }

    fn finish_reaping(&mut self, snapshot: Epoch) -> Result<(), Corrupt> {
        if self.reaping.is_some_and(|reaping| reaping.snapshot != snapshot) || !self.dying.contains(&snapshot)
        {
            return Err(Corrupt::new("finished a snapshot that is not being reaped"));
        }
        std::sync::Arc::make_mut(&mut self.dying).remove(&snapshot);
        self.reaping = None;
        Ok(())
    }
}
