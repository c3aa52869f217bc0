//! Writes: a small one once all of it is there, a large one in parts as they arrive.
//!
//! Invariant: a large write is answered once, when its whole payload has arrived and no part of it waits.

use bytes::Bytes;

use super::Connection;
use crate::core::limits::{PIECE_ALIGN, PIECE_BYTES, WAITING_PART_BYTES};
use crate::core::reply;
use crate::core::request::Request;
use crate::core::wire::REQUEST_BYTES;
use crate::export::{Attempt, Export, ExportError};
use crate::shell::listen::Stream;
use crate::shell::work::WriteId;

/// A large write whose payload is arriving.
pub(super) struct Receiving {
    write: WriteId,
    offset: u64,
    left: usize,
}

/// A large write until it is answered.
pub(super) struct Parts {
    cookie: u64,
    fua: bool,
    arrived: bool,
    waiting: usize,
    failed: Option<ExportError>,
}

impl<S: Stream, E: Export> Connection<S, E> {
    /// Takes a write: a small one once all of it is there, a large one in parts as they arrive.
    pub(super) fn take_write(&mut self, request: &Request) -> bool {
        let Request { cookie, offset, fua, .. } = *request;
        let len = request.len as usize;
        if len > PIECE_BYTES {
            self.input.consume(REQUEST_BYTES);
            let write = WriteId(self.next_write);
            self.next_write += 1;
            self.writes.insert(write, Parts { cookie, fua, arrived: false, waiting: 0, failed: None });
            self.receiving = Some(Receiving { write, offset, left: len });
            return true;
        }
        let Some(data) = self.input.filled().get(REQUEST_BYTES..REQUEST_BYTES + len) else { return false };
        let attempt = if len == 0 { Attempt::Done } else { self.export.try_write(offset, data) };
        match attempt {
            Attempt::Done if fua => self.work.flush(cookie),
            Attempt::Done => reply::done(&mut self.output, cookie),
            Attempt::WouldBlock => self.work.write(cookie, offset, Bytes::copy_from_slice(data), fua),
            Attempt::Failed(error) => self.refuse(cookie, &error),
        }
        self.input.consume(REQUEST_BYTES + len);
        true
    }

    /// Writes what has arrived of a large write, up to where it may be cut.
    pub(super) fn receive_piece(&mut self) -> bool {
        let Some(Receiving { write, offset, left }) = self.receiving else { return false };
        let mut len = self.input.len().min(left).min(WAITING_PART_BYTES);
        if len < left {
            let cut = (offset + len as u64) / PIECE_ALIGN * PIECE_ALIGN;
            len = cut.checked_sub(offset).map_or(0, |len| usize::try_from(len).expect("below the payload"));
        }
        if len == 0 {
            return false;
        }
        let parts = self.writes.get_mut(&write).expect("a write stays until it has arrived");
        if parts.failed.is_none() {
            let data = &self.input.filled()[..len];
            match self.export.try_write(offset, data) {
                Attempt::Done => {}
                Attempt::WouldBlock => {
                    parts.waiting += 1;
                    self.work.write_part(write, offset, Bytes::copy_from_slice(data));
                }
                Attempt::Failed(error) => parts.failed = Some(error),
            }
        }
        self.input.consume(len);
        if len == left {
            parts.arrived = true;
            self.receiving = None;
            self.finish_write(write);
        } else {
            self.receiving = Some(Receiving { write, offset: offset + len as u64, left: left - len });
        }
        true
    }

    /// A part of a large write that had to wait is written, or failed.
    pub(super) fn on_part(&mut self, write: WriteId, result: Result<(), ExportError>) {
        let parts = self.writes.get_mut(&write).expect("a write stays until its parts are done");
        parts.waiting -= 1;
        if let Err(error) = result {
            parts.failed.get_or_insert(error);
        }
        self.finish_write(write);
    }

    /// Answers a large write if all of it is done.
    fn finish_write(&mut self, write: WriteId) {
        let done = |parts: &Parts| parts.arrived && parts.waiting == 0;
        if !self.writes.get(&write).is_some_and(done) {
            return;
        }
        let Some(Parts { cookie, fua, failed, .. }) = self.writes.remove(&write) else { return };
        match failed {
            Some(error) => self.refuse(cookie, &error),
            None if fua => self.work.flush(cookie),
            None => reply::done(&mut self.output, cookie),
        }
    }
}
