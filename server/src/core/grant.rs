//! Write grants: make chunks unique, then say so.
//!
//! A chunk that a live snapshot shares is copied out first: its content goes to a reserved place in the store and is
//! synced, then one record moves the old version there and gives the head a new birth; only when that record is
//! durable (and the gate open) does the grant go out. Chunks that are unique already cost nothing but the answer.
//!
//! Queries that want the same chunk share its copy-out. Chunks wanted by many queries gather while copy-outs are in
//! flight, and go out as one job: one store sync and one record batch for all of them.
//!
//! Invariants: a chunk is in at most one job; what a job copied is believed only if its chunks were shared, hence not
//! writable, all the time: deleting a snapshot voids the volume's jobs, and their chunks are looked at anew; marks break in
//! the step that makes a chunk unique.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use csnap_proto::limits::CHUNKS_PER_PAGE;
use csnap_proto::message::operate::RefusalKind;
use csnap_proto::message::volume::FromServer;
use csnap_proto::{BLOCKS_PER_ARENA, Chunk, ChunkRange, Epoch, Location, RequestId, StoreExtent, VolumeId};

use super::canary::Canary;
use super::{ConnId, CopyError, CopyId, CopyOut, Out, Output, ServerCore};
use crate::state::{Kept, Record, Sharing, SupersededRun};

/// Copy-outs in flight at once: while one waits for its sync, the next one reads.
const COPIES_IN_FLIGHT_MAX: usize = 2;

/// How long after a takeover an older server's space is waited for before a write is refused. On one host it is known dead
/// within a second; where that cannot be known, the space is shown as held.
const RECLAIM_PATIENCE: Duration = Duration::from_secs(5);

/// Bytes of one copy-out: a few milliseconds of a plain disk, so that a large query does not delay small ones.
const COPY_BYTES_MAX: u64 = 4 << 20;

type QueryId = u64;

/// A QueryWrite that waits for copy-outs.
#[derive(Debug)]
struct Query {
    conn: ConnId,
    id: RequestId,
    volume: VolumeId,
    ranges: Vec<ChunkRange>,
    /// Chunks still to be made unique.
    missing: u64,
    no_space: Vec<ChunkRange>,
    /// The origin could not be read: the query fails with this.
    media: Option<String>,
}

#[derive(Debug)]
struct Job {
    volume: VolumeId,
    moves: Vec<(ChunkRange, StoreExtent)>,
    /// A snapshot was deleted meanwhile: chunks may have been overwritten while they were read.
    void: bool,
}

/// Queries, the chunks that they wait for, and copy-outs in flight.
#[derive(Debug, Default)]
pub(super) struct Grants {
    last_query: QueryId,
    last_copy: u64,
    queries: BTreeMap<QueryId, Query>,
    /// Who waits for a chunk; of one in a job there is an entry even if nobody waits any more.
    waiters: BTreeMap<(VolumeId, Chunk), Vec<QueryId>>,
    /// Chunks that wait for a job.
    wanted: BTreeSet<(VolumeId, Chunk)>,
    jobs: BTreeMap<CopyId, Job>,
    growing: bool,
    /// The file system had no room for more arena when it was last asked.
    full: bool,
}

impl Grants {
    pub(super) fn is_idle(&self) -> bool {
        self.queries.is_empty() && self.jobs.is_empty()
    }

    /// The connection is gone: nobody waits for its queries. Copy-outs that run do no harm.
    pub(super) fn forget(&mut self, conn: ConnId) {
        let gone: BTreeSet<QueryId> =
            self.queries.iter().filter(|(_, q)| q.conn == conn).map(|(&id, _)| id).collect();
        if gone.is_empty() {
            return;
        }
        self.queries.retain(|id, _| !gone.contains(id));
        let wanted = &mut self.wanted;
        self.waiters.retain(|chunk, queries| {
            queries.retain(|id| !gone.contains(id));
            !queries.is_empty() || !wanted.remove(chunk)
        });
    }

    /// A snapshot of `volume` is deleted: what is being copied may be overwritten before it is read.
    pub(super) fn void_jobs(&mut self, volume: VolumeId) {
        self.jobs.values_mut().filter(|job| job.volume == volume).for_each(|job| job.void = true);
    }

    /// Space came back: what waits may try again.
    pub(super) fn space_came_back(&mut self) {
        self.full = false;
    }
}

