//! The world of these tests: nodes with an agent core, a played server child, a played exporter; one lockd.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use csnap_lockd::client::{ClientConfig, ClientInput, ClientOutput, Identity};
use csnap_lockd::core::spaces::{Command, Spaces};
use csnap_lockd::core::{ConnectionId, Input as LockdInput, Lockd, Output as LockdOutput};
use csnap_proto::message::local::FromAgent;
use csnap_proto::message::lock::{FromLockd, LockEvent, ToLockd};
use csnap_proto::{EventNumber, Frame, Name, RequestId, Secret, SessionId, Term, Time};

use super::super::{AgentCore, ConnId, CoreConfig, Dead, Failback, Input, Process, SavedState, Timing};
use super::etcd::{EtcdLink, OnWire};
use super::played::{ChildStep, PlayedServer, Takeovers};
use crate::etcd::tests::model::Etcd;

pub(super) const PLACE_STEP: Duration = Duration::from_millis(40);
pub(super) const FAILBACK: Duration = Duration::from_secs(5);
/// Longest that a cold start waits for a better node.
pub(super) const COLD_START: Duration = Duration::from_secs(3);
pub(super) const LEASE: Duration = Duration::from_millis(1500);
pub(super) const PING_TIMEOUT: Duration = Duration::from_millis(500);

/// One way between an agent and lockd.
pub(super) const NET: Duration = Duration::from_micros(200);
pub(super) enum Event {
    /// For an agent of this life.
    Agent(usize, u32, Input),
    ToLockd(LockdInput),
    /// Between an agent of this life and etcd, on the connection of an attempt.
    Etcd(usize, u32, u64, OnWire),
    /// A played server reaches a point of its life.
    Child(usize, Process, ChildStep),
}

pub(super) struct Node {
    pub(super) name: Name,
    pub(super) core: Option<AgentCore>,
    pub(super) life: u32,
    /// In a world on etcd.
    pub(super) etcd: Option<EtcdLink>,
    pub(super) saved: Option<SavedState>,
    priority: u32,
    failback: Failback,
    pub(super) child: Option<PlayedServer>,
    pub(super) exporter: Option<Process>,
    pub(super) exporters_started: u32,
    pub(super) servers_started: u32,
    /// Its servers end before they follow the journal.
    pub(super) starts_fail: bool,
    connection: Option<(u64, ConnectionId)>,
    pub(super) cut: bool,
    /// Its connection to lockd lost something meanwhile. No stream goes on after that.
    torn: bool,
    pub(super) next_conn: u64,
    next_identity: u8,
    /// What peers of the agent were told, but for pings.
    pub(super) told: Vec<(ConnId, RequestId, FromAgent)>,
    pub(super) closed: Vec<ConnId>,
    pub(super) declared: Vec<Dead>,
    pub(super) handed_out: Vec<(ConnId, Term)>,
    pub(super) probes: u32,
    pub(super) stopped: bool,
    /// How its servers take over.
    pub(super) takeovers: Takeovers,
}

pub(super) struct World {
    pub(super) now: Time,
    queue: BTreeMap<(Time, u64), Event>,
    queued: u64,
    pub(super) lockd: Option<Lockd>,
    /// In lockd's place; away when lockd is.
    pub(super) etcd: Option<Etcd>,
    log: Vec<Bytes>,
    last_connection: u64,
    /// Lock operations that agents sent.
    pub(super) asked_of_lockd: u32,
    pub(super) last_pid: u32,
    /// Processes that are no more.
    pub(super) ended: BTreeSet<Process>,
    pub(super) nodes: Vec<Node>,
    /// Every term that a server was told to serve under, in order.
    pub(super) anointed: Vec<(Term, usize)>,
}

impl World {
    /// A node for each priority, all started.
    pub(super) fn new(priorities: &[u32], failback: Failback) -> Self {
        let mut world = Self::cold(priorities, failback);
        (0..priorities.len()).for_each(|n| world.start_agent(n));
        world
    }

