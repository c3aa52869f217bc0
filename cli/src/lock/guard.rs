//! `csnap lock guard`: stands between `csnap lock run`, the keeper of the lock, and its command.
//!
//! It leads the command's process group, starts the command, and hears of every confirmed renewal over a socket. It asks the
//! command to end when renewals are missing, and kills the whole group, itself included, before the lease can be over or
//! when the keeper is gone. So a keeper that is killed or frozen takes the command along; and a guard that is frozen or killed
//! is noticed by the keeper, which does the same. When both are killed at once the command itself dies with the guard
//! (`exec`), but what it had started may not.

use std::ffi::OsString;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use csnap_lockd::client::shell::now;
use csnap_lockd::client::{Duty, Tenure};
use csnap_proto::Time;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::{Pid, Signal, WaitOptions, getpgrp, kill_current_process_group, waitpid};
use rustix::termios::{tcgetpgrp, tcsetpgrp};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};

use super::alarm::Alarm;
use super::command::{exit_code, signalled};
use super::interrupts::{ALSO, Interrupts};
use crate::args::lock::Guard;
use crate::supervisor;

/// A word on the socket: the time at which a renewal was sent that was answered.
const WORD_BYTES: usize = 8;

/// What the shells' statuses say of a command that cannot be run, and of one that is not there.
const CANNOT_RUN: u8 = 126;
const NOT_FOUND: u8 = 127;

/// Runs the command to its end; gives its status. Does not return where the command is killed.
pub(super) async fn guard(guard: Guard) -> anyhow::Result<u8> {
    // What is sent to the group is meant for the command; it also keeps us from stopping with it.
    let mut interrupts = Interrupts::catch()?;
    interrupts.also(&ALSO)?;
    let mut children = signal(SignalKind::child())?;
    let control = std::io::stdin().as_fd().try_clone_to_owned()?;
    let (confirmed_at, stdin) = first_word(&control)?;
    let control = std::os::unix::net::UnixStream::from(control);
    control.set_nonblocking(true)?;
    let mut control = UnixStream::from_std(control)?;
    let mut tenure = Tenure::new(Duration::from_millis(guard.lease_ms), confirmed_at);
    let terminal = guard.terminal_of.and_then(Pid::from_raw);
    let kept = terminal.is_some().then(|| stdin.try_clone()).transpose()?;
    let child = start(&guard.command, stdin)?;
    let alarm = Alarm::new()?;
    let mut word = [0; WORD_BYTES];
    let mut filled = 0;
    let mut asked = false;
    loop {
        match tenure.duty(now()) {
            Duty::Act => {}
            Duty::End if !asked => {
                asked = true;
                let _ = kill_current_process_group(Signal::TERM);
                let _ = kill_current_process_group(Signal::CONT);
            }
            Duty::End => {}
            Duty::Stop => kill_all(),
        }
        alarm.set(tenure.next_deadline(now()))?;
        tokio::select! {
            biased;
            rung = alarm.rings() => rung?,
            count = control.read(&mut word[filled..]) => match count {
                Ok(count) if count > 0 => {
                    filled = (filled + count) % WORD_BYTES;
                    if filled == 0 {
                        tenure.confirm(now(), Time(u64::from_le_bytes(word)));
                    }
                }
                // The keeper is gone.
                _ => kill_all(),
            },
            _ = children.recv() => if let Some(status) = look(child, terminal.is_some())? {
                if let (Some(keeper), Some(stdin)) = (terminal, kept) {
                    give_back(&stdin, keeper);
                }
                return Ok(status);
            },
            _ = interrupts.next() => {}
        }
    }
}

/// The first word, and the stdin that travels beside it.
fn first_word(control: &OwnedFd) -> anyhow::Result<(Time, OwnedFd)> {
    let mut word = [0; WORD_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut word)];
    let received = rustix::net::recvmsg(control, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC);
    let received = received.context("csnap lock run starts this, nobody else does")?;
    let mut sent = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let stdin = sent.next().and_then(|mut fds| fds.next());
    match (received.bytes, stdin) {
        (WORD_BYTES, Some(stdin)) => Ok((Time(u64::from_le_bytes(word)), stdin)),
        _ => bail!("the keeper ended before it said what to do"),
    }
}

/// The command, tied to this process.
fn start(words: &[OsString], stdin: OwnedFd) -> anyhow::Result<Pid> {
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command.args(["lock", "exec", "--guard", &std::process::id().to_string(), "--"]).args(words);
    let child = command.stdin(Stdio::from(stdin)).spawn().context("cannot start the command")?;
    i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("a process id")
}

/// The command's status, if it has ended. One that was stopped from its own terminal goes on: whoever holds a lock must not
/// stand still.
fn look(child: Pid, has_terminal: bool) -> anyhow::Result<Option<u8>> {
    while let Some((_, status)) = waitpid(Some(child), WaitOptions::NOHANG | WaitOptions::UNTRACED)? {
        if let Some(code) = status.exit_status() {
            return Ok(Some(exit_code(code)));
        }
        if let Some(signal) = status.terminating_signal() {
            return Ok(Some(signalled(signal)));
        }
        if has_terminal && status.stopping_signal() == Some(Signal::TSTP.as_raw()) {
            eprintln!("csnap: the command goes on: it holds a lock");
            let _ = kill_current_process_group(Signal::CONT);
        }
    }
    Ok(None)
}

/// The terminal goes back to where it came from, while it is still ours to give.
fn give_back(stdin: &OwnedFd, keeper: Pid) {
    if tcgetpgrp(stdin).is_ok_and(|group| group == getpgrp()) {
        let _ = tcsetpgrp(stdin, keeper);
    }
}

/// Everything in the group ends here.
fn kill_all() -> ! {
    let _ = kill_current_process_group(Signal::KILL);
    // Not reached: a signal to oneself is delivered first.
    std::process::abort()
}

/// `csnap lock exec`: becomes the command, which the kernel kills when its guard dies.
pub(super) fn exec(guard: u32, words: &[OsString]) -> anyhow::Result<u8> {
    supervisor::tie_to(guard)?;
    let (name, arguments) = words.split_first().context("a command")?;
    let error = std::process::Command::new(name).args(arguments).exec();
    eprintln!("csnap: {}: {error}", name.display());
    let missing = error.kind() == std::io::ErrorKind::NotFound;
    Ok(if missing { NOT_FOUND } else { CANNOT_RUN })
}
