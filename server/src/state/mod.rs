//! The server's durable state: volumes, snapshots, the chunk map, the store's space, sessions.
//!
//! A pure state machine: [`State::apply`] takes one [`Record`] of the journal after the other, the same way live, in
//! replay and in a standby that follows. It does no I/O, knows no time and decides nothing but what is told here:
//! which places are free (`reserve`), which work waits (`next_reap`, `next_punch`). The core asks, decides, records.
//!
//! Cheap to clone: what grows with the data is shared until it changes, so a checkpoint works on a clone.
//!
//! What is *not* in it: connections, marks, what is in flight. Promises of places (`reserve`, `next_punch`) are in its
//! memory but in no record, no checkpoint and no digest: they die with the server.
//!
//! Invariants, all verified by [`State::check`]: every place in the store is kept by one version or one batch of frees
//! and marked taken; a chunk's births ascend; the indexes match what they index; epochs of snapshots lie below their
//! volume's epoch.

mod apply;
mod arena;
mod births;
mod check;
mod checkpoint;
mod free;
mod leaves;
mod load;
mod map;
mod reap;
mod record;
mod session;
mod space;
#[cfg(test)]
mod tests;
mod volume;

use std::collections::BTreeMap;
use std::ops::Bound;

use csnap_proto::ids::{Epoch, FreeBatchId, Name, PoolId, Sequence, SessionId, Term, VolumeId};
use csnap_proto::limits::CHUNK_BYTES_MIN;
use csnap_proto::message::volume::{Extent, Place, UniquePage};
use csnap_proto::units::{Chunk, ChunkRange, StoreExtent};

pub use checkpoint::PIECE_BYTES_MAX;
pub use load::Loader;
pub use map::Sharing;
pub use record::{
    Attached, DeadRun, Kept, Origin, RECORD_BYTES_MAX, RESULT_BYTES_MAX, RUNS_PER_RECORD_MAX, ReapCursor,
    Record, SupersededRun,
};
pub use session::{Session, StoredResult};
pub use space::{Held, NeedSpace};
pub use volume::{Snapshot, Volume};

/// A record or a checkpoint that cannot be: damaged, or made by a bug.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("corrupt state: {what}")]
pub struct Corrupt {
    /// What does not fit, for people.
    pub what: String,
}

impl Corrupt {
    fn new(what: impl Into<String>) -> Self {
        Self { what: what.into() }
    }
}

/// See the module's documentation.
#[derive(Clone, Debug)]
pub struct State {
    pool: PoolId,
    /// Deleted ones too, until their head is removed.
    volumes: BTreeMap<VolumeId, Volume>,
    names: BTreeMap<Name, VolumeId>,
    sessions: session::Sessions,
    space: space::Space,
}

impl State {
    /// An empty pool.
    #[must_use]
    pub fn new(pool: PoolId) -> Self {
        Self {
            pool,
            volumes: BTreeMap::new(),
            names: BTreeMap::new(),
            sessions: session::Sessions::default(),
            space: space::Space::new(),
        }
    }

    /// The pool that it is the state of.
    #[must_use]
    pub fn pool(&self) -> PoolId {
        self.pool
    }

    /// The term of the server that began last; 0 before the first.
    #[must_use]
    pub fn term(&self) -> Term {
        self.space.term
    }

    /// Whether an older term's server cannot do anything any more, as far as the state knows of it.
    #[must_use]
    pub fn is_term_dead(&self, term: Term) -> bool {
        term < self.space.term && !self.space.alive.contains_key(&term)
    }

