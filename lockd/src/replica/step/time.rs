//! How time passes for a replica.

use std::time::Duration;

use csnap_proto::Time;
use raft::SnapshotStatus;

use super::Replica;

impl Replica {
    /// When to step again at the latest, if nothing else happens.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        if !self.started {
            return Some(self.last_tick);
        }
        let raft = &self.raw.raft;
        let ticks = if self.is_leader() {
            if self.members.len() == 1 {
                return None;
            }
            let check = raft.election_timeout().saturating_sub(raft.election_elapsed);
            check.min(raft.heartbeat_timeout().saturating_sub(raft.heartbeat_elapsed()))
        } else if raft.promotable() && !self.waits_for_its_disk() {
            raft.randomized_election_timeout().saturating_sub(raft.election_elapsed)
        } else {
            return None;
        };
        Some(self.last_tick.after(self.config.timing.tick * u32::try_from(ticks.max(1)).unwrap_or(u32::MAX)))
    }

    /// Counts the ticks since the last step. A replica that overslept must not take that for the others' silence, at
    /// least not before it read what they said meanwhile: only `idle`, with nothing to read, it may campaign, and a
    /// leader that slept looks for its majority once, however long it slept.
    pub(super) fn pass_time(&mut self, now: Time, idle: bool) {
        let tick = self.config.timing.tick;
        let ticks =
            usize::try_from(now.since(self.last_tick).as_nanos() / tick.as_nanos()).unwrap_or(usize::MAX);
        if ticks == 0 {
            return;
        }
        let rest = Duration::from_nanos(
            u64::try_from(now.since(self.last_tick).as_nanos() % tick.as_nanos()).expect("less than a tick"),
        );
        self.last_tick = Time(now.0 - u64::try_from(rest.as_micros()).expect("less than a tick"));
        if self.is_leader() {
            self.pass_as_leader(ticks);
        } else {
            self.pass_as_follower(ticks, idle && !self.waits_for_its_disk());
        }
        self.draw_wait();
    }

    fn pass_as_leader(&mut self, ticks: usize) {
        let raft = &self.raw.raft;
        let to_check = raft.election_timeout().saturating_sub(raft.election_elapsed).max(1);
        for _ in 0..ticks.min(to_check) {
            self.raw.tick();
        }
        self.give_up_states(ticks as u64);
    }

    /// Also one that never campaigns counts: it must not take a leader that fell silent for one that leads.
    fn pass_as_follower(&mut self, ticks: usize, may_campaign: bool) {
        if !may_campaign || !self.raw.raft.promotable() {
            let election = self.raw.raft.randomized_election_timeout();
            let most = if self.raw.raft.promotable() { election - 1 } else { election };
            let elapsed = self.raw.raft.election_elapsed.saturating_add(ticks);
            self.raw.raft.election_elapsed = elapsed.min(most);
            return;
        }
        for _ in 0..ticks.min(self.raw.raft.randomized_election_timeout()) {
            self.raw.tick();
            if self.raw.raft.election_elapsed == 0 {
                self.campaigns += 1;
                return;
            }
        }
    }

    /// The library draws waits from the thread's random numbers; ours come from the seed, whenever it drew.
    pub(super) fn draw_wait(&mut self) {
        let (seed, id, term) = (self.config.seed, self.id, self.raw.raft.term);
        let wait = self.config.timing.election_ticks(seed, id, term, self.campaigns);
        self.raw.raft.set_randomized_election_timeout(wait);
    }

    /// It must not campaign now: it lacks what it would lead with, a state that is not durable; or its own vote is a
    /// majority, so that it would lead within the call, before what it wrote earlier is durable.
    pub(super) fn waits_for_its_disk(&self) -> bool {
        self.installing.is_some() || (self.is_alone() && !self.outstanding.is_empty())
    }

    /// A state that got lost is not asked for again; so it is sent again.
    fn give_up_states(&mut self, ticks: u64) {
        let most = self.config.timing.snapshot_ticks();
        let mut lost = Vec::new();
        for (to, age) in &mut self.sent_states {
            *age = age.saturating_add(ticks);
            if *age > most {
                lost.push(*to);
            }
        }
        for to in lost {
            self.sent_states.remove(&to);
            self.raw.report_snapshot(to, SnapshotStatus::Failure);
        }
    }
}
