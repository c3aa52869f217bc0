//! Tables for the core's rules: each test names a property of grants, marks, creates, sessions or the order of effects.
//!
//! The desk around the core does what a shell would, at once and without failure, unless a test holds something back.

use std::collections::VecDeque;
use std::time::Duration;

use csnap_proto::limits::SNAPSHOT_READS_MAX;
use csnap_proto::message::operate::{
    Fenced, HELD_REASONS_MAX, OperatorReply, OperatorRequest, RefusalKind, Source,
};
use csnap_proto::message::volume::{Attach, FromServer, Identify, IdentifyOk, Place, ToServer};
use csnap_proto::{
    Chunk, ChunkRange, ChunkSize, Frame, FreeBatchId, InstanceId, Name, PoolId, ReadId, RequestId,
    RequestToken, Secret, Sequence, SessionId, Target, Term, Time, VolumeId, WallMillis,
};
use csnap_server::core::{Config, ConnId, Exit, Input, Output, ServerCore, Task, TaskDone};
use csnap_server::state::{Record, State};

/// What the desk holds back until told otherwise.
#[derive(Default)]
struct Held {
    gates: bool,
    copies: bool,
    growth_fails: bool,
}

struct Desk {
    core: ServerCore,
    now: Time,
    sent: Vec<(ConnId, Frame<FromServer>)>,
    closed: Vec<ConnId>,
    exit: Option<Exit>,
    held: Held,
    waiting: Vec<Output>,
    journal: Vec<Record>,
    last_request: u64,
}

impl Desk {
    fn new() -> Self {
        Self::over(Term(1), State::new(PoolId([7; 16])))
    }

    /// A server of `term` on node n`term`.
    fn over(term: Term, state: State) -> Self {
        let config = Config::of(name(&format!("n{term}")));
        let core = ServerCore::new(term, config, state, Time(0), WallMillis(0));
        let mut desk = Self {
            core,
            now: Time(0),
            sent: Vec::new(),
            closed: Vec::new(),
            exit: None,
            held: Held::default(),
            waiting: Vec::new(),
            journal: Vec::new(),
            last_request: 0,
        };
        desk.give(Input::Tick);
        desk
    }

