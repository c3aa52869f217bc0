//! How each record changes the state.
//!
//! A record is checked against the state before, and while, it is applied; after an error the state is of no use any
//! more, for half of the record may have been applied.

use std::sync::Arc;

use csnap_proto::ids::{Epoch, FreeBatchId, Name, Term, VolumeId};
use csnap_proto::units::StoreExtent;

use super::map::ChunkMap;
use super::record::{Attached, Kept, Record, SupersededRun};
use super::session::Session;
use super::volume::{Snapshot, Volume};
use super::{Corrupt, State};

impl State {
    /// Applies one record of the journal. An error says that the record does not fit the state: the journal is
    /// damaged, or there is a bug. The state must not be used after one.
    pub fn apply(&mut self, record: &Record) -> Result<(), Corrupt> {
        record.check()?;
        match record {
            Record::PoolInit { pool } if *pool == self.pool => Ok(()),
            Record::PoolInit { .. } => Err(Corrupt::new("the journal is of another pool")),
            Record::TermBegin { term, node } => self.space.begin_term(*term, node.clone()),
            Record::TermDead { term } => self.space.end_term(*term),
            Record::VolumeCreate { .. }
            | Record::VolumePublish { .. }
            | Record::VolumeRename { .. }
            | Record::VolumeDelete { .. }
            | Record::HeadRemoved { .. } => self.apply_volume(record),
            Record::SnapshotCreate { volume, epoch, name, size_bytes, created, token } => {
                let name = name.clone();
                let (epoch, size_bytes, created, token) = (*epoch, *size_bytes, *created, *token);
                self.volume_mut(*volume)?.create_snapshot(Snapshot {
                    epoch,
                    name,
                    size_bytes,
                    created,
                    token,
                })
            }
            Record::SnapshotRename { volume, epoch, name } => {
                self.volume_mut(*volume)?.rename_snapshot(*epoch, name)
            }
            Record::SnapshotDelete { volume, epoch } => self.volume_mut(*volume)?.delete_snapshot(*epoch),
            Record::Superseded { volume, birth, runs } => self.apply_superseded(*volume, *birth, runs),
            Record::Reaped { volume, snapshot, dead, next, batch } => {
                self.apply_reaped(*volume, *snapshot, dead, *next, *batch)
            }
            Record::SnapshotReaped { volume, snapshot } => self.apply_snapshot_reaped(*volume, *snapshot),
            Record::ArenaReserve { extent } => self.space.back(*extent),
            Record::Punched { extents } => self.space.punched(extents),
            Record::FreeBatchSealed { batch } => self.apply_sealed(*batch),
            Record::BatchReusable { batch } => self.space.release(*batch),
            Record::FreesConfirmed { .. }
            | Record::SessionOpen { .. }
            | Record::SessionEnd { .. }
            | Record::Result { .. } => self.apply_session(record),
        }
    }

    fn apply_volume(&mut self, record: &Record) -> Result<(), Corrupt> {
        match record {
            Record::VolumeCreate { id, name, size_bytes, chunk, origin, created, importer } => {
                let volume = Volume {
                    id: *id,
                    name: name.clone(),
                    size_bytes: *size_bytes,
                    chunk: *chunk,
                    origin: origin.clone(),
                    created: *created,
                    epoch: Epoch::FIRST,
                    importer: *importer,
                    deleted: false,
                    snapshots: Arc::default(),
                    dying: Arc::default(),
                    reaping: None,
                    map: ChunkMap::default(),
                };
                if VolumeId::new(self.space.term, 0).is_none_or(|first| first.0 >> 32 != id.0 >> 32) {
                    return Err(Corrupt::new("a volume whose id is not of the current term"));
                }
                self.add_volume(volume)
            }
            Record::VolumePublish { volume } => {
                let importer = self.volume_mut(*volume)?.importer.take();
                importer
                    .map(drop)
                    .ok_or_else(|| Corrupt::new("published a volume that was not being imported"))
            }
            Record::VolumeRename { volume, name } => self.rename_volume(*volume, name),
            Record::VolumeDelete { volume } => {
                if self.writer_of(*volume).is_some() || self.youngest_live_snapshot(*volume).is_some() {
                    return Err(Corrupt::new("deleted a volume that is in use or has snapshots"));
                }
                let deleted = self.volume_mut(*volume)?;
                deleted.deleted = true;
                let name = deleted.name.clone();
                self.names.remove(&name);
                Ok(())
            }
            Record::HeadRemoved { volume } => {
                let spent = self.volumes.get(volume).is_some_and(Volume::is_spent);
                let removed = spent.then(|| self.volumes.remove(volume)).flatten();
                removed.map(drop).ok_or_else(|| Corrupt::new("removed the head of a volume that is not gone"))
            }
            _ => unreachable!("the caller sends volumes' records"),
        }
    }

    pub(super) fn add_volume(&mut self, volume: Volume) -> Result<(), Corrupt> {
        let named = !volume.deleted;
        if self.volumes.contains_key(&volume.id) || (named && self.names.contains_key(&volume.name)) {
            return Err(Corrupt::new(format!("volume {} exists", volume.name)));
        }
        if named {
            self.names.insert(volume.name.clone(), volume.id);
        }
        self.volumes.insert(volume.id, volume);
        Ok(())
    }

