//! Processes: started, signalled, and waited for, ours and those found again.
//!
//! A process is told from a later one with the same number by its start time; signals go through a descriptor that was
//! checked against it, so they cannot hit a stranger.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::process::Command;
use tracing::{info, warn};

use super::{Event, Events};
use crate::core::{Input, Process};

/// Between looks at a process whose end the kernel does not report to us.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// When a process started, clock ticks since boot. None if it is gone, or if the kernel does not say.
pub(super) fn start_of(pid: u32) -> Option<u64> {
    look(pid).ok().flatten().filter(|looked| !looked.ended).map(|looked| looked.started)
}

/// The same of a child that was not reaped yet, ended or not.
fn start_of_child(pid: u32) -> Option<u64> {
    look(pid).ok().flatten().map(|looked| looked.started)
}

/// Whether exactly this process may still run: what cannot be looked at is not gone.
pub(super) fn is_alive(process: Process) -> bool {
    let it = |looked: Looked| looked.started == process.started && !looked.ended;
    look(process.pid).map_or(true, |looked| looked.is_some_and(it))
}

/// What the kernel says of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Looked {
    started: u64,
    ended: bool,
}

fn look(pid: u32) -> io::Result<Option<Looked>> {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => Ok(looked_in(&stat)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // It ended between opening and reading.
        Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The start is field 22 of a `stat`. A process whose first thread has ended shows as a zombie although others may still
/// be in a system call, with I/O on its way: it has ended when no other thread (field 20) is left.
fn looked_in(stat: &str) -> Option<Looked> {
    // The second field is the program's name in parentheses, and may itself hold anything.
    let after_name = stat.rsplit_once(')')?.1;
    let fields: Vec<&str> = after_name.split_ascii_whitespace().collect();
    let (state, threads, started) = (*fields.first()?, *fields.get(17)?, *fields.get(19)?);
    let ended = matches!(state, "Z" | "X") && threads.parse::<u32>().is_ok_and(|threads| threads <= 1);
    Some(Looked { started: started.parse().ok()?, ended })
}

/// A descriptor of exactly this process, if it still runs.
fn open(process: Process) -> Option<OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(process.pid).ok()?)?;
    let fd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    (start_of(process.pid) == Some(process.started)).then_some(fd)
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
        let process = Process { pid, started: start_of_child(pid).unwrap_or(0) };
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
        // A thread, for tokio waits for children and sockets only; there are one or two such processes in an agent's life.
        let (ended, end) = tokio::sync::oneshot::channel::<()>();
        let watcher = std::thread::Builder::new().spawn(move || {
            if let Some(fd) = open(process) {
                wait_until_readable(&fd);
            }
            drop(ended);
        });
        if let Err(error) = watcher {
            warn!("process {} is looked at again and again: {error}", process.pid);
        }
        let (events, waited) = (self.events.clone(), self.waited.clone());
        tokio::spawn(async move {
            // Dropped in either case: the descriptor was readable, or nobody waits for it.
            let _ = end.await;
            while is_alive(process) {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            report(process, &events, &waited).await;
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
            Err(Errno::INTR) => {}
            Err(error) => return warn!("a process is looked at again and again: {error}"),
            Ok(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_gone_only_when_its_last_thread_is() {
        let stat = |name: &str, state: &str, threads: u32| {
            format!("7 ({name}) {state} 1 7 7 0 -1 4194560 9 0 0 0 1 2 0 0 20 0 {threads} 0 4242 0 0\n")
        };
        for (name, state, threads, gone) in [
            ("csnap", "S", 4, false),
            ("csnap", "D", 1, false),
            ("csnap", "Z", 2, false),
            ("csnap", "Z", 1, true),
            ("csnap", "Z", 0, true),
            ("csnap", "X", 0, true),
            ("a) Z 1 (b", "R", 1, false),
        ] {
            let expected = Some(Looked { started: 4242, ended: gone });
            assert_eq!(looked_in(&stat(name, state, threads)), expected, "{name} {state} {threads}");
        }
        assert_eq!((looked_in(""), looked_in("7 (csnap) S 1")), (None, None));
    }

    #[test]
    fn a_child_that_ended_at_once_is_still_told_from_others() {
        let mut child = std::process::Command::new("true").spawn().expect("starts");
        while start_of(child.id()).is_some() {
            std::thread::yield_now();
        }
        assert_ne!(start_of_child(child.id()), None, "it was not reaped");
        child.wait().expect("our child");
        assert_eq!(start_of(child.id()), None);
    }

    #[tokio::test]
    async fn the_end_of_a_process_that_was_found_again_is_reported() {
        let mut found = std::process::Command::new("sleep").arg("1000").spawn().expect("starts");
        let pid = found.id();
        let process = Process { pid, started: start_of(pid).expect("it runs") };
        let (events, mut inbox) = tokio::sync::mpsc::channel(16);
        let children = Children::new(events);
        children.watch(process);
        tokio::task::yield_now().await;
        assert!(inbox.try_recv().is_err());
        children.signal(process, Signal::KILL);
        let reaper = std::thread::spawn(move || found.wait());
        let event = inbox.recv().await.expect("its end");
        assert!(matches!(event, Event::Input(Input::Ended(ended)) if ended == process));
        reaper.join().expect("no panic").expect("it was our child");
    }

    #[test]
    fn this_process_lives_and_another_of_its_number_does_not() {
        let pid = std::process::id();
        let started = start_of(pid).expect("we run");
        assert!(is_alive(Process { pid, started }) && !is_alive(Process { pid, started: started + 1 }));
    }
}
