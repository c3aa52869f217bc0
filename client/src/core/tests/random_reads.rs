//! The reader of a snapshot against a server in random interleavings: chunks are overwritten and copied out, marks break,
//! places move and are reused, connections and servers go. Whatever is completed must be the snapshot's content.

use std::collections::{BTreeSet, VecDeque};

use proptest::prelude::*;

use super::*;

/// What random runs use of the volume: little, so that readers and writer meet.
const VOLUME_CHUNKS: u64 = 24;

/// One mebibyte.
const LARGE_CHUNKS: u64 = 256;

#[derive(Clone, Debug)]
enum Act {
    Read {
        offset: u64,
        len: u64,
    },
    IoDone {
        pick: usize,
    },
    ToServer,
    ToClient,
    /// A writer's grant: copied out, marks broken, then the head changes.
    Overwrite {
        chunk: u64,
    },
    /// A stored chunk gets another place; the old one is freed.
    Move {
        chunk: u64,
    },
    Break,
    Failover,
    Tick {
        ms: u64,
    },
    PutOff,
}

fn acts() -> impl Strategy<Value = Act> {
    let bytes = VOLUME_CHUNKS * CHUNK;
    prop_oneof![
        6 => (0..bytes - 1, 1..6 * CHUNK).prop_map(move |(offset, len)| Act::Read { offset, len: len.min(bytes - offset) }),
        8 => any::<usize>().prop_map(|pick| Act::IoDone { pick }),
        8 => Just(Act::ToServer),
        8 => Just(Act::ToClient),
        3 => (0..VOLUME_CHUNKS).prop_map(|chunk| Act::Overwrite { chunk }),
        2 => (0..VOLUME_CHUNKS).prop_map(|chunk| Act::Move { chunk }),
        1 => Just(Act::Break),
        1 => Just(Act::Failover),
        2 => (1..4000u64).prop_map(|ms| Act::Tick { ms }),
        1 => Just(Act::PutOff),
    ]
}

/// From which byte of the buffer to which, and whether it is right.
type Part = (u64, u64, bool);

#[derive(Debug)]
struct Mark {
    ranges: Vec<ChunkRange>,
    broken: bool,
}

#[derive(Debug, Default)]
struct World {
    term: u64,
    /// Of chunks that were copied out; every third chunk is zero, the rest is on the origin.
    places: BTreeMap<u64, u32>,
    /// What a block of the store holds; freed and reused ones hold nothing of ours.
    store: BTreeMap<u32, u64>,
    blocks: u32,
    overwritten: BTreeSet<u64>,
    /// On the connection that is open.
    marks: BTreeMap<ReadId, Mark>,
    /// Freed blocks by batch, until the client confirms.
    freed: BTreeMap<u64, u32>,
    batches: u64,
    to_server: VecDeque<Frame<ToServer>>,
    to_client: VecDeque<Frame<FromServer>>,
    ios: BTreeMap<IoId, IoOp>,
    /// Requests with offset, length, and what was read so far.
    requests: BTreeMap<u64, (u64, u64, Vec<Part>)>,
    connected: bool,
    put_off: bool,
    completed: u64,
}

struct Pair {
    rig: Rig,
    world: World,
}

impl World {
    fn place(&self, chunk: u64) -> Place {
        match self.places.get(&chunk) {
            Some(&block) => stored(block),
            None if chunk.is_multiple_of(3) => Place::Zero,
            None => Place::Origin,
        }
    }

    fn say(&mut self, id: RequestId, message: FromServer) {
        self.to_client.push_back(Frame { id, term: Term(self.term), message });
    }

    fn new_block(&mut self, chunk: u64) {
        self.blocks += 1;
        self.store.insert(self.blocks, chunk);
        self.places.insert(chunk, self.blocks);
    }

