//! Clocks of the hosts: each runs at its own speed, may jump ahead (a suspended machine) and may stand still. They decide
//! only what cores are told the time is; the world itself runs on one virtual time, microseconds since its start.

use csnap_proto::Time;

/// How long a clock that stands still, or was asked for a time too far away, is looked at again, microseconds.
const LOOK_AGAIN: u64 = 50_000;

/// One host's clock. It never goes back.
#[derive(Clone, Debug)]
pub struct Clock {
    /// Local time at `since`.
    base: u64,
    since: u64,
    /// Local microseconds in a million virtual ones; 0 while it stands still.
    rate: u64,
    usual_rate: u64,
}

impl Clock {
    /// A clock that shows `base` at the start and runs at `rate` local microseconds in a million.
    #[must_use]
    pub fn new(base: u64, rate: u64) -> Self {
        Self { base, since: 0, rate, usual_rate: rate }
    }

    /// What it shows.
    #[must_use]
    pub fn at(&self, now: u64) -> Time {
        Time(self.base + (now - self.since) * self.rate / 1_000_000)
    }

    /// The virtual time at which to look whether it shows `wanted`.
    #[must_use]
    pub fn when(&self, now: u64, wanted: Time) -> u64 {
        let left = wanted.0.saturating_sub(self.at(now).0);
        if left == 0 {
            return now;
        }
        match (left * 1_000_000).checked_div(self.rate) {
            Some(wait) => now + wait + 1,
            None => now + LOOK_AGAIN,
        }
    }

    /// Goes ahead by `by` microseconds at once.
    pub fn jump(&mut self, now: u64, by: u64) {
        self.settle(now);
        self.base += by;
    }

    /// Stands still from now on.
    pub fn stop(&mut self, now: u64) {
        self.settle(now);
        self.rate = 0;
    }

    /// Runs again at its usual speed.
    pub fn go_on(&mut self, now: u64) {
        self.settle(now);
        self.rate = self.usual_rate;
    }

    fn settle(&mut self, now: u64) {
        self.base = self.at(now).0;
        self.since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_jumps_stands_still_and_never_goes_back() {
        let mut clock = Clock::new(1000, 1_010_000);
        assert_eq!(clock.at(1_000_000), Time(1_011_000));
        assert!(clock.at(clock.when(0, Time(500_000))) >= Time(500_000));
        clock.stop(1_000_000);
        assert_eq!(clock.at(9_000_000), Time(1_011_000));
        clock.jump(9_000_000, 5);
        clock.go_on(9_000_000);
        assert_eq!(clock.at(9_000_000), Time(1_011_005));
        assert_eq!(clock.when(9_000_000, Time(7)), 9_000_000);
    }
}
