//! A server process: it connects to its agent, follows the journal, takes over when it is anointed, and serves. The same
//! procedures and the same core as in the daemon.
//!
//! - `standby`: until it serves; `serving`: from then on.

mod serving;
mod standby;

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use csnap_proto::message::local::{FromAgent, ToAgent};
use csnap_proto::message::volume::ToServer;
use csnap_proto::{Frame, SessionId, Term, Time};
use csnap_server::core::{BatchId, ConnId, Input, ServerCore};
use csnap_server::replay::StateReplay;
use csnap_server::state::State;
use csnap_server::term::{
    Fatal, Followed, Follower, Pool, PoolError, Position, Prepared, TakenOver, TermError, open_pool,
};
use csnap_server::work::{Done, Workbench};
use csnap_storage::sim::{SimFile, SimStorage};

use self::serving::gate_is_open;
use self::standby::begin;
use crate::net::NetConn;
use crate::sim::{Event, HostId, POOL, ProcId, Sim, agent_address, frames, plain};
use crate::tasks::Tasks;

/// The connect to the agent.
const AGENT: u64 = 0;

/// Timers of its own.
const FOLLOW: u64 = 0;
const TURN: u64 = 1;
const KEEP: u64 = 2;
const LOOK_ROUND: u64 = 3;

/// Events gather for a turn for so long, microseconds.
const TURN_MAX: u64 = 40;

/// A full pool is asked again after this, microseconds.
const RETRY: u64 = 500_000;

/// How often older servers are looked for, microseconds.
const LOOK_FOR_DEAD: u64 = 1_000_000;

/// How often the state is looked at for rare states, microseconds.
const LOOK_EVERY: u64 = 500_000;

type Standby = Follower<SimStorage, StateReplay>;
type Taken = TakenOver<SimStorage, StateReplay>;

/// A server that may serve.
struct Ready {
    taken: Taken,
    bench: Workbench<SimStorage>,
    /// The lock that says that we live.
    life: Option<SimFile>,
}

/// What its procedures end in.
enum Ended {
    Opened(Result<Pool<SimStorage>, PoolError>),
    Followed(Box<Standby>, Result<Followed, TermError>),
    TookOver(Box<Result<Ready, TermError>>),
    FoundDead(Vec<Term>),
    Carried(Result<Option<Done>, Fatal>, Position),
    Checkpointed(Result<bool, Fatal>),
    Kept(Result<Prepared, Fatal>),
}

enum Phase {
    Opening,
    Following { pool: Pool<SimStorage>, resting: Option<Box<Standby>>, loads: u64 },
    TakingOver { term: Term },
    Serving(Box<Serving>),
    Over,
}

struct Serving {
    term: Term,
    core: ServerCore,
    bench: Workbench<SimStorage>,
    inbox: VecDeque<Input>,
    turn_is_due: bool,
    checkpointing: bool,
    next_look: u64,
    _life: Option<SimFile>,
    /// Position of the journal behind each batch that it holds.
    appended: BTreeMap<BatchId, u64>,
    /// What each look at the gate had behind it, and whether the gate was open when the look began.
    looks: BTreeMap<BatchId, (u64, bool)>,
}

/// See the module.
pub struct ServerProc {
    id: ProcId,
    host: HostId,
    agent_proc: ProcId,
    agent: Option<NetConn>,
    storage: SimStorage,
    tasks: Tasks<Ended>,
    phase: Phase,
    order: Option<FromAgent>,
    told_ready: bool,
    /// Connections that wait to be accepted, with what came on them.
    backlog: Vec<(NetConn, Vec<Event>)>,
    /// Who said to be whom, for the tally.
    sessions: BTreeMap<NetConn, SessionId>,
    /// What the clock shows, for procedures.
    clock: Rc<Cell<u64>>,
}

impl ServerProc {
    pub(super) fn start(sim: &mut Sim, id: ProcId, host: HostId, agent_proc: ProcId) -> Self {
        Self {
            id,
            host,
            agent_proc,
            agent: None,
            storage: sim.pool(id),
            tasks: Tasks::new(id, sim.ready.clone()),
            phase: Phase::Opening,
            order: None,
            told_ready: false,
            backlog: Vec::new(),
            sessions: BTreeMap::new(),
            clock: Rc::new(Cell::new(sim.now())),
        }
    }

    fn address(&self) -> String {
        format!("10.0.0.{}:{}", self.host.0 + 1, self.id.0)
    }

