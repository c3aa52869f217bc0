//! An agent process: the core, its connection to lockd, its socket, its children, and the small conversations that it has
//! with servers as an operator.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use csnap_agent::core::{
    AgentCore, ConnId, CoreConfig, DECLARE_WITHIN, Dead, Declaration, Failback, Held, Input, LOOK_AGAIN,
    Next, Output, Process as Pid, Sight, Ticket, Timing,
};
use csnap_lockd::client::{ClientConfig, ClientInput, ClientOutput, Identity};
use csnap_proto::message::local::ToAgent;
use csnap_proto::message::lock::{FromLockd, ToLockd};
use csnap_proto::message::operate::OperatorRequest;
use csnap_proto::message::volume::{Attach, FromServer, Identify, ToServer};
use csnap_proto::{Frame, InstanceId, RequestId, Sequence, Term, Time};
use csnap_server::copy::head_path;
use csnap_server::term::names;
use csnap_storage::sim::SimStorage;
use csnap_storage::{Access, Storage, StorageError};

use super::session::lockd_address_of;
use crate::net::NetConn;
use crate::sim::{Event, Happening, HostId, ProcId, Sim, Spawn, agent_address, frames, node_name};
use crate::tasks::Tasks;

/// A probe ends after this, microseconds.
const PROBE_WITHIN: u64 = 250_000;

/// The state file is written so soon, microseconds.
const SAVE_WITHIN: u64 = 3_000;

/// What a connect is for, by its tag.
enum Purpose {
    /// The attempt, and lockds that it came past.
    Lockd(u64, u64),
    Ticket(Ticket),
    Errand(u64),
}

/// What the agent wants of a server as an operator.
#[derive(Debug)]
enum Task {
    Probe(Term),
    Declare(Dead, Option<Declaration>),
}

struct Errand {
    task: Task,
    conn: Option<NetConn>,
    sequence: Sequence,
}

/// What was seen of a file that a dead process may hold.
struct Looked {
    errand: u64,
    sight: Sight,
}

/// See the module.
pub struct AgentProc {
    id: ProcId,
    host: HostId,
    core: AgentCore,
    instance: InstanceId,
    storage: SimStorage,
    tasks: Tasks<Looked>,
    lockd: Option<(u64, NetConn)>,
    conns: BTreeMap<ConnId, NetConn>,
    sockets: BTreeMap<Ticket, NetConn>,
    connects: BTreeMap<u64, Purpose>,
    errands: BTreeMap<u64, Errand>,
    /// Files to be looked at again, by timer, with their errands.
    looks: BTreeMap<u64, (u64, Held)>,
    last: u64,
    resumed: bool,
}

impl AgentProc {
    pub(super) fn start(sim: &mut Sim, id: ProcId, host: HostId) -> Self {
        let plan = &sim.plan;
        let config = CoreConfig {
            node: node_name(host),
            pid: id.0,
            priority: plan.priorities[host.0],
            failback: if plan.failback { Failback::Auto } else { Failback::Manual },
            timing: Timing {
                ping_interval: plan.ping_interval,
                ping_timeout: plan.ping_timeout,
                place_step: plan.place_step,
                failback_after: plan.failback_after,
            },
            pool: "/pool".to_owned(),
        };
        let client = ClientConfig { node: node_name(host), lease_ms: plan.lease_ms, renew_ms: plan.renew_ms };
        let (session, secret) = sim.draw_session();
        let saved = sim.hosts[host.0].saved.clone();
        let resumed = saved.is_some();
        let alive = |process: Pid| sim.hosts[host.0].alive.contains_key(&ProcId(process.pid));
        let fresh = Identity { session, secret };
        let core = AgentCore::new(sim.clock(host), config, client, fresh, saved, alive);
        Self {
            id,
            host,
            core,
            instance: sim.draw_instance(),
            storage: sim.pool(id),
            tasks: Tasks::new(id, sim.ready.clone()),
            lockd: None,
            conns: BTreeMap::new(),
            sockets: BTreeMap::new(),
            connects: BTreeMap::new(),
            errands: BTreeMap::new(),
            looks: BTreeMap::new(),
            last: 0,
            resumed,
        }
    }

