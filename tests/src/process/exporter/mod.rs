//! An exporter process: attachments of volumes and snapshots, each a client core with its head and arenas on the simulated
//! disk, and the guests behind them, whose every request the model judges.
//!
//! - `link`: the agent, and connections to servers; `files`: heads and arenas; `judge`: what the model is told and asked.

mod files;
mod judge;
mod link;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use csnap_client::core::{
    ClientCore, CoreConfig, Input, IoFailure, IoId, IoOp, Op, Output, Request, RequestError, RequestKey,
};
use csnap_proto::message::local::FromAgent;
use csnap_proto::message::volume::{Attach as Wanted, FromServer, Geometry};
use csnap_proto::{InstanceId, RequestId, RequestToken, Target, Term, Time};
use csnap_storage::StorageError;
use csnap_storage::sim::{SimFile, SimStorage};

use crate::model::Stamp;
use crate::net::NetConn;
use crate::sim::{Ask, Event, HostId, ProcId, Sim, agent_address, frames, node_name};
use crate::tasks::Tasks;

/// The connection that says who we are; attachments' questions have their own numbers above.
const HELLO: u64 = 0;

/// Timers.
const HELLO_AGAIN: u64 = 0;
const ASK_AGAIN: u64 = 1 << 32;
const LOCK_AGAIN: u64 = 1 << 33;

/// An agent that does not answer is asked again after this, microseconds.
const AGENT_PAUSE: u64 = 50_000;

/// What to attach.
#[derive(Clone, Debug)]
pub struct Attach {
    /// Number of the attachment, unique in the world.
    pub number: u64,
    /// Index of the volume in the model.
    pub volume: usize,
    /// Volume or snapshot, by its name.
    pub target: Target,
    /// Identity of the snapshot in the model.
    pub snapshot: Option<RequestToken>,
}

/// How an I/O ended.
type IoResult = Result<Bytes, IoFailure>;

enum Ended {
    Opened { attachment: u64, head: Result<SimFile, StorageError> },
    Locked { attachment: u64, head: SimFile, locked: bool },
    Io { attachment: u64, io: IoId, result: IoResult },
    Fast { attachment: u64, request: RequestKey, result: IoResult },
}

/// A request of a guest under way.
struct Running {
    op: Op,
    offset: u64,
    len: u64,
    /// When, for the model, and in virtual time.
    asked: u64,
    since: u64,
    stamp: Stamp,
    buffer: Vec<u8>,
    /// Its I/O that changes the head is under way.
    writing: bool,
}

/// How an attachment is, for the world's guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Not attached yet.
    Attaching,
    /// Takes requests.
    Open,
    /// Failed or refused: only a release makes sense.
    Failed,
    /// Gone.
    Released,
}

/// One attachment.
pub struct Attachment {
    what: Attach,
    core: ClientCore,
    /// For the world's guests.
    pub stage: Stage,
    /// Why it failed.
    pub error: Option<RequestError>,
    geometry: Option<Geometry>,
    head: Option<SimFile>,
    held: Vec<(IoId, IoOp)>,
    requests: BTreeMap<RequestKey, Running>,
    ios: BTreeMap<IoId, IoOp>,
    last_key: u64,
    fast: Option<bool>,
    fast_running: BTreeSet<RequestKey>,
    stop_fast: Option<IoId>,
    /// A server is needed; not this one.
    wanted: Option<Term>,
    /// The connection to the agent that asks for one.
    question: Option<NetConn>,
    asking: bool,
    conn: Option<NetConn>,
    term: Term,
    /// Requests that the present connection has not answered.
    unanswered: BTreeMap<RequestId, &'static str>,
    lost_grant: bool,
    lost_read: bool,
    advised: Option<(RequestToken, Term)>,
    released: Option<RequestKey>,
}

impl Attachment {
    /// Requests of guests under way.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.requests.len()
    }

    /// The volume in the model.
    #[must_use]
    pub fn volume(&self) -> usize {
        self.what.volume
    }

    /// The snapshot in the model, if it reads one.
    #[must_use]
    pub fn snapshot(&self) -> Option<RequestToken> {
        self.what.snapshot
    }

    /// Whether a request that changes these bytes would meet one that is under way.
    #[must_use]
    pub fn meets(&self, offset: u64, len: u64) -> bool {
        self.requests.values().any(|r| r.offset < offset + len && offset < r.offset + r.len)
    }

    /// Why requests wait.
    #[must_use]
    pub fn waiting(&self) -> Option<String> {
        self.core.waiting()
    }

    /// Messages by name.
    #[must_use]
    pub fn messages(&self) -> &BTreeMap<&'static str, u64> {
        self.core.messages()
    }

    /// Bytes of it, once attached.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.geometry.as_ref().map_or(0, |geometry| geometry.size_bytes)
    }

    fn is_writer(&self) -> bool {
        self.what.snapshot.is_none()
    }
}

