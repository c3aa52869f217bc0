//! [`PosixStorage`]: the storage trait on a directory of a real file system.
//!
//! What it is not: a cache. Reads and writes are what the kernel does; the only choice is whether they go through its
//! page cache (one host) or past it (a pool that several hosts share, [`PosixOptions::shared`]).
//!
//! Invariants:
//! - nothing blocks the thread that polls: operations go to io_uring or to a small fixed pool of threads, never to a
//!   thread of their own ([`Backend`]);
//! - an operation owns its buffers, paths and files until the kernel is done with it, also when its future was
//!   dropped; it then completes all the same;
//! - every queue is bounded; a full one makes callers wait;
//! - an errno becomes a [`StorageError`](crate::StorageError) in one place (`error`).
//!
//! Callers: the shells of server and lockd through [`Storage`](crate::Storage); the client through the concrete type,
//! whose futures are `Send`, and whose files lend their descriptor ([`PosixFile::fd`]) to reads that must not wait.

mod buffer;
mod engine;
mod error;
mod file;
mod operation;
mod perform;
mod storage;
mod threads;
#[allow(unsafe_code, reason = "the kernel is given pointers; each use says why they hold")]
mod uring;

pub use self::buffer::AlignedBuffer;
pub use self::file::PosixFile;
pub use self::storage::PosixStorage;

/// How operations reach the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// io_uring where the kernel has it, else threads.
    #[default]
    Auto,
    /// io_uring, or an error.
    Uring,
    /// A pool of [`THREADS`] threads. Tracers and sandboxes that know system calls, but not io_uring, see these.
    Threads,
}

/// How a storage is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct PosixOptions {
    /// Several hosts use the directory: everything is read and written with direct I/O, so that no host's page cache
    /// answers for another's writes. Writes must then be whole blocks ([`BLOCK_BYTES`](crate::BLOCK_BYTES)).
    pub shared: bool,
    /// How operations reach the kernel.
    pub backend: Backend,
}

/// Threads of the pool: enough for a journal append, a copy-out's read and its write, and a directory operation at
/// once; more would only queue at the same device.
pub const THREADS: usize = 4;

/// Operations of one storage that are queued or under way; more wait. Far above what keeps a device busy, and few
/// enough that their buffers are bounded.
pub const OPERATIONS_MAX: usize = 256;
