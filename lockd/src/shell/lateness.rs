//! That lockd came late to its leases and began all anew: said in the log, with how often, and not each time.
//!
//! On a machine that is overloaded for long this goes on and on, and nobody who died loses what he held; then this line is
//! all that says why.

use std::time::Duration;

use csnap_proto::Time;

use crate::core::Overslept;

/// Between two lines: a machine that is overloaded for an hour fills no disk, and who looks at the log sees it at once.
const SAID_EVERY: Duration = Duration::from_secs(10);

/// What was seen of it since the daemon began.
#[derive(Default)]
pub(super) struct Lateness {
    times: u64,
    /// Since the last line.
    longest: Duration,
    said_at: Option<Time>,
}

impl Lateness {
    /// Counts it; the line to say now, unless one was said a moment ago.
    pub(super) fn note(&mut self, now: Time, overslept: Overslept) -> Option<String> {
        let Overslept { late, leases } = overslept;
        self.times += 1;
        self.longest = self.longest.max(late);
        if self.said_at.is_some_and(|at| now.since(at) < SAID_EVERY) {
            return None;
        }
        self.said_at = Some(now);
        let (longest, times) = (std::mem::take(&mut self.longest).as_millis(), self.times);
        Some(format!(
            "looked at its leases up to {longest} ms late, so all {leases} begin anew ({times} times since it started): who is \
             dead keeps his locks longer; give lockd a processor, or find out who stops it"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn late(ms: u64) -> Overslept {
        Overslept { late: Duration::from_millis(ms), leases: 3 }
    }

    #[test]
    fn lateness_is_said_at_once_then_seldom_and_counted_always() {
        let mut lateness = Lateness::default();
        let first = lateness.note(Time(1_000_000), late(250)).expect("the first is said");
        assert!(first.contains("250 ms") && first.contains("all 3") && first.contains("(1 times"), "{first}");
        for second in 2..11 {
            assert_eq!(lateness.note(Time(second * 1_000_000), late(900 - second)), None);
        }
        let next = lateness.note(Time(11_000_000), late(300)).expect("ten seconds later");
        assert!(next.contains("898 ms") && next.contains("(11 times"), "{next}");
    }
}
