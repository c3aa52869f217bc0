//! The conversation between an agent and lockd: sessions, locks with value blocks, watches, membership.
//!
//! A session is an identity with a secret; a connection is only its transport. Requests carry the frame's request id;
//! mutating ones also a sequence, so that a resend after a reconnect takes effect once. Events are numbered per
//! session and replayed from the last one that the owner saw.

use serde::{Deserialize, Serialize};

use super::Family;
use crate::frame::Message;
use crate::ids::{EventNumber, LockId, Name, Secret, Sequence, SessionId, Term};
use crate::limits::{LOCK_NAME_BYTES_MAX, MEMBER_INFO_BYTES_MAX, VALUE_BLOCK_BYTES_MAX};

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

/// A lock's value block as a reader sees it.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ValueBlock {
    /// Content, at most [`VALUE_BLOCK_BYTES_MAX`] bytes.
    pub bytes: Vec<u8>,
    /// Number of the write or invalidation that made it so; 0 for never written.
    pub sequence: u64,
    /// Written, and no holder of PW or EX went away since other than by its own unlock.
    pub valid: bool,
    /// Term of the grant under which it was written.
    pub term: Term,
}

/// A lock operation. Each has a sequence in its session; a resend gets the same answer and takes effect once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockOp {
    /// A new lock on `resource`. → [`LockReply::Granted`], [`LockReply::Queued`] or [`LockReply::WouldBlock`].
    Lock {
        /// What is locked.
        resource: String,
        /// Wanted mode.
        mode: Mode,
        /// Refuse rather than queue.
        no_queue: bool,
    },
    /// Change the mode of a granted lock. Same answers, or [`LockReply::Deadlock`]. A conversion from PW or EX to the
    /// same or a lower mode writes `value` (see the direction table in docs/protocol.md) and is granted at once; any
    /// other must not carry one, and returns the value block.
    Convert {
        /// Which.
        lock: LockId,
        /// Wanted mode.
        mode: Mode,
        /// Refuse rather than queue.
        no_queue: bool,
        /// New content of the value block, where the direction allows it.
        value: Option<Vec<u8>>,
    },
    /// Give the lock up, also one that waits. From PW and EX: writes `value`, or invalidates the value block; from
    /// any other mode `value` means nothing, so that giving up never fails. → [`LockReply::Done`].
    Unlock {
        /// Which.
        lock: LockId,
        /// What becomes of the value block.
        value: UnlockValue,
    },
    /// Take a queued lock or conversion back. → [`LockReply::Done`] and then [`LockEvent::Cancelled`]; or, a grant that
    /// came first wins, [`LockReply::Granted`] with the lock as it is.
    Cancel {
        /// Which.
        lock: LockId,
    },
    /// Be told of value changes, invalidations and vacancy of `resource`. → [`LockReply::Value`] with what is now.
    Watch {
        /// What is watched.
        resource: String,
    },
    /// No longer.
    Unwatch {
        /// What was watched.
        resource: String,
    },
    /// Be told of members that come, change and go. → [`LockReply::Members`] with who is now.
    WatchMembers,
    /// Publish a description of this session's owner.
    SetInfo {
        /// At most [`MEMBER_INFO_BYTES_MAX`] bytes, meaning is the owner's.
        info: Vec<u8>,
    },
}

/// What an unlock from a writer mode does to the value block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UnlockValue {
    /// Leave it.
    Keep,
    /// Write it.
    Write(Vec<u8>),
    /// Say that it is no longer true.
    Invalidate,
}

/// Agent to lockd.
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
    /// End of the session: every lock of it is released as if its holder died (value blocks of PW and EX turn
    /// invalid), at once. → [`FromLockd::Closed`].
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
}

/// A lock as its owner sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockView {
    /// Which.
    pub lock: LockId,
    /// What it locks.
    pub resource: String,
    /// Granted mode.
    pub mode: Mode,
    /// Term of the grant, for PW and EX; else 0. It grows with every grant into PW or EX from below, over all
    /// resources and for ever; a conversion between PW and EX keeps it.
    pub term: Term,
}

