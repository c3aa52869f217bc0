//! Volumes and their snapshots: names, epochs, and who lives.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use csnap_proto::ids::{Epoch, Name, RequestToken, SessionId, VolumeId};
use csnap_proto::units::{ChunkRange, ChunkSize, WallMillis};
use serde::{Deserialize, Serialize};

use super::Corrupt;
use super::map::ChunkMap;
use super::record::{Kept, Origin, ReapCursor};

/// Epochs stay below this, so that the next one always exists: a snapshot every microsecond for nine years.
pub(super) const EPOCH_MAX: Epoch = Epoch(1 << 48);

/// A snapshot: an epoch that ended, with a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Identity in its volume.
    pub epoch: Epoch,
    /// Name in its volume.
    pub name: Name,
    /// Size of the volume then, bytes.
    pub size_bytes: u64,
    /// For people.
    pub created: WallMillis,
    /// Of the request that made it.
    pub token: RequestToken,
}

/// The live snapshots of one volume.
#[derive(Clone, Debug, Default)]
pub(super) struct Snapshots {
    live: BTreeMap<Epoch, Snapshot>,
    names: BTreeMap<Name, Epoch>,
}

impl Snapshots {
    pub(super) fn len(&self) -> usize {
        self.live.len()
    }

    pub(super) fn get(&self, epoch: Epoch) -> Option<&Snapshot> {
        self.live.get(&epoch)
    }

    pub(super) fn by_name(&self, name: &Name) -> Option<&Snapshot> {
        self.live.get(self.names.get(name)?)
    }

    pub(super) fn from(&self, epoch: Epoch) -> impl Iterator<Item = &Snapshot> {
        self.live.range(epoch..).map(|(_, snapshot)| snapshot)
    }

    pub(super) fn youngest(&self) -> Option<Epoch> {
        self.live.last_key_value().map(|(epoch, _)| *epoch)
    }

    pub(super) fn youngest_before(&self, epoch: Epoch) -> Option<Epoch> {
        self.live.range(..epoch).next_back().map(|(epoch, _)| *epoch)
    }

    pub(super) fn oldest_after(&self, epoch: Epoch) -> Option<Epoch> {
        self.live.range(epoch.next()..).next().map(|(epoch, _)| *epoch)
    }

    /// Whether a snapshot reads what was on the head from epoch `birth` up to, not including, epoch `end`.
    pub(super) fn any_within(&self, birth: Epoch, end: Epoch) -> bool {
        birth < end && self.live.range(birth..end).next().is_some()
    }

    pub(super) fn add(&mut self, snapshot: Snapshot) -> Result<(), Corrupt> {
        if self.live.contains_key(&snapshot.epoch) || self.names.contains_key(&snapshot.name) {
            return Err(Corrupt::new(format!("snapshot {} exists", snapshot.name)));
        }
        self.names.insert(snapshot.name.clone(), snapshot.epoch);
        self.live.insert(snapshot.epoch, snapshot);
        Ok(())
    }

    fn rename(&mut self, epoch: Epoch, name: &Name) -> Result<(), Corrupt> {
        let snapshot = self.live.get_mut(&epoch).ok_or_else(no_snapshot)?;
        if self.names.get(name).is_some_and(|other| *other != epoch) {
            return Err(Corrupt::new(format!("snapshot {name} exists")));
        }
        self.names.remove(&snapshot.name);
        self.names.insert(name.clone(), epoch);
        snapshot.name = name.clone();
        Ok(())
    }

    fn remove(&mut self, epoch: Epoch) -> Result<(), Corrupt> {
        let snapshot = self.live.remove(&epoch).ok_or_else(no_snapshot)?;
        self.names.remove(&snapshot.name);
        Ok(())
    }

    /// Problems of the index of names.
    pub(super) fn check(&self, report: &mut dyn FnMut(String)) {
        let named = |s: &Snapshot| self.names.get(&s.name) == Some(&s.epoch);
        if self.names.len() != self.live.len() || !self.live.values().all(named) {
            report("the names of snapshots do not match them".to_owned());
        }
    }
}

fn no_snapshot() -> Corrupt {
    Corrupt::new("no such snapshot")
}

/// The snapshot of a volume that is being reaped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Reaping {
    pub(super) snapshot: Epoch,
    pub(super) next: ReapCursor,
}

/// A volume.
#[derive(Clone, Debug)]
pub struct Volume {
    /// Identity, never reused.
    pub id: VolumeId,
    /// Name; of a deleted volume, its last.
    pub name: Name,
    /// Bytes.
    pub size_bytes: u64,
    /// Chunk size.
    pub chunk: ChunkSize,
    /// Where the head lies.
    pub origin: Origin,
    /// For people.
    pub created: WallMillis,
    /// The epoch that the next snapshot will be.
    pub epoch: Epoch,
    /// Hidden until published: this session fills it.
    pub importer: Option<SessionId>,
    pub(super) deleted: bool,
    pub(super) snapshots: Arc<Snapshots>,
    /// Deleted snapshots whose versions are not reaped yet.
    pub(super) dying: Arc<BTreeSet<Epoch>>,
    pub(super) reaping: Option<Reaping>,
    pub(super) map: ChunkMap,
}

impl Volume {
    /// Chunks of the volume; the last may be partial.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.chunk.chunks_in(self.size_bytes)
    }

    pub(super) fn check_range(&self, range: ChunkRange) -> Result<(), Corrupt> {
        let inside = range.checked_end().is_some_and(|end| end.0 <= self.chunks());
        if inside { Ok(()) } else { Err(Corrupt::new("chunks beyond the end of the volume")) }
    }

    pub(super) fn create_snapshot(&mut self, snapshot: Snapshot) -> Result<(), Corrupt> {
        if snapshot.epoch != self.epoch || self.epoch >= EPOCH_MAX || snapshot.size_bytes != self.size_bytes {
            return Err(Corrupt::new("a snapshot of another epoch or size than the volume's"));
        }
        Arc::make_mut(&mut self.snapshots).add(snapshot)?;
        self.epoch = self.epoch.next();
        Ok(())
    }

    pub(super) fn rename_snapshot(&mut self, epoch: Epoch, name: &Name) -> Result<(), Corrupt> {
        Arc::make_mut(&mut self.snapshots).rename(epoch, name)
    }

    pub(super) fn delete_snapshot(&mut self, epoch: Epoch) -> Result<(), Corrupt> {
        Arc::make_mut(&mut self.snapshots).remove(epoch)?;
        Arc::make_mut(&mut self.dying).insert(epoch);
        Ok(())
    }

    /// Chunks of the store that only this live snapshot reads: each ends before the next snapshot, and is younger than
    /// the one before.
    pub(super) fn own_chunks(&self, epoch: Epoch) -> u64 {
        let before = self.snapshots.youngest_before(epoch);
        let until = self.snapshots.oldest_after(epoch).unwrap_or(self.epoch);
        let from = ReapCursor { epoch: epoch.next(), page: 0 };
        let ends = self.map.births().pages(from, until);
        let own = ends.flat_map(|(at, chunks)| {
            chunks.filter_map(move |chunk| self.map.version_before(chunk, at.epoch)).filter(
                |(birth, kept)| {
                    *birth <= epoch && before.is_none_or(|before| *birth > before) && *kept != Kept::Zero
                },
            )
        });
        own.count() as u64
    }

    /// Nothing refers to the head any more: deleted, and nothing left to reap.
    pub(super) fn is_spent(&self) -> bool {
        self.deleted && self.dying.is_empty()
    }
}
