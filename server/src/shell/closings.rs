//! The log of connections that the server closes, a line each while they are few: strangers can cause as many as they
//! like, and must not fill a disk.

use std::cell::RefCell;
use std::net::SocketAddr;

use csnap_proto::Time;

use crate::core::CloseReason;

/// Lines within [`PERIOD_MICROS`]; more is no news.
const LINES_MAX: u32 = 20;

/// How long lines are counted together, microseconds.
const PERIOD_MICROS: u64 = 1_000_000;

/// Shared by the serving loop and the readers of all connections.
#[derive(Default)]
pub(super) struct Closings(RefCell<Counts>);

#[derive(Default)]
struct Counts {
    began: Time,
    lines: u32,
    left_out: u64,
}

impl Closings {
    /// Logs why a connection is closed, or counts it.
    pub(super) fn note(&self, now: Time, peer: SocketAddr, reason: CloseReason) {
        self.sum_up(now);
        if self.0.borrow_mut().admit() {
            tracing::warn!(%peer, "connection closed: {reason}");
        }
    }

    /// Says how many were left out, once their time is over.
    pub(super) fn sum_up(&self, now: Time) {
        let left_out = self.0.borrow_mut().begin(now);
        if left_out > 0 {
            tracing::warn!("{left_out} more connections were closed within a second");
        }
    }
}

impl Counts {
    /// Begins to count anew if it is time; what the last period left out.
    fn begin(&mut self, now: Time) -> u64 {
        if now.0.saturating_sub(self.began.0) < PERIOD_MICROS {
            return 0;
        }
        std::mem::replace(self, Self { began: now, ..Self::default() }).left_out
    }

    /// Whether one more line fits.
    fn admit(&mut self) -> bool {
        if self.lines == LINES_MAX {
            self.left_out += 1;
            return false;
        }
        self.lines += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_gets_so_many_lines_and_then_a_number() {
        let mut counts = Counts::default();
        let start = Time(5 * PERIOD_MICROS);
        assert_eq!(counts.begin(start), 0);
        let lines = (0..1000).filter(|_| counts.admit()).count();
        assert_eq!(lines, LINES_MAX as usize);
        assert_eq!(counts.begin(Time(start.0 + PERIOD_MICROS - 1)), 0, "not yet");
        assert!(!counts.admit());
        assert_eq!(counts.begin(Time(start.0 + PERIOD_MICROS)), 1001 - u64::from(LINES_MAX));
        assert_eq!(counts.begin(Time(start.0 + 2 * PERIOD_MICROS)), 0, "said once");
        assert!(counts.admit());
    }
}
