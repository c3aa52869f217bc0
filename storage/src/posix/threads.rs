//! A fixed small pool of threads behind a bounded queue. Threads are started when there is work that no idle one
//! could take, and live as long as the pool.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use rustix::io::Errno;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::operation::{Finished, Operation};
use super::perform::perform;
use super::{OPERATIONS_MAX, THREADS};

/// The pool. Dropping it lets the threads finish what is queued, and end.
pub(super) struct Pool {
    shared: Arc<Shared>,
    slots: Arc<Semaphore>,
}

struct Shared {
    queue: Mutex<Queue>,
    arrived: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    closed: bool,
}

struct Job {
    operation: Operation,
    answer: oneshot::Sender<Finished>,
    /// Kept until the operation is done: it bounds the queue. A close has none, since nobody can wait with it.
    _slot: Option<OwnedSemaphorePermit>,
}

impl Pool {
    pub(super) fn new() -> Self {
        let shared = Arc::new(Shared { queue: Mutex::default(), arrived: Condvar::new() });
        Self { shared, slots: Arc::new(Semaphore::new(OPERATIONS_MAX)) }
    }

    /// Queues an operation, once there is room, and waits for its end. Dropped while it waits for room, the operation
    /// never happens; dropped later, it does.
    pub(super) async fn submit(&self, operation: Operation) -> Finished {
        let slot = Arc::clone(&self.slots).acquire_owned().await.expect("the semaphore is never closed");
        let (answer, finished) = oneshot::channel();
        self.push(Job { operation, answer, _slot: Some(slot) })?;
        finished.await.unwrap_or(Err(Errno::CANCELED))
    }

    /// Closes a descriptor, some time.
    pub(super) fn close(&self, fd: OwnedFd) {
        let (answer, _) = oneshot::channel();
        // If no thread can be started, the refused job closes the descriptor where it is dropped: here.
        let _ = self.push(Job { operation: Operation::Close { fd }, answer, _slot: None });
    }

    fn push(&self, job: Job) -> Result<(), Errno> {
        let mut queue = self.shared.lock();
        if queue.idle <= queue.jobs.len() && queue.threads < THREADS {
            let shared = Arc::clone(&self.shared);
            let started =
                std::thread::Builder::new().name("csnap-storage".into()).spawn(move || shared.work());
            match started {
                Ok(_) => queue.threads += 1,
                Err(_) if queue.threads > 0 => {}
                Err(_) => return Err(Errno::AGAIN),
            }
        }
        queue.jobs.push_back(job);
        drop(queue);
        self.shared.arrived.notify_one();
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.arrived.notify_all();
    }
}

impl Shared {
    /// The queue. No operation runs under its lock, so that a panic cannot leave it half changed.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().expect("nothing panics under this lock")
    }

    /// A thread's life.
    fn work(&self) {
        while let Some(Job { operation, answer, _slot }) = self.next() {
            // Nobody waits for the answer of a dropped future.
            let _ = answer.send(perform(operation));
        }
    }

    /// The next job; none when the pool is gone and the queue is empty.
    fn next(&self) -> Option<Job> {
        let mut queue = self.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            queue.idle += 1;
            queue = self.arrived.wait(queue).expect("nothing panics under this lock");
            queue.idle -= 1;
        }
    }
}