    /// Gives an event, and everything that comes of it.
    fn give(&mut self, input: Input) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            let mut out = Vec::new();
            self.core.step(self.now, WallMillis(0), input, &mut out);
            if inputs.is_empty() {
                self.core.end_turn(&mut out);
            }
            inputs.extend(out.into_iter().filter_map(|output| self.carry_out(output)));
        }
    }

    fn carry_out(&mut self, output: Output) -> Option<Input> {
        match output {
            Output::ReadGate { .. } if self.held.gates => self.waiting.push(output),
            Output::CopyOut { .. } if self.held.copies => self.waiting.push(output),
            Output::Append { batch, body, .. } => {
                self.journal.extend(Record::decode_batch(&body).expect("the core's own records"));
                return Some(Input::Appended { batch });
            }
            Output::ReadGate { batch } => return Some(Input::Gate { batch, open: true }),
            Output::Send { conn, frame } => self.sent.push((conn, frame)),
            Output::Close { conn } => self.closed.push(conn),
            Output::CopyOut { copy, .. } => return Some(Input::CopiedOut { copy, result: Ok(Vec::new()) }),
            Output::GrowArena { extent, .. } => {
                return Some(Input::ArenaGrown { extent, grown: !self.held.growth_fails });
            }
            Output::Start { task, what } => {
                let done = match what {
                    Task::Measure { .. } => TaskDone::Measured { free_bytes: 1 << 30, heads_bytes: 0 },
                    Task::InspectOrigin { path } => {
                        let inode = task.0;
                        TaskDone::Inspected { path, size_bytes: 1 << 20, device: 1, inode, in_pool: false }
                    }
                    Task::CreateHead { .. } | Task::SyncHead { .. } => TaskDone::Done,
                };
                return Some(Input::TaskEnded { task, done });
            }
            Output::Punch { extents } => return Some(Input::Punched { extents }),
            Output::RemoveHead { volume } => return Some(Input::HeadRemoved { volume }),
            Output::Exit { reason } => self.exit = Some(reason),
        }
        None
    }

    /// Lets go what was held back.
    fn release(&mut self) {
        self.held = Held::default();
        for output in std::mem::take(&mut self.waiting) {
            if let Some(input) = self.carry_out(output) {
                self.give(input);
            }
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now.after(time);
        self.give(Input::Tick);
    }

    /// Sends a request; its id.
    fn say(&mut self, conn: ConnId, message: ToServer) -> RequestId {
        self.last_request += 1;
        let id = RequestId(self.last_request);
        self.give(Input::Frame { conn, frame: Frame { id, term: Term(0), message } });
        id
    }

    fn answer_to(&self, id: RequestId) -> Option<&FromServer> {
        self.sent.iter().find(|(_, frame)| frame.id == id).map(|(_, frame)| &frame.message)
    }

    /// Sends a request and expects its answer at once.
    fn ask(&mut self, conn: ConnId, message: ToServer) -> FromServer {
        let id = self.say(conn, message);
        self.answer_to(id).expect("an answer").clone()
    }

    fn connect(&mut self, conn: u64, who: u8, attach: Attach) -> FromServer {
        self.connect_from("n1", conn, who, attach)
    }

    fn connect_from(&mut self, node: &str, conn: u64, who: u8, attach: Attach) -> FromServer {
        self.identify(node, conn, who, who, attach)
    }

    /// Another session of the process that `instance` is.
    fn connect_of(&mut self, instance: u8, conn: u64, who: u8, attach: Attach) -> FromServer {
        self.identify("n1", conn, who, instance, attach)
    }

    fn identify(&mut self, node: &str, conn: u64, who: u8, instance: u8, attach: Attach) -> FromServer {
        self.give(Input::Accepted { conn: ConnId(conn) });
        let identify = Identify {
            session: SessionId([who; 16]),
            secret: Secret([who; 16]),
            instance: InstanceId([instance; 16]),
            node: name(node),
            pid: u32::from(instance),
            attach,
            cached_epoch: None,
        };
        self.ask(ConnId(conn), ToServer::Identify(identify))
    }

    fn volume_named(&self, volume: &str) -> VolumeId {
        self.core.state().volume_by_name(&name(volume)).expect("it was made").id
    }

    /// A reader of `v@<snapshot>` on its own connection.
    fn read_from_node(&mut self, conn: u64, snapshot: &str, node: &str) {
        self.give(Input::Accepted { conn: ConnId(conn) });
        let mut own = [0; 16];
        own[..8].copy_from_slice(&conn.to_le_bytes());
        let identify = Identify {
            session: SessionId(own),
            secret: Secret(own),
            instance: InstanceId(own),
            node: name(node),
            pid: 7,
            attach: Attach::Snapshot(target(&format!("v@{snapshot}"))),
            cached_epoch: None,
        };
        let welcome = self.ask(ConnId(conn), ToServer::Identify(identify));
        assert!(matches!(welcome, FromServer::IdentifyOk(_)), "{welcome:?}");
    }

    fn operate(&mut self, conn: u64, sequence: u64, request: OperatorRequest) -> FromServer {
        let sequence = Sequence(sequence);
        self.ask(ConnId(conn), ToServer::Operate { sequence, lowest_unanswered: sequence, request })
    }

    /// An operator on connection 1, a volume `v` of 4096 chunks, its writer on connection 2.
    fn with_writer() -> Self {
        let mut desk = Self::new();
        assert!(matches!(desk.connect(1, 1, Attach::Operator), FromServer::IdentifyOk(_)));
        let made = desk.operate(1, 1, create_volume("v"));
        assert!(matches!(made, FromServer::Operated(OperatorReply::Volume(_))), "{made:?}");
        assert!(matches!(desk.connect(2, 2, Attach::Writer(name("v"))), FromServer::IdentifyOk(_)));
        desk
    }

    /// A snapshot `v@<snapshot>`, with the writer draining at once.
    fn snapshot(&mut self, sequence: u64, snapshot: &str) {
        let id = self.say(ConnId(1), create_snapshot(sequence, snapshot));
        self.drained(2, sequence);
        let answer = self.answer_to(id);
        assert!(matches!(answer, Some(FromServer::Operated(OperatorReply::Snapshot(_)))), "{answer:?}");
    }

    /// Answers the last Advice on a connection.
    fn drained(&mut self, conn: u64, sequence: u64) {
        let advice = |frame: &Frame<FromServer>| matches!(frame.message, FromServer::SnapshotAdvice { .. });
        let asked = self.sent.iter().rev().find(|(to, frame)| *to == ConnId(conn) && advice(frame));
        let id = asked.expect("an Advice").1.id;
        let message = ToServer::SnapshotAdviceOk { advice: token(sequence) };
        self.give(Input::Frame { conn: ConnId(conn), frame: Frame { id, term: Term(0), message } });
    }

    fn write(&mut self, first: u64, count: u64) -> FromServer {
        self.ask(ConnId(2), ToServer::QueryWrite { ranges: vec![range(first, count)] })
    }

    fn to(&self, conn: u64) -> Vec<&FromServer> {
        self.sent.iter().filter(|(to, _)| *to == ConnId(conn)).map(|(_, frame)| &frame.message).collect()
    }

    fn check(&self) {
        assert_eq!(self.core.state().check(), Ok(()));
    }
}

fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

fn target(text: &str) -> Target {
    text.parse().expect("a target")
}

fn token(n: u64) -> RequestToken {
    RequestToken([u8::try_from(n).expect("small"); 16])
}

fn range(first: u64, count: u64) -> ChunkRange {
    ChunkRange { first: Chunk(first), count }
}

fn create_volume(volume: &str) -> OperatorRequest {
    let size_bytes = 4096 * 4096;
    OperatorRequest::VolumeCreate {
        name: name(volume),
        size_bytes,
        chunk: ChunkSize::MIN,
        source: Source::Empty,
    }
}

fn create_snapshot(sequence: u64, snapshot: &str) -> ToServer {
    let request =
        OperatorRequest::SnapshotCreate { target: target(&format!("v@{snapshot}")), token: token(sequence) };
    let sequence = Sequence(sequence);
    ToServer::Operate { sequence, lowest_unanswered: sequence, request }
}

fn refused(message: &FromServer) -> Option<RefusalKind> {
    if let FromServer::Refused(refusal) = message { Some(refusal.kind) } else { None }
}

