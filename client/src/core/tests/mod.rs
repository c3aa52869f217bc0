//! Tests of the core in virtual time: table tests of single properties here; random interleavings against a small server
//! and a small model in [`writer`] and [`reader`].

use csnap_proto::message::operate::{Refusal, RefusalKind};
use csnap_proto::message::volume::{Extent, Forget, Head, IdentifyOk, Place, UniquePage};
use csnap_proto::*;

use super::*;

mod reader;
mod writer;

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

#[test]
fn a_head_read_and_a_write_without_snapshots_send_nothing() {
    let mut rig = writer(true);
    let before = rig.core.messages().clone();
    let (io, op) = one_io(&rig.request(Op::Read, 5, 2));
    assert!(matches!(op, IoOp::HeadRead { offset: 20480, len: 8192, .. }));
    assert_eq!(completed(&rig.done(io)), [(1, Ok(()))]);
    let (io, _) = one_io(&rig.write(5, 2));
    assert_eq!(completed(&rig.done(io)), [(2, Ok(()))]);
    assert_eq!(rig.core.messages(), &before);
}

#[test]
fn the_first_write_costs_two_messages_and_the_second_none() {
    let mut rig = writer(false);
    let (id, message) = one_sent(&rig.write(3, 2));
    assert_eq!(message, ToServer::QueryWrite { ranges: vec![range(3, 2)] });
    let (io, op) = one_io(&rig.grant(id, 1, &[3, 4, 9]));
    assert!(matches!(op, IoOp::HeadWrite { offset: 12288, len: 8192, .. }));
    rig.done(io);
    one_io(&rig.write(3, 1));
    one_io(&rig.write(9, 1));
    assert_eq!((rig.count("QueryWrite"), rig.count("WriteOk")), (1, 1));
}

#[test]
fn concurrent_writes_share_messages_and_the_depth_is_not_serialised() {
    let mut rig = writer(false);
    let mut queries = Vec::new();
    for chunk in 0..32 {
        queries.extend(sent(&rig.write(chunk * 2, 1)));
    }
    assert_eq!(queries.len(), QUERIES_IN_FLIGHT_MAX);
    let out = rig.grant(queries[0].0, 1, &[0]);
    let (_, message) = one_sent(&out);
    let ToServer::QueryWrite { ranges } = message else { panic!("{message:?}") };
    assert_eq!(ranges.len(), 32 - QUERIES_IN_FLIGHT_MAX);
}

#[test]
fn a_large_write_is_asked_for_in_pieces_and_issued_whole() {
    let mut rig = writer(false);
    let queries = sent(&rig.write(0, 10_000));
    assert_eq!(queries.len(), 3);
    let all: Vec<u64> = (0..10_240).collect();
    assert_eq!(ios(&rig.grant(queries[1].0, 1, &all[4096..8192])), []);
    assert_eq!(ios(&rig.grant(queries[0].0, 1, &all[..4096])), []);
    let (_, op) = one_io(&rig.grant(queries[2].0, 1, &all[8192..10_000]));
    assert!(matches!(op, IoOp::HeadWrite { offset: 0, len: 40_960_000, .. }));
}

#[test]
fn a_cache_without_room_costs_messages_not_progress() {
    let mut rig = Rig::new(CoreConfig { unique_cache_bytes: 0, ..writer_config() });
    rig.attach(identify_ok(1, false, false));
    for round in 1..3 {
        let (id, _) = one_sent(&rig.write(3, 1));
        let (io, _) = one_io(&rig.grant(id, 1, &[3]));
        assert_eq!(completed(&rig.done(io)), [(round, Ok(()))]);
    }
}

#[test]
fn a_write_with_a_chunk_without_space_fails_before_any_of_it_is_written() {
    let mut rig = writer(false);
    let (id, _) = one_sent(&rig.write(0, 4));
    let no_space = vec![range(2, 1)];
    let message =
        FromServer::WriteOk { epoch: Epoch(1), no_space, all_unique: false, pages: pages(&[0, 1, 3]) };
    let out = rig.frame(id, message);
    assert_eq!(completed(&out), [(1, Err(RequestError::NoSpace))]);
    assert_eq!(ios(&out), []);
    one_io(&rig.write(3, 1));
}