/// A request that waits, as its owner sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuedView {
    /// Which; a conversion's lock is among the granted ones too.
    pub lock: LockId,
    /// What it locks.
    pub resource: String,
    /// Mode that it waits for.
    pub wanted: Mode,
}

/// Answer to a [`LockOp`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockReply {
    /// Granted, with the value block where the direction returns it.
    Granted {
        /// The lock; for PW and EX with the new term.
        lock: LockView,
        /// The value block as of the grant.
        value: ValueBlock,
    },
    /// Queued: a [`LockEvent::Granted`] or [`LockEvent::Cancelled`] will follow, unless the lock is given up first.
    Queued {
        /// The lock that waits.
        lock: LockId,
    },
    /// With `no_queue`: someone is in the way.
    WouldBlock,
    /// Two conversions wait for each other; this one was not queued.
    Deadlock,
    /// Unlocked, unwatched, described.
    Done,
    /// Value block of a resource at the start of a watch, and whether a PW or EX lock is granted on it.
    Value {
        /// As it is.
        value: ValueBlock,
        /// Nobody holds PW or EX.
        vacant: bool,
    },
    /// Members at the start of a watch.
    Members(Vec<Member>),
    /// The operation makes no sense (unknown lock, limit reached).
    Invalid(String),
}

/// A live session, as others see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its session.
    pub session: SessionId,
    /// Its node.
    pub node: Name,
    /// What it published.
    pub info: Vec<u8>,
}

/// Something that happened, numbered in its session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockEvent {
    /// A queued request or conversion was granted.
    Granted {
        /// The lock.
        lock: LockView,
        /// Value block as of the grant.
        value: ValueBlock,
    },
    /// A queued request or conversion ended without a grant.
    Cancelled {
        /// The lock.
        lock: LockId,
    },
    /// This granted lock stands in the way of someone who wants `wanted`. May be stale when it arrives.
    Blocking {
        /// Our lock.
        lock: LockId,
        /// Mode that someone waits for.
        wanted: Mode,
    },
    /// A watched resource changed: value written, invalidated, or a PW or EX lock granted or gone.
    Changed {
        /// Which.
        resource: String,
        /// As it is now.
        value: ValueBlock,
        /// Nobody holds PW or EX.
        vacant: bool,
    },
    /// A member came or changed.
    MemberUp(Member),
    /// A member's session ended.
    MemberDown {
        /// Its session.
        session: SessionId,
        /// Its node.
        node: Name,
    },
    /// Two thirds of the lease passed without a renewal.
    Jeopardy,
    /// Events were dropped (the session fell [`crate::limits::EVENTS_PER_SESSION_MAX`] behind): look anew.
    Overrun,
}

/// Status of a lockd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockdStatus {
    /// Its node.
    pub node: Name,
    /// Its process.
    pub pid: u32,
    /// Live sessions.
    pub members: Vec<Member>,
    /// Highest term ever granted.
    pub term: Term,
}

/// Lockd to agent.
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
}

fn check_resource(resource: &str) -> Result<(), &'static str> {
    if resource.is_empty() || resource.len() > LOCK_NAME_BYTES_MAX {
        Err("length of a lock name")
    } else {
        Ok(())
    }
}

fn check_value(value: &[u8]) -> Result<(), &'static str> {
    if value.len() > VALUE_BLOCK_BYTES_MAX { Err("length of a value block") } else { Ok(()) }
}

impl Message for ToLockd {
    const FAMILY: Family = Family::ToLockd;

    fn check(&self) -> Result<(), &'static str> {
        match self {
            Self::Open { info, .. } | Self::Operate { op: LockOp::SetInfo { info }, .. }
                if info.len() > MEMBER_INFO_BYTES_MAX =>
            {
                Err("length of a member's description")
            }
            Self::Operate { op, .. } => match op {
                LockOp::Lock { resource, .. } | LockOp::Watch { resource } | LockOp::Unwatch { resource } => {
                    check_resource(resource)
                }
                LockOp::Convert { value: Some(value), .. }
                | LockOp::Unlock { value: UnlockValue::Write(value), .. } => check_value(value),
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }
}

impl Message for FromLockd {
    const FAMILY: Family = Family::FromLockd;
}
