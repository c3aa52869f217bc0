//! How long snapshot creates took at this server. It is shown to people and measured by benches, and decides nothing.
//!
//! A create is timed from the step that takes its request to the step that lets its answer go: the wait for the writer,
//! the record's way into the journal and the look at the gate are all in it. What the server waited for the writer's drain
//! is known apart, for that is the client's time and its disk's.

use std::collections::VecDeque;

use csnap_proto::Time;
use csnap_proto::message::operate::CreateTimes;

use super::BatchId;

/// Creates that the figures are of: enough for a median, few enough that they are of now.
const RECENT_MAX: usize = 100;

/// When one create passed which point.
#[derive(Clone, Copy, Debug)]
pub(super) struct CreateClock {
    /// Its request was taken.
    began: Time,
    /// The writer that decides was asked to drain.
    advised: Option<Time>,
    /// It was recorded.
    recorded: Time,
}

impl CreateClock {
    pub(super) fn start(now: Time) -> Self {
        Self { began: now, advised: None, recorded: now }
    }

    /// The writer is asked; another one that comes meanwhile is waited for from then on, too.
    pub(super) fn advise(&mut self, now: Time) {
        self.advised.get_or_insert(now);
    }

    /// The writer left: from here on the server works by itself. What it waited counts as its own.
    pub(super) fn writer_left(&mut self) {
        self.advised = None;
    }
}

/// The last creates of this term.
#[derive(Debug, Default)]
pub(super) struct Timing {
    /// Recorded; the answer goes with this batch. Oldest first.
    unsettled: VecDeque<(BatchId, CreateClock)>,
    /// Microseconds in all, and without the wait for the writer.
    recent: VecDeque<(u64, u64)>,
    count: u64,
}

impl Timing {
    pub(super) fn record(&mut self, mut clock: CreateClock, now: Time, answered_with: BatchId) {
        clock.recorded = now;
        self.unsettled.push_back((answered_with, clock));
    }

    /// The effects of `batch`, and of every older one, are being carried out.
    pub(super) fn settle(&mut self, batch: BatchId, now: Time) {
        while let Some((_, clock)) = self.unsettled.pop_front_if(|(with, _)| *with <= batch) {
            let since = |from: Time, to: Time| to.0.saturating_sub(from.0);
            let total = since(clock.began, now);
            let waited = clock.advised.map_or(0, |advised| since(advised, clock.recorded));
            if self.recent.len() == RECENT_MAX {
                self.recent.pop_front();
            }
            self.recent.push_back((total, total.saturating_sub(waited)));
            self.count += 1;
        }
    }

    pub(super) fn shown(&self) -> CreateTimes {
        let (total_p50_micros, total_max_micros) =
            median_and_max(self.recent.iter().map(|(total, _)| *total));
        let (own_p50_micros, own_max_micros) = median_and_max(self.recent.iter().map(|(_, own)| *own));
        let recent = self.recent.len() as u64;
        CreateTimes {
            count: self.count,
            recent,
            total_p50_micros,
            total_max_micros,
            own_p50_micros,
            own_max_micros,
        }
    }
}

fn median_and_max(values: impl Iterator<Item = u64>) -> (u64, u64) {
    let mut values: Vec<u64> = values.collect();
    values.sort_unstable();
    let at = |index: usize| values.get(index).copied().unwrap_or(0);
    (at(values.len() / 2), values.last().copied().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_create_ends_when_its_answer_goes_and_the_wait_for_the_writer_is_known_apart() {
        let mut timing = Timing::default();
        let mut clock = CreateClock::start(Time(1_000));
        clock.advise(Time(1_100));
        clock.advise(Time(5_000));
        timing.record(clock, Time(6_000), BatchId(7));
        timing.settle(BatchId(6), Time(6_100));
        assert_eq!(timing.shown().count, 0, "recorded is not answered");
        timing.settle(BatchId(8), Time(6_500));
        let shown = timing.shown();
        assert_eq!((shown.count, shown.recent), (1, 1));
        assert_eq!((shown.total_p50_micros, shown.total_max_micros), (5_500, 5_500));
        assert_eq!((shown.own_p50_micros, shown.own_max_micros), (600, 600));
    }

    #[test]
    fn without_a_writer_all_of_it_is_the_servers_own() {
        let mut timing = Timing::default();
        let mut clock = CreateClock::start(Time(0));
        clock.advise(Time(10));
        clock.writer_left();
        timing.record(clock, Time(900), BatchId(1));
        timing.settle(BatchId(1), Time(1_000));
        assert_eq!(timing.shown().own_max_micros, 1_000);
    }

    #[test]
    fn figures_are_of_the_last_creates_and_their_memory_is_bounded() {
        let mut timing = Timing::default();
        for n in 0..1_000 {
            timing.record(CreateClock::start(Time(0)), Time(n), BatchId(n));
            timing.settle(BatchId(n), Time(n));
        }
        let shown = timing.shown();
        assert_eq!((shown.count, shown.recent), (1_000, RECENT_MAX as u64));
        assert_eq!((shown.total_p50_micros, shown.total_max_micros), (950, 999));
    }
}
