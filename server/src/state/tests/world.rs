//! A state with the model that it is compared to.
//!
//! The model keeps every snapshot as a full image of content numbers (0 is zeros), and what was last written to each
//! place of the store. A wrong place, a version reaped too early or a place reused too early all show as wrong content.

use std::collections::{BTreeMap, BTreeSet};

use csnap_proto::ids::{
    Epoch, FreeBatchId, InstanceId, Name, PoolId, RequestToken, Secret, SessionId, Term, VolumeId,
};
use csnap_proto::limits::CHUNKS_PER_PAGE;
use csnap_proto::message::volume::Place;
use csnap_proto::units::{Chunk, ChunkRange, ChunkSize, Location, StoreExtent, WallMillis};

use crate::state::{Attached, Kept, Loader, Origin, Record, Sharing, State, SupersededRun};

pub(super) const POOL: PoolId = PoolId([7; 16]);

pub(super) fn name(text: impl Into<String>) -> Name {
    Name::new(text).expect("a good name")
}

pub(super) fn range(first: u64, count: u64) -> ChunkRange {
    ChunkRange { first: Chunk(first), count }
}

/// A session id that a number stands for.
pub(super) fn session_id(number: u64) -> SessionId {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&number.to_le_bytes());
    SessionId(id)
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("small")
}

/// One volume, as the model sees it.
pub(super) struct Model {
    pub(super) id: VolumeId,
    pub(super) blocks: u32,
    pub(super) head: Vec<u64>,
    /// Epoch of the last write of each chunk.
    written: Vec<Epoch>,
    pub(super) snapshots: BTreeMap<Epoch, Vec<u64>>,
}

pub(super) struct World {
    pub(super) state: State,
    pub(super) journal: Vec<Record>,
    pub(super) models: Vec<Model>,
    /// Content of the first block of each place.
    store: BTreeMap<Location, u64>,
    /// What each reader learned and may be reading.
    learned: BTreeMap<SessionId, BTreeSet<Location>>,
    counter: u64,
}

impl World {
    /// A pool under term 1.
    pub(super) fn new() -> Self {
        let mut world = Self {
            state: State::new(POOL),
            journal: Vec::new(),
            models: Vec::new(),
            store: BTreeMap::new(),
            learned: BTreeMap::new(),
            counter: 0,
        };
        world.record(Record::PoolInit { pool: POOL });
        world.record(Record::TermBegin { term: Term(1), node: name("n1") });
        world
    }

    pub(super) fn with_volume(chunks: u64, chunk_bytes: u64) -> Self {
        let mut world = Self::new();
        world.create_volume(chunks, chunk_bytes);
        world
    }