#[test]
fn without_snapshots_every_chunk_is_unique() {
    let mut desk = Desk::new();
    desk.connect(1, 1, Attach::Operator);
    desk.operate(1, 1, create_volume("v"));
    let welcome = desk.connect(2, 2, Attach::Writer(name("v")));
    assert!(matches!(welcome, FromServer::IdentifyOk(IdentifyOk { all_unique: true, .. })));
    let grant = desk.write(0, 4096);
    assert!(matches!(grant, FromServer::WriteOk { all_unique: true, ref pages, .. } if pages.is_empty()));
}

#[test]
fn a_shared_chunk_is_granted_after_its_copy_is_recorded_and_the_gate_was_open() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.held.copies = true;
    let id = desk.say(ConnId(2), ToServer::QueryWrite { ranges: vec![range(5, 2)] });
    assert_eq!(desk.answer_to(id), None, "not before the copy-out");
    desk.held = Held { gates: true, ..Held::default() };
    for output in std::mem::take(&mut desk.waiting) {
        let input = desk.carry_out(output).expect("a copy-out ends");
        desk.give(input);
    }
    assert!(desk.journal.iter().any(|r| matches!(r, Record::Superseded { .. })), "recorded");
    assert_eq!(desk.answer_to(id), None, "not before the gate");
    desk.release();
    let granted = desk.answer_to(id).expect("granted");
    let FromServer::WriteOk { pages, all_unique: false, .. } = granted else { panic!("{granted:?}") };
    assert_eq!(pages[0].bits[0], 0b0110_0000, "these two and no others");
    desk.check();
}

#[test]
fn a_rewrite_copies_nothing() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.write(5, 2);
    let recorded = desk.journal.len();
    assert!(matches!(desk.write(5, 2), FromServer::WriteOk { .. }));
    assert_eq!(desk.journal.len(), recorded);
}

#[test]
fn queries_that_want_the_same_chunk_share_its_copy() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.held.copies = true;
    let first = desk.say(ConnId(2), ToServer::QueryWrite { ranges: vec![range(0, 8)] });
    let second = desk.say(ConnId(2), ToServer::QueryWrite { ranges: vec![range(4, 8)] });
    desk.release();
    assert!(desk.answer_to(first).is_some() && desk.answer_to(second).is_some());
    assert_eq!(desk.core.state().used_bytes(), 12 * 4096);
    desk.check();
}

#[test]
fn a_full_pool_refuses_the_chunks_that_it_cannot_take_and_no_others() {
    let mut desk = Desk::with_writer();
    desk.write(0, 1);
    desk.snapshot(2, "a");
    desk.held.growth_fails = true;
    let FromServer::WriteOk { no_space, .. } = desk.write(3, 2) else { panic!("answered") };
    assert_eq!(no_space, [range(3, 2)]);
    desk.held.growth_fails = false;
    desk.pass(Duration::from_secs(2));
    let FromServer::WriteOk { no_space, .. } = desk.write(3, 2) else { panic!("answered") };
    assert!(no_space.is_empty(), "space came back");
    desk.check();
}

#[test]
fn a_read_of_the_origin_is_confirmed_once_it_is_finished() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.connect(3, 3, Attach::Snapshot(target("v@a")));
    let read = ReadId(9);
    let located = desk.ask(ConnId(3), ToServer::QuerySnapshotRead { read, ranges: vec![range(0, 4)] });
    let FromServer::SnapshotRead { extents, .. } = located else { panic!("{located:?}") };
    assert!(extents.iter().all(|e| e.place == Place::Origin));
    let confirmed = desk.ask(ConnId(3), ToServer::FinishSnapshotRead { read });
    assert_eq!(confirmed, FromServer::FinishSnapshotReadOk { read });
    let again = desk.ask(ConnId(3), ToServer::FinishSnapshotRead { read });
    assert_eq!(again, FromServer::Retry { read }, "a mark confirms one read");
}

#[test]
fn a_grant_breaks_the_mark_and_does_not_wait_for_the_reader() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.connect(3, 3, Attach::Snapshot(target("v@a")));
    let read = ReadId(9);
    desk.ask(ConnId(3), ToServer::QuerySnapshotRead { read, ranges: vec![range(0, 4)] });
    assert!(matches!(desk.write(3, 1), FromServer::WriteOk { .. }), "the writer does not wait");
    let finished = desk.ask(ConnId(3), ToServer::FinishSnapshotRead { read });
    assert_eq!(finished, FromServer::Retry { read });
    let located = desk.ask(ConnId(3), ToServer::QuerySnapshotRead { read, ranges: vec![range(3, 1)] });
    let FromServer::SnapshotRead { extents, .. } = located else { panic!("{located:?}") };
    assert!(matches!(extents[0].place, Place::Store(_)), "the retry is served from the store");
}

#[test]
fn unfinished_reads_of_a_connection_are_bounded() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.connect(3, 3, Attach::Snapshot(target("v@a")));
    let query = |read| ToServer::QuerySnapshotRead { read: ReadId(read), ranges: vec![range(0, 4)] };
    for read in 0..SNAPSHOT_READS_MAX as u64 {
        assert!(matches!(desk.ask(ConnId(3), query(read)), FromServer::SnapshotRead { .. }));
    }
    assert_eq!(refused(&desk.ask(ConnId(3), query(1000))), Some(RefusalKind::Invalid));
    let read = ReadId(5);
    let finished = desk.ask(ConnId(3), ToServer::FinishSnapshotRead { read });
    assert_eq!(finished, FromServer::FinishSnapshotReadOk { read }, "those that it has are kept");
    assert!(matches!(desk.ask(ConnId(3), query(1001)), FromServer::SnapshotRead { .. }));
}