    /// The term that it serves under or wants to.
    #[must_use]
    pub fn term(&self) -> Option<Term> {
        match &self.phase {
            Phase::TakingOver { term } => Some(*term),
            Phase::Serving(serving) => Some(serving.term),
            _ => None,
        }
    }

    /// It takes over right now.
    #[must_use]
    pub fn is_taking_over(&self) -> bool {
        matches!(self.phase, Phase::TakingOver { .. })
    }

    /// The state that it serves from.
    #[must_use]
    pub fn state(&self) -> Option<&State> {
        if let Phase::Serving(serving) = &self.phase { Some(serving.core.state()) } else { None }
    }

    /// Nothing of it is under way: no batch, no checkpoint, no copy.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.tasks.is_empty()
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        match &self.phase {
            Phase::Serving(serving) => Some(serving.core.next_deadline()),
            _ => None,
        }
    }

    pub(super) fn on_event(&mut self, sim: &mut Sim, event: Event) {
        self.clock.set(sim.now());
        match event {
            Event::Start => {
                sim.net.listen(&self.address(), self.id, self.host);
                sim.connect(self.id, self.host, &agent_address(self.host), AGENT);
            }
            Event::Connected { conn: Some(conn), .. }
                if sim.net.peer(conn, self.id) == Some(self.agent_proc) =>
            {
                self.agent = Some(conn);
                self.tell(sim, ToAgent::ServerHello { tcp: self.address() });
                let storage = self.storage.clone();
                self.tasks.spawn(async move { Ended::Opened(open_pool(&storage).await) });
            }
            Event::Connected { .. } => sim.exit(self.id, "cannot reach the agent"),
            Event::Closed { conn } if Some(conn) == self.agent => sim.exit(self.id, "the agent is gone"),
            Event::Received { conn, payload } if Some(conn) == self.agent => {
                for frame in frames::<FromAgent>(&payload.bytes) {
                    self.on_order(sim, frame.message);
                }
            }
            Event::Accepted(conn) => self.on_accepted(sim, conn),
            Event::Received { conn, .. } | Event::Closed { conn } => self.on_client(sim, conn, event),
            Event::Task(task) => {
                if let Some(ended) = self.tasks.poll(task) {
                    self.on_ended(sim, ended);
                }
            }
            Event::Timer(FOLLOW) => self.follow(),
            Event::Timer(KEEP) => self.keep_segments(),
            Event::Timer(TURN) => self.turn(sim),
            Event::Timer(LOOK_ROUND) => self.look_round(sim),
            Event::Tick => self.input(sim, Input::Tick),
            Event::Timer(_) | Event::Ended(_) | Event::Ask(_) | Event::Said(_) => {}
        }
    }

    fn tell(&self, sim: &mut Sim, message: ToAgent) {
        if let Some(agent) = self.agent {
            sim.send(self.id, agent, &plain(message));
        }
    }

    fn on_order(&mut self, sim: &mut Sim, message: FromAgent) {
        match message {
            FromAgent::Ping => self.tell(sim, ToAgent::Pong),
            FromAgent::Drain if matches!(self.phase, Phase::Serving(_)) => self.input(sim, Input::Drain),
            FromAgent::Serve { .. } | FromAgent::Drain => {
                self.order = Some(message);
                self.obey(sim);
            }
            _ => {}
        }
    }

    /// A standby looks at its orders when it does not read.
    fn obey(&mut self, sim: &mut Sim) {
        let Phase::Following { pool, resting, .. } = &mut self.phase else { return };
        let Some(follower) = resting.take_if(|_| self.order.is_some()) else { return };
        match self.order.take() {
            Some(FromAgent::Serve { term }) => {
                let (pool, clock) = (pool.clone(), self.clock.clone());
                self.phase = Phase::TakingOver { term };
                sim.note(|| format!("server {} takes over as term {term}", self.id.0));
                sim.taking_over.insert(self.id);
                if sim.taking_over.len() > 1 {
                    sim.tally.reached("two servers took over at once");
                }
                self.tasks.spawn(async move {
                    Ended::TookOver(Box::new(begin(&pool, term, *follower, &clock).await))
                });
            }
            _ => {
                self.tell(sim, ToAgent::ServerDrained);
                sim.exit(self.id, "told to go");
            }
        }
    }

    fn on_accepted(&mut self, sim: &mut Sim, conn: NetConn) {
        match &self.phase {
            // Not serving: the client asks its agent again.
            Phase::Following { .. } => sim.close(self.id, conn),
            Phase::Serving(_) => self.input(sim, Input::Accepted { conn: ConnId(conn.0) }),
            _ => self.backlog.push((conn, Vec::new())),
        }
    }

    fn on_client(&mut self, sim: &mut Sim, conn: NetConn, event: Event) {
        if let Some((_, events)) = self.backlog.iter_mut().find(|(waiting, _)| *waiting == conn) {
            events.push(event);
            return;
        }
        let id = ConnId(conn.0);
        match event {
            Event::Received { payload, .. } => {
                for frame in frames::<ToServer>(&payload.bytes) {
                    self.note_request(sim, conn, &frame);
                    self.input(sim, Input::Frame { conn: id, frame });
                }
            }
            _ => {
                self.sessions.remove(&conn);
                self.input(sim, Input::Closed { conn: id });
            }
        }
    }

    fn note_request(&mut self, sim: &mut Sim, conn: NetConn, frame: &Frame<ToServer>) {
        match &frame.message {
            ToServer::Identify(identify) => {
                if self.sessions.values().any(|session| *session == identify.session) {
                    sim.tally.reached("a session came back while its older connection was open");
                }
                self.sessions.insert(conn, identify.session);
            }
            ToServer::Operate { sequence, .. } => {
                let result =
                    self.sessions.get(&conn).and_then(|session| self.state()?.result(*session, *sequence));
                if result.is_some() {
                    sim.tally.reached("a resend was answered from a stored result");
                }
            }
            _ => {}
        }
    }

    /// Takes an input to the next turn.
    fn input(&mut self, sim: &mut Sim, input: Input) {
        let Phase::Serving(serving) = &mut self.phase else { return };
        serving.inbox.push_back(input);
        if !std::mem::replace(&mut serving.turn_is_due, true) {
            let wait = 5 + sim.rng.below(TURN_MAX);
            sim.tell(wait, self.id, Event::Timer(TURN));
        }
    }

    fn on_ended(&mut self, sim: &mut Sim, ended: Ended) {
        match ended {
            Ended::Opened(Ok(mut pool)) => {
                pool.canaries = sim.plan.canaries.term.clone();
                let follower = Box::new(Follower::new(&pool, StateReplay::new(pool.id())));
                self.phase = Phase::Following { pool, resting: Some(follower), loads: 0 };
                self.follow();
            }
            Ended::Opened(Err(error)) => self.fail(sim, &error.to_string(), false),
            Ended::Followed(follower, result) => self.on_followed(sim, follower, result),
            Ended::TookOver(taken) => self.on_taken_over(sim, *taken),
            Ended::Carried(Ok(done), position) => self.on_carried(sim, done, position),
            Ended::FoundDead(terms) if terms.is_empty() => {}
            Ended::FoundDead(terms) => self.input(sim, Input::TermsDead { terms }),
            Ended::Kept(Ok(Prepared::NoSpace)) => sim.tell(RETRY, self.id, Event::Timer(KEEP)),
            Ended::Kept(Ok(Prepared::Ready)) => self.keep_segments(),
            Ended::Checkpointed(Ok(written)) => {
                if written {
                    sim.tally.did("checkpoints", 1);
                    sim.tally.reached("a checkpoint was written under load");
                }
                if let Phase::Serving(serving) = &mut self.phase {
                    serving.checkpointing = false;
                }
            }
            Ended::Carried(Err(fatal), _) | Ended::Checkpointed(Err(fatal)) | Ended::Kept(Err(fatal)) => {
                match fatal {
                    Fatal::Deposed(_) => {
                        sim.tally.reached("a gate was found closed by its own server");
                        self.end(sim, "deposed");
                    }
                    fatal => self.fail(sim, &fatal.to_string(), matches!(fatal, Fatal::Abandoned)),
                }
            }
        }
    }

    /// Storage failed it: it ends. Without a fault of the medium that must not happen.
    fn fail(&mut self, sim: &mut Sim, why: &str, corrupt: bool) {
        // Its successors tidy the directory of a server that has not noticed yet.
        let deposed = self.term().is_some_and(|term| !gate_is_open(sim, term));
        let excused = deposed || sim.disks[POOL].faults_struck() > 0 || sim.full;
        if corrupt || !excused {
            sim.violation(format!("server {} on a sound medium: {why}", self.id.0));
        }
        sim.tally.reached("a server ended because storage failed it");
        self.end(sim, why);
    }

    fn end(&mut self, sim: &mut Sim, why: &str) {
        self.phase = Phase::Over;
        sim.exit(self.id, why);
    }
}
