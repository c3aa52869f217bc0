//! Procedures under way: futures of the shipped code that wait for the simulated disk, polled by hand.
//!
//! Each process has its own set; dropping the set is the crash of the process. What becomes ready is put into one queue
//! for the whole world, in the order in which it was woken, so that a seed always gives the same order.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use crate::sim::ProcId;

/// A procedure, numbered in its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TaskId(pub u64);

/// Procedures that can go on.
#[derive(Clone, Debug, Default)]
pub struct Ready(Arc<Mutex<VecDeque<(ProcId, TaskId)>>>);

impl Ready {
    /// The next one.
    #[must_use]
    pub fn pop(&self) -> Option<(ProcId, TaskId)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn push(&self, proc: ProcId, task: TaskId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push_back((proc, task));
    }
}

struct Alarm {
    ready: Ready,
    proc: ProcId,
    task: TaskId,
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.ready.push(self.proc, self.task);
    }
}

struct Running<T> {
    future: Pin<Box<dyn Future<Output = T>>>,
    waker: Waker,
}

/// The procedures of one process; each ends in a `T`.
pub struct Tasks<T> {
    proc: ProcId,
    ready: Ready,
    last: u64,
    running: BTreeMap<TaskId, Running<T>>,
}

impl<T> Tasks<T> {
    /// None yet.
    #[must_use]
    pub fn new(proc: ProcId, ready: Ready) -> Self {
        Self { proc, ready, last: 0, running: BTreeMap::new() }
    }

    /// Starts one; it runs when the world next polls.
    pub fn spawn(&mut self, future: impl Future<Output = T> + 'static) {
        self.last += 1;
        let task = TaskId(self.last);
        let alarm = Alarm { ready: self.ready.clone(), proc: self.proc, task };
        self.running.insert(task, Running { future: Box::pin(future), waker: Waker::from(Arc::new(alarm)) });
        self.ready.push(self.proc, task);
    }

    /// Lets one go on; what it ended in, if it did.
    pub fn poll(&mut self, task: TaskId) -> Option<T> {
        let running = self.running.get_mut(&task)?;
        match running.future.as_mut().poll(&mut Context::from_waker(&running.waker)) {
            Poll::Ready(output) => {
                self.running.remove(&task);
                Some(output)
            }
            Poll::Pending => None,
        }
    }

    /// How many are under way.
    #[must_use]
    pub fn len(&self) -> usize {
        self.running.len()
    }

    /// None is under way.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
    }
}