impl ServerCore {
    pub(super) fn on_query_write(&mut self, conn: ConnId, id: RequestId, ranges: Vec<ChunkRange>) {
        let Some(volume) = self.writes_to(conn) else {
            return self.refuse(conn, id, RefusalKind::Invalid, "this session does not write a volume");
        };
        let Some(chunks) = self.state.volume(volume).map(|v| v.chunk.chunks_in(v.size_bytes)) else { return };
        if ranges.iter().any(|range| range.end().0 > chunks) {
            return self.refuse(conn, id, RefusalKind::Invalid, "a range beyond the end of the volume");
        }
        self.grants.last_query += 1;
        let query_id = self.grants.last_query;
        let mut missing = 0;
        for &range in &ranges {
            for (run, sharing) in self.state.head_runs(volume, range) {
                if matches!(sharing, Sharing::Shared { .. }) {
                    for chunk in run.chunks() {
                        missing += u64::from(self.want(volume, chunk, query_id));
                    }
                }
            }
        }
        let query = Query { conn, id, volume, ranges, missing, no_space: Vec::new(), media: None };
        if self.config.broken.breaks(Canary::GrantBeforeCopy) {
            return self.finish_query(query);
        }
        if missing == 0 {
            self.finish_query(query)
        } else {
            drop(self.grants.queries.insert(query_id, query))
        }
    }

    /// Puts a query on the list of a shared chunk; false if it stands there already (its ranges overlap).
    fn want(&mut self, volume: VolumeId, chunk: Chunk, query: QueryId) -> bool {
        match self.grants.waiters.entry((volume, chunk)) {
            Entry::Vacant(entry) => {
                entry.insert(vec![query]);
                self.grants.wanted.insert((volume, chunk));
            }
            Entry::Occupied(entry) if entry.get().last() == Some(&query) => return false,
            Entry::Occupied(entry) => entry.into_mut().push(query),
        }
        true
    }

    /// Starts copy-outs for what gathered, as far as there are places for it.
    pub(super) fn start_copies(&mut self, out: Out) {
        while self.grants.jobs.len() < COPIES_IN_FLIGHT_MAX && !self.grants.growing {
            let Some(&(volume, _)) = self.grants.wanted.first() else { return };
            let found = self.state.volume(volume).map(|v| (v.chunk, v.size_bytes, v.origin.clone()));
            let Some((chunk_size, size_bytes, origin)) = found else {
                let chunks = self.next_chunks(volume, u64::MAX);
                self.fail_for_media(volume, &chunks, "the volume is gone");
                continue;
            };
            let most = (COPY_BYTES_MAX / chunk_size.bytes()).max(1);
            let mut chunks = self.next_chunks(volume, most);
            let mut reserved = self.state.reserve(chunks.len() as u64, chunk_size.blocks());
            if let Err(need) = &reserved
                && self.grants.full
            {
                // What there is place for goes; the rest is refused, unless space is about to come back.
                let missing = usize::try_from(need.missing_chunks).unwrap_or(usize::MAX).min(chunks.len());
                if missing == chunks.len() && self.space_may_come_back() {
                    return;
                }
                let refused = chunks.split_off(chunks.len() - missing);
                if chunks.is_empty() {
                    self.fail_for_space(volume, &refused);
                    continue;
                }
                reserved = self.state.reserve(chunks.len() as u64, chunk_size.blocks());
            }
            match reserved {
                Ok(places) => {
                    for &chunk in &chunks {
                        self.grants.wanted.remove(&(volume, chunk));
                    }
                    let moves = pair(&chunks, &places, chunk_size.blocks());
                    self.grants.last_copy += 1;
                    let copy = CopyId(self.grants.last_copy);
                    self.grants.jobs.insert(copy, Job { volume, moves: moves.clone(), void: false });
                    let job = CopyOut { volume, origin, chunk_bytes: chunk_size.bytes(), size_bytes, moves };
                    out.push(Output::CopyOut { copy, job });
                }
                Err(need) => {
                    self.grants.growing = true;
                    out.push(Output::GrowArena { extent: need.grow, create: need.new_arena });
                }
            }
        }
    }

    /// Whether a refusal for want of space would be premature: deletes are being worked off, or an older server's space is
    /// about to be known free.
    fn space_may_come_back(&self) -> bool {
        let taking_over = self.now < self.began.after(RECLAIM_PATIENCE);
        self.state.next_reap(1).is_some() || (taking_over && self.state.older_terms().next().is_some())
    }

