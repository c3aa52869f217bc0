//! Reads: answered at once where the export can, a large structured one piece by piece.
//!
//! Invariant: the data of a reply follows its header; while some of it waits for room ([`Connection`]'s body), nothing else
//! is put into the output.

use bytes::Bytes;

use super::Connection;
use crate::core::limits::{PIECE_BYTES, REPLY_ROOM_BYTES, WAITING_PART_BYTES, WHOLE_READ_BYTES};
use crate::core::reply;
use crate::export::{Attempt, Export};
use crate::shell::listen::Stream;
use crate::shell::work::Reading;

impl<S: Stream, E: Export> Connection<S, E> {
    /// Answers with all data at once.
    pub(super) fn read_whole(&mut self, reading: Reading, len: usize) {
        if len > WHOLE_READ_BYTES || !self.try_read(reading, len) {
            self.work.read(reading, len);
        }
    }

    /// Answers the next piece of a reading; the rest waits for its turn.
    pub(super) fn read_piece(&mut self, reading: Reading) {
        let left = usize::try_from(reading.end - reading.offset).expect("a request has a 32-bit length");
        let len = left.min(PIECE_BYTES);
        if !self.try_read(reading, len) {
            self.work.read(reading, left.min(WAITING_PART_BYTES));
        }
    }

    /// Reads the first `len` bytes of `reading` into the output, if that needs no waiting.
    fn try_read(&mut self, reading: Reading, len: usize) -> bool {
        let structured = self.terms.structured;
        let Reading { cookie, offset, end } = reading;
        let rest = Reading { offset: offset + len as u64, ..reading };
        reply::data_header(&mut self.output, structured, cookie, offset, len, rest.offset == end);
        match self.export.try_read(offset, &mut self.output.free(len)[..len]) {
            Attempt::Done => {
                self.output.commit(len);
                if rest.offset < end {
                    self.readings.push_front(rest);
                }
                true
            }
            Attempt::WouldBlock => {
                self.output.retract(reply::data_header_bytes(structured));
                false
            }
            Attempt::Failed(error) => {
                self.output.retract(reply::data_header_bytes(structured));
                self.refuse(cookie, &error);
                true
            }
        }
    }

    pub(super) fn on_read(&mut self, reading: Reading, data: Bytes) {
        let Reading { cookie, offset, end } = reading;
        let rest = Reading { offset: offset + data.len() as u64, ..reading };
        assert!(!data.is_empty() && rest.offset <= end, "an export gives what it was asked for");
        reply::data_header(
            &mut self.output,
            self.terms.structured,
            cookie,
            offset,
            data.len(),
            rest.offset == end,
        );
        self.body = data;
        self.pour_body();
        if rest.offset < end {
            self.readings.push_back(rest);
        }
    }

    /// Moves as much of the body into the output as fits.
    pub(super) fn pour_body(&mut self) {
        if !self.body.is_empty() {
            let room = self.output.room().saturating_sub(REPLY_ROOM_BYTES);
            let poured = self.body.split_to(self.body.len().min(room));
            self.output.put(&poured);
        }
    }
}
