//! A lock manager's process: its core with its replica, and its log on a disk of its own. Alone, or one of a group.
//!
//! As in the daemon, what comes while it is busy is taken in together and settled together: how long that takes is drawn. What
//! its disk says, and its deadlines, are a turn of their own, after what was being gathered is settled.

use csnap_lockd::core::ConnectionId;
use csnap_lockd::replica::{
    Base, ClusterId, PeerMessage, Replica, ReplicaConfig, ReplicaLog, Saved, Write, Wrote,
};
use csnap_lockd::replicated::{Input, Output, Replicated};
use csnap_lockd::store::{LOG_BYTES_MIN, StoreError, StoreOptions};
use csnap_proto::message::lock::ToLockd;
use csnap_proto::{Caller, Name, Time};
use csnap_storage::sim::{Rng, SimStorage};

use crate::net::NetConn;
use crate::sim::{Ask, Event, HostId, ProcId, Sim, frames, lockd_address};
use crate::tasks::Tasks;

/// A store that another lockd has (one that was just killed) is tried again after this, microseconds.
const AGAIN: u64 = 20_000;

/// What is gathered is settled after this at the latest, microseconds: the daemon settles when nothing more waits in its
/// sockets, or it has 256 events.
const GATHERS_FOR: u64 = 2_000;

/// Timers: to open the disk again, and to settle.
const OPEN: u64 = 0;
const SETTLE: u64 = 1;

type Log = ReplicaLog<SimStorage>;

enum Ended {
    Opened(Result<(Log, Saved), StoreError>),
    Wrote { log: Log, result: Result<Wrote, StoreError> },
}

/// See the module.
pub struct LockdProc {
    id: ProcId,
    host: HostId,
    seat: usize,
    tasks: Tasks<Ended>,
    core: Option<Replicated>,
    /// At rest.
    log: Option<Log>,
    waiting: Vec<Write>,
    /// A new base was asked for, and waits among the others.
    based: bool,
    /// When what it gathers is settled.
    rng: Rng,
    /// Something was taken in and is not settled.
    gathers: bool,
    /// Requests among it that are to be written.
    gathered: usize,
}

impl LockdProc {
    pub(super) fn start(sim: &mut Sim, id: ProcId, host: HostId) -> Self {
        let tasks = Tasks::new(id, sim.ready.clone());
        let seat = sim.plan.lockds.iter().position(|its| *its == host).expect("lockds have their hosts");
        // Of its own, so that what is drawn for it changes nothing else.
        let rng = Rng::new(sim.plan.seed ^ 0x6761_7468_6572 ^ u64::from(id.0) << 48);
        Self {
            id,
            host,
            seat,
            tasks,
            core: None,
            log: None,
            waiting: Vec::new(),
            based: false,
            rng,
            gathers: false,
            gathered: 0,
        }
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        self.core.as_ref()?.next_deadline()
    }

