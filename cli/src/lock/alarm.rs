//! A timer on the clock that also runs while the machine sleeps: after a suspend it rings at once, not as much later.

use std::os::fd::OwnedFd;
use std::time::Duration;

use csnap_proto::Time;
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::unix::AsyncFd;

/// See the module.
pub(super) struct Alarm(AsyncFd<OwnedFd>);

impl Alarm {
    pub(super) fn new() -> anyhow::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self(watched(timerfd_create(TimerfdClockId::Boottime, flags)?)?))
    }

    /// Rings once at `at`, also if that is past; never, for none. What was set before is forgotten.
    pub(super) fn set(&self, at: Option<Time>) -> anyhow::Result<()> {
        // Zero would switch it off.
        let at = at.map_or(Duration::ZERO, |at| Duration::from_micros(at.0.max(1)));
        let value = Timespec { tv_sec: at.as_secs().try_into()?, tv_nsec: at.subsec_nanos().into() };
        let interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        let spec = Itimerspec { it_interval: interval, it_value: value };
        timerfd_settime(self.0.get_ref(), TimerfdTimerFlags::ABSTIME, &spec)?;
        Ok(())
    }

    /// Returns when it rings. May be dropped at any time.
    pub(super) async fn rings(&self) -> anyhow::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            match rustix::io::read(self.0.get_ref(), &mut [0; 8]) {
                Ok(_) => return Ok(()),
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A descriptor whose readiness the runtime tells.
#[expect(deprecated, reason = "unsound for what lies about its descriptor; an OwnedFd cannot")]
pub(super) fn watched(descriptor: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(descriptor)
}

#[cfg(test)]
mod tests {
    use csnap_lockd::client::shell::now;

    use super::*;

    #[tokio::test]
    async fn it_rings_at_its_time_and_at_once_for_a_time_that_is_past() {
        let alarm = Alarm::new().expect("a timer");
        alarm.set(Some(Time(0))).expect("set");
        alarm.rings().await.expect("rings");
        let at = now().after(Duration::from_millis(20));
        alarm.set(Some(at)).expect("set");
        alarm.rings().await.expect("rings");
        assert!(now() >= at);
        alarm.set(Some(now())).expect("set");
        alarm.set(None).expect("unset");
        let rung = tokio::time::timeout(Duration::from_millis(20), alarm.rings()).await;
        assert!(rung.is_err(), "it was unset");
    }
}
