//! Starting writeback early, so that a drain has little left to sync.
//!
//! Left alone, the kernel keeps gigabytes of written data in memory, and the sync before a snapshot would take as long as
//! the medium needs for them. So writeback is started when as much was written as the medium takes in [`SYNC_TARGET`],
//! which the last writeback tells; a fast medium is left alone for longer. A flush does the same work.

use std::time::Duration;

use csnap_proto::Time;

/// What a drain may find dirty, in time of the medium.
const SYNC_TARGET: Duration = Duration::from_secs(1);

/// However fast the medium is: so many times the least.
const MOST_TIMES: u64 = 16;

/// See the module.
#[derive(Debug)]
pub(super) struct Writeback {
    /// Never started for less, bytes; 0 for never at all.
    least: u64,
    /// Started for that much, bytes.
    bound: u64,
    /// Bytes written since a sync of any kind was last started.
    dirty: u64,
    /// Began then, with so many bytes dirty.
    running: Option<(Time, u64)>,
}

impl Writeback {
    pub(super) fn new(least_bytes: u64) -> Self {
        Self { least: least_bytes, bound: least_bytes, dirty: 0, running: None }
    }

    pub(super) fn on_written(&mut self, bytes: u64) {
        self.dirty = self.dirty.saturating_add(bytes);
    }

    /// A sync begins, whoever wants it: what was written is on its way.
    pub(super) fn on_sync_begun(&mut self) {
        self.dirty = 0;
    }

    /// Whether to begin; it has begun then.
    pub(super) fn begin_if_due(&mut self, now: Time) -> bool {
        let due = self.least > 0 && self.dirty >= self.bound && self.running.is_none();
        if due {
            self.running = Some((now, std::mem::take(&mut self.dirty)));
        }
        due
    }

    /// It has ended.
    pub(super) fn on_done(&mut self, now: Time) {
        let Some((begun, bytes)) = self.running.take() else { return };
        let took = now.since(begun).as_micros().max(1);
        let in_target = u128::from(bytes) * SYNC_TARGET.as_micros() / took;
        let in_target = u64::try_from(in_target).unwrap_or(u64::MAX);
        self.bound = in_target.clamp(self.least, self.least.saturating_mul(MOST_TIMES));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: u64 = 1 << 20;

    /// The bound after a writeback of the least that took so long.
    fn bound_after(took_us: u64) -> u64 {
        let mut writeback = Writeback::new(LEAST);
        writeback.on_written(LEAST - 1);
        assert!(!writeback.begin_if_due(Time(0)));
        writeback.on_written(1);
        assert!(writeback.begin_if_due(Time(0)));
        writeback.on_written(LEAST);
        assert!(!writeback.begin_if_due(Time(1)), "one at a time");
        writeback.on_done(Time(took_us));
        writeback.bound
    }

    #[test]
    fn a_fast_medium_is_left_alone_for_longer_within_bounds() {
        assert_eq!(bound_after(10_000_000), LEAST);
        assert_eq!(bound_after(1_000_000), LEAST);
        assert_eq!(bound_after(250_000), 4 * LEAST);
        assert_eq!(bound_after(0), MOST_TIMES * LEAST);
    }

    #[test]
    fn who_flushes_is_left_alone() {
        let mut writeback = Writeback::new(LEAST);
        for _ in 0..10 {
            writeback.on_written(LEAST / 2);
            writeback.on_sync_begun();
        }
        assert!(!writeback.begin_if_due(Time(0)));
    }

    #[test]
    fn zero_is_never() {
        let mut writeback = Writeback::new(0);
        writeback.on_written(u64::MAX);
        assert!(!writeback.begin_if_due(Time(0)));
    }
}