#[test]
fn a_refused_batch_is_asked_again_one_by_one() {
    let mut rig = writer(false);
    for chunk in 0..QUERIES_IN_FLIGHT_MAX as u64 + 2 {
        rig.write(chunk * 10, 1);
    }
    let first: Vec<RequestId> = rig.core.writes_asked();
    let (batch, _) = one_sent(&rig.grant(first[0], 1, &[0]));
    let refusal = Refusal::new(RefusalKind::Media, "unreadable");
    let (alone, message) = one_sent(&rig.frame(batch, FromServer::Refused(refusal.clone())));
    assert_eq!(message, ToServer::QueryWrite { ranges: vec![range(40, 1)] });
    let out = rig.frame(alone, FromServer::Refused(refusal.clone()));
    assert_eq!(completed(&out), [(5, Err(RequestError::Refused(refusal)))]);
    one_sent(&out);
}

#[test]
fn a_grant_of_another_epoch_is_asked_for_again() {
    let mut rig = writer(false);
    let (id, _) = one_sent(&rig.write(3, 1));
    let out = rig.grant(id, 2, &[3]);
    assert_eq!(ios(&out), []);
    assert!(matches!(one_sent(&out).1, ToServer::QueryWrite { .. }));
}

#[test]
fn what_is_unanswered_is_asked_again_on_the_next_connection_and_caches_stay() {
    let mut rig = writer(false);
    let (id, _) = one_sent(&rig.write(3, 1));
    rig.grant(id, 1, &[3]);
    one_sent(&rig.write(4, 1));
    let out = rig.step(Input::Disconnected { conn: ConnId(1) });
    assert_eq!(out, [Output::NeedServer { suspect: Term(1) }]);
    one_io(&rig.write(3, 1));
    rig.term = 2;
    let (_, message) = one_sent(&rig.attach(identify_ok(1, false, false)));
    assert_eq!(message, ToServer::QueryWrite { ranges: vec![range(4, 1)] });
    one_io(&rig.write(3, 1));
}

#[test]
fn another_epoch_at_identification_drops_the_cache() {
    let mut rig = writer(true);
    rig.step(Input::Disconnected { conn: ConnId(1) });
    rig.attach(identify_ok(2, false, false));
    let out = rig.write(3, 1);
    assert!(matches!(one_sent(&out).1, ToServer::QueryWrite { .. }));
}

#[test]
fn a_flush_is_not_satisfied_by_a_sync_that_began_before_it() {
    let mut rig = writer(true);
    let (first, _) = one_io(&rig.request(Op::Flush, 0, 0));
    assert_eq!(ios(&rig.request(Op::Flush, 0, 0)), []);
    assert_eq!(ios(&rig.request(Op::Flush, 0, 0)), []);
    let out = rig.done(first);
    assert_eq!(completed(&out), [(1, Ok(()))]);
    let (second, op) = one_io(&out);
    assert_eq!(op, IoOp::HeadSync);
    assert_eq!(completed(&rig.done(second)), [(2, Ok(())), (3, Ok(()))]);
}

#[test]
fn a_write_with_fua_completes_after_its_sync() {
    let mut rig = writer(true);
    let (write, _) = one_io(&rig.request(Op::Write { fua: true }, 1, 1));
    let out = rig.done(write);
    assert_eq!(completed(&out), []);
    assert_eq!(completed(&rig.done(one_io(&out).0)), [(1, Ok(()))]);
}

