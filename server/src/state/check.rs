//! The invariants of the state, verified: by the loader, by the offline verifier, by tests.

use std::collections::{BTreeMap, BTreeSet};

use csnap_proto::ids::{Epoch, VolumeId};
use csnap_proto::units::{Chunk, StoreExtent};

use super::arena::Mark;
use super::record::{Attached, Kept};
use super::volume::Volume;
use super::{Corrupt, State};

/// Problems reported of one state; a damaged one has either few or no end of them.
const PROBLEMS_MAX: usize = 100;

/// Gathers problems, up to a limit.
struct Report(Vec<String>);

impl Report {
    fn add(&mut self, problem: impl Into<String>) {
        if self.0.len() < PROBLEMS_MAX {
            self.0.push(problem.into());
        }
    }

    fn expect(&mut self, good: bool, problem: impl FnOnce() -> String) {
        if !good {
            self.add(problem());
        }
    }
}

impl State {
    /// Verifies every invariant; each problem is one line. Costs a walk over everything.
    pub fn check(&self) -> Result<(), Vec<String>> {
        let mut report = Report(Vec::new());
        self.check_names(&mut report);
        self.sessions.check(&mut |problem| report.add(problem));
        self.check_attached(&mut report);
        for volume in self.volumes.values() {
            volume.snapshots.check(&mut |problem| report.add(format!("volume {}: {problem}", volume.name)));
            volume.check_epochs(&mut report);
            volume.check_versions(&mut report);
            volume.check_births(&mut report);
            volume.check_dead(&mut report);
        }
        self.check_places(&mut report);
        if report.0.is_empty() { Ok(()) } else { Err(report.0) }
    }

    /// What of the invariants loading row by row cannot see: what one row says of another.
    pub(super) fn check_loaded(&self) -> Result<(), Corrupt> {
        let mut report = Report(Vec::new());
        self.check_attached(&mut report);
        for volume in self.volumes.values() {
            volume.check_epochs(&mut report);
            volume.check_versions(&mut report);
        }
        report.0.into_iter().next().map_or(Ok(()), |what| Err(Corrupt::new(what)))
    }

    fn check_names(&self, report: &mut Report) {
        let named: BTreeMap<_, _> = self.volumes().map(|volume| (volume.name.clone(), volume.id)).collect();
        report.expect(named == self.names, || "the names of volumes do not match them".to_owned());
    }

    fn check_attached(&self, report: &mut Report) {
        for session in self.sessions.iter() {
            if let Attached::Writer(volume) = session.attached {
                report.expect(self.volume(volume).is_some(), || {
                    format!("session {} writes no volume", session.id)
                });
            }
            let closed = session.confirmed < self.space.frees.open.id;
            report.expect(closed, || format!("session {} confirmed what was never freed", session.id));
        }
    }

    /// Every place is kept once, by a version or a batch, and exactly those are taken.
    fn check_places(&self, report: &mut Report) {
        let mut kept: BTreeSet<StoreExtent> = BTreeSet::new();
        let mut stored: BTreeMap<VolumeId, u64> = BTreeMap::new();
        for volume in self.volumes.values() {
            for ((chunk, _), place) in volume.map.versions() {
                let Kept::Store(at) = place else { continue };
                *stored.entry(volume.id).or_default() += 1;
                let fresh = kept.insert(StoreExtent { at, blocks: volume.chunk.blocks() });
                report.expect(fresh, || {
                    format!("volume {}: {chunk:?} is kept at {at:?}, as another is", volume.name)
                });
            }
            let counted = stored.get(&volume.id).copied().unwrap_or(0);
            report.expect(counted == volume.map.stored(), || {
                format!("volume {}: wrong count of chunks", volume.name)
            });
        }
        for (batch, _, extents) in self.space.frees.iter() {
            for extent in extents {
                report.expect(kept.insert(*extent), || format!("batch {batch} frees {:?} twice", extent.at));
            }
        }
        let mut blocks: BTreeMap<_, u32> = BTreeMap::new();
        let mut before: Option<StoreExtent> = None;
        for extent in &kept {
            let key = (extent.at.term, extent.at.arena);
            let apart = before
                .is_none_or(|b| (b.at.term, b.at.arena) != key || b.at.block + b.blocks <= extent.at.block);
            report.expect(apart, || format!("two things are kept at {:?}", extent.at));
            *blocks.entry(key).or_default() += extent.blocks;
            let arena = self.space.arenas.get(&key);
            let whole =
                |mark| arena.is_some_and(|arena| arena.all(mark, extent.at.block, extent.blocks, true));
            report.expect(whole(Mark::Taken) && whole(Mark::Backed), || {
                format!("what is kept at {:?} is not marked so, or not reserved", extent.at)
            });
            before = Some(*extent);
        }
        for (key, arena) in &self.space.arenas {
            let counted = blocks.get(key).copied().unwrap_or(0);
            report.expect(arena.taken() == counted, || {
                format!("arena {}/{} has {} blocks taken, {counted} are kept", key.0, key.1, arena.taken())
            });
        }
    }
}

