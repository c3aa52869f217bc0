//! Processes: started, stopped, let go on, killed, and started again.

use std::collections::VecDeque;

use csnap_storage::sim::SimNode;

use super::{RESTART, Script, Slot, World};
use crate::process::Process;
use crate::sim::{Event, Happening, HostId, Order, ProcId, Spawn};

impl World {
    pub(super) fn carry_out(&mut self, order: Order) {
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
    pub(super) fn kill(&mut self, proc: ProcId, silent: bool) {
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
                if lockd.gathered() > 0 {
                    sim.tally.reached("lockd was killed with requests gathered and not settled");
                }
            }
            Some(Process::Contender(contender)) => contender.on_killed(sim),
            Some(Process::Server(server)) if server.is_taking_over() => {
                sim.tally.reached("a server was killed while it took over");
            }
            _ => {}
        }
        drop(slot.process);
        sim.net.bury(proc, silent, &mut sim.queue);
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
        self.sim.queue.push_in(wait, Happening::Script(Script::Restart { host, what }));
    }

    /// Stops a process.
    pub(super) fn pause(&mut self, proc: ProcId) {
        if self.procs.contains_key(&proc) {
            self.sim.note(|| format!("process {} is stopped", proc.0));
            self.sim.paused.insert(proc);
        }
    }

    /// Lets a process go on: what waited for it comes first, then it looks at the clock.
    pub(super) fn thaw(&mut self, proc: ProcId) {
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
}
