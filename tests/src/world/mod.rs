//! The loop that makes the world go round, and what people do in it.
//!
//! One event at a time: a process gets it, its orders are carried out, whatever procedure can go on goes on, and what it
//! asked of the disks gets its time. A stopped process gets its events when it is let go on; a killed one never.
//!
//! - `events`: what happens next; `life`: processes come and go; `disk`: operations take their time;
//! - `guests`: virtual machines that write, flush, trim and read; `operators`: people and what they ask;
//! - `lockds`: their group, what befalls one of them, and who looks after it;
//! - `mutex`: worlds of lockds and a register alone;
//! - `scene`: worlds driven by hand; `storm`: faults; `ending`: calm, then everything is looked at, down to the medium.

mod disk;
mod ending;
mod events;
mod guests;
mod life;
mod lockds;
mod mutex;
mod operators;
mod scene;
mod storm;

use std::collections::{BTreeMap, VecDeque};

use csnap_server::term::create_pool;
use csnap_storage::sim::{OperationKind, SimDisk, SimNode, executor};

pub use self::guests::Guest;
pub use self::operators::{Errand, Operators};
pub use self::scene::Hand;
pub use self::storm::Undo;
use crate::model::Volume;
use crate::plan::{Plan, Spot};
use crate::process::Process;
use crate::sim::{Event, Happening, HostId, POOL, ProcId, Sim, Spawn};
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
    /// Who runs the lockds looks after them.
    Lockds,
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
    /// The longest that a client stood in a queue for a lock, microseconds.
    pub longest_turn: u64,
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
    seen: Vec<u64>,
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
        let seen = sim.disks.iter().map(SimDisk::operations).collect();
        let mut world = Self {
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
        };
        world.form_group();
        world
    }

    /// The whole life of the world of a plan: start, storm, calm, and a last look at everything.
    #[must_use]
    pub fn run(plan: Plan) -> Outcome {
        let mut world = Self::new(plan);
        world.start();
        world.make_volumes();
        let until = world.sim.now() + world.sim.plan.storm;
        world.begin_work();
        world.begin_contention();
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
            lasted: self.sim.now(),
            violation: self.sim.violation,
            longest_wait: self.sim.longest_wait,
            longest_turn: self.sim.group.longest_turn,
            tally: self.sim.tally,
            trace: self.sim.trace.unwrap_or_default(),
        }
    }

    /// Starts the lockds and every node.
    pub fn start(&mut self) {
        self.start_lockds();
        for node in 0..self.sim.plan.nodes {
            self.sim.spawn(HostId(node), Spawn::Agent);
        }
        self.settle();
    }

    fn undo_later(&mut self, wait: u64, undo: Undo) {
        self.sim.queue.push_in(wait, Happening::Script(Script::Undo(undo)));
    }

    fn script_later(&mut self, wait: u64, script: Script) {
        self.sim.queue.push_in(wait, Happening::Script(script));
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
