//! Flushes that share a sync: whoever comes while one runs is covered by the next, however many they are.
//!
//! Invariant: a flush returns only after a sync that began after it was asked for. A failed sync is final.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::sync::Mutex;

use crate::export::{ErrorKind, ExportError};

/// See the module.
#[derive(Debug)]
pub(super) struct GroupSync {
    file: Arc<File>,
    /// Flushes asked for so far.
    asked: AtomicU64,
    /// How many of them are covered; held while a sync runs.
    covered: Mutex<u64>,
    failed: AtomicBool,
}

impl GroupSync {
    pub(super) fn new(file: Arc<File>) -> Self {
        Self { file, asked: AtomicU64::new(0), covered: Mutex::new(0), failed: AtomicBool::new(false) }
    }

    /// A sync has failed.
    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Refuses once a sync has failed.
    pub(super) fn check(&self) -> Result<(), ExportError> {
        if self.has_failed() {
            let why = "an earlier flush failed: what was written may be lost, nothing more is accepted";
            return Err(ExportError::new(ErrorKind::Io, why));
        }
        Ok(())
    }

    /// Makes durable what was written before.
    pub(super) async fn flush(&self) -> Result<(), ExportError> {
        let ticket = self.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let mut covered = self.covered.lock().await;
        self.check()?;
        if *covered >= ticket {
            return Ok(());
        }
        let covers = self.asked.load(Ordering::Acquire);
        let file = Arc::clone(&self.file);
        let synced = tokio::task::spawn_blocking(move || rustix::fs::fdatasync(&*file)).await;
        match synced {
            Ok(Ok(())) => {
                *covered = covers;
                Ok(())
            }
            Ok(Err(error)) => {
                self.failed.store(true, Ordering::Release);
                Err(super::failed("flush", error))
            }
            Err(error) => {
                self.failed.store(true, Ordering::Release);
                Err(ExportError::new(ErrorKind::Io, format!("the flush was lost: {error}")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn flushes_that_wait_together_share_a_sync() {
        let sync = Arc::new(GroupSync::new(Arc::new(tempfile::tempfile().expect("a file"))));
        let running = sync.covered.lock().await;
        let waiting: Vec<_> = (0..10)
            .map(|_| {
                let sync = Arc::clone(&sync);
                tokio::spawn(async move { sync.flush().await })
            })
            .collect();
        while sync.asked.load(Ordering::Acquire) < 10 {
            tokio::task::yield_now().await;
        }
        drop(running);
        for flush in waiting {
            flush.await.expect("does not panic").expect("syncs");
        }
        assert_eq!(*sync.covered.lock().await, 10, "the first of them covered all");
    }

    #[tokio::test]
    async fn a_failed_sync_is_final() {
        // A pipe cannot be synced.
        let (pipe, _writer) = std::io::pipe().expect("a pipe");
        let file = File::from(std::os::fd::OwnedFd::from(pipe));
        let sync = GroupSync::new(Arc::new(file));
        assert!(sync.flush().await.is_err());
        assert!(sync.has_failed());
        assert!(sync.flush().await.expect_err("still").message.contains("earlier flush"));
    }
}
