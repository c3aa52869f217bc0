//! What a session asks for, and what it is answered.

use serde::{Deserialize, Serialize};

use super::key::{check_key, check_prefix};
use super::{
    Fenced, Flags, KeyOp, KeyReply, ListedLock, LockView, Member, Mode, Owner, ResourceView, ValueBlock,
    ValueChange, check_text,
};
use crate::ids::LockId;
use crate::limits::{LOCK_NAME_BYTES_MAX, MEMBER_INFO_BYTES_MAX, VALUE_BLOCK_BYTES_MAX};

/// A lock operation. Each has a sequence in its session; a resend gets the same answer and takes effect once. Answers that
/// only tell what is (lists, keys) tell a resend what is then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockOp {
    /// A new lock on `resource`. → [`LockReply::Granted`], [`LockReply::Queued`], [`LockReply::WouldBlock`] or
    /// [`LockReply::Deadlock`].
    Lock {
        /// What is locked.
        resource: String,
        /// Wanted mode.
        mode: Mode,
        /// How.
        flags: Flags,
        /// Makes it persistent: once granted it does not go with the session, but stays as this owner's orphan until it is
        /// adopted or broken.
        owner: Option<Owner>,
    },
    /// Change the mode of a granted lock. Same answers, or [`LockReply::Busy`]. A conversion from PW or EX to the same or
    /// a lower mode may change the value block (see the direction table in docs/lockd.md) and is granted at once; any
    /// other must not.
    Convert {
        /// Which.
        lock: LockId,
        /// Wanted mode.
        mode: Mode,
        /// How.
        flags: Flags,
        /// What becomes of the value block, where the direction writes.
        value: ValueChange,
    },
    /// Give the lock up; with FORCEUNLOCK also one that waits. From any mode but PW and EX `value` means nothing. →
    /// [`LockReply::Done`] or [`LockReply::Busy`].
    Unlock {
        /// Which.
        lock: LockId,
        /// How.
        flags: Flags,
        /// What becomes of the value block.
        value: ValueChange,
    },
    /// Take a queued lock or conversion back. → [`LockReply::Done`] and then [`Cancelled`](super::LockEvent::Cancelled);
    /// or, a grant that came first wins, [`LockReply::Granted`] with the lock as it is.
    Cancel {
        /// Which.
        lock: LockId,
    },
    /// Take over a persistent lock, orphaned or not, as it is granted; what it waits for is cancelled. In PW and EX it gets
    /// a new term, so that its owner's earlier life is fenced. → [`LockReply::Granted`]. A live session that had it is
    /// told [`Lost`](super::LockEvent::Lost).
    Adopt {
        /// Which.
        lock: LockId,
        /// Whose it is.
        owner: Owner,
    },
    /// Take a granted lock from whoever holds it, orphan or not; from PW and EX the value block turns invalid. For
    /// operators: the holder is told if it lives, but nothing waits for it. → [`LockReply::Broken`].
    Break {
        /// Which.
        lock: LockId,
    },
    /// Be told what becomes of something. → what is now: [`LockReply::Value`], [`LockReply::Resource`],
    /// [`LockReply::Members`], or as for [`KeyOp::Get`] and [`KeyOp::List`]. Every later change is an event, none is left
    /// out; again for the same thing replaces the watch.
    Watch {
        /// What.
        what: Watched,
        /// The watch ends with the first event.
        once: bool,
    },
    /// No longer. → [`LockReply::Done`].
    Unwatch {
        /// What was watched.
        what: Watched,
    },
    /// Publish a description of this session's owner. → [`LockReply::Done`].
    SetInfo {
        /// At most [`MEMBER_INFO_BYTES_MAX`] bytes, meaning is the owner's.
        info: Vec<u8>,
    },
    /// Something with keys. → [`LockReply::Key`].
    Key(KeyOp),
    /// One resource, with its queues. → [`LockReply::Resource`].
    Show {
        /// Which.
        resource: String,
    },
    /// Every lock, a page at a time. → [`LockReply::Locks`].
    Locks {
        /// Those after this one: the last of the page before.
        after: LockId,
        /// Only those whose session is gone.
        orphans: bool,
    },
}

/// What can be watched.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Watched {
    /// A resource's value block, and whether somebody holds PW or EX: [`Changed`](super::LockEvent::Changed).
    Value(String),
    /// A resource's granted locks: [`Held`](super::LockEvent::Held).
    Grants(String),
    /// A key: [`Key`](super::LockEvent::Key).
    Key(String),
    /// Every key that begins so: [`Key`](super::LockEvent::Key).
    Prefix(String),
    /// The live sessions: [`MemberUp`](super::LockEvent::MemberUp), [`MemberDown`](super::LockEvent::MemberDown).
    Members,
}

