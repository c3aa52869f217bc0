//! What every simulated process sees of its world: time, chance, network, disks, the model that judges, and the orders
//! that it may give (start a process, kill one).

use std::collections::{BTreeMap, BTreeSet};

use bytes::{Bytes, BytesMut};
use csnap_agent::core::SavedState;
use csnap_lockd::replica::{Change, PeerMessage, ReplicaId};
use csnap_proto::frame::{Message, encode};
use csnap_proto::{
    Frame, FrameDecoder, InstanceId, Location, Name, RequestId, Secret, SessionId, StoreExtent, Term, Time,
};
use csnap_storage::sim::{OperationId, OperationKind, Rng, SimDisk, SimNode, SimStorage};

use crate::clock::Clock;
use crate::history::Recorder;
use crate::model::{Group, Model, Mutex};
use crate::net::{Net, NetConn, Payload, Side};
use crate::plan::Plan;
use crate::queue::Queue;
use crate::tally::Tally;
use crate::tasks::{Ready, TaskId};

/// A process. Never reused: also its process id and its node on the simulated disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProcId(pub u32);

/// A host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostId(pub usize);

/// What a process is told.
#[derive(Debug)]
pub enum Event {
    /// It runs: first of all.
    Start,
    /// Its deadline may have come.
    Tick,
    /// A timer of its own went off.
    Timer(u64),
    /// A procedure can go on.
    Task(TaskId),
    /// Someone connected.
    Accepted(NetConn),
    /// A connect ended, with or without a connection.
    Connected { tag: u64, conn: Option<NetConn> },
    /// Frames came.
    Received { conn: NetConn, payload: Payload },
    /// A connection is gone.
    Closed { conn: NetConn },
    /// A process of its host ended.
    Ended(ProcId),
    /// The world asks something of it.
    Ask(Ask),
    /// Another lockd said something.
    Said(Bytes),
}

/// What the world asks of processes, in the place of people.
#[derive(Clone, Debug)]
pub enum Ask {
    /// An exporter attaches something.
    Attach(crate::process::exporter::Attach),
    /// An attachment takes a request.
    Io { attachment: u64, op: csnap_client::core::Op, offset: u64, len: u64, fast: bool },
    /// An operator takes a request.
    Operate(Box<csnap_proto::message::operate::OperatorRequest>),
    /// An operator asks the agent of its host.
    AskAgent(Box<csnap_proto::message::local::ToAgent>),
    /// A lockd makes another one the leader.
    Transfer(ReplicaId),
    /// A lockd changes its group.
    Change(Change),
}

/// What is going to happen.
#[derive(Debug)]
pub enum Happening {
    /// See [`Net::arrive`].
    Arrive { conn: NetConn, side: Side },
    /// See [`Net::give_up`].
    GiveUp { conn: NetConn, side: Side, since: u64 },
    /// See [`Net::keepalive`].
    Keepalive { conn: NetConn, side: Side },
    /// See [`Net::establish`].
    Connect { proc: ProcId, host: HostId, address: String, tag: u64 },
    /// A disk finishes an operation.
    Disk { disk: usize, id: OperationId, kind: OperationKind, path: String },
    /// To a process.
    Tell { proc: ProcId, event: Event },
    /// An agent's state reaches its file.
    Saved { host: HostId, proc: ProcId, state: Box<SavedState> },
    /// The storm, the workload, or the end of something.
    Script(crate::world::Script),
}

/// What a process orders.
#[derive(Debug)]
pub enum Order {
    /// Start a process, whose id was given out already.
    Spawn { id: ProcId, host: HostId, what: Spawn },
    /// SIGKILL.
    Kill(ProcId),
    /// A process ends by itself.
    Exit { proc: ProcId, why: String },
}

/// What is started.
#[derive(Clone, Debug)]
pub enum Spawn {
    /// A node's agent.
    Agent,
    /// The server child of this agent.
    Server { agent: ProcId },
    /// A node's exporter.
    Exporter,
    /// A lockd.
    Lockd,
    /// A command of an operator.
    Operator,
    /// A client of locks and keys.
    Contender,
    /// A client of a fenced register.
    Holder,
    /// The fenced register.
    Register,
}

