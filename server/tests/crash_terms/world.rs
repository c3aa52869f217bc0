//! One seed, one world: processes come, race, freeze, die; the power fails; and from many of the disks that could be left
//! at any moment somebody recovers.

use std::collections::{BTreeMap, BTreeSet};

use csnap_proto::{PoolId, Term, Time};
use csnap_server::term::canary::Canaries;
use csnap_server::term::{Follower, PoolToml, TermError, create_pool, take_over};
use csnap_storage::sim::executor::{Task, run};
use csnap_storage::sim::{Fault, FaultError, OperationKind, Rng, SimDisk, SimNode};

use crate::ledger::{Ledger, Log};
use crate::life::{Plan, Shared, live, open};

/// Steps of a world: enough for half a dozen terms.
const STEPS: u64 = 1500;
/// Disks left by a power cut that are looked at per moment.
const CRASH_STATES: u64 = 3;
/// Processes at once.
const ALIVE_MAX: usize = 3;
/// Small segments, so that they end often.
pub(crate) const SEGMENT_BYTES: u64 = 24 << 10;

#[derive(Clone)]
pub(crate) struct Options {
    pub(crate) canaries: Canaries,
    /// Syncs fail now and then.
    pub(crate) faults: bool,
    /// At how many of its moments a world's power is cut to see what is left.
    pub(crate) power_cuts: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self { canaries: Canaries::default(), faults: false, power_cuts: 0.3 }
    }
}

pub(crate) struct Outcome {
    pub(crate) states: BTreeSet<u64>,
    pub(crate) reached: BTreeMap<&'static str, u64>,
    pub(crate) digest: u64,
}

struct World<'a> {
    options: &'a Options,
    rng: Rng,
    disk: SimDisk,
    shared: Shared,
    processes: Vec<Process>,
    /// Who runs while the others wait: races are lost by whoever stops at the wrong moment for long enough.
    runner: Option<SimNode>,
    started: u64,
    states: BTreeSet<u64>,
}

struct Process {
    node: SimNode,
    task: Task<'static, ()>,
    /// Steps during which nothing that it asked for is answered.
    frozen: u64,
}

pub(crate) fn new_pool(seed: u64) -> SimDisk {
    let disk = SimDisk::new(seed);
    let mut toml = PoolToml::new(PoolId([9; 16]), false);
    toml.segment_bytes = SEGMENT_BYTES;
    run(create_pool(&disk.storage(SimNode(0)), &toml)).unwrap_or_else(|error| panic!("{error}"));
    disk
}

pub(crate) fn explore(seed: u64, options: &Options) -> Result<Outcome, String> {
    let disk = new_pool(seed);
    disk.set_stepped(true);
    let shared = Shared { canaries: options.canaries.clone(), faults: options.faults, ..Shared::default() };
    let rng = Rng::new(seed);
    let (processes, states) = (Vec::new(), BTreeSet::new());
    let mut world = World { options, rng, disk, shared, processes, runner: None, started: 0, states };
    for step in 0..STEPS {
        world.step();
        world.check().map_err(|violation| format!("step {step}: {violation}"))?;
    }
    let digest = world.disk.digest();
    let reached = world.shared.ledger.borrow().reached.clone();
    Ok(Outcome { states: world.states, reached, digest })
}

