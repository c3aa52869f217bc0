//! One io_uring for a storage: operations are submitted by whoever asks for them, and completed by a task that the
//! ring's eventfd wakes, or on the spot if the kernel had the answer at once.
//!
//! This is the only module with `unsafe`. What it must guarantee: everything that an entry points to (buffers, paths,
//! the answer of a `statx`, descriptors) is owned by the entry's [`InFlight`], which lives in the table until the
//! kernel's answer arrived, whatever happens to the future that waits for it. So nothing is freed under the kernel,
//! and the price is that the end of the runtime waits for I/O in flight ([`Reaper`]).

mod entry;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use io_uring::{IoUring, Probe};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use self::entry::{OPCODES, StatxBox, Step};
use super::OPERATIONS_MAX;
use super::operation::{Finished, Operation};

/// Entries of the submission queue: as many as can be in flight, so that one always has room. Closes, which nobody
/// waits for, get as many places as operations. The completion queue is twice as long and so never overflows.
const ENTRIES: u32 = 512;
const IN_FLIGHT_MAX: usize = ENTRIES as usize;
const _: () = assert!(IN_FLIGHT_MAX == 2 * OPERATIONS_MAX);

/// The ring. Dropping it lets what is in flight finish.
pub(super) struct Ring {
    shared: Arc<Shared>,
    slots: Arc<Semaphore>,
}

struct Shared {
    state: Mutex<State>,
    /// Written by the kernel for every completion.
    event: OwnedFd,
}

struct State {
    ring: IoUring,
    /// By the user data of its entry.
    in_flight: Vec<Option<InFlight>>,
    free: Vec<usize>,
    /// Nobody reaps any more, or will soon not: nothing new is taken.
    closed: bool,
}

/// An operation that the kernel may be looking at.
struct InFlight {
    operation: Operation,
    statx: Option<StatxBox>,
    answer: oneshot::Sender<Finished>,
    /// Bounds what is in flight; a close has none.
    _slot: Option<OwnedSemaphorePermit>,
}

/// Operations that are over, to be delivered when the ring is not locked: dropping a file may close it, on this ring.
type Over = Vec<(InFlight, Finished)>;

impl Ring {
    /// A ring whose completions are reaped by a task on the current runtime.
    ///
    /// # Errors
    /// If the kernel has no io_uring, refuses it, or lacks an operation; or if there is no runtime.
    pub(super) fn new() -> Result<Self, Errno> {
        let runtime = tokio::runtime::Handle::try_current().map_err(|_| Errno::NOSYS)?;
        let ring = IoUring::new(ENTRIES).map_err(|error| errno_of(&error))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe).map_err(|error| errno_of(&error))?;
        if !OPCODES.iter().all(|opcode| probe.is_supported(*opcode)) {
            return Err(Errno::NOSYS);
        }
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        ring.submitter().register_eventfd(event.as_raw_fd()).map_err(|error| errno_of(&error))?;
        let watched = event.try_clone().map_err(|error| errno_of(&error))?;
        // SAFETY: an `OwnedFd` is one open descriptor, the same for as long as the `AsyncFd` owns it.
        let watched = unsafe { AsyncFd::register_with_interest(watched, Interest::READABLE) };
        let watched = watched.map_err(|refused| errno_of(&refused.into_parts().1))?;

        let state = State { ring, in_flight: Vec::new(), free: Vec::new(), closed: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), event });
        let reaper = Reaper { shared: Arc::clone(&shared) };
        runtime.spawn(async move { reaper.run(watched).await });
        Ok(Self { shared, slots: Arc::new(Semaphore::new(OPERATIONS_MAX)) })
    }

    /// Does an operation, once there is room. Dropped while it waits for room, the operation never happens; dropped
    /// later, it does.
    pub(super) async fn submit(&self, operation: Operation) -> Finished {
        let slot = Arc::clone(&self.slots).acquire_owned().await.expect("the semaphore is never closed");
        let (answer, finished) = oneshot::channel();
        let statx = entry::statx_box(&operation);
        let started = self.shared.start(InFlight { operation, statx, answer, _slot: Some(slot) });
        deliver(started.map_err(|_refused| Errno::CANCELED)?);
        finished.await.unwrap_or(Err(Errno::CANCELED))
    }

    /// Closes a descriptor, some time; at once if the ring takes no more.
    pub(super) fn close(&self, fd: OwnedFd) {
        let (answer, _) = oneshot::channel();
        let close = InFlight { operation: Operation::Close { fd }, statx: None, answer, _slot: None };
        if let Ok(over) = self.shared.start(close) {
            deliver(over);
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.wake_reaper();
    }
}

