//! `csnap lockd`: the daemon with `--config`, an operator's commands without.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use csnap_proto::Name;
use csnap_proto::message::lock::ReplicaNumber;
use csnap_transport::Address;

use super::Daemon;
use crate::lockds::At;

/// Two things under one name.
#[derive(Debug, Args)]
pub(crate) struct Lockd {
    /// Configuration file.
    #[arg(long)]
    config: Option<PathBuf>,
    /// End at once when this process does.
    #[arg(long, hide = true, requires = "config")]
    supervisor_pid: Option<u32>,
    #[command(subcommand)]
    action: Option<LockdAction>,
}

/// What is meant by `csnap lockd`.
#[derive(Debug)]
pub(crate) enum LockdUse {
    Daemon(Daemon),
    Action(LockdAction),
}

impl Lockd {
    /// The use, if the arguments are of one.
    pub(crate) fn usage(&self) -> Result<LockdUse, &'static str> {
        match (&self.config, &self.action) {
            (Some(config), None) => {
                let (config, supervisor_pid) = (config.clone(), self.supervisor_pid);
                Ok(LockdUse::Daemon(Daemon { config, supervisor_pid }))
            }
            (None, Some(action)) => Ok(LockdUse::Action(action.clone())),
            (Some(_), Some(_)) => Err("csnap lockd takes --config or a command, not both"),
            (None, None) => Err("csnap lockd needs a command (show, add, remove, move) or --config FILE"),
        }
    }
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum LockdAction {
    /// Show the group: who leads, who votes, who is reached.
    Show {
        #[command(flatten)]
        at: At,
    },
    /// Let a lockd that runs and belongs to no group vote in this one; also one that lost its disk, in its own place.
    Add {
        /// The new lockd: where it listens for clients, or its node.
        new: Whom,
        #[command(flatten)]
        at: At,
    },
    /// Take a replica out of the group.
    Remove {
        /// Its node, or its number as `show` prints it.
        replica: Whom,
        #[command(flatten)]
        at: At,
    },
    /// Let another replica lead.
    Move {
        /// Its node, or its number.
        replica: Whom,
        #[command(flatten)]
        at: At,
    },
}

/// A lockd as an operator names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Whom {
    Address(Address),
    Replica(ReplicaNumber),
    Node(Name),
}

impl std::fmt::Display for Whom {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Replica(number) => number.fmt(f),
            Self::Node(node) => node.fmt(f),
        }
    }
}

impl std::str::FromStr for Whom {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        // Sixteen hexadecimal digits could be a node's name; nobody has called one so.
        if let Ok(number) = text.parse() {
            return Ok(Self::Replica(number));
        }
        text.parse().map(Self::Node).map_err(|error: csnap_proto::NameError| error.to_string())
    }
}
