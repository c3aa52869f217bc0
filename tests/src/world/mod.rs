//! The loop that makes the world go round, and what people do in it.
//!
//! One event at a time: a process gets it, its orders are carried out, whatever procedure can go on goes on, and what it
//! asked of the disks gets its time. A stopped process gets its events when it is let go on; a killed one never.
//!
//! - `guests`: virtual machines that write, flush, trim and read; `operators`: people and what they ask;
//! - `scene`: worlds driven by hand; `storm`: faults; `ending`: calm, then everything is looked at, down to the medium.

mod ending;
mod guests;
mod operators;
mod scene;
mod storm;

use std::collections::{BTreeMap, VecDeque};

use csnap_server::term::create_pool;
use csnap_storage::sim::{OperationKind, SimNode, executor};

pub use self::guests::Guest;
pub use self::operators::{Errand, Operators};
pub use self::scene::Hand;
pub use self::storm::Undo;
use crate::model::Volume;
use crate::plan::{Plan, Spot};
use crate::process::Process;
use crate::sim::{Event, Happening, HostId, LOCAL, Order, POOL, ProcId, Sim, Spawn};
use crate::tally::Tally;

/// A tick that changed nothing comes again after this at the earliest, microseconds: no core may spin.
const TICK_AGAIN: u64 = 100;

/// A process that died is started again by `csnap up` after this at least, microseconds.
const RESTART: u64 = 50_000;

/// Longest time that a server is stopped for another one's takeover, microseconds.
const FREEZE_MAX: u64 = 5_000_000;

/// Longest trace that is kept, lines.
const TRACE_MAX: usize = 2_000_000;

/// What the world does by itself.
#[derive(Debug)]
pub enum Script {
    /// A guest looks what it can do.
    Guest(usize),
    /// An operator looks what to do.
    Operators,
    /// The next fault.
    Fault,
    /// A fault ends.
    Undo(Undo),
    /// A trap springs.
    Strike { deed: Deed, proc: ProcId },
    /// A daemon is started again.
    Restart { host: HostId, what: Spawn },
}

struct Slot {
    process: Option<Process>,
    host: HostId,
    /// Events while it is stopped.
    backlog: VecDeque<Event>,
    next_tick: Option<u64>,
    agent: Option<ProcId>,
}

/// What a world came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// A number over all that happened.
    pub digest: u64,
    /// Counts.
    pub tally: Tally,
    /// Virtual time, microseconds.
    pub lasted: u64,
    /// The first law that was broken.
    pub violation: Option<String>,
    /// The longest that a guest waited, microseconds.
    pub longest_wait: u64,
    /// The trace, if it was kept.
    pub trace: Vec<String>,
}

/// See the module.
pub struct World {
    /// What processes see.
    pub sim: Sim,
    procs: BTreeMap<ProcId, Slot>,
    guests: Vec<Guest>,
    operators: Operators,
    last_attachment: u64,
    /// Operations of each disk that were given their time.
    seen: [u64; 2],
    /// Nothing new is begun.
    calm: bool,
    /// What befalls a server at one of its operations.
    trap: Option<Trap>,
    /// Lockd is killed at its next operation.
    lockd_trap: bool,
    /// The power is lost at the next write to a head.
    power_trap: bool,
    /// Where a process is stopped.
    stop_at: Option<(ProcId, OperationKind, &'static str)>,
    trapped: Option<ProcId>,
}

/// Something that befalls a server at one of its operations of the pool.
#[derive(Clone, Copy, Debug)]
pub struct Trap {
    /// At which.
    pub spot: Spot,
    /// Of servers that take over, or of those that serve.
    pub taking_over: bool,
    /// What.
    pub deed: Deed,
}

/// See [`Trap`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// It is stopped, with its agent, for so long, microseconds.
    Freeze(u64),
    /// It is killed.
    Kill,
    /// Everything loses its power.
    PowerLoss,
    /// It is stopped, with its agent, until another server takes over and comes to this operation of that.
    FreezeUntilTakeover(Spot),
    /// Servers that were stopped so go on, their agents only later.
    Release,
}

