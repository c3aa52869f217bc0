//! A server process: it connects to its agent, follows the journal, takes over when it is anointed, and serves. The same
//! procedures and the same core as in the daemon.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use csnap_proto::message::local::{FromAgent, ToAgent};
use csnap_proto::message::volume::ToServer;
use csnap_proto::{Frame, SessionId, Term, Time, WallMillis};
use csnap_server::core::{BatchId, Config, ConnId, Exit, Input, Output, ServerCore};
use csnap_server::replay::StateReplay;
use csnap_server::state::State;
use csnap_server::term::state::seal_of;
use csnap_server::term::{
    Fatal, Followed, Follower, Journal, Pool, PoolError, Position, Prepared, TakenOver, TermError, names,
    open_pool, take_over, verify,
};
use csnap_server::work::{Done, Workbench};
use csnap_storage::sim::{SimFile, SimNode, SimStorage, executor};

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
            clock: Rc::new(Cell::new(sim.now)),
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
        self.clock.set(sim.now);
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
            Event::Timer(_) | Event::Ended(_) | Event::Ask(_) => {}
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

    fn follow(&mut self) {
        let Phase::Following { resting, .. } = &mut self.phase else { return };
        let Some(mut follower) = resting.take() else { return };
        self.tasks.spawn(async move {
            let followed = follower.advance().await;
            Ended::Followed(follower, followed)
        });
    }

    fn on_followed(&mut self, sim: &mut Sim, follower: Box<Standby>, result: Result<Followed, TermError>) {
        let ready = match result {
            Ok(_) => true,
            Err(TermError::Corrupt(corrupt)) => return self.fail(sim, &corrupt.to_string(), true),
            Err(_) => false,
        };
        if self.told_ready != ready {
            self.told_ready = ready;
            self.tell(sim, ToAgent::ServerStandby { ready });
        }
        let every = sim.plan.follow_every;
        let Phase::Following { resting, loads, .. } = &mut self.phase else { return };
        if *loads > 0 && follower.loads() > *loads {
            sim.tally.reached("a standby followed past a seal and loaded anew");
        }
        *loads = follower.loads();
        *resting = Some(follower);
        sim.tell(every, self.id, Event::Timer(FOLLOW));
        self.obey(sim);
    }

    fn on_taken_over(&mut self, sim: &mut Sim, taken: Result<Ready, TermError>) {
        let Phase::TakingOver { term } = self.phase else { return };
        sim.taking_over.remove(&self.id);
        match taken {
            Ok(taken) => self.serve(sim, term, taken),
            Err(TermError::Deposed(_)) => {
                sim.tally.reached("a server began to take over and found itself deposed");
                self.end(sim, "deposed before it served");
            }
            Err(TermError::Storage(error)) => self.fail(sim, &error.to_string(), false),
            Err(error) => self.fail(sim, &error.to_string(), true),
        }
    }

    fn serve(&mut self, sim: &mut Sim, term: Term, ready: Ready) {
        let Ready { taken, bench, life } = ready;
        self.check_takeover(sim, term, taken.base);
        let state = taken.replay.into_state();
        if let Err(problems) = state.check() {
            sim.violation(format!("the state that term {term} took over: {}", problems.join("; ")));
        }
        if state.next_reap(1).is_some() {
            sim.tally.reached("reaping was cut short by a takeover");
        }
        let config = Config {
            client_lease: sim.plan.client_lease,
            drain_patience: sim.plan.drain_patience,
            // Small, so that takeovers come in between.
            reap_slice_versions: 4,
            broken: sim.plan.canaries.core,
        };
        let wall = WallMillis(sim.now / 1000);
        let core = ServerCore::new(term, config, state, sim.clock(self.host), wall);
        self.phase = Phase::Serving(Box::new(Serving {
            term,
            core,
            bench,
            next_look: sim.now,
            _life: life,
            inbox: VecDeque::new(),
            turn_is_due: false,
            checkpointing: false,
            appended: BTreeMap::new(),
            looks: BTreeMap::new(),
        }));
        sim.note(|| format!("server {} serves as term {term}", self.id.0));
        sim.tally.did("takeovers", 1);
        self.tell(sim, ToAgent::ServerServing { term });
        self.keep_segments();
        self.input(sim, Input::Tick);
        sim.tell(LOOK_EVERY, self.id, Event::Timer(LOOK_ROUND));
        for (conn, events) in std::mem::take(&mut self.backlog) {
            self.input(sim, Input::Accepted { conn: ConnId(conn.0) });
            events.into_iter().for_each(|event| self.on_client(sim, conn, event));
        }
    }

    /// What a bystander who sees the whole disk says of a takeover.
    fn check_takeover(&self, sim: &mut Sim, term: Term, base: Term) {
        let disk = sim.disks[POOL].fork();
        let pool = Pool {
            storage: disk.storage(SimNode(0)),
            toml: sim.plan.pool.clone(),
            canaries: Default::default(),
        };
        let seal = match executor::run(seal_of(&pool, term)) {
            Ok(Some(seal)) => seal,
            // Its first segment may have been made superfluous already, by a successor.
            _ => return,
        };
        let kept = seal.base.filter(|named| named.term == base);
        let kept = kept.map_or(0, |named| named.position.0 + u64::from(seal.carried.is_some()));
        let verdict = sim.model.terms.begins(term, base, kept);
        sim.judge(verdict);
        let chain = executor::run(verify::chain(&pool)).unwrap_or_default();
        let place = |wanted: Term| chain.iter().position(|known| *known == wanted);
        if let (Some(from), Some(to)) = (place(base), place(term))
            && to > from + 1
        {
            sim.tally.reached("a takeover walked over a term that never served");
        }
    }

    fn keep_segments(&mut self) {
        let Phase::Serving(serving) = &self.phase else { return };
        let journal = serving.bench.journal().clone();
        self.tasks.spawn(async move { Ended::Kept(keep(&journal).await) });
    }

    fn turn(&mut self, sim: &mut Sim) {
        let now = sim.clock(self.host);
        let wall = WallMillis(sim.now / 1000);
        let Phase::Serving(serving) = &mut self.phase else { return };
        serving.turn_is_due = false;
        let mut out = Vec::new();
        while let Some(input) = serving.inbox.pop_front() {
            if let Input::Gate { batch, open } = input {
                let verdict = serving.on_gate(batch, open);
                if !open {
                    sim.tally.reached("a gate was found closed by its own server");
                    sim.tally.reached("a deposed server attempted an answer");
                }
                if let Some(Some(relied)) = sim.judge(verdict) {
                    let verdict = sim.model.terms.acts(serving.term, relied);
                    sim.judge(verdict);
                }
            }
            serving.core.step(now, wall, input, &mut out);
        }
        if !serving.checkpointing && serving.bench.wants_checkpoint() {
            serving.checkpointing = true;
            serving.core.step(now, wall, Input::CheckpointDue, &mut out);
        }
        let terms: Vec<Term> = serving.core.state().older_terms().collect();
        if !terms.is_empty() && sim.now >= serving.next_look {
            serving.next_look = sim.now + LOOK_FOR_DEAD;
            let bench = serving.bench.clone();
            self.tasks
                .spawn(async move { Ended::FoundDead(bench.find_dead(terms).await.unwrap_or_default()) });
        }
        serving.core.end_turn(&mut out);
        for output in out {
            self.carry_out(sim, output);
        }
    }

    fn carry_out(&mut self, sim: &mut Sim, output: Output) {
        let Phase::Serving(serving) = &mut self.phase else { return };
        match output {
            Output::Send { conn, frame } => sim.send(self.id, NetConn(conn.0), &frame),
            Output::Close { conn } => {
                self.sessions.remove(&NetConn(conn.0));
                sim.close(self.id, NetConn(conn.0));
            }
            Output::Exit { reason } => {
                if reason == Exit::Drained {
                    sim.tally.reached("a server was handed over by plan");
                    self.tell(sim, ToAgent::ServerDrained);
                }
                self.end(sim, if reason == Exit::Drained { "drained" } else { "deposed" });
            }
            output => {
                let open = gate_is_open(sim, serving.term);
                match &output {
                    Output::Append { .. } if !open => {
                        sim.tally.reached("a deposed server attempted an append");
                    }
                    Output::ReadGate { batch } => {
                        let relied = serving.appended.range(..=*batch).next_back().map_or(0, |(_, p)| *p);
                        serving.looks.insert(*batch, (relied, open));
                    }
                    Output::CopyOut { job, .. } => {
                        let (term, volume, moves) = (serving.term, job.volume, &job.moves);
                        sim.note(|| format!("term {term} copies of {volume}: {moves:?}"));
                        for (_, extent) in &job.moves {
                            sim.note_store_use(*extent);
                        }
                    }
                    Output::Punch { extents } => {
                        let term = serving.term;
                        sim.note(|| format!("term {term} punches {extents:?}"));
                    }
                    _ => {}
                }
                let bench = serving.bench.clone();
                self.tasks.spawn(async move {
                    let batch = matches!(output, Output::Append { .. });
                    let done = bench.carry_out(output).await;
                    let position = if batch { bench.journal().position() } else { Position(0) };
                    Ended::Carried(done, position)
                });
            }
        }
    }

    fn on_carried(&mut self, sim: &mut Sim, done: Option<Done>, position: Position) {
        let Phase::Serving(serving) = &mut self.phase else { return };
        let Some(Done { input, checkpoint }) = done else { return };
        if let Input::Appended { batch } = input {
            serving.appended.insert(batch, position.0);
        }
        if let Some((position, state)) = checkpoint {
            let bench = serving.bench.clone();
            self.tasks.spawn(async move { Ended::Checkpointed(bench.checkpoint(position, &state).await) });
        }
        self.input(sim, input);
    }

    fn look_round(&mut self, sim: &mut Sim) {
        sim.tell(LOOK_EVERY, self.id, Event::Timer(LOOK_ROUND));
        let Phase::Serving(serving) = &mut self.phase else { return };
        let state = serving.core.state();
        let absent = |pid: u32| !sim.is_alive(ProcId(pid)) || sim.is_paused(ProcId(pid));
        let mut sessions = state.sessions();
        if sessions.any(|s| state.unconfirmed_frees(s.id).next().is_some() && absent(s.pid)) {
            sim.tally.reached("freed space was held for an absent session");
        }
        // Old enough for nobody to ask about.
        while serving.appended.len() > 64 {
            serving.appended.pop_first();
        }
        while serving.looks.len() > 64 {
            serving.looks.pop_first();
        }
    }
}

