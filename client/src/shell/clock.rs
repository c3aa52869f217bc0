//! The clock of this machine.

use csnap_proto::Time;
use rustix::time::{ClockId, clock_gettime};

/// Microseconds since the machine started, suspension included.
pub(crate) fn now() -> Time {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).expect("the clock counts from the start of the machine");
    let nanoseconds = u64::try_from(now.tv_nsec).expect("nanoseconds are positive");
    Time(seconds * 1_000_000 + nanoseconds / 1_000)
}
