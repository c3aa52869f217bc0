//! One sync of a head at a time, and none after one that failed.
//!
//! The kernel tells of data that it could not write only once for each open file, to one of the syncs that run side by
//! side, and calls the pages clean from then on: every other sync, also a later one, would succeed over lost data. So a
//! failure stays, and a sync that waited for one that failed fails with it. Each caller gets a sync that began after
//! it asked, never one that was under way.

use std::sync::{Mutex, PoisonError};

use crate::core::IoFailure;

#[derive(Debug, Default)]
pub(super) struct Syncing {
    /// Locked while a sync runs; the first failure.
    failed: Mutex<Option<IoFailure>>,
}

impl Syncing {
    /// Runs `sync` once no other runs, unless one failed before: then its failure is the result.
    pub(super) fn run(&self, sync: impl FnOnce() -> Result<(), IoFailure>) -> Result<(), IoFailure> {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(failure) = &*failed {
            return Err(failure.clone());
        }
        let result = sync();
        *failed = result.clone().err();
        result
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_failed_sync_fails_every_later_one() {
        let lost = || IoFailure::Media("lost".to_owned());
        for failure in [lost(), IoFailure::NoSpace] {
            let syncing = Syncing::default();
            assert_eq!(syncing.run(|| Ok(())), Ok(()));
            assert_eq!(syncing.run(|| Err(failure.clone())), Err(failure.clone()));
            assert_eq!(syncing.run(|| unreachable!("the kernel would say that all is well")), Err(failure));
        }
    }

    #[test]
    fn a_sync_that_came_while_another_ran_fails_with_it() {
        let syncing = Syncing::default();
        let (began, begun) = mpsc::channel();
        let (go, wait) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let first = scope.spawn(|| {
                syncing.run(move || {
                    began.send(()).expect("the test waits");
                    wait.recv().expect("the test says when");
                    Err(IoFailure::NoSpace)
                })
            });
            begun.recv().expect("the first began");
            let second = scope.spawn(|| syncing.run(|| Ok(())));
            go.send(()).expect("the first waits");
            assert_eq!(first.join().expect("no panic"), Err(IoFailure::NoSpace));
            assert_eq!(second.join().expect("no panic"), Err(IoFailure::NoSpace));
        });
    }

    #[test]
    fn syncs_run_one_at_a_time_and_everybody_gets_their_own() {
        let (syncing, runs, count) = (Syncing::default(), AtomicBool::new(false), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let result = syncing.run(|| {
                        assert!(!runs.swap(true, Ordering::SeqCst), "two at once");
                        count.fetch_add(1, Ordering::SeqCst);
                        std::thread::yield_now();
                        runs.store(false, Ordering::SeqCst);
                        Ok(())
                    });
                    assert_eq!(result, Ok(()));
                });
            }
        });
        assert_eq!(count.into_inner(), 8);
    }
}