impl Serving {
    /// The gate was read: what the batches behind it rely on, if they are acted upon now.
    fn on_gate(&mut self, batch: BatchId, open: bool) -> Result<Option<u64>, String> {
        match self.looks.remove(&batch) {
            Some((_, false)) if open => {
                Err(format!("term {} acts, though its gate was closed before it looked", self.term))
            }
            Some((relied, _)) => Ok(open.then_some(relied)),
            None => Ok(None),
        }
    }
}

async fn begin(
    pool: &Pool<SimStorage>,
    term: Term,
    follower: Standby,
    clock: &Cell<u64>,
) -> Result<Ready, TermError> {
    let taken = Box::pin(take_over(pool, term, follower, || Time(clock.get()))).await?;
    let bench = Workbench::new(pool, taken.journal.clone());
    let life = bench.show_life().await?;
    Ok(Ready { taken, bench, life })
}

async fn keep(journal: &Journal<SimStorage>) -> Result<Prepared, Fatal> {
    if journal.prepare_segment().await? == Prepared::NoSpace
        || journal.set_aside().await? == Prepared::NoSpace
    {
        return Ok(Prepared::NoSpace);
    }
    journal.segment_taken().await;
    Ok(Prepared::Ready)
}

/// Whether the gate of a term is open, as somebody sees who sees the disk itself.
fn gate_is_open(sim: &Sim, term: Term) -> bool {
    let gate = sim.disks[POOL].peek(&names::gate(term));
    gate.is_some_and(|block| !block.is_empty() && block.iter().all(|byte| *byte == 0))
}
