//! Reading ahead, instead of the kernel's.
//!
//! The kernel reads ahead into large folios of its page cache, and on a file system with block heads (ext4) a small write
//! into a large folio walks all of them: 21 µs into a folio of 2 MiB, 1.8 µs into a page (`benches/folios`). Guests write
//! small. So the kernel is told not to read ahead, and what a guest reads in sequence is asked for here, by the one call
//! that fills the cache page by page.
//!
//! Only reads that found nothing in the cache come here, on threads that may block; a read from the cache costs nothing.

use std::fs::File;
use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};

use rustix::fs::Advice;

/// Asked for at once: more would be cut to what the device takes in one request.
const PIECE_BYTES: u64 = 128 << 10;

/// Asked for ahead of a stream that was just recognised, bytes; doubled each time that it goes on.
const WINDOW_MIN: u64 = 128 << 10;

/// Most asked for ahead: a millisecond of a fast medium, so that a stream waits for it once in five hundred pages.
const WINDOW_MAX: u64 = 2 << 20;

/// A read that begins this far behind what was read or asked for still goes on with it: deep queues come out of order.
const GAP_MAX: u64 = 256 << 10;

/// Streams that are followed at once; the one that was not read for the longest is given up for a new one.
const STREAMS: usize = 8;

/// Someone who reads in sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stream {
    /// Everything before was read or asked for.
    end: u64,
    /// Bytes asked for ahead the last time; 0 before the stream was seen to go on.
    window: u64,
}

impl Stream {
    fn goes_on_at(self, offset: u64) -> bool {
        let begin = self.end.saturating_sub(self.window.max(GAP_MAX));
        (begin..=self.end.saturating_add(GAP_MAX)).contains(&offset)
    }
}

/// Streams, the one that was read last at the end.
#[derive(Debug, Default)]
struct Streams(Vec<Stream>);

impl Streams {
    /// A read missed the cache. What to ask for, the read itself included: its offset and length.
    fn on_miss(&mut self, offset: u64, len: u64) -> Option<(u64, u64)> {
        let end = offset.saturating_add(len);
        let Some(at) = self.0.iter().position(|stream| stream.goes_on_at(offset)) else {
            if self.0.len() == STREAMS {
                self.0.remove(0);
            }
            self.0.push(Stream { end, window: 0 });
            return None;
        };
        let mut stream = self.0.remove(at);
        let mut wanted = None;
        if end > stream.end {
            stream.window = (stream.window * 2).clamp(WINDOW_MIN, WINDOW_MAX);
            stream.end = end.saturating_add(stream.window);
            wanted = Some((offset, stream.end - offset));
        }
        self.0.push(stream);
        wanted
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct ReadAhead {
    streams: Mutex<Streams>,
}

impl ReadAhead {
    /// Takes reading ahead over from the kernel.
    pub(super) fn of(file: &File) -> Self {
        // Where a file system knows no advice, it does not follow any either.
        let _ = rustix::fs::fadvise(file, 0, None, Advice::Random);
        Self::default()
    }

    /// A read is about to wait for the disk: with it, what will probably be read next.
    pub(super) fn on_miss(&self, file: &File, offset: u64, len: u64) {
        let wanted = self.streams.lock().unwrap_or_else(PoisonError::into_inner).on_miss(offset, len);
        let Some((offset, len)) = wanted else { return };
        let mut done = 0;
        while let Some(piece) = NonZeroU64::new(PIECE_BYTES.min(len - done)) {
            // It is only a hint, and the end of the file only its end.
            let _ = rustix::fs::fadvise(file, offset + done, Some(piece), Advice::WillNeed);
            done += piece.get();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;

    #[test]
    fn a_sequential_reader_is_read_ahead_of_further_and_further() {
        let mut streams = Streams::default();
        assert_eq!(streams.on_miss(0, 4096), None);
        let (offset, len) = streams.on_miss(4096, 4096).expect("it goes on");
        assert_eq!((offset, len), (4096, 4096 + WINDOW_MIN));
        let mut next = offset + len;
        for window in [256, 512, 1024, 2048, 2048] {
            let wanted = streams.on_miss(next, 4096);
            assert_eq!(wanted, Some((next, 4096 + window * KIB)));
            next += 4096 + window * KIB;
        }
    }

    #[test]
    fn what_is_on_its_way_is_not_asked_for_again() {
        let mut streams = Streams::default();
        streams.on_miss(0, 4096);
        streams.on_miss(4096, 4096).expect("it goes on");
        assert_eq!(streams.on_miss(8192, 4096), None);
        assert_eq!(streams.on_miss(100 * KIB, 4096), None);
    }

    #[test]
    fn a_deep_queue_may_come_out_of_order() {
        let mut streams = Streams::default();
        assert_eq!(streams.on_miss(256 * KIB, 64 * KIB), None);
        assert_eq!(streams.on_miss(128 * KIB, 64 * KIB), None, "read already, or about to be");
        assert!(streams.on_miss(384 * KIB, 64 * KIB).is_some());
    }

    #[test]
    fn random_reads_ask_for_nothing_and_streams_live_beside_each_other() {
        let mut streams = Streams::default();
        for n in 0..100 {
            assert_eq!(streams.on_miss(n * 7_919 * 4096 % (1 << 40), 4096), None);
        }
        let mut ends = [0, 1 << 30, 1 << 31];
        for end in &mut ends {
            streams.on_miss(*end, 4096);
            *end += 4096;
        }
        for _ in 0..3 {
            for end in &mut ends {
                let (offset, len) = streams.on_miss(*end, 4096).expect("each goes on");
                *end = offset + len;
            }
        }
    }

    #[test]
    fn the_last_bytes_that_there_can_be_are_no_trouble() {
        let mut streams = Streams::default();
        assert_eq!(streams.on_miss(u64::MAX - 10, 10), None);
        assert_eq!(streams.on_miss(u64::MAX - 5, 5), None);
    }
}
