//! The agent as a process: it waits for one event, steps the core, carries out the outputs in order.
//!
//! Everything slow (connections, children, declarations, the state file) runs in tasks that report back as events, so
//! that the socket answers whatever else goes on. Nothing here opens a configuration or resolves a name: addresses
//! are numeric, and were read at start.

mod declare;
#[cfg(feature = "etcd")]
mod etcd;
mod lockd;
mod process;
mod server;
mod service;
mod socket;
mod state;

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use anyhow::Context;
use csnap_lockd::client::{ClientConfig, ClientInput, ClientOutput, Identity};
use csnap_proto::message::local::FromAgent;
use csnap_proto::{InstanceId, RequestId, Secret, SessionId, Time};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::config::NodeConfig;
use crate::core::{AgentCore, ConnId, CoreConfig, Input, Output, Process, Ticket, Timing};

/// Events of tasks that wait for the main loop; a task that finds it full waits.
const EVENTS_MAX: usize = 1024;

/// How the agent starts the other daemons of its node: a program and its arguments each.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The server child.
    pub server: Vec<OsString>,
    /// The exporter.
    pub exporter: Vec<OsString>,
}

/// What a task reports.
enum Event {
    Input(Input),
    /// From the connection of an attempt, if it has to do with one.
    #[cfg(feature = "etcd")]
    Etcd {
        attempt: Option<u64>,
        input: crate::etcd::Input,
    },
    Accepted(UnixStream),
    Connected {
        ticket: Ticket,
        stream: TcpStream,
    },
    /// Every run is saved, so the socket may go out.
    MayHandOut {
        conn: ConnId,
        id: RequestId,
        message: FromAgent,
        stream: TcpStream,
    },
}

type Events = mpsc::Sender<Event>;

/// This machine's clock as cores know it.
fn now() -> Time {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(t.tv_sec).unwrap_or(0);
    Time(seconds * 1_000_000 + u64::try_from(t.tv_nsec).unwrap_or(0) / 1000)
}

fn draw() -> anyhow::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| anyhow::anyhow!("no random numbers: {error}"))?;
    Ok(bytes)
}

fn draw_identity() -> anyhow::Result<Identity> {
    Ok(Identity { session: SessionId(draw()?), secret: Secret(draw()?) })
}

/// Runs the node's agent until `shutdown`, then ends in an orderly way: the server drains, the lock is given back, the
/// exporter stays. Fails when another agent runs on the same state, or the socket cannot be had.
pub async fn run(
    config: NodeConfig,
    programs: Programs,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let (events, mut inbox) = mpsc::channel(EVENTS_MAX);
    let mut agent = Agent::start(&config, programs, events)?;
    agent.turn(Input::Tick)?;
    let mut shutdown = pin!(shutdown);
    let mut asked_to_stop = false;
    while !agent.stopped {
        let deadlines = [agent.core.next_deadline(), agent.lockd.next_deadline()];
        let deadline = deadlines.into_iter().flatten().min().unwrap_or(Time(u64::MAX));
        let wait = deadline.since(now()).min(Duration::from_secs(3600));
        tokio::select! {
            biased;
            Some(event) = inbox.recv() => agent.on_event(event)?,
            () = &mut shutdown, if !asked_to_stop => {
                asked_to_stop = true;
                info!("stopping");
                agent.turn(Input::Stop)?;
            }
            () = tokio::time::sleep(wait) => {
                agent.lockd.tick();
                agent.turn(Input::Tick)?;
            }
        }
    }
    agent.saver.flush().await;
    info!("stopped");
    Ok(())
}

struct Agent {
    core: AgentCore,
    events: Events,
    programs: Programs,
    lockd: service::Service,
    children: process::Children,
    conns: BTreeMap<ConnId, socket::Connection>,
    connections_max: usize,
    next_conn: u64,
    sockets: BTreeMap<Ticket, TcpStream>,
    server: server::Prober,
    declarer: declare::Declarer,
    saver: state::Saver,
    stopped: bool,
}

