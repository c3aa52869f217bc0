//! An open file of a [`PosixStorage`](super::PosixStorage).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Advice, OFlags};
use rustix::io::Errno;

use super::engine::Engine;
use crate::Access;

/// An open file description. Operations under way hold it too, so that it is closed, and its lock given up, only
/// after the last of them returned.
#[derive(Clone)]
pub struct PosixFile(Arc<OpenFile>);

struct OpenFile {
    /// Taken by the drop alone.
    fd: Option<OwnedFd>,
    /// Relative to the root; for messages.
    path: String,
    /// Opened for direct I/O.
    direct: bool,
    /// The lock was taken through it at some time.
    locked: AtomicBool,
    engine: Arc<Engine>,
}

impl PosixFile {
    pub(super) fn new(fd: OwnedFd, path: &str, direct: bool, engine: Arc<Engine>) -> Self {
        let (fd, path, locked) = (Some(fd), path.to_owned(), AtomicBool::new(false));
        Self(Arc::new(OpenFile { fd, path, direct, locked, engine }))
    }

    /// The descriptor, for reads that must not wait (`RWF_NOWAIT`) and for handing to other processes.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_ref().expect("only the drop takes it").as_fd()
    }

    /// Whether it takes aligned offsets, lengths and memory only.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.0.direct
    }

    /// Takes note that the lock is held: the next holder must not have to wait for a queue when this file goes.
    pub(super) fn note_locked(&self) {
        self.0.locked.store(true, Ordering::Relaxed);
    }

    /// Undoes `O_NONBLOCK`.
    pub(super) fn let_wait(&self) -> Result<(), Errno> {
        let flags = rustix::fs::fcntl_getfl(self.fd())?;
        rustix::fs::fcntl_setfl(self.fd(), flags - OFlags::NONBLOCK)
    }

    /// Tells the kernel how it will be read, which costs no I/O. A file system that does not know the advice reads as usual.
    pub(super) fn expect_access(&self, access: Access) {
        if access == Access::ReadScattered {
            let _ = rustix::fs::fadvise(self.fd(), 0, None, Advice::Random);
        }
    }

    pub(super) fn path(&self) -> &str {
        &self.0.path
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        if let Some(fd) = self.fd.take()
            && !self.locked.load(Ordering::Relaxed)
        {
            // Closing may write back (network file systems) or free the space of an unlinked file: not on this
            // thread.
            self.engine.close(fd);
        }
    }
}