#[test]
fn a_mark_dies_with_its_connection() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.connect(3, 3, Attach::Snapshot(target("v@a")));
    let read = ReadId(9);
    desk.ask(ConnId(3), ToServer::QuerySnapshotRead { read, ranges: vec![range(0, 4)] });
    desk.connect(4, 3, Attach::Snapshot(target("v@a")));
    assert!(desk.closed.contains(&ConnId(3)), "the session's older connection is ended");
    assert_eq!(desk.ask(ConnId(4), ToServer::FinishSnapshotRead { read }), FromServer::Retry { read });
}

#[test]
fn a_create_records_only_after_the_writer_drained() {
    let mut desk = Desk::with_writer();
    let id = desk.say(ConnId(1), create_snapshot(2, "a"));
    assert!(desk.to(2).iter().any(|m| matches!(m, FromServer::SnapshotAdvice { .. })));
    assert_eq!(desk.answer_to(id), None);
    assert!(!desk.journal.iter().any(|r| matches!(r, Record::SnapshotCreate { .. })));
    desk.drained(2, 9);
    assert_eq!(desk.answer_to(id), None, "an answer for another create does not count");
    desk.say(ConnId(2), ToServer::SnapshotAdviceOk { advice: token(2) });
    assert_eq!(desk.answer_to(id), None, "nor one to another Advice of this create");
    desk.drained(2, 2);
    assert!(matches!(desk.answer_to(id), Some(FromServer::Operated(OperatorReply::Snapshot(_)))));
    assert!(desk.to(2).iter().any(|m| matches!(m, FromServer::Resume { epoch, .. } if epoch.0 == 2)));
}

#[test]
fn a_writer_that_comes_back_is_drained_anew() {
    let mut desk = Desk::with_writer();
    desk.give(Input::Closed { conn: ConnId(2) });
    let id = desk.say(ConnId(1), create_snapshot(2, "a"));
    assert_eq!(desk.answer_to(id), None, "an absent writer is waited for");
    let welcome = desk.connect(4, 2, Attach::Writer(name("v")));
    assert!(matches!(welcome, FromServer::IdentifyOk(IdentifyOk { advice_follows: true, .. })));
    assert_eq!(desk.answer_to(id), None);
    desk.drained(4, 2);
    assert!(matches!(desk.answer_to(id), Some(FromServer::Operated(_))));
}

#[test]
fn a_writer_that_does_not_drain_fails_the_create_and_is_named_and_resumed() {
    let mut desk = Desk::with_writer();
    let id = desk.say(ConnId(1), create_snapshot(2, "a"));
    for _ in 0..6 {
        desk.say(ConnId(2), ToServer::Renew { forgotten: FreeBatchId(0) });
        desk.pass(Duration::from_secs(1));
    }
    let Some(FromServer::Refused(refusal)) = desk.answer_to(id) else { panic!("refused") };
    assert_eq!(refusal.kind, RefusalKind::TimedOut);
    assert!(refusal.reason.contains("n1") && refusal.reason.contains("pid 2"), "{}", refusal.reason);
    assert!(desk.to(2).iter().any(|m| matches!(m, FromServer::Resume { epoch, .. } if epoch.0 == 1)));
    desk.drained(2, 2);
    assert!(!desk.journal.iter().any(|r| matches!(r, Record::SnapshotCreate { .. })), "late is too late");
}

#[test]
fn a_create_without_a_writer_syncs_the_head_and_a_newcomer_is_drained() {
    let mut desk = Desk::with_writer();
    desk.say(ConnId(2), ToServer::Release);
    let id = desk.say(ConnId(1), create_snapshot(2, "a"));
    assert!(matches!(desk.answer_to(id), Some(FromServer::Operated(OperatorReply::Snapshot(_)))));
}

#[test]
fn a_second_writer_is_refused_and_told_who_holds_the_volume() {
    let mut desk = Desk::with_writer();
    let FromServer::Refused(refusal) = desk.connect(3, 3, Attach::Writer(name("v"))) else {
        panic!("refused")
    };
    assert_eq!(refusal.kind, RefusalKind::Busy);
    assert!(refusal.reason.contains("pid 2"), "{}", refusal.reason);
}

#[test]
fn silence_takes_a_connection_and_not_the_volume() {
    let mut desk = Desk::with_writer();
    desk.pass(Duration::from_secs(60));
    assert!(desk.closed.contains(&ConnId(2)));
    desk.connect(5, 1, Attach::Operator);
    assert_eq!(refused(&desk.connect(3, 3, Attach::Writer(name("v")))), Some(RefusalKind::Busy));
    assert!(
        matches!(desk.connect(4, 2, Attach::Writer(name("v"))), FromServer::IdentifyOk(_)),
        "it comes back"
    );
}

#[test]
fn a_reaped_writer_gives_its_volume_up() {
    let mut desk = Desk::with_writer();
    let looked_at = vec![desk.volume_named("v")];
    desk.operate(1, 2, OperatorRequest::Reaped { instance: InstanceId([2; 16]), looked_at });
    assert!(matches!(desk.connect(3, 3, Attach::Writer(name("v"))), FromServer::IdentifyOk(_)));
}

