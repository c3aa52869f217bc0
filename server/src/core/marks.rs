//! Marks: which snapshot reads are under way on the origin, found by the chunks that they read.
//!
//! A mark is whole as long as it is here: breaking one is forgetting it. It belongs to one connection and goes with it.
//! What a peer can make this table hold, and cost those who break marks, is bounded: a connection has so many marks
//! ([`SNAPSHOT_READS_MAX`]), a mark so many runs ([`RANGES_PER_MESSAGE_MAX`]), and a writer looks only at marks in the
//! neighbourhood of the chunks that it gets.
//!
//! Who calls it: [`super::read`].

use std::collections::{BTreeMap, BTreeSet};

use csnap_proto::limits::{RANGES_PER_MESSAGE_MAX, SNAPSHOT_READS_MAX};
use csnap_proto::{Chunk, ChunkRange, ReadId, VolumeId};

use super::ConnId;

/// Chunks of a neighbourhood: a large read has few, and a writer meets few readers that are only near.
const BUCKET_CHUNKS: u64 = 64;

/// Whose mark it is.
type Key = (ConnId, ReadId);

#[derive(Debug)]
struct Mark {
    volume: VolumeId,
    /// Sorted, apart from each other.
    runs: Vec<ChunkRange>,
}

/// The marks of every connection.
#[derive(Debug, Default)]
pub(super) struct Marks {
    all: BTreeMap<Key, Mark>,
    /// Marks by the neighbourhoods that they have chunks in.
    near: BTreeSet<(VolumeId, u64, Key)>,
}

impl Marks {
    /// Whether the connection has as many as it may.
    pub(super) fn is_full(&self, conn: ConnId) -> bool {
        self.of(conn).count() >= SNAPSHOT_READS_MAX
    }

    /// Marks what a read of `asked` finds `on_origin`, instead of what the same read marked before.
    pub(super) fn make(
        &mut self,
        conn: ConnId,
        read: ReadId,
        volume: VolumeId,
        asked: &[ChunkRange],
        on_origin: Vec<ChunkRange>,
    ) {
        self.take(conn, read);
        // Scattered over many small runs: all that was asked for is marked, which is broken no later.
        let scattered = on_origin.len() > RANGES_PER_MESSAGE_MAX;
        let runs = joined(if scattered { asked.to_vec() } else { on_origin });
        let key = (conn, read);
        self.near.extend(buckets(&runs).map(|bucket| (volume, bucket, key)));
        self.all.insert(key, Mark { volume, runs });
    }

    /// Ends a mark; whether it was whole until now.
    pub(super) fn take(&mut self, conn: ConnId, read: ReadId) -> bool {
        let key = (conn, read);
        let Some(mark) = self.all.remove(&key) else { return false };
        for bucket in buckets(&mark.runs) {
            self.near.remove(&(mark.volume, bucket, key));
        }
        true
    }

    /// The connection is gone.
    pub(super) fn forget(&mut self, conn: ConnId) {
        let reads: Vec<ReadId> = self.of(conn).collect();
        for read in reads {
            self.take(conn, read);
        }
    }

    /// Breaks those that overlap `range`.
    pub(super) fn break_overlapping(&mut self, volume: VolumeId, range: ChunkRange) {
        let overlapping: Vec<Key> =
            self.candidates(volume, range).filter(|key| self.all[key].overlaps(range)).collect();
        for (conn, read) in overlapping {
            self.take(conn, read);
        }
    }

    /// Breaks all those of a volume.
    pub(super) fn break_all(&mut self, volume: VolumeId) {
        let whole = ChunkRange { first: Chunk(0), count: u64::MAX };
        let all: Vec<Key> = self.candidates(volume, whole).collect();
        for (conn, read) in all {
            self.take(conn, read);
        }
    }

    /// Marks with chunks in the neighbourhood of `range`; one that is in several of them comes several times.
    fn candidates(&self, volume: VolumeId, range: ChunkRange) -> impl Iterator<Item = Key> {
        let least = (ConnId(0), ReadId(0));
        let greatest = (ConnId(u64::MAX), ReadId(u64::MAX));
        let from = range.first.0 / BUCKET_CHUNKS;
        let to = (range.end().0 - 1) / BUCKET_CHUNKS;
        self.near.range((volume, from, least)..=(volume, to, greatest)).map(|&(_, _, key)| key)
    }

