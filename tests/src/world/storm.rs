//! Faults: each begins, and most of them end after a while. When the storm is over everything heals at once.

use csnap_storage::sim::{Fault as DiskFault, FaultError, OperationKind};

use super::{Deed, Script, Trap, World};
use crate::plan::{Fault, Spot};
use crate::process::Process;
use crate::sim::{HostId, POOL, ProcId, Spawn};

/// Operations of a takeover, about.
const TAKEOVER_OPERATIONS: u64 = 60;

/// The steps of a takeover that matter: our gate; their gate; whom they name; our Seal; our gate again.
const SPOTS: [(OperationKind, &str); 9] = [
    (OperationKind::Create, "/gate"),
    (OperationKind::Open, "/successor"),
    (OperationKind::Link, "/successor"),
    (OperationKind::Open, "/gate"),
    (OperationKind::Write, "/gate"),
    (OperationKind::Stat, "/journal-0"),
    (OperationKind::Write, "/journal-0"),
    (OperationKind::Sync, "/journal-0"),
    (OperationKind::Read, "/gate"),
];

/// What ends a fault.
#[derive(Clone, Debug)]
pub enum Undo {
    /// These go on.
    Thaw(Vec<ProcId>),
    /// Every partition heals.
    Heal,
    /// Disks are as fast as before.
    Fast,
    /// A host comes back.
    Light(HostId),
    /// The pool takes more again.
    Room,
    /// A clock goes on.
    Clock(HostId),
    /// The power is back.
    Power,
    /// A lockd starts again.
    Lockd(usize),
    /// A lockd's disk is sound and has room.
    LockdDisk(usize),
}

impl World {
    pub(super) fn begin_storm(&mut self) {
        if !self.sim.plan.faults.is_empty() {
            let wait = self.about(self.sim.plan.fault_every) + 1_000_000;
            self.script_later(wait, Script::Fault);
        }
    }

    pub(super) fn on_fault(&mut self) {
        if self.calm {
            return;
        }
        let faults = &self.sim.plan.faults;
        let fault = faults[self.sim.rng.index(faults.len())];
        self.strike(fault);
        let wait = self.about(self.sim.plan.fault_every);
        self.script_later(wait, Script::Fault);
    }

    /// Brings a fault about; nothing happens if there is nobody to strike.
    pub fn strike(&mut self, fault: Fault) {
        let struck = match fault {
            Fault::KillServer => self.kill_any("server"),
            Fault::KillExporter => self.kill_any("exporter"),
            Fault::KillAgent => self.kill_any("agent"),
            Fault::KillLockd => self.kill_lockd(),
            Fault::PauseServer => self.pause_server(),
            Fault::PauseNode => self.pause_node(),
            Fault::PauseExporter => self.pause_any("exporter", 8_000_000),
            Fault::PauseLockd => self.pause_lockd(),
            Fault::Partition => self.partition(true),
            Fault::PartitionOneWay => self.partition(false),
            Fault::Cut => self.cut(),
            Fault::SlowDisk => self.slow_disk(),
            Fault::PowerLoss if !self.power_trap && self.sim.rng.chance(0.5) => {
                // With a guest's next write half-way.
                self.power_trap = true;
                false
            }
            Fault::PowerLoss => self.lose_power(),
            Fault::HostCrash => self.crash_host(),
            Fault::SyncFails => self.fail_operation(&[OperationKind::Sync, OperationKind::SyncDir]),
            Fault::IoFails => self.fail_operation(&[OperationKind::Read, OperationKind::Write]),
            Fault::Full => self.fill_pool(),
            Fault::ClockJumps => self.jump_clock(),
            Fault::ClockStops => self.stop_clock(),
            Fault::HitTakeover => self.hit_takeover(),
            Fault::HitService => self.hit_service(),
            Fault::FreezeTakeover => self.freeze_takeover(),
            Fault::PartitionLockds => self.partition_lockds(),
            Fault::LockdPowerLoss => self.lose_power_of_lockd(),
            Fault::LockdIoFails => self.fail_lockd_disk(),
            Fault::LockdFull => self.fill_lockd_disk(),
            Fault::LoseLockdDisk => self.lose_lockd_disk(),
            Fault::MoveLockd => self.move_lockd(),
            Fault::PauseHolder => self.pause_holder(),
        };
        if struck {
            self.sim.note(|| format!("FAULT {}", fault.name()));
            self.sim.tally.fault(fault.name());
        }
        self.settle();
    }

