//! The writer against a server in random interleavings: grants, drains, failovers, fast writes, lost frames.
//!
//! The world knows what the laws say: which chunks may be written now, what is durable, whether the client has answered an
//! Advice and not been resumed. It checks each output against that.

use std::collections::{BTreeSet, VecDeque};

use proptest::prelude::*;

use super::*;

const VOLUME_CHUNKS: u64 = 2_000;

/// What can happen. Numbers pick among what is there, so that every sequence means something.
#[derive(Clone, Debug)]
enum Act {
    Write { chunk: u64, count: u64, fua: bool },
    Zero { chunk: u64, count: u64 },
    Flush,
    FastBegin { chunk: u64 },
    FastEnd { pick: usize },
    IoDone { pick: usize },
    ToServer,
    ToClient,
    Break,
    Failover { answered_kept: bool },
    Create,
    Abort,
    DeleteSnapshots,
    Full { full: bool },
    Tick { ms: u64 },
    OldFrame,
}

fn acts() -> impl Strategy<Value = Act> {
    let chunk = prop_oneof![0..12u64, 505..520u64];
    prop_oneof![
        6 => (chunk.clone(), 1..5u64, any::<bool>()).prop_map(|(chunk, count, fua)| Act::Write { chunk, count, fua }),
        1 => (chunk.clone(), 1..5u64).prop_map(|(chunk, count)| Act::Zero { chunk, count }),
        2 => Just(Act::Flush),
        4 => chunk.prop_map(|chunk| Act::FastBegin { chunk }),
        3 => any::<usize>().prop_map(|pick| Act::FastEnd { pick }),
        8 => any::<usize>().prop_map(|pick| Act::IoDone { pick }),
        8 => Just(Act::ToServer),
        8 => Just(Act::ToClient),
        1 => Just(Act::Break),
        1 => any::<bool>().prop_map(|answered_kept| Act::Failover { answered_kept }),
        1 => Just(Act::Create),
        1 => Just(Act::Abort),
        1 => Just(Act::DeleteSnapshots),
        1 => any::<bool>().prop_map(|full| Act::Full { full }),
        2 => (1..2000u64).prop_map(|ms| Act::Tick { ms }),
        1 => Just(Act::OldFrame),
    ]
}

#[derive(Debug, Default)]
struct Server {
    term: u64,
    epoch: u64,
    snapshots: bool,
    /// Made unique in this epoch.
    granted: BTreeSet<u64>,
    full: bool,
    /// Number of the create under way, and whether the client was counted.
    creating: Option<u8>,
    counted: bool,
    creates: u8,
    /// Id of the last Advice.
    advices: u64,
}

/// How far a change of the head is.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Change {
    InFlight,
    Returned,
    Durable,
}

struct World {
    rig: Rig,
    server: Server,
    connected: bool,
    identified: bool,
    to_server: VecDeque<Frame<ToServer>>,
    to_client: VecDeque<Frame<FromServer>>,
    ios: BTreeMap<IoId, IoOp>,
    /// What a sync under way will make durable.
    syncing: BTreeMap<IoId, Vec<u64>>,
    /// By number: request keys, and fast writes from [`FAST`] on.
    changes: BTreeMap<u64, Change>,
    /// Requests under way; flushes with what they must cover.
    requests: BTreeMap<u64, (Op, Vec<u64>)>,
    acknowledged: BTreeSet<u64>,
    fast_open: bool,
    fast: Vec<u64>,
    fast_numbers: u64,
    stop_fast: Option<IoId>,
    /// An AdviceOk is out and no Resume came.
    answered: bool,
    writes_done: u64,
}

const FAST: u64 = 1 << 32;

impl World {
    fn new(canaries: Canaries) -> Self {
        let mut rig = Rig::new(CoreConfig { canaries, ..writer_config() });
        // One page and one group fit, so that eviction happens all the time.
        rig.core.unique = UniqueCache::new(500);
        let mut world = Self {
            rig,
            server: Server { term: 1, epoch: 1, ..Server::default() },
            connected: false,
            identified: false,
            to_server: VecDeque::new(),
            to_client: VecDeque::new(),
            ios: BTreeMap::new(),
            syncing: BTreeMap::new(),
            changes: BTreeMap::new(),
            requests: BTreeMap::new(),
            acknowledged: BTreeSet::new(),
            fast_open: false,
            fast: Vec::new(),
            fast_numbers: FAST,
            stop_fast: None,
            answered: false,
            writes_done: 0,
        };
        world.step(Input::Tick);
        while !world.identified {
            world.act(Act::ToServer);
            world.act(Act::ToClient);
        }
        world
    }

