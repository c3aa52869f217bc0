//! Worlds of lockds, a register that refuses old terms, and its clients, without nodes: small, so that there can be many.
//!
//! Clients take the lock, read, write under the lock's term, and are stopped past their lease at any point of it, as are lockds.
//! What must be true whatever happens is [`crate::model::mutex`]'s; once calm has come every client must get the lock again.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use csnap_lockd::replica::Timing;
use csnap_storage::sim::Rng;

use crate::net::Weather;
use crate::plan::{Canaries, Fault, Plan};
use crate::sim::HostId;
use crate::world::World;

/// How long the storm of such a world lasts, microseconds: some leases.
const STORM: u64 = 3_000_000;

/// Worlds that are run at once.
const THREADS: usize = 2;

/// What may happen to lockds and their hosts.
const FAULTS: [Fault; 12] = [
    Fault::PauseHolder,
    Fault::KillLockd,
    Fault::PauseLockd,
    Fault::Partition,
    Fault::PartitionOneWay,
    Fault::Cut,
    Fault::ClockJumps,
    Fault::ClockStops,
    Fault::PartitionLockds,
    Fault::LockdPowerLoss,
    Fault::LoseLockdDisk,
    Fault::MoveLockd,
];

/// What worlds came to, one or many.
#[derive(Clone, Debug, Default)]
pub struct Sum {
    /// Worlds.
    pub worlds: u64,
    /// Grants of the lock.
    pub grants: u64,
    /// Entries that a client knows to be there.
    pub acknowledged: u64,
    /// Questions with a term that was over.
    pub refused: u64,
    /// Clients that were stopped while they had the lock.
    pub stopped: u64,
    /// Faults.
    pub faults: u64,
    /// Worlds that saw a law broken: seed and what.
    pub failures: Vec<(u64, String)>,
}

impl Sum {
    fn add(&mut self, other: Self) {
        self.worlds += other.worlds;
        self.grants += other.grants;
        self.acknowledged += other.acknowledged;
        self.refused += other.refused;
        self.stopped += other.stopped;
        self.faults += other.faults;
        self.failures.extend(other.failures);
    }
}

/// The plan of a seed.
#[must_use]
pub fn plan(seed: u64, canaries: Canaries) -> Plan {
    let rng = &mut Rng::new(seed ^ 0x6d75_7465_7800);
    let seats = [1, 3, 3, 3, 5][rng.index(5)];
    let holders = 3;
    let mut plan = Plan::calm(seed);
    plan.canaries = canaries;
    (plan.nodes, plan.holders) = (0, holders);
    // Clients, the register, lockds.
    plan.lockds = (0..seats).map(|seat| HostId(holders + 1 + seat)).collect();
    plan.hosts = holders + 1 + seats;
    plan.elections = if rng.chance(0.5) { Timing::FAST } else { Timing::DEFAULT };
    plan.drift_ppm = [0, 5_000, 10_000][rng.index(3)];
    plan.weather = Weather {
        delay: 30 + rng.below(400),
        jitter: [10, 1000, 5000][rng.index(3)],
        loss: [0.0, 0.0, 0.01][rng.index(3)],
    };
    plan.work.volumes.clear();
    plan.storm = STORM;
    plan.fault_every = 150_000 + rng.below(400_000);
    let others = 1 + rng.index(3);
    let more = (0..others).map(|_| FAULTS[rng.index(FAULTS.len())]);
    plan.faults = [Fault::PauseHolder; 2].into_iter().chain(more).collect();
    // One alone has nobody to be moved to.
    plan.faults.retain(|fault| seats > 1 || !Fault::OF_GROUPS.contains(fault));
    plan
}

/// One world.
#[must_use]
pub fn one(plan: Plan) -> Sum {
    let seed = plan.seed;
    let run = catch_unwind(AssertUnwindSafe(|| World::run_mutex(plan)));
    run.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Sum {
            worlds: 1,
            failures: vec![(seed, format!("panic: {}", text.unwrap_or_default()))],
            ..Sum::default()
        }
    })
}

/// The worlds of `seeds`, on two threads. Stops early once `enough` of them went wrong.
#[must_use]
pub fn run(seeds: std::ops::Range<u64>, enough: usize, shape: impl Fn(u64) -> Plan + Sync) -> Sum {
    let next = AtomicU64::new(seeds.start);
    let sum = Mutex::new(Sum::default());
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let over = sum.lock().is_ok_and(|sum| sum.failures.len() >= enough);
                    if seed >= seeds.end || over {
                        return;
                    }
                    let world = one(shape(seed));
                    if let Ok(mut sum) = sum.lock() {
                        sum.add(world);
                    }
                }
            });
        }
    });
    let mut sum = sum.into_inner().unwrap_or_default();
    sum.failures.sort_by_key(|(seed, _)| *seed);
    sum
}
