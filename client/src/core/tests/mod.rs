//! Tests of the core in virtual time: single properties in [`writes`], [`drains`], [`reads`] and [`sessions`]; random
//! interleavings against a small server and a small model of the laws in [`random_writes`] and [`random_reads`].

use csnap_proto::message::operate::{Refusal, RefusalKind};
use csnap_proto::message::volume::{Extent, Forget, Head, IdentifyOk, Place, UniquePage};
use csnap_proto::*;

use super::*;

mod drains;
mod random_reads;
mod random_writes;
mod reads;
mod sessions;
mod writes;

const CHUNK: u64 = 4096;
const CHUNKS: u64 = 20_000;
const LEASE_MS: u64 = 15_000;

fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

fn range(first: u64, count: u64) -> ChunkRange {
    ChunkRange { first: Chunk(first), count }
}

fn config(attach: Attach) -> CoreConfig {
    CoreConfig {
        session: SessionId([1; 16]),
        secret: Secret([2; 16]),
        instance: InstanceId([3; 16]),
        node: name("n1"),
        pid: 1,
        attach,
        unique_cache_bytes: 1 << 20,
        writeback_bytes: 1 << 20,
        canaries: Canaries::default(),
    }
}

fn writer_config() -> CoreConfig {
    config(Attach::Writer(name("demo")))
}

fn reader_config() -> CoreConfig {
    config(Attach::Snapshot(Target { volume: name("demo"), snapshot: Some(name("a")) }))
}

fn identify_ok(epoch: u64, all_unique: bool, advice_follows: bool) -> IdentifyOk {
    let geometry = Geometry {
        volume: VolumeId(7),
        snapshot: None,
        target: Target { volume: name("demo"), snapshot: None },
        size_bytes: CHUNKS * CHUNK,
        chunk: ChunkSize::MIN,
        head: Head::Pool,
    };
    IdentifyOk {
        geometry: Some(geometry),
        epoch: Epoch(epoch),
        all_unique,
        lease_ms: LEASE_MS,
        advice_follows,
    }
}

/// A core with its outputs, driven by hand.
struct Rig {
    core: ClientCore,
    now: Time,
    conns: u64,
    term: u64,
    keys: u64,
}

impl Rig {
    fn new(config: CoreConfig) -> Self {
        Self { core: ClientCore::new(config), now: Time(1), conns: 0, term: 1, keys: 0 }
    }

    fn step(&mut self, input: Input) -> Vec<Output> {
        let mut out = Vec::new();
        self.core.step(self.now, input, &mut out);
        out
    }

    fn after(&mut self, ms: u64) -> Vec<Output> {
        self.now = self.now.after(Duration::from_millis(ms));
        self.step(Input::Tick)
    }

    /// Connects; gives the Identify's id.
    fn connect(&mut self) -> RequestId {
        self.conns += 1;
        let (conn, term) = (ConnId(self.conns), Term(self.term));
        let out = self.step(Input::Connected { conn, node: name("n1"), term });
        match sent(&out).as_slice() {
            [(id, ToServer::Identify(_))] => *id,
            other => panic!("{other:?} instead of an Identify"),
        }
    }

    fn attach(&mut self, ok: IdentifyOk) -> Vec<Output> {
        let id = self.connect();
        self.frame(id, FromServer::IdentifyOk(ok))
    }

    fn frame(&mut self, id: RequestId, message: FromServer) -> Vec<Output> {
        let frame = Frame { id, term: Term(self.term), message };
        self.step(Input::Frame { conn: ConnId(self.conns), frame })
    }

    fn request(&mut self, op: Op, first: u64, count: u64) -> Vec<Output> {
        self.keys += 1;
        let (offset, len) = (first * CHUNK, count * CHUNK);
        self.step(Input::Request(Request { key: RequestKey(self.keys), op, offset, len }))
    }

    fn write(&mut self, first: u64, count: u64) -> Vec<Output> {
        self.request(Op::Write { fua: false }, first, count)
    }

    fn done(&mut self, io: IoId) -> Vec<Output> {
        self.step(Input::IoDone { io, result: Ok(()) })
    }

    fn grant(&mut self, id: RequestId, epoch: u64, chunks: &[u64]) -> Vec<Output> {
        let message = FromServer::WriteOk {
            epoch: Epoch(epoch),
            no_space: vec![],
            all_unique: false,
            pages: pages(chunks),
        };
        self.frame(id, message)
    }

    fn count(&self, message: &str) -> u64 {
        self.core.messages().get(message).copied().unwrap_or(0)
    }
}

fn pages(chunks: &[u64]) -> Vec<UniquePage> {
    let mut pages: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    for chunk in chunks {
        let bits = pages.entry(chunk / 512).or_insert_with(|| vec![0; 64]);
        bits[(chunk % 512 / 8) as usize] |= 1 << (chunk % 8);
    }
    pages.into_iter().map(|(page, bits)| UniquePage { page, bits }).collect()
}

fn sent(out: &[Output]) -> Vec<(RequestId, ToServer)> {
    let frame = |output: &Output| match output {
        Output::Send { frame, .. } => Some((frame.id, frame.message.clone())),
        _ => None,
    };
    out.iter().filter_map(frame).collect()
}

fn ios(out: &[Output]) -> Vec<(IoId, IoOp)> {
    let io = |output: &Output| match output {
        Output::StartIo { io, op } => Some((*io, *op)),
        _ => None,
    };
    out.iter().filter_map(io).collect()
}

fn completed(out: &[Output]) -> Vec<(u64, Result<(), RequestError>)> {
    let complete = |output: &Output| match output {
        Output::Complete { request, result } => Some((request.0, result.clone())),
        _ => None,
    };
    out.iter().filter_map(complete).collect()
}

/// The only I/O of a step.
fn one_io(out: &[Output]) -> (IoId, IoOp) {
    let ios = ios(out);
    assert_eq!(ios.len(), 1, "{out:?}");
    ios[0]
}

/// The only frame of a step.
fn one_sent(out: &[Output]) -> (RequestId, ToServer) {
    let frames = sent(out);
    assert_eq!(frames.len(), 1, "{out:?}");
    frames[0].clone()
}

fn writer(all_unique: bool) -> Rig {
    let mut rig = Rig::new(writer_config());
    rig.attach(identify_ok(1, all_unique, false));
    rig
}

fn reader() -> Rig {
    let mut rig = Rig::new(reader_config());
    rig.attach(identify_ok(1, false, false));
    rig
}

fn extent(first: u64, count: u64, place: Place) -> Extent {
    Extent { range: range(first, count), place }
}

fn stored(block: u32) -> Place {
    Place::Store(Location { term: Term(1), arena: 0, block })
}
