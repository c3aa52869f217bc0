//! How long a holder may act on what its session holds, as the holder itself counts it.
//!
//! lockd ends a session's lease not before its length has passed on lockd's clock since it *received* the last renewal.
//! The holder counts from when it *sent* the last renewal that was answered, which is earlier, on a clock that runs while
//! the machine sleeps (CLOCK_BOOTTIME), and is done before the length has passed. So as long as the two clocks run equally
//! fast, or as far apart as lockd allows for (2 %), who acts in time has stopped before anybody else is granted what it
//! held. A holder that does not run, or is not scheduled in time, is not stopped by this: that is what terms are for.
//!
//! ```text
//! renewal sent          2/3            3/4                11/12         lockd may end the lease
//!      |----------------|--------------|------------------|-------------|
//!                       told: Jeopardy  asked to end       killed
//! ```

use std::time::Duration;

use csnap_proto::Time;

use crate::broken::Broken;

/// What a holder owes now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Duty {
    /// It may act.
    Act,
    /// It must come to an end: it will not hold much longer, and no renewal changes that any more.
    End,
    /// It must have ended: whatever still runs is stopped at once.
    Stop,
}

/// A rule to break, for tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Canary {
    /// Count from when the answer came, not from when the renewal was sent.
    CountFromAnswer,
    /// Stop when the lease has passed, not before.
    StopLate,
}

/// See the module. Pure: told when renewals were confirmed and what time it is.
#[derive(Clone, Copy, Debug)]
pub struct Tenure {
    lease: Duration,
    confirmed_at: Time,
    /// Set once it must end, however many renewals are confirmed later.
    stop_at: Option<Time>,
    broken: Broken<Canary>,
}

impl Tenure {
    /// Of a session with this lease, whose last confirmed renewal was sent at `confirmed_at`.
    #[must_use]
    pub fn new(lease: Duration, confirmed_at: Time) -> Self {
        Self { lease, confirmed_at, stop_at: None, broken: Broken::NONE }
    }

    /// As [`Self::new`], breaking a rule.
    #[cfg(feature = "canary")]
    #[must_use]
    pub fn breaking(lease: Duration, confirmed_at: Time, rule: Canary) -> Self {
        Self { broken: Broken::rule(rule), ..Self::new(lease, confirmed_at) }
    }

    /// A renewal that was sent at `sent_at` was answered, `now` at the earliest known.
    pub fn confirm(&mut self, now: Time, sent_at: Time) {
        let from = if self.broken.breaks(Canary::CountFromAnswer) { now } else { sent_at };
        self.confirmed_at = self.confirmed_at.max(from);
    }

    /// What is owed. Once it is not [`Duty::Act`] it never is again.
    pub fn duty(&mut self, now: Time) -> Duty {
        if self.stop_at.is_none() && now >= self.end_at() {
            self.stop_at = Some(self.confirmed_at.after(self.stop_after()));
        }
        match self.stop_at {
            None => Duty::Act,
            Some(stop_at) if now < stop_at => Duty::End,
            Some(_) => Duty::Stop,
        }
    }

    /// When [`Self::duty`] changes next if no renewal is confirmed; `None` when it does not change any more.
    #[must_use]
    pub fn next_deadline(&self, now: Time) -> Option<Time> {
        match self.stop_at {
            None => Some(self.end_at()),
            Some(stop_at) => Some(stop_at).filter(|at| now < *at),
        }
    }

    fn end_at(&self) -> Time {
        self.confirmed_at.after(self.lease * 3 / 4)
    }

    /// Leaves a twelfth of the lease for a kill to be scheduled.
    fn stop_after(&self) -> Duration {
        if self.broken.breaks(Canary::StopLate) {
            return self.lease * 11 / 10;
        }
        self.lease * 11 / 12
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(12);

    fn s(seconds: u64) -> Time {
        Time(seconds * 1_000_000)
    }

    #[test]
    fn who_is_not_confirmed_is_asked_then_stopped_before_the_lease_is_over() {
        let mut tenure = Tenure::new(LEASE, s(100));
        assert_eq!((tenure.duty(s(100)), tenure.next_deadline(s(100))), (Duty::Act, Some(s(109))));
        assert_eq!(tenure.duty(Time(s(109).0 - 1)), Duty::Act);
        assert_eq!((tenure.duty(s(109)), tenure.next_deadline(s(109))), (Duty::End, Some(s(111))));
        assert_eq!((tenure.duty(s(111)), tenure.next_deadline(s(111))), (Duty::Stop, None));
        assert!(s(111) < s(100).after(LEASE));
    }

    #[test]
    fn confirmations_prolong_and_older_ones_do_not_shorten() {
        let mut tenure = Tenure::new(LEASE, s(100));
        tenure.confirm(s(106), s(105));
        tenure.confirm(s(106), s(103));
        assert_eq!(tenure.duty(s(113)), Duty::Act);
        assert_eq!(tenure.duty(s(114)), Duty::End);
    }

    #[test]
    fn who_was_asked_to_end_is_stopped_whatever_is_confirmed_later() {
        let mut tenure = Tenure::new(LEASE, s(100));
        assert_eq!(tenure.duty(s(109)), Duty::End);
        tenure.confirm(s(110), s(110));
        assert_eq!(tenure.duty(s(110)), Duty::End);
        assert_eq!(tenure.duty(s(111)), Duty::Stop);
    }

    #[test]
    fn who_slept_through_everything_is_stopped_at_once() {
        let mut tenure = Tenure::new(LEASE, s(100));
        assert_eq!(tenure.duty(s(1000)), Duty::Stop);
    }
}