/// See the module.
pub struct ExporterProc {
    id: ProcId,
    host: HostId,
    instance: InstanceId,
    storage: SimStorage,
    tasks: Tasks<Ended>,
    agent: Option<NetConn>,
    /// By number.
    pub attachments: BTreeMap<u64, Attachment>,
}

impl ExporterProc {
    pub(super) fn start(sim: &mut Sim, id: ProcId, host: HostId) -> Self {
        Self {
            id,
            host,
            instance: sim.draw_instance(),
            storage: sim.pool(id),
            tasks: Tasks::new(id, sim.ready.clone()),
            agent: None,
            attachments: BTreeMap::new(),
        }
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        self.attachments.values().filter_map(|a| a.core.next_deadline()).min()
    }

    pub(super) fn on_event(&mut self, sim: &mut Sim, event: Event) {
        match event {
            Event::Start | Event::Timer(HELLO_AGAIN) => {
                sim.connect(self.id, self.host, &agent_address(self.host), HELLO);
            }
            Event::Connected { tag: HELLO, conn } => self.on_hello(sim, conn),
            Event::Connected { tag, conn } => self.on_question(sim, tag, conn),
            Event::Closed { conn } => self.on_closed(sim, conn),
            Event::Received { conn, payload } => {
                if self.attachments.values().any(|a| a.conn == Some(conn)) {
                    for frame in frames::<FromServer>(&payload.bytes) {
                        self.on_server(sim, conn, frame);
                    }
                } else if Some(conn) == self.agent
                    || self.attachments.values().any(|a| a.question == Some(conn))
                {
                    for frame in frames::<FromAgent>(&payload.bytes) {
                        self.on_agent(sim, conn, frame.message, payload.socket);
                    }
                }
            }
            Event::Task(task) => {
                if let Some(ended) = self.tasks.poll(task) {
                    self.on_ended(sim, ended);
                }
            }
            Event::Timer(timer) if timer >= LOCK_AGAIN => self.lock_again(timer - LOCK_AGAIN),
            Event::Timer(timer) => self.seek(sim, timer - ASK_AGAIN),
            Event::Tick => {
                let now = sim.clock(self.host);
                let due = |a: &Attachment| a.core.next_deadline().is_some_and(|at| at <= now);
                let due: Vec<u64> =
                    self.attachments.iter().filter(|(_, a)| due(a)).map(|(n, _)| *n).collect();
                due.into_iter().for_each(|number| self.step(sim, number, Input::Tick));
            }
            Event::Ask(Ask::Attach(what)) => self.attach(sim, what),
            Event::Ask(Ask::Io { attachment, op, offset, len, fast }) => {
                self.request(sim, attachment, op, offset, len, fast);
            }
            Event::Accepted(_) | Event::Ended(_) | Event::Ask(_) | Event::Said(_) => {}
        }
    }

    fn attach(&mut self, sim: &mut Sim, what: Attach) {
        let (session, secret) = sim.draw_session();
        let attach = match what.snapshot {
            None => Wanted::Writer(what.target.volume.clone()),
            Some(_) => Wanted::Snapshot(what.target.clone()),
        };
        let config = CoreConfig {
            session,
            secret,
            instance: self.instance,
            node: node_name(self.host),
            pid: self.id.0,
            attach,
            unique_cache_bytes: sim.plan.unique_cache_bytes,
            writeback_bytes: sim.plan.writeback_bytes,
            canaries: sim.plan.canaries.client.clone(),
        };
        let number = what.number;
        let attachment = Attachment {
            what,
            core: ClientCore::new(config),
            stage: Stage::Attaching,
            error: None,
            geometry: None,
            head: None,
            held: Vec::new(),
            requests: BTreeMap::new(),
            ios: BTreeMap::new(),
            last_key: 0,
            fast: None,
            fast_running: BTreeSet::new(),
            stop_fast: None,
            wanted: None,
            question: None,
            asking: false,
            conn: None,
            term: Term(0),
            unanswered: BTreeMap::new(),
            lost_grant: false,
            lost_read: false,
            advised: None,
            released: None,
        };
        self.attachments.insert(number, attachment);
        self.step(sim, number, Input::Tick);
    }