impl Volume {
    fn check_epochs(&self, report: &mut Report) {
        let name = &self.name;
        let live: Vec<Epoch> = self.snapshots.from(Epoch(0)).map(|snapshot| snapshot.epoch).collect();
        let ended = |epoch: &Epoch| (Epoch::FIRST..self.epoch).contains(epoch);
        let good = live.iter().chain(&*self.dying).all(ended);
        report.expect(good, || format!("volume {name}: a snapshot of an epoch that has not ended"));
        let apart = live.iter().all(|epoch| !self.dying.contains(epoch));
        report.expect(apart, || format!("volume {name}: a snapshot both lives and is deleted"));
        let at = self.reaping.map(|reaping| reaping.snapshot);
        report.expect(at.is_none_or(|at| self.dying.contains(&at)), || {
            format!("volume {name}: a snapshot is reaped that was not deleted")
        });
        report.expect(!self.deleted || live.is_empty(), || format!("volume {name}: deleted, with snapshots"));
        let sized = self.snapshots.from(Epoch(0)).all(|snapshot| snapshot.size_bytes <= self.size_bytes);
        report.expect(sized, || format!("volume {name}: a snapshot is larger than its volume"));
    }

    /// Births ascend up to the head's, which is there exactly where a version is.
    fn check_versions(&self, report: &mut Report) {
        let mut versions = self.map.versions().peekable();
        for (chunk, head) in self.map.heads() {
            let mut count = 0;
            while let Some(((_, birth), _)) = versions.next_if(|((c, _), _)| *c == chunk) {
                count += 1;
                report.expect(birth < head, || {
                    format!("volume {}: {chunk:?} has a version as young as its head", self.name)
                });
            }
            let inside = count > 0 && chunk.0 < self.chunks() && head <= self.epoch;
            report.expect(inside, || format!("volume {}: the head birth of {chunk:?} cannot be", self.name));
        }
        report.expect(versions.next().is_none(), || {
            format!("volume {}: a version without a head birth", self.name)
        });
    }

    fn check_births(&self, report: &mut Report) {
        let heads = self.map.heads().map(|(chunk, birth)| (birth, chunk));
        let versions = self.map.versions().map(|((chunk, birth), _)| (birth, chunk));
        let born: BTreeSet<(Epoch, Chunk)> =
            heads.chain(versions).filter(|(birth, _)| *birth > Epoch::BEFORE_ALL).collect();
        let same = born.iter().copied().eq(self.map.births().iter());
        report.expect(same, || format!("volume {}: the index by birth does not match the map", self.name));
    }

    /// A version that no live snapshot reads waits for a deleted one to be reaped.
    fn check_dead(&self, report: &mut Report) {
        for ((chunk, birth), _) in self.map.versions() {
            let end = self.map.end_of(chunk, birth);
            let read = self.snapshots.any_within(birth, end);
            let waits = birth < end && self.dying.range(birth..end).next().is_some();
            report.expect(read || waits, || {
                format!("volume {}: nobody reads or reaps {chunk:?} of epoch {birth}", self.name)
            });
        }
    }
}
