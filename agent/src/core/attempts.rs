//! Takeovers of ours that failed, and the rest after them.
//!
//! A server that is told to serve and ends before it does costs a term and a vacancy. Once may be chance (it was killed);
//! a node whose pool cannot be read or written would go on for ever, and take every turn from those that could serve. So
//! it rests, longer with each failure in a row: a node that rests is not ready, and everybody else goes before it. Its
//! trouble lasts until it has served: till then the others go before it at a vacancy, and no server is drained for it
//! unless an operator says so. Whether a trouble has passed is not found out at the guests' expense.
//! What it is not: a judge of why. That is in the server's log.

use std::time::Duration;

use csnap_proto::Time;

/// Rest after the second failure in a row; doubles with each further one. The first costs nothing.
const REST_MIN: Duration = Duration::from_millis(250);

/// Longest rest while somebody else serves or could: each attempt is a pause for guests.
const REST_MAX: Duration = Duration::from_secs(300);

/// Longest rest while nobody else could serve: the trouble may pass, and then everybody waits for us.
const REST_ALONE_MAX: Duration = Duration::from_secs(5);

/// A takeover that takes this long hangs, most likely on storage that does not answer: somebody else shall try. Standbys
/// follow the journal, so a takeover costs the tail of it.
const TAKEOVER_WITHIN: Duration = Duration::from_secs(30);

/// Doublings that count: beyond, rest and patience (while nobody else is there to try) grow no more.
const DOUBLINGS_MAX: u32 = 10;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Attempts {
    /// In a row.
    failed: u32,
    last_began: Time,
    last_failed: Time,
    resting: bool,
}

impl Attempts {
    /// Our server is told to serve.
    pub(super) fn begin(&mut self, now: Time) {
        self.last_began = now;
    }

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

    /// How long the next takeover may take. `only_hope`: nobody else is ready who is without trouble. Then it is longer
    /// each time, for it may just be a long one; else somebody else may do it in less.
    pub(super) fn patience(&self, only_hope: bool) -> Duration {
        if only_hope { TAKEOVER_WITHIN * (1 << self.failed.min(DOUBLINGS_MAX)) } else { TAKEOVER_WITHIN }
    }

    /// Once may be chance, but for a takeover that hung.
    pub(super) fn is_in_trouble(&self) -> bool {
        self.failed > 1 || (self.failed == 1 && self.last_took() >= TAKEOVER_WITHIN)
    }

    /// For people and for the other nodes, until it has served.
    pub(super) fn trouble(&self) -> Option<String> {
        if !self.is_in_trouble() {
            return None;
        }
        let (failed, took) = (self.failed, self.last_took().as_secs());
        let times = if failed == 1 { "once".to_owned() } else { format!("{failed} times in a row") };
        let now = if self.resting {
            "rests before it may try again"
        } else {
            "serves again only if nobody else can, or by csnap server move"
        };
        Some(format!(
            "its server failed {times} to take over (the last time after {took} s, see its log), and {now}"
        ))
    }

    fn last_took(&self) -> Duration {
        self.last_failed.since(self.last_began)
    }

    /// A second's worth of hanging costs the guests a second of pause: where others can serve, a rest is at least as long
    /// as the attempt before it.
    fn rests_until(&self, alone: bool) -> Option<Time> {
        let doubled =
            self.failed.checked_sub(2).map(|doublings| REST_MIN * (1 << doublings.min(DOUBLINGS_MAX)));
        let rest = if alone {
            doubled?.min(REST_ALONE_MAX)
        } else {
            let took = (self.failed > 0).then(|| self.last_took());
            doubled.max(took)?.min(REST_MAX)
        };
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
            attempts.begin(Time(0));
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

    /// So many attempts failed after so long.
    fn failed(times: u32, took: Duration) -> Attempts {
        let mut attempts = Attempts::default();
        for _ in 0..times {
            attempts.begin(Time(0));
            attempts.on_failed(Time(0).after(took));
        }
        attempts
    }

    #[test]
    fn a_rest_is_as_long_as_the_attempt_was_unless_nobody_else_is_there() {
        for took in [Duration::from_secs(1), TAKEOVER_WITHIN, REST_MAX * 2] {
            for times in [1, 2] {
                let mut attempts = failed(times, took);
                let ended = Time(0).after(took);
                attempts.tick(ended, false);
                let until = attempts.next_deadline(false).expect("it rests");
                assert_eq!(until.since(ended), took.min(REST_MAX));
                attempts.tick(ended, true);
                let alone = attempts.next_deadline(true).map_or(Duration::ZERO, |until| until.since(ended));
                assert_eq!(alone, if times == 1 { Duration::ZERO } else { REST_MIN });
            }
        }
    }

    #[test]
    fn patience_grows_only_for_the_only_hope() {
        for times in [0, 1, 5] {
            assert_eq!(failed(times, Duration::ZERO).patience(false), TAKEOVER_WITHIN);
            assert_eq!(failed(times, Duration::ZERO).patience(true), TAKEOVER_WITHIN * (1 << times));
        }
    }

    #[test]
    fn one_takeover_that_hung_is_trouble_one_that_ended_is_not() {
        assert_eq!(failed(1, Duration::from_secs(1)).trouble(), None);
        let trouble = failed(1, TAKEOVER_WITHIN).trouble().expect("it hung");
        assert!(trouble.contains("once") && trouble.contains("30 s"), "{trouble}");
    }

    #[test]
    fn a_trouble_after_the_rest_does_not_speak_of_resting() {
        let mut attempts = failed(3, Duration::from_secs(1));
        let trouble = |attempts: &Attempts| attempts.trouble().expect("three in a row");
        attempts.tick(attempts.last_failed, false);
        assert!(trouble(&attempts).contains("rests"));
        attempts.tick(attempts.last_failed.after(REST_MAX), false);
        assert!(!trouble(&attempts).contains("rests"), "{}", trouble(&attempts));
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
