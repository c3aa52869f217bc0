//! The desk around the core does what a shell would, at once and without failure, unless a test holds something back.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use csnap_proto::message::operate::{OperatorReply, OperatorRequest};
use csnap_proto::message::volume::{Attach, FromServer, Identify, ToServer};
use csnap_proto::{
    Frame, InstanceId, PoolId, RequestId, Secret, Sequence, SessionId, Term, Time, VolumeId, WallMillis,
};
use csnap_server::core::{CloseReason, Config, ConnId, Exit, Input, Output, ServerCore, Task, TaskDone};
use csnap_server::state::{Record, State};

use crate::words::{create_snapshot, create_volume, name, newcomer, range, target, token};

/// What the desk holds back until told otherwise.
#[derive(Default)]
pub(crate) struct Held {
    pub(crate) gates: bool,
    pub(crate) copies: bool,
    pub(crate) growth_fails: bool,
    pub(crate) tasks: bool,
    /// What comes of syncs of heads, if not success.
    pub(crate) sync: Option<TaskDone>,
}

pub(crate) struct Desk {
    pub(crate) core: ServerCore,
    now: Time,
    sent: Vec<(ConnId, Frame<FromServer>)>,
    /// With the reason that is logged.
    pub(crate) closed: BTreeMap<ConnId, Option<CloseReason>>,
    pub(crate) exit: Option<Exit>,
    pub(crate) held: Held,
    pub(crate) waiting: Vec<Output>,
    pub(crate) journal: Vec<Record>,
    last_request: u64,
}

impl Desk {
    pub(crate) fn new() -> Self {
        Self::over(Term(1), State::new(PoolId([7; 16])))
    }

