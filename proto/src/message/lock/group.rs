//! What operators ask of the lockds as a group: who belongs to it, who leads, and that this changes. No session is needed.
//!
//! Whoever does not lead answers [`FromLockd::NotLeader`](super::FromLockd::NotLeader) to anything but
//! [`GroupRequest::Show`]. Asking again for what is done already is answered as done.

use core::fmt;
use core::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::ids::{Name, Term};
use crate::limits::{LOCKD_ADDRESSES_MAX, LOCKD_REPLICAS_MAX, REASON_BYTES_MAX};

/// A replica, which is a disk: a lockd whose disk was lost comes back under another number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ReplicaNumber(pub u64);

impl fmt::Display for ReplicaNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl core::str::FromStr for ReplicaNumber {
    type Err = &'static str;

    /// Sixteen hexadecimal digits, as it is shown.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = digits.then(|| u64::from_str_radix(text, 16).ok()).flatten();
        number.map(Self).ok_or("a replica's number has sixteen hexadecimal digits")
    }
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GroupRequest {
    /// What the asked lockd knows. Any answers, also one without a group or without a majority. → [`GroupReply::Group`].
    Show,
    /// Another replica shall lead. Answered once it does, or stays behind.
    Move {
        /// Which.
        to: ReplicaNumber,
    },
    /// A replica shall belong to the group and vote. It learns first; answered once it votes, and whom it replaces (a replica
    /// at the same address that is not reached: its disk is gone) does no more.
    Add {
        /// Its number, as it says itself.
        replica: ReplicaNumber,
        /// Its node.
        node: Name,
        /// Where it listens for other replicas.
        address: SocketAddr,
    },
    /// A replica shall belong to it no more.
    Remove {
        /// Which.
        replica: ReplicaNumber,
    },
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GroupReply {
    /// As asked.
    Group(GroupView),
    /// It is so.
    Done {
        /// What, one line for people.
        what: String,
    },
    /// It is not, and why: one line for people.
    Refused {
        /// It.
        reason: String,
    },
}

/// The group as one lockd sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupView {
    /// Which one.
    pub own: ReplicaNumber,
    /// It leads, and had a majority a moment ago.
    pub leads: bool,
    /// Who leads as far as it knows.
    pub leader: Option<ReplicaNumber>,
    /// Its term as a replica: each leader has another one.
    pub replica_term: Term,
    /// It belongs to a group; one that does not waits to be added, or for the others that found one with it.
    pub has_group: bool,
    /// The members; of a lockd without a group only itself.
    pub replicas: Vec<ReplicaView>,
}

/// A replica as another one, or itself, sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaView {
    /// Which.
    pub replica: ReplicaNumber,
    /// Its node, if that is known.
    pub node: Option<Name>,
    /// It counts towards a majority.
    pub voter: bool,
    /// Where it listens for other replicas.
    pub peer: Option<SocketAddr>,
    /// It is reached now; what follows is what it says itself.
    pub reached: bool,
    /// Its process.
    pub pid: Option<u32>,
    /// Where it listens for clients.
    pub listens: Vec<SocketAddr>,
    /// Whether it has, durably, all but a few of the entries; only the leader knows.
    pub caught_up: Option<bool>,
}

impl GroupReply {
    pub(super) fn check(&self) -> Result<(), &'static str> {
        match self {
            Self::Group(view) if view.replicas.len() > LOCKD_REPLICAS_MAX => Err("number of replicas"),
            Self::Group(view) => view.replicas.iter().try_for_each(|one| check_addresses(&one.listens)),
            Self::Done { what: text } | Self::Refused { reason: text } if text.len() > REASON_BYTES_MAX => {
                Err("length of a text")
            }
            Self::Done { .. } | Self::Refused { .. } => Ok(()),
        }
    }
}

pub(super) fn check_addresses(addresses: &[SocketAddr]) -> Result<(), &'static str> {
    if addresses.len() > LOCKD_ADDRESSES_MAX { Err("number of addresses") } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_read_as_it_is_shown() {
        for number in [0, 1, 0xdead_beef, u64::MAX] {
            let number = ReplicaNumber(number);
            assert_eq!(number.to_string().parse(), Ok(number));
        }
        for bad in ["", "1", "n1", "+00000000000001f", "00000000000000zz"] {
            assert!(bad.parse::<ReplicaNumber>().is_err(), "{bad}");
        }
    }
}
