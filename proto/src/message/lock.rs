//! The conversation between a lock client and lockd: sessions, locks with value blocks, keys, watches, membership.
//!
//! A session is an identity with a secret; a connection is only its transport. Requests carry the frame's request id;
//! mutating ones also a sequence, so that a resend after a reconnect takes effect once. Events are numbered per
//! session and replayed from the last one that the owner saw.
//!
//! Files: here the session and the modes; `operation`: what is asked and answered; `event`: what is told; `flags`;
//! `value`: value blocks and holders; `key`: the configuration store; `view`: locks as they are shown; `group`: the lockds
//! themselves; `space`: lockspaces and how they move.

mod event;
mod flags;
mod group;
mod key;
mod operation;
mod space;
mod value;
mod view;

use core::net::SocketAddr;

use serde::{Deserialize, Serialize};

pub use self::event::{LockEvent, Loss};
pub use self::flags::Flags;
pub use self::group::{GroupReply, GroupRequest, GroupView, ReplicaNumber, ReplicaView};
pub use self::key::{Expect, KeyOp, KeyReply, KeyView};
pub use self::operation::{LockOp, LockReply, Told, Watched};
pub use self::space::{Manifest, SpaceReply, SpaceRequest, SpaceState, SpaceView, Way};
pub use self::value::{Holder, Owner, ValueBlock, ValueChange};
pub use self::view::{Fenced, ListedLock, LockRow, LockView, LockdStatus, Member, QueuedView, ResourceView};
use super::Family;
use crate::frame::Message;
use crate::ids::{EventNumber, Name, Secret, Sequence, SessionId};

/// The six modes of the VMS and Linux lock managers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Mode {
    /// Null: interest only.
    Nl,
    /// Concurrent read.
    Cr,
    /// Concurrent write.
    Cw,
    /// Protected read.
    Pr,
    /// Protected write: the one writer beside concurrent readers.
    Pw,
    /// Exclusive.
    Ex,
}

/// Client to lockd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToLockd {
    /// A new session; id and secret are drawn by the owner. → [`FromLockd::Opened`].
    Open {
        /// Identity.
        session: SessionId,
        /// Proof for resumes.
        secret: Secret,
        /// Node, for people and for membership.
        node: Name,
        /// Time without renewal after which it is expired, milliseconds.
        lease_ms: u64,
        /// First description.
        info: Vec<u8>,
    },
    /// Go on with a session. → [`FromLockd::Opened`], then the events after `last_event`; or
    /// [`FromLockd::Refused`] when it expired.
    Resume {
        /// Identity.
        session: SessionId,
        /// Proof.
        secret: Secret,
        /// Last event that the owner has seen.
        last_event: EventNumber,
    },
    /// I am alive. The one message that prolongs the lease. → [`FromLockd::Renewed`] with the same request id. Not
    /// logged.
    Renew {
        /// Last event that the owner has seen: those up to it need not be kept.
        last_event: EventNumber,
    },
    /// End of the session, at once: its persistent locks become orphans, every other lock of it is released as if its
    /// holder died (value blocks of PW and EX turn invalid), its ephemeral keys are deleted. → [`FromLockd::Closed`].
    Close,
    /// A lock operation.
    Operate {
        /// Position in the session.
        sequence: Sequence,
        /// Answers below are no longer needed.
        lowest_unanswered: Sequence,
        /// What.
        op: LockOp,
    },
    /// Who am I talking to; needs no session. → [`FromLockd::Status`].
    Status,
    /// An operator's, about the lockds themselves; needs no session. → [`FromLockd::Group`].
    Group(GroupRequest),
    /// The Open or Resume that follows is about this lockspace; without it, about `default`. Not answered.
    Enter {
        /// Which.
        space: Name,
    },
    /// Something with lockspaces themselves; needs no session. → [`FromLockd::Space`].
    Space(SpaceRequest),
}

/// Lockd to client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromLockd {
    /// The session is open or resumed.
    Opened {
        /// Locks that it holds.
        locks: Vec<LockView>,
        /// Requests and conversions of it that wait.
        queued: Vec<QueuedView>,
        /// Last event made for it; those after the owner's last follow.
        last_event: EventNumber,
        /// Last operation that took effect: the owner sends again what comes after it. Answers to earlier ones that the
        /// owner still waits for follow by themselves, in their place among the events.
        last_sequence: Sequence,
    },
    /// Renewed.
    Renewed,
    /// Closed.
    Closed,
    /// Answer to an operation.
    Answer {
        /// Of the operation.
        sequence: Sequence,
        /// What came of it.
        reply: LockReply,
    },
    /// Something happened.
    Event {
        /// Position in the session's events.
        number: EventNumber,
        /// What.
        event: LockEvent,
    },
    /// Status.
    Status(LockdStatus),
    /// The session is unknown, expired, or the secret is wrong: nothing of it is held any more.
    Refused {
        /// One line for people.
        reason: String,
    },
    /// Another one leads, or nobody that is known: nothing of what was asked was done. The connection is closed.
    NotLeader {
        /// Where the leader listens; empty if that is not known. Whoever asks knows the others as well: this is a hint.
        leader: Vec<SocketAddr>,
    },
    /// Answer to an operator.
    Group(GroupReply),
    /// The lockspace is served by another group: go on there, with the same session. The connection ends.
    Moved {
        /// Where that group is found.
        to: Vec<SocketAddr>,
    },
    /// Answer to a [`ToLockd::Space`].
    Space(SpaceReply),
}

fn check_text(text: &str, bytes_max: usize, what: &'static str) -> Result<(), &'static str> {
    if text.is_empty() || text.len() > bytes_max { Err(what) } else { Ok(()) }
}

impl Message for ToLockd {
    const FAMILY: Family = Family::ToLockd;

    fn check(&self) -> Result<(), &'static str> {
        match self {
            Self::Open { info, .. } => operation::check_info(info),
            Self::Operate { op, .. } => op.check(),
            Self::Space(request) => request.check(),
            _ => Ok(()),
        }
    }
}

impl Message for FromLockd {
    const FAMILY: Family = Family::FromLockd;

    fn check(&self) -> Result<(), &'static str> {
        match self {
            Self::NotLeader { leader } => group::check_addresses(leader),
            Self::Group(reply) => reply.check(),
            Self::Moved { to } => space::check_addresses(to),
            Self::Space(reply) => reply.check(),
            _ => Ok(()),
        }
    }
}