    /// Terms before the current one whose servers are not known dead: their arenas are held.
    pub fn older_terms(&self) -> impl Iterator<Item = Term> + '_ {
        self.older_servers().map(|(term, _)| term)
    }

    /// The same with the nodes where they ran, in order.
    pub fn older_servers(&self) -> impl Iterator<Item = (Term, &Name)> {
        self.space.alive.range(..self.space.term).map(|(term, node)| (*term, node))
    }

    /// Every arena of the store that something was reserved in.
    pub fn arenas(&self) -> impl Iterator<Item = (Term, u32)> + '_ {
        self.space.arenas.keys().copied()
    }

    /// A volume that is not deleted, published or not.
    #[must_use]
    pub fn volume(&self, id: VolumeId) -> Option<&Volume> {
        self.volumes.get(&id).filter(|volume| !volume.deleted)
    }

    /// A volume by its name, published or not.
    #[must_use]
    pub fn volume_by_name(&self, name: &Name) -> Option<&Volume> {
        self.volume(*self.names.get(name)?)
    }

    /// Every volume that is not deleted, published or not, by id.
    pub fn volumes(&self) -> impl Iterator<Item = &Volume> {
        self.volumes.values().filter(|volume| !volume.deleted)
    }

    /// Those whose names come after this one, published or not, by name.
    pub fn volumes_by_name(&self, after: Option<&Name>) -> impl Iterator<Item = &Volume> {
        let from = after.map_or(Bound::Unbounded, |name| Bound::Excluded(name.clone()));
        self.names.range((from, Bound::Unbounded)).filter_map(|(_, id)| self.volume(*id))
    }

    /// Bytes of a chunk of the volume; of the smallest chunk, if there is no such volume.
    #[must_use]
    pub fn chunk_bytes(&self, volume: VolumeId) -> u64 {
        self.volume(volume).map_or(CHUNK_BYTES_MIN, |volume| volume.chunk.bytes())
    }

    /// Deleted volumes that nothing is left of but the head. Older servers that may live do not touch heads; whoever
    /// removes one is to see to it that its id stays unused.
    pub fn removable_heads(&self) -> impl Iterator<Item = VolumeId> + '_ {
        self.volumes.values().filter(|volume| volume.is_spent()).map(|volume| volume.id)
    }

    /// Every volume that has a head, deleted ones too until their head is removed.
    pub fn heads(&self) -> impl Iterator<Item = VolumeId> + '_ {
        self.volumes.keys().copied()
    }

    /// Where the head of a deleted volume lies.
    #[must_use]
    pub fn removable_origin(&self, volume: VolumeId) -> Option<&Origin> {
        self.volumes.get(&volume).filter(|volume| volume.is_spent()).map(|volume| &volume.origin)
    }

    /// A live snapshot.
    #[must_use]
    pub fn snapshot(&self, volume: VolumeId, epoch: Epoch) -> Option<&Snapshot> {
        self.volume(volume)?.snapshots.get(epoch)
    }

    /// A live snapshot by its name.
    #[must_use]
    pub fn snapshot_by_name(&self, volume: VolumeId, name: &Name) -> Option<&Snapshot> {
        self.volume(volume)?.snapshots.by_name(name)
    }

    /// Live snapshots of a volume, oldest first.
    pub fn snapshots(&self, volume: VolumeId) -> impl Iterator<Item = &Snapshot> {
        self.snapshots_from(volume, Epoch(0))
    }

    /// Live snapshots of a volume from an epoch on, oldest first.
    pub fn snapshots_from(&self, volume: VolumeId, epoch: Epoch) -> impl Iterator<Item = &Snapshot> {
        self.volume(volume).into_iter().flat_map(move |volume| volume.snapshots.from(epoch))
    }

    /// How many snapshots of the volume live.
    #[must_use]
    pub fn snapshot_count(&self, volume: VolumeId) -> usize {
        self.volume(volume).map_or(0, |volume| volume.snapshots.len())
    }

    /// The youngest live snapshot. With none, every chunk of the head is unique.
    #[must_use]
    pub fn youngest_live_snapshot(&self, volume: VolumeId) -> Option<Epoch> {
        self.volume(volume)?.snapshots.youngest()
    }

    /// Runs of the head, in order, that cover the part of `range` which lies in the volume.
    #[must_use]
    pub fn head_runs(&self, volume: VolumeId, range: ChunkRange) -> Vec<(ChunkRange, Sharing)> {
        let Some(volume) = self.volume(volume) else { return Vec::new() };
        let inside = clip(range, volume.chunks());
        inside.map_or_else(Vec::new, |range| volume.map.head_runs(range, volume.snapshots.youngest()))
    }

    /// Which chunks of a page may be overwritten in place in the current epoch.
    #[must_use]
    pub fn unique_page(&self, volume: VolumeId, page: u64) -> UniquePage {
        match self.volume(volume) {
            Some(volume) => volume.map.unique_page(page, volume.chunks(), volume.snapshots.youngest()),
            None => map::ChunkMap::default().unique_page(page, u64::MAX, Some(Epoch(0))),
        }
    }

    /// Where the chunks of `range` lie in a live snapshot, in order, neighbours merged. What lies beyond the
    /// snapshot's end is zeros; its last chunk may be partial. Empty if there is no such snapshot.
    #[must_use]
    pub fn locate(&self, volume: VolumeId, epoch: Epoch, range: ChunkRange) -> Vec<Extent> {
        let Some(volume) = self.volume(volume) else { return Vec::new() };
        let Some(snapshot) = volume.snapshots.get(epoch) else { return Vec::new() };
        let chunks = volume.chunk.chunks_in(snapshot.size_bytes);
        let Some(inside) = clip(range, chunks) else { return vec![Extent { range, place: Place::Zero }] };
        let mut extents = volume.map.locate(inside, epoch, volume.chunk.blocks());
        if inside.count < range.count {
            let beyond = ChunkRange { first: inside.end(), count: range.count - inside.count };
            extents.push(Extent { range: beyond, place: Place::Zero });
        }
        extents
    }

    /// A session.
    #[must_use]
    pub fn session(&self, id: SessionId) -> Option<&Session> {
        self.sessions.get(id)
    }

    /// Every session, by id.
    pub fn sessions(&self) -> impl Iterator<Item = &Session> {
        self.sessions.iter()
    }

    /// The session that writes the volume.
    #[must_use]
    pub fn writer_of(&self, volume: VolumeId) -> Option<&Session> {
        self.sessions.writer_of(volume)
    }

    /// Sessions that have the snapshot open.
    pub fn readers_of(&self, volume: VolumeId, epoch: Epoch) -> impl Iterator<Item = &Session> {
        self.sessions.readers(volume, epoch, epoch)
    }

    /// Sessions that have the volume or a snapshot of it open, the writer first.
    pub fn sessions_of(&self, volume: VolumeId) -> impl Iterator<Item = &Session> {
        self.writer_of(volume).into_iter().chain(self.sessions.all_readers(volume))
    }

    /// The stored answer to a mutating request.
    #[must_use]
    pub fn result(&self, session: SessionId, sequence: Sequence) -> Option<&StoredResult> {
        self.session(session)?.results.get(&sequence)
    }

    /// Promises places for `chunks` chunks of `blocks` blocks each, in as few runs as can be; each run holds whole
    /// chunks. All or none. What is not superseded into goes back with [`State::unreserve`].
    pub fn reserve(&mut self, chunks: u64, blocks: u32) -> Result<Vec<StoreExtent>, NeedSpace> {
        self.space.reserve(chunks, blocks)
    }

    /// Gives a promise back: places from [`State::reserve`], or extents of [`State::next_punch`] not punched.
    pub fn unreserve(&mut self, extent: StoreExtent) {
        self.space.unreserve(extent);
    }

    /// Free space that takes room on disk, at most `extents` runs: to be punched once the gate was seen open, then
    /// recorded as punched. Promised until then. An arena that nothing is kept or promised in gives back what was
    /// reserved ahead, too: whoever has space reserved promises it at once.
    pub fn next_punch(&mut self, extents: usize) -> Option<Vec<StoreExtent>> {
        self.space.next_punch(extents)
    }

    /// Closed batches that nobody is waited for. Their space is overwritten or punched once it is free, so
    /// `BatchReusable` is recorded only when everything recorded before this was asked is durable and the gate was
    /// then seen open.
    pub fn confirmed_batches(&self) -> impl Iterator<Item = FreeBatchId> + '_ {
        self.space.frees.sealed.iter().filter(|(_, batch)| batch.waiting.is_empty()).map(|(id, _)| *id)
    }

    /// Closed batches that the session has yet to confirm, oldest first, with the places of its volume.
    pub fn unconfirmed_frees(
        &self,
        session: SessionId,
    ) -> impl Iterator<Item = (FreeBatchId, &[StoreExtent])> {
        let volume = self.session(session).and_then(|session| match session.attached {
            Attached::Snapshot(volume, _) => Some(volume),
            Attached::Writer(_) | Attached::Operator => None,
        });
        let waiting =
            self.space.frees.sealed.iter().filter(move |(_, batch)| batch.waiting.contains(&session));
        waiting.filter_map(move |(id, batch)| Some((*id, batch.freed.get(&volume?)?.as_slice())))
    }

    /// Store space of versions, bytes.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.space.used_bytes()
    }

    /// Store space of one volume's versions, bytes.
    #[must_use]
    pub fn store_bytes(&self, volume: VolumeId) -> u64 {
        self.volumes.get(&volume).map_or(0, |volume| volume.map.stored() * volume.chunk.bytes())
    }

    /// What deleting a live snapshot would free, bytes: the versions that only it reads. Costs what changed between it
    /// and the next one.
    #[must_use]
    pub fn own_bytes(&self, volume: VolumeId, epoch: Epoch) -> u64 {
        let Some(volume) = self.volume(volume).filter(|volume| volume.snapshots.get(epoch).is_some()) else {
            return 0;
        };
        volume.own_chunks(epoch) * volume.chunk.bytes()
    }

    /// Space that must wait before it can be used, and for whom.
    #[must_use]
    pub fn held(&self) -> Held {
        let mut held = Held { bytes: self.space.frees.blocks() * CHUNK_BYTES_MIN, because: Vec::new() };
        let mut by_session: BTreeMap<SessionId, u64> = BTreeMap::new();
        for batch in self.space.frees.sealed.values() {
            batch
                .waiting
                .iter()
                .for_each(|id| *by_session.entry(*id).or_default() += batch.blocks * CHUNK_BYTES_MIN);
        }
        for (id, bytes) in by_session {
            let who =
                self.session(id).map_or_else(String::new, |s| format!(" on node {} (pid {})", s.node, s.pid));
            held.because.push(format!("{bytes} bytes until session {id}{who} confirms that it forgot them"));
        }
        for (term, bytes) in self.space.held_by_terms() {
            held.bytes += bytes;
            // Its own server may be dead and one after it not, which was given its arenas.
            if let Some((alive, node)) = self.older_servers().find(|(alive, _)| *alive >= term) {
                let until = format!("until the server of term {alive} on node {node} is known dead");
                held.because.push(format!("{bytes} bytes {until}"));
            }
        }
        let heads = self.removable_heads().count();
        if let Some((term, node)) = self.older_servers().next().filter(|_| heads > 0) {
            let until = format!("until the server of term {term} on node {node} is known dead");
            held.because.push(format!("the heads of {heads} deleted volumes {until}"));
        }
        held
    }
}

/// The part of `range` below chunk `end`, if there is any.
fn clip(range: ChunkRange, end: u64) -> Option<ChunkRange> {
    let Chunk(first) = range.first;
    let count = range.count.min(end.checked_sub(first)?);
    (count > 0).then_some(ChunkRange { first: range.first, count })
}