#[test]
fn a_writer_is_reaped_only_when_every_head_that_it_writes_was_looked_at() {
    let mut desk = Desk::with_writer();
    desk.operate(1, 2, create_volume("w"));
    // The same process writes a second volume; a reader's volume is nothing to look at.
    let (v, w) = (desk.volume_named("v"), desk.volume_named("w"));
    desk.snapshot(3, "a");
    desk.connect_of(2, 4, 4, Attach::Writer(name("w")));
    desk.connect_of(2, 5, 5, Attach::Snapshot(target("v@a")));
    let reaped = |looked_at| OperatorRequest::Reaped { instance: InstanceId([2; 16]), looked_at };
    for (sequence, looked_at) in [(4, vec![]), (5, vec![v]), (6, vec![w])] {
        assert_eq!(refused(&desk.operate(1, sequence, reaped(looked_at))), Some(RefusalKind::Busy));
        assert_eq!(refused(&desk.connect(6, 6, Attach::Writer(name("v")))), Some(RefusalKind::Busy));
    }
    let done = desk.operate(1, 7, reaped(vec![w, v, w]));
    assert!(matches!(done, FromServer::Operated(OperatorReply::Done)), "{done:?}");
    for (conn, volume) in [(7, "v"), (8, "w")] {
        let attached = desk.connect(conn, u8::try_from(conn).expect("small"), Attach::Writer(name(volume)));
        assert!(matches!(attached, FromServer::IdentifyOk(_)), "{attached:?}");
    }
}

#[test]
fn a_fenced_writer_that_comes_back_is_told_and_not_attached_anew() {
    let mut desk = Desk::with_writer();
    desk.operate(1, 2, OperatorRequest::Fence { whom: Fenced::Session(SessionId([2; 16])) });
    desk.give(Input::Accepted { conn: ConnId(8) });
    let identify = Identify {
        session: SessionId([2; 16]),
        secret: Secret([2; 16]),
        instance: InstanceId([2; 16]),
        node: name("n1"),
        pid: 2,
        attach: Attach::Writer(name("v")),
        cached_epoch: Some(csnap_proto::Epoch(1)),
    };
    let answer = desk.ask(ConnId(8), ToServer::Identify(identify));
    assert_eq!(refused(&answer), Some(RefusalKind::NotFound));
}

#[test]
fn a_fenced_node_gives_everything_up_and_a_node_that_is_heard_of_is_not_fenced() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.say(ConnId(2), ToServer::Release);
    desk.connect_from("n2", 3, 3, Attach::Writer(name("v")));
    desk.connect_from("n2", 4, 4, Attach::Snapshot(target("v@a")));
    desk.connect_from("n3", 5, 5, Attach::Snapshot(target("v@a")));
    let fence = |node| OperatorRequest::Fence { whom: Fenced::Node(name(node)) };
    desk.give(Input::Closed { conn: ConnId(3) });
    let FromServer::Refused(refusal) = desk.operate(1, 3, fence("n2")) else { panic!("refused") };
    assert!(refusal.kind == RefusalKind::Busy && refusal.reason.contains("pid 4"), "{}", refusal.reason);
    assert_eq!(refused(&desk.operate(1, 7, fence("n4"))), Some(RefusalKind::NotFound), "also at once");
    desk.give(Input::Closed { conn: ConnId(4) });
    assert_eq!(refused(&desk.operate(1, 4, fence("n2"))), Some(RefusalKind::Busy), "it may come back");
    for _ in 0..15 {
        desk.say(ConnId(1), ToServer::Renew { forgotten: FreeBatchId(0) });
        desk.say(ConnId(5), ToServer::Renew { forgotten: FreeBatchId(0) });
        desk.pass(Duration::from_secs(1));
    }
    assert!(matches!(desk.operate(1, 6, fence("n2")), FromServer::Operated(OperatorReply::Done)));
    assert!(matches!(desk.connect(6, 6, Attach::Writer(name("v"))), FromServer::IdentifyOk(_)));
    let readers: Vec<_> = desk.core.state().sessions().map(|s| s.node.to_string()).collect();
    assert!(readers.contains(&"n3".to_owned()) && !readers.contains(&"n2".to_owned()), "{readers:?}");
    desk.check();
}

#[test]
fn requests_beyond_what_a_session_may_leave_unacknowledged_are_refused_and_harm_nobody() {
    let mut desk = Desk::with_writer();
    desk.held.gates = true;
    for sequence in 2..200 {
        let request = create_volume(&format!("v{sequence}"));
        let lowest_unanswered = Sequence(2);
        desk.say(ConnId(1), ToServer::Operate { sequence: Sequence(sequence), lowest_unanswered, request });
    }
    desk.release();
    let refusals = desk.to(1).into_iter().filter(|m| refused(m) == Some(RefusalKind::Invalid)).count();
    assert_eq!(refusals, 198 - 64);
    desk.check();
}

#[test]
fn a_session_belongs_to_whoever_has_its_secret() {
    let mut desk = Desk::with_writer();
    desk.give(Input::Accepted { conn: ConnId(8) });
    let identify = Identify {
        session: SessionId([2; 16]),
        secret: Secret([9; 16]),
        instance: InstanceId([9; 16]),
        node: name("n2"),
        pid: 9,
        attach: Attach::Writer(name("v")),
        cached_epoch: None,
    };
    let answer = desk.ask(ConnId(8), ToServer::Identify(identify));
    assert_eq!(refused(&answer), Some(RefusalKind::Denied));
    assert!(!desk.closed.contains(&ConnId(2)));
}