impl Spawn {
    /// What it is, for people.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Server { .. } => "server",
            Self::Exporter => "exporter",
            Self::Lockd => "lockd",
            Self::Operator => "operator",
            Self::Contender => "contender",
            Self::Holder => "holder",
            Self::Register => "register",
        }
    }
}

/// So many instants, as a power of two, fit into a microsecond.
const INSTANT_BITS: u32 = 12;

/// The pool's disk; every process sees it.
pub const POOL: usize = 0;
/// Where the first lockd keeps its log; the others follow.
pub const LOCAL: usize = 1;

/// What survives the processes of a host.
#[derive(Debug, Default)]
pub struct Host {
    /// The agent's state file.
    pub saved: Option<SavedState>,
    /// Processes that run on it.
    pub alive: BTreeMap<ProcId, &'static str>,
}

/// See the module.
pub struct Sim {
    /// How this world is made.
    pub plan: Plan,
    /// Chance for whatever has no source of its own.
    pub rng: Rng,
    /// The future.
    pub queue: Queue<Happening>,
    /// The network.
    pub net: Net,
    /// The pool's disk, and one for each lockd.
    pub disks: Vec<SimDisk>,
    /// What the world knows of the lockds.
    pub group: Group,
    /// What clients of locks and keys saw.
    pub history: Recorder,
    /// What the fenced register was asked and holds.
    pub mutex: Mutex,
    /// A clock a host.
    pub clocks: Vec<Clock>,
    /// A host each.
    pub hosts: Vec<Host>,
    /// Procedures that can go on.
    pub ready: Ready,
    /// The judge.
    pub model: Model,
    /// Counts.
    pub tally: Tally,
    /// What processes ordered and the world has not done yet.
    pub orders: Vec<Order>,
    /// The first law that was seen broken.
    pub violation: Option<String>,
    /// Operations of disks take so many times longer, by host.
    pub slowness: Vec<u64>,
    /// The pool takes nothing more, now.
    pub full: bool,
    /// It was full once.
    pub was_full: bool,
    /// The sync of a directory of terms was made to fail once.
    pub dir_sync_failed: bool,
    /// Servers that take over.
    pub taking_over: BTreeSet<ProcId>,
    /// A lockd is killed once it has gathered requests that it does not settle at once.
    pub kill_gathering: bool,
    /// Processes that are stopped.
    pub paused: BTreeSet<ProcId>,
    /// The longest that a guest waited for a request, microseconds.
    pub longest_wait: u64,
    /// Places of the store that were ever written.
    used: BTreeSet<Location>,
    /// What happened, if somebody wants to read it.
    pub trace: Option<Vec<String>>,
    last_proc: u32,
    last_token: u64,
    last_instant: u64,
    digest: u64,
}

impl Sim {
    /// A world without processes.
    #[must_use]
    pub fn new(plan: Plan) -> Self {
        let mut rng = Rng::new(plan.seed);
        let mut clock_rng = rng.fork();
        let clocks = (0..plan.hosts).map(|_| {
            let drift = plan.drift_ppm;
            let rate = 1_000_000 - drift + clock_rng.below(2 * drift + 1);
            Clock::new(1_000_000 + clock_rng.below(1_000_000_000), rate)
        });
        let clocks = clocks.collect();
        let hosts = (0..plan.hosts).map(|_| Host::default()).collect();
        let disk = |rng: &mut Rng| {
            let disk = SimDisk::new(rng.next_u64());
            disk.set_stepped(true);
            disk
        };
        Self {
            net: Net::new(plan.weather.clone(), rng.fork()),
            disks: (0..=plan.lockds.len()).map(|_| disk(&mut rng)).collect(),
            group: Group::default(),
            history: Recorder::default(),
            mutex: Mutex::default(),
            clocks,
            hosts,
            slowness: vec![1; plan.hosts],
            trace: plan.trace.then(Vec::new),
            plan,
            rng,
            queue: Queue::default(),
            ready: Ready::default(),
            model: Model::default(),
            tally: Tally::default(),
            orders: Vec::new(),
            violation: None,
            full: false,
            was_full: false,
            dir_sync_failed: false,
            taking_over: BTreeSet::new(),
            kill_gathering: false,
            paused: BTreeSet::new(),
            longest_wait: 0,
            used: BTreeSet::new(),
            last_proc: 0,
            last_token: 0,
            last_instant: 0,
            digest: 0,
        }
    }