impl World {
    /// A world with a pool and nothing running.
    #[must_use]
    pub fn new(plan: Plan) -> Self {
        let sim = Sim::new(plan);
        let storage = sim.disks[POOL].storage(SimNode(0));
        sim.disks[POOL].set_stepped(false);
        let pool = executor::run(create_pool(&storage, &sim.plan.pool)).expect("an empty disk takes a pool");
        assert_eq!(pool.toml, sim.plan.pool);
        sim.disks[POOL].set_stepped(true);
        let seen = [sim.disks[POOL].operations(), sim.disks[LOCAL].operations()];
        Self {
            sim,
            procs: BTreeMap::new(),
            guests: Vec::new(),
            operators: Operators::default(),
            last_attachment: 0,
            seen,
            calm: false,
            trap: None,
            lockd_trap: false,
            power_trap: false,
            stop_at: None,
            trapped: None,
        }
    }

    /// The whole life of the world of a plan: start, storm, calm, and a last look at everything.
    #[must_use]
    pub fn run(plan: Plan) -> Outcome {
        let mut world = Self::new(plan);
        world.start();
        world.make_volumes();
        let until = world.sim.now + world.sim.plan.storm;
        world.begin_work();
        world.begin_storm();
        world.run_until(until, |_| false);
        world.end_all();
        world.outcome()
    }

    /// What it came to.
    #[must_use]
    pub fn outcome(self) -> Outcome {
        Outcome {
            seed: self.sim.plan.seed,
            digest: self.sim.digest(),
            lasted: self.sim.now,
            violation: self.sim.violation,
            longest_wait: self.sim.longest_wait,
            tally: self.sim.tally,
            trace: self.sim.trace.unwrap_or_default(),
        }
    }

    /// Starts lockd and every node.
    pub fn start(&mut self) {
        let lockd = HostId(self.sim.plan.nodes);
        self.sim.spawn(lockd, Spawn::Lockd);
        for node in 0..self.sim.plan.nodes {
            self.sim.spawn(HostId(node), Spawn::Agent);
        }
        self.settle();
    }

    /// Lets time pass until `until`, or until `done`. False if that did not come, or a law was broken.
    pub fn run_until(&mut self, until: u64, done: impl Fn(&Self) -> bool) -> bool {
        while self.sim.violation.is_none() {
            if done(self) {
                return true;
            }
            match self.sim.queue.next_at() {
                Some(at) if at <= until => self.happen(),
                _ => {
                    self.sim.now = until;
                    return false;
                }
            }
        }
        false
    }

    fn happen(&mut self) {
        let Some((at, what)) = self.sim.queue.pop() else { return };
        self.sim.now = self.sim.now.max(at);
        let sim = &mut self.sim;
        let told = match what {
            Happening::Arrive { conn, side } => sim.net.arrive(sim.now, conn, side, &mut sim.queue),
            Happening::GiveUp { conn, side, since } => {
                sim.net.give_up(sim.now, conn, side, since, &mut sim.queue)
            }
            Happening::Keepalive { conn, side } => sim.net.keepalive(sim.now, conn, side, &mut sim.queue),
            Happening::Connect { proc, host, address, tag } => self.on_connect(proc, host, &address, tag),
            Happening::Disk { disk, id, kind, path } => {
                self.on_disk(disk, id, kind, &path);
                None
            }
            Happening::Tell { proc, event } => Some((proc, event)),
            Happening::Saved { host, proc, state } => {
                if sim.is_alive(proc) {
                    sim.hosts[host.0].saved = Some(*state);
                }
                None
            }
            Happening::Script(script) => {
                self.on_script(script);
                None
            }
        };
        if let Some((proc, event)) = told {
            self.tell(proc, event);
        }
        self.settle();
    }

    fn on_connect(&mut self, proc: ProcId, host: HostId, address: &str, tag: u64) -> Option<(ProcId, Event)> {
        if !self.sim.is_alive(proc) {
            return None;
        }
        let made = self.sim.net.establish(proc, host, address);
        if let Some((conn, listener)) = made {
            self.tell(listener, Event::Accepted(conn));
        }
        Some((proc, Event::Connected { tag, conn: made.map(|(conn, _)| conn) }))
    }

    fn on_disk(&mut self, disk: usize, id: csnap_storage::sim::OperationId, kind: OperationKind, path: &str) {
        let struck = self.sim.disks[disk].faults_struck();
        self.sim.disks[disk].complete(id);
        if disk == POOL && kind == OperationKind::Sync && self.sim.disks[disk].faults_struck() > struck {
            let now = self.sim.instant();
            if let Some(volume) = self.sim.model.volume_of_head(path) {
                self.sim.model.volumes[volume].sync_failed(now);
            }
        }
    }