    pub(super) fn next(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    /// Puts a record through the journal's encoding and applies it.
    pub(super) fn record(&mut self, record: Record) {
        let bytes = record.encode_onto(Vec::new());
        let decoded = Record::decode_batch(&bytes).expect("what was encoded decodes");
        assert_eq!(decoded, std::slice::from_ref(&record));
        if let Err(corrupt) = self.state.apply(&record) {
            panic!("{corrupt} while applying {record:?}");
        }
        self.journal.push(record);
    }

    pub(super) fn create_volume(&mut self, chunks: u64, chunk_bytes: u64) -> usize {
        let chunk = ChunkSize::from_bytes(chunk_bytes).expect("an allowed size");
        let number = u32::try_from(self.next()).expect("few");
        let id = VolumeId::new(self.state.term(), number).expect("fits");
        self.record(Record::VolumeCreate {
            id,
            name: name(format!("v{number}")),
            // The last chunk is partial.
            size_bytes: chunks * chunk_bytes - 512,
            chunk,
            origin: Origin::Pool,
            created: WallMillis(1),
            importer: None,
        });
        let chunks = usize::try_from(chunks).expect("small");
        self.models.push(Model {
            id,
            blocks: chunk.blocks(),
            head: vec![0; chunks],
            written: vec![Epoch(0); chunks],
            snapshots: BTreeMap::new(),
        });
        self.models.len() - 1
    }

    /// Reserves places as the core does, growing the store when it must.
    pub(super) fn reserve(&mut self, chunks: u64, blocks: u32) -> Vec<StoreExtent> {
        loop {
            match self.state.reserve(chunks, blocks) {
                Ok(places) => return places,
                Err(need) => self.record(Record::ArenaReserve { extent: need.grow }),
            }
        }
    }

    /// A client writes `content` to a run of chunks: asks for what is shared, then overwrites.
    pub(super) fn write(&mut self, volume: usize, range: ChunkRange, content: u64) {
        let (id, blocks) = (self.models[volume].id, self.models[volume].blocks);
        for (run, sharing) in self.state.head_runs(id, range) {
            if let Sharing::Shared { birth } = sharing {
                self.copy_out(volume, id, blocks, run, birth);
            }
        }
        let epoch = self.state.volume(id).expect("lives").epoch;
        let model = &mut self.models[volume];
        for chunk in range.chunks() {
            model.head[index(chunk.0)] = content;
            model.written[index(chunk.0)] = epoch;
        }
    }

    fn copy_out(&mut self, volume: usize, id: VolumeId, blocks: u32, run: ChunkRange, old_birth: Epoch) {
        let places = self.reserve(run.count, blocks);
        let slots = places.iter().flat_map(|e| (0..e.blocks / blocks).map(move |i| e.at.plus(i * blocks)));
        let slots: Vec<Location> = slots.collect();
        assert_eq!(slots.len() as u64, run.count, "a place for every chunk");
        let mut runs: Vec<SupersededRun> = Vec::new();
        for (chunk, at) in run.chunks().zip(slots) {
            let content = self.models[volume].head[index(chunk.0)];
            if content == 0 {
                self.state.unreserve(StoreExtent { at, blocks });
                join(
                    &mut runs,
                    blocks,
                    SupersededRun { range: ChunkRange::one(chunk), old_birth, place: Kept::Zero },
                );
                continue;
            }
            for reader in self.learned.values() {
                assert!(!reader.contains(&at), "{at:?} is overwritten while a reader may be reading it");
            }
            self.store.insert(at, content);
            join(
                &mut runs,
                blocks,
                SupersededRun { range: ChunkRange::one(chunk), old_birth, place: Kept::Store(at) },
            );
        }
        let birth = self.state.volume(id).expect("lives").epoch;
        self.record(Record::Superseded { volume: id, birth, runs });
    }

    pub(super) fn snapshot(&mut self, volume: usize) -> Epoch {
        let id = self.models[volume].id;
        let (epoch, size_bytes) = self.state.volume(id).map(|v| (v.epoch, v.size_bytes)).expect("lives");
        let (created, token) = (WallMillis(2), RequestToken([3; 16]));
        let name = name(format!("s{}", epoch.0));
        self.record(Record::SnapshotCreate { volume: id, epoch, name, size_bytes, created, token });
        let model = &mut self.models[volume];
        model.snapshots.insert(epoch, model.head.clone());
        epoch
    }

    pub(super) fn delete(&mut self, volume: usize, epoch: Epoch) {
        let id = self.models[volume].id;
        self.record(Record::SnapshotDelete { volume: id, epoch });
        self.models[volume].snapshots.remove(&epoch);
    }

    /// The `nth` live snapshot of the volume, modulo how many there are.
    pub(super) fn nth(&self, volume: usize, nth: usize) -> Option<Epoch> {
        let live = &self.models[volume].snapshots;
        live.keys().nth(nth % live.len().max(1)).copied()
    }

    /// One slice of background work; false if there is none.
    pub(super) fn reap(&mut self, budget: usize) -> bool {
        let record = self.state.next_reap(budget);
        record.map(|record| self.record(record)).is_some()
    }

    pub(super) fn open_reader(&mut self, volume: usize, epoch: Epoch) -> SessionId {
        let session = session_id(self.next());
        let attached = Attached::Snapshot(self.models[volume].id, epoch);
        self.open(session, attached);
        self.learned.insert(session, BTreeSet::new());
        session
    }

    pub(super) fn open(&mut self, session: SessionId, attached: Attached) {
        let (secret, instance) = (Secret([1; 16]), InstanceId([2; 16]));
        let (node, opened) = (name("n1"), WallMillis(3));
        self.record(Record::SessionOpen { session, secret, instance, node, pid: 9, attached, opened });
    }

    /// The reader looks at everything in its snapshot, and remembers it.
    pub(super) fn learn(&mut self, session: SessionId) {
        let Some(Attached::Snapshot(volume, epoch)) = self.state.session(session).map(|s| s.attached) else {
            return;
        };
        let Some(model) = self.models.iter().find(|model| model.id == volume) else { return };
        let (chunks, blocks) = (model.head.len() as u64, model.blocks);
        for extent in self.state.locate(volume, epoch, range(0, chunks)) {
            if let Place::Store(at) = extent.place {
                let places =
                    (0..u32::try_from(extent.range.count).expect("few")).map(|i| at.plus(i * blocks));
                self.learned.get_mut(&session).expect("a reader").extend(places);
            }
        }
    }

    /// The reader forgets what it is told to, and says so.
    pub(super) fn confirm(&mut self, session: SessionId) {
        let told: Vec<(FreeBatchId, Vec<StoreExtent>)> =
            self.state.unconfirmed_frees(session).map(|(batch, extents)| (batch, extents.to_vec())).collect();
        let Some(&(upto, _)) = told.last() else { return };
        let learned = self.learned.get_mut(&session).expect("a reader");
        for extent in told.iter().flat_map(|(_, extents)| extents) {
            learned.retain(|at| {
                (at.term, at.arena) != (extent.at.term, extent.at.arena)
                    || at.block < extent.at.block
                    || at.block >= extent.at.block + extent.blocks
            });
        }
        self.record(Record::FreesConfirmed { session, upto });
    }

    pub(super) fn end(&mut self, session: SessionId) {
        self.learned.remove(&session);
        self.record(Record::SessionEnd { session });
    }

    pub(super) fn readers(&self) -> Vec<SessionId> {
        self.learned.keys().copied().collect()
    }

    pub(super) fn release_batches(&mut self) {
        let batches: Vec<FreeBatchId> = self.state.confirmed_batches().collect();
        batches.into_iter().for_each(|batch| self.record(Record::BatchReusable { batch }));
    }

    pub(super) fn punch(&mut self, budget: usize) -> bool {
        let Some(extents) = self.state.next_punch(budget) else { return false };
        assert!(extents.len() <= budget);
        for extent in &extents {
            for block in 0..extent.blocks {
                self.store.remove(&extent.at.plus(block));
            }
        }
        self.record(Record::Punched { extents });
        true
    }

    /// Another server takes over: what was promised is forgotten, the older one may still run.
    pub(super) fn next_term(&mut self) {
        let term = self.state.term().next();
        self.record(Record::TermBegin { term, node: name(format!("n{}", term.0)) });
    }

    /// The state as a successor would have it, by each of its ways.
    pub(super) fn check_recovery(&self) {
        let mut replayed = State::new(POOL);
        self.journal.iter().for_each(|record| replayed.apply(record).expect("applied before"));
        assert_eq!(replayed.digest(), self.state.digest(), "replay gives the same state");
        let mut loader = Loader::new();
        self.state.checkpoint().for_each(|piece| loader.push(&piece).expect("a good checkpoint"));
        let loaded = loader.finish().expect("a whole checkpoint");
        assert_eq!(loaded.digest(), self.state.digest(), "a checkpoint gives the same state");
        assert_eq!(loaded.check(), Ok(()));
        assert_eq!(loaded.used_bytes(), self.state.used_bytes());
    }

    /// Everything that can be asked agrees with the model.
    pub(super) fn check(&self) {
        if let Err(problems) = self.state.check() {
            panic!("{problems:#?}");
        }
        self.models.iter().for_each(|model| self.check_model(model));
    }

    fn check_model(&self, model: &Model) {
        let chunks = model.head.len() as u64;
        for (&epoch, image) in &model.snapshots {
            let mut at = 0;
            // Asked for one chunk too many: beyond the end it is zeros.
            for extent in self.state.locate(model.id, epoch, range(0, chunks + 1)) {
                assert_eq!(extent.range.first.0, at, "extents follow each other");
                at += extent.range.count;
                for (chunk, nth) in extent.range.chunks().zip(0..) {
                    let want = image.get(index(chunk.0)).copied().unwrap_or(0);
                    let got = match extent.place {
                        Place::Zero => 0,
                        Place::Origin => model.head[index(chunk.0)],
                        Place::Store(at) => self.store[&at.plus(nth * model.blocks)],
                    };
                    assert_eq!(got, want, "{chunk:?} of snapshot {epoch}");
                }
            }
            assert_eq!(at, chunks + 1, "the whole range is covered");
        }
        let youngest = model.snapshots.keys().next_back().copied();
        let shared = |chunk: u64| youngest.is_some_and(|youngest| model.written[index(chunk)] <= youngest);
        for (run, sharing) in self.state.head_runs(model.id, range(0, chunks)) {
            run.chunks()
                .for_each(|c| assert_eq!(sharing != Sharing::Unique, shared(c.0), "sharing of {c:?}"));
        }
        for page in 0..chunks.div_ceil(CHUNKS_PER_PAGE) {
            let bits = self.state.unique_page(model.id, page).bits;
            for chunk in page * CHUNKS_PER_PAGE..chunks.min((page + 1) * CHUNKS_PER_PAGE) {
                let bit = chunk % CHUNKS_PER_PAGE;
                let unique = bits.is_empty() || bits[index(bit / 8)] & 1 << (bit % 8) != 0;
                assert_eq!(unique, !shared(chunk), "bit of {chunk}");
            }
        }
        for (&epoch, image) in &model.snapshots {
            assert_eq!(
                self.state.own_bytes(model.id, epoch),
                self.own_bytes(model, epoch, image),
                "own {epoch}"
            );
        }
    }

    /// What the model knows that only this snapshot has in the store: places no other live snapshot locates.
    fn own_bytes(&self, model: &Model, epoch: Epoch, image: &[u64]) -> u64 {
        let places = |epoch| -> BTreeSet<Location> {
            let extents = self.state.locate(model.id, epoch, range(0, image.len() as u64));
            let stored = extents.into_iter().filter_map(|e| match e.place {
                Place::Store(at) => Some((at, u32::try_from(e.range.count).expect("few"))),
                Place::Zero | Place::Origin => None,
            });
            stored.flat_map(|(at, count)| (0..count).map(move |i| at.plus(i * model.blocks))).collect()
        };
        let live: Vec<Epoch> = model.snapshots.keys().copied().collect();
        let at = live.iter().position(|e| *e == epoch).expect("lives");
        // Whoever shares a place with it is a neighbour: a version covers a stretch of epochs.
        let neighbours = [at.checked_sub(1), Some(at + 1)].into_iter().flatten().filter_map(|i| live.get(i));
        let shared: BTreeSet<Location> = neighbours.flat_map(|epoch| places(*epoch)).collect();
        places(epoch).difference(&shared).count() as u64 * u64::from(model.blocks) * 4096
    }

    /// Deletes everything, waits for nobody, and finds the pool as empty as it was made.
    pub(super) fn wind_up(&mut self) {
        self.readers().into_iter().for_each(|session| self.end(session));
        for volume in 0..self.models.len() {
            while let Some(epoch) = self.nth(volume, 0) {
                self.delete(volume, epoch);
            }
        }
        while self.reap(1000) {}
        self.release_batches();
        for term in 1..self.state.term().0 {
            self.record(Record::TermDead { term: Term(term) });
        }
        while self.punch(1000) {}
        self.check();
        assert_eq!(self.state.used_bytes(), 0, "nothing is used");
        assert_eq!(self.state.held().bytes, 0, "nothing is held");
        for arena in self.state.space.arenas.values() {
            assert_eq!((arena.taken(), arena.idle()), (0, 0), "nothing takes space on disk");
        }
        for volume in self.state.volumes.values() {
            assert_eq!(volume.map.heads().count(), 0, "no head birth is left");
            assert_eq!(volume.map.births().iter().count(), 0, "no birth is left");
        }
    }
}

fn join(runs: &mut Vec<SupersededRun>, blocks: u32, next: SupersededRun) {
    if let Some(last) = runs.last_mut() {
        let count = u32::try_from(last.range.count).expect("few");
        let follows = match (last.place, next.place) {
            (Kept::Zero, Kept::Zero) => true,
            (Kept::Store(a), Kept::Store(b)) => {
                (a.term, a.arena, a.block + count * blocks) == (b.term, b.arena, b.block)
            }
            _ => false,
        };
        if follows && last.range.end() == next.range.first {
            last.range.count += 1;
            return;
        }
    }
    runs.push(next);
}