impl Agent {
    fn start(config: &NodeConfig, programs: Programs, events: Events) -> anyhow::Result<Self> {
        let service = service::Service::new(config, events.clone())?;
        let (saver, saved, same_boot) = state::Saver::open(&config.state)?;
        socket::listen(&config.agent_sock, events.clone())
            .with_context(|| format!("cannot listen on {}", config.agent_sock.display()))?;
        let pool = config.pool.to_str().context("the pool's path must be UTF-8")?.to_owned();
        let core = CoreConfig {
            node: config.node.clone(),
            pid: std::process::id(),
            priority: config.priority,
            failback: config.failback,
            timing: Timing {
                ping_interval: Duration::from_millis(config.ping_ms),
                ping_timeout: Duration::from_millis(config.ping_timeout_ms),
                place_step: Duration::from_millis(config.place_step_ms),
                failback_after: Duration::from_millis(config.failback_after_ms),
            },
            pool: pool.clone(),
        };
        let lease_ms = match &config.etcd {
            Some(_) => crate::etcd::lease_ms(config.lease_ms),
            None => config.lease_ms,
        };
        let client = ClientConfig { node: config.node.clone(), lease_ms, renew_ms: config.renew_ms };
        let is_alive = |process| same_boot && process::is_alive(process);
        let core = AgentCore::new(now(), core, client, draw_identity()?, saved, is_alive);
        let instance = InstanceId(draw()?);
        let caller = |identity| server::Caller::new(config.node.clone(), instance, identity);
        Ok(Self {
            core,
            programs,
            lockd: service,
            children: process::Children::new(events.clone()),
            conns: BTreeMap::new(),
            connections_max: socket::connections_max(),
            next_conn: 0,
            sockets: BTreeMap::new(),
            server: server::Prober::new(caller(draw_identity()?), events.clone()),
            declarer: declare::Declarer::start(caller(draw_identity()?), pool.into(), events.clone()),
            saver,
            events,
            stopped: false,
        })
    }

    fn on_event(&mut self, event: Event) -> anyhow::Result<()> {
        match event {
            Event::Input(Input::Gone { conn }) => {
                self.conns.remove(&conn);
                self.turn(Input::Gone { conn })
            }
            Event::Input(input) => self.turn(input),
            #[cfg(feature = "etcd")]
            Event::Etcd { attempt, input } => {
                self.lockd.on_etcd(attempt, input);
                self.settle(VecDeque::new())
            }
            Event::Accepted(stream) => self.on_accepted(stream),
            Event::Connected { ticket, stream } => {
                self.sockets.insert(ticket, stream);
                self.turn(Input::ServerConnect { ticket, made: true })
            }
            Event::MayHandOut { conn, id, message, stream } => {
                self.send(conn, id, message, Some(stream));
                Ok(())
            }
        }
    }

    fn on_accepted(&mut self, stream: UnixStream) -> anyhow::Result<()> {
        let process = match socket::admit(&stream, self.conns.len(), self.connections_max) {
            Ok(process) => process,
            Err(reason) => {
                warn!("connection refused: {reason}");
                return Ok(());
            }
        };
        self.next_conn += 1;
        let conn = ConnId(self.next_conn);
        self.conns.insert(conn, socket::Connection::start(conn, stream, self.events.clone()));
        self.turn(Input::Accepted { conn, process })
    }

    /// One step, and those that its outputs bring about at once.
    fn turn(&mut self, input: Input) -> anyhow::Result<()> {
        self.settle(VecDeque::from([input]))
    }

    /// In the order in which they came about: what the lock service said first is heard first.
    fn settle(&mut self, mut inputs: VecDeque<Input>) -> anyhow::Result<()> {
        let mut outputs = Vec::new();
        inputs.extend(self.lockd.take_inputs());
        while let Some(input) = inputs.pop_front() {
            self.core.step(now(), input, &mut outputs);
            for output in outputs.drain(..) {
                inputs.extend(self.carry_out(output)?);
                inputs.extend(self.lockd.take_inputs());
            }
        }
        Ok(())
    }

