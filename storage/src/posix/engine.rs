//! The way to the kernel that a storage was opened with.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::Backend;
use super::operation::{Finished, Operation};
use super::threads::Pool;
use super::uring::Ring;

/// A backend.
pub(super) enum Engine {
    /// Everything on threads.
    Threads(Pool),
    /// What io_uring can do, there; the rest on threads, which are started when first needed.
    Uring { ring: Ring, pool: Pool },
}

impl Engine {
    /// The backend that was asked for.
    ///
    /// # Errors
    /// If io_uring was asked for and is not to be had.
    pub(super) fn new(backend: Backend) -> Result<Self, Errno> {
        let ring = match backend {
            Backend::Threads => return Ok(Self::Threads(Pool::new())),
            Backend::Auto | Backend::Uring => Ring::new(),
        };
        match ring {
            Ok(ring) => Ok(Self::Uring { ring, pool: Pool::new() }),
            Err(errno) if backend == Backend::Auto => {
                tracing::info!(%errno, "io_uring is not to be had; file operations go to threads");
                Ok(Self::Threads(Pool::new()))
            }
            Err(errno) => Err(errno),
        }
    }

    /// Does an operation. It owns what the kernel looks at, and is finished even if this future is dropped.
    pub(super) async fn submit(&self, operation: Operation) -> Finished {
        match self {
            Self::Uring { ring, .. } if operation.fits_ring() => ring.submit(operation).await,
            Self::Threads(pool) | Self::Uring { pool, .. } => pool.submit(operation).await,
        }
    }

    /// Closes a descriptor without waiting.
    pub(super) fn close(&self, fd: OwnedFd) {
        match self {
            Self::Threads(pool) => pool.close(fd),
            Self::Uring { ring, .. } => ring.close(fd),
        }
    }

    pub(super) fn is_uring(&self) -> bool {
        matches!(self, Self::Uring { .. })
    }
}
