//! Takeovers of ours that failed, and the rest after them.
//!
//! A server that is told to serve and ends before it does costs a term and a vacancy. Once may be chance (it was killed);
//! a node whose pool cannot be read or written would go on for ever, and take every turn from those that could serve. So
//! it rests, longer with each failure in a row: a node that rests is not ready, and everybody else goes before it.
//! What it is not: a judge of why. That is in the server's log.

use std::time::Duration;

use csnap_proto::Time;

/// Rest after the second failure in a row; doubles with each further one. The first costs nothing.
const REST_MIN: Duration = Duration::from_millis(250);

/// Longest rest while somebody else serves or could: each attempt is a pause for guests.
const REST_MAX: Duration = Duration::from_secs(300);

/// Longest rest while nobody else could serve: the trouble may pass, and then everybody waits for us.
const REST_ALONE_MAX: Duration = Duration::from_secs(5);

/// A first takeover that takes this long hangs, most likely on storage that does not answer: somebody else shall try.
/// Standbys follow the journal, so a takeover costs the tail of it.
const TAKEOVER_WITHIN: Duration = Duration::from_secs(30);

/// Doublings that count: beyond, rest and patience grow no more.
const DOUBLINGS_MAX: u32 = 10;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Attempts {
    /// In a row.
    failed: u32,
    last_failed: Time,
    resting: bool,
}

impl Attempts {
    /// Our server ended before it served.
    pub(super) fn on_failed(&mut self, now: Time) {
        self.failed = self.failed.saturating_add(1);
        self.last_failed = now;
    }

    /// It serves.
    pub(super) fn on_served(&mut self) {
        *self = Self::default();
    }

    /// Looks at the clock. `alone`: nobody serves, and nobody else could.
    pub(super) fn tick(&mut self, now: Time, alone: bool) {
        self.resting = self.rests_until(alone).is_some_and(|until| now < until);
    }

    pub(super) fn next_deadline(&self, alone: bool) -> Option<Time> {
        self.rests_until(alone).filter(|_| self.resting)
    }

    pub(super) fn is_resting(&self) -> bool {
        self.resting
    }

    /// How long the next takeover may take: longer each time, for it may just be a long one.
    pub(super) fn patience(&self) -> Duration {
        TAKEOVER_WITHIN * (1 << self.failed.min(DOUBLINGS_MAX))
    }

    /// For people, while it goes on.
    pub(super) fn trouble(&self) -> Option<String> {
        (self.failed > 1).then(|| {
            let failed = self.failed;
            format!("its server failed {failed} times in a row to take over, and rests between attempts (see its log)")
        })
    }

    fn rests_until(&self, alone: bool) -> Option<Time> {
        let doublings = self.failed.checked_sub(2)?.min(DOUBLINGS_MAX);
        let rest = (REST_MIN * (1 << doublings)).min(if alone { REST_ALONE_MAX } else { REST_MAX });
        Some(self.last_failed.after(rest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rests after each of so many failures.
    fn rests(failures: u32, alone: bool) -> Vec<Duration> {
        let mut attempts = Attempts::default();
        let rest = |_| {
            attempts.on_failed(Time(0));
            attempts.tick(Time(0), alone);
            attempts.next_deadline(alone).map_or(Duration::ZERO, |until| until.since(Time(0)))
        };
        (0..failures).map(rest).collect()
    }

    #[test]
    fn rests_grow_from_the_second_failure_on_and_have_an_end() {
        let ms = Duration::from_millis;
        assert_eq!(rests(5, false), [ms(0), ms(250), ms(500), ms(1000), ms(2000)]);
        assert_eq!(rests(40, false)[39], Duration::from_secs(256));
        assert!(rests(40, true).iter().all(|rest| *rest <= REST_ALONE_MAX));
    }

    #[test]
    fn whoever_served_begins_anew() {
        let mut attempts = Attempts::default();
        for _ in 0..9 {
            attempts.on_failed(Time(0));
        }
        assert!(attempts.trouble().is_some_and(|trouble| trouble.contains("9 times")));
        attempts.on_served();
        attempts.on_failed(Time(0));
        attempts.tick(Time(0), false);
        assert!(!attempts.is_resting() && attempts.trouble().is_none());
    }
}