    /// Extents of the ranges; now and then neighbours that lie side by side come as one.
    fn locate(&self, ranges: &[ChunkRange]) -> Vec<Extent> {
        let mut extents: Vec<Extent> = Vec::new();
        for range in ranges {
            let begin = extents.len();
            for chunk in range.chunks() {
                let place = self.place(chunk.0);
                match extents[begin..].last_mut() {
                    Some(last) if joins(last, place) => last.range.count += 1,
                    _ => extents.push(Extent { range: ChunkRange::one(chunk), place }),
                }
            }
        }
        extents
    }

    fn on_server(&mut self, frame: Frame<ToServer>) {
        let id = frame.id;
        match frame.message {
            ToServer::Identify(_) => {
                let mut ok = identify_ok(1, false, false);
                ok.geometry.as_mut().expect("is there").size_bytes = LARGE_CHUNKS * CHUNK;
                self.say(id, FromServer::IdentifyOk(ok));
            }
            ToServer::QuerySnapshotRead { .. } if std::mem::take(&mut self.put_off) => {
                self.say(id, FromServer::Refused(Refusal::new(RefusalKind::Busy, "later")));
            }
            ToServer::QuerySnapshotRead { read, ranges } => {
                let extents = self.locate(&ranges);
                if extents.iter().any(|extent| extent.place == Place::Origin) {
                    self.marks.insert(read, Mark { ranges, broken: false });
                }
                self.say(id, FromServer::SnapshotRead { read, extents });
            }
            ToServer::FinishSnapshotRead { read } => {
                let good = self.marks.remove(&read).is_some_and(|mark| !mark.broken);
                let answer =
                    if good { FromServer::FinishSnapshotReadOk { read } } else { FromServer::Retry { read } };
                self.say(id, answer);
            }
            ToServer::Renew { forgotten } => {
                // What is confirmed is reused at once.
                let kept = self.freed.split_off(&(forgotten.0 + 1));
                for block in std::mem::replace(&mut self.freed, kept).into_values() {
                    self.store.remove(&block);
                }
                let forget = |(&batch, _): (&u64, _)| Forget { batch: FreeBatchId(batch), extents: vec![] };
                let forget = self.freed.iter().map(forget).collect();
                self.say(id, FromServer::Renewed { forget, all_unique: false, epoch: Epoch(1) });
            }
            other => panic!("{other:?} of a reader"),
        }
    }

    /// Whether the I/O, done now, brings the snapshot's bytes.
    fn is_right(&self, op: IoOp, offset: u64, len: u64) -> bool {
        let right = |chunk: Chunk| match op {
            IoOp::ReadZeros { .. } => self.place(chunk.0) == Place::Zero,
            IoOp::HeadRead { offset: at, .. } => at == offset && !self.overwritten.contains(&chunk.0),
            IoOp::StoreRead { location, skip, .. } => {
                let from = offset.max(chunk.0 * CHUNK);
                let at = location.offset() + skip + (from - offset);
                let block = u32::try_from(at / CHUNK).expect("small");
                at % CHUNK == from % CHUNK && self.store.get(&block) == Some(&chunk.0)
            }
            other => panic!("{other:?} of a reader"),
        };
        ChunkSize::MIN.covering(offset, len).chunks().all(right)
    }
}

fn joins(last: &Extent, place: Place) -> bool {
    let count = u32::try_from(last.range.count).expect("small");
    match (last.place, place) {
        (Place::Store(a), Place::Store(b)) => a.plus(count) == b,
        (a, b) => a == b,
    }
}

impl Pair {
    fn new(canaries: Canaries) -> Self {
        let rig = Rig::new(CoreConfig { canaries, ..reader_config() });
        let mut pair = Self { rig, world: World { term: 1, ..World::default() } };
        pair.step(Input::Tick);
        while pair.rig.core.geometry().is_none() {
            pair.act(Act::ToServer);
            pair.act(Act::ToClient);
        }
        pair
    }

    fn step(&mut self, input: Input) {
        let out = self.rig.step(input);
        self.take(out);
    }