    fn on_script(&mut self, script: Script) {
        match script {
            Script::Guest(guest) => self.on_guest(guest),
            Script::Operators => self.on_operators(),
            Script::Fault => self.on_fault(),
            Script::Undo(undo) => self.undo(undo),
            Script::Strike { deed: Deed::PowerLoss, .. } => self.strike(crate::plan::Fault::PowerLoss),
            Script::Strike { proc, .. } => self.kill(proc, false),
            Script::Restart { host, what } => {
                if self.sim.find(host, what.name()).is_none() {
                    self.sim.spawn(host, what);
                }
            }
        }
    }

    /// Gives a process an event, now or when it is let go on.
    fn tell(&mut self, proc: ProcId, event: Event) {
        let Some(slot) = self.procs.get_mut(&proc) else { return };
        if self.sim.paused.contains(&proc) {
            // A stopped process misses ticks, and looks at the clock when it goes on.
            if !matches!(event, Event::Tick) {
                slot.backlog.push_back(event);
            }
            slot.next_tick = None;
            return;
        }
        if matches!(event, Event::Tick) {
            slot.next_tick = None;
            let now = self.sim.clock(slot.host);
            let due = slot.process.as_ref().and_then(Process::deadline).is_some_and(|at| at <= now);
            if !due {
                return self.foresee_tick(proc, 0);
            }
        }
        let ticked = matches!(event, Event::Tick);
        let Some(mut process) = slot.process.take() else { return };
        process.on_event(&mut self.sim, event);
        if let Some(slot) = self.procs.get_mut(&proc) {
            slot.process = Some(process);
        }
        self.foresee_tick(proc, if ticked { TICK_AGAIN } else { 0 });
    }

    fn foresee_tick(&mut self, proc: ProcId, at_least: u64) {
        let Some(slot) = self.procs.get_mut(&proc) else { return };
        let Some(deadline) = slot.process.as_ref().and_then(Process::deadline) else { return };
        let sim = &mut self.sim;
        let at = sim.clocks[slot.host.0].when(sim.now, deadline).max(sim.now + at_least);
        if slot.next_tick.is_none_or(|known| at < known) {
            slot.next_tick = Some(at);
            sim.queue.push(at, Happening::Tell { proc, event: Event::Tick });
        }
    }

    /// Carries out orders and lets procedures go on until there is nothing left to do at this instant.
    fn settle(&mut self) {
        loop {
            if !self.sim.orders.is_empty() {
                for order in std::mem::take(&mut self.sim.orders) {
                    self.carry_out(order);
                }
                continue;
            }
            let Some((proc, task)) = self.sim.ready.pop() else { break };
            self.tell(proc, Event::Task(task));
        }
        self.give_time();
        if self.sim.trace.as_ref().is_some_and(|trace| trace.len() > TRACE_MAX) {
            self.sim.trace = Some(Vec::new());
        }
    }

    fn carry_out(&mut self, order: Order) {
        match order {
            Order::Spawn { id, host, what } => {
                let process = Process::start(&mut self.sim, id, host, &what);
                self.sim.note(|| format!("{} {} starts on host {}", what.name(), id.0, host.0));
                let agent = if let Spawn::Server { agent } = what { Some(agent) } else { None };
                let slot =
                    Slot { process: Some(process), host, backlog: VecDeque::new(), next_tick: None, agent };
                self.procs.insert(id, slot);
                let wait = 1_000 + self.sim.rng.below(10_000);
                self.sim.tell(wait, id, Event::Start);
            }
            Order::Kill(proc) => self.kill(proc, false),
            Order::Exit { proc, why } => {
                self.sim.note(|| format!("process {} ends: {why}", proc.0));
                self.kill(proc, false);
            }
        }
    }

    /// A process is no more; `silent` if its host lost its power.
    fn kill(&mut self, proc: ProcId, silent: bool) {
        let Some(mut slot) = self.procs.remove(&proc) else { return };
        let sim = &mut self.sim;
        let kind = sim.hosts[slot.host.0].alive.remove(&proc).unwrap_or_default();
        sim.note(|| format!("{kind} {} is gone", proc.0));
        sim.paused.remove(&proc);
        sim.taking_over.remove(&proc);
        match &mut slot.process {
            Some(Process::Exporter(exporter)) => exporter.on_killed(sim),
            Some(Process::Lockd(lockd)) if lockd.in_flight() > 0 => {
                sim.tally.reached("lockd was killed with commands in flight");
            }
            Some(Process::Server(server)) if server.is_taking_over() => {
                sim.tally.reached("a server was killed while it took over");
            }
            _ => {}
        }
        drop(slot.process);
        sim.net.bury(sim.now, proc, silent, &mut sim.queue);
        let node = SimNode(u64::from(proc.0));
        sim.disks.iter().for_each(|disk| disk.crash_node(node));
        self.after_death(proc, slot.host, kind, silent);
    }

