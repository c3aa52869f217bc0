//! `csnap kv …`, as clap reads it.

use std::ffi::OsString;

use clap::{ArgGroup, Args, Subcommand};

use super::lock::{Lease, parse_key, parse_prefix};
use crate::lockds::{At, In};

#[derive(Debug, Args)]
#[command(mut_arg("lockd", |arg| arg.global(true)), mut_arg("space", |arg| arg.global(true)))]
pub(crate) struct Kv {
    #[command(flatten)]
    pub(crate) at: At,
    #[command(flatten)]
    pub(crate) space: In,
    #[command(subcommand)]
    pub(crate) action: KvAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KvAction {
    /// Print a key's value, byte for byte.
    Get {
        #[arg(value_parser = parse_key)]
        key: String,
    },
    /// Write a key.
    Put(KvPut),
    /// Delete a key.
    Delete {
        #[arg(value_parser = parse_key)]
        key: String,
        /// Only if it has this version.
        #[arg(long, value_name = "VERSION")]
        if_version: Option<u64>,
    },
    /// List keys.
    List {
        /// Those that begin so; unless given, all.
        #[arg(default_value = "", value_parser = parse_prefix)]
        prefix: String,
    },
    /// Print what changes, until ^C: a line, or with --json an object, for each event.
    Watch(KvWatch),
}

#[derive(Debug, Args)]
pub(crate) struct KvPut {
    #[arg(value_parser = parse_key)]
    pub(crate) key: String,
    /// Content; unless given, what stdin has.
    pub(crate) value: Option<OsString>,
    /// Only if it has this version.
    #[arg(long, value_name = "VERSION", conflicts_with = "if_absent")]
    pub(crate) if_version: Option<u64>,
    /// Only if there is no such key.
    #[arg(long)]
    pub(crate) if_absent: bool,
    /// Keep it while a command runs, and no longer; end the command when the key is lost.
    #[arg(long, requires_all = ["value", "command"])]
    pub(crate) ephemeral: bool,
    #[command(flatten)]
    pub(crate) lease: Lease,
    /// What to run while an ephemeral key is there.
    #[arg(last = true, requires = "ephemeral")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("watched").required(true)))]
pub(crate) struct KvWatch {
    /// A key.
    #[arg(group = "watched", value_parser = parse_key)]
    pub(crate) key: Option<String>,
    /// Every key that begins so.
    #[arg(long, group = "watched", value_parser = parse_prefix)]
    pub(crate) prefix: Option<String>,
}