    /// A server of `term` on node n`term`.
    pub(crate) fn over(term: Term, state: State) -> Self {
        let config = Config::of(name(&format!("n{term}")));
        let core = ServerCore::new(term, config, state, Time(0), WallMillis(0));
        let mut desk = Self {
            core,
            now: Time(0),
            sent: Vec::new(),
            closed: BTreeMap::new(),
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
    pub(crate) fn give(&mut self, input: Input) {
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

    pub(crate) fn carry_out(&mut self, output: Output) -> Option<Input> {
        match output {
            Output::ReadGate { .. } if self.held.gates => self.waiting.push(output),
            Output::CopyOut { .. } if self.held.copies => self.waiting.push(output),
            Output::Start { .. } if self.held.tasks => self.waiting.push(output),
            Output::Append { batch, body, .. } => {
                self.journal.extend(Record::decode_batch(&body).expect("the core's own records"));
                return Some(Input::Appended { batch });
            }
            Output::ReadGate { batch } => return Some(Input::Gate { batch, open: true }),
            Output::Send { conn, frame } => self.sent.push((conn, frame)),
            Output::Close { conn, reason } => drop(self.closed.insert(conn, reason)),
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
                    Task::SyncHead { .. } => self.held.sync.clone().unwrap_or(TaskDone::Done),
                    Task::CreateHead { .. } => TaskDone::Done,
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
    pub(crate) fn release(&mut self) {
        self.held = Held::default();
        for output in std::mem::take(&mut self.waiting) {
            if let Some(input) = self.carry_out(output) {
                self.give(input);
            }
        }
    }

    pub(crate) fn pass(&mut self, time: Duration) {
        self.now = self.now.after(time);
        self.give(Input::Tick);
    }

    /// Sends a request; its id.
    pub(crate) fn say(&mut self, conn: ConnId, message: ToServer) -> RequestId {
        self.last_request += 1;
        let id = RequestId(self.last_request);
        self.give(Input::Frame { conn, frame: Frame { id, term: Term(0), message } });
        id
    }

    pub(crate) fn answer_to(&self, id: RequestId) -> Option<&FromServer> {
        self.sent.iter().find(|(_, frame)| frame.id == id).map(|(_, frame)| &frame.message)
    }

    /// Sends a request and expects its answer at once.
    pub(crate) fn ask(&mut self, conn: ConnId, message: ToServer) -> FromServer {
        let id = self.say(conn, message);
        self.answer_to(id).expect("an answer").clone()
    }

    pub(crate) fn connect(&mut self, conn: u64, who: u8, attach: Attach) -> FromServer {
        self.identify(conn, newcomer(who, attach))
    }

    pub(crate) fn connect_from(&mut self, node: &str, conn: u64, who: u8, attach: Attach) -> FromServer {
        self.identify(conn, Identify { node: name(node), ..newcomer(who, attach) })
    }

    /// Another session of the process that `instance` is.
    pub(crate) fn connect_of(&mut self, instance: u8, conn: u64, who: u8, attach: Attach) -> FromServer {
        let (instance, pid) = (InstanceId([instance; 16]), u32::from(instance));
        self.identify(conn, Identify { instance, pid, ..newcomer(who, attach) })
    }

    /// A new connection that says who it is; the answer.
    pub(crate) fn identify(&mut self, conn: u64, identify: Identify) -> FromServer {
        self.give(Input::Accepted { conn: ConnId(conn) });
        self.ask(ConnId(conn), ToServer::Identify(identify))
    }

    pub(crate) fn volume_named(&self, volume: &str) -> VolumeId {
        self.core.state().volume_by_name(&name(volume)).expect("it was made").id
    }

    /// A reader of `v@<snapshot>` on its own connection.
    pub(crate) fn read_from_node(&mut self, conn: u64, snapshot: &str, node: &str) {
        let mut own = [0; 16];
        own[..8].copy_from_slice(&conn.to_le_bytes());
        let reader = Identify {
            session: SessionId(own),
            secret: Secret(own),
            instance: InstanceId(own),
            node: name(node),
            ..newcomer(7, Attach::Snapshot(target(&format!("v@{snapshot}"))))
        };
        let welcome = self.identify(conn, reader);
        assert!(matches!(welcome, FromServer::IdentifyOk(_)), "{welcome:?}");
    }

    pub(crate) fn operate(&mut self, conn: u64, sequence: u64, request: OperatorRequest) -> FromServer {
        let sequence = Sequence(sequence);
        self.ask(ConnId(conn), ToServer::Operate { sequence, lowest_unanswered: sequence, request })
    }

    /// An operator on connection 1, a volume `v` of 4096 chunks, its writer on connection 2.
    pub(crate) fn with_writer() -> Self {
        let mut desk = Self::new();
        assert!(matches!(desk.connect(1, 1, Attach::Operator), FromServer::IdentifyOk(_)));
        let made = desk.operate(1, 1, create_volume("v"));
        assert!(matches!(made, FromServer::Operated(OperatorReply::Volume(_))), "{made:?}");
        assert!(matches!(desk.connect(2, 2, Attach::Writer(name("v"))), FromServer::IdentifyOk(_)));
        desk
    }

    /// A snapshot `v@<snapshot>`, with the writer draining at once.
    pub(crate) fn snapshot(&mut self, sequence: u64, snapshot: &str) {
        let id = self.say(ConnId(1), create_snapshot(sequence, snapshot));
        self.drained(2, sequence);
        let answer = self.answer_to(id);
        assert!(matches!(answer, Some(FromServer::Operated(OperatorReply::Snapshot(_)))), "{answer:?}");
    }

    /// Answers the last Advice on a connection.
    pub(crate) fn drained(&mut self, conn: u64, sequence: u64) {
        let advice = |frame: &Frame<FromServer>| matches!(frame.message, FromServer::SnapshotAdvice { .. });
        let asked = self.sent.iter().rev().find(|(to, frame)| *to == ConnId(conn) && advice(frame));
        let id = asked.expect("an Advice").1.id;
        let message = ToServer::SnapshotAdviceOk { advice: token(sequence) };
        self.give(Input::Frame { conn: ConnId(conn), frame: Frame { id, term: Term(0), message } });
    }

    pub(crate) fn write(&mut self, first: u64, count: u64) -> FromServer {
        self.ask(ConnId(2), ToServer::QueryWrite { ranges: vec![range(first, count)] })
    }

    pub(crate) fn to(&self, conn: u64) -> Vec<&FromServer> {
        self.sent.iter().filter(|(to, _)| *to == ConnId(conn)).map(|(_, frame)| &frame.message).collect()
    }

    pub(crate) fn check(&self) {
        assert_eq!(self.core.state().check(), Ok(()));
    }
}