    /// What a host's clock shows.
    #[must_use]
    pub fn clock(&self, host: HostId) -> Time {
        self.clocks[host.0].at(self.now())
    }

    /// Notes what happens, for whoever reads the trace; part of the digest either way.
    pub fn note(&mut self, line: impl FnOnce() -> String) {
        if self.trace.is_some() {
            let line = format!("{:>11.6} {}", self.now() as f64 / 1e6, line());
            if self.plan.print {
                println!("{line}");
            }
            self.trace.get_or_insert_default().push(line);
        }
    }

    /// This instant, for the model: later than every one before, also when no virtual time has passed.
    pub fn instant(&mut self) -> u64 {
        self.last_instant = (self.last_instant + 1).max(self.now() << INSTANT_BITS);
        self.last_instant
    }

    /// Takes a number into the digest of the world.
    pub fn mix(&mut self, number: u64) {
        let mut z = self.digest.rotate_left(7) ^ number;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        self.digest = z ^ (z >> 31);
    }

    /// A number over everything that happened and is on the disks.
    #[must_use]
    pub fn digest(&self) -> u64 {
        self.disks.iter().fold(self.digest, |sum, disk| sum.rotate_left(9) ^ disk.digest())
    }

    /// A law is broken. The first one is kept.
    pub fn violation(&mut self, what: impl Into<String>) {
        let what = format!("at {:.6} s: {}", self.now() as f64 / 1e6, what.into());
        self.note(|| format!("VIOLATION {what}"));
        self.violation.get_or_insert(what);
    }

    /// Checks what the model says.
    pub fn judge<T>(&mut self, verdict: Result<T, String>) -> Option<T> {
        verdict.map_err(|what| self.violation(what)).ok()
    }

