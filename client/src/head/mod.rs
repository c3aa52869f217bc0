//! The data plane: the head as a file or device, the arenas of the store, both without a server in between.
//!
//! Everything here blocks but what is called `try_`; callers put it on threads that may block. One open file description a
//! head: a writer holds `flock(LOCK_EX)` on it, and the kernel gives that up only when the last I/O through it has returned,
//! so whoever obtains the lock next knows that nothing of ours is still to land.
//!
//! On one host the page cache is coherent and I/O is buffered. In a pool that hosts share it is not, and I/O is direct
//! ([`direct`]); then nothing can be done at once and every `try_` would block.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use rustix::fs::{FallocateFlags, FlockOperation, OFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use csnap_proto::message::volume::{Geometry, Head};

use crate::core::{IoFailure, RequestError};

mod ahead;
mod arenas;
mod direct;
mod pace;
mod syncing;

use ahead::ReadAhead;
pub(crate) use arenas::Arenas;
use direct::Direct;
use pace::Pace;
use syncing::Syncing;

/// Page of the kernel's cache: a buffered write of whole pages never has to read first.
const PAGE_BYTES: u64 = 4096;

/// A buffered write is cut into pieces of this size, so that the kernel keeps it in folios no larger: see [`ahead`].
const PIECE_BYTES: usize = 128 << 10;

/// Zeros are written in pieces of this size where the medium cannot zero: large enough to stream.
const ZEROS_BYTES: usize = 1 << 20;

/// A run of bytes of one allocation state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRun {
    /// Length, bytes; not zero.
    pub len: u64,
    /// Takes no space; a write there may find the medium full.
    pub hole: bool,
    /// Reads as zeros.
    pub zero: bool,
}

/// An open head.
#[derive(Debug)]
pub(crate) struct HeadFile {
    file: File,
    path: PathBuf,
    direct: Option<Direct>,
    ahead: ReadAhead,
    /// The kernel knows reads that do not wait, on this file system.
    nowait: AtomicBool,
    pace: Pace,
    syncing: Syncing,
}

/// Where the data of a pool is, and how to get at it.
#[derive(Clone, Debug)]
pub(crate) struct DataConfig {
    /// The pool's directory on this node.
    pub(crate) pool: PathBuf,
    /// Several hosts use the pool: direct I/O.
    pub(crate) shared: bool,
}

impl HeadFile {
    /// Opens the head that `geometry` names; for writing if `writes`.
    pub(crate) fn open(config: &DataConfig, geometry: &Geometry, writes: bool) -> Result<Self, RequestError> {
        let path = match &geometry.head {
            Head::Pool => config.pool.join("head").join(geometry.volume.file_name()),
            Head::Adopted { path, .. } => PathBuf::from(path),
        };
        let file = open_data(&path, writes, config.shared).map_err(|error| cannot("open", &path, &error))?;
        if let Head::Adopted { device, inode, .. } = geometry.head {
            check_identity(&file, &path, device, inode)?;
        }
        let direct = config.shared.then(|| Direct::new(geometry.size_bytes)).transpose()?;
        let (ahead, nowait) = (ReadAhead::of(&file), AtomicBool::new(true));
        Ok(Self { file, path, direct, ahead, nowait, pace: Pace::default(), syncing: Syncing::default() })
    }

    /// Tries to take the writer's lock; `false` if another process has it, or I/O of a dead one is still in flight.
    pub(crate) fn try_lock(&self) -> Result<bool, RequestError> {
        match rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(cannot("lock", &self.path, &error.into())),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Fills `buf` from the page cache; `false` if that would wait for the disk.
    pub(crate) fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool, IoFailure> {
        if self.direct.is_some() || !self.nowait.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let mut done = 0;
        while done < buf.len() {
            let mut rest = [io::IoSliceMut::new(&mut buf[done..])];
            match rustix::io::preadv2(&self.file, &mut rest, offset + done as u64, ReadWriteFlags::NOWAIT) {
                Ok(0) => return Err(self.ends_early()),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                    self.nowait.store(false, Ordering::Relaxed);
                    return Ok(false);
                }
                Err(error) => return Err(self.failure("read", &error.into())),
            }
        }
        Ok(true)
    }

    /// Writes into the page cache if the disk is quick enough that this is likely not to wait; `false` if not.
    pub(crate) fn try_write(&self, offset: u64, data: &[u8]) -> Result<bool, IoFailure> {
        if self.direct.is_some()
            || !self.pace.is_quick()
            || !self.edges_are_cached(offset, data.len() as u64)?
        {
            return Ok(false);
        }
        let began = self.pace.begin();
        let result = self.write_buffered(offset, data).map_err(|error| self.failure("write", &error));
        self.pace.end(began, data.len());
        result.map(|()| true)
    }

    /// Writes into the page cache are likely to return at once.
    pub(crate) fn is_quick(&self) -> bool {
        self.direct.is_none() && self.pace.is_quick()
    }

    /// A partial page has to be read before it can be written: only if that does not wait.
    fn edges_are_cached(&self, offset: u64, len: u64) -> Result<bool, IoFailure> {
        let end = offset + len;
        let first = !offset.is_multiple_of(PAGE_BYTES);
        let last = !end.is_multiple_of(PAGE_BYTES);
        let mut byte = [0];
        Ok((!first || self.try_read(offset, &mut byte)?) && (!last || self.try_read(end - 1, &mut byte)?))
    }

