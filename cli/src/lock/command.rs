//! The command of `csnap lock run`, as the process that keeps the lock sees it: a guard, and below it the command.
//!
//! The guard (`guard`) leads the process group of the command and counts the lease on its own. So the command ends in time
//! although the keeper is killed, or frozen; and in turn the keeper kills the whole group when the guard is.

use std::ffi::OsString;
use std::io::{IoSlice, IsTerminal};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::Context;
use csnap_proto::Time;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, getpgrp, kill_process_group, pidfd_open, waitid,
};
use rustix::termios::{tcgetpgrp, tcsetpgrp};
use tokio::io::unix::AsyncFd;

use super::alarm::watched;

/// Added to the number of the signal that a command died of, as shells do.
const SIGNALLED: i32 = 128;

/// A running command. Dropping it leaves its guard without us, which ends it.
pub(super) struct Command {
    guard: Child,
    pid: Pid,
    ended: AsyncFd<OwnedFd>,
    control: UnixStream,
    /// There is a terminal, and the command does not have it yet.
    wants_terminal: bool,
}

impl Command {
    /// Starts `words` with these additions to the environment, on a session whose last confirmed renewal was sent then.
    pub(super) fn start(
        words: &[OsString],
        environment: &[(&str, OsString)],
        lease: Duration,
        confirmed_at: Time,
    ) -> anyhow::Result<Self> {
        let (control, theirs) = UnixStream::pair()?;
        let mut guard = std::process::Command::new(std::env::current_exe()?);
        guard.args(["lock", "guard", "--lease-ms", &lease.as_millis().to_string()]);
        let wants_terminal = std::io::stdin().is_terminal();
        if wants_terminal {
            guard.args(["--terminal-of", &getpgrp().as_raw_pid().to_string()]);
        }
        guard.arg("--").args(words).envs(environment.iter().map(|(name, value)| (name, value)));
        guard.stdin(Stdio::from(OwnedFd::from(theirs))).process_group(0);
        let guard = guard.spawn().context("cannot start the command's guard")?;
        let pid = i32::try_from(guard.id()).ok().and_then(Pid::from_raw).context("a process id")?;
        let ended = watched(pidfd_open(pid, PidfdFlags::NONBLOCK)?)?;
        let mut command = Self { guard, pid, ended, control, wants_terminal };
        command.give_terminal();
        command.hand_over(confirmed_at).context("the command's guard ended")?;
        Ok(command)
    }

    /// The first word to the guard, with our stdin, which is the command's.
    fn hand_over(&self, confirmed_at: Time) -> anyhow::Result<()> {
        let stdin = std::io::stdin();
        let fds = [stdin.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(
            ancillary.push(SendAncillaryMessage::ScmRights(&fds)),
            "the buffer is made for one descriptor"
        );
        let bytes = confirmed_at.0.to_le_bytes();
        rustix::net::sendmsg(&self.control, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// A renewal was answered that was sent then. A guard that is full of such news, or gone, needs none.
    pub(super) fn confirm(&self, sent_at: Time) {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let _ = rustix::net::send(&self.control, &sent_at.0.to_le_bytes(), flags);
    }

    /// Signals the command and everything in its process group. The group is there while its guard is not reaped.
    pub(super) fn signal(&self, signal: Signal) {
        let _ = kill_process_group(self.pid, signal);
    }

    /// Whether [`Self::give_terminal`] may be of use.
    pub(super) fn wants_terminal(&self) -> bool {
        self.wants_terminal
    }

    /// The command is what the person at the terminal talks to: it gets the terminal, once we have it. A command that waited
    /// for that goes on.
    pub(super) fn give_terminal(&mut self) {
        let ours = tcgetpgrp(std::io::stdin()).is_ok_and(|group| group == getpgrp());
        if self.wants_terminal && ours && tcsetpgrp(std::io::stdin(), self.pid).is_ok() {
            self.wants_terminal = false;
            self.signal(Signal::CONT);
        }
    }

    /// Passes a signal on. What is to end must not stand still.
    pub(super) fn pass(&self, signal: Signal) {
        self.signal(signal);
        if matches!(signal, Signal::HUP | Signal::INT | Signal::TERM) {
            self.signal(Signal::CONT);
        }
    }

    /// Returns when the command, or its guard, has ended. May be dropped at any time.
    pub(super) async fn ended(&self) -> anyhow::Result<()> {
        let _ = self.ended.readable().await?;
        Ok(())
    }

    /// The status of a command that has ended. None: its guard was killed, and the rest of the group is now.
    pub(super) fn reap(mut self) -> anyhow::Result<Option<u8>> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        let status = waitid(WaitId::Pid(self.pid), options)?.context("it has ended")?;
        let code = status.exit_status().map(exit_code);
        if code.is_none() {
            self.signal(Signal::KILL);
        }
        self.guard.wait()?;
        Ok(code)
    }
}

/// Within what a process can end with.
pub(super) fn exit_code(code: i32) -> u8 {
    u8::try_from(code & 0xff).expect("eight bits")
}

/// The status of a command that a signal ended.
pub(super) fn signalled(signal: i32) -> u8 {
    exit_code(SIGNALLED + signal)
}
