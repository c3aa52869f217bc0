//! Direct I/O: the page cache of this host is no proof of what another host wrote. Offsets, lengths and memory must be
//! aligned; what is not is read over, or read, changed and written back, with every write that touches the same blocks
//! waiting: a block that is written back must not undo a neighbour's write.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use csnap_storage::posix::AlignedBuffer;

use crate::core::RequestError;

/// Alignment that every device takes.
const ALIGN_MAX: u64 = 4096;
/// Sectors: what a volume's size must be a multiple of.
const ALIGN_MIN: u64 = 512;

#[derive(Debug)]
pub(super) struct Direct {
    align: u64,
    /// Block ranges being written.
    busy: Mutex<Vec<Range<u64>>>,
    freed: Condvar,
}

/// Blocks that nobody else writes as long as this lives.
pub(super) struct Locked<'a> {
    direct: &'a Direct,
    blocks: Range<u64>,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let mut busy = self.direct.busy();
        let mine =
            busy.iter().position(|range| *range == self.blocks).expect("a locked range is in the list");
        busy.swap_remove(mine);
        self.direct.freed.notify_all();
    }
}

impl Direct {
    /// For a head or arena of `size_bytes`.
    pub(super) fn new(size_bytes: u64) -> Result<Self, RequestError> {
        let align = match size_bytes {
            size if size.is_multiple_of(ALIGN_MAX) => ALIGN_MAX,
            size if size.is_multiple_of(ALIGN_MIN) => ALIGN_MIN,
            _ => {
                return Err(RequestError::Invalid(
                    "a volume of a shared pool must be a multiple of 512 bytes in size",
                ));
            }
        };
        Ok(Self { align, busy: Mutex::default(), freed: Condvar::new() })
    }

    fn busy(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody writes the blocks of these bytes, and keeps others out.
    pub(super) fn lock(&self, offset: u64, len: u64) -> Locked<'_> {
        let blocks = offset / self.align..(offset + len).div_ceil(self.align);
        let free =
            |busy: &mut Vec<Range<u64>>| busy.iter().any(|b| b.start < blocks.end && blocks.start < b.end);
        let mut busy = self.freed.wait_while(self.busy(), free).unwrap_or_else(PoisonError::into_inner);
        busy.push(blocks.clone());
        Locked { direct: self, blocks }
    }

    /// Exactly `len` bytes.
    pub(super) fn read(&self, file: &File, offset: u64, len: usize) -> io::Result<Bytes> {
        let start = offset - offset % self.align;
        let skip = as_len(offset - start);
        let mut buf = AlignedBuffer::new(self.round_up(skip + len));
        let found = read_up_to(file, start, buf.as_mut_slice())?;
        if found < skip + len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(buf.freeze().slice(skip..skip + len))
    }

    pub(super) fn write(&self, file: &File, offset: u64, data: &[u8]) -> io::Result<()> {
        let _locked = self.lock(offset, data.len() as u64);
        let start = offset - offset % self.align;
        let skip = as_len(offset - start);
        let end = skip + data.len();
        let mut buf = AlignedBuffer::new(self.round_up(end));
        let bytes = buf.as_mut_slice();
        let block = as_len(self.align);
        let last = bytes.len() - block;
        if skip > 0 {
            read_up_to(file, start, &mut bytes[..block])?;
        }
        if end < bytes.len() && (last > 0 || skip == 0) {
            read_up_to(file, start + last as u64, &mut bytes[last..])?;
        }
        bytes[skip..end].copy_from_slice(data);
        file.write_all_at(bytes, start)
    }

    fn round_up(&self, len: usize) -> usize {
        len.next_multiple_of(as_len(self.align))
    }
}

fn as_len(bytes: u64) -> usize {
    usize::try_from(bytes).expect("within a request's length")
}

/// Fills `buf`, or less at the end of the file.
fn read_up_to(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