    /// What it knows, for the world.
    #[must_use]
    pub fn core(&self) -> &AgentCore {
        &self.core
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        self.core.next_deadline()
    }

    pub(super) fn on_event(&mut self, sim: &mut Sim, event: Event) {
        match event {
            Event::Start => {
                sim.net.listen(&agent_address(self.host), self.id, self.host);
                self.turn(sim, Input::Tick);
            }
            Event::Tick => self.turn(sim, Input::Tick),
            Event::Accepted(conn) => {
                let Some(peer) = sim.net.peer(conn, self.id) else { return };
                self.conns.insert(ConnId(conn.0), conn);
                self.turn(sim, Input::Accepted { conn: ConnId(conn.0), process: pid_of(peer) });
            }
            Event::Connected { tag, conn } => self.on_connected(sim, tag, conn),
            Event::Closed { conn } => self.on_closed(sim, conn),
            Event::Received { conn, payload } => self.on_received(sim, conn, &payload.bytes),
            Event::Ended(proc) => self.turn(sim, Input::Ended(pid_of(proc))),
            Event::Task(task) => {
                if let Some(looked) = self.tasks.poll(task) {
                    self.on_looked(sim, looked);
                }
            }
            Event::Timer(timer) => self.on_timer(sim, timer),
            Event::Ask(_) | Event::Said(_) => {}
        }
    }

    fn on_connected(&mut self, sim: &mut Sim, tag: u64, conn: Option<NetConn>) {
        match (self.connects.remove(&tag), conn) {
            (Some(Purpose::Lockd(attempt, _)), Some(conn)) => {
                if let Some((_, older)) = self.lockd.replace((attempt, conn)) {
                    sim.close(self.id, older);
                }
                self.turn(sim, Input::Lockd(ClientInput::Connected { attempt }));
            }
            (Some(Purpose::Lockd(attempt, passed)), None) if passed + 1 < sim.plan.lockds.len() as u64 => {
                self.connect_lockd(sim, attempt, passed + 1);
            }
            (Some(Purpose::Lockd(attempt, _)), None) => {
                self.turn(sim, Input::Lockd(ClientInput::Disconnected { attempt }));
            }
            (Some(Purpose::Ticket(ticket)), conn) => {
                let made = conn.is_some();
                self.sockets.extend(conn.map(|conn| (ticket, conn)));
                self.turn(sim, Input::ServerConnect { ticket, made });
            }
            (Some(Purpose::Errand(errand)), Some(conn)) => self.introduce(sim, errand, conn),
            (Some(Purpose::Errand(errand)), None) => self.end_errand(sim, errand, false),
            (None, conn) => conn.into_iter().for_each(|conn| sim.close(self.id, conn)),
        }
    }

    fn on_closed(&mut self, sim: &mut Sim, conn: NetConn) {
        if let Some((attempt, _)) = self.lockd.take_if(|(_, mine)| *mine == conn) {
            return self.turn(sim, Input::Lockd(ClientInput::Disconnected { attempt }));
        }
        if let Some(errand) = self.errand_of(conn) {
            return self.end_errand(sim, errand, false);
        }
        // A socket that waits to be handed out shows its end to whoever gets it.
        let id = ConnId(conn.0);
        if self.conns.remove(&id).is_some() {
            self.turn(sim, Input::Gone { conn: id });
        }
    }

