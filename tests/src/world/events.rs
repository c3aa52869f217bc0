//! One event after the other: what happens next, and who is told.

use csnap_storage::sim::OperationKind;

use super::{Deed, Script, TICK_AGAIN, TRACE_MAX, World};
use crate::process::Process;
use crate::sim::{Event, Happening, HostId, POOL, ProcId};

impl World {
    /// Lets time pass until `until`, or until `done`. False if that did not come, or a law was broken.
    pub fn run_until(&mut self, until: u64, done: impl Fn(&Self) -> bool) -> bool {
        while self.sim.violation.is_none() {
            if done(self) {
                return true;
            }
            match self.sim.queue.next_at() {
                Some(at) if at <= until => self.happen(),
                _ => {
                    self.sim.queue.pass(until);
                    return false;
                }
            }
        }
        false
    }

    fn happen(&mut self) {
        let Some(what) = self.sim.queue.pop() else { return };
        let sim = &mut self.sim;
        let told = match what {
            Happening::Arrive { conn, side } => sim.net.arrive(conn, side, &mut sim.queue),
            Happening::GiveUp { conn, side, since } => sim.net.give_up(conn, side, since, &mut sim.queue),
            Happening::Keepalive { conn, side } => sim.net.keepalive(conn, side, &mut sim.queue),
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
            Script::Lockds => self.look_after_lockds(),
            Script::Restart { host, what } => {
                if self.sim.find(host, what.name()).is_none() {
                    self.sim.spawn(host, what);
                }
            }
        }
    }

    /// Gives a process an event, now or when it is let go on.
    pub(super) fn tell(&mut self, proc: ProcId, event: Event) {
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

    pub(super) fn foresee_tick(&mut self, proc: ProcId, at_least: u64) {
        let Some(slot) = self.procs.get_mut(&proc) else { return };
        let Some(deadline) = slot.process.as_ref().and_then(Process::deadline) else { return };
        let sim = &mut self.sim;
        let at = sim.clocks[slot.host.0].when(sim.now(), deadline).max(sim.now() + at_least);
        if slot.next_tick.is_none_or(|known| at < known) {
            slot.next_tick = Some(at);
            sim.queue.push(at, Happening::Tell { proc, event: Event::Tick });
        }
    }

    /// Carries out orders and lets procedures go on until there is nothing left to do at this instant.
    pub(super) fn settle(&mut self) {
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
}