#[test]
fn a_failed_sync_ends_the_attachment_and_is_not_repeated() {
    let mut rig = writer(false);
    rig.write(1, 1);
    let (sync, _) = one_io(&rig.request(Op::Flush, 0, 0));
    rig.request(Op::Flush, 0, 0);
    let out = rig.step(Input::IoDone { io: sync, result: Err(IoFailure::Media("EIO".into())) });
    assert_eq!(completed(&out).len(), 3);
    assert!(completed(&out).iter().all(|(_, result)| matches!(result, Err(RequestError::Media(_)))));
    assert_eq!(ios(&out).iter().filter(|(_, op)| *op == IoOp::HeadSync).count(), 0);
    assert!(matches!(completed(&rig.request(Op::Read, 1, 1))[0].1, Err(RequestError::Media(_))));
}

#[test]
fn writeback_starts_when_enough_is_dirty() {
    let mut rig = writer(true);
    let (io, _) = one_io(&rig.write(0, 255));
    assert_eq!(ios(&rig.done(io)), []);
    let (_, op) = one_io(&rig.step(Input::Written { bytes: CHUNK }));
    assert_eq!(op, IoOp::Writeback);
}

/// Until the fast path is stopped: the fast path's I/O and the pre-sync.
fn advise(rig: &mut Rig, advice: u8) -> IoId {
    let (sync, op) =
        one_io(&rig.frame(RequestId(0), FromServer::SnapshotAdvice { advice: RequestToken([advice; 16]) }));
    assert_eq!(op, IoOp::HeadSync);
    sync
}

#[test]
fn an_advice_is_answered_after_stop_drain_and_sync() {
    let mut rig = writer(true);
    let sync = advise(&mut rig, 1);
    let (late, _) = one_io(&rig.write(1, 1));
    let (stop, op) = one_io(&rig.done(sync));
    assert_eq!(op, IoOp::StopFast);
    assert_eq!(rig.write(2, 1), []);
    assert_eq!(ios(&rig.done(stop)), []);
    let (last, op) = one_io(&rig.done(late));
    assert_eq!(op, IoOp::HeadSync);
    let (_, message) = one_sent(&rig.done(last));
    assert_eq!(message, ToServer::SnapshotAdviceOk { advice: RequestToken([1; 16]) });
    assert_eq!(rig.write(3, 1), []);
    let resume = FromServer::Resume { advice: RequestToken([1; 16]), epoch: Epoch(2), all_unique: false };
    let out = rig.frame(RequestId(0), resume);
    let (_, message) = one_sent(&out);
    assert_eq!(message, ToServer::QueryWrite { ranges: vec![range(2, 2)] });
}

#[test]
fn grants_that_arrive_during_a_drain_are_thrown_away() {
    let mut rig = writer(false);
    let (id, _) = one_sent(&rig.write(3, 1));
    let sync = advise(&mut rig, 1);
    assert_eq!(rig.grant(id, 1, &[3]), []);
    let stop = one_io(&rig.done(sync)).0;
    let last = one_io(&rig.done(stop)).0;
    rig.done(last);
    let resume = FromServer::Resume { advice: RequestToken([1; 16]), epoch: Epoch(1), all_unique: false };
    assert!(matches!(one_sent(&rig.frame(RequestId(0), resume)).1, ToServer::QueryWrite { .. }));
}

#[test]
fn a_known_advice_is_drained_anew() {
    let mut rig = writer(true);
    for _ in 0..2 {
        let sync = advise(&mut rig, 1);
        let stop = one_io(&rig.done(sync)).0;
        let last = one_io(&rig.done(stop)).0;
        one_sent(&rig.done(last));
        let resume = FromServer::Resume { advice: RequestToken([1; 16]), epoch: Epoch(1), all_unique: true };
        rig.frame(RequestId(0), resume);
        let io = one_io(&rig.write(1, 1)).0;
        rig.done(io);
    }
}

#[test]
fn told_that_an_advice_follows_the_client_writes_nothing_until_resumed() {
    let mut rig = Rig::new(writer_config());
    rig.attach(identify_ok(1, true, true));
    assert_eq!(rig.write(1, 1), []);
    let last = advise(&mut rig, 1);
    one_sent(&rig.done(last));
    assert_eq!(rig.write(2, 1), []);
    let resume = FromServer::Resume { advice: RequestToken([1; 16]), epoch: Epoch(2), all_unique: false };
    one_sent(&rig.frame(RequestId(0), resume));
}