    fn on_received(&mut self, sim: &mut Sim, conn: NetConn, bytes: &bytes::Bytes) {
        if let Some((attempt, _)) = self.lockd.filter(|(_, mine)| *mine == conn) {
            for frame in frames::<FromLockd>(bytes) {
                if matches!(frame.message, FromLockd::Opened { .. }) && std::mem::take(&mut self.resumed) {
                    sim.tally.reached("an agent resumed its session by its secret");
                }
                self.turn(sim, Input::Lockd(ClientInput::Received { attempt, frame }));
            }
        } else if let Some(errand) = self.errand_of(conn) {
            for frame in frames::<FromServer>(bytes) {
                self.on_answer(sim, errand, frame);
            }
        } else if self.conns.contains_key(&ConnId(conn.0)) {
            for frame in frames::<ToAgent>(bytes) {
                self.turn(
                    sim,
                    Input::Received { conn: ConnId(conn.0), id: frame.id, message: frame.message },
                );
            }
        }
    }

    /// One step, and those that its outputs bring about at once.
    fn turn(&mut self, sim: &mut Sim, input: Input) {
        let mut inputs = VecDeque::from([input]);
        let mut outputs = Vec::new();
        while let Some(input) = inputs.pop_front() {
            self.core.step(sim.clock(self.host), input, &mut outputs);
            for output in outputs.drain(..) {
                inputs.extend(self.carry_out(sim, output));
            }
        }
    }

    fn carry_out(&mut self, sim: &mut Sim, output: Output) -> Option<Input> {
        match output {
            Output::Lockd(output) => return self.pass_to_lockd(sim, output),
            Output::DrawIdentity => {
                let (session, secret) = sim.draw_session();
                return Some(Input::Identity(Identity { session, secret }));
            }
            Output::Send { conn, id, message } => {
                if let Some(net) = self.conns.get(&conn) {
                    sim.send(self.id, *net, &Frame { id, term: Term(0), message });
                }
            }
            Output::HandOut { ticket, conn, id, message } => {
                let (socket, to) = (self.sockets.remove(&ticket), self.conns.get(&conn));
                if let (Some(socket), Some(to)) = (socket, to) {
                    sim.send_beside(self.id, *to, &Frame { id, term: Term(0), message }, Some(socket));
                }
            }
            Output::Close { conn, .. } => {
                if let Some(net) = self.conns.remove(&conn) {
                    sim.close(self.id, net);
                }
                return Some(Input::Gone { conn });
            }
            Output::SpawnServer => {
                let id = sim.spawn(self.host, Spawn::Server { agent: self.id });
                return Some(Input::ServerSpawned(Ok(pid_of(id))));
            }
            Output::SpawnExporter => {
                let id = sim.spawn(self.host, Spawn::Exporter);
                return Some(Input::ExporterSpawned(Ok(pid_of(id))));
            }
            Output::Kill(pid) | Output::Terminate(pid) => self.end_process(sim, ProcId(pid.pid), true),
            Output::Watch(pid) => self.end_process(sim, ProcId(pid.pid), false),
            Output::ConnectServer { ticket, tcp } => self.connect(sim, &tcp, Purpose::Ticket(ticket)),
            Output::DropSocket { ticket } => {
                if let Some(socket) = self.sockets.remove(&ticket) {
                    sim.close(self.id, socket);
                }
            }
            Output::Probe { tcp, term } => self.send_on_errand(sim, &tcp, Task::Probe(term), PROBE_WITHIN),
            Output::Declare { dead, tcp } => {
                self.send_on_errand(sim, &tcp, Task::Declare(dead, None), micros(DECLARE_WITHIN))
            }
            Output::Save(state) => {
                let (host, proc, at) = (self.host, self.id, sim.now() + sim.rng.below(SAVE_WITHIN));
                sim.queue.push(at, Happening::Saved { host, proc, state: Box::new(state) });
            }
            Output::Stopped => sim.exit(self.id, "stopped"),
            Output::Note(note) => sim.note(|| format!("agent {}: {note}", self.host.0 + 1)),
        }
        None
    }