    /// Who hears of an end, and who is started again.
    fn after_death(&mut self, proc: ProcId, host: HostId, kind: &str, silent: bool) {
        let wait = 100 + self.sim.rng.below(2_000);
        match kind {
            "server" | "exporter" => {
                if let Some(agent) = self.sim.find(host, "agent") {
                    self.sim.tell(wait, agent, Event::Ended(proc));
                }
            }
            "agent" => {
                // Its server dies with it: the kernel sees to that.
                let children: Vec<ProcId> = self
                    .procs
                    .iter()
                    .filter(|(_, slot)| slot.agent == Some(proc))
                    .map(|(id, _)| *id)
                    .collect();
                children.into_iter().for_each(|child| self.kill(child, silent));
                if !silent {
                    self.restart(host, Spawn::Agent);
                }
            }
            "lockd" if !silent => self.restart(host, Spawn::Lockd),
            _ => {}
        }
    }

    fn restart(&mut self, host: HostId, what: Spawn) {
        let wait = RESTART + self.sim.rng.below(4 * RESTART);
        self.sim.queue.push(self.sim.now + wait, Happening::Script(Script::Restart { host, what }));
    }

    /// Stops a process.
    fn pause(&mut self, proc: ProcId) {
        if self.procs.contains_key(&proc) {
            self.sim.note(|| format!("process {} is stopped", proc.0));
            self.sim.paused.insert(proc);
        }
    }

    /// Lets a process go on: what waited for it comes first, then it looks at the clock.
    fn thaw(&mut self, proc: ProcId) {
        if !self.sim.paused.remove(&proc) {
            return;
        }
        self.sim.note(|| format!("process {} goes on", proc.0));
        // One after the other, so that streams keep their order and what it orders comes in between.
        while !self.sim.is_paused(proc)
            && let Some(event) = self.procs.get_mut(&proc).and_then(|slot| slot.backlog.pop_front())
        {
            self.tell(proc, event);
            self.settle();
        }
        self.foresee_tick(proc, 0);
    }

    /// Operations that were asked for since get the time that they will take.
    fn give_time(&mut self) {
        for disk in [POOL, LOCAL] {
            let submitted = self.sim.disks[disk].operations();
            if submitted == self.seen[disk] {
                continue;
            }
            for operation in self.sim.disks[disk].pending_since(self.seen[disk]) {
                let proc = ProcId(u32::try_from(operation.node.0).expect("nodes are processes"));
                let (id, kind, path) = (operation.id, operation.kind, operation.path);
                let mut at = self.sim.now + self.time_of(proc, kind);
                if disk == POOL {
                    at += self.guest_time_of(proc, kind, &path);
                    self.look_at(proc, &path, kind);
                } else if std::mem::take(&mut self.lockd_trap) {
                    self.script_later(5, Script::Strike { deed: Deed::Kill, proc });
                }
                self.sim.queue.push(at, Happening::Disk { disk, id, kind, path });
            }
            self.seen[disk] = submitted;
        }
    }

    fn time_of(&mut self, proc: ProcId, kind: OperationKind) -> u64 {
        let rng = &mut self.sim.rng;
        let usual = match kind {
            OperationKind::Sync | OperationKind::SyncDir => 200 + rng.below(1_500),
            OperationKind::Read | OperationKind::Write => 20 + rng.below(150),
            _ => 10 + rng.below(60),
        };
        let hiccup = if rng.chance(0.002) { 20 } else { 1 };
        let host = self.procs.get(&proc).map_or(0, |slot| slot.host.0);
        usual * hiccup * self.sim.slowness[host]
    }

    /// What an operation of a guest takes beyond that.
    fn guest_time_of(&mut self, proc: ProcId, kind: OperationKind, path: &str) -> u64 {
        let slow = self.sim.plan.slow;
        let most = match kind {
            OperationKind::Write if path.starts_with("head/") => slow.head_write,
            OperationKind::Read if path.starts_with("head/") => slow.head_read,
            OperationKind::Read if path.starts_with("store/") => slow.store_read,
            _ => 0,
        };
        let of_guest = matches!(self.process(proc), Some(Process::Exporter(_)));
        if most > 0 && of_guest && self.sim.rng.chance(0.3) { self.sim.rng.below(most) } else { 0 }
    }

