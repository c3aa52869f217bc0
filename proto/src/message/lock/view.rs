//! Locks and resources as they are shown: to their owner, and to anybody who asks.

use serde::{Deserialize, Serialize};

use super::{Flags, Holder, Mode, ValueBlock};
use crate::ids::{LockId, Name, SessionId, Term};

/// A lock as its owner sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockView {
    /// Which.
    pub lock: LockId,
    /// What it locks.
    pub resource: String,
    /// Granted mode.
    pub mode: Mode,
    /// Term of the grant, for PW and EX; else 0. It grows with every grant into PW or EX from below and with every
    /// adoption, over all resources and for ever; a conversion between PW and EX keeps it.
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

/// A lock as anybody sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockRow {
    /// Which.
    pub lock: LockId,
    /// Whose.
    pub holder: Holder,
    /// Granted mode; absent while a new request waits, and of a lock that is gone.
    pub mode: Option<Mode>,
    /// Mode that it waits for.
    pub wanted: Option<Mode>,
    /// How it waits.
    pub flags: Flags,
    /// Term of the grant, for PW and EX; else 0.
    pub term: Term,
}

/// A lock in a list of locks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedLock {
    /// What it locks.
    pub resource: String,
    /// Node of its session.
    pub node: Option<Name>,
    /// The lock.
    pub row: LockRow,
}

/// A resource with its queues.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ResourceView {
    /// Its value block.
    pub value: ValueBlock,
    /// Granted locks, conversions that wait among them.
    pub granted: Vec<LockRow>,
    /// Conversions that wait, the first in line first.
    pub converting: Vec<LockId>,
    /// Requests for new locks that wait, the first in line first.
    pub waiting: Vec<LockRow>,
}

/// What was taken from a holder, and what fences it from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fenced {
    /// The lock that is gone.
    pub lock: LockView,
    /// Whose it was.
    pub holder: Holder,
    /// No grant so far has this term and every later one has a higher: whoever refuses terms below it refuses the holder.
    pub by: Term,
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
