//! Snapshot reads: where chunks lie, and the marks of the four-message read.
//!
//! A chunk that is still on the origin is read by the client itself, between message 2 and message 3. The server keeps
//! a *mark* meanwhile. A grant that overlaps it breaks it and does not wait; message 4 confirms only a mark that is
//! whole, on the connection that made it. So a confirmed read happened before any grant for its chunks: the origin
//! still had the snapshot's content. A mark that is lost with its connection or its server was never confirmed.
//!
//! Who relies on it: [`super::grant`] breaks marks in the step that makes chunks unique.

use csnap_proto::limits::REQUESTS_PER_CONNECTION_MAX;
use csnap_proto::message::operate::RefusalKind;
use csnap_proto::message::volume::{Extent, FromServer, Place};
use csnap_proto::{ChunkRange, Epoch, ReadId, RequestId, VolumeId};

use super::canary::Canary;
use super::{ConnId, ServerCore};
use crate::state::Attached;

/// A promise to tell the reader whether what it read from the origin was the snapshot's.
#[derive(Debug)]
pub(super) struct Mark {
    pub(super) volume: VolumeId,
    /// Runs that were on the origin at message 2.
    ranges: Vec<ChunkRange>,
    broken: bool,
}

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
        let on_origin = |e: &&Extent| e.place == Place::Origin;
        let marked: Vec<ChunkRange> = extents.iter().filter(on_origin).map(|e| e.range).collect();
        if !marked.is_empty() {
            let Some(connection) = self.connections.get_mut(conn) else { return };
            if connection.marks.len() >= REQUESTS_PER_CONNECTION_MAX {
                return self.refuse(conn, id, RefusalKind::Invalid, "too many unfinished snapshot reads");
            }
            connection.marks.insert(read, Mark { volume, ranges: marked, broken: false });
        }
        self.send(conn, id, FromServer::SnapshotRead { read, extents });
    }

    pub(super) fn on_finish_snapshot_read(&mut self, conn: ConnId, id: RequestId, read: ReadId) {
        if self.reader(conn, id).is_none() {
            return;
        }
        // Only this connection's marks are looked at: whoever finishes elsewhere reads again.
        let mark = self.connections.get_mut(conn).and_then(|c| c.marks.remove(&read));
        let broken = self.config.broken;
        let whole = match mark {
            Some(mark) => !mark.broken || broken.breaks(Canary::ConfirmBrokenMark),
            None => broken.breaks(Canary::ConfirmElsewhere),
        };
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
        for mark in self.connections.marks_of(volume) {
            let overlap = |m: &ChunkRange| made_unique.iter().any(|u| u.overlaps(*m));
            mark.broken = mark.broken || mark.ranges.iter().any(overlap);
        }
    }

    /// A snapshot of `volume` is gone: no read that relies on the origin is confirmed any more. Readers of other
    /// snapshots of the volume read again, and get their confirmation.
    pub(super) fn break_all_marks(&mut self, volume: VolumeId) {
        for mark in self.connections.marks_of(volume) {
            mark.broken = true;
        }
    }
}
