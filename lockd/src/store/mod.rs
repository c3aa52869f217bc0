//! What lockd keeps: a log of items and a snapshot of what they make, as procedures over any [`Storage`](csnap_storage::Storage).
//!
//! What it is not: a cache or a judge. It keeps items in order; what they mean is the caller's, a
//! [`replica`](crate::replica)'s.
//!
//! ```text
//! DIR/lock          held (advisory) by the lockd that uses the directory
//! DIR/snapshot      the content at the start of a generation; names the generation
//! DIR/log-<g>       batches of items since, in a file that was zero-written ahead
//! ```
//!
//! A generation ends when its log is nearly full. The next one's log is made and synced, then the snapshot is replaced
//! (temporary file, sync, rename, sync of the directory): that rename is the one instant in which the generation
//! changes. The old log is removed afterwards.
//!
//! Invariants:
//! - [`Log::append`] returns once its items are durable; one batch is synced before the next is written;
//! - [`Log::open`] gives the items of every batch whose append returned, and possibly of the one that was under way;
//!   what it gives is durable;
//! - damage is told from a batch that a crash tore: a torn batch is the last. Damage before a whole batch is refused;
//! - after any failure of a write or a sync the log refuses everything: its process ends, and the next one reads what
//!   there is;
//! - what can be read may be a cache that no sync will write any more: a sync of it failed. So [`Log::open`] writes
//!   anew what it relies on and what nobody has synced for certain: the last batch, and the snapshot's name.
//!
//! Formats are in [`record`].

mod log;
pub mod record;
#[cfg(test)]
mod table;
#[cfg(test)]
mod tests;

use csnap_storage::StorageError;

pub use self::log::{Log, LogOptions as StoreOptions, Recovered};
use self::record::BATCH_BYTES_MAX;

/// Size of a log, bytes: a thousand batches, and zero-written in some milliseconds.
pub const LOG_BYTES: u64 = 4 << 20;

/// Smallest size of a log that can be asked for, bytes: two of the largest batches.
pub const LOG_BYTES_MIN: u64 = 4 * BATCH_BYTES_MAX as u64;

/// Largest log that is read, bytes; a larger file is not ours.
const LOG_BYTES_MAX: u64 = 64 << 20;

/// Largest snapshot that is read, bytes: every session with every lock, answer and event that it may have.
const SNAPSHOT_BYTES_MAX: u64 = 512 << 20;

const PIECE_BYTES: usize = 1 << 20;

/// Why the store cannot be used (any more).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The medium.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Another lockd has the directory.
    #[error("another lockd runs on this directory: stop it first, or give this one a directory of its own")]
    Busy,
    /// Content that no crash explains.
    #[error("{file} is damaged at byte {at}: {what}; restore it from a copy, lockd does not guess")]
    Corrupt {
        /// Which file.
        file: String,
        /// Where.
        at: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// Written by another version.
    #[error(
        "{file} has format version {found}, this lockd reads version {}: use the lockd that wrote it",
        record::VERSION
    )]
    Version {
        /// Which file.
        file: String,
        /// Its version.
        found: u32,
    },
    /// A sync of the directory. Final also where space is short: what it was about may be read, and no later sync makes it
    /// durable.
    #[error("the names in lockd's directory may not be durable, a sync of it failed: {0}")]
    Names(StorageError),
    /// The log has no room, and a new one could not be begun.
    #[error("lockd cannot keep what it promises: {0}; free space on its disk")]
    Full(&'static str),
    /// An earlier write or sync failed.
    #[error("the store failed before and is not used again")]
    Failed,
}

/// Result of a store operation.
pub type Result<T> = std::result::Result<T, StoreError>;