    /// Carries one output out; what it brings about at once is returned.
    fn carry_out(&mut self, output: Output) -> anyhow::Result<Option<Input>> {
        match output {
            Output::Lockd(output) => return Ok(self.pass_to_lockd(output)),
            Output::DrawIdentity => return Ok(Some(Input::Identity(draw_identity()?))),
            Output::Send { conn, id, message } => self.send(conn, id, message, None),
            Output::HandOut { ticket, conn, id, message } => {
                if let Some(stream) = self.sockets.remove(&ticket) {
                    self.hand_out(conn, id, message, stream);
                }
            }
            Output::Close { conn, reason } => {
                warn!("connection {} is closed: {reason}", conn.0);
                self.conns.remove(&conn);
                return Ok(Some(Input::Gone { conn }));
            }
            Output::SpawnServer => {
                return Ok(Some(Input::ServerSpawned(self.children.spawn(&self.programs.server))));
            }
            Output::SpawnExporter => {
                return Ok(Some(Input::ExporterSpawned(self.children.spawn(&self.programs.exporter))));
            }
            Output::Kill(process) => self.children.signal(process, rustix::process::Signal::KILL),
            Output::Terminate(process) => self.children.signal(process, rustix::process::Signal::TERM),
            Output::Watch(process) => self.children.watch(process),
            Output::ConnectServer { ticket, tcp } => server::connect_for(ticket, tcp, self.events.clone()),
            Output::DropSocket { ticket } => drop(self.sockets.remove(&ticket)),
            Output::Probe { tcp, term } => self.server.probe(tcp, term),
            Output::Declare { dead, tcp } => self.declarer.declare(dead, tcp),
            Output::Save(state) => self.saver.save(state),
            Output::Stopped => self.stopped = true,
            Output::Note(note) => info!("{note}"),
        }
        Ok(None)
    }

    fn pass_to_lockd(&mut self, output: ClientOutput) -> Option<Input> {
        match output {
            ClientOutput::Connect { attempt } => self.lockd.connect(attempt, self.core.lockd_hint()),
            ClientOutput::Disconnect { attempt } => self.lockd.disconnect(attempt),
            ClientOutput::Send { attempt, frame } => {
                if !self.lockd.send(attempt, frame) {
                    return Some(Input::Lockd(ClientInput::Disconnected { attempt }));
                }
            }
            ClientOutput::Moved { to } => self.lockd.move_to(to),
            ClientOutput::Event(event) => unreachable!("the core keeps events to itself: {event:?}"),
        }
        None
    }

    /// Sends a way to the server, once whoever gets it would be remembered.
    fn hand_out(&mut self, conn: ConnId, id: RequestId, message: FromAgent, stream: TcpStream) {
        let Some(unsaved) = self.saver.runs_unsaved() else {
            return self.send(conn, id, message, Some(stream));
        };
        let events = self.events.clone();
        tokio::spawn(async move {
            unsaved.await;
            // The main loop may be gone; then the asker finds the agent gone too.
            let _ = events.send(Event::MayHandOut { conn, id, message, stream }).await;
        });
    }

    fn send(&mut self, conn: ConnId, id: RequestId, message: FromAgent, socket: Option<TcpStream>) {
        let Some(connection) = self.conns.get(&conn) else { return };
        if !connection.send(id, message, socket) {
            // Its reader ends with it and says that it is gone.
            warn!("connection {} does not read what it asked for, and is closed", conn.0);
            connection.close();
        }
    }
}

/// A process as the kernel knows it now; none if it is gone.
pub(crate) fn identify(pid: u32) -> Option<Process> {
    process::start_of(pid).map(|started| Process { pid, started })
}