impl World<'_> {
    fn step(&mut self) {
        let alive = self.processes.len();
        if alive == 0 || (alive < ALIVE_MAX && self.rng.chance(0.05)) {
            self.start();
        }
        if self.rng.chance(0.003) {
            let index = self.rng.index(self.processes.len());
            let process = self.processes.swap_remove(index);
            self.disk.crash_node(process.node);
            self.reach("process killed");
        }
        if self.rng.chance(0.001) {
            let seed = self.rng.next_u64();
            self.disk.power_loss(seed);
            self.processes.clear();
            self.reach("power cut");
        }
        if self.rng.chance(0.01)
            && let Some(process) = self.processes.first_mut()
        {
            process.frozen = self.rng.below(200);
            self.reach("process frozen");
        }
        self.complete_one();
        for process in &mut self.processes {
            process.frozen = process.frozen.saturating_sub(1);
        }
        self.processes.retain_mut(|process| !process.task.poll());
    }

    fn start(&mut self) {
        self.started += 1;
        let node = SimNode(self.started);
        let rng = &mut self.rng;
        // Short lives make takeovers meet; longer ones make something to take over.
        let length = if rng.chance(0.5) { 2 } else { 8 };
        let batches: Vec<usize> = (0..1 + rng.below(length)).map(|_| 8 + rng.index(9000)).collect();
        let checkpoints = (0..rng.below(3)).map(|_| rng.index(batches.len())).collect();
        let plan = Plan { follows: rng.below(4), batches, checkpoints };
        let task = Task::new(live(self.disk.storage(node), self.shared.clone(), plan));
        self.processes.push(Process { node, task, frozen: 0 });
        if self.options.faults && self.rng.chance(0.7) {
            let kind =
                [OperationKind::Sync, OperationKind::Sync, OperationKind::SyncDir, OperationKind::Write]
                    [self.rng.index(4)];
            let nth = 1 + self.rng.below(25);
            self.disk.fail(Fault { node: Some(node), ..Fault::once(kind, nth, FaultError::Io) });
            self.reach("failure in wait");
        }
    }

    fn complete_one(&mut self) {
        let frozen: BTreeSet<SimNode> =
            self.processes.iter().filter(|process| process.frozen > 0).map(|process| process.node).collect();
        let mut ready: Vec<_> =
            self.disk.pending().into_iter().filter(|pending| !frozen.contains(&pending.node)).collect();
        if self.rng.chance(0.05) {
            let index = self.rng.index(ready.len().max(1));
            self.runner = ready.get(index).map(|pending| pending.node);
        }
        if ready.iter().any(|pending| Some(pending.node) == self.runner) && self.rng.chance(0.95) {
            ready.retain(|pending| Some(pending.node) == self.runner);
        }
        if !ready.is_empty() {
            let chosen = ready[self.rng.index(ready.len())].id;
            self.disk.complete(chosen);
        }
    }

    fn reach(&self, what: &'static str) {
        self.shared.ledger.borrow_mut().reach(what);
    }

    /// The law, now and after a power cut at this moment.
    fn check(&mut self) -> Result<(), String> {
        if let Some(violation) = &self.shared.ledger.borrow().violation {
            return Err(violation.clone());
        }
        if !self.rng.chance(self.options.power_cuts) {
            return Ok(());
        }
        let seed = self.rng.next_u64();
        for disk in self.disk.crash_states(CRASH_STATES, seed) {
            let fresh = self.states.insert(disk.digest());
            if fresh {
                let again = if self.rng.chance(0.2) { 1 + self.rng.below(3) } else { 0 };
                let ledger = self.shared.ledger.borrow();
                let first = Term(self.shared.terms.get() + 1);
                recover(&disk, &ledger, &self.options.canaries, first, again, &mut self.rng)?;
            }
        }
        Ok(())
    }
}

/// Takes over on a disk that nobody else uses, after being interrupted `interruptions` times at some await.
pub(crate) fn recover(
    disk: &SimDisk,
    ledger: &Ledger,
    canaries: &Canaries,
    first: Term,
    interruptions: u64,
    rng: &mut Rng,
) -> Result<(), String> {
    let mut term = first;
    for _ in 0..interruptions {
        disk.set_stepped(true);
        let storage = disk.storage(SimNode(term.0));
        let mut task = Task::new(async move {
            let pool = open(&storage, canaries).await;
            let follower = Follower::new(&pool, Log::default());
            take_over(&pool, term, follower, || Time(0)).await.map(|taken| taken.replay)
        });
        task.run_operations(disk, rng.below(80));
        drop(task);
        if rng.chance(0.5) {
            disk.power_loss(rng.next_u64());
        } else {
            disk.crash_node(SimNode(term.0));
        }
        term = term.next();
    }
    disk.set_stepped(false);
    let storage = disk.storage(SimNode(term.0));
    let taken = run(async {
        let pool = open(&storage, canaries).await;
        take_over(&pool, term, Follower::new(&pool, Log::default()), || Time(0))
            .await
            .map(|taken| taken.replay)
    });
    match taken {
        Ok(log) => match ledger.problem_with(term, &log.ids) {
            None => Ok(()),
            Some(problem) => Err(format!("after a power cut and {interruptions} interruptions: {problem}")),
        },
        // The interrupted ones may have left a name beyond ours only if numbers were given twice.
        Err(error @ (TermError::Deposed(_) | TermError::Used(_))) => Err(format!("recovering: {error}")),
        Err(error) => Err(format!("after a power cut and {interruptions} interruptions: {error}")),
    }
}