#[test]
fn a_fenced_node_gives_up_what_its_older_servers_held() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.write(0, 4);
    desk.operate(1, 3, create_volume("w"));
    desk.operate(1, 4, OperatorRequest::VolumeDelete { name: name("w") });
    let mut state = desk.core.state().clone();
    state.apply(&Record::TermBegin { term: Term(2), node: name("n2") }).expect("a later term");
    let mut desk = Desk::over(Term(3), state);
    desk.connect_from("n3", 1, 9, Attach::Operator);
    let because = desk.core.state().held().because.join("; ");
    assert!(because.contains("bytes until the server of term 1 on node n1 is known dead"), "{because}");
    let fence = |node| OperatorRequest::Fence { whom: Fenced::Node(name(node)) };
    desk.operate(1, 1, OperatorRequest::ServerReaped { term: Term(2) });
    assert_eq!(refused(&desk.operate(1, 2, fence("n1"))), Some(RefusalKind::Busy), "it may come back");
    for _ in 0..15 {
        desk.say(ConnId(1), ToServer::Renew { forgotten: FreeBatchId(0) });
        desk.pass(Duration::from_secs(1));
    }
    assert_eq!(refused(&desk.operate(1, 3, fence("n3"))), Some(RefusalKind::Busy), "it is connected");
    assert_eq!(refused(&desk.operate(1, 4, fence("n2"))), Some(RefusalKind::NotFound), "it is known dead");
    let older = |desk: &Desk| desk.core.state().older_terms().collect::<Vec<_>>();
    assert_eq!(older(&desk), [Term(1)]);
    assert!(matches!(desk.operate(1, 5, fence("n1")), FromServer::Operated(OperatorReply::Done)));
    assert_eq!(older(&desk), []);
    desk.pass(Duration::from_secs(1));
    assert_eq!((desk.core.state().held().because, desk.core.state().removable_heads().count()), (vec![], 0));
    desk.check();
}

#[test]
fn a_resend_is_answered_with_the_stored_result_also_by_a_successor() {
    let mut desk = Desk::with_writer();
    let first = desk.operate(1, 2, create_volume("w"));
    let again = desk.operate(1, 2, create_volume("w"));
    assert_eq!(first, again);
    let mut successor = Desk::over(Term(2), desk.core.state().clone());
    successor.connect(1, 1, Attach::Operator);
    assert_eq!(successor.operate(1, 2, create_volume("w")), first);
    successor.check();
}

#[test]
fn a_snapshot_in_use_is_deleted_only_by_force_and_its_readers_are_told() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.connect(3, 3, Attach::Snapshot(target("v@a")));
    let read = ReadId(1);
    desk.ask(ConnId(3), ToServer::QuerySnapshotRead { read, ranges: vec![range(0, 1)] });
    let delete = |force| OperatorRequest::SnapshotDelete { target: target("v@a"), force };
    let FromServer::Refused(refusal) = desk.operate(1, 3, delete(false)) else { panic!("refused") };
    assert!(refusal.kind == RefusalKind::Busy && refusal.reason.contains("pid 3"), "{}", refusal.reason);
    assert!(matches!(desk.operate(1, 4, delete(true)), FromServer::Operated(OperatorReply::Done)));
    assert!(desk.to(3).contains(&&FromServer::SnapshotGone));
    let finished = desk.ask(ConnId(3), ToServer::FinishSnapshotRead { read });
    assert_eq!(finished, FromServer::Retry { read }, "its mark is broken");
    let next = desk.ask(ConnId(3), ToServer::QuerySnapshotRead { read, ranges: vec![range(0, 1)] });
    assert_eq!(refused(&next), Some(RefusalKind::Gone));
}

#[test]
fn a_reader_that_was_away_when_its_snapshot_went_is_told_and_holds_nothing_any_more() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.write(0, 4);
    desk.connect(3, 3, Attach::Snapshot(target("v@a")));
    desk.give(Input::Closed { conn: ConnId(3) });
    desk.operate(1, 3, OperatorRequest::SnapshotDelete { target: target("v@a"), force: true });
    let looked_at = vec![desk.volume_named("v")];
    desk.operate(1, 4, OperatorRequest::Reaped { instance: InstanceId([2; 16]), looked_at });
    desk.operate(1, 5, OperatorRequest::VolumeDelete { name: name("v") });
    desk.pass(Duration::from_secs(1));
    assert_eq!(desk.core.state().held().bytes, 4 * 4096, "it may be reading them");
    let welcome = desk.connect(4, 3, Attach::Snapshot(target("v@a")));
    assert!(matches!(welcome, FromServer::IdentifyOk(IdentifyOk { geometry: None, .. })), "{welcome:?}");
    assert_eq!(desk.to(4).last(), Some(&&FromServer::SnapshotGone));
    let told = desk.ask(ConnId(4), ToServer::Renew { forgotten: FreeBatchId(0) });
    let FromServer::Renewed { forget, .. } = told else { panic!("{told:?}") };
    desk.ask(ConnId(4), ToServer::Renew { forgotten: forget[0].batch });
    desk.pass(Duration::from_secs(1));
    assert_eq!(desk.core.state().held().bytes, 0);
    desk.check();
}

