//! Processes: started, signalled, and waited for, ours and those found again.
//!
//! A process is told from a later one with the same number by its start time; signals go through a descriptor that was
//! checked against it, so they cannot hit a stranger.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::process::Command;
use tracing::{info, warn};

use super::{Event, Events};
use crate::core::{Input, Process};

/// When a process started, clock ticks since boot: field 22 of its `stat`. None if it is gone.
pub(super) fn start_of(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, and may itself hold anything.
    let after_name = stat.rsplit_once(')')?.1;
    let mut fields = after_name.split_ascii_whitespace();
    let state = fields.next()?;
    (!matches!(state, "Z" | "X")).then(|| fields.nth(18)?.parse().ok())?
}

/// Whether exactly this process still runs.
pub(super) fn is_alive(process: Process) -> bool {
    start_of(process.pid) == Some(process.started)
}

/// A descriptor of exactly this process, if it still runs.
fn open(process: Process) -> Option<OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(process.pid).ok()?)?;
    let fd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    is_alive(process).then_some(fd)
}

/// Every process that somebody waits for.
pub(super) struct Children {
    events: Events,
    waited: Arc<Mutex<BTreeSet<Process>>>,
}

impl Children {
    pub(super) fn new(events: Events) -> Self {
        Self { events, waited: Arc::default() }
    }

    /// Starts a program; its end is reported once it is reaped. It is not killed when this handle goes.
    pub(super) fn spawn(&self, program: &[OsString]) -> Result<Process, String> {
        let (name, arguments) = program.split_first().ok_or("no program is configured")?;
        let mut child = Command::new(name)
            .args(arguments)
            .stdin(Stdio::null())
            .spawn()
            .map_err(|error| format!("{}: {error}", name.display()))?;
        let pid = child.id().ok_or("it ended at once")?;
        // Not reaped yet, so the number is still its own, also if it has ended.
        let process = Process { pid, started: start_of(pid).unwrap_or(0) };
        self.waited.lock().unwrap_or_else(PoisonError::into_inner).insert(process);
        let (events, waited) = (self.events.clone(), self.waited.clone());
        tokio::spawn(async move {
            match child.wait().await {
                Ok(status) => info!("process {pid} ended: {status}"),
                Err(error) => warn!("process {pid} cannot be waited for: {error}"),
            }
            report(process, &events, &waited).await;
        });
        Ok(process)
    }

    /// Reports the end of a process that is not our child.
    pub(super) fn watch(&self, process: Process) {
        if !self.waited.lock().unwrap_or_else(PoisonError::into_inner).insert(process) {
            return;
        }
        let (events, waited) = (self.events.clone(), self.waited.clone());
        // A thread, for tokio waits for children and sockets only; there are one or two such processes in an agent's life.
        std::thread::spawn(move || {
            if let Some(fd) = open(process) {
                wait_until_readable(&fd);
            }
            waited.lock().unwrap_or_else(PoisonError::into_inner).remove(&process);
            // The main loop may be gone; then nobody needs to know.
            let _ = events.blocking_send(Event::Input(Input::Ended(process)));
        });
    }

    /// Signals exactly this process, and sees to it that its end is reported.
    pub(super) fn signal(&self, process: Process, signal: Signal) {
        if let Some(fd) = open(process)
            && let Err(error) = pidfd_send_signal(&fd, signal)
        {
            warn!("process {} cannot be signalled: {error}", process.pid);
        }
        self.watch(process);
    }
}

async fn report(process: Process, events: &Events, waited: &Mutex<BTreeSet<Process>>) {
    waited.lock().unwrap_or_else(PoisonError::into_inner).remove(&process);
    // The main loop may be gone; then nobody needs to know.
    let _ = events.send(Event::Input(Input::Ended(process))).await;
}

/// A process's descriptor is readable once the process has ended.
fn wait_until_readable(fd: &OwnedFd) {
    loop {
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], None) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return warn!("a process cannot be waited for: {error}"),
            Ok(_) => return,
        }
    }
}
