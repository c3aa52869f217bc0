//! The lockds of a world: how their group begins, what befalls one of them, who looks after them, and the clients whose keys and
//! locks are judged.

use csnap_lockd::canary::Canary;
use csnap_lockd::replica::{Base, Change, ClusterId, Member, Members, Replica, ReplicaId, ReplicaLog};
use csnap_lockd::replicated::Replicated;
use csnap_lockd::store::{LOG_BYTES_MIN, StoreOptions};
use csnap_storage::sim::{Fault as DiskFault, FaultError, OperationKind, SimDisk, SimNode, executor};

use super::{Script, Undo, World};
use crate::process::Process;
use crate::sim::{Ask, Event, HostId, LOCAL, ProcId, Spawn, lockd_address};

/// Once calm has come, a group has its leader, and every lock that somebody waits for has come to him, within this,
/// microseconds: some elections, the lease of whoever had it, and the queue.
const LOCK_PATIENCE: u64 = 10_000_000;

/// Between two looks at the group, microseconds.
const LOOK_EVERY: u64 = 300_000;

impl World {
    /// Several lockds begin as an operator made them: each has its disk, and the first has founded the group.
    pub(super) fn form_group(&mut self) {
        let seats = self.sim.plan.lockds.len();
        if seats < 2 {
            return;
        }
        let (mut members, mut first) = (Members::new(), None);
        for seat in 0..seats {
            self.sim.disks[LOCAL + seat].set_stepped(false);
            let options = StoreOptions {
                fresh_id: self.fresh_disk(seat),
                log_bytes: LOG_BYTES_MIN,
                broken: self.sim.plan.canaries.lockd,
            };
            let storage = self.sim.disks[LOCAL + seat].storage(SimNode(0));
            let opened = executor::run(ReplicaLog::open(storage, options, |_| Base::empty()));
            let (log, saved) = opened.expect("an empty disk takes a log");
            self.sim.group.opened(seat, saved.id);
            members.insert(saved.id, Member { address: lockd_address(seat), voter: true });
            first.get_or_insert((log, saved));
        }
        let (mut log, saved) = first.expect("there are some");
        let cluster = ClusterId(self.sim.draw());
        let base = Base::founding(cluster, members, Replicated::first_state());
        executor::run(log.found(&saved, base)).expect("a sound disk");
        drop(log);
        for seat in 0..seats {
            self.sim.disks[LOCAL + seat].set_stepped(true);
            self.seen[LOCAL + seat] = self.sim.disks[LOCAL + seat].operations();
        }
        self.script_later(LOOK_EVERY, Script::Lockds);
    }

    /// What a new disk is known by: drawn, unless that rule is broken.
    fn fresh_disk(&mut self, seat: usize) -> [u8; 16] {
        if self.sim.plan.canaries.lockd.breaks(Canary::VoteAfterAmnesia) {
            return [u8::try_from(seat).expect("few") + 1; 16];
        }
        self.sim.draw()
    }

    pub(super) fn start_lockds(&mut self) {
        for host in self.sim.plan.lockds.clone() {
            self.sim.spawn(host, Spawn::Lockd);
        }
    }

    /// The process of a seat and its replica, once it has opened its disk.
    fn replica(&self, seat: usize) -> Option<(ProcId, &Replica)> {
        let proc = self.sim.find(self.sim.plan.lockds[seat], "lockd")?;
        match self.process(proc) {
            Some(Process::Lockd(lockd)) => Some((proc, lockd.replica()?)),
            _ => None,
        }
    }

    fn seats(&self) -> std::ops::Range<usize> {
        0..self.sim.plan.lockds.len()
    }

    /// The lockd that leads, of the latest term.
    pub(super) fn leading_lockd(&self) -> Option<usize> {
        let leads = |seat: &usize| self.replica(*seat).filter(|(_, replica)| replica.is_established());
        let leaders = self.seats().filter(|seat| leads(seat).is_some());
        leaders.max_by_key(|seat| leads(seat).map(|(_, replica)| replica.term()))
    }

