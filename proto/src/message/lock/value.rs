//! Value blocks, and who holds what.

use serde::{Deserialize, Serialize};

use crate::ids::{OwnerId, Secret, SessionId, Term};
#[cfg(doc)]
use crate::limits::VALUE_BLOCK_BYTES_MAX;

/// Who has a lock: a session, an owner that outlives sessions, or both. An orphan has no session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Holder {
    /// The session that speaks for the lock.
    pub session: Option<SessionId>,
    /// Of a persistent lock, its owner.
    pub owner: Option<OwnerId>,
}

/// What makes a persistent lock somebody's. Drawn at random and kept by the owner, over any number of its lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Public: orphans are listed with it.
    pub id: OwnerId,
    /// Proof, shown at each adoption.
    pub secret: Secret,
}

/// A lock's value block as a reader sees it.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ValueBlock {
    /// Content, at most [`VALUE_BLOCK_BYTES_MAX`] bytes. Empty: there is no value.
    pub bytes: Vec<u8>,
    /// Number of the write or invalidation that made it so; 0 for never written. Such numbers only grow, over all
    /// resources.
    pub sequence: u64,
    /// There is a value, and since it was written no holder of PW or EX went away other than by its own unlock, nor said
    /// that it is not true.
    pub valid: bool,
    /// Who wrote it.
    pub writer: Holder,
    /// Term of the grant under which it was written.
    pub term: Term,
}

/// What an unlock or a conversion from PW or EX does to the value block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ValueChange {
    /// Leave it.
    Keep,
    /// Write it. With no bytes: there is no value any more.
    Write(Vec<u8>),
    /// Say that it is no longer true.
    Invalidate,
}
