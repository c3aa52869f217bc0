//! Work that nobody waits for: reaping deleted snapshots, giving space back, removing heads, ending operators'
//! sessions that were left behind. In slices, one a batch at most, so that it never stands before a request for long.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use csnap_proto::{FreeBatchId, SessionId, StoreExtent, Time, VolumeId};

use super::canary::Canary;
use super::{BatchId, Out, Output, ServerCore};
use crate::state::{Attached, Origin, Record};

/// How often the core looks around when nothing happens: a fraction of what anyone would call soon.
pub(super) const TICK: Duration = Duration::from_millis(50);

/// Versions reaped in one slice: about a millisecond of work, a record of some 20 KiB.
pub(super) const REAP_SLICE_VERSIONS: usize = 2048;

/// Records of one slice: what a small snapshot needs from its first version to its sealed batch, so that many deletes in a
/// row do not wait for many syncs each.
const REAP_SLICE_RECORDS: usize = 6;

/// Extents punched in one go: some 10 ms of a plain disk.
const PUNCH_SLICE_EXTENTS: usize = 64;

/// An operator's session whose owner vanished is kept this long for a resend.
const OPERATOR_PATIENCE: Duration = Duration::from_secs(600);

/// What is under way.
#[derive(Debug, Default)]
pub(super) struct Background {
    punching: bool,
    /// A tick passed since the last slice: one is due even under load.
    due: bool,
    removing: BTreeSet<VolumeId>,
    /// Batches that everybody confirmed, free once this mark is settled.
    freeing: Option<(BatchId, Vec<FreeBatchId>)>,
    next_sweep: Time,
    /// Operators' sessions that were absent at the last sweep, since when.
    absent: BTreeMap<SessionId, Time>,
}

impl ServerCore {
    pub(super) fn on_tick(&mut self, out: Out) {
        self.drop_silent(out);
        self.expire_creates();
        self.start_tasks(out);
        self.background.due = true;
        if self.now >= self.background.next_sweep {
            self.background.next_sweep = self.now.after(Duration::from_secs(1));
            self.sweep_operators();
            self.grants.space_came_back();
        }
    }

    /// At the end of a turn: one slice, if nothing else is in flight or a tick passed.
    pub(super) fn work_in_background(&mut self, out: Out) {
        if self.draining || !(self.background.due || self.pipeline.is_idle()) {
            return;
        }
        self.background.due = false;
        self.reap_slice();
        self.free_confirmed();
        if !self.background.punching
            && let Some(extents) = self.state.next_punch(PUNCH_SLICE_EXTENTS)
        {
            self.background.punching = true;
            if self.config.broken.breaks(Canary::FreeBeforeRecord) {
                out.push(Output::Punch { extents });
            } else {
                self.pipeline.then(Output::Punch { extents });
            }
        }
        let all_dead = self.state.older_terms().next().is_none();
        let removable: Vec<VolumeId> = self
            .state
            .removable_heads()
            .filter(|volume| all_dead && !self.background.removing.contains(volume))
            .collect();
        for volume in removable {
            self.background.removing.insert(volume);
            if self.state.removable_origin(volume) == Some(&Origin::Pool) {
                if self.config.broken.breaks(Canary::RemoveBeforeRecord) {
                    out.push(Output::RemoveHead { volume });
                    continue;
                }
                self.pipeline.then(Output::RemoveHead { volume });
            } else {
                self.on_head_removed(volume); // An adopted origin is its owner's.
            }
        }
    }

    /// Takes a slice of versions out of the map, of one deleted snapshot or of several small ones.
    fn reap_slice(&mut self) {
        let mut budget = self.config.reap_slice_versions;
        for _ in 0..REAP_SLICE_RECORDS {
            let Some(record) = self.state.next_reap(budget) else { return };
            if let Record::Reaped { dead, .. } = &record {
                // A search that found nothing used up the slice as well.
                let found: u64 = dead.iter().map(|run| run.range.count).sum();
                let found = usize::try_from(found).unwrap_or(usize::MAX);
                budget = if found == 0 { 0 } else { budget.saturating_sub(found) };
            }
            self.record(record);
            self.grants.space_came_back();
            if budget == 0 {
                return;
            }
        }
    }

    /// Batches of frees that no session may still read become free, once what says so is settled.
    fn free_confirmed(&mut self) {
        if self.config.broken.breaks(Canary::ReuseHeldSpace) {
            self.forget_for_everybody();
        }
        let early = self.config.broken.breaks(Canary::FreeBeforeRecord);
        let waiting = self.background.freeing.take_if(|(mark, _)| early || self.pipeline.is_settled(*mark));
        for batch in waiting.into_iter().flat_map(|(_, batches)| batches) {
            self.record(Record::BatchReusable { batch });
        }
        if self.background.freeing.is_none() {
            let batches: Vec<FreeBatchId> = self.state.confirmed_batches().collect();
            if !batches.is_empty() {
                self.background.freeing = Some((self.pipeline.mark(), batches));
            }
        }
    }

    /// Confirms in the name of sessions that did not: never, but for the tests of the tests.
    fn forget_for_everybody(&mut self) {
        let last = |id: SessionId| self.state.unconfirmed_frees(id).last().map(|(upto, _)| (id, upto));
        let confirmed: Vec<_> = self.state.sessions().filter_map(|session| last(session.id)).collect();
        for (session, upto) in confirmed {
            self.record(Record::FreesConfirmed { session, upto });
        }
    }

    pub(super) fn on_punched(&mut self, extents: Vec<StoreExtent>) {
        self.background.punching = false;
        self.record(Record::Punched { extents });
    }

    pub(super) fn on_head_removed(&mut self, volume: VolumeId) {
        if self.background.removing.remove(&volume) {
            self.record(Record::HeadRemoved { volume });
        }
    }

    /// An operator's session holds nothing but results for resends: a long absence ends it.
    fn sweep_operators(&mut self) {
        let now = self.now;
        let is_absent = |id: &SessionId| self.connections.of_session(*id).is_none();
        let operators = self.state.sessions().filter(|s| s.attached == Attached::Operator).map(|s| s.id);
        let absent: BTreeSet<SessionId> = operators.filter(is_absent).collect();
        self.background.absent.retain(|id, _| absent.contains(id));
        for id in absent {
            self.background.absent.entry(id).or_insert(now);
        }
        let late = |(&id, &since): (&SessionId, &Time)| (since.after(OPERATOR_PATIENCE) <= now).then_some(id);
        let late: Vec<SessionId> = self.background.absent.iter().filter_map(late).collect();
        for id in late {
            self.background.absent.remove(&id);
            self.end_session(id);
        }
    }
}
