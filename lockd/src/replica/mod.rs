//! Several replicas of one log of commands: the same commands in the same order on every disk, whichever of them die.
//!
//! What it is not: the lock table, which applies the commands, nor a transport, which carries [`PeerMessage`]s. The
//! consensus itself is the `raft` library's; here are its log, its time, its messages, and what keeps a replica that
//! forgot from voting.
//!
//! - [`Replica`]: one replica's decisions, pure: messages, proposals and time in; writes, messages and committed
//!   commands out;
//! - [`ReplicaLog`]: carries its writes out, a procedure over any storage;
//! - [`PeerMessage`]: what replicas tell each other, and its checks;
//! - [`Saved`]: what a disk gives back;
//! - [`Forming`]: how the first replicas find each other.
//!
//! Invariants:
//! - a vote, a term and an entry are durable before any message that relies on them goes out, and one's own entries
//!   count towards a majority only then;
//! - committed commands come out in one order, each once in a life, on every replica the same;
//! - a [`ReplicaId`] is drawn with the disk. A disk that was lost comes back with another one: what it promised under
//!   the old id nobody can make it contradict, because nobody asks the new id for it. It counts again once it is added
//!   again;
//! - a group of one is the same code: it elects itself at once, and a command is committed when it is durable.
//!
//! A message that a correct replica cannot have sent is dropped, and never ends the process.

mod disk;
mod forming;
mod guard;
mod log;
mod message;
mod mirror;
mod step;
mod timing;

use std::collections::BTreeMap;

use bytes::Bytes;
pub use csnap_proto::ClusterId;
use serde::{Deserialize, Serialize};

pub use self::disk::{Base, Hard, Saved};
pub use self::forming::{Forming, Heard};
pub use self::log::{ReplicaLog, Wrote};
pub use self::message::{Body, Content, Image, LogEntry, PeerMessage};
pub use self::step::{Input, Output, Replica, ReplicaConfig, Write};
pub use self::timing::Timing;

/// Most replicas of a group, learners included: five voters, and as many that replace them.
pub const MEMBERS_MAX: usize = csnap_proto::limits::LOCKD_REPLICAS_MAX;

/// Longest address of a replica, bytes: a host name and a port.
pub const ADDRESS_BYTES_MAX: usize = 256;

/// Longest command, bytes: the longest that lockd makes is an eighth of it, and two of them are a batch of the log.
pub const COMMAND_BYTES_MAX: usize = 32 << 10;

/// Entries of one message, bytes; one longer entry goes alone. A batch of the log.
pub const APPEND_BYTES_MAX: u64 = 64 << 10;

/// Messages with entries on their way to one replica before the leader waits for an answer: with
/// [`APPEND_BYTES_MAX`], 4 MiB.
pub const APPENDS_IN_FLIGHT_MAX: usize = 64;

/// Commands proposed and not committed, bytes; more wait. Bounds what a majority that is away makes the leader hold.
pub const UNCOMMITTED_BYTES_MAX: u64 = 8 << 20;

/// Entries kept below a new snapshot, so that a replica that was away for a moment needs no snapshot.
pub const TRAILING_ENTRIES: u64 = 1024;

/// Largest state that goes to another replica, bytes.
pub const STATE_BYTES_MAX: usize = 256 << 20;

/// Terms and indexes beyond are no honest replica's: a thousand a second for a million years do not reach them. Bounds
/// what is added to them.
pub(crate) const NUMBER_MAX: u64 = 1 << 60;

/// One replica: a disk, rather than a machine or an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ReplicaId(pub u64);

impl ReplicaId {
    /// The replica whose log has this random id.
    #[must_use]
    pub fn of_disk(disk: [u8; 16]) -> Self {
        let (first, _) = disk.split_first_chunk().expect("sixteen are more than eight");
        // Zero means "none" to the library.
        Self(u64::from_le_bytes(*first).max(1))
    }
}

/// A replica as the group knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Where it listens for the others, in the form of [`Contact`](crate::replicated::Contact).
    pub address: String,
    /// It votes and counts towards a majority. Others only learn.
    pub voter: bool,
}

/// The group.
pub type Members = BTreeMap<ReplicaId, Member>;

/// A change of the group, itself a committed entry. One at a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// A replica begins to learn.
    Add {
        /// Which.
        id: ReplicaId,
        /// Where.
        address: String,
    },
    /// A learner becomes a voter.
    Promote {
        /// Which.
        id: ReplicaId,
    },
    /// A replica leaves. It may be added again, with its disk or, under another id, with an empty one.
    Remove {
        /// Which.
        id: ReplicaId,
    },
}

impl Change {
    fn id(&self) -> ReplicaId {
        match self {
            Self::Add { id, .. } | Self::Promote { id } | Self::Remove { id } => *id,
        }
    }

    /// What it makes of the group; an error if it makes no sense there.
    ///
    /// # Errors
    /// One line for people.
    pub fn apply(&self, members: &Members) -> Result<Members, &'static str> {
        let mut members = members.clone();
        match self {
            Self::Add { id, address } => {
                if members.contains_key(id) {
                    return Err("the replica is a member already");
                }
                if members.len() >= MEMBERS_MAX {
                    return Err("the group has as many replicas as it may have: remove one first");
                }
                members.insert(*id, Member { address: address.clone(), voter: false });
            }
            Self::Promote { id } => {
                let member = members.get_mut(id).ok_or("no such replica: add it first")?;
                if std::mem::replace(&mut member.voter, true) {
                    return Err("the replica votes already");
                }
            }
            Self::Remove { id } => {
                members.remove(id).ok_or("no such replica")?;
                if !members.values().any(|member| member.voter) {
                    return Err("it is the last replica that votes");
                }
            }
        }
        Ok(members)
    }
}

fn encode<T: Serialize>(value: &T) -> Bytes {
    postcard::to_stdvec(value).expect("writing to memory does not fail").into()
}