    /// Every end of a process of this host is told to its agent; of one that has ended already, now.
    fn end_process(&mut self, sim: &mut Sim, proc: ProcId, kill: bool) {
        if !sim.is_alive(proc) {
            sim.tell(100, self.id, Event::Ended(proc));
        } else if kill {
            sim.kill(proc);
        }
    }

    fn pass_to_lockd(&mut self, sim: &mut Sim, output: ClientOutput) -> Option<Input> {
        match output {
            ClientOutput::Connect { attempt } => self.connect_lockd(sim, attempt, 0),
            ClientOutput::Disconnect { attempt } => {
                if let Some((_, conn)) = self.lockd.take_if(|(mine, _)| *mine == attempt) {
                    sim.close(self.id, conn);
                }
                self.connects
                    .retain(|_, purpose| !matches!(purpose, Purpose::Lockd(mine, _) if *mine == attempt));
            }
            ClientOutput::Send { attempt, frame } => {
                let Some((_, conn)) = self.lockd.filter(|(mine, _)| *mine == attempt) else {
                    return Some(Input::Lockd(ClientInput::Disconnected { attempt }));
                };
                // A new session after all.
                self.resumed &= !matches!(frame.message, ToLockd::Open { .. });
                sim.send(self.id, conn, &frame);
            }
            ClientOutput::Moved { to } => {
                sim.violation(format!("there is one group of lockds, and not {to:?}"));
            }
            ClientOutput::Event(event) => unreachable!("the core keeps events to itself: {event:?}"),
        }
        None
    }

    /// Another one first with each attempt.
    fn connect_lockd(&mut self, sim: &mut Sim, attempt: u64, passed: u64) {
        let address = lockd_address_of(sim, attempt + passed);
        self.connect(sim, &address, Purpose::Lockd(attempt, passed));
    }

    fn connect(&mut self, sim: &mut Sim, address: &str, purpose: Purpose) {
        self.last += 1;
        self.connects.insert(self.last, purpose);
        sim.connect(self.id, self.host, address, self.last);
    }

    fn send_on_errand(&mut self, sim: &mut Sim, tcp: &str, task: Task, within: u64) {
        self.last += 1;
        let errand = self.last;
        self.errands.insert(errand, Errand { task, conn: None, sequence: Sequence(1) });
        sim.tell(within, self.id, Event::Timer(errand));
        self.connect(sim, tcp, Purpose::Errand(errand));
    }

    fn errand_of(&self, conn: NetConn) -> Option<u64> {
        self.errands.iter().find(|(_, errand)| errand.conn == Some(conn)).map(|(id, _)| *id)
    }

    fn end_errand(&mut self, sim: &mut Sim, id: u64, done: bool) {
        let Some(errand) = self.errands.remove(&id) else { return };
        errand.conn.into_iter().for_each(|conn| sim.close(self.id, conn));
        let input = match errand.task {
            Task::Probe(term) => {
                if done {
                    sim.tally.reached("a probe cleared a suspected server");
                }
                Input::Probed { term, alive: done }
            }
            Task::Declare(dead, _) => {
                if done {
                    sim.tally.reached(match dead {
                        Dead::Client(_) => "an exporter was declared dead",
                        Dead::Server { .. } => "a dead server was declared",
                    });
                }
                Input::Declared { dead, done }
            }
        };
        self.turn(sim, input);
    }

    fn introduce(&mut self, sim: &mut Sim, id: u64, conn: NetConn) {
        let (session, secret) = sim.draw_session();
        let Some(errand) = self.errands.get_mut(&id) else { return sim.close(self.id, conn) };
        errand.conn = Some(conn);
        let message = ToServer::Identify(Identify {
            session,
            secret,
            instance: self.instance,
            node: node_name(self.host),
            pid: self.id.0,
            attach: Attach::Operator,
            cached_epoch: None,
        });
        sim.send(self.id, conn, &Frame { id: RequestId(1), term: Term(0), message });
    }

