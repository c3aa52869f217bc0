//! What the disks are asked for: the time that it takes, and the traps that lie there.

use csnap_storage::sim::OperationKind;

use super::{Deed, FREEZE_MAX, Script, Slot, Trap, Undo, World};
use crate::plan::Spot;
use crate::process::Process;
use crate::sim::{Happening, POOL, ProcId};

impl World {
    /// Operations that were asked for since get the time that they will take.
    pub(super) fn give_time(&mut self) {
        for disk in 0..self.sim.disks.len() {
            let submitted = self.sim.disks[disk].operations();
            if submitted == self.seen[disk] {
                continue;
            }
            for operation in self.sim.disks[disk].pending_since(self.seen[disk]) {
                let proc = ProcId(u32::try_from(operation.node.0).expect("nodes are processes"));
                let (id, kind, path) = (operation.id, operation.kind, operation.path);
                let mut at = self.sim.now() + self.time_of(proc, kind);
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
}
