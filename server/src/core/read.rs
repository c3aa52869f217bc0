//! Snapshot reads: where chunks lie, and the marks of the four-message read.
//!
//! A chunk that is still on the origin is read by the client itself, between message 2 and message 3. The server keeps
//! a *mark* meanwhile. A grant that overlaps it breaks it and does not wait; message 4 confirms only a mark that is
//! whole, on the connection that made it. So a confirmed read happened before any grant for its chunks: the origin
//! still had the snapshot's content. A mark that is lost with its connection or its server was never confirmed.
//!
//! Who relies on it: [`super::grant`] breaks marks in the step that makes chunks unique.

use csnap_proto::message::operate::RefusalKind;
use csnap_proto::message::volume::{Extent, FromServer, Place};
use csnap_proto::{ChunkRange, Epoch, ReadId, RequestId, VolumeId};

use super::canary::Canary;
use super::{ConnId, ServerCore};
use crate::state::Attached;

impl ServerCore {
    pub(super) fn on_query_snapshot_read(
        &mut self,
        conn: ConnId,
        id: RequestId,
        read: ReadId,
        ranges: &[ChunkRange],
    ) {
        let Some((volume, epoch)) = self.reader(conn, id) else { return };
        let chunks =
            self.state.snapshot(volume, epoch).map(|s| s.size_bytes.div_ceil(self.state.chunk_bytes(volume)));
        let Some(chunks) = chunks else {
            return self.refuse(conn, id, RefusalKind::Gone, "the snapshot was deleted");
        };
        if ranges.iter().any(|range| range.end().0 > chunks) {
            return self.refuse(conn, id, RefusalKind::Invalid, "a range beyond the end of the snapshot");
        }
        let extents: Vec<Extent> =
            ranges.iter().flat_map(|&range| self.state.locate(volume, epoch, range)).collect();
        let is_there = |e: &&Extent| e.place == Place::Origin;
        let on_origin: Vec<ChunkRange> = extents.iter().filter(is_there).map(|e| e.range).collect();
        if !on_origin.is_empty() {
            if self.marks.is_full(conn) {
                return self.refuse(conn, id, RefusalKind::Invalid, "too many unfinished snapshot reads");
            }
            self.marks.make(conn, read, volume, ranges, on_origin);
        }
        self.send(conn, id, FromServer::SnapshotRead { read, extents });
    }

    pub(super) fn on_finish_snapshot_read(&mut self, conn: ConnId, id: RequestId, read: ReadId) {
        if self.reader(conn, id).is_none() {
            return;
        }
        // Only this connection's marks are looked at: whoever finishes elsewhere reads again.
        let whole = self.marks.take(conn, read) || self.config.broken.breaks(Canary::ConfirmElsewhere);
        let answer =
            if whole { FromServer::FinishSnapshotReadOk { read } } else { FromServer::Retry { read } };
        self.send(conn, id, answer);
    }

    /// The snapshot that the session of this connection reads; refuses otherwise.
    fn reader(&mut self, conn: ConnId, id: RequestId) -> Option<(VolumeId, Epoch)> {
        match self.connections.peer(conn)?.attached {
            Attached::Snapshot(volume, epoch) => Some((volume, epoch)),
            Attached::Writer(_) | Attached::Operator => {
                self.refuse(conn, id, RefusalKind::Invalid, "this session does not read a snapshot");
                None
            }
        }
    }

    /// Chunks of `volume` become unique: reads of them that are under way may see what is written next.
    pub(super) fn break_marks(&mut self, volume: VolumeId, made_unique: &[ChunkRange]) {
        if !self.config.broken.breaks(Canary::ConfirmBrokenMark) {
            made_unique.iter().for_each(|range| self.marks.break_overlapping(volume, *range));
        }
    }

    /// A snapshot of `volume` is gone: no read that relies on the origin is confirmed any more. Readers of other
    /// snapshots of the volume read again, and get their confirmation.
    pub(super) fn break_all_marks(&mut self, volume: VolumeId) {
        if !self.config.broken.breaks(Canary::ConfirmBrokenMark) {
            self.marks.break_all(volume);
        }
    }
}