    fn rename_volume(&mut self, id: VolumeId, name: &Name) -> Result<(), Corrupt> {
        if self.names.get(name).is_some_and(|other| *other != id) {
            return Err(Corrupt::new(format!("volume {name} exists")));
        }
        let old = std::mem::replace(&mut self.volume_mut(id)?.name, name.clone());
        self.names.remove(&old);
        self.names.insert(name.clone(), id);
        Ok(())
    }

    /// A volume that is not deleted.
    fn volume_mut(&mut self, id: VolumeId) -> Result<&mut Volume, Corrupt> {
        self.any_volume_mut(id)
            .and_then(|volume| if volume.deleted { Err(no_volume(id)) } else { Ok(volume) })
    }

    /// A volume, deleted or not.
    pub(super) fn any_volume_mut(&mut self, id: VolumeId) -> Result<&mut Volume, Corrupt> {
        self.volumes.get_mut(&id).ok_or_else(|| no_volume(id))
    }

    fn apply_superseded(
        &mut self,
        id: VolumeId,
        birth: Epoch,
        runs: &[SupersededRun],
    ) -> Result<(), Corrupt> {
        let Self { volumes, space, .. } = self;
        let volume = volumes.get_mut(&id).filter(|volume| !volume.deleted).ok_or_else(|| no_volume(id))?;
        if birth != volume.epoch {
            return Err(Corrupt::new("superseded in another epoch than the volume's"));
        }
        let blocks = volume.chunk.blocks();
        for run in runs {
            volume.check_range(run.range)?;
            if volume.snapshots.youngest().is_none_or(|youngest| run.old_birth > youngest) {
                return Err(Corrupt::new("superseded what no live snapshot reads"));
            }
            if let Kept::Store(at) = run.place {
                let total = run.range.count.saturating_mul(blocks.into());
                let blocks = u32::try_from(total).map_err(|_| Corrupt::new("a run larger than an arena"))?;
                space.take(StoreExtent { at, blocks })?;
            }
            for (chunk, index) in run.range.chunks().zip(0u32..) {
                if volume.map.head_birth(chunk) != run.old_birth {
                    return Err(Corrupt::new(format!("{chunk:?} was not born in epoch {}", run.old_birth)));
                }
                let kept = match run.place {
                    Kept::Zero => Kept::Zero,
                    Kept::Store(at) => Kept::Store(at.plus(index * blocks)),
                };
                volume.map.supersede(chunk, birth, kept);
            }
        }
        Ok(())
    }

    fn apply_sealed(&mut self, batch: FreeBatchId) -> Result<(), Corrupt> {
        let Self { sessions, space, .. } = self;
        space.frees.seal(batch, |volume| sessions.all_readers(volume).map(|session| session.id).collect())
    }

    fn apply_session(&mut self, record: &Record) -> Result<(), Corrupt> {
        match record {
            Record::SessionOpen { session, secret, instance, node, pid, attached, opened } => {
                let (id, secret, instance, pid) = (*session, *secret, *instance, *pid);
                let (attached, opened, node) = (*attached, *opened, node.clone());
                let exists = match attached {
                    Attached::Writer(volume) => self.volume(volume).is_some(),
                    Attached::Snapshot(volume, epoch) => self.snapshot(volume, epoch).is_some(),
                    Attached::Operator => true,
                };
                if !exists {
                    return Err(Corrupt::new("a session of a volume or snapshot that is not there"));
                }
                let (confirmed, results) = Default::default();
                let session =
                    Session { id, secret, instance, node, pid, attached, opened, confirmed, results };
                self.sessions.open(session)
            }
            Record::SessionEnd { session } => {
                self.sessions.end(*session)?;
                self.space.frees.confirm(*session, None);
                Ok(())
            }
            Record::FreesConfirmed { session, upto } => {
                let confirmed = &mut self.sessions.get_mut(*session)?.confirmed;
                if *upto >= self.space.frees.open.id || *upto < *confirmed {
                    return Err(Corrupt::new("confirmed a batch that was never closed, or less than before"));
                }
                *confirmed = *upto;
                self.space.frees.confirm(*session, Some(*upto));
                Ok(())
            }
            Record::Result { session, sequence, lowest_unanswered, result } => {
                self.sessions.store(*session, *sequence, *lowest_unanswered, result)
            }
            _ => unreachable!("the caller sends sessions' records"),
        }
    }

    /// Loading: terms that are not known dead, and their nodes.
    pub(super) fn load_servers(&mut self, servers: Vec<(Term, Name)>) -> Result<(), Corrupt> {
        for (term, node) in servers {
            let began = term > Term(0) && term <= self.space.term;
            if !began || self.space.alive.insert(term, node).is_some() {
                return Err(Corrupt::new("a term that cannot have begun"));
            }
        }
        Ok(())
    }
}

fn no_volume(id: VolumeId) -> Corrupt {
    Corrupt::new(format!("no volume {id}"))
}