    /// Commands that are appended and not durable.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.core.as_ref().map_or(0, |core| core.lockd().in_flight())
    }

    /// Requests that were taken in, to be written, and are not settled.
    #[must_use]
    pub fn gathered(&self) -> usize {
        self.gathered
    }

    /// Its replica, once its disk was opened.
    #[must_use]
    pub fn replica(&self) -> Option<&Replica> {
        Some(self.core.as_ref()?.replica())
    }

    pub(super) fn on_event(&mut self, sim: &mut Sim, event: Event) {
        match event {
            Event::Start | Event::Timer(OPEN) => self.open(sim),
            Event::Timer(_) => self.settle(sim),
            Event::Tick => {
                self.settle(sim);
                self.step(sim, Input::Tick);
            }
            Event::Accepted(conn) => {
                self.gather(sim, [Input::Opened(ConnectionId(conn.0), Caller::local())]);
            }
            Event::Closed { conn } => self.gather(sim, [Input::Closed(ConnectionId(conn.0))]),
            Event::Received { conn, payload } => {
                let frames = frames::<ToLockd>(&payload.bytes).into_iter();
                self.gather(sim, frames.map(|frame| Input::Received(ConnectionId(conn.0), frame)));
            }
            Event::Task(task) => {
                self.settle(sim);
                if let Some(ended) = self.tasks.poll(task) {
                    self.on_ended(sim, ended);
                }
            }
            Event::Said(bytes) => match PeerMessage::decode(&bytes) {
                Ok(message) => self.gather(sim, [Input::Peer(message)]),
                Err(what) => sim.violation(format!("a lockd said what none says: {what}")),
            },
            Event::Ask(Ask::Transfer(to)) => self.gather(sim, [Input::Transfer(to)]),
            Event::Ask(Ask::Change(change)) => self.gather(sim, [Input::Change(change)]),
            Event::Connected { .. } | Event::Ended(_) | Event::Ask(_) => {}
        }
    }

    fn open(&mut self, sim: &mut Sim) {
        let (storage, fresh_id) = (sim.local(self.id, self.seat), sim.draw());
        let (alone, broken) = (self.is_alone(sim), sim.plan.canaries.lockd);
        let options = StoreOptions { fresh_id, log_bytes: LOG_BYTES_MIN, broken };
        let first = move |id| match alone {
            true => Base::alone(ClusterId(fresh_id), id, String::new(), Replicated::first_state()),
            false => Base::empty(),
        };
        self.tasks.spawn(async move { Ended::Opened(ReplicaLog::open(storage, options, first).await) });
    }

    fn is_alone(&self, sim: &Sim) -> bool {
        sim.plan.lockds.len() == 1
    }

    fn on_ended(&mut self, sim: &mut Sim, ended: Ended) {
        match ended {
            Ended::Opened(Ok((log, saved))) => self.begin(sim, log, saved),
            Ended::Opened(Err(StoreError::Busy)) => sim.tell(AGAIN, self.id, Event::Timer(OPEN)),
            Ended::Wrote { log, result: Ok(Wrote { number, .. }) } => {
                self.log = Some(log);
                match number {
                    Some(number) => self.step(sim, Input::Durable { number }),
                    None => self.write(sim),
                }
            }
            Ended::Opened(Err(error)) | Ended::Wrote { result: Err(error), .. } => {
                let damaged = matches!(error, StoreError::Corrupt { .. } | StoreError::Version { .. });
                self.fail(sim, &error.to_string(), damaged);
            }
        }
    }

    fn begin(&mut self, sim: &mut Sim, log: Log, saved: Saved) {
        let node = Name::new(lockd_address(self.seat)).expect("a valid name");
        let config = ReplicaConfig {
            timing: sim.plan.elections,
            seed: u64::from(self.id.0),
            broken: sim.plan.canaries.lockd,
        };
        let (now, id) = (sim.clock(self.host), saved.id);
        match Replicated::new(now, config, node, self.id.0, saved) {
            Ok(core) => (self.core, self.log) = (Some(core.breaking(sim.plan.canaries.table)), Some(log)),
            Err(error) => return self.fail(sim, &error.to_string(), true),
        }
        if sim.group.opened(self.seat, id) {
            sim.tally.reached("a lockd came back with an empty disk");
        }
        if !self.is_alone(sim) {
            sim.net.listen(&lockd_address(self.seat), self.id, self.host);
        }
        self.step(sim, Input::Tick);
    }

    /// Its disk failed it: it ends. Without a fault of the medium that must not happen, and damage never.
    fn fail(&mut self, sim: &mut Sim, error: &str, damaged: bool) {
        if damaged || !sim.group.failing.contains(&self.seat) {
            sim.violation(format!("lockd {} on a sound medium: {error}", self.seat));
        }
        sim.tally.reached("a lockd ended because its disk failed it");
        sim.exit(self.id, error.to_owned());
    }

    /// Takes in what came, and settles it at once, or with what else comes at this instant, or in the next moment.
    fn gather(&mut self, sim: &mut Sim, inputs: impl IntoIterator<Item = Input>) {
        if self.core.is_none() {
            return;
        }
        for input in inputs {
            self.take_in(sim, input);
        }
        if std::mem::replace(&mut self.gathers, true) {
            return;
        }
        match self.rng.below(4) {
            0 | 1 => return self.settle(sim),
            2 => sim.tell(0, self.id, Event::Timer(SETTLE)),
            _ => sim.tell(1 + self.rng.below(GATHERS_FOR), self.id, Event::Timer(SETTLE)),
        }
        if self.gathered > 0 && std::mem::take(&mut sim.kill_gathering) {
            sim.kill(self.id);
        }
    }

    fn take_in(&mut self, sim: &mut Sim, input: Input) {
        let Some(core) = &mut self.core else { return };
        let is_request = matches!(input, Input::Received(..));
        let (before, mut out) = (core.lockd().in_flight(), Vec::new());
        if let Err(error) = core.take_in(sim.clock(self.host), input, &mut out) {
            return self.fail(sim, &error.to_string(), true);
        }
        self.gathered += usize::from(is_request && core.lockd().in_flight() > before);
        self.carry_out(sim, out);
    }

    fn settle(&mut self, sim: &mut Sim) {
        let Some(core) = self.core.as_mut().filter(|_| std::mem::take(&mut self.gathers)) else { return };
        let mut out = Vec::new();
        if let Err(error) = core.settle(sim.clock(self.host), &mut out) {
            return self.fail(sim, &error.to_string(), true);
        }
        let requests = std::mem::take(&mut self.gathered);
        sim.tally.did("times that a lockd gathered and settled", 1);
        if requests > 1 && holds_all(&out, requests) {
            sim.tally.reached("several requests became one write");
            sim.tally.did("requests that shared a write", requests as u64);
        }
        self.carry_out(sim, out);
        self.write(sim);
    }

    fn step(&mut self, sim: &mut Sim, input: Input) {
        let Some(core) = &mut self.core else { return };
        let mut out = Vec::new();
        if let Err(error) = core.step(sim.clock(self.host), input, &mut out) {
            return self.fail(sim, &error.to_string(), true);
        }
        self.carry_out(sim, out);
        self.write(sim);
    }

    fn carry_out(&mut self, sim: &mut Sim, out: Vec<Output>) {
        for output in out {
            match output {
                Output::Write(write) => self.waiting.push(write),
                Output::Send(conn, frame) => sim.send(self.id, NetConn(conn.0), &frame),
                Output::Close(conn, _) => sim.close(self.id, NetConn(conn.0)),
                // Nobody waits for a lockd alone that is about to lead, so it listens only then.
                Output::Leads { .. } if self.is_alone(sim) => {
                    sim.net.listen(&lockd_address(self.seat), self.id, self.host);
                }
                Output::Leads { term } => self.leads(sim, term),
                Output::Denied(_, denied) => sim.violation(denied.to_string()),
                Output::Overslept(_) => sim.tally.reached("a lockd came late and began every lease anew"),
                _ if self.is_alone(sim) => {
                    sim.violation("a lockd alone has no others to deal with".to_owned());
                }
                Output::Peer(message) => sim.say(self.host, &message),
                Output::Follows => sim.tally.did("lockds deposed", 1),
                Output::Members(_) => sim.tally.did("groups of lockds seen", 1),
                Output::Refused(_) => {}
                Output::Call(..) | Output::Say(..) | Output::HangUp(_) => {
                    sim.violation("no lockspace moves".to_owned());
                }
            }
        }
    }

    fn leads(&mut self, sim: &mut Sim, term: u64) {
        let Some(id) = self.replica().map(Replica::id) else { return };
        let verdict = sim.group.leads(term, id);
        if sim.judge(verdict) == Some(true) {
            sim.tally.reached("another lockd led");
        }
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

/// Whether one write has so many commands, and there is no other.
fn holds_all(out: &[Output], commands: usize) -> bool {
    let mut writes = out.iter().filter_map(|output| match output {
        Output::Write(write) => Some(write),
        _ => None,
    });
    // Before them stands what the replica promised.
    let one = matches!(writes.next(), Some(Write::Append { items, .. }) if items.len() > commands);
    one && writes.next().is_none()
}
