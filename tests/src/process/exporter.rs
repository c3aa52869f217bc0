//! An exporter process: attachments of volumes and snapshots, each a client core with its head and arenas on the simulated
//! disk, and the guests behind them, whose every request the model judges.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use csnap_client::core as client;
use csnap_client::core::{
    ClientCore, CoreConfig, Input, IoFailure, IoId, IoOp, Op, Output, Request, RequestError, RequestKey,
};
use csnap_proto::message::local::{FromAgent, ToAgent};
use csnap_proto::message::volume::{Attach as Wanted, FromServer, Geometry, ToServer};
use csnap_proto::{Frame, InstanceId, RequestId, RequestToken, Target, Term, Time};
use csnap_server::copy::{arena_path, head_path};
use csnap_storage::sim::{SimFile, SimStorage};
use csnap_storage::{Access, BLOCK_BYTES, Storage, StorageError};

use crate::model::Stamp;
use crate::net::NetConn;
use crate::sim::{Ask, Event, HostId, ProcId, Sim, agent_address, frames, node_name, plain};
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
            Event::Accepted(_) | Event::Ended(_) | Event::Ask(_) => {}
        }
    }

    fn on_hello(&mut self, sim: &mut Sim, conn: Option<NetConn>) {
        self.agent = conn;
        match conn {
            Some(conn) => {
                let hello =
                    ToAgent::ExporterHello { instance: self.instance, pid: self.id.0, nbd: Vec::new() };
                sim.send(self.id, conn, &plain(hello));
            }
            None => sim.tell(AGENT_PAUSE, self.id, Event::Timer(HELLO_AGAIN)),
        }
    }

    fn on_closed(&mut self, sim: &mut Sim, conn: NetConn) {
        if Some(conn) == self.agent {
            self.agent = None;
            sim.tell(AGENT_PAUSE, self.id, Event::Timer(HELLO_AGAIN));
            sim.tally.reached("an exporter outlived its agent");
        }
        let numbers: Vec<u64> = self.attachments.keys().copied().collect();
        for number in numbers {
            let Some(attachment) = self.attachments.get_mut(&number) else { continue };
            if attachment.question.take_if(|mine| *mine == conn).is_some() {
                attachment.asking = false;
                sim.tell(AGENT_PAUSE, self.id, Event::Timer(ASK_AGAIN + number));
            }
            if attachment.conn.take_if(|mine| *mine == conn).is_some() {
                attachment.on_conn_lost();
                self.step(sim, number, Input::Disconnected { conn: client::ConnId(conn.0) });
            }
        }
    }

    /// Asks the agent for a server, if one is needed and nobody asks yet.
    fn seek(&mut self, sim: &mut Sim, number: u64) {
        let Some(attachment) = self.attachments.get_mut(&number) else { return };
        if attachment.wanted.is_some() && !attachment.asking {
            attachment.asking = true;
            sim.connect(self.id, self.host, &agent_address(self.host), number);
        }
    }

    fn on_question(&mut self, sim: &mut Sim, number: u64, conn: Option<NetConn>) {
        let Some(attachment) = self.attachments.get_mut(&number) else {
            conn.into_iter().for_each(|conn| sim.close(self.id, conn));
            return;
        };
        attachment.question = conn;
        match (conn, attachment.wanted) {
            (Some(conn), Some(suspect)) => {
                let frame =
                    Frame { id: RequestId(1), term: Term(0), message: ToAgent::NeedServer { suspect } };
                sim.send(self.id, conn, &frame);
            }
            (conn, _) => {
                attachment.asking = false;
                attachment.question = None;
                conn.into_iter().for_each(|conn| sim.close(self.id, conn));
                sim.tell(AGENT_PAUSE, self.id, Event::Timer(ASK_AGAIN + number));
            }
        }
    }

    fn on_agent(&mut self, sim: &mut Sim, conn: NetConn, message: FromAgent, socket: Option<NetConn>) {
        match message {
            FromAgent::ReportPlease => {
                sim.send(self.id, conn, &plain(ToAgent::ExporterReport { clients: Vec::new() }));
            }
            FromAgent::ServerReady { term } if sim.plan.heeds_news => self.on_news(sim, term),
            FromAgent::Connected { node, term } => {
                let found = self.attachments.iter().find(|(_, a)| a.question == Some(conn)).map(|(n, _)| *n);
                let (Some(number), Some(server)) = (found, socket) else { return };
                sim.close(self.id, conn);
                let attachment = self.attachments.get_mut(&number).expect("found above");
                (attachment.question, attachment.asking) = (None, false);
                let better = attachment.conn.is_none() || term > attachment.term;
                if attachment.wanted.take().is_none() || !better {
                    return sim.close(self.id, server);
                }
                if let Some(older) = attachment.conn.replace(server) {
                    attachment.on_conn_lost();
                    sim.close(self.id, older);
                }
                if term > attachment.term {
                    attachment.note_replaced(sim);
                }
                attachment.term = attachment.term.max(term);
                self.step(sim, number, Input::Connected { conn: client::ConnId(server.0), node, term });
            }
            FromAgent::Failed { .. } => {
                sim.close(self.id, conn);
                self.on_closed(sim, conn);
            }
            _ => {}
        }
    }

    /// Another server serves: whoever holds a connection to an older one asks anew.
    fn on_news(&mut self, sim: &mut Sim, term: Term) {
        let older = |a: &Attachment| a.conn.is_some() && a.term < term && a.wanted.is_none();
        let older: Vec<u64> = self.attachments.iter().filter(|(_, a)| older(a)).map(|(n, _)| *n).collect();
        for number in older {
            let attachment = self.attachments.get_mut(&number).expect("just listed");
            attachment.wanted = Some(attachment.term);
            self.seek(sim, number);
        }
    }

    fn on_server(&mut self, sim: &mut Sim, conn: NetConn, frame: Frame<FromServer>) {
        // An earlier frame of the same bytes may have ended it.
        let Some(number) = self.attachments.iter().find(|(_, a)| a.conn == Some(conn)).map(|(n, _)| *n)
        else {
            return;
        };
        let attachment = self.attachments.get_mut(&number).expect("found above");
        attachment.note_answer(sim, &frame);
        self.step(sim, number, Input::Frame { conn: client::ConnId(conn.0), frame });
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
        let (asked, since) = (sim.instant(), sim.now);
        let running = Running { op, offset, len, asked, since, stamp, buffer: content, writing: false };
        attachment.requests.insert(key, running);
        if fast {
            self.write_fast(sim, number, key);
        } else {
            self.step(sim, number, Input::Request(Request { key, op, offset, len }));
        }
    }

    /// A write that does not go through the core.
    fn write_fast(&mut self, sim: &mut Sim, number: u64, key: RequestKey) {
        sim.tally.did("fast writes", 1);
        let attachment = self.attachments.get_mut(&number).expect("the caller looked it up");
        attachment.fast_running.insert(key);
        attachment.write_begins(sim, key);
        let running = &attachment.requests[&key];
        let (head, offset) = (attachment.head.clone().expect("open"), running.offset);
        let (storage, data) = (self.storage.clone(), Bytes::from(running.buffer.clone()));
        self.tasks.spawn(async move {
            let result = storage.write(&head, offset, data).await;
            Ended::Fast { attachment: number, request: key, result: io_result(result.map(|()| Bytes::new())) }
        });
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

    /// Opens the head; whoever writes also locks it before anything is read or written.
    fn open_head(&mut self, sim: &mut Sim, number: u64, geometry: Geometry) {
        let attachment = self.attachments.get_mut(&number).expect("the caller looked it up");
        let (storage, path) = (self.storage.clone(), head_path(geometry.volume));
        let access = if attachment.is_writer() { Access::ReadWrite } else { Access::Read };
        sim.model.volumes[attachment.what.volume].id = Some(geometry.volume);
        attachment.geometry = Some(geometry);
        self.tasks.spawn(async move {
            Ended::Opened { attachment: number, head: storage.open(&path, access).await }
        });
    }

    fn lock_again(&mut self, number: u64) {
        let Some(head) = self.attachments.get(&number).and_then(|a| a.head.clone()) else { return };
        self.lock(number, head);
    }

    fn lock(&mut self, number: u64, head: SimFile) {
        let storage = self.storage.clone();
        self.tasks.spawn(async move {
            let locked = storage.try_lock(&head).await.unwrap_or(false);
            Ended::Locked { attachment: number, head, locked }
        });
    }

    fn on_ended(&mut self, sim: &mut Sim, ended: Ended) {
        match ended {
            Ended::Opened { attachment: number, head } => {
                let Some(attachment) = self.attachments.get_mut(&number) else { return };
                match head {
                    Ok(head) if attachment.is_writer() => self.lock(number, head),
                    Ok(head) => self.open(sim, number, head),
                    Err(error) => {
                        sim.note(|| format!("attachment {number} cannot open its head: {error}"));
                        attachment.stage = Stage::Failed;
                        let held = std::mem::take(&mut attachment.held);
                        held.into_iter().for_each(|(io, op)| self.start_io(sim, number, io, op));
                    }
                }
            }
            Ended::Locked { attachment: number, head, locked: true } => self.open(sim, number, head),
            Ended::Locked { attachment: number, head, .. } => {
                if let Some(attachment) = self.attachments.get_mut(&number) {
                    attachment.head = Some(head);
                    sim.tell(20_000, self.id, Event::Timer(LOCK_AGAIN + number));
                }
            }
            Ended::Io { attachment, io, result } => self.on_io(sim, attachment, io, result),
            Ended::Fast { attachment, request, result } => self.on_fast(sim, attachment, request, result),
        }
    }

    fn open(&mut self, sim: &mut Sim, number: u64, head: SimFile) {
        let Some(attachment) = self.attachments.get_mut(&number) else { return };
        attachment.head = Some(head);
        if attachment.stage == Stage::Attaching {
            attachment.stage = Stage::Open;
        }
        let held = std::mem::take(&mut attachment.held);
        held.into_iter().for_each(|(io, op)| self.start_io(sim, number, io, op));
    }

    fn start_io(&mut self, sim: &mut Sim, number: u64, io: IoId, op: IoOp) {
        let attachment = self.attachments.get_mut(&number).expect("the caller looked it up");
        if attachment.stage == Stage::Attaching {
            attachment.held.push((io, op));
            return;
        }
        attachment.ios.insert(io, op);
        let (storage, head) = (self.storage.clone(), attachment.head.clone());
        let Some(head) = head else {
            let result = Err(IoFailure::Media("the head could not be opened".to_owned()));
            return self.step_io(sim, number, io, result);
        };
        if let IoOp::HeadWrite { request, .. }
        | IoOp::HeadPunch { request, .. }
        | IoOp::HeadZero { request, .. } = op
        {
            attachment.write_begins(sim, request);
        }
        let data = match op {
            IoOp::HeadWrite { request, .. } => Bytes::from(attachment.requests[&request].buffer.clone()),
            _ => Bytes::new(),
        };
        self.tasks.spawn(async move {
            let result = io_result(perform(&storage, &head, op, data).await);
            Ended::Io { attachment: number, io, result }
        });
    }

    fn on_io(&mut self, sim: &mut Sim, number: u64, io: IoId, result: IoResult) {
        let Some(attachment) = self.attachments.get_mut(&number) else { return };
        let Some(op) = attachment.ios.remove(&io) else { return };
        let result = match op {
            IoOp::HeadRead { request, len, buffer_at, .. }
            | IoOp::StoreRead { request, len, buffer_at, .. }
            | IoOp::ReadZeros { request, len, buffer_at } => result.and_then(|bytes| {
                if bytes.len() != index(len) {
                    return Err(IoFailure::Media("a file is shorter than it should be".to_owned()));
                }
                if let Some(running) = attachment.requests.get_mut(&request) {
                    running.buffer[index(buffer_at)..index(buffer_at + len)].copy_from_slice(&bytes);
                }
                Ok(())
            }),
            IoOp::HeadWrite { request, .. }
            | IoOp::HeadPunch { request, .. }
            | IoOp::HeadZero { request, .. } => {
                attachment.write_ends(sim, request, result.is_ok());
                result.map(drop)
            }
            IoOp::HeadSync | IoOp::Writeback | IoOp::StopFast => result.map(drop),
        };
        self.step_io(sim, number, io, result);
    }

    fn step_io(&mut self, sim: &mut Sim, number: u64, io: IoId, result: Result<(), IoFailure>) {
        self.step(sim, number, Input::IoDone { io, result });
    }

    fn on_fast(&mut self, sim: &mut Sim, number: u64, key: RequestKey, result: IoResult) {
        let Some(attachment) = self.attachments.get_mut(&number) else { return };
        attachment.fast_running.remove(&key);
        attachment.write_ends(sim, key, result.is_ok());
        let bytes = attachment.requests[&key].len;
        self.complete(sim, number, key, result.map(drop).map_err(RequestError::from));
        self.step(sim, number, Input::Written { bytes });
        self.check_stopped(sim, number);
    }

    /// A guest gets its answer: the model judges it.
    fn complete(&mut self, sim: &mut Sim, number: u64, key: RequestKey, result: Result<(), RequestError>) {
        let attachment = self.attachments.get_mut(&number).expect("the caller looked it up");
        let running = attachment.requests.remove(&key).expect("a request completes once");
        sim.mix(sim.now ^ number.rotate_left(40) ^ key.0.rotate_left(20));
        sim.tally.did("requests", 1);
        sim.longest_wait = sim.longest_wait.max(sim.now - running.since);
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

impl Attachment {
    fn write_begins(&mut self, sim: &mut Sim, key: RequestKey) {
        let running = self.requests.get_mut(&key).expect("writes belong to requests");
        running.writing = true;
        let now = sim.instant();
        let volume = &mut sim.model.volumes[self.what.volume];
        volume.write_begins(now, running.offset, running.len, running.stamp);
    }

    fn write_ends(&mut self, sim: &mut Sim, key: RequestKey, done: bool) {
        let running = self.requests.get_mut(&key).expect("writes belong to requests");
        running.writing = false;
        let now = sim.instant();
        let volume = &mut sim.model.volumes[self.what.volume];
        volume.write_ends(now, running.offset, running.len, running.stamp, done);
    }

    fn on_success(&mut self, sim: &mut Sim, running: &Running) {
        let now = sim.instant();
        let volume = &mut sim.model.volumes[self.what.volume];
        let verdict = match (running.op, self.what.snapshot) {
            (Op::Read, None) => volume.read(running.asked, now, running.offset, &running.buffer),
            (Op::Read, Some(token)) => volume.read_snapshot(token, running.offset, &running.buffer),
            (Op::Flush, None) => {
                volume.flushed(running.asked);
                Ok(())
            }
            (Op::Write { fua: true } | Op::Trim { fua: true } | Op::WriteZeroes { fua: true, .. }, _) => {
                volume.written_through(running.offset, running.len, running.stamp);
                Ok(())
            }
            _ => Ok(()),
        };
        sim.judge(verdict);
    }

    /// No request fails but for reasons that the world gave.
    fn on_failure(&mut self, sim: &mut Sim, running: &Running, error: &RequestError) {
        sim.note(|| format!("{:?} of {} failed: {error}", running.op, self.what.target));
        let excused = match error {
            RequestError::NoSpace => {
                sim.tally.reached("a write was refused for want of space");
                sim.was_full
            }
            RequestError::Media(_) => sim.disks[crate::sim::POOL].faults_struck() > 0,
            RequestError::Refused(refusal) => {
                refusal.kind == csnap_proto::message::operate::RefusalKind::Media
                    && sim.disks[crate::sim::POOL].faults_struck() > 0
            }
            RequestError::Lost(_) => self.may_be_lost(sim),
            RequestError::Released => true,
            RequestError::ReadOnly | RequestError::Invalid(_) => false,
        };
        if !excused {
            sim.violation(format!("{:?} of {} failed: {error}", running.op, self.what.target));
        }
    }

    /// A snapshot that was deleted by force, or a session that was fenced.
    fn may_be_lost(&self, sim: &Sim) -> bool {
        let volume = &sim.model.volumes[self.what.volume];
        self.what.snapshot.is_some_and(|token| volume.snapshots[&token].forced)
    }

    fn note_end(&mut self, sim: &mut Sim, error: &RequestError) {
        match error {
            RequestError::Media(_) => sim.tally.reached("a head's sync failed and poisoned its attachment"),
            RequestError::Lost(_) if self.may_be_lost(sim) => {
                sim.tally.reached("a reader's snapshot was deleted by force");
            }
            RequestError::Refused(refusal)
                if refusal.kind == csnap_proto::message::operate::RefusalKind::Busy =>
            {
                sim.tally.reached("a volume was refused because a lost session holds it");
            }
            _ => {}
        }
    }

    fn on_conn_lost(&mut self) {
        self.lost_grant |= self.unanswered.values().any(|name| *name == "QueryWrite");
        self.lost_read |= self.unanswered.values().any(|name| name.ends_with("SnapshotRead"));
        self.unanswered.clear();
    }

    /// The next connection is to a newer server.
    fn note_replaced(&mut self, sim: &mut Sim) {
        if std::mem::take(&mut self.lost_grant) {
            sim.tally.reached("a grant was in flight when its server was replaced");
        }
        if std::mem::take(&mut self.lost_read) {
            sim.tally.reached("a snapshot read was under way when its server was replaced");
        }
    }

    fn note_request(&mut self, frame: &Frame<ToServer>) {
        if frame.id.0 != 0 {
            self.unanswered.insert(frame.id, frame.message.name());
        }
    }

    fn note_answer(&mut self, sim: &mut Sim, frame: &Frame<FromServer>) {
        self.unanswered.remove(&frame.id);
        match &frame.message {
            FromServer::Retry { .. } => sim.tally.reached("a finish met a broken mark"),
            FromServer::IdentifyOk(ok) if ok.advice_follows => {
                sim.tally.reached("a writer identified itself during a drain");
            }
            FromServer::SnapshotAdvice { advice } => {
                if self.advised.is_some_and(|(token, term)| token == *advice && term != frame.term) {
                    sim.tally.reached("a create was drained anew by another server");
                }
                self.advised = Some((*advice, frame.term));
            }
            _ => {}
        }
    }
}

async fn perform(storage: &SimStorage, head: &SimFile, op: IoOp, data: Bytes) -> Result<Bytes, StorageError> {
    match op {
        IoOp::HeadRead { offset, len, .. } => storage.read(head, offset, index(len)).await,
        IoOp::ReadZeros { len, .. } => Ok(Bytes::from(vec![0; index(len)])),
        IoOp::StoreRead { location, skip, len, .. } => {
            let arena = storage.open(&arena_path(location.term, location.arena), Access::Read).await?;
            storage.read(&arena, location.offset() + skip, index(len)).await
        }
        IoOp::HeadWrite { offset, .. } => storage.write(head, offset, data).await.map(|()| Bytes::new()),
        IoOp::HeadPunch { offset, len, .. } | IoOp::HeadZero { offset, len, may_punch: true, .. } => {
            storage.punch(head, offset, len).await.map(|()| Bytes::new())
        }
        IoOp::HeadZero { offset, len, .. } => {
            storage.write(head, offset, Bytes::from(vec![0; index(len)])).await.map(|()| Bytes::new())
        }
        IoOp::HeadSync => storage.sync(head).await.map(|()| Bytes::new()),
        // Its success promises nothing.
        IoOp::Writeback | IoOp::StopFast => storage.stat_file(head).await.map(|_| Bytes::new()),
    }
}

fn io_result(result: Result<Bytes, StorageError>) -> IoResult {
    result.map_err(|error| match error {
        StorageError::NoSpace { .. } => IoFailure::NoSpace,
        error => IoFailure::Media(error.to_string()),
    })
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("requests are small")
}

const _: () = assert!(BLOCK_BYTES == 4096);