    fn next_chunks(&self, volume: VolumeId, most: u64) -> Vec<Chunk> {
        let of_volume = self.grants.wanted.range((volume, Chunk(0))..=(volume, Chunk(u64::MAX)));
        of_volume.map(|&(_, chunk)| chunk).take(usize::try_from(most).unwrap_or(usize::MAX)).collect()
    }

    pub(super) fn on_arena_grown(&mut self, extent: StoreExtent, grown: bool) {
        self.grants.growing = false;
        if grown { self.record(Record::ArenaReserve { extent }) } else { self.grants.full = true }
    }

    pub(super) fn on_copied_out(&mut self, copy: CopyId, result: Result<Vec<ChunkRange>, CopyError>) {
        let Some(job) = self.grants.jobs.remove(&copy) else { return };
        if self.state.volume(job.volume).is_none() {
            job.moves.iter().for_each(|&(_, extent)| self.state.unreserve(extent));
            let chunks: Vec<Chunk> = job.moves.iter().flat_map(|(run, _)| run.chunks()).collect();
            return self.fail_for_media(job.volume, &chunks, "the volume is gone");
        }
        match result {
            Ok(_) if job.void => self.copy_again(&job),
            Ok(zeros) => self.supersede(&job, &zeros),
            Err(error) => {
                let chunks: Vec<Chunk> = job.moves.iter().flat_map(|(run, _)| run.chunks()).collect();
                job.moves.iter().for_each(|&(_, extent)| self.state.unreserve(extent));
                match error {
                    CopyError::NoSpace => self.fail_for_space(job.volume, &chunks),
                    CopyError::Origin(reason) => self.fail_for_media(job.volume, &chunks, &reason),
                }
            }
        }
    }

    /// What was copied is not believed: nothing refers to it. Who still waits is served anew.
    fn copy_again(&mut self, job: &Job) {
        job.moves.iter().for_each(|&(_, extent)| self.state.unreserve(extent));
        let runs: Vec<(ChunkRange, Sharing)> =
            job.moves.iter().flat_map(|&(run, _)| self.state.head_runs(job.volume, run)).collect();
        for (run, sharing) in runs {
            for chunk in run.chunks() {
                let key = (job.volume, chunk);
                if sharing == Sharing::Unique {
                    self.settle(job.volume, chunk, |_| {});
                } else if self.grants.waiters.get(&key).is_some_and(|queries| !queries.is_empty()) {
                    self.grants.wanted.insert(key);
                } else {
                    self.grants.waiters.remove(&key);
                }
            }
        }
    }

    /// The old content is durable in the store: records where it is, gives the heads their new birth, and grants.
    fn supersede(&mut self, job: &Job, zeros: &[ChunkRange]) {
        let Some((blocks, birth)) = self.state.volume(job.volume).map(|v| (v.chunk.blocks(), v.epoch)) else {
            return job.moves.iter().for_each(|&(_, extent)| self.state.unreserve(extent));
        };
        let mut runs: Vec<SupersededRun> = Vec::new();
        for &(range, extent) in &job.moves {
            for (run, sharing) in self.state.head_runs(job.volume, range) {
                for chunk in run.chunks() {
                    let place = extent.at.plus(block_offset(range, chunk, blocks));
                    let zero = zeros.iter().any(|z| z.contains(chunk));
                    match sharing {
                        Sharing::Shared { birth: old_birth } if zero => {
                            push_run(&mut runs, chunk, old_birth, Kept::Zero, blocks);
                        }
                        Sharing::Shared { birth: old_birth } => {
                            push_run(&mut runs, chunk, old_birth, Kept::Store(place), blocks);
                        }
                        Sharing::Unique => {}
                    }
                    if zero || sharing == Sharing::Unique {
                        self.state.unreserve(StoreExtent { at: place, blocks });
                    }
                }
            }
        }
        let made_unique: Vec<ChunkRange> = job.moves.iter().map(|&(run, _)| run).collect();
        if !runs.is_empty() {
            self.record(Record::Superseded { volume: job.volume, birth, runs });
        }
        self.break_marks(job.volume, &made_unique);
        for chunk in made_unique.into_iter().flat_map(ChunkRange::chunks) {
            self.settle(job.volume, chunk, |_| {});
        }
    }

    fn fail_for_space(&mut self, volume: VolumeId, chunks: &[Chunk]) {
        for &chunk in chunks {
            self.grants.wanted.remove(&(volume, chunk));
            self.settle(volume, chunk, |query| push_range(&mut query.no_space, chunk));
        }
    }

