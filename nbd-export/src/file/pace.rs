//! When to write at once. A buffered write is a copy into the page cache, until the kernel makes writers wait for a slow
//! disk; nothing announces that, so it is measured. After a slow write all go to the blocking pool for a while, then one
//! is tried again; each slow one in a row doubles the while.
//!
//! Invariant: of a task's time, at most one write in [`PAUSE_US_MIN`] is lost to a slow disk.

use std::sync::atomic::{AtomicU64, Ordering};

use rustix::time::{ClockId, clock_gettime};

/// A write that takes longer was slow, microseconds: twice a scheduler's slice, a hundred times a copy.
const SLOW_US: u64 = 2000;

/// What a large write may take beside, microseconds a mebibyte: a memory that is slow, not a disk.
const SLOW_US_PER_MIB: u64 = 2000;

/// First and longest pause after slow writes, microseconds.
const PAUSE_US_MIN: u64 = 10_000;
const PAUSE_US_MAX: u64 = 1_000_000;

/// The measurement. See the module.
#[derive(Debug)]
pub(super) struct Pace {
    /// Writes may be done at once from then on, microseconds of CLOCK_BOOTTIME.
    resume_at: AtomicU64,
    /// Length of the last pause; 0 when the last write was quick.
    pause: AtomicU64,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self { resume_at: AtomicU64::new(0), pause: AtomicU64::new(0) }
    }

    /// Whether a write may be done at once.
    pub(super) fn may_write_now(&self) -> bool {
        // The clock is asked only while something is known to be slow.
        self.pause.load(Ordering::Relaxed) == 0 || now_us() >= self.resume_at.load(Ordering::Relaxed)
    }

    /// Before a write: what [`Self::end`] wants.
    pub(super) fn begin(&self) -> u64 {
        now_us()
    }

    /// After a write of `len` bytes that began at `begun`.
    pub(super) fn end(&self, begun: u64, len: usize) {
        self.learn(begun, now_us(), len);
    }

    fn learn(&self, begun: u64, ended: u64, len: usize) {
        let allowed = SLOW_US + SLOW_US_PER_MIB * (len as u64) / (1 << 20);
        let pause = self.pause.load(Ordering::Relaxed);
        if ended.saturating_sub(begun) > allowed {
            let longer = (pause * 2).clamp(PAUSE_US_MIN, PAUSE_US_MAX);
            self.resume_at.store(ended + longer, Ordering::Relaxed);
            self.pause.store(longer, Ordering::Relaxed);
        } else if pause != 0 {
            self.pause.store(0, Ordering::Relaxed);
        }
    }
}

fn now_us() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).expect("time since boot is positive");
    seconds * 1_000_000 + u64::try_from(now.tv_nsec).expect("below a second") / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_writes_pause_longer_and_longer_and_a_quick_one_ends_it() {
        let pace = Pace::new();
        let now = now_us();
        assert!(pace.may_write_now());
        for expected in [PAUSE_US_MIN, PAUSE_US_MIN * 2, PAUSE_US_MIN * 4] {
            pace.learn(now, now + SLOW_US + 1, 512);
            assert_eq!(pace.pause.load(Ordering::Relaxed), expected);
            assert!(!pace.may_write_now());
        }
        for _ in 0..20 {
            pace.learn(now, now + SLOW_US + 1, 512);
        }
        assert_eq!(pace.pause.load(Ordering::Relaxed), PAUSE_US_MAX);
        pace.learn(now, now + 10, 512);
        assert!(pace.may_write_now());
    }

    #[test]
    fn a_large_write_may_take_longer() {
        let pace = Pace::new();
        pace.learn(0, SLOW_US + SLOW_US_PER_MIB, 1 << 20);
        assert!(pace.may_write_now());
    }
}