    /// Processes of a kind; of servers, the one that serves or takes over comes first most of the time.
    fn any(&mut self, kind: &str) -> Option<ProcId> {
        if kind == "server" && self.sim.rng.chance(0.8) {
            let busy = |process: &Process| matches!(process, Process::Server(s) if s.term().is_some());
            let found: Vec<ProcId> = self
                .procs
                .iter()
                .filter(|(_, slot)| slot.process.as_ref().is_some_and(busy))
                .map(|(id, _)| *id)
                .collect();
            if !found.is_empty() {
                return Some(found[self.sim.rng.index(found.len())]);
            }
        }
        let is_one = |id: &&ProcId| {
            self.procs.get(id).and_then(|s| s.process.as_ref()).is_some_and(|p| p.kind() == kind)
        };
        let all: Vec<ProcId> = self.procs.keys().filter(is_one).copied().collect();
        if all.is_empty() { None } else { Some(all[self.sim.rng.index(all.len())]) }
    }

    fn kill_any(&mut self, kind: &str) -> bool {
        let Some(proc) = self.any(kind) else { return false };
        self.kill(proc, false);
        true
    }

    /// At once, or with its next command half-way to its log, or with requests that it has gathered and not settled.
    fn kill_lockd(&mut self) -> bool {
        match self.sim.rng.below(4) {
            0 => {
                self.lockd_trap = true;
                return true;
            }
            1 => {
                self.sim.kill_gathering = true;
                return true;
            }
            _ => {}
        }
        let Some(proc) = self.any_lockd() else { return false };
        self.kill(proc, false);
        true
    }

    /// An operation of a takeover.
    fn any_spot(&mut self) -> Spot {
        if self.sim.rng.chance(0.5) {
            return Spot::Nth(1 + self.sim.rng.below(TAKEOVER_OPERATIONS));
        }
        let (kind, end) = SPOTS[self.sim.rng.index(SPOTS.len())];
        Spot::At(kind, end)
    }

    fn any_deed(&mut self) -> Deed {
        match self.sim.rng.below(6) {
            0 | 1 => Deed::Kill,
            2 => Deed::PowerLoss,
            3 => Deed::FreezeUntilTakeover(self.any_spot()),
            _ => Deed::Freeze(1_000_000 + self.sim.rng.below(5_000_000)),
        }
    }

    fn hit_takeover(&mut self) -> bool {
        let (spot, deed) = (self.any_spot(), self.any_deed());
        self.trap_takeover(spot, deed)
    }

    fn freeze_takeover(&mut self) -> bool {
        if let Some((stops, goes_on)) = self.sim.plan.freeze {
            return self.trap_takeover(stops, Deed::FreezeUntilTakeover(goes_on));
        }
        let spot = self.any_spot();
        let deed = if self.sim.rng.chance(0.7) {
            Deed::FreezeUntilTakeover(self.any_spot())
        } else {
            Deed::Freeze(1_000_000 + self.sim.rng.below(3_000_000))
        };
        self.trap_takeover(spot, deed)
    }

    fn trap_takeover(&mut self, spot: Spot, deed: Deed) -> bool {
        let Some(server) = self.serving() else { return false };
        self.lay_trap(Trap { spot, taking_over: true, deed });
        self.kill(server, false);
        true
    }

    fn hit_service(&mut self) -> bool {
        let (spot, deed) = (Spot::Nth(1 + self.sim.rng.below(40)), self.any_deed());
        self.lay_trap(Trap { spot, taking_over: false, deed });
        true
    }

    fn pause_any(&mut self, kind: &str, most: u64) -> bool {
        let Some(proc) = self.any(kind) else { return false };
        self.pause_for(proc, most);
        true
    }

    pub(super) fn pause_for(&mut self, proc: ProcId, most: u64) {
        self.pause(proc);
        let lasts = 50_000 + self.sim.rng.below(most);
        self.undo_later(lasts, Undo::Thaw(vec![proc]));
    }

    fn pause_server(&mut self) -> bool {
        self.pause_any("server", 2_000_000)
    }

    /// Each by itself: whoever goes on first may act before the other notices anything.
    pub(super) fn thaw_later(&mut self, lasts: u64, procs: &[ProcId]) {
        for proc in procs {
            let wait = lasts + self.sim.rng.below(20_000);
            self.undo_later(wait, Undo::Thaw(vec![*proc]));
        }
    }