/// Tells who waits, and drops what the operations owned.
fn deliver(over: Over) {
    for (InFlight { operation, answer, .. }, finished) in over {
        entry::dispose(operation);
        // Nobody waits for the answer of a dropped future.
        let _ = answer.send(finished);
    }
}

/// The task that takes completions. When it ends, for whatever reason, it has waited for all that is in flight: the
/// runtime that it ran on may be the last to hold the memory that the kernel writes to.
struct Reaper {
    shared: Arc<Shared>,
}

impl Reaper {
    async fn run(self, event: AsyncFd<OwnedFd>) {
        loop {
            let Ok(mut ready) = event.readable().await else { return };
            // The counter is never read: each write to it is an edge of its own, and this forgets the edge before the
            // queue is looked at.
            ready.clear_ready();
            let (over, unsubmitted, done) = {
                let mut state = self.shared.lock();
                let over = state.reap();
                (over, state.submit().is_err(), state.closed && state.is_idle())
            };
            deliver(over);
            if done {
                return;
            }
            if unsubmitted {
                // The kernel is out of memory for requests: ask again as soon as others had their turn.
                tokio::task::yield_now().await;
                self.shared.wake_reaper();
            }
        }
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        let mut over = Over::new();
        while !state.is_idle() {
            // An error leaves the entries where they are; there is nothing to do but to try again.
            let _ = state.ring.submit_and_wait(1);
            over.append(&mut state.reap());
        }
        drop(state);
        deliver(over);
    }
}

impl Shared {
    /// The ring. Nothing of a caller runs under its lock.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics under this lock")
    }

    /// Gives an operation to the kernel, and takes what is complete. Hands it back if the ring is closed or full.
    fn start(&self, operation: InFlight) -> Result<Over, Box<InFlight>> {
        let mut state = self.lock();
        state.start(operation)?;
        if state.submit().is_err() {
            self.wake_reaper();
        }
        Ok(state.reap())
    }

    fn wake_reaper(&self) {
        // It fails only if the counter is at its end, and then the reaper is awake.
        let _ = rustix::io::write(self.event.as_fd(), &1u64.to_ne_bytes());
    }
}

impl State {
    fn is_idle(&self) -> bool {
        self.free.len() == self.in_flight.len()
    }

    fn start(&mut self, operation: InFlight) -> Result<(), Box<InFlight>> {
        if self.closed || self.in_flight.len() - self.free.len() == IN_FLIGHT_MAX {
            return Err(Box::new(operation));
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.in_flight.push(None);
            self.in_flight.len() - 1
        });
        self.in_flight[index] = Some(operation);
        self.push(index);
        Ok(())
    }

    /// Queues the next entry of an operation in the table.
    fn push(&mut self, index: usize) {
        let in_flight = self.in_flight[index].as_mut().expect("what is pushed is in the table");
        let entry = entry::entry(&mut in_flight.operation, in_flight.statx.as_mut());
        let entry = entry.expect("only operations for the ring are submitted").user_data(index as u64);
        // SAFETY: the entry points into what the operation in the table owns on the heap; the table keeps it, unmoved
        // on the heap and untouched, until the completion with this index is reaped.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("the queue has an entry for everything in flight");
    }

    /// Hands queued entries to the kernel.
    fn submit(&mut self) -> Result<(), Errno> {
        loop {
            if self.ring.submission().is_empty() {
                return Ok(());
            }
            match self.ring.submit() {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(errno_of(&error)),
            }
        }
    }

    /// Takes completions; operations that go on are queued anew.
    fn reap(&mut self) -> Over {
        let mut over = Over::new();
        loop {
            let Some(completion) = self.ring.completion().next() else { return over };
            let index = usize::try_from(completion.user_data()).expect("we gave it an index");
            let in_flight = self.in_flight[index].as_mut().expect("each entry completes once");
            match entry::step(&mut in_flight.operation, in_flight.statx.as_ref(), completion.result()) {
                Step::Again => {
                    self.push(index);
                    // A failure is made up for by the reaper's next turn.
                    let _ = self.submit();
                }
                Step::Finished(finished) => {
                    let in_flight = self.in_flight[index].take().expect("looked at above");
                    self.free.push(index);
                    over.push((in_flight, finished));
                }
            }
        }
    }
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