#[test]
fn a_reader_of_a_deleted_snapshot_does_not_pass_for_the_writer() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.connect(3, 3, Attach::Snapshot(target("v@a")));
    desk.operate(1, 3, OperatorRequest::SnapshotDelete { target: target("v@a"), force: true });
    let shown = desk.operate(1, 4, OperatorRequest::VolumeShow { name: name("v") });
    let FromServer::Operated(OperatorReply::Volume(info)) = shown else { panic!("{shown:?}") };
    let attached: Vec<_> = info.attached.iter().map(|a| (a.pid, a.snapshot.clone())).collect();
    assert_eq!(attached, [(2, None)], "whoever waits for its writer's lock would wait for another's");
}

#[test]
fn a_copy_out_whose_snapshot_was_deleted_meanwhile_leaves_nothing_behind() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.held.copies = true;
    let id = desk.say(ConnId(2), ToServer::QueryWrite { ranges: vec![range(0, 4)] });
    desk.operate(1, 3, OperatorRequest::SnapshotDelete { target: target("v@a"), force: false });
    desk.release();
    assert!(matches!(desk.answer_to(id), Some(FromServer::WriteOk { all_unique: true, .. })));
    assert_eq!(desk.core.state().used_bytes(), 0);
    desk.check();
}

/// A copy-out that read its chunk while a snapshot was deleted, the chunk overwritten, and another snapshot made.
#[test]
fn a_copy_from_before_a_delete_is_not_believed_after_another_create() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.held.copies = true;
    let id = desk.say(ConnId(2), ToServer::QueryWrite { ranges: vec![range(0, 1)] });
    desk.operate(1, 3, OperatorRequest::SnapshotDelete { target: target("v@a"), force: false });
    desk.snapshot(4, "b");
    let copies = desk.waiting.len();
    for output in std::mem::take(&mut desk.waiting) {
        let Output::CopyOut { copy, .. } = output else { continue };
        desk.give(Input::CopiedOut { copy, result: Ok(Vec::new()) });
    }
    assert!(
        !desk.journal.iter().any(|r| matches!(r, Record::Superseded { .. })),
        "the old copy is thrown away"
    );
    assert_eq!(desk.answer_to(id), None, "and the chunk is copied again");
    assert_eq!((copies, desk.waiting.len()), (1, 1));
    desk.release();
    assert!(matches!(desk.answer_to(id), Some(FromServer::WriteOk { all_unique: false, .. })));
    desk.check();
}

#[test]
fn a_chunk_that_is_being_copied_is_not_copied_again_for_a_client_that_comes_back() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.held.copies = true;
    desk.say(ConnId(2), ToServer::QueryWrite { ranges: vec![range(0, 1)] });
    desk.connect(4, 2, Attach::Writer(name("v")));
    let id = desk.say(ConnId(4), ToServer::QueryWrite { ranges: vec![range(0, 1)] });
    assert_eq!(desk.waiting.len(), 1, "it joins the copy under way");
    desk.release();
    assert!(matches!(desk.answer_to(id), Some(FromServer::WriteOk { .. })));
    assert_eq!(desk.core.state().used_bytes(), 4096);
    desk.check();
}

#[test]
fn a_volume_that_is_being_imported_has_no_snapshots() {
    let mut desk = Desk::with_writer();
    let request = OperatorRequest::VolumeCreate {
        name: name("i"),
        size_bytes: 4096,
        chunk: ChunkSize::MIN,
        source: Source::Import,
    };
    desk.operate(1, 2, request);
    let request = OperatorRequest::SnapshotCreate { target: target("i@a"), token: token(3) };
    assert_eq!(refused(&desk.operate(1, 3, request)), Some(RefusalKind::Busy));
}

#[test]
fn lists_go_on_after_any_row_that_a_peer_names() {
    let mut desk = Desk::with_writer();
    let after = Some((name("v"), csnap_proto::Epoch(u64::MAX)));
    let rows = desk.operate(1, 2, OperatorRequest::SnapshotList { volume: None, after });
    assert!(
        matches!(rows, FromServer::Operated(OperatorReply::Snapshots { rows, more: false }) if rows.is_empty())
    );
}

/// More volumes and snapshots than fit a frame: paths, and readers, make their rows long.
#[test]
fn lists_that_do_not_fit_a_frame_come_in_pages() {
    let mut desk = Desk::new();
    desk.connect(1, 1, Attach::Operator);
    let path = |i| format!("/{}/{i:04}", "d".repeat(4000));
    for i in 0..400u32 {
        let request = OperatorRequest::VolumeCreate {
            name: name(&format!("v{i:04}")),
            size_bytes: 0,
            chunk: ChunkSize::MIN,
            source: Source::Adopt { path: path(i) },
        };
        let made = desk.operate(1, 1 + u64::from(i), request);
        assert!(matches!(made, FromServer::Operated(OperatorReply::Volume(_))), "{made:?}");
    }
    let (mut names, mut pages, mut after) = (Vec::new(), 0, None);
    loop {
        let reply = desk.operate(1, 1000 + pages, OperatorRequest::VolumeList { after: after.take() });
        let FromServer::Operated(OperatorReply::Volumes { rows, more }) = reply else { panic!("{reply:?}") };
        pages += 1;
        after = rows.last().map(|row| row.name.clone());
        names.extend(rows.into_iter().map(|row| row.name.to_string()));
        if !more {
            break;
        }
    }
    assert_eq!(names, (0..400).map(|i| format!("v{i:04}")).collect::<Vec<_>>());
    assert_eq!(pages, 2, "a frame carries a mebibyte");
}