    /// A node for each priority, none started.
    pub(super) fn cold(priorities: &[u32], failback: Failback) -> Self {
        let lockd = Lockd::new(Time(0), Name::new("lockd1").expect("a name"), 1, Spaces::default());
        let mut world = Self {
            now: Time(0),
            queue: BTreeMap::new(),
            queued: 0,
            lockd: Some(lockd),
            etcd: None,
            log: Vec::new(),
            last_connection: 0,
            asked_of_lockd: 0,
            last_pid: 100,
            ended: BTreeSet::new(),
            nodes: Vec::new(),
            anointed: Vec::new(),
        };
        for (i, priority) in priorities.iter().enumerate() {
            world.nodes.push(Node {
                name: Name::new(format!("n{}", i + 1)).expect("a name"),
                core: None,
                life: 0,
                etcd: None,
                saved: None,
                priority: *priority,
                failback,
                child: None,
                exporter: None,
                exporters_started: 0,
                servers_started: 0,
                starts_fail: false,
                connection: None,
                cut: false,
                torn: false,
                next_conn: 0,
                next_identity: 0,
                told: Vec::new(),
                closed: Vec::new(),
                declared: Vec::new(),
                handed_out: Vec::new(),
                probes: 0,
                stopped: false,
                takeovers: Takeovers::Work,
            });
        }
        world
    }

    pub(super) fn start_agent(&mut self, n: usize) {
        let fresh = self.draw(n);
        let node = &mut self.nodes[n];
        if node.core.is_some() {
            return;
        }
        node.life += 1;
        node.etcd = self.etcd.as_ref().map(|_| EtcdLink::new());
        let config = CoreConfig {
            node: node.name.clone(),
            pid: 10 + u32::try_from(n).expect("few nodes"),
            priority: node.priority,
            failback: node.failback,
            timing: Timing {
                ping_interval: Duration::from_millis(100),
                ping_timeout: PING_TIMEOUT,
                place_step: PLACE_STEP,
                failback_after: FAILBACK,
            },
            pool: "/pool".to_owned(),
        };
        let client = ClientConfig {
            node: node.name.clone(),
            lease_ms: u64::try_from(LEASE.as_millis()).expect("short"),
            renew_ms: 250,
        };
        let exporter = node.exporter;
        let core = AgentCore::new(self.now, config, client, fresh, node.saved.clone(), |process| {
            exporter == Some(process)
        });
        node.core = Some(core);
        self.step(n, Input::Tick);
        // An exporter that outlived the last agent finds the new one.
        if let Some(process) = exporter {
            self.exporter_hello(n, process);
        }
    }

    /// The agent dies; its server with it, its exporter not.
    pub(super) fn kill_agent(&mut self, n: usize) {
        if self.nodes[n].core.take().is_some() {
            (self.nodes[n].child, self.nodes[n].etcd) = (None, None);
            self.disconnect(n);
        }
    }

    pub(super) fn draw(&mut self, n: usize) -> Identity {
        let node = &mut self.nodes[n];
        node.next_identity += 1;
        let mut bytes = [u8::try_from(n).expect("few nodes"); 16];
        bytes[1] = node.next_identity;
        Identity { session: SessionId(bytes), secret: Secret(bytes) }
    }

    pub(super) fn push(&mut self, after: Duration, event: Event) {
        self.queued += 1;
        self.queue.insert((self.now.after(after), self.queued), event);
    }

    pub(super) fn agent(&mut self, n: usize, after: Duration, input: Input) {
        let life = self.nodes[n].life;
        self.push(after, Event::Agent(n, life, input));
    }

    pub(super) fn step(&mut self, n: usize, input: Input) {
        let mut out = Vec::new();
        let Some(core) = &mut self.nodes[n].core else { return };
        core.step(self.now, input, &mut out);
        for output in out {
            self.carry_out(n, output);
        }
    }

    pub(super) fn client_output(&mut self, n: usize, output: ClientOutput) {
        match output {
            output if self.etcd.is_some() => self.etcd_output(n, output),
            ClientOutput::Connect { attempt } if self.nodes[n].cut || self.lockd.is_none() => {
                self.agent(n, NET, Input::Lockd(ClientInput::Disconnected { attempt }));
            }
            ClientOutput::Connect { attempt } => {
                self.last_connection += 1;
                let id = ConnectionId(self.last_connection);
                (self.nodes[n].connection, self.nodes[n].torn) = (Some((attempt, id)), false);
                self.push(NET, Event::ToLockd(LockdInput::Opened(id, csnap_proto::Caller::local())));
                self.agent(n, NET, Input::Lockd(ClientInput::Connected { attempt }));
            }
            ClientOutput::Disconnect { .. } => self.disconnect(n),
            ClientOutput::Send { attempt, frame } => {
                let open = self.nodes[n].connection.filter(|(current, _)| *current == attempt);
                if let Some((_, id)) = open.filter(|_| self.passes(n)) {
                    let frame: Frame<ToLockd> = frame;
                    self.asked_of_lockd += u32::from(matches!(frame.message, ToLockd::Operate { .. }));
                    self.push(NET, Event::ToLockd(LockdInput::Received(id, frame)));
                }
            }
            ClientOutput::Moved { to } => panic!("there is one group, and not {to:?}"),
            ClientOutput::Event(event) => panic!("the core keeps events to itself: {event:?}"),
        }
    }