    fn fail_for_media(&mut self, volume: VolumeId, chunks: &[Chunk], reason: &str) {
        for &chunk in chunks {
            self.grants.wanted.remove(&(volume, chunk));
            self.settle(volume, chunk, |query| query.media = Some(reason.to_owned()));
        }
    }

    /// A chunk's copy-out is decided: every query that waited for it takes note, and is answered when it was the last.
    fn settle(&mut self, volume: VolumeId, chunk: Chunk, note: impl Fn(&mut Query)) {
        for query_id in self.grants.waiters.remove(&(volume, chunk)).unwrap_or_default() {
            let Some(query) = self.grants.queries.get_mut(&query_id) else { continue };
            note(query);
            query.missing -= 1;
            if query.missing == 0
                && let Some(query) = self.grants.queries.remove(&query_id)
            {
                self.finish_query(query);
            }
        }
    }

    fn finish_query(&mut self, query: Query) {
        if let Some(reason) = query.media {
            return self.refuse(query.conn, query.id, RefusalKind::Media, reason);
        }
        let epoch = self.state.volume(query.volume).map_or(Epoch(0), |v| v.epoch);
        let all_unique = self.state.youngest_live_snapshot(query.volume).is_none();
        let pages: BTreeSet<u64> = if all_unique {
            BTreeSet::new()
        } else {
            let pages = |r: &ChunkRange| r.first.0 / CHUNKS_PER_PAGE..=(r.end().0 - 1) / CHUNKS_PER_PAGE;
            query.ranges.iter().flat_map(pages).collect()
        };
        let pages = pages.into_iter().map(|page| self.state.unique_page(query.volume, page)).collect();
        let grant = FromServer::WriteOk { epoch, no_space: query.no_space, all_unique, pages };
        self.send(query.conn, query.id, grant);
    }
}

/// Blocks between the start of `run`'s place and that of `chunk` in it.
fn block_offset(run: ChunkRange, chunk: Chunk, blocks: u32) -> u32 {
    let index = u32::try_from(chunk.0 - run.first.0).expect("a run lies in one arena");
    debug_assert!(index < BLOCKS_PER_ARENA);
    index * blocks
}

/// Gives each chunk its place: runs of neighbours with contiguous places, in order.
fn pair(chunks: &[Chunk], places: &[StoreExtent], blocks: u32) -> Vec<(ChunkRange, StoreExtent)> {
    let per_chunk =
        |e: &StoreExtent| (0..e.blocks / blocks).map(|i| e.at.plus(i * blocks)).collect::<Vec<Location>>();
    let locations = places.iter().flat_map(per_chunk);
    let mut moves: Vec<(ChunkRange, StoreExtent)> = Vec::new();
    for (&chunk, at) in chunks.iter().zip(locations) {
        match moves.last_mut() {
            Some((run, extent)) if run.end() == chunk && follows(extent.at, extent.blocks, at) => {
                run.count += 1;
                extent.blocks += blocks;
            }
            _ => moves.push((ChunkRange::one(chunk), StoreExtent { at, blocks })),
        }
    }
    assert_eq!(
        moves.iter().map(|(run, _)| run.count).sum::<u64>(),
        chunks.len() as u64,
        "as many places as chunks"
    );
    moves
}

fn follows(at: Location, blocks: u32, next: Location) -> bool {
    (at.term, at.arena) == (next.term, next.arena) && at.block + blocks == next.block
}

fn push_run(runs: &mut Vec<SupersededRun>, chunk: Chunk, old_birth: Epoch, place: Kept, blocks: u32) {
    if let Some(last) = runs.last_mut() {
        let contiguous = match (last.place, place) {
            (Kept::Zero, Kept::Zero) => true,
            (Kept::Store(at), Kept::Store(next)) => {
                let taken = u32::try_from(last.range.count).map_or(u32::MAX, |n| n.saturating_mul(blocks));
                taken < BLOCKS_PER_ARENA && follows(at, taken, next)
            }
            _ => false,
        };
        if contiguous && last.old_birth == old_birth && last.range.end() == chunk {
            last.range.count += 1;
            return;
        }
    }
    runs.push(SupersededRun { range: ChunkRange::one(chunk), old_birth, place });
}

fn push_range(ranges: &mut Vec<ChunkRange>, chunk: Chunk) {
    match ranges.last_mut() {
        Some(last) if last.end() == chunk => last.count += 1,
        _ => ranges.push(ChunkRange::one(chunk)),
    }
}