    /// The one fault that makes a server wake up long after its successor serves.
    fn pause_node(&mut self) -> bool {
        let Some(server) = self.any("server") else { return false };
        let Some(agent) = self.procs.get(&server).and_then(|slot| slot.agent) else { return false };
        self.pause(server);
        self.pause(agent);
        let lasts = 1_000_000 + self.sim.rng.below(6_000_000);
        self.thaw_later(lasts, &[server, agent]);
        true
    }

    fn partition(&mut self, both_ways: bool) -> bool {
        let hosts = self.sim.plan.hosts;
        let (a, b) = (self.sim.rng.index(hosts), self.sim.rng.index(hosts));
        if a == b {
            return false;
        }
        self.sim.net.block(HostId(a), HostId(b));
        if both_ways {
            self.sim.net.block(HostId(b), HostId(a));
        }
        let lasts = 100_000 + self.sim.rng.below(8_000_000);
        self.undo_later(lasts, Undo::Heal);
        true
    }

    fn cut(&mut self) -> bool {
        let conns = self.sim.net.open_conns();
        if conns.is_empty() {
            return false;
        }
        let conn = conns[self.sim.rng.index(conns.len())];
        let one_sided: &[usize] = [&[0][..], &[1], &[0, 1]][self.sim.rng.index(3)];
        if one_sided.len() == 1 {
            self.sim.tally.reached("a connection broke on one side only");
        }
        let told = self.sim.net.cut(conn, one_sided, &mut self.sim.queue);
        for (proc, event) in told {
            self.tell(proc, event);
        }
        true
    }

    /// For everybody, or for one host alone.
    fn slow_disk(&mut self) -> bool {
        let times = [3, 10, 40, 200][self.sim.rng.index(4)];
        if self.sim.rng.chance(0.5) {
            let host = self.any_node();
            self.sim.slowness[host.0] = times;
        } else {
            self.sim.slowness.fill(times);
        }
        let lasts = 100_000 + self.sim.rng.below(3_000_000);
        self.undo_later(lasts, Undo::Fast);
        true
    }

    /// Everything stops at once; what was not synced survives in part.
    fn lose_power(&mut self) -> bool {
        self.power_trap = false;
        let writing = |slot: &super::Slot| matches!(&slot.process, Some(Process::Exporter(e)) if e.writes_under_way() > 0);
        if self.procs.values().any(writing) {
            self.sim.tally.reached("power was lost with writes in flight");
        }
        let taking =
            |slot: &super::Slot| matches!(&slot.process, Some(Process::Server(s)) if s.is_taking_over());
        if self.procs.values().any(taking) {
            self.sim.tally.reached("power was lost during a takeover");
        }
        for disk in 0..self.sim.disks.len() {
            let seed = self.sim.rng.next_u64();
            self.sim.disks[disk].power_loss(seed);
        }
        let all: Vec<ProcId> = self.procs.keys().copied().collect();
        all.into_iter().for_each(|proc| self.kill(proc, true));
        let now = self.sim.instant();
        self.sim.model.power_lost(now);
        let lasts = 100_000 + self.sim.rng.below(1_000_000);
        self.undo_later(lasts, Undo::Power);
        true
    }

    fn crash_host(&mut self) -> bool {
        let nodes = self.sim.plan.nodes;
        let host = HostId(self.sim.rng.index(nodes));
        self.sim.net.set_dark(host, true, &mut self.sim.queue);
        self.lose_power_of(host);
        let lasts = 500_000 + self.sim.rng.below(5_000_000);
        self.undo_later(lasts, Undo::Light(host));
        true
    }

    fn fail_operation(&mut self, kinds: &[OperationKind]) -> bool {
        let kind = kinds[self.sim.rng.index(kinds.len())];
        let prefix = match kind {
            OperationKind::SyncDir => ["term", "store"][self.sim.rng.index(2)],
            // A read that fails while terms are read would end servers one after the other.
            OperationKind::Read => "head/",
            _ => ["term/", "store/", "head/"][self.sim.rng.index(3)],
        };
        self.sim.dir_sync_failed |= kind == OperationKind::SyncDir;
        let nth = 1 + self.sim.rng.below(20);
        let mut fault = DiskFault::once(kind, nth, FaultError::Io);
        fault.path_prefix = prefix.to_owned();
        self.sim.disks[POOL].fail(fault);
        true
    }

