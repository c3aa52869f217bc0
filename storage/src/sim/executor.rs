//! Runs a procedure on the simulated disk by hand: no runtime, no clock, no thread. Dropping a [`Task`] between two
//! steps is the crash of the process that it stands for.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use super::SimDisk;

/// Polls a future once.
pub fn poll_once<F: Future + ?Sized>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

/// Runs a future that never waits for anyone but an immediate disk.
///
/// # Panics
/// If it waits for something else: in stepped mode, or on a node that was killed.
pub fn run<F: Future>(future: F) -> F::Output {
    match poll_once(std::pin::pin!(future)) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("the future waits for something that nobody will do"),
    }
}

/// A procedure under way.
pub struct Task<'a, T> {
    future: Pin<Box<dyn Future<Output = T> + 'a>>,
    output: Option<T>,
}

impl<'a, T> Task<'a, T> {
    /// Nothing runs before the first step.
    pub fn new(future: impl Future<Output = T> + 'a) -> Self {
        Self { future: Box::pin(future), output: None }
    }

    /// Runs until it waits or is done; `true` if it is done.
    pub fn poll(&mut self) -> bool {
        if self.output.is_none()
            && let Poll::Ready(output) = poll_once(self.future.as_mut())
        {
            self.output = Some(output);
        }
        self.output.is_some()
    }

    /// On a stepped disk: completes up to `operations_max` operations, oldest first, whoever asked for them, and
    /// polls after each. `true` if it is done; otherwise it waits, and what it asked for last is in flight.
    pub fn run_operations(&mut self, disk: &SimDisk, operations_max: u64) -> bool {
        let mut left = operations_max;
        while !self.poll() && left > 0 {
            left -= 1;
            if disk.complete_oldest().is_none() {
                return false;
            }
        }
        self.output.is_some()
    }

    /// What it returned, once it is done.
    pub fn into_output(self) -> Option<T> {
        self.output
    }
}