    /// Mostly the one that matters.
    fn any_seat(&mut self) -> usize {
        match self.leading_lockd() {
            Some(leader) if self.sim.rng.chance(0.5) => leader,
            _ => self.sim.rng.index(self.sim.plan.lockds.len()),
        }
    }

    pub(super) fn any_lockd(&mut self) -> Option<ProcId> {
        let seat = self.any_seat();
        self.sim.find(self.sim.plan.lockds[seat], "lockd")
    }

    pub(super) fn pause_lockd(&mut self) -> bool {
        let Some(proc) = self.any_lockd() else { return false };
        self.pause_for(proc, 6_000_000);
        true
    }

    /// One of them hears or is heard by no other, or both; everybody else reaches it.
    pub(super) fn partition_lockds(&mut self) -> bool {
        let one = self.any_seat();
        let ways = self.sim.rng.below(3);
        let one = self.sim.plan.lockds[one];
        for other in self.sim.plan.lockds.clone() {
            if other != one && ways != 1 {
                self.sim.net.block(one, other);
            }
            if other != one && ways != 2 {
                self.sim.net.block(other, one);
            }
        }
        let lasts = 100_000 + self.sim.rng.below(4_000_000);
        self.undo_later(lasts, Undo::Heal);
        true
    }

    /// Everything on a host stops without a word; what a lockd there did not sync survives in part.
    pub(super) fn lose_power_of(&mut self, host: HostId) {
        let here: Vec<ProcId> =
            self.procs.iter().filter(|(_, slot)| slot.host == host).map(|(id, _)| *id).collect();
        here.into_iter().for_each(|proc| self.kill(proc, true));
        if let Some(seat) = self.sim.plan.lockds.iter().position(|its| *its == host) {
            let seed = self.sim.rng.next_u64();
            self.sim.disks[LOCAL + seat].power_loss(seed);
        }
    }

    pub(super) fn lose_power_of_lockd(&mut self) -> bool {
        let seat = self.any_seat();
        let host = self.sim.plan.lockds[seat];
        self.sim.net.set_dark(host, true, &mut self.sim.queue);
        self.lose_power_of(host);
        let lasts = 100_000 + self.sim.rng.below(3_000_000);
        self.undo_later(lasts, Undo::Light(host));
        true
    }

    pub(super) fn fail_lockd_disk(&mut self) -> bool {
        let seat = self.any_seat();
        let kind = [OperationKind::Sync, OperationKind::Write][self.sim.rng.index(2)];
        let nth = 1 + self.sim.rng.below(5);
        self.sim.group.failing.insert(seat);
        self.sim.disks[LOCAL + seat].fail(DiskFault::once(kind, nth, FaultError::Io));
        true
    }

    pub(super) fn fill_lockd_disk(&mut self) -> bool {
        let seat = self.any_seat();
        self.sim.group.failing.insert(seat);
        self.sim.disks[LOCAL + seat].set_capacity(Some(0));
        let lasts = 500_000 + self.sim.rng.below(8_000_000);
        self.undo_later(lasts, Undo::LockdDisk(seat));
        true
    }

    pub(super) fn mend_lockd_disk(&mut self, seat: usize) {
        self.sim.disks[LOCAL + seat].heal();
        self.sim.disks[LOCAL + seat].set_capacity(None);
    }

    /// One, and no other before it is replaced: more a group of three does not bear.
    pub(super) fn lose_lockd_disk(&mut self) -> bool {
        let seat = self.any_seat();
        let Some(leader) = self.leading_lockd() else { return false };
        let (_, replica) = self.replica(leader).expect("it leads");
        let votes = |(id, member): (&ReplicaId, &Member)| member.voter && !self.sim.group.lost.contains(id);
        let voters = replica.members().iter().filter(|member| votes(*member)).count();
        if voters < self.sim.plan.lockds.len() {
            return false;
        }
        let id = self.sim.group.disks.remove(&seat).expect("all have opened theirs");
        self.sim.group.lost.insert(id);
        let host = self.sim.plan.lockds[seat];
        if let Some(proc) = self.sim.find(host, "lockd") {
            self.kill(proc, true);
        }
        let disk = SimDisk::new(self.sim.rng.next_u64());
        disk.set_stepped(true);
        self.seen[LOCAL + seat] = disk.operations();
        self.sim.disks[LOCAL + seat] = disk;
        let lasts = 50_000 + self.sim.rng.below(1_000_000);
        self.undo_later(lasts, Undo::Lockd(seat));
        true
    }