    fn of(&self, conn: ConnId) -> impl Iterator<Item = ReadId> {
        self.all.range((conn, ReadId(0))..=(conn, ReadId(u64::MAX))).map(|(&(_, read), _)| read)
    }
}

impl Mark {
    fn overlaps(&self, range: ChunkRange) -> bool {
        let after = self.runs.partition_point(|run| run.end() <= range.first);
        self.runs.get(after).is_some_and(|run| run.overlaps(range))
    }
}

/// The same chunks as sorted runs that are apart from each other.
fn joined(mut runs: Vec<ChunkRange>) -> Vec<ChunkRange> {
    runs.sort_by_key(|run| run.first);
    let mut joined: Vec<ChunkRange> = Vec::new();
    for run in runs {
        match joined.last_mut() {
            Some(last) if run.first <= last.end() => {
                last.count = last.count.max(run.end().0 - last.first.0);
            }
            _ => joined.push(run),
        }
    }
    joined
}

/// Neighbourhoods of sorted runs; some may come twice.
fn buckets(runs: &[ChunkRange]) -> impl Iterator<Item = u64> {
    runs.iter().flat_map(|run| run.first.0 / BUCKET_CHUNKS..=(run.end().0 - 1) / BUCKET_CHUNKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOLUME: VolumeId = VolumeId(7);

    fn range(first: u64, count: u64) -> ChunkRange {
        ChunkRange { first: Chunk(first), count }
    }

    fn mark(marks: &mut Marks, conn: u64, read: u64, runs: &[ChunkRange]) {
        marks.make(ConnId(conn), ReadId(read), VOLUME, runs, runs.to_vec());
    }

    #[test]
    fn a_grant_breaks_the_marks_that_it_overlaps_and_no_others() {
        let granted = range(63, 2);
        let cases = [
            (vec![range(60, 3)], false),
            (vec![range(65, 1)], false),
            (vec![range(62, 2)], true),
            (vec![range(64, 1000)], true),
            (vec![range(0, 10), range(70, 10), range(10, 60)], true),
            (vec![range(0, 10), range(70, 10)], false),
        ];
        for (runs, broken) in cases {
            let mut marks = Marks::default();
            mark(&mut marks, 1, 1, &runs);
            marks.break_overlapping(VolumeId(8), granted);
            marks.break_overlapping(VOLUME, granted);
            assert_eq!(marks.take(ConnId(1), ReadId(1)), !broken, "{runs:?}");
            assert!(marks.near.is_empty(), "nothing stays behind");
        }
    }

    #[test]
    fn a_grant_looks_at_its_neighbourhood_only() {
        let mut marks = Marks::default();
        for conn in 0..100 {
            for read in 0..SNAPSHOT_READS_MAX as u64 {
                mark(&mut marks, conn, read, &[range((conn * 64 + read) * BUCKET_CHUNKS, 4)]);
            }
        }
        assert_eq!(marks.candidates(VOLUME, range(640, 8)).count(), 1, "of {}", marks.all.len());
    }

    #[test]
    fn a_scattered_read_is_marked_as_a_whole_and_a_mark_is_bounded() {
        let mut marks = Marks::default();
        let asked = [range(0, 4096)];
        let scattered = (0..2048).map(|i| range(2 * i, 1)).collect();
        marks.make(ConnId(1), ReadId(1), VOLUME, &asked, scattered);
        assert_eq!(marks.all[&(ConnId(1), ReadId(1))].runs, asked);
        marks.break_overlapping(VOLUME, range(1, 1));
        assert!(!marks.take(ConnId(1), ReadId(1)), "broken also by what lay between");
    }

    #[test]
    fn marks_go_with_their_connection_their_volume_and_their_like() {
        let mut marks = Marks::default();
        mark(&mut marks, 1, 1, &[range(0, 1)]);
        mark(&mut marks, 1, 1, &[range(500, 1)]);
        mark(&mut marks, 2, 1, &[range(0, 1)]);
        marks.break_overlapping(VOLUME, range(0, 1));
        assert!(!marks.take(ConnId(2), ReadId(1)));
        mark(&mut marks, 2, 1, &[range(0, 1)]);
        marks.forget(ConnId(1));
        assert_eq!(marks.all.len(), 1, "the other connection's");
        marks.break_all(VOLUME);
        assert!(marks.all.is_empty() && marks.near.is_empty());
    }
}
