//! What goes wrong, and what operators do meanwhile.

use csnap_lockd::replica::{Change, Input, Members, ReplicaId};
use csnap_storage::sim::{Fault as DiskFault, FaultError, OperationKind, SimDisk};

use crate::net::Seat;
use crate::node::NODE;
use crate::plan::Fault;
use crate::world::{Event, Verdict, World};

/// An outage lasts so long at most, microseconds.
const OUTAGE: u64 = 900_000;

impl World {
    pub(crate) fn strike(&mut self) -> Verdict {
        let every = 1 + self.rng.below(2 * self.plan.fault_every);
        self.later(every, Event::Fault);
        if self.healed || self.plan.faults.is_empty() {
            return Ok(());
        }
        let fault = self.plan.faults[self.rng.index(self.plan.faults.len())];
        let seat = self.victim();
        match fault {
            Fault::Kill => self.kill(seat),
            Fault::PowerLoss => self.lose_power(seat),
            Fault::PowerLossOfAll => (0..self.nodes.len()).for_each(|seat| self.lose_power(seat)),
            Fault::Freeze => {
                self.judge.tally.did("freezes");
                self.nodes[seat].frozen_until = self.now + self.rng.below(OUTAGE);
            }
            Fault::Cut => {
                self.judge.tally.did("cuts");
                self.net.cut(self.nodes.len(), &mut self.rng);
                let lasts = self.rng.below(OUTAGE);
                self.later(lasts, Event::Mend);
            }
            Fault::BadSync => {
                self.judge.tally.did("failed syncs");
                let kind = [OperationKind::Sync, OperationKind::Write][self.rng.index(2)];
                let nth = 1 + self.rng.below(5);
                self.nodes[seat].disk.fail(DiskFault::once(kind, nth, FaultError::Io));
            }
            Fault::FullDisk => {
                let full = !self.nodes[seat].full;
                self.nodes[seat].full = full;
                self.nodes[seat].disk.set_capacity(full.then_some(0));
            }
            Fault::Amnesia => self.lose_disk(seat),
            Fault::Transfer => return self.transfer(seat),
            Fault::Membership => return self.change_at_will(seat),
        }
        Ok(())
    }

    /// Mostly somebody who matters.
    fn victim(&mut self) -> Seat {
        match self.leader() {
            Some(leader) if self.rng.chance(0.4) => leader,
            _ => self.rng.index(self.nodes.len()),
        }
    }

    fn kill(&mut self, seat: Seat) {
        self.judge.tally.did("kills");
        self.nodes[seat].stop();
        self.nodes[seat].disk.crash_node(NODE);
        self.start_later(seat);
    }

    fn lose_power(&mut self, seat: Seat) {
        self.judge.tally.did("power losses");
        self.nodes[seat].stop();
        let outcome = self.rng.next_u64();
        self.nodes[seat].disk.power_loss(outcome);
        self.start_later(seat);
    }

    /// As many disks as the group can bear to lose, so that it can be healed; safety does not hang on it.
    fn lose_disk(&mut self, seat: Seat) {
        let Some(leader) = self.leader().and_then(|leader| self.nodes[leader].replica()) else { return };
        let voters = leader.members().values().filter(|member| member.voter).count();
        let voting = self.nodes[seat].id.is_some_and(|id| leader.members().contains_key(&id));
        if voting && self.lost(leader.members()) >= (voters - 1) / 2 {
            return;
        }
        self.judge.tally.did("amnesias");
        self.nodes[seat].stop();
        self.nodes[seat].id = None;
        self.nodes[seat].disk = SimDisk::new(self.rng.next_u64());
        self.nodes[seat].disk.set_stepped(true);
        self.nodes[seat].full = false;
        self.start_later(seat);
    }

    /// Voters whose disk is another one by now.
    fn lost(&self, members: &Members) -> usize {
        let lost =
            |id: &ReplicaId| self.seat_of.get(id).is_some_and(|seat| self.nodes[*seat].id != Some(*id));
        members.iter().filter(|(id, member)| member.voter && lost(id)).count()
    }

    fn start_later(&mut self, seat: Seat) {
        let after = 5_000 + self.rng.below(OUTAGE);
        self.later(after, Event::Start { seat });
    }

    fn transfer(&mut self, to: Seat) -> Verdict {
        let (Some(leader), Some(to)) = (self.leader(), self.nodes[to].id) else { return Ok(()) };
        self.judge.tally.did("transfers");
        self.step(leader, Input::Transfer(to))
    }

    /// Adds an idle replica, or removes one while enough are left.
    fn change_at_will(&mut self, seat: Seat) -> Verdict {
        let Some(leader) = self.leader() else { return Ok(()) };
        let members = self.nodes[leader].replica().expect("it leads").members().clone();
        let Some(id) = self.nodes[seat].id else { return Ok(()) };
        let voters = members.values().filter(|member| member.voter).count();
        let change = match members.get(&id) {
            None => Change::Add { id, address: seat.to_string() },
            // Removing a voter whose disk is sound must not leave the lost ones in the majority.
            Some(member) if member.voter && (self.lost(&members) > 0 || voters <= self.plan.voters) => {
                return Ok(());
            }
            Some(_) => Change::Remove { id },
        };
        self.step(leader, Input::Change(change))
    }

    /// The operator, now and then: replaces replicas whose disk was lost, promotes those that caught up.
    pub(crate) fn operate(&mut self) -> Verdict {
        let after = 50_000 + self.rng.below(200_000);
        self.later(after, Event::Operate);
        let Some(seat) = self.leader() else { return Ok(()) };
        let leader = self.nodes[seat].replica().expect("it leads");
        let members = leader.members().clone();
        let gone = |id: &&ReplicaId| {
            let lives = self.seat_of.get(id).map(|seat| self.nodes[*seat].id);
            // Its disk is another one by now.
            lives.is_some_and(|now| now.is_some_and(|now| now != **id))
        };
        let voters = members.values().filter(|member| member.voter).count();
        let change = if let Some((id, _)) =
            members.iter().find(|(id, member)| !member.voter && leader.has_caught_up(**id))
        {
            Some(Change::Promote { id: *id })
        } else if let Some(id) = members.keys().find(gone) {
            let replacement = self.seat_of.get(id).and_then(|seat| self.nodes[*seat].id);
            match replacement.filter(|new| !members.contains_key(new)) {
                // The new one first, where the group is small.
                Some(new) if voters < 3 && members.len() < 9 => {
                    Some(Change::Add { id: new, address: self.seat_of[&new].to_string() })
                }
                _ => Some(Change::Remove { id: *id }),
            }
        } else if members.len() < self.plan.voters {
            let idle = self.nodes.iter().filter_map(|node| node.id).find(|id| !members.contains_key(id));
            idle.map(|id| Change::Add { id, address: self.seat_of[&id].to_string() })
        } else {
            None
        };
        match change {
            Some(change) => self.step(seat, Input::Change(change)),
            None => Ok(()),
        }
    }

    /// Nothing goes wrong any more, and what is down comes back.
    pub(crate) fn heal(&mut self) -> Verdict {
        self.healed = true;
        self.net.heal();
        for seat in 0..self.nodes.len() {
            self.nodes[seat].disk.heal();
            self.nodes[seat].disk.set_capacity(None);
            self.nodes[seat].frozen_until = 0;
            self.start(seat);
        }
        Ok(())
    }
}