    fn step(&mut self, input: Input) {
        let out = self.rig.step(input);
        self.take(out);
    }

    fn take(&mut self, out: Vec<Output>) {
        for output in out {
            match output {
                Output::NeedServer { .. } => {
                    self.connected = false;
                    self.reconnect();
                }
                Output::Send { conn, frame } => self.on_send(conn, frame),
                Output::Disconnect { .. } => self.drop_connection(),
                Output::Attached { .. } => {}
                Output::Ended(error) => panic!("ended: {error}"),
                Output::OpenFast { .. } => {
                    assert!(!self.answered, "fast writes while stopped");
                    self.fast_open = true;
                }
                Output::StartIo { io, op } => self.on_start_io(io, op),
                Output::Complete { request, result } => self.on_complete(request.0, result),
            }
        }
    }

    fn on_send(&mut self, conn: ConnId, frame: Frame<ToServer>) {
        assert_eq!(conn, ConnId(self.rig.conns), "a frame on an old connection");
        if let ToServer::SnapshotAdviceOk { .. } = frame.message {
            self.answered = true;
            self.check_drained();
        }
        self.to_server.push_back(frame);
    }

    /// The promise of an AdviceOk: nothing in flight, all durable.
    fn check_drained(&self) {
        for (number, change) in &self.changes {
            assert_eq!(*change, Change::Durable, "write {number} at an AdviceOk");
        }
    }

    fn may_change(&self, range: ChunkRange) {
        assert!(!self.answered, "{range:?} is written between AdviceOk and Resume");
        for chunk in range.chunks() {
            let may = !self.server.snapshots || self.server.granted.contains(&chunk.0);
            assert!(may, "{chunk:?} is written without a grant in epoch {}", self.server.epoch);
        }
    }

    fn on_start_io(&mut self, io: IoId, op: IoOp) {
        match op {
            IoOp::HeadWrite { request, offset, len }
            | IoOp::HeadZero { request, offset, len, .. }
            | IoOp::HeadPunch { request, offset, len } => {
                self.may_change(ChunkSize::MIN.covering(offset, len));
                self.changes.insert(request.0, Change::InFlight);
            }
            IoOp::HeadSync => {
                let returned = self.changes.iter().filter(|(_, change)| **change == Change::Returned);
                self.syncing.insert(io, returned.map(|(number, _)| *number).collect());
            }
            IoOp::StopFast => {
                self.fast_open = false;
                self.stop_fast = Some(io);
                return self.check_stopped();
            }
            IoOp::Writeback => {}
            other => panic!("{other:?} of a writer"),
        }
        self.ios.insert(io, op);
    }

    fn check_stopped(&mut self) {
        if self.fast.is_empty()
            && let Some(io) = self.stop_fast.take()
        {
            self.step(Input::IoDone { io, result: Ok(()) });
        }
    }

    fn on_complete(&mut self, key: u64, result: Result<(), RequestError>) {
        let (op, covers) = self.requests.remove(&key).expect("every request completes once");
        match result {
            Err(RequestError::NoSpace) => {
                assert!(!self.changes.contains_key(&key), "{key} was written and failed");
                return;
            }
            Err(error) => panic!("{key}: {error}"),
            Ok(()) => {}
        }
        for number in covers {
            assert_eq!(self.changes[&number], Change::Durable, "{op:?} {key} does not cover {number}");
        }
        if op != Op::Flush {
            let fua = matches!(op, Op::Write { fua: true });
            let change = self.changes[&key];
            assert!(change == Change::Durable || !fua && change == Change::Returned, "{op:?} is {change:?}");
            self.acknowledged.insert(key);
            self.writes_done += 1;
        }
    }

    fn reconnect(&mut self) {
        self.rig.conns += 1;
        self.connected = true;
        let (conn, term) = (ConnId(self.rig.conns), Term(self.server.term));
        self.step(Input::Connected { conn, node: name("n1"), term });
    }

    fn drop_connection(&mut self) {
        self.to_server.clear();
        self.to_client.clear();
        self.connected = false;
        self.identified = false;
    }

    fn say(&mut self, id: RequestId, message: FromServer) {
        self.to_client.push_back(Frame { id, term: Term(self.server.term), message });
    }