    /// Lockd tells the agent of `n` something that it has no reason to.
    pub(super) fn hear_event(&mut self, n: usize, number: EventNumber, event: LockEvent) {
        let (attempt, _) = self.nodes[n].connection.expect("it is connected");
        let frame = Frame { id: RequestId(0), term: Term(0), message: FromLockd::Event { number, event } };
        self.step(n, Input::Lockd(ClientInput::Received { attempt, frame }));
    }

    /// Whether something on an open connection arrives.
    fn passes(&mut self, n: usize) -> bool {
        let node = &mut self.nodes[n];
        node.torn |= node.cut;
        !node.cut
    }

    /// Everybody hears the node again. A connection that lost something is seen to be broken.
    pub(super) fn heal(&mut self, n: usize) {
        self.nodes[n].cut = false;
        let torn = std::mem::take(&mut self.nodes[n].torn);
        if let Some((attempt, _)) = self.nodes[n].connection.filter(|_| torn) {
            self.disconnect(n);
            self.agent(n, NET, Input::Lockd(ClientInput::Disconnected { attempt }));
        }
    }

    fn disconnect(&mut self, n: usize) {
        if let Some((_, id)) = self.nodes[n].connection.take() {
            self.push(NET, Event::ToLockd(LockdInput::Closed(id)));
        }
    }

    fn step_lockd(&mut self, input: LockdInput) {
        let mut inputs = vec![input];
        while let Some(input) = inputs.pop() {
            let Some(lockd) = &mut self.lockd else { return };
            let mut out = Vec::new();
            lockd.step(self.now, input, &mut out);
            let mut appended = 0;
            for output in out {
                match output {
                    LockdOutput::Append(bytes) => {
                        self.log.push(bytes);
                        appended += 1;
                    }
                    LockdOutput::Send(id, frame) => self.hear_lockd(id, frame),
                    LockdOutput::Close(id, _) => self.close_by_lockd(id),
                    LockdOutput::Denied(_, denied) => panic!("{denied}"),
                    LockdOutput::Overslept(_) => {}
                }
            }
            if appended > 0 {
                inputs.push(LockdInput::Durable { count: appended });
            }
        }
    }

    fn owner(&self, id: ConnectionId) -> Option<(usize, u64)> {
        let with = |node: &Node| node.connection.filter(|(_, connection)| *connection == id);
        self.nodes.iter().enumerate().find_map(|(n, node)| with(node).map(|(attempt, _)| (n, attempt)))
    }

    fn hear_lockd(&mut self, id: ConnectionId, frame: Frame<FromLockd>) {
        if let Some((n, attempt)) = self.owner(id).filter(|(n, _)| self.passes(*n)) {
            self.agent(n, NET, Input::Lockd(ClientInput::Received { attempt, frame }));
        }
    }

    fn close_by_lockd(&mut self, id: ConnectionId) {
        if let Some((n, attempt)) = self.owner(id).filter(|(n, _)| self.passes(*n)) {
            self.nodes[n].connection = None;
            self.agent(n, NET, Input::Lockd(ClientInput::Disconnected { attempt }));
        }
    }

    /// Lockd dies and is gone until it is started.
    pub(super) fn kill_lockd(&mut self) {
        if self.lockd.take().is_none() {
            return;
        }
        for n in 0..self.nodes.len() {
            self.drop_etcd_link(n);
            if let Some((attempt, _)) = self.nodes[n].connection.take() {
                self.agent(n, NET, Input::Lockd(ClientInput::Disconnected { attempt }));
            }
        }
    }

    /// Lockd comes back with what its log says.
    pub(super) fn start_lockd(&mut self) {
        if self.lockd.is_some() {
            return;
        }
        let mut spaces = Spaces::default();
        for bytes in &self.log {
            let command: Command = postcard::from_bytes(bytes).expect("the log holds commands");
            spaces.apply(command, &mut Vec::new());
        }
        self.lockd = Some(Lockd::new(self.now, Name::new("lockd1").expect("a name"), 1, spaces));
        if let Some(etcd) = &mut self.etcd {
            etcd.change_leader(self.now);
        }
    }