    /// The pool takes nothing more, in two ways: what would allocate is refused, or every write to the store is.
    fn fill_pool(&mut self) -> bool {
        if self.sim.full {
            return false;
        }
        (self.sim.full, self.sim.was_full) = (true, true);
        let mut fault = DiskFault::once(OperationKind::Reserve, 1, FaultError::NoSpace);
        (fault.path_prefix, fault.persistent) = ("store/".to_owned(), true);
        if self.sim.rng.chance(0.5) {
            self.sim.disks[POOL].fail(fault);
        } else {
            self.sim.disks[POOL].set_capacity(Some(0));
        }
        let lasts = 500_000 + self.sim.rng.below(5_000_000);
        self.undo_later(lasts, Undo::Room);
        true
    }

    fn jump_clock(&mut self) -> bool {
        let host = self.sim.rng.index(self.sim.plan.hosts);
        let by = [100_000, 2_000_000, 20_000_000, 86_400_000_000][self.sim.rng.index(4)];
        let now = self.sim.now();
        self.sim.clocks[host].jump(now, by);
        let here: Vec<ProcId> =
            self.procs.iter().filter(|(_, slot)| slot.host.0 == host).map(|(id, _)| *id).collect();
        here.into_iter().for_each(|proc| self.foresee_tick(proc, 0));
        true
    }

    fn stop_clock(&mut self) -> bool {
        let host = HostId(self.sim.rng.index(self.sim.plan.hosts));
        let now = self.sim.now();
        self.sim.clocks[host.0].stop(now);
        self.sim.tally.reached("a clock stood still");
        let lasts = 100_000 + self.sim.rng.below(4_000_000);
        self.undo_later(lasts, Undo::Clock(host));
        true
    }

    pub(super) fn undo(&mut self, undo: Undo) {
        match undo {
            Undo::Thaw(procs) => procs.into_iter().for_each(|proc| self.thaw(proc)),
            Undo::Heal => self.sim.net.heal(&mut self.sim.queue),
            Undo::Fast => self.sim.slowness.fill(1),
            Undo::Light(host) => {
                self.sim.net.set_dark(host, false, &mut self.sim.queue);
                self.start_host(host);
            }
            Undo::Room => {
                self.sim.full = false;
                self.sim.disks[POOL].heal();
                self.sim.disks[POOL].set_capacity(None);
            }
            Undo::Clock(host) => {
                let now = self.sim.now();
                self.sim.clocks[host.0].go_on(now);
            }
            Undo::Power => {
                for host in 0..self.sim.plan.hosts {
                    self.start_host(HostId(host));
                }
            }
            Undo::Lockd(seat) => self.start_again(self.sim.plan.lockds[seat], Spawn::Lockd),
            Undo::LockdDisk(seat) => self.mend_lockd_disk(seat),
        }
    }

    /// Everything that belongs on a host runs there.
    fn start_host(&mut self, host: HostId) {
        if host.0 < self.sim.plan.nodes {
            self.start_again(host, Spawn::Agent);
        }
        if self.sim.plan.lockds.contains(&host) {
            self.start_again(host, Spawn::Lockd);
        }
        self.start_contender(host);
    }

    pub(super) fn start_again(&mut self, host: HostId, what: Spawn) {
        if self.sim.find(host, what.name()).is_none() {
            self.sim.spawn(host, what);
        }
    }

    /// The storm is over: everything is whole again, and every daemon runs.
    pub(super) fn calm_down(&mut self) {
        self.calm = true;
        (self.trap, self.lockd_trap, self.power_trap) = (None, false, false);
        self.sim.kill_gathering = false;
        let paused: Vec<ProcId> = self.sim.paused.iter().copied().collect();
        self.undo(Undo::Thaw(paused));
        for host in 0..self.sim.plan.hosts {
            self.undo(Undo::Clock(HostId(host)));
            self.undo(Undo::Light(HostId(host)));
        }
        for seat in 0..self.sim.plan.lockds.len() {
            self.undo(Undo::LockdDisk(seat));
        }
        self.sim.net.calm();
        [Undo::Heal, Undo::Fast, Undo::Room, Undo::Power].into_iter().for_each(|undo| self.undo(undo));
        self.settle();
    }
}