    /// Notes rare things about an operation of the pool, and stops a server where a scenario wants it stopped.
    fn look_at(&mut self, proc: ProcId, path: &str, kind: OperationKind) {
        self.sim.mix(u64::from(proc.0) << 8 ^ kind as u64);
        if self
            .stop_at
            .take_if(|(who, what, begin)| *who == proc && *what == kind && path.starts_with(*begin))
            .is_some()
        {
            self.pause(proc);
        }
        if self.power_trap && kind == OperationKind::Write && path.starts_with("head/") {
            self.script_later(10, Script::Strike { deed: Deed::PowerLoss, proc });
        }
        if kind == OperationKind::Write
            && let Some((_, number)) = path.rsplit_once("/journal-")
            && number != "0"
            && !self.calm
        {
            self.sim.tally.reached("a journal segment was begun under load");
        }
        let Some(trap) = self.trap else { return };
        let Some(Slot { process: Some(Process::Server(server)), agent, .. }) = self.procs.get(&proc) else {
            return;
        };
        let wanted = if trap.taking_over { server.is_taking_over() } else { server.state().is_some() };
        if !wanted || self.sim.is_paused(proc) {
            return;
        }
        let agent = *agent;
        let sprung = match trap.spot {
            Spot::Nth(left) => {
                self.trap = Some(Trap { spot: Spot::Nth(left.saturating_sub(1)), ..trap });
                left <= 1
            }
            Spot::At(wanted, end) => wanted == kind && path.ends_with(end),
        };
        if sprung {
            self.trap = None;
            self.spring(trap.deed, proc, agent);
        }
    }

    fn spring(&mut self, deed: Deed, proc: ProcId, agent: Option<ProcId>) {
        self.sim.note(|| format!("TRAP {deed:?} for server {}", proc.0));
        self.trapped = Some(proc);
        match deed {
            Deed::Freeze(lasts) => {
                let procs: Vec<ProcId> = agent.into_iter().chain([proc]).collect();
                procs.iter().for_each(|proc| self.pause(*proc));
                self.thaw_later(lasts, &procs);
            }
            Deed::FreezeUntilTakeover(spot) => {
                let procs: Vec<ProcId> = agent.into_iter().chain([proc]).collect();
                procs.iter().for_each(|proc| self.pause(*proc));
                // Should nobody take over, they go on all the same.
                self.thaw_later(FREEZE_MAX, &procs);
                self.lay_trap(Trap { spot, taking_over: true, deed: Deed::Release });
            }
            Deed::Release => {
                let is_server = |id: &&ProcId| matches!(self.process(**id), Some(Process::Server(_)));
                let servers: Vec<ProcId> = self.sim.paused.iter().filter(is_server).copied().collect();
                self.undo_later(0, Undo::Thaw(servers));
            }
            Deed::Kill | Deed::PowerLoss => {
                let wait = self.sim.rng.below(300);
                self.script_later(wait, Script::Strike { deed, proc });
            }
        }
    }

    fn undo_later(&mut self, wait: u64, undo: Undo) {
        self.sim.queue.push(self.sim.now + wait, Happening::Script(Script::Undo(undo)));
    }

    fn script_later(&mut self, wait: u64, script: Script) {
        self.sim.queue.push(self.sim.now + wait, Happening::Script(script));
    }

    /// About every `every` microseconds.
    fn about(&mut self, every: u64) -> u64 {
        every / 4 + self.sim.rng.below(every * 3 / 2 + 1)
    }

    /// A server that serves, of the highest term.
    #[must_use]
    pub fn serving(&self) -> Option<ProcId> {
        let serves = |(id, slot): (&ProcId, &Slot)| match &slot.process {
            Some(Process::Server(server)) if server.state().is_some() => Some((server.term(), *id)),
            _ => None,
        };
        self.procs.iter().filter_map(serves).max().map(|(_, id)| id)
    }

    /// Lays a trap.
    pub fn lay_trap(&mut self, trap: Trap) {
        self.trap = Some(trap);
    }

    /// Whether the last trap has sprung.
    #[must_use]
    pub fn has_sprung(&self) -> bool {
        self.trap.is_none()
    }

    /// A process, while it runs.
    #[must_use]
    pub fn process(&self, proc: ProcId) -> Option<&Process> {
        self.procs.get(&proc)?.process.as_ref()
    }

    /// The volume with this index in the model.
    #[must_use]
    pub fn volume(&self, index: usize) -> &Volume {
        &self.sim.model.volumes[index]
    }

    fn next_attachment(&mut self) -> u64 {
        self.last_attachment += 1;
        self.last_attachment
    }
}
