//! A daemon that is started by another process ends with it, however that process ends: killed, crashed, or done.
//!
//! A child asks the kernel for a signal at its parent's death, and then looks whether the parent is still there, since it
//! may have died before. A process whose supervisor is not its parent (an exporter outlives its agent, not its `up`)
//! waits for the supervisor's end on a descriptor of it.

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, getppid, pidfd_open, set_parent_process_death_signal};

/// Exit status of a process whose supervisor went away.
const ORPHANED: i32 = 3;

/// Ties this process to `supervisor` for the rest of its life. Call it first, on the main thread.
pub(crate) fn tie_to(supervisor: u32) -> anyhow::Result<()> {
    let supervisor = i32::try_from(supervisor).ok().and_then(Pid::from_raw).context("no such process id")?;
    if getppid() == Some(supervisor) {
        set_parent_process_death_signal(Some(Signal::KILL)).context("cannot ask for the parent's death")?;
        if getppid() == Some(supervisor) {
            return Ok(());
        }
        std::process::exit(ORPHANED);
    }
    let Ok(descriptor) = pidfd_open(supervisor, PidfdFlags::empty()) else { std::process::exit(ORPHANED) };
    std::thread::spawn(move || {
        while let Err(rustix::io::Errno::INTR) = poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], None) {}
        std::process::exit(ORPHANED);
    });
    Ok(())
}