    fn on_server(&mut self, frame: Frame<ToServer>) {
        let server = &mut self.server;
        let all_unique = !server.snapshots;
        let epoch = Epoch(server.epoch);
        match frame.message {
            ToServer::Identify(_) => {
                let advice_follows = server.creating.is_some();
                let mut ok = identify_ok(server.epoch, all_unique, advice_follows);
                ok.geometry.as_mut().expect("is there").size_bytes = VOLUME_CHUNKS * CHUNK;
                self.say(frame.id, FromServer::IdentifyOk(ok));
                self.advise();
                self.identified = true;
            }
            ToServer::QueryWrite { ranges } => {
                let answer = self.grant(&ranges);
                self.say(frame.id, answer);
            }
            ToServer::SnapshotAdviceOk { advice } => {
                if server.creating == Some(advice.0[0]) && frame.id == RequestId(server.advices) {
                    server.creating = None;
                    server.epoch += 1;
                    server.snapshots = true;
                    server.granted.clear();
                    let epoch = Epoch(server.epoch);
                    self.say(RequestId(0), FromServer::Resume { advice, epoch, all_unique: false });
                }
            }
            ToServer::Renew { .. } => {
                self.say(frame.id, FromServer::Renewed { forget: vec![], all_unique, epoch });
            }
            other => panic!("{other:?} of a writer"),
        }
    }

    fn grant(&mut self, ranges: &[ChunkRange]) -> FromServer {
        let server = &mut self.server;
        let epoch = Epoch(server.epoch);
        if !server.snapshots {
            return FromServer::WriteOk { epoch, no_space: vec![], all_unique: true, pages: vec![] };
        }
        let mut no_space = Vec::new();
        let mut touched = BTreeSet::new();
        for chunk in ranges.iter().flat_map(|range| range.chunks()) {
            touched.insert(chunk.0 / 512);
            if server.full && chunk.0 % 3 == 0 && !server.granted.contains(&chunk.0) {
                no_space.push(ChunkRange::one(chunk));
            } else {
                server.granted.insert(chunk.0);
            }
        }
        let known: Vec<u64> =
            server.granted.iter().copied().filter(|c| touched.contains(&(c / 512))).collect();
        FromServer::WriteOk { epoch, no_space, all_unique: false, pages: pages(&known) }
    }

    fn advise(&mut self) {
        if let Some(number) = self.server.creating
            && !self.server.counted
        {
            self.server.advices += 1;
            let id = RequestId(self.server.advices);
            self.say(id, FromServer::SnapshotAdvice { advice: RequestToken([number; 16]) });
        }
    }

    fn end_create(&mut self) {
        if let Some(number) = self.server.creating.take() {
            let (epoch, all_unique) = (Epoch(self.server.epoch), !self.server.snapshots);
            let advice = RequestToken([number; 16]);
            self.say(RequestId(0), FromServer::Resume { advice, epoch, all_unique });
        }
    }

    fn deliver(&mut self, frame: Frame<FromServer>) {
        let resumes = match &frame.message {
            FromServer::Resume { .. } => true,
            FromServer::IdentifyOk(ok) => !ok.advice_follows,
            _ => false,
        };
        self.answered &= !resumes;
        self.step(Input::Frame { conn: ConnId(self.rig.conns), frame });
    }

    fn request(&mut self, op: Op, chunk: u64, count: u64) {
        self.rig.keys += 1;
        let key = self.rig.keys;
        let covers = if op == Op::Flush { self.acknowledged.iter().copied().collect() } else { vec![] };
        self.requests.insert(key, (op, covers));
        let (offset, len) = if op == Op::Flush { (0, 0) } else { (chunk * CHUNK, count * CHUNK) };
        self.step(Input::Request(Request { key: RequestKey(key), op, offset, len }));
    }

    fn fast_begin(&mut self, chunk: u64) {
        if !self.fast_open || !self.rig.core.known_unique(chunk * CHUNK, CHUNK) {
            return;
        }
        self.may_change(range(chunk, 1));
        self.fast_numbers += 1;
        self.changes.insert(self.fast_numbers, Change::InFlight);
        self.fast.push(self.fast_numbers);
    }

    fn fast_end(&mut self, pick: usize) {
        if self.fast.is_empty() {
            return;
        }
        let number = self.fast.swap_remove(pick % self.fast.len());
        self.changes.insert(number, Change::Returned);
        self.acknowledged.insert(number);
        self.check_stopped();
    }

