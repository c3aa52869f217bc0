//! `csnap lock …`, as clap reads it.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args, Subcommand};
use csnap_proto::limits::{KEY_BYTES_MAX, LEASE_MS_MAX, LOCK_NAME_BYTES_MAX};
use csnap_proto::message::lock::Mode;

use crate::lockds::{At, In};

/// Shortest lease that a command may ask for, milliseconds: below, a busy machine's scheduling alone would end it.
const LEASE_MS_LEAST: u64 = 500;

#[derive(Debug, Args)]
#[command(mut_arg("lockd", |arg| arg.global(true)), mut_arg("space", |arg| arg.global(true)))]
pub(crate) struct Lock {
    #[command(flatten)]
    pub(crate) at: At,
    #[command(flatten)]
    pub(crate) space: In,
    #[command(subcommand)]
    pub(crate) action: LockAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum LockAction {
    /// Run a command while holding a lock; kill it when the lock is lost.
    Run(LockRun),
    /// Take a lock that stays after this command, for the owner in a file; or take it over anew for that owner.
    Acquire {
        #[arg(value_parser = parse_lock_name)]
        name: String,
        /// NL, CR, CW, PR, PW or EX; unless given EX, or the one that the owner has.
        #[arg(long, value_parser = parse_mode)]
        mode: Option<Mode>,
        #[command(flatten)]
        owned: Owned,
        #[command(flatten)]
        patience: Patience,
    },
    /// Change the mode or the value block of an owner's lock.
    Convert {
        #[arg(value_parser = parse_lock_name)]
        name: String,
        /// NL, CR, CW, PR, PW or EX; unless given the one that it has.
        #[arg(long, value_parser = parse_mode)]
        mode: Option<Mode>,
        #[command(flatten)]
        owned: Owned,
        #[command(flatten)]
        value: NewValue,
        #[command(flatten)]
        patience: Patience,
    },
    /// Give an owner's lock up.
    Release {
        #[arg(value_parser = parse_lock_name)]
        name: String,
        #[command(flatten)]
        owned: Owned,
        #[command(flatten)]
        value: NewValue,
    },
    /// List locks.
    List {
        /// Only those whose session is gone: an owner's, between its commands or abandoned.
        #[arg(long)]
        orphans: bool,
    },
    /// Show a lock's holders, its queues and its value block.
    Show {
        #[arg(value_parser = parse_lock_name)]
        name: String,
    },
    /// Print what changes, until ^C: a line, or with --json an object, for each event.
    Watch(LockWatch),
    /// Take a granted lock from its holder, whoever that is.
    Break {
        /// The lock's number, as show and list give it.
        lock: u64,
    },
    /// Between csnap lock run and its command.
    #[command(hide = true)]
    Guard(Guard),
    /// Becomes the command of csnap lock run.
    #[command(hide = true)]
    Exec {
        /// End at once when this process does.
        #[arg(long)]
        guard: u32,
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct LockRun {
    #[arg(value_parser = parse_lock_name)]
    pub(crate) name: String,
    /// NL, CR, CW, PR, PW or EX.
    #[arg(long, default_value = "EX", value_parser = parse_mode)]
    pub(crate) mode: Mode,
    #[command(flatten)]
    pub(crate) patience: Patience,
    #[command(flatten)]
    pub(crate) lease: Lease,
    /// What to run.
    #[arg(last = true, required = true)]
    pub(crate) command: Vec<OsString>,
}

/// How long a session outlives its last renewal.
#[derive(Clone, Debug, Args)]
pub(crate) struct Lease {
    /// Seconds after which others get what a command held that died with its machine; its own time is up a little sooner.
    #[arg(long = "lease", value_name = "SECONDS", default_value = "10", value_parser = parse_lease)]
    pub(crate) length: Duration,
}

/// For how long to wait for a lock.
#[derive(Clone, Debug, Args)]
pub(crate) struct Patience {
    /// Give up after so many seconds; unless given, wait for ever.
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, conflicts_with = "no_wait")]
    pub(crate) wait: Option<Duration>,
    /// Give up at once if somebody is in the way.
    #[arg(long)]
    pub(crate) no_wait: bool,
}

/// Whose lock.
#[derive(Clone, Debug, Args)]
pub(crate) struct Owned {
    /// File with the owner's id and secret; acquire makes it if it is not there.
    #[arg(long, value_name = "FILE")]
    pub(crate) owner: PathBuf,
}

/// What becomes of the value block of a lock in PW or EX.
#[derive(Clone, Debug, Args)]
#[group(multiple = false)]
pub(crate) struct NewValue {
    /// Write it.
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) value: Option<OsString>,
    /// Write it with what this file has; - is stdin.
    #[arg(long, value_name = "FILE")]
    pub(crate) value_file: Option<PathBuf>,
    /// Say that it is not true any more.
    #[arg(long)]
    pub(crate) invalidate: bool,
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("watched").required(true)))]
pub(crate) struct LockWatch {
    /// A lock: its holders and its value block.
    #[arg(group = "watched", value_parser = parse_lock_name)]
    pub(crate) name: Option<String>,
    /// A key.
    #[arg(long, group = "watched", value_parser = parse_key)]
    pub(crate) key: Option<String>,
    /// Every key that begins so.
    #[arg(long, group = "watched", value_parser = parse_prefix)]
    pub(crate) prefix: Option<String>,
    /// Who has a session with lockd.
    #[arg(long, group = "watched")]
    pub(crate) members: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Guard {
    /// Lease of the session, milliseconds.
    #[arg(long)]
    pub(crate) lease_ms: u64,
    /// Process group that gets the terminal back in the end.
    #[arg(long)]
    pub(crate) terminal_of: Option<i32>,
    #[arg(last = true, required = true)]
    pub(crate) command: Vec<OsString>,
}

/// A mode by its name, in either case.
pub(crate) fn parse_mode(text: &str) -> Result<Mode, String> {
    let all = [Mode::Nl, Mode::Cr, Mode::Cw, Mode::Pr, Mode::Pw, Mode::Ex];
    let found = all.into_iter().find(|mode| format!("{mode:?}").eq_ignore_ascii_case(text));
    found.ok_or_else(|| "a mode is NL, CR, CW, PR, PW or EX".to_owned())
}

fn parse_lock_name(text: &str) -> Result<String, String> {
    bounded(text, 1, LOCK_NAME_BYTES_MAX, "the name of a lock")
}

pub(crate) fn parse_key(text: &str) -> Result<String, String> {
    bounded(text, 1, KEY_BYTES_MAX, "a key")
}

pub(crate) fn parse_prefix(text: &str) -> Result<String, String> {
    bounded(text, 0, KEY_BYTES_MAX, "a prefix of keys")
}

fn bounded(text: &str, least: usize, most: usize, what: &str) -> Result<String, String> {
    if (least..=most).contains(&text.len()) {
        return Ok(text.to_owned());
    }
    Err(format!("{what} has {least} to {most} bytes, this one has {}", text.len()))
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: Option<f64> = text.parse().ok();
    let duration = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    duration.ok_or_else(|| "a number of seconds, such as 10 or 0.5".to_owned())
}

fn parse_lease(text: &str) -> Result<Duration, String> {
    let lease = parse_seconds(text)?;
    let allowed = Duration::from_millis(LEASE_MS_LEAST)..=Duration::from_millis(LEASE_MS_MAX);
    if allowed.contains(&lease) {
        return Ok(lease);
    }
    Err(format!("a lease has 0.5 to {} seconds", LEASE_MS_MAX / 1000))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::Cli;

    fn parses(line: &str) -> bool {
        Cli::try_parse_from(line.split(' ')).is_ok()
    }

    #[test]
    fn what_a_script_would_write_parses() {
        for line in [
            "csnap lock run n -- true",
            "csnap lock run n --mode pr --wait 1.5 --lease 30 -- sh -c x",
            "csnap lock run --lockd 127.0.0.1:1,127.0.0.1:2 n --no-wait -- true",
            "csnap lock --lockd 127.0.0.1:1 list",
            "csnap lock list --orphans --lockd 127.0.0.1:1 --json",
            "csnap lock list --lockd unix:/run/csnap/lockd.sock,127.0.0.1:1",
            "csnap lock run n --space work -- true",
            "csnap lock --space work acquire n --owner f",
            "csnap kv get k --space work",
            "csnap lock acquire n --owner f",
            "csnap lock convert n --owner f --mode CR --value -x",
            "csnap lock convert n --owner f --value-file -",
            "csnap lock release n --owner f --invalidate",
            "csnap lock show n",
            "csnap lock watch n",
            "csnap lock watch --key k",
            "csnap lock watch --prefix p",
            "csnap lock watch --members",
            "csnap lock break 7",
            "csnap kv get k",
            "csnap kv put k v --if-absent",
            "csnap kv put k v --if-version 7",
            "csnap kv put k",
            "csnap kv put k v --ephemeral -- sleep 10",
            "csnap kv delete k --if-version 7",
            "csnap kv list",
            "csnap kv list p",
            "csnap kv watch k",
            "csnap kv watch --prefix p",
        ] {
            if let Err(error) = Cli::try_parse_from(line.split(' ')) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn what_makes_no_sense_does_not() {
        let long = format!("csnap lock show {}", "x".repeat(65));
        for line in [
            "csnap lock run n",
            "csnap lock run n true",
            "csnap lock run n --wait 1 --no-wait -- true",
            "csnap lock run n --wait -1 -- true",
            "csnap lock run n --lease 0 -- true",
            "csnap lock run n --mode XX -- true",
            "csnap lock acquire n",
            "csnap lock convert n --owner f --value v --invalidate",
            "csnap lock watch",
            "csnap lock watch n --members",
            "csnap lock break",
            "csnap lock break n",
            "csnap kv put k v --if-absent --if-version 1",
            "csnap kv put k v --ephemeral",
            "csnap kv put k v -- true",
            "csnap kv watch",
            &long,
        ] {
            assert!(!parses(line), "{line}");
        }
    }
}