    fn on_answer(&mut self, sim: &mut Sim, id: u64, frame: Frame<FromServer>) {
        let Some(errand) = self.errands.get_mut(&id) else { return };
        match (&mut errand.task, frame.message) {
            (Task::Probe(term), FromServer::IdentifyOk(_)) => {
                let alive = frame.term == *term;
                self.end_errand(sim, id, alive);
            }
            (Task::Declare(dead, declaration), FromServer::IdentifyOk(_)) => {
                let (begun, next) = Declaration::begin(*dead);
                *declaration = Some(begun);
                self.go_on(sim, id, next);
            }
            (Task::Declare(_, Some(declaration)), FromServer::Operated(reply)) => {
                let next = declaration.on_answer(Ok(reply));
                self.go_on(sim, id, next);
            }
            (Task::Declare(_, Some(declaration)), FromServer::Refused(refusal)) => {
                let next = declaration.on_answer(Err(refusal));
                self.go_on(sim, id, next);
            }
            _ => self.end_errand(sim, id, false),
        }
    }

    /// What a declaration wants done next.
    fn go_on(&mut self, sim: &mut Sim, id: u64, next: Next) {
        match next {
            Next::Ask(request) => self.operate(sim, id, request),
            Next::Look(file) => self.look(id, file),
            Next::LookAgain(file) => {
                self.last += 1;
                self.looks.insert(self.last, (id, file));
                sim.tell(micros(LOOK_AGAIN), self.id, Event::Timer(self.last));
            }
            Next::Done => self.end_errand(sim, id, true),
            Next::Failed(_) => self.end_errand(sim, id, false),
        }
    }

    fn operate(&mut self, sim: &mut Sim, id: u64, request: OperatorRequest) {
        let Some(errand) = self.errands.get_mut(&id) else { return };
        let Some(conn) = errand.conn else { return };
        let sequence = errand.sequence;
        errand.sequence = sequence.next();
        let message = ToServer::Operate { sequence, lowest_unanswered: sequence, request };
        sim.send(self.id, conn, &Frame { id: RequestId(1 + sequence.0), term: Term(0), message });
    }

    fn look(&mut self, id: u64, file: Held) {
        let storage = self.storage.clone();
        self.tasks.spawn(async move { Looked { errand: id, sight: look(&storage, &file).await } });
    }

    fn on_looked(&mut self, sim: &mut Sim, looked: Looked) {
        let Some(Errand { task: Task::Declare(_, Some(declaration)), .. }) =
            self.errands.get_mut(&looked.errand)
        else {
            return;
        };
        let next = declaration.on_sight(looked.sight);
        self.go_on(sim, looked.errand, next);
    }

    /// Either an errand takes too long, or a file is to be looked at again.
    fn on_timer(&mut self, sim: &mut Sim, timer: u64) {
        if let Some((errand, file)) = self.looks.remove(&timer) {
            if self.errands.contains_key(&errand) {
                self.look(errand, file);
            }
        } else if self.errands.contains_key(&timer) {
            self.end_errand(sim, timer, false);
        }
    }
}

async fn look(storage: &SimStorage, file: &Held) -> Sight {
    let path = match file {
        Held::Gate(term) => names::gate(*term),
        Held::Head(volume) => head_path(*volume),
        Held::Origin { path, .. } => unreachable!("nobody adopts origins in this world: {path}"),
    };
    let locked = async { storage.try_lock(&storage.open(&path, Access::Read).await?).await };
    match locked.await {
        Ok(true) => Sight::Free,
        Ok(false) => Sight::Locked,
        Err(StorageError::NotFound { .. }) => Sight::Missing,
        Err(error) => Sight::Unknown(error.to_string()),
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).expect("short")
}

fn pid_of(proc: ProcId) -> Pid {
    Pid { pid: proc.0, started: u64::from(proc.0) }
}
