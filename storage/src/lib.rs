//! Where bytes live: one trait, asynchronous in every operation, for a pool that several nodes may share.
//!
//! Who calls it: the server's journal, terms and copy-out, lockd's log, the offline verifier. What it is not: a file
//! system; there is no seek position, no permission, no current directory. Paths are relative to the root that the
//! storage was opened with, `/`-separated; [`Storage::open_origin`] alone takes an absolute one.
//!
//! Invariants that callers rely on, and the simulated disk enforces:
//! - nothing is durable before a sync: content and size by [`Storage::sync`] of the file, its existence by
//!   [`Storage::sync_dir`] of its directory;
//! - unsynced writes survive a crash in any subset of sectors, in any order;
//! - [`Storage::create`] and [`Storage::link`] are exclusive: of two racing, on any nodes, one gets `Exists`;
//! - after a failed sync nothing is known of what was written since the last good one; it is never retried.

use std::future::Future;

use bytes::Bytes;

#[cfg(feature = "shell")]
pub mod posix;
#[cfg(feature = "sim")]
pub mod sim;

/// The unit of journal, gate and store I/O: every offset and length that is written is a multiple of it, so that direct
/// I/O works on every device, bytes.
pub const BLOCK_BYTES: usize = 4096;

/// Why an operation did not happen. `path` is relative to the root.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StorageError {
    /// No such file or directory.
    #[error("{path}: not found")]
    NotFound {
        /// What was looked for.
        path: String,
    },
    /// It exists already.
    #[error("{path}: exists")]
    Exists {
        /// What was to be made.
        path: String,
    },
    /// The file system is full, or a quota is reached.
    #[error("{path}: no space left")]
    NoSpace {
        /// What was written.
        path: String,
    },
    /// Anything else that the medium or the kernel reports.
    #[error("{path}: {what} failed: {reason} (errno {errno})")]
    Io {
        /// Which file.
        path: String,
        /// Which operation.
        what: &'static str,
        /// The error number.
        errno: i32,
        /// Its text.
        reason: String,
    },
}

/// Result of a storage operation.
pub type Result<T> = std::result::Result<T, StorageError>;

/// What an open file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading only.
    Read,
    /// Reading only, small pieces anywhere: nothing is read ahead.
    ReadScattered,
    /// Reading and writing.
    ReadWrite,
}

/// What is known of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Size, bytes; of a block device, its capacity.
    pub size_bytes: u64,
    /// Space that it takes on the medium, bytes.
    pub allocated_bytes: u64,
    /// Device of the file system; of a block device, the device itself.
    pub device: u64,
    /// Inode.
    pub inode: u64,
    /// A directory.
    pub is_dir: bool,
}

/// Bytes by name. Handles are cheap to clone; dropping the last one closes the file.
///
/// Futures need not be `Send`: daemons that use the trait run on one thread, the simulation on its own. Dropping a
/// future does not take its operation back: once polled, it may still happen, at any later time.
pub trait Storage: Clone + 'static {
    /// An open file.
    type File: Clone + 'static;

    /// Opens an existing file.
    fn open(&self, path: &str, access: Access) -> impl Future<Output = Result<Self::File>>;
    /// Opens an adopted origin for reading, by absolute path. What is neither a file nor a block device is refused with
    /// [`StorageError::Io`].
    fn open_origin(&self, path: &str) -> impl Future<Output = Result<Self::File>>;
    /// Makes a file that must not exist, open for reading and writing.
    fn create(&self, path: &str) -> impl Future<Output = Result<Self::File>>;
    /// Makes a directory that must not exist.
    fn create_dir(&self, path: &str) -> impl Future<Output = Result<()>>;
    /// Names in a directory, sorted.
    fn list(&self, path: &str) -> impl Future<Output = Result<Vec<String>>>;
    /// What is known of a path.
    fn stat(&self, path: &str) -> impl Future<Output = Result<Stat>>;
    /// What is known of an open file.
    fn stat_file(&self, file: &Self::File) -> impl Future<Output = Result<Stat>>;
    /// Removes a file's name.
    fn unlink(&self, path: &str) -> impl Future<Output = Result<()>>;
    /// Removes an empty directory.
    fn remove_dir(&self, path: &str) -> impl Future<Output = Result<()>>;
    /// Gives a file a second name, which must not exist.
    fn link(&self, from: &str, to: &str) -> impl Future<Output = Result<()>>;
    /// Gives a file another name, replacing what had it.
    fn rename(&self, from: &str, to: &str) -> impl Future<Output = Result<()>>;
    /// Makes names made, removed and changed in a directory durable.
    fn sync_dir(&self, path: &str) -> impl Future<Output = Result<()>>;

    /// Up to `len` bytes at `offset`; fewer only at the end of the file.
    fn read(&self, file: &Self::File, offset: u64, len: usize) -> impl Future<Output = Result<Bytes>>;
    /// All of `data` at `offset`; the file grows if need be.
    fn write(&self, file: &Self::File, offset: u64, data: Bytes) -> impl Future<Output = Result<()>>;
    /// Makes everything written to the file before durable. A failure is final.
    fn sync(&self, file: &Self::File) -> impl Future<Output = Result<()>>;
    /// Sets the size; new bytes read as zeros and take no space.
    fn set_len(&self, file: &Self::File, len: u64) -> impl Future<Output = Result<()>>;
    /// Reserves space, so that writes there cannot run out of it; what was a hole goes on reading as zeros, and the size
    /// stays.
    fn reserve(&self, file: &Self::File, offset: u64, len: u64) -> impl Future<Output = Result<()>>;
    /// Gives space back; the range reads as zeros. A no-op where the medium cannot.
    fn punch(&self, file: &Self::File, offset: u64, len: u64) -> impl Future<Output = Result<()>>;
    /// Tries to take the exclusive advisory lock of the open file; `false` if someone has it. It goes with the last
    /// handle, and not before the last I/O through it returned.
    fn try_lock(&self, file: &Self::File) -> impl Future<Output = Result<bool>>;
    /// Gives the lock back.
    fn unlock(&self, file: &Self::File) -> impl Future<Output = Result<()>>;
    /// Bytes that the file system would still take.
    fn free_bytes(&self) -> impl Future<Output = Result<u64>>;
}
