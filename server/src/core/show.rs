//! What operators see: volumes, snapshots, space, and who has what open.

use csnap_proto::message::operate::{
    Attachment, OperatorReply, PAGE_ROWS_MAX, Refusal, RefusalKind, ServerStatus, SnapshotInfo, VolumeInfo,
};
use csnap_proto::{Epoch, Name, Target, VolumeId};

use super::operate::RequestKey;
use super::{ServerCore, TaskDone};
use crate::state::{Attached, Origin, Session};

/// Attachments that one row shows: enough to find somebody to ask; a snapshot can have any number of readers.
const ATTACHMENTS_SHOWN_MAX: usize = 16;

impl ServerCore {
    pub(super) fn volume_infos(&self) -> Vec<VolumeInfo> {
        let shown = self.state.volumes().filter(|v| v.importer.is_none());
        let mut infos: Vec<VolumeInfo> = shown.map(|v| self.volume_info(v.id)).collect();
        infos.sort_by(|a, b| a.name.cmp(&b.name));
        infos
    }

    /// A volume that exists, as shown.
    pub(super) fn volume_info(&self, id: VolumeId) -> VolumeInfo {
        let volume = self.state.volume(id).expect("callers looked it up");
        let origin = match &volume.origin {
            Origin::Pool => None,
            Origin::Adopted { path, .. } => Some(path.clone()),
        };
        let writer = self.state.writer_of(id);
        let attached: Vec<Attachment> = self
            .state
            .sessions_of(id)
            .filter(|session| self.has_open(session))
            .take(ATTACHMENTS_SHOWN_MAX)
            .map(|session| self.attachment(session))
            .collect();
        let lost = writer.filter(|w| self.connections.of_session(w.id).is_none());
        let blocked = lost.map(|w| {
            format!(
                "its writer on node {} (pid {}) is lost; it must come back, be reaped or be fenced",
                w.node, w.pid
            )
        });
        VolumeInfo {
            id,
            name: volume.name.clone(),
            size_bytes: volume.size_bytes,
            chunk: volume.chunk,
            origin,
            created: volume.created,
            snapshots: self.state.snapshot_count(id) as u64,
            epoch: volume.epoch,
            store_bytes: self.state.store_bytes(id),
            attached,
            blocked,
        }
    }

    /// A reader whose snapshot is gone has nothing open any more, and must not pass for the writer.
    fn has_open(&self, session: &Session) -> bool {
        match session.attached {
            Attached::Snapshot(volume, epoch) => self.state.snapshot(volume, epoch).is_some(),
            Attached::Writer(_) | Attached::Operator => true,
        }
    }

    fn attachment(&self, session: &Session) -> Attachment {
        let snapshot = match session.attached {
            Attached::Snapshot(volume, epoch) => self.state.snapshot(volume, epoch).map(|s| s.name.clone()),
            Attached::Writer(_) | Attached::Operator => None,
        };
        Attachment {
            session: session.id,
            instance: session.instance,
            node: session.node.clone(),
            pid: session.pid,
            snapshot,
            present: self.connections.of_session(session.id).is_some(),
        }
    }

    /// A snapshot that exists, as shown.
    pub(super) fn snapshot_info(&self, volume: VolumeId, epoch: Epoch) -> SnapshotInfo {
        let name = self.state.volume(volume).map(|v| v.name.clone()).expect("callers looked it up");
        let snapshot = self.state.snapshot(volume, epoch).expect("callers looked it up");
        SnapshotInfo {
            target: Target { volume: name, snapshot: Some(snapshot.name.clone()) },
            epoch,
            size_bytes: snapshot.size_bytes,
            created: snapshot.created,
            own_bytes: self.state.own_bytes(volume, epoch),
            readers: self
                .state
                .readers_of(volume, epoch)
                .take(ATTACHMENTS_SHOWN_MAX)
                .map(|s| self.attachment(s))
                .collect(),
        }
    }

    /// One page, ordered by (volume name, epoch).
    pub(super) fn list_snapshots(
        &self,
        only: Option<Name>,
        after: Option<(Name, Epoch)>,
    ) -> Result<OperatorReply, Refusal> {
        if let Some(name) = &only {
            self.volume_id(name)?;
        }
        let mut volumes: Vec<(&Name, VolumeId)> = self.state.volumes().map(|v| (&v.name, v.id)).collect();
        volumes.sort();
        let mut rows = Vec::new();
        for (name, volume) in volumes {
            let wanted = only.as_ref().is_none_or(|only| only == name);
            if !wanted || after.as_ref().is_some_and(|(last, _)| name < last) {
                continue;
            }
            let from = after
                .as_ref()
                .filter(|(last, _)| last == name)
                .map_or(Epoch(0), |(_, epoch)| Epoch(epoch.0.saturating_add(1)));
            for snapshot in self.state.snapshots_from(volume, from) {
                if rows.len() == PAGE_ROWS_MAX {
                    return Ok(OperatorReply::Snapshots { rows, more: true });
                }
                rows.push(self.snapshot_info(volume, snapshot.epoch));
            }
        }
        Ok(OperatorReply::Snapshots { rows, more: false })
    }

    pub(super) fn answer_status(&mut self, key: RequestKey, done: TaskDone) {
        let result = match done {
            TaskDone::Measured { free_bytes, heads_bytes } => Ok(self.status(free_bytes, heads_bytes)),
            TaskDone::Failed(refusal) => Err(refusal),
            _ => Err(Refusal::new(RefusalKind::Media, "the pool could not be measured")),
        };
        self.answer(key, result.map(|status| OperatorReply::Status(Box::new(status))));
    }

    fn status(&self, free_bytes: u64, heads_bytes: u64) -> ServerStatus {
        let held = self.state.held();
        ServerStatus {
            pool: self.state.pool(),
            used_bytes: self.state.used_bytes() + heads_bytes,
            free_bytes,
            held_bytes: held.bytes,
            held_because: held.because,
            volumes: self.volume_infos(),
            creates: self.creates.timing.shown(),
        }
    }
}