/// What a reply or a grant says beside the mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Told {
    /// The granted mode was given up for NL, to end a conversion deadlock (CONVDEADLK).
    pub demoted: bool,
    /// The mode is the alternative (ALTPR, ALTCW), not the wanted one.
    pub alternate: bool,
    /// The request waits in a circle of waits (NODLCKWT).
    pub deadlock: bool,
}

/// Answer to a [`LockOp`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockReply {
    /// Granted.
    Granted {
        /// The lock; for PW and EX with the term.
        lock: LockView,
        /// The value block as of the grant; absent where the direction table has nothing.
        value: Option<ValueBlock>,
        /// Anything unusual.
        told: Told,
    },
    /// Queued: a [`Granted`](super::LockEvent::Granted) or [`Cancelled`](super::LockEvent::Cancelled) will follow, unless
    /// the lock is given up first.
    Queued {
        /// The lock that waits.
        lock: LockId,
        /// Anything unusual.
        told: Told,
    },
    /// With NOQUEUE: someone is in the way.
    WouldBlock,
    /// The request would close a circle of waits; it was not queued.
    Deadlock,
    /// The lock waits already: cancel first, or unlock with FORCEUNLOCK.
    Busy,
    /// Unlocked, cancelled, unwatched, described.
    Done,
    /// Broken.
    Broken(Fenced),
    /// Value block of a resource, and whether a PW or EX lock is granted on it.
    Value {
        /// As it is.
        value: ValueBlock,
        /// Nobody holds PW or EX.
        vacant: bool,
    },
    /// The live sessions.
    Members(Vec<Member>),
    /// What came of an operation with keys.
    Key(KeyReply),
    /// A resource; an empty one where there is none.
    Resource(ResourceView),
    /// Some locks.
    Locks {
        /// In order of their ids.
        locks: Vec<ListedLock>,
        /// There are more after the last of these.
        more: bool,
    },
    /// The operation makes no sense (unknown lock, flags that do not go together) or goes beyond a limit.
    Invalid(String),
}

impl LockOp {
    /// A lock of this session.
    #[must_use]
    pub fn lock(resource: impl Into<String>, mode: Mode, flags: Flags) -> Self {
        Self::Lock { resource: resource.into(), mode, flags, owner: None }
    }

    /// A conversion that leaves the value block.
    #[must_use]
    pub fn convert(lock: LockId, mode: Mode, flags: Flags) -> Self {
        Self::Convert { lock, mode, flags, value: ValueChange::Keep }
    }

    /// A conversion that writes the value block: from PW or EX, to the same mode or a lower one.
    #[must_use]
    pub fn write(lock: LockId, mode: Mode, value: impl Into<Vec<u8>>) -> Self {
        Self::Convert { lock, mode, flags: Flags::NONE, value: ValueChange::Write(value.into()) }
    }

    /// Giving up a lock, whatever it is doing.
    #[must_use]
    pub fn unlock(lock: LockId, value: ValueChange) -> Self {
        Self::Unlock { lock, flags: Flags::FORCEUNLOCK, value }
    }

    /// Being told of every change.
    #[must_use]
    pub fn watch(what: Watched) -> Self {
        Self::Watch { what, once: false }
    }

    /// Whether every field is within its limits.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        match self {
            Self::Lock { resource, flags, .. } => {
                check_resource(resource)?;
                check_flags(*flags)
            }
            Self::Convert { flags, value, .. } | Self::Unlock { flags, value, .. } => {
                check_flags(*flags)?;
                check_value(value)
            }
            Self::SetInfo { info } => check_info(info),
            Self::Watch { what, .. } | Self::Unwatch { what } => what.check(),
            Self::Key(op) => op.check(),
            Self::Show { resource } => check_resource(resource),
            Self::Cancel { .. } | Self::Adopt { .. } | Self::Break { .. } | Self::Locks { .. } => Ok(()),
        }
    }
}

impl Watched {
    fn check(&self) -> Result<(), &'static str> {
        match self {
            Self::Value(resource) | Self::Grants(resource) => check_resource(resource),
            Self::Key(key) => check_key(key),
            Self::Prefix(prefix) => check_prefix(prefix),
            Self::Members => Ok(()),
        }
    }
}

fn check_resource(resource: &str) -> Result<(), &'static str> {
    check_text(resource, LOCK_NAME_BYTES_MAX, "length of a lock name")
}

fn check_flags(flags: Flags) -> Result<(), &'static str> {
    if flags.is_known() { Ok(()) } else { Err("an unknown flag") }
}

fn check_value(value: &ValueChange) -> Result<(), &'static str> {
    match value {
        ValueChange::Write(bytes) if bytes.len() > VALUE_BLOCK_BYTES_MAX => Err("length of a value block"),
        _ => Ok(()),
    }
}

pub(super) fn check_info(info: &[u8]) -> Result<(), &'static str> {
    if info.len() > MEMBER_INFO_BYTES_MAX { Err("length of a member's description") } else { Ok(()) }
}