    /// Lets `time` pass.
    pub(super) fn run(&mut self, time: Duration) {
        let until = self.now.after(time);
        while self.next().is_some_and(|at| at <= until) {
            self.run_next();
        }
        self.now = until;
    }

    /// Lets time pass until `done`; fails after `patience`. Gives the time that it took.
    pub(super) fn run_until(
        &mut self,
        patience: Duration,
        what: &str,
        done: impl Fn(&Self) -> bool,
    ) -> Duration {
        let began = self.now;
        while !done(self) {
            let next = self.next().expect("agents have deadlines");
            assert!(next.since(began) <= patience, "{what}: not within {patience:?}");
            self.run_next();
        }
        self.now.since(began)
    }

    fn next(&self) -> Option<Time> {
        let queued = self.queue.first_key_value().map(|((at, _), _)| *at);
        let cores = self
            .nodes
            .iter()
            .filter(|node| !node.stopped)
            .filter_map(|node| node.core.as_ref()?.next_deadline());
        let lockd = self.lockd.as_ref().and_then(Lockd::next_deadline);
        let etcd = self.etcd.as_ref().filter(|_| self.lockd.is_some()).and_then(Etcd::next_expiry);
        let sessions = self.nodes.iter().filter_map(|node| node.etcd.as_ref()?.next_deadline());
        cores.chain(queued).chain(lockd).chain(etcd).chain(sessions).min().map(|at| at.max(self.now))
    }

    fn run_next(&mut self) {
        let at = self.next().expect("called with something to do");
        self.now = at;
        if let Some(entry) = self.queue.first_entry().filter(|entry| entry.key().0 <= at) {
            match entry.remove() {
                Event::Agent(n, life, input) if self.nodes[n].life == life => self.step(n, input),
                Event::Agent(..) => {}
                Event::ToLockd(input) => self.step_lockd(input),
                Event::Etcd(n, life, attempt, what) => self.arrive(n, life, attempt, what),
                Event::Child(n, process, step) => self.child_step(n, process, step),
            }
            return;
        }
        for n in 0..self.nodes.len() {
            let due = self.nodes[n].core.as_ref().and_then(AgentCore::next_deadline);
            if due.is_some_and(|due| due <= at) && !self.nodes[n].stopped {
                self.tick(n);
            }
        }
        if self.lockd.as_ref().and_then(Lockd::next_deadline).is_some_and(|due| due <= at) {
            self.step_lockd(LockdInput::Tick);
        }
        self.etcd_tick();
    }

    /// Ticks until nothing is due: a connection that is given up is made anew with the next tick.
    fn tick(&mut self, n: usize) {
        for _ in 0..3 {
            self.step(n, Input::Tick);
            let next = self.nodes[n].core.as_ref().and_then(AgentCore::next_deadline);
            if next.is_none_or(|next| next > self.now) || self.nodes[n].stopped {
                return;
            }
        }
        panic!("ticks that settle nothing spin");
    }

    /// Nodes whose server serves and is not frozen.
    pub(super) fn serving(&self) -> Vec<usize> {
        let serves =
            |node: &Node| node.child.as_ref().is_some_and(|child| child.serving.is_some() && !child.frozen);
        (0..self.nodes.len()).filter(|n| serves(&self.nodes[*n])).collect()
    }

    /// The one node that serves.
    pub(super) fn server(&self) -> usize {
        let serving = self.serving();
        assert_eq!(serving.len(), 1, "one serves: {serving:?}");
        serving[0]
    }

    pub(super) fn term(&self) -> Term {
        self.anointed.last().expect("somebody was anointed").0
    }

    /// Until somebody serves alone and every agent knows it.
    pub(super) fn settled(&mut self) -> usize {
        self.run_until(Duration::from_secs(20), "one server that all know", |world| {
            world.serving().len() == 1 && {
                let server = world.serving()[0];
                let term = world.nodes[server].child.as_ref().and_then(|child| child.serving);
                let knows = |node: &Node| node.core.as_ref().is_none_or(|core| core.known_term() == term);
                world.nodes.iter().all(knows)
            }
        });
        self.server()
    }
}
