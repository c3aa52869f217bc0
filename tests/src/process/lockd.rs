//! The lock manager's process: its core, and its log on a disk of its own. A group of one.

use csnap_lockd::canary::Broken;
use csnap_lockd::core::ConnectionId;
use csnap_lockd::replica::{Base, ClusterId, ReplicaConfig, ReplicaLog, Saved, Timing, Write, Wrote};
use csnap_lockd::replicated::{Input, Output, Replicated};
use csnap_lockd::store::{LOG_BYTES_MIN, StoreError, StoreOptions};
use csnap_proto::Name;
use csnap_proto::Time;
use csnap_proto::message::lock::ToLockd;
use csnap_storage::sim::SimStorage;

use crate::net::NetConn;
use crate::sim::{Event, HostId, LOCKD_ADDRESS, ProcId, Sim, frames};
use crate::tasks::Tasks;

/// A store that another lockd has (one that was just killed) is tried again after this, microseconds.
const AGAIN: u64 = 20_000;

type Log = ReplicaLog<SimStorage>;

enum Ended {
    Opened(Result<(Log, Saved), StoreError>),
    Wrote { log: Log, result: Result<Wrote, StoreError> },
}

/// See the module.
pub struct LockdProc {
    id: ProcId,
    host: HostId,
    tasks: Tasks<Ended>,
    core: Option<Replicated>,
    /// At rest.
    log: Option<Log>,
    waiting: Vec<Write>,
    /// A new base was asked for, and waits among the others.
    based: bool,
}

impl LockdProc {
    pub(super) fn start(sim: &mut Sim, id: ProcId, host: HostId) -> Self {
        let tasks = Tasks::new(id, sim.ready.clone());
        Self { id, host, tasks, core: None, log: None, waiting: Vec::new(), based: false }
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        self.core.as_ref()?.next_deadline()
    }

    /// Commands that are appended and not durable.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.core.as_ref().map_or(0, |core| core.lockd().in_flight())
    }

    pub(super) fn on_event(&mut self, sim: &mut Sim, event: Event) {
        match event {
            Event::Start | Event::Timer(_) => {
                let (storage, fresh_id) = (sim.local(self.id), sim.draw());
                let options = StoreOptions { fresh_id, log_bytes: LOG_BYTES_MIN, broken: Broken::default() };
                let first =
                    move |id| Base::alone(ClusterId(fresh_id), id, String::new(), Replicated::first_state());
                self.tasks
                    .spawn(async move { Ended::Opened(ReplicaLog::open(storage, options, first).await) });
            }
            Event::Tick => self.step(sim, Input::Tick),
            Event::Accepted(conn) => self.step(sim, Input::Opened(ConnectionId(conn.0))),
            Event::Closed { conn } => self.step(sim, Input::Closed(ConnectionId(conn.0))),
            Event::Received { conn, payload } => {
                for frame in frames::<ToLockd>(&payload.bytes) {
                    self.step(sim, Input::Received(ConnectionId(conn.0), frame));
                }
            }
            Event::Task(task) => {
                if let Some(ended) = self.tasks.poll(task) {
                    self.on_ended(sim, ended);
                }
            }
            Event::Connected { .. } | Event::Ended(_) | Event::Ask(_) => {}
        }
    }

    fn on_ended(&mut self, sim: &mut Sim, ended: Ended) {
        match ended {
            Ended::Opened(Ok((log, saved))) => {
                let node = Name::new("lockd1").expect("a valid name");
                let config = ReplicaConfig {
                    timing: Timing::DEFAULT,
                    seed: u64::from(self.id.0),
                    broken: Broken::default(),
                };
                let now = sim.clock(self.host);
                match Replicated::new(now, config, node, self.id.0, saved) {
                    Ok(core) => (self.core, self.log) = (Some(core), Some(log)),
                    Err(error) => return self.fail(sim, &error.to_string()),
                }
                self.step(sim, Input::Tick);
            }
            Ended::Opened(Err(StoreError::Busy)) => sim.tell(AGAIN, self.id, Event::Timer(0)),
            Ended::Wrote { log, result: Ok(Wrote { number, .. }) } => {
                self.log = Some(log);
                match number {
                    Some(number) => self.step(sim, Input::Durable { number }),
                    None => self.write(sim),
                }
            }
            Ended::Opened(Err(error)) | Ended::Wrote { result: Err(error), .. } => {
                self.fail(sim, &error.to_string());
            }
        }
    }

    fn fail(&mut self, sim: &mut Sim, error: &str) {
        sim.violation(format!("lockd on a sound medium: {error}"));
        sim.exit(self.id, error.to_owned());
    }

    fn step(&mut self, sim: &mut Sim, input: Input) {
        let Some(core) = &mut self.core else { return };
        let mut out = Vec::new();
        if let Err(error) = core.step(sim.clock(self.host), input, &mut out) {
            return self.fail(sim, &error.to_string());
        }
        for output in out {
            match output {
                Output::Write(write) => self.waiting.push(write),
                Output::Send(conn, frame) => sim.send(self.id, NetConn(conn.0), &frame),
                Output::Close(conn, _) => sim.close(self.id, NetConn(conn.0)),
                // Nobody waits for a lockd that is about to lead, so it listens only then.
                Output::Leads { .. } => sim.net.listen(LOCKD_ADDRESS, self.id, self.host),
                Output::Peer(_) | Output::Follows | Output::Members(_) | Output::Refused(_) => {
                    sim.violation("a lockd alone has no others to deal with".to_owned());
                }
            }
        }
        self.write(sim);
    }

    /// Gives the log what waits, if it is at rest.
    fn write(&mut self, sim: &mut Sim) {
        let Some(log) = self.log.as_ref().filter(|_| !self.waiting.is_empty()) else { return };
        if !self.based && log.wants_base(&self.waiting) {
            sim.tally.did("generations of lockd's log", 1);
            self.based = true;
            return self.step(sim, Input::WantsBase);
        }
        let mut log = self.log.take().expect("looked at above");
        let writes = std::mem::take(&mut self.waiting);
        self.based = false;
        self.tasks.spawn(async move {
            let result = log.write(writes).await;
            Ended::Wrote { log, result }
        });
    }
}