    fn io_done(&mut self, pick: usize) {
        let Some(&io) = self.ios.keys().nth(pick % self.ios.len().max(1)) else { return };
        match self.ios.remove(&io).expect("just picked") {
            IoOp::HeadWrite { request, .. }
            | IoOp::HeadZero { request, .. }
            | IoOp::HeadPunch { request, .. } => {
                self.changes.insert(request.0, Change::Returned);
            }
            IoOp::HeadSync => {
                for number in self.syncing.remove(&io).expect("was under way") {
                    self.changes.insert(number, Change::Durable);
                }
            }
            _ => {}
        }
        self.step(Input::IoDone { io, result: Ok(()) });
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Write { chunk, count, fua } => self.request(Op::Write { fua }, chunk, count),
            Act::Zero { chunk, count } => {
                self.request(Op::WriteZeroes { fua: false, may_punch: true }, chunk, count)
            }
            Act::Flush => self.request(Op::Flush, 0, 0),
            Act::FastBegin { chunk } => self.fast_begin(chunk),
            Act::FastEnd { pick } => self.fast_end(pick),
            Act::IoDone { pick } => self.io_done(pick),
            Act::ToServer => {
                if let Some(frame) = self.to_server.pop_front() {
                    self.on_server(frame);
                }
            }
            Act::ToClient => {
                if let Some(frame) = self.to_client.pop_front() {
                    self.deliver(frame);
                }
            }
            Act::Break if self.connected => {
                self.drop_connection();
                self.step(Input::Disconnected { conn: ConnId(self.rig.conns) });
            }
            Act::Failover { answered_kept } if self.connected => {
                self.server.term += 1;
                self.server.counted &= answered_kept;
                self.drop_connection();
                self.step(Input::Disconnected { conn: ConnId(self.rig.conns) });
            }
            Act::Create if self.server.creating.is_none() && self.identified => {
                // The same create is asked for again, now and then.
                self.server.creates +=
                    u8::from(self.server.creates == 0 || self.server.epoch.is_multiple_of(2));
                self.server.creating = Some(self.server.creates);
                self.advise();
            }
            Act::Abort => self.end_create(),
            Act::DeleteSnapshots => self.server.snapshots &= self.server.creating.is_some(),
            Act::Full { full } => self.server.full = full,
            Act::Tick { ms } => {
                let out = self.rig.after(ms);
                self.take(out);
            }
            Act::OldFrame if self.connected => {
                let pages = (0..4).map(|page| UniquePage { page, bits: vec![] }).collect();
                let epoch = Epoch(self.server.epoch);
                let message = FromServer::WriteOk { epoch, no_space: vec![], all_unique: true, pages };
                let id = self.rig.core.writes_asked().last().copied().unwrap_or(RequestId(1));
                let conn = ConnId(self.rig.conns);
                let older = Frame { id, term: Term(self.server.term - 1), message };
                if self.identified && self.rig.core.link.ready().is_some() {
                    self.step(Input::Frame { conn, frame: older.clone() });
                }
                self.step(Input::Frame { conn: ConnId(conn.0 - 1), frame: older });
            }
            Act::Break | Act::Failover { .. } | Act::Create | Act::OldFrame => {}
        }
    }

    /// No more faults: everything that was begun ends.
    fn settle(&mut self) {
        self.end_create();
        for _ in 0..10_000 {
            if self.requests.is_empty() && self.fast.is_empty() && self.ios.is_empty() {
                return;
            }
            self.fast_end(0);
            self.io_done(0);
            self.act(Act::ToServer);
            self.act(Act::ToClient);
            self.act(Act::Tick { ms: 30 });
        }
        panic!("never ends: {:?} {:?}", self.requests, self.rig.core);
    }
}

fn play(acts: Vec<Act>, canaries: Canaries) -> u64 {
    let mut world = World::new(canaries);
    for act in acts {
        world.act(act);
    }
    world.settle();
    world.writes_done
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    #[test]
    fn the_laws_hold_whatever_the_order(acts in prop::collection::vec(acts(), 1..250)) {
        play(acts, Canaries::default());
    }
}

/// Each break is noticed within as many random runs.
#[cfg(feature = "canary")]
#[test]
fn breaks_of_the_drain_and_the_flush_are_noticed() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    let canaries = [
        Canary::AdviceWithoutDrain,
        Canary::AdviceNotAnew,
        Canary::DrainWithoutSync,
        Canary::KeepUniqueOverAdvice,
        Canary::FlushSharesEarlierSync,
    ];
    for canary in canaries {
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