#[test]
fn pages_of_snapshots_go_on_where_the_last_one_ended() {
    let mut desk = Desk::with_writer();
    let long = |i: u64| format!("{i:03}{}", "s".repeat(120));
    for i in 0..240 {
        desk.snapshot(2 + i, &long(i));
        for reader in 0..16 {
            desk.read_from_node(10_000 + i * 16 + reader, &long(i), &"n".repeat(128));
        }
    }
    let (mut epochs, mut pages, mut after) = (Vec::new(), 0, None);
    loop {
        let request = OperatorRequest::SnapshotList { volume: None, after: after.take() };
        let reply = desk.operate(1, 1000 + pages, request);
        let FromServer::Operated(OperatorReply::Snapshots { rows, more }) = reply else {
            panic!("{reply:?}")
        };
        pages += 1;
        after = rows.last().map(|row| (row.target.volume.clone(), row.epoch));
        epochs.extend(rows.into_iter().map(|row| row.epoch.0));
        if !more {
            break;
        }
    }
    assert_eq!(epochs, (1..=240).collect::<Vec<_>>());
    assert!(pages > 1);
}

#[test]
fn what_a_session_says_after_its_end_does_not_count() {
    let mut desk = Desk::with_writer();
    desk.say(ConnId(2), ToServer::Release);
    let late = desk.say(ConnId(2), ToServer::QueryWrite { ranges: vec![range(0, 1)] });
    assert_eq!(desk.answer_to(late), None);
    assert!(desk.closed.contains(&ConnId(2)));
}

#[test]
fn unnumbered_requests_end_the_connection() {
    let mut desk = Desk::with_writer();
    let message = ToServer::QueryWrite { ranges: vec![range(0, 1)] };
    desk.give(Input::Frame { conn: ConnId(2), frame: Frame { id: RequestId(0), term: Term(0), message } });
    assert!(desk.closed.contains(&ConnId(2)));
}

#[test]
fn deleting_every_snapshot_gives_all_space_back() {
    let mut desk = Desk::with_writer();
    for (sequence, snapshot) in [(2, "a"), (3, "b"), (4, "c")] {
        desk.snapshot(sequence, snapshot);
        desk.write(sequence, 600);
    }
    for (sequence, snapshot) in [(5, "b"), (6, "a"), (7, "c")] {
        let request =
            OperatorRequest::SnapshotDelete { target: target(&format!("v@{snapshot}")), force: false };
        desk.operate(1, sequence, request);
    }
    for _ in 0..20 {
        desk.say(ConnId(2), ToServer::Renew { forgotten: FreeBatchId(0) });
        desk.pass(Duration::from_millis(50));
    }
    assert_eq!(desk.core.state().used_bytes(), 0);
    assert_eq!(desk.core.state().held().bytes, 0);
    desk.check();
}

#[test]
fn a_deposed_server_answers_nothing_and_ends() {
    let mut desk = Desk::with_writer();
    desk.held.gates = true;
    let id = desk.say(ConnId(2), ToServer::Renew { forgotten: FreeBatchId(0) });
    let Some(Output::ReadGate { batch }) = desk.waiting.pop() else { panic!("an answer waits for the gate") };
    desk.give(Input::Gate { batch, open: false });
    assert_eq!(desk.exit, Some(Exit::Deposed));
    assert_eq!(desk.answer_to(id), None);
    desk.give(Input::Accepted { conn: ConnId(9) });
    assert_eq!(desk.answer_to(id), None, "and stays silent");
}

#[test]
fn ranges_beyond_the_volume_are_refused() {
    let mut desk = Desk::with_writer();
    assert_eq!(refused(&desk.write(4095, 2)), Some(RefusalKind::Invalid));
    assert_eq!(refused(&desk.write(u64::MAX - 1, 1)), Some(RefusalKind::Invalid));
}

#[test]
fn an_import_is_nobody_elses_and_goes_with_its_importer() {
    let mut desk = Desk::with_writer();
    let request = OperatorRequest::VolumeCreate {
        name: name("i"),
        size_bytes: 4096,
        chunk: ChunkSize::MIN,
        source: Source::Import,
    };
    desk.operate(1, 2, request);
    assert_eq!(refused(&desk.connect(3, 3, Attach::Writer(name("i")))), Some(RefusalKind::Busy));
    let writing = desk.connect_of(1, 4, 4, Attach::Writer(name("i")));
    assert!(matches!(writing, FromServer::IdentifyOk(_)), "{writing:?}");
    // Nobody lists it, so nobody looked at its head.
    desk.operate(1, 3, OperatorRequest::Reaped { instance: InstanceId([1; 16]), looked_at: Vec::new() });
    assert_eq!(desk.core.state().volumes().count(), 1, "whole or not at all");
}

#[test]
fn status_fits_a_frame_however_many_hold_space() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.write(0, 1);
    for reader in 0..HELD_REASONS_MAX as u64 + 20 {
        desk.read_from_node(10_000 + reader, "a", &"n".repeat(128));
    }
    desk.operate(1, 3, OperatorRequest::SnapshotDelete { target: target("v@a"), force: true });
    desk.pass(Duration::from_secs(1));
    let reply = desk.operate(1, 4, OperatorRequest::Status);
    let FromServer::Operated(OperatorReply::Status(status)) = reply else { panic!("{reply:?}") };
    assert_eq!(status.held_because.len(), HELD_REASONS_MAX + 1);
    assert_eq!(status.held_because.last().map(String::as_str), Some("and 20 more reasons"));
}
