//! The life of a world of [`crate::mutex`]: lockds, a register and its clients.

use super::World;
use crate::mutex::Sum;
use crate::plan::Plan;
use crate::process::Process;
use crate::process::holder::HolderProc;
use crate::sim::{HostId, ProcId, Spawn};

/// A stopped client goes on after this at most, microseconds: some leases later.
const STOPPED: u64 = 900_000;

/// Once calm has come every client writes again within this, microseconds: an election, a lease, and two others in the queue.
const PATIENCE: u64 = 10_000_000;

impl World {
    /// The whole life of such a world.
    #[must_use]
    pub fn run_mutex(plan: Plan) -> Sum {
        let mut world = Self::new(plan);
        world.sim.mutex.register.careless = world.sim.plan.canaries.careless_register;
        let holders = world.sim.plan.holders;
        world.start_lockds();
        world.sim.spawn(HostId(holders), Spawn::Register);
        (0..holders).for_each(|host| {
            world.sim.spawn(HostId(host), Spawn::Holder);
        });
        world.settle();
        world.begin_storm();
        let until = world.sim.now() + world.sim.plan.storm;
        world.run_until(until, |_| false);
        world.calm_down();
        let before: Vec<(ProcId, u64)> = world.holders().map(|(id, h)| (id, h.acknowledged)).collect();
        let until = world.sim.now() + PATIENCE;
        let writes_again = |world: &Self| {
            let now = world.holders().map(|(id, holder)| (id, holder.acknowledged));
            now.zip(&before).all(|((_, now), (_, before))| now > *before)
        };
        if !world.run_until(until, writes_again) && world.sim.violation.is_none() {
            world.sim.violation(format!("not within {PATIENCE} us of calm: every client writes again"));
        }
        let verdict = world.sim.mutex.check();
        world.sim.judge(verdict);
        world.mutex_sum()
    }

    fn mutex_sum(self) -> Sum {
        let (mutex, tally) = (&self.sim.mutex, &self.sim.tally);
        Sum {
            worlds: 1,
            grants: mutex.grants(),
            acknowledged: mutex.acknowledged(),
            refused: mutex.register.refused,
            stopped: tally.count("holders stopped"),
            faults: tally.faults.values().sum(),
            failures: self.sim.violation.iter().map(|what| (self.sim.plan.seed, what.clone())).collect(),
        }
    }

    fn holders(&self) -> impl Iterator<Item = (ProcId, &HolderProc)> {
        self.procs.iter().filter_map(|(id, slot)| match &slot.process {
            Some(Process::Holder(holder)) => Some((*id, &**holder)),
            _ => None,
        })
    }

    /// Whoever has the lock, past its lease or not so long.
    pub(super) fn pause_holder(&mut self) -> bool {
        let holder = self.holders().find(|(id, holder)| holder.holds() && !self.sim.is_paused(*id));
        let Some((proc, _)) = holder else { return false };
        self.sim.tally.did("holders stopped", 1);
        self.pause_for(proc, STOPPED);
        true
    }
}
