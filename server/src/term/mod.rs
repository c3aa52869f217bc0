//! Terms: who may change the pool's metadata, by construction and never by timing.
//!
//! The scheme in one sentence: **durable, then gate open, then act.** A server is a term; it alone writes in
//! `term/<T>/`; its successor closes its gate, *then* looks at what it wrote. So whatever the term found durable before
//! it found its gate open is seen by every later term, however late the answer arrives.
//!
//! - [`pool`]: making and opening a pool;
//! - [`frame`], [`seal`]: what records look like; [`names`]: where files lie;
//! - [`gate`], [`successor`]: one block and one link that fence the past;
//! - [`segment`], [`room`]: what is set aside, so that failing over takes no space;
//! - [`takeover`]: how a term begins, step by step; [`follow`]: a standby that has most of it done already;
//! - [`journal`], [`checkpoint`], [`reclaim`]: how a term goes on;
//! - [`reader`], [`tail`], [`state`]: reading what a term left, exactly; [`verify`]: reading everything, offline.
//!
//! All of it are *procedures*: straight-line `async fn`s over [`csnap_storage::Storage`], without runtime, clock or
//! randomness. Dropping one at any await is a crash, and that is how they are tested. What the batches mean is the
//! business of a [`Replay`]; nothing here looks inside.
//!
//! *Architecture Invariant*: nothing here compares a time, and nothing waits for a time to pass.

pub mod canary;
pub mod checkpoint;
pub mod follow;
pub mod frame;
pub mod gate;
pub mod journal;
pub mod names;
pub mod pool;
pub mod reader;
pub mod reclaim;
pub mod room;
pub mod seal;
pub mod segment;
pub mod state;
pub mod successor;
pub mod tail;
pub mod takeover;
pub mod verify;
mod wait;

use csnap_proto::Term;
use csnap_storage::StorageError;

pub use checkpoint::CheckpointWriter;
pub use follow::{Followed, Follower};
pub use frame::BATCH_BYTES_MAX;
pub use journal::{Journal, Prepared};
pub use pool::{Pool, PoolError, PoolToml, create_pool, open_pool};
pub use takeover::{Step, TakenOver, take_over};

/// A place in a term's journal: the number of frames before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Position(pub u64);

/// What the checkpoint pieces and batches mean. State is a function of them, in order, and of nothing else.
pub trait Replay {
    /// Forgets everything; the pieces of one checkpoint follow, or none: then the state is that of a new pool.
    fn begin_checkpoint(&mut self);
    /// One piece, as it was given to [`CheckpointWriter::piece`].
    fn piece(&mut self, bytes: &[u8]) -> Result<(), Corrupt>;
    /// That was the last piece.
    fn end_checkpoint(&mut self) -> Result<(), Corrupt>;
    /// One batch, as it was given to [`Journal::append`].
    fn batch(&mut self, body: &[u8]) -> Result<(), Corrupt>;
}

/// Bytes on the medium that cannot be what was written: serving on would lose what somebody was promised.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("corrupt: {at}: {what}")]
pub struct Corrupt {
    /// What is wrong.
    pub what: String,
    /// File and place; empty where the finder does not know, filled in by its caller.
    pub at: String,
}

impl Corrupt {
    /// Damage at a place that the caller will add.
    #[must_use]
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), at: String::new() }
    }

    pub(crate) fn at(what: impl Into<String>, at: impl Into<String>) -> Self {
        Self { what: what.into(), at: at.into() }
    }

    pub(crate) fn or_at(self, at: impl FnOnce() -> String) -> Self {
        if self.at.is_empty() { Self { at: at(), ..self } } else { self }
    }
}

/// Why a term did not begin, or a reader could not read on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TermError {
    /// The medium refused.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// What is on the medium is damaged; an operator must look before anybody serves.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// A later term exists: leave, touching nothing.
    #[error("term {0} is over: a later term has begun")]
    Deposed(Term),
    /// The directory of this term exists: its number was given out before.
    #[error("term {0} was begun before: ask lockd for a new one")]
    Used(Term),
}

/// Why a journal takes nothing any more. The process exits: after a failed write or sync nothing is known of what was
/// written since the last good one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fatal {
    /// A write, sync or read of our own files failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A write was given up half done.
    #[error("a journal write was abandoned half done")]
    Abandoned,
    /// Our gate is closed: a later term has begun.
    #[error("term {0} is over: its gate is closed")]
    Deposed(Term),
}

impl From<Fatal> for TermError {
    fn from(fatal: Fatal) -> Self {
        match fatal {
            Fatal::Storage(error) => Self::Storage(error),
            Fatal::Deposed(term) => Self::Deposed(term),
            Fatal::Abandoned => Self::Corrupt(Corrupt::new("a journal write was abandoned half done")),
        }
    }
}