#[test]
fn an_unanswered_advice_dies_with_its_connection() {
    let mut rig = writer(true);
    let sync = advise(&mut rig, 1);
    let stop = one_io(&rig.done(sync)).0;
    let last = one_io(&rig.done(stop)).0;
    rig.step(Input::Disconnected { conn: ConnId(1) });
    assert_eq!(sent(&rig.done(last)), []);
    assert_eq!(rig.write(1, 1), []);
    rig.term = 2;
    let out = rig.attach(identify_ok(1, true, false));
    assert!(ios(&out).iter().any(|(_, op)| matches!(op, IoOp::HeadWrite { .. })));
}

#[test]
fn frames_of_older_terms_change_nothing() {
    let mut rig = Rig::new(writer_config());
    rig.term = 5;
    rig.attach(identify_ok(1, false, false));
    let (id, _) = one_sent(&rig.write(3, 1));
    rig.term = 4;
    assert_eq!(rig.grant(id, 1, &[3]), []);
    rig.term = 5;
    one_io(&rig.grant(id, 1, &[3]));
    rig.step(Input::Disconnected { conn: ConnId(1) });
    rig.term = 4;
    let out = rig.attach(identify_ok(1, true, false));
    assert!(matches!(out.as_slice(), [Output::Disconnect { .. }]), "{out:?}");
    assert_eq!(rig.after(20), [Output::NeedServer { suspect: Term(4) }]);
}

#[test]
fn a_renew_unanswered_for_half_a_lease_makes_the_server_suspect() {
    let mut rig = writer(true);
    let (id, message) = one_sent(&rig.after(LEASE_MS / 5));
    assert_eq!(message, ToServer::Renew { forgotten: FreeBatchId(0) });
    rig.frame(id, FromServer::Renewed { forget: vec![], all_unique: true, epoch: Epoch(1) });
    one_sent(&rig.after(LEASE_MS / 5));
    assert_eq!(rig.after(LEASE_MS / 2 - 1), []);
    let out = rig.after(1);
    assert!(matches!(out[0], Output::Disconnect { conn: ConnId(1), .. }));
    assert_eq!(out[1], Output::NeedServer { suspect: Term(1) });
}

#[test]
fn a_refusal_ends_a_first_attach_and_only_a_gone_session_a_later_one() {
    let busy = Refusal::new(RefusalKind::Busy, "held by n2");
    let mut rig = Rig::new(writer_config());
    let id = rig.connect();
    let out = rig.frame(id, FromServer::Refused(busy.clone()));
    assert_eq!(out[1], Output::Ended(RequestError::Refused(busy.clone())));

    let mut rig = writer(true);
    rig.step(Input::Disconnected { conn: ConnId(1) });
    let id = rig.connect();
    rig.frame(id, FromServer::Refused(busy));
    assert_eq!(rig.after(20), [Output::NeedServer { suspect: Term(1) }]);
    let id = rig.connect();
    let out = rig.frame(id, FromServer::Refused(Refusal::new(RefusalKind::NotFound, "fenced")));
    assert!(matches!(out[1], Output::Ended(RequestError::Lost(_))), "{out:?}");
    assert!(matches!(completed(&rig.write(1, 1))[0].1, Err(RequestError::Lost(_))));
}