    /// A guest's request.
    fn request(&mut self, sim: &mut Sim, number: u64, op: Op, offset: u64, len: u64, fast: bool) {
        let Some(attachment) = self.attachments.get_mut(&number) else { return };
        // What came while this process was stopped may be more than a guest has under way, and overlap.
        let crowded =
            attachment.requests.len() > sim.plan.work.depth || (len > 0 && attachment.meets(offset, len));
        if attachment.released.is_some() || (op != Op::Release && crowded) {
            return;
        }
        attachment.last_key += 1;
        let key = RequestKey(attachment.last_key);
        let zeros = !matches!(op, Op::Write { .. });
        let changes = !matches!(op, Op::Read | Op::Flush | Op::Release);
        let stamp = if changes { sim.model.stamp(zeros) } else { Stamp::NEW };
        let content = match op {
            Op::Write { .. } => sim.model.volumes[attachment.what.volume].content(offset, len, stamp),
            Op::Read => vec![0xee; index(len)],
            _ => Vec::new(),
        };
        let allowed = match attachment.fast {
            Some(true) => true,
            Some(false) => attachment.core.known_unique(offset, len),
            None => false,
        };
        let fast = fast && allowed && attachment.head.is_some() && matches!(op, Op::Write { fua: false });
        if op == Op::Release {
            attachment.released = Some(key);
        }
        let (asked, since) = (sim.instant(), sim.now());
        let running = Running { op, offset, len, asked, since, stamp, buffer: content, writing: false };
        attachment.requests.insert(key, running);
        if fast {
            self.write_fast(sim, number, key);
        } else {
            self.step(sim, number, Input::Request(Request { key, op, offset, len }));
        }
    }

    fn step(&mut self, sim: &mut Sim, number: u64, input: Input) {
        let now = sim.clock(self.host);
        let Some(attachment) = self.attachments.get_mut(&number) else { return };
        let mut out = Vec::new();
        attachment.core.step(now, input, &mut out);
        for output in out {
            self.carry_out(sim, number, output);
        }
    }

    fn carry_out(&mut self, sim: &mut Sim, number: u64, output: Output) {
        let Some(attachment) = self.attachments.get_mut(&number) else { return };
        match output {
            Output::NeedServer { suspect } => {
                attachment.wanted = Some(suspect);
                self.seek(sim, number);
            }
            Output::Send { conn, frame } => {
                attachment.note_request(&frame);
                sim.send(self.id, NetConn(conn.0), &frame);
            }
            Output::Disconnect { conn, .. } => {
                let conn = NetConn(conn.0);
                if attachment.conn.take_if(|mine| *mine == conn).is_some() {
                    attachment.on_conn_lost();
                }
                sim.close(self.id, conn);
            }
            Output::Attached { geometry, .. } => self.open_head(sim, number, geometry),
            Output::Ended(error) => {
                sim.note(|| format!("attachment {number} ended: {error}"));
                if attachment.stage != Stage::Released {
                    attachment.stage = Stage::Failed;
                }
                attachment.note_end(sim, &error);
                attachment.error = Some(error);
            }
            Output::OpenFast { all_unique } => attachment.fast = Some(all_unique),
            Output::StartIo { io, op: IoOp::StopFast } => {
                attachment.fast = None;
                if !attachment.fast_running.is_empty() {
                    sim.tally.reached("a fast write was waited for by a drain");
                }
                attachment.stop_fast = Some(io);
                self.check_stopped(sim, number);
            }
            Output::StartIo { io, op } => self.start_io(sim, number, io, op),
            Output::Complete { request, result } => self.complete(sim, number, request, result),
        }
    }

    fn check_stopped(&mut self, sim: &mut Sim, number: u64) {
        let Some(attachment) = self.attachments.get_mut(&number) else { return };
        if attachment.fast_running.is_empty()
            && let Some(io) = attachment.stop_fast.take()
        {
            self.step(sim, number, Input::IoDone { io, result: Ok(()) });
        }
    }

    /// A guest gets its answer: the model judges it.
    fn complete(&mut self, sim: &mut Sim, number: u64, key: RequestKey, result: Result<(), RequestError>) {
        let attachment = self.attachments.get_mut(&number).expect("the caller looked it up");
        let running = attachment.requests.remove(&key).expect("a request completes once");
        sim.mix(sim.now() ^ number.rotate_left(40) ^ key.0.rotate_left(20));
        sim.tally.did("requests", 1);
        sim.longest_wait = sim.longest_wait.max(sim.now() - running.since);
        match result {
            Ok(()) => attachment.on_success(sim, &running),
            Err(error) => attachment.on_failure(sim, &running, &error),
        }
        if attachment.released == Some(key) {
            attachment.stage = Stage::Released;
        }
    }

    /// The process is dead: what its writes did is not known.
    pub fn on_killed(&mut self, sim: &mut Sim) {
        let now = sim.instant();
        for attachment in self.attachments.values() {
            for running in attachment.requests.values().filter(|running| running.writing) {
                let volume = &mut sim.model.volumes[attachment.what.volume];
                volume.write_ends(now, running.offset, running.len, running.stamp, false);
            }
        }
    }

    /// Writes under way.
    #[must_use]
    pub fn writes_under_way(&self) -> usize {
        self.attachments.values().flat_map(|a| a.requests.values()).filter(|r| r.writing).count()
    }
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("requests are small")
}