    pub(super) fn move_lockd(&mut self) -> bool {
        let to = self.sim.rng.index(self.sim.plan.lockds.len());
        let (Some(leader), Some(id)) = (self.leading_lockd(), self.sim.group.disks.get(&to).copied()) else {
            return false;
        };
        if leader == to {
            return false;
        }
        let (proc, _) = self.replica(leader).expect("it leads");
        self.tell(proc, Event::Ask(Ask::Transfer(id)));
        true
    }

    /// The operator, now and then: replaces a lockd whose disk was lost, promotes it when it has caught up.
    pub(super) fn look_after_lockds(&mut self) {
        self.script_later(LOOK_EVERY, Script::Lockds);
        let Some(seat) = self.leading_lockd() else { return self.sim.tally.reached("no lockd led") };
        let (proc, leader) = self.replica(seat).expect("it leads");
        let group = &self.sim.group;
        let members = leader.members();
        let learner = |(id, member): &(&ReplicaId, &Member)| !member.voter && leader.has_caught_up(**id);
        let lost = members.keys().find(|id| group.lost.contains(id));
        let missing = group.disks.iter().find(|(_, id)| !members.contains_key(id));
        let change = if let Some((id, _)) = members.iter().find(learner) {
            Change::Promote { id: *id }
        } else if let Some(id) = lost {
            Change::Remove { id: *id }
        } else if let Some((seat, id)) = missing {
            Change::Add { id: *id, address: lockd_address(*seat) }
        } else {
            return;
        };
        if matches!(change, Change::Promote { .. }) {
            self.sim.tally.reached("a lockd with an empty disk was added again and caught up");
        }
        self.tell(proc, Event::Ask(Ask::Change(change)));
    }

    /// The clients whose keys and locks are judged begin.
    pub(super) fn begin_contention(&mut self) {
        for host in 0..self.sim.plan.hosts {
            self.start_contender(HostId(host));
        }
        self.settle();
    }

    /// The first hosts have one each.
    pub(super) fn start_contender(&mut self, host: HostId) {
        let wanted = self.sim.plan.contenders.0.min(self.sim.plan.hosts);
        if host.0 < wanted && !self.calm {
            self.start_again(host, Spawn::Contender);
        }
    }

    pub(super) fn calm_contenders(&mut self) {
        for slot in self.procs.values_mut() {
            if let Some(Process::Contender(contender)) = &mut slot.process {
                contender.calm_down();
            }
        }
    }

    fn contenders_are_idle(&self) -> bool {
        let idle = |slot: &super::Slot| match &slot.process {
            Some(Process::Contender(contender)) => contender.is_idle(),
            _ => true,
        };
        self.procs.values().all(idle)
    }

    /// A lockd leads, and whoever waited for a lock was granted it and has given it up.
    pub(super) fn expect_of_locks(&mut self) -> bool {
        self.expect_within(LOCK_PATIENCE, "every lock that is waited for is granted", |world| {
            world.contenders_are_idle()
                && (world.sim.plan.lockds.len() == 1 || world.leading_lockd().is_some())
        })
    }

    /// What clients of keys and locks saw is linearizable.
    pub(super) fn check_history(&mut self) {
        let verdict = self.sim.history.check();
        if let Some(checked) = self.sim.judge(verdict) {
            self.sim.tally.did("histories found linearizable", checked.histories - checked.undecided);
            self.sim.tally.did("histories undecided", checked.undecided);
            self.sim.tally.did("operations in them", checked.operations);
            self.sim.tally.did("operations of unknown outcome", checked.unknown);
        }
    }
}