#[test]
fn a_release_waits_for_what_came_before_syncs_and_is_sent_again() {
    let mut rig = writer(true);
    let write = one_io(&rig.write(1, 1)).0;
    let stop = one_io(&rig.request(Op::Release, 0, 0)).0;
    assert_eq!(ios(&rig.done(stop)), []);
    let sync = ios(&rig.done(write))[0];
    assert_eq!(sync.1, IoOp::HeadSync);
    assert_eq!(one_sent(&rig.done(sync.0)).1, ToServer::Release);
    assert_eq!(completed(&rig.write(1, 1)), [(3, Err(RequestError::Released))]);
    rig.step(Input::Disconnected { conn: ConnId(1) });
    let (id, message) = one_sent(&rig.attach(identify_ok(1, true, false)));
    assert_eq!(message, ToServer::Release);
    assert_eq!(completed(&rig.frame(id, FromServer::Released)), [(2, Ok(()))]);
    assert_eq!(rig.core.next_deadline(), None);
}

fn extent(first: u64, count: u64, place: Place) -> Extent {
    Extent { range: range(first, count), place }
}

fn stored(block: u32) -> Place {
    Place::Store(Location { term: Term(1), arena: 0, block })
}

/// Asks for a read and gives the ids of its message 1.
fn ask(rig: &mut Rig, first: u64, count: u64) -> (RequestId, ReadId) {
    match one_sent(&rig.request(Op::Read, first, count)) {
        (id, ToServer::QuerySnapshotRead { read, .. }) => (id, read),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_snapshot_read_of_the_store_takes_two_messages() {
    let mut rig = reader();
    let (id, read) = ask(&mut rig, 10, 3);
    let extents = vec![extent(10, 1, Place::Zero), extent(11, 2, stored(77))];
    let out = rig.frame(id, FromServer::SnapshotRead { read, extents });
    let started = ios(&out);
    assert!(matches!(started[0].1, IoOp::ReadZeros { len: 4096, buffer_at: 0, .. }));
    assert!(matches!(started[1].1, IoOp::StoreRead { skip: 0, len: 8192, buffer_at: 4096, .. }));
    assert_eq!(completed(&rig.done(started[0].0)), []);
    assert_eq!(completed(&rig.done(started[1].0)), [(1, Ok(()))]);
    assert_eq!((rig.count("QuerySnapshotRead"), rig.count("SnapshotReadOk")), (1, 1));
    assert_eq!(rig.count("FinishSnapshotRead"), 0);
}

#[test]
fn a_snapshot_read_of_the_origin_is_complete_only_after_message_4() {
    let mut rig = reader();
    let (id, read) = ask(&mut rig, 10, 1);
    let extents = vec![extent(10, 1, Place::Origin)];
    let io = one_io(&rig.frame(id, FromServer::SnapshotRead { read, extents })).0;
    let out = rig.done(io);
    assert_eq!(completed(&out), []);
    let (finish, message) = one_sent(&out);
    assert_eq!(message, ToServer::FinishSnapshotRead { read });
    assert_eq!(completed(&rig.frame(finish, FromServer::FinishSnapshotReadOk { read })), [(1, Ok(()))]);
}

#[test]
fn a_broken_mark_or_connection_starts_the_read_again() {
    let mut rig = reader();
    let (id, read) = ask(&mut rig, 10, 1);
    let origin = || vec![extent(10, 1, Place::Origin)];
    let io = one_io(&rig.frame(id, FromServer::SnapshotRead { read, extents: origin() })).0;
    let (finish, _) = one_sent(&rig.done(io));
    let out = rig.frame(finish, FromServer::Retry { read });
    let (id, ToServer::QuerySnapshotRead { read: second, .. }) = one_sent(&out) else { panic!("{out:?}") };
    assert_ne!(read, second);
    let io = one_io(&rig.frame(id, FromServer::SnapshotRead { read: second, extents: origin() })).0;
    rig.step(Input::Disconnected { conn: ConnId(1) });
    let out = rig.attach(identify_ok(1, false, false));
    assert_eq!(sent(&out), [], "the first try's I/O is still in flight");
    let out = rig.done(io);
    assert_eq!(completed(&out), []);
    let (id, ToServer::QuerySnapshotRead { read, .. }) = one_sent(&out) else { panic!("{out:?}") };
    let io =
        one_io(&rig.frame(id, FromServer::SnapshotRead { read, extents: vec![extent(10, 1, stored(1))] })).0;
    assert_eq!(completed(&rig.done(io)), [(1, Ok(()))]);
}

#[test]
fn extents_that_do_not_cover_the_ranges_break_the_connection() {
    let wrong = [
        vec![],
        vec![extent(10, 1, Place::Zero)],
        vec![extent(11, 2, Place::Zero)],
        vec![extent(10, 3, Place::Zero)],
        vec![extent(10, 2, Place::Zero), extent(12, 1, Place::Zero)],
        vec![extent(10, 2, stored(BLOCKS_PER_ARENA - 1))],
    ];
    for extents in wrong {
        let mut rig = reader();
        let (id, read) = ask(&mut rig, 10, 2);
        let out = rig.frame(id, FromServer::SnapshotRead { read, extents });
        assert!(matches!(out.as_slice(), [Output::Disconnect { .. }]), "{out:?}");
    }
}

#[test]
fn a_batch_is_forgotten_only_when_reads_located_before_it_have_returned() {
    let mut rig = reader();
    let (id, read) = ask(&mut rig, 10, 1);
    let io =
        one_io(&rig.frame(id, FromServer::SnapshotRead { read, extents: vec![extent(10, 1, stored(5))] })).0;
    let forget = vec![Forget { batch: FreeBatchId(9), extents: vec![] }];
    let (renew, _) = one_sent(&rig.after(LEASE_MS / 5));
    rig.frame(renew, FromServer::Renewed { forget, all_unique: false, epoch: Epoch(1) });
    let (renew, message) = one_sent(&rig.after(LEASE_MS / 5));
    assert_eq!(message, ToServer::Renew { forgotten: FreeBatchId(0) });
    rig.done(io);
    rig.frame(renew, FromServer::Renewed { forget: vec![], all_unique: false, epoch: Epoch(1) });
    let (_, message) = one_sent(&rig.after(LEASE_MS / 5));
    assert_eq!(message, ToServer::Renew { forgotten: FreeBatchId(9) });
}

#[test]
fn a_snapshot_that_is_gone_fails_its_reads() {
    let mut rig = reader();
    let (id, read) = ask(&mut rig, 10, 1);
    let io =
        one_io(&rig.frame(id, FromServer::SnapshotRead { read, extents: vec![extent(10, 1, stored(5))] })).0;
    ask(&mut rig, 20, 1);
    let out = rig.frame(RequestId(0), FromServer::SnapshotGone);
    assert!(matches!(completed(&out).as_slice(), [(2, Err(RequestError::Lost(_)))]), "{out:?}");
    assert!(matches!(completed(&rig.done(io)).as_slice(), [(1, Err(RequestError::Lost(_)))]));
    assert_eq!(completed(&rig.request(Op::Write { fua: false }, 1, 1)).len(), 1);
}

#[test]
fn a_snapshot_is_not_written_and_ranges_are_checked() {
    let mut rig = reader();
    assert_eq!(completed(&rig.write(1, 1)), [(1, Err(RequestError::ReadOnly))]);
    for (first, count) in [(CHUNKS, 1), (0, 0), (0, CHUNKS + 1), (u64::MAX / CHUNK, 2)] {
        let result = &completed(&rig.request(Op::Read, first, count))[0].1;
        assert!(matches!(result, Err(RequestError::Invalid(_))), "{first}+{count}: {result:?}");
    }
}

#[test]
fn a_large_snapshot_read_is_cut_to_what_a_message_carries() {
    let mut rig = reader();
    let queries = sent(&rig.request(Op::Read, 1, 9000));
    let chunks = |message: &ToServer| match message {
        ToServer::QuerySnapshotRead { ranges, .. } => ranges.iter().map(|range| range.count).sum::<u64>(),
        other => panic!("{other:?}"),
    };
    assert_eq!(queries.iter().map(|(_, message)| chunks(message)).collect::<Vec<_>>(), [4096, 4096, 808]);
}
