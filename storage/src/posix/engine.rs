//! The way to the kernel that a storage was opened with.

use std::os::fd::OwnedFd;

use super::operation::{Finished, Operation};
use super::threads::Pool;

/// A backend.
pub(super) enum Engine {
    /// Everything on threads.
    Threads(Pool),
}

impl Engine {
    /// Does an operation. It owns what the kernel looks at, and is finished even if this future is dropped.
    pub(super) async fn submit(&self, operation: Operation) -> Finished {
        match self {
            Self::Threads(pool) => pool.submit(operation).await,
        }
    }

    /// Closes a descriptor without waiting.
    pub(super) fn close(&self, fd: OwnedFd) {
        match self {
            Self::Threads(pool) => pool.close(fd),
        }
    }
}