    fn take(&mut self, out: Vec<Output>) {
        for output in out {
            match output {
                Output::NeedServer { .. } => {
                    self.rig.conns += 1;
                    self.world.connected = true;
                    let (conn, term) = (ConnId(self.rig.conns), Term(self.world.term));
                    self.step(Input::Connected { conn, node: name("n1"), term });
                }
                Output::Send { conn, frame } => {
                    assert_eq!(conn, ConnId(self.rig.conns), "a frame on an old connection");
                    self.world.to_server.push_back(frame);
                }
                Output::Disconnect { why, .. } => {
                    assert!(!why.contains("extents"), "the server is right");
                    self.drop_connection();
                }
                Output::StartIo { io, op } => {
                    self.world.ios.insert(io, op);
                }
                Output::Complete { request, result } => {
                    assert_eq!(result, Ok(()));
                    self.on_complete(request.0);
                }
                Output::Attached { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn on_complete(&mut self, key: u64) {
        let (_, len, mut parts) = self.world.requests.remove(&key).expect("every request completes once");
        parts.sort_unstable();
        let mut at = 0;
        for (from, to, right) in parts {
            assert_eq!(from, at, "request {key}: parts join");
            assert!(right, "request {key}: bytes {from} to {to} are not the snapshot's");
            at = to;
        }
        assert_eq!(at, len, "request {key}: all of it");
        self.world.completed += 1;
    }

    fn drop_connection(&mut self) {
        self.world.to_server.clear();
        self.world.to_client.clear();
        self.world.marks.clear();
        self.world.connected = false;
    }

    fn io_done(&mut self, pick: usize) {
        let Some(&io) = self.world.ios.keys().nth(pick % self.world.ios.len().max(1)) else { return };
        let op = self.world.ios.remove(&io).expect("just picked");
        let (IoOp::ReadZeros { request, len, buffer_at }
        | IoOp::HeadRead { request, len, buffer_at, .. }
        | IoOp::StoreRead { request, len, buffer_at, .. }) = op
        else {
            panic!("{op:?} of a reader")
        };
        let offset = self.world.requests[&request.0].0 + buffer_at;
        let right = self.world.is_right(op, offset, len);
        let parts = &mut self.world.requests.get_mut(&request.0).expect("its buffer is there").2;
        parts.retain(|(from, to, _)| *from >= buffer_at + len || *to <= buffer_at);
        parts.push((buffer_at, buffer_at + len, right));
        self.step(Input::IoDone { io, result: Ok(()) });
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Read { offset, len } => {
                self.rig.keys += 1;
                let key = self.rig.keys;
                self.world.requests.insert(key, (offset, len, vec![]));
                self.step(Input::Request(Request { key: RequestKey(key), op: Op::Read, offset, len }));
            }
            Act::IoDone { pick } => self.io_done(pick),
            Act::ToServer => {
                if let Some(frame) = self.world.to_server.pop_front() {
                    self.world.on_server(frame);
                }
            }
            Act::ToClient => {
                if let Some(frame) = self.world.to_client.pop_front() {
                    self.step(Input::Frame { conn: ConnId(self.rig.conns), frame });
                }
            }
            Act::Overwrite { chunk } => {
                if self.world.place(chunk) == Place::Origin {
                    self.world.new_block(chunk);
                    for mark in self.world.marks.values_mut() {
                        mark.broken |= mark.ranges.iter().any(|range| range.contains(Chunk(chunk)));
                    }
                }
                self.world.overwritten.insert(chunk);
            }
            Act::Move { chunk } => {
                if let Some(old) = self.world.places.get(&chunk).copied() {
                    self.world.new_block(chunk);
                    self.world.batches += 1;
                    self.world.freed.insert(self.world.batches, old);
                }
            }
            Act::Break | Act::Failover if self.world.connected => {
                self.world.term += u64::from(matches!(act, Act::Failover));
                self.drop_connection();
                self.step(Input::Disconnected { conn: ConnId(self.rig.conns) });
            }
            Act::Tick { ms } => {
                let out = self.rig.after(ms);
                self.take(out);
            }
            Act::PutOff => self.world.put_off = true,
            Act::Break | Act::Failover => {}
        }
    }

    /// No more faults: everything that was begun ends.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            if self.world.requests.is_empty() {
                return;
            }
            self.io_done(0);
            self.act(Act::ToServer);
            self.act(Act::ToClient);
            self.act(Act::Tick { ms: 30 });
        }
        panic!("never ends: {:?} {:?}", self.world, self.rig.core);
    }
}

