//! What a connection has handed over: requests that would have waited, each on its own task, none in the way of another.
//!
//! Invariant: the bytes that tasks hold and their number are counted here; the connection hands over nothing when
//! [`Work::has_room`] says no.

use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use tokio::task::{JoinError, JoinSet};

use crate::core::limits::{IN_FLIGHT_BYTES_MAX, IN_FLIGHT_REQUESTS_MAX, STATUS_EXTENTS_MAX};
use crate::export::{BlockExtent, Export, ExportError, Zeroing};

/// A large write of this connection, cut into parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WriteId(pub u64);

/// A read that is answered piece by piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Of the request.
    pub cookie: u64,
    /// First byte that is still to be read.
    pub offset: u64,
    /// The byte after the last.
    pub end: u64,
}

/// What became of something that was handed over.
#[derive(Debug)]
pub enum Outcome {
    /// The first bytes of a reading.
    Read(Reading, Result<Bytes, ExportError>),
    /// A request without data.
    Done(u64, Result<(), ExportError>),
    /// One part of a large write.
    Part(WriteId, Result<(), ExportError>),
    /// Allocation state, for a request of `len` bytes.
    Status {
        /// Of the request.
        cookie: u64,
        /// Of the request, bytes.
        len: u32,
        /// Only one extent is wanted.
        one: bool,
        /// The extents.
        result: Result<Vec<BlockExtent>, ExportError>,
    },
}

/// A change of a range without data, or a hint about it.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// Forget the content.
    Trim,
    /// Zero it.
    Zero(Zeroing),
    /// Read it soon.
    Cache,
}

/// The tasks. See the module.
pub struct Work<E> {
    export: Arc<E>,
    tasks: JoinSet<(usize, Outcome)>,
    held_bytes: usize,
}

impl<E: Export> Work<E> {
    /// Nothing handed over yet.
    pub fn new(export: Arc<E>) -> Self {
        Self { export, tasks: JoinSet::new(), held_bytes: 0 }
    }

    /// Whether one more request that holds `bytes` may be handed over.
    pub fn has_room(&self, bytes: usize) -> bool {
        self.tasks.len() < IN_FLIGHT_REQUESTS_MAX && self.held_bytes + bytes <= IN_FLIGHT_BYTES_MAX
    }

    /// Nothing is in flight.
    pub fn is_idle(&self) -> bool {
        self.tasks.is_empty()
    }

    /// The next outcome. Ready with `None` when nothing is in flight; an error if a task panicked.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Outcome, JoinError>>> {
        self.tasks.poll_join_next(cx).map(|next| {
            next.map(|joined| {
                joined.map(|(bytes, outcome)| {
                    self.held_bytes -= bytes;
                    outcome
                })
            })
        })
    }

    /// Drops whatever is in flight and waits until it is gone.
    pub async fn abort(&mut self) {
        self.tasks.shutdown().await;
        self.held_bytes = 0;
    }

    /// Reads the first `len` bytes of `reading`.
    pub fn read(&mut self, reading: Reading, len: usize) {
        self.held_bytes += len;
        let export = Arc::clone(&self.export);
        self.tasks
            .spawn(async move { (len, Outcome::Read(reading, export.read(reading.offset, len).await)) });
    }

    /// Writes, and with `fua` makes durable.
    pub fn write(&mut self, cookie: u64, offset: u64, data: Bytes, fua: bool) {
        let len = data.len();
        self.held_bytes += len;
        let export = Arc::clone(&self.export);
        self.tasks.spawn(async move {
            let written = export.write(offset, data).await;
            (len, Outcome::Done(cookie, durable(&*export, written, fua).await))
        });
    }

    /// Writes one part of a large write.
    pub fn write_part(&mut self, write: WriteId, offset: u64, data: Bytes) {
        let len = data.len();
        self.held_bytes += len;
        let export = Arc::clone(&self.export);
        self.tasks.spawn(async move { (len, Outcome::Part(write, export.write(offset, data).await)) });
    }

    /// Makes durable what was written.
    pub fn flush(&mut self, cookie: u64) {
        let export = Arc::clone(&self.export);
        self.tasks.spawn(async move { (0, Outcome::Done(cookie, export.flush().await)) });
    }

    /// Changes a range, and with `fua` makes that durable.
    pub fn change(&mut self, cookie: u64, change: Change, offset: u64, len: u32, fua: bool) {
        let export = Arc::clone(&self.export);
        let len = u64::from(len);
        self.tasks.spawn(async move {
            let changed = match change {
                Change::Trim => export.trim(offset, len).await,
                Change::Zero(how) => export.write_zeroes(offset, len, how).await,
                Change::Cache => export.cache(offset, len).await,
            };
            (0, Outcome::Done(cookie, durable(&*export, changed, fua).await))
        });
    }

    /// Asks for the allocation state of a range.
    pub fn status(&mut self, cookie: u64, offset: u64, len: u32, one: bool) {
        let export = Arc::clone(&self.export);
        self.tasks.spawn(async move {
            let extents_max = if one { 1 } else { STATUS_EXTENTS_MAX };
            let result = export.block_status(offset, u64::from(len), extents_max).await;
            (0, Outcome::Status { cookie, len, one, result })
        });
    }
}

/// `done`, followed by a flush if that is wanted and there is something to make durable.
async fn durable<E: Export>(export: &E, done: Result<(), ExportError>, fua: bool) -> Result<(), ExportError> {
    match done {
        Ok(()) if fua => export.flush().await,
        done => done,
    }
}
