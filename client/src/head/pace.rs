//! Whether a write into the page cache is likely to return at once. The kernel does not say beforehand; it makes writers
//! wait when too much is dirty. So the last inline write decides: when it was slow, writes go to threads that may block for
//! a while, then one is tried again. The while grows with the wait, so that a disk that stays slow holds up a connection
//! for a small part of the time, however slow it is.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use csnap_proto::Time;

use crate::shell::clock;

/// An inline write slower than this held up its connection: a hundred times a usual one, and as long as a slow disk takes.
const SLOW: Duration = Duration::from_millis(2);

/// What copying may take on top, nanoseconds a byte: half a gigabyte a second.
const COPY_NS_PER_BYTE: u64 = 2;

/// How long writes are handed over after a slow one, in times of what that one took: the part of the time that a connection
/// is held up is at most one in so many.
const HAND_OVER_TIMES: u32 = 16;

/// Writes are handed over for at least this long.
const HAND_OVER_MIN: Duration = Duration::from_millis(50);

/// And for at most this long: whatever it was may have passed.
const HAND_OVER_MAX: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Inline writes pause until then, microseconds of the clock.
    slow_until: AtomicU64,
}

impl Pace {
    pub(super) fn is_quick(&self) -> bool {
        let until = self.slow_until.load(Ordering::Relaxed);
        until == 0 || until <= clock::now().0
    }

    pub(super) fn begin(&self) -> Time {
        clock::now()
    }

    pub(super) fn end(&self, began: Time, bytes: usize) {
        let now = clock::now();
        let bound = SLOW + Duration::from_nanos(COPY_NS_PER_BYTE.saturating_mul(bytes as u64));
        let took = now.since(began);
        let pause = took.saturating_mul(HAND_OVER_TIMES).clamp(HAND_OVER_MIN, HAND_OVER_MAX);
        let until = if took > bound { now.after(pause).0 } else { 0 };
        if self.slow_until.load(Ordering::Relaxed) != until {
            self.slow_until.store(until, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_write_hands_over_and_a_quick_one_ends_it() {
        let pace = Pace::default();
        assert!(pace.is_quick());
        let now = pace.begin();
        pace.end(Time(now.0.saturating_sub(1_000_000)), 4096);
        assert!(!pace.is_quick());
        pace.end(pace.begin(), 4096);
        assert!(pace.is_quick());
    }

    #[test]
    fn the_slower_a_write_the_longer_the_next_ones_are_handed_over() {
        let pace = Pace::default();
        let paused = |took_us: u64| {
            let now = pace.begin();
            pace.end(Time(now.0 - took_us), 4096);
            Duration::from_micros(pace.slow_until.load(Ordering::Relaxed) - now.0)
        };
        assert!(paused(2_100) >= HAND_OVER_MIN);
        assert!(paused(300_000) >= Duration::from_millis(4800));
        assert!(paused(60_000_000) < HAND_OVER_MAX * 2, "and not for ever");
    }

    #[test]
    fn a_large_write_has_time_to_copy() {
        let pace = Pace::default();
        let now = pace.begin();
        pace.end(Time(now.0.saturating_sub(3_000)), 32 << 20);
        assert!(pace.is_quick());
    }
}