fn play(acts: Vec<Act>, canaries: Canaries) -> u64 {
    let mut pair = Pair::new(canaries);
    for act in acts {
        pair.act(act);
    }
    pair.settle();
    pair.world.completed
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    #[test]
    fn what_is_completed_is_the_snapshot(acts in prop::collection::vec(acts(), 1..250)) {
        play(acts, Canaries::default());
    }
}

impl World {
    /// Chunks that the queries on their way ask for.
    fn chunks_asked(&self) -> u64 {
        let asked = |frame: &Frame<ToServer>| match &frame.message {
            ToServer::QuerySnapshotRead { ranges, .. } => ranges.iter().map(|range| range.count).sum(),
            _ => 0,
        };
        self.to_server.iter().map(asked).sum()
    }

    /// A chunk of each read under way, as a writer would choose that wants none of them to be confirmed.
    fn worst_chunks(&self) -> Vec<u64> {
        let whole = self.marks.values().filter(|mark| !mark.broken);
        let on_origin = |chunk: &Chunk| self.place(chunk.0) == Place::Origin;
        let first = |mark: &Mark| mark.ranges.iter().flat_map(|range| range.chunks()).find(on_origin);
        whole.filter_map(first).map(|chunk| chunk.0).collect()
    }
}

#[test]
fn a_large_read_under_constant_overwrites_asks_for_each_chunk_a_bounded_number_of_times() {
    let mut pair = Pair::new(Canaries::default());
    pair.act(Act::Read { offset: 0, len: LARGE_CHUNKS * CHUNK });
    let mut chunks_asked = 0;
    while !pair.world.requests.is_empty() {
        chunks_asked += pair.world.chunks_asked();
        while !pair.world.to_server.is_empty() {
            pair.act(Act::ToServer);
        }
        while !pair.world.to_client.is_empty() {
            pair.act(Act::ToClient);
        }
        while !pair.world.ios.is_empty() {
            pair.io_done(0);
        }
        for chunk in pair.world.worst_chunks() {
            pair.act(Act::Overwrite { chunk });
        }
    }
    println!("{chunks_asked} chunks asked for in {} messages", pair.rig.count("QuerySnapshotRead"));
    // Once in each size from 256 chunks to 1, and once more alone.
    let tries_max = u64::from(LARGE_CHUNKS.ilog2()) + 2;
    assert!(chunks_asked <= LARGE_CHUNKS * tries_max, "{chunks_asked} chunks asked for");
}

/// Each break is noticed within as many random runs.
#[cfg(feature = "canary")]
#[test]
fn breaks_of_the_four_message_read_are_noticed() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    for canary in [Canary::CompleteReadAtMessage2, Canary::ConfirmBrokenMark] {
        let mut runner = TestRunner::deterministic();
        let noticed = (0..5_000).position(|_| {
            let acts =
                prop::collection::vec(acts(), 1..250).new_tree(&mut runner).expect("generates").current();
            std::panic::catch_unwind(|| play(acts, Canaries::of(&[canary]))).is_err()
        });
        assert!(noticed.is_some(), "{canary:?} goes unnoticed");
        println!("{canary:?} noticed in run {}", noticed.expect("just checked"));
    }
}