    /// What time it is, microseconds since the world began.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.queue.now()
    }

    /// `event` reaches `proc` in `wait` microseconds.
    pub fn tell(&mut self, wait: u64, proc: ProcId, event: Event) {
        self.queue.push_in(wait, Happening::Tell { proc, event });
    }

    /// Starts a process soon; its id.
    pub fn spawn(&mut self, host: HostId, what: Spawn) -> ProcId {
        self.last_proc += 1;
        let id = ProcId(self.last_proc);
        self.hosts[host.0].alive.insert(id, what.name());
        self.orders.push(Order::Spawn { id, host, what });
        id
    }

    /// Kills a process at once.
    pub fn kill(&mut self, proc: ProcId) {
        self.orders.push(Order::Kill(proc));
    }

    /// A process ends.
    pub fn exit(&mut self, proc: ProcId, why: impl Into<String>) {
        self.orders.push(Order::Exit { proc, why: why.into() });
    }

    /// A process's view of the pool.
    #[must_use]
    pub fn pool(&self, proc: ProcId) -> SimStorage {
        self.disks[POOL].storage(SimNode(u64::from(proc.0)))
    }

    /// A lockd's storage.
    #[must_use]
    pub fn local(&self, proc: ProcId, seat: usize) -> SimStorage {
        self.disks[LOCAL + seat].storage(SimNode(u64::from(proc.0)))
    }

    /// A lockd says something to another; it may be lost.
    pub fn say(&mut self, from: HostId, message: &PeerMessage) {
        let Some(seat) = self.group.seat_of.get(&message.to).copied() else { return };
        let to = self.plan.lockds[seat];
        let Some(proc) = self.find(to, "lockd") else { return };
        for way in self.net.datagram(from, to) {
            self.tell(way, proc, Event::Said(message.encode()));
        }
    }

    /// `proc` of `host` connects to `address`.
    pub fn connect(&mut self, proc: ProcId, host: HostId, address: &str, tag: u64) {
        self.net.connect(proc, host, address, tag, &mut self.queue);
    }

    /// `proc` sends a frame.
    pub fn send<M: Message>(&mut self, proc: ProcId, conn: NetConn, frame: &Frame<M>) {
        self.send_beside(proc, conn, frame, None);
    }

    /// As [`Self::send`], with a socket of `proc` beside it.
    pub fn send_beside<M: Message>(
        &mut self,
        proc: ProcId,
        conn: NetConn,
        frame: &Frame<M>,
        socket: Option<NetConn>,
    ) {
        let mut bytes = BytesMut::new();
        encode(frame, &mut bytes);
        if let Some(socket) = socket {
            self.net.hand_over(socket, Some(proc), None);
        }
        let payload = Payload { bytes: bytes.freeze(), socket };
        self.net.send(conn, proc, payload, &mut self.queue);
    }

    /// `proc` closes its end.
    pub fn close(&mut self, proc: ProcId, conn: NetConn) {
        self.net.close(conn, proc, &mut self.queue);
    }

    /// Sixteen bytes that nobody has drawn before.
    pub fn draw(&mut self) -> [u8; 16] {
        self.last_token += 1;
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.last_token.to_le_bytes());
        bytes[8..].copy_from_slice(&self.rng.next_u64().to_le_bytes());
        bytes
    }

    /// A new identity of a session.
    pub fn draw_session(&mut self) -> (SessionId, Secret) {
        (SessionId(self.draw()), Secret(self.draw()))
    }

    /// A new run of a process.
    pub fn draw_instance(&mut self) -> InstanceId {
        InstanceId(self.draw())
    }

    /// Whether a process is stopped.
    #[must_use]
    pub fn is_paused(&self, proc: ProcId) -> bool {
        self.paused.contains(&proc)
    }

    /// A server writes to a place of the store.
    pub fn note_store_use(&mut self, extent: StoreExtent) {
        let again = (0..extent.blocks).filter(|i| !self.used.insert(extent.at.plus(*i))).count();
        if again > 0 {
            self.tally.reached("freed space was reused");
        }
    }

    /// The process of that kind on a host.
    #[must_use]
    pub fn find(&self, host: HostId, kind: &str) -> Option<ProcId> {
        self.hosts[host.0].alive.iter().find(|(_, what)| **what == kind).map(|(id, _)| *id)
    }

    /// Whether a process runs on some host.
    #[must_use]
    pub fn is_alive(&self, proc: ProcId) -> bool {
        self.hosts.iter().any(|host| host.alive.contains_key(&proc))
    }
}

/// The name of a host's node.
#[must_use]
pub fn node_name(host: HostId) -> Name {
    Name::new(format!("n{}", host.0 + 1)).expect("a valid name")
}

/// The address of a host's agent.
#[must_use]
pub fn agent_address(host: HostId) -> String {
    format!("agent{}", host.0)
}

/// The address of a lockd.
#[must_use]
pub fn lockd_address(seat: usize) -> String {
    format!("lockd{seat}")
}

/// An unasked or local frame.
pub fn plain<M>(message: M) -> Frame<M> {
    Frame { id: RequestId(0), term: Term(0), message }
}

/// The frames in what arrived. Our own processes never send anything else.
///
/// # Panics
/// If it is not whole frames of that family.
pub fn frames<M: Message>(bytes: &Bytes) -> Vec<Frame<M>> {
    let mut decoder = FrameDecoder::default();
    decoder.buffer().extend_from_slice(bytes);
    std::iter::from_fn(|| decoder.next().expect("a process sends valid frames")).collect()
}