    /// Exactly `len` bytes.
    pub(crate) fn read(&self, offset: u64, len: usize) -> Result<Bytes, IoFailure> {
        let read = match &self.direct {
            Some(direct) => direct.read(&self.file, offset, len),
            None => {
                self.ahead.on_miss(&self.file, offset, len as u64);
                let mut buf = vec![0; len];
                self.file.read_exact_at(&mut buf, offset).map(|()| Bytes::from(buf))
            }
        };
        read.map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.ends_early(),
            _ => self.failure("read", &error),
        })
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> Result<(), IoFailure> {
        let written = match &self.direct {
            Some(direct) => direct.write(&self.file, offset, data),
            None => self.write_buffered(offset, data),
        };
        written.map_err(|error| self.failure("write", &error))
    }

    fn write_buffered(&self, mut offset: u64, data: &[u8]) -> io::Result<()> {
        for piece in data.chunks(PIECE_BYTES) {
            self.file.write_all_at(piece, offset)?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    /// Gives space back; the range reads as zeros, or as before where the medium cannot punch.
    pub(crate) fn punch(&self, offset: u64, len: u64) -> Result<(), IoFailure> {
        let _locked = self.direct.as_ref().map(|direct| direct.lock(offset, len));
        match self.allocate(FallocateFlags::PUNCH_HOLE, offset, len) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            result => result.map_err(|error| self.failure("punch", &error.into())),
        }
    }

    /// Zeroes the range, giving its space back if `may_punch` and the medium can.
    pub(crate) fn zero(&self, offset: u64, len: u64, may_punch: bool) -> Result<(), IoFailure> {
        let locked = self.direct.as_ref().map(|direct| direct.lock(offset, len));
        let flags: &[FallocateFlags] = match may_punch {
            true => &[FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE],
            false => &[FallocateFlags::ZERO_RANGE],
        };
        for &flag in flags {
            match self.allocate(flag, offset, len) {
                Ok(()) => return Ok(()),
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                Err(error) => return Err(self.failure("zero", &error.into())),
            }
        }
        drop(locked);
        self.write_zeros(offset, len)
    }

    fn write_zeros(&self, offset: u64, len: u64) -> Result<(), IoFailure> {
        let zeros = vec![0; ZEROS_BYTES];
        let mut done = 0;
        while done < len {
            let count = usize::try_from(len - done).map_or(ZEROS_BYTES, |left| left.min(ZEROS_BYTES));
            self.write(offset + done, &zeros[..count])?;
            done += count as u64;
        }
        Ok(())
    }

    fn allocate(&self, flag: FallocateFlags, offset: u64, len: u64) -> Result<(), Errno> {
        rustix::io::retry_on_intr(|| {
            rustix::fs::fallocate(&self.file, flag | FallocateFlags::KEEP_SIZE, offset, len)
        })
    }

    /// Makes everything written before durable. A failure is final, for this and every later sync: the kernel may have
    /// dropped what it could not write.
    pub(crate) fn sync(&self) -> Result<(), IoFailure> {
        self.syncing.run(|| self.file.sync_data().map_err(|error| self.failure("sync", &error)))
    }

    /// What of the range takes space. One run of data where the medium does not say.
    pub(crate) fn runs(&self, offset: u64, len: u64) -> Result<Vec<BlockRun>, IoFailure> {
        let end = offset + len;
        let mut runs = Vec::new();
        let mut at = offset;
        while at < end {
            let data = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => data.min(end),
                Err(Errno::NXIO) => end,
                Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
                Err(error) => return Err(self.failure("search for data", &error.into())),
            };
            if data > at {
                runs.push(BlockRun { len: data - at, hole: true, zero: true });
            }
            if data < end {
                let hole =
                    rustix::fs::seek(&self.file, SeekFrom::Hole(data)).map_or(end, |hole| hole.min(end));
                let hole = if hole > data { hole } else { end };
                runs.push(BlockRun { len: hole - data, hole: false, zero: false });
                at = hole;
            } else {
                at = end;
            }
        }
        Ok(runs)
    }

    fn failure(&self, what: &str, error: &io::Error) -> IoFailure {
        failure(what, &self.path, error)
    }

    fn ends_early(&self) -> IoFailure {
        IoFailure::Media(format!("{} is shorter than its volume", self.path.display()))
    }
}

/// Opens a file or block device of volume data. Anything else that an adopted origin's path leads to by now is refused, and
/// not waited for: a FIFO would wait for its other end.
fn open_data(path: &Path, writes: bool, shared: bool) -> io::Result<File> {
    let kept = if shared { OFlags::DIRECT } else { OFlags::empty() };
    let flags = i32::try_from((kept | OFlags::NONBLOCK).bits()).expect("flags of open are positive");
    let file = std::fs::OpenOptions::new().read(true).write(writes).custom_flags(flags).open(path)?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::other("it is neither a regular file nor a block device"));
    }
    rustix::fs::fcntl_setfl(&file, kept)?;
    Ok(file)
}

/// An adopted origin must be the file or device that the server saw when it was adopted.
fn check_identity(file: &File, path: &Path, device: u64, inode: u64) -> Result<(), RequestError> {
    let meta = file.metadata().map_err(|error| cannot("examine", path, &error))?;
    let is_device = meta.file_type().is_block_device();
    let found = if is_device { (meta.rdev(), meta.ino()) } else { (meta.dev(), meta.ino()) };
    if found == (device, inode) {
        return Ok(());
    }
    Err(RequestError::Media(format!(
        "{} is not the origin that was adopted (device {device} inode {inode}, found {} and {}); put the original back",
        path.display(),
        found.0,
        found.1
    )))
}

fn failure(what: &str, path: &Path, error: &io::Error) -> IoFailure {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => IoFailure::NoSpace,
        _ => IoFailure::Media(format!("cannot {what} {}: {error}", path.display())),
    }
}

fn cannot(what: &str, path: &Path, error: &io::Error) -> RequestError {
    RequestError::Media(format!("cannot {what} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests;
