//! What operators see: volumes, snapshots, space, and who has what open. Lists come in pages that fit a frame.

use csnap_proto::message::operate::{
    Attachment, HELD_REASONS_MAX, OperatorReply, PAGE_ROWS_MAX, Refusal, RefusalKind, ServerStatus,
    SnapshotInfo, VolumeInfo,
};
use csnap_proto::message::volume::Head;
use csnap_proto::{Epoch, Name, Target, VolumeId};
use serde::Serialize;

use super::operate::{REPLY_BYTES_MAX, RequestKey};
use super::{ServerCore, TaskDone};
use crate::state::{Attached, Origin, Session, Volume};

/// Attachments that one row shows: enough to find somebody to ask; a snapshot can have any number of readers.
const ATTACHMENTS_SHOWN_MAX: usize = 16;

/// What a page's reply has beside its rows, bytes: its kind, the number of rows, whether more follow.
const PAGE_REST_BYTES_MAX: usize = 16;

/// Rows of a list, as many as one reply carries.
struct Page<T> {
    rows: Vec<T>,
    bytes_left: usize,
}

impl<T: Serialize> Page<T> {
    fn new() -> Self {
        Self { rows: Vec::new(), bytes_left: REPLY_BYTES_MAX - PAGE_REST_BYTES_MAX }
    }

    /// Takes a row in, unless it is for the next page. The first one always fits: what a row shows is bounded.
    fn take(&mut self, row: T) -> bool {
        let bytes = postcard::to_stdvec(&row).map_or(usize::MAX, |encoded| encoded.len());
        let fits = bytes <= self.bytes_left && self.rows.len() < PAGE_ROWS_MAX;
        if fits {
            self.bytes_left -= bytes;
            self.rows.push(row);
        }
        fits
    }
}

/// Where the content of a volume is, as the wire says it.
pub(super) fn head_of(origin: &Origin) -> Head {
    match origin {
        Origin::Pool => Head::Pool,
        Origin::Adopted { path, device, inode } => {
            Head::Adopted { path: path.clone(), device: *device, inode: *inode }
        }
    }
}

impl ServerCore {
    /// One page of those that are not being imported, ordered by name.
    pub(super) fn list_volumes(&self, after: Option<&Name>) -> OperatorReply {
        let mut page = Page::new();
        let shown = self.state.volumes_by_name(after).filter(|v| v.importer.is_none());
        let more = shown.map(|v| self.volume_info(v.id)).any(|row| !page.take(row));
        OperatorReply::Volumes { rows: page.rows, more }
    }

    /// A volume that exists, as shown.
    pub(super) fn volume_info(&self, id: VolumeId) -> VolumeInfo {
        let volume = self.state.volume(id).expect("callers looked it up");
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
            head: head_of(&volume.origin),
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
            volume,
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
        let mut page = Page::new();
        // The volume of the last row first, from its next snapshot on, then those behind it.
        let (last, from) = match &after {
            Some((last, epoch)) => (Some(last), Epoch(epoch.0.saturating_add(1))),
            None => (None, Epoch(0)),
        };
        let begun = last.and_then(|last| self.state.volume_by_name(last)).map(|v| (v, from));
        let others = self.state.volumes_by_name(last).map(|v| (v, Epoch(0)));
        let wanted = |(v, _): &(&Volume, Epoch)| only.as_ref().is_none_or(|only| *only == v.name);
        for (Volume { id: volume, .. }, from) in begun.into_iter().chain(others).filter(wanted) {
            let volume = *volume;
            for snapshot in self.state.snapshots_from(volume, from) {
                if !page.take(self.snapshot_info(volume, snapshot.epoch)) {
                    return Ok(OperatorReply::Snapshots { rows: page.rows, more: true });
                }
            }
        }
        Ok(OperatorReply::Snapshots { rows: page.rows, more: false })
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
        let mut held = self.state.held();
        let untold = held.because.len().saturating_sub(HELD_REASONS_MAX);
        if untold > 0 {
            held.because.truncate(HELD_REASONS_MAX);
            held.because.push(format!("and {untold} more reasons"));
        }
        ServerStatus {
            pool: self.state.pool(),
            used_bytes: self.state.used_bytes() + heads_bytes,
            free_bytes,
            held_bytes: held.bytes,
            held_because: held.because,
            creates: self.creates.timing.shown(),
        }
    }
}
