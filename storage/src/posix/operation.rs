//! What a storage asks of the kernel, as data that owns everything the kernel will look at.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;
use rustix::fs::{FallocateFlags, FileType, FlockOperation, OFlags, Statx, makedev};
use rustix::io::Errno;

use super::buffer::AlignedBuffer;
use super::file::PosixFile;
use crate::{BLOCK_BYTES, Stat};

/// The directory that relative paths start at.
pub(super) type Root = Arc<OwnedFd>;

/// An operation.
pub(super) enum Operation {
    Open {
        root: Root,
        path: CString,
        flags: OFlags,
    },
    Close {
        fd: OwnedFd,
    },
    MakeDir {
        root: Root,
        path: CString,
    },
    Remove {
        root: Root,
        path: CString,
        dir: bool,
    },
    Link {
        root: Root,
        from: CString,
        to: CString,
    },
    Rename {
        root: Root,
        from: CString,
        to: CString,
    },
    StatPath {
        root: Root,
        path: CString,
    },
    StatFile {
        file: PosixFile,
    },
    Read(ReadJob),
    Write(WriteJob),
    /// `fdatasync`: content, and the metadata that reading it back needs, which includes the size.
    Sync {
        file: PosixFile,
    },
    /// `fsync` of a directory.
    SyncDir {
        fd: Arc<OwnedFd>,
    },
    Allocate {
        file: PosixFile,
        mode: FallocateFlags,
        offset: u64,
        len: u64,
    },
    SetLen {
        file: PosixFile,
        len: u64,
    },
    List {
        root: Root,
        path: CString,
    },
    Lock {
        file: PosixFile,
        how: FlockOperation,
    },
    Space {
        root: Root,
    },
    DeviceSize {
        root: Root,
        path: CString,
    },
    DeviceSizeOf {
        file: PosixFile,
    },
}

impl Operation {
    /// Whether io_uring can do it, on every kernel that we take its ring of.
    pub(super) fn fits_ring(&self) -> bool {
        match self {
            Self::Open { .. }
            | Self::Close { .. }
            | Self::MakeDir { .. }
            | Self::Remove { .. }
            | Self::Link { .. }
            | Self::Rename { .. }
            | Self::StatPath { .. }
            | Self::StatFile { .. }
            | Self::Read(_)
            | Self::Write(_)
            | Self::Sync { .. }
            | Self::SyncDir { .. }
            | Self::Allocate { .. } => true,
            Self::SetLen { .. }
            | Self::List { .. }
            | Self::Lock { .. }
            | Self::Space { .. }
            | Self::DeviceSize { .. }
            | Self::DeviceSizeOf { .. } => false,
        }
    }
}

/// What an operation gives back.
pub(super) enum Outcome {
    Done,
    Opened(OwnedFd),
    Stat(FileStat),
    Read(Bytes),
    Names(Vec<String>),
    Bytes(u64),
}

/// How an operation ends.
pub(super) type Finished = Result<Outcome, Errno>;

/// A read, possibly in several pieces.
pub(super) struct ReadJob {
    pub(super) file: PosixFile,
    offset: u64,
    buffer: AlignedBuffer,
    filled: usize,
}

impl ReadJob {
    /// Reads `len` bytes at `offset`, both aligned if the file asks for it.
    pub(super) fn new(file: PosixFile, offset: u64, len: usize) -> Self {
        let buffer = if file.is_direct() { AlignedBuffer::new(len) } else { AlignedBuffer::unaligned(len) };
        Self { file, offset, buffer, filled: 0 }
    }

    /// Where the next piece is read.
    pub(super) fn position(&self) -> u64 {
        self.offset + self.filled as u64
    }

    /// Where the next piece goes.
    pub(super) fn space(&mut self) -> &mut [u8] {
        &mut self.buffer.as_mut_slice()[self.filled..]
    }

    /// Takes note of `count` bytes read; `true` if that was all. A direct read that ends within a block met the end
    /// of the file, and could not go on from there.
    pub(super) fn advance(&mut self, count: usize) -> bool {
        self.filled += count;
        let odd = self.file.is_direct() && !count.is_multiple_of(BLOCK_BYTES);
        count == 0 || odd || self.space().is_empty()
    }

    /// What was read, once that is all.
    pub(super) fn take(&mut self) -> Outcome {
        let buffer = std::mem::replace(&mut self.buffer, AlignedBuffer::unaligned(0));
        Outcome::Read(buffer.freeze().slice(..std::mem::take(&mut self.filled)))
    }
}

/// A write, possibly in several pieces.
pub(super) struct WriteJob {
    pub(super) file: PosixFile,
    offset: u64,
    data: Bytes,
    written: usize,
}

impl WriteJob {
    /// Writes `data` at `offset`; everything aligned if the file asks for it.
    pub(super) fn new(file: PosixFile, offset: u64, data: Bytes) -> Self {
        Self { file, offset, data, written: 0 }
    }

    /// Where the next piece is written.
    pub(super) fn position(&self) -> u64 {
        self.offset + self.written as u64
    }

    /// The next piece.
    pub(super) fn rest(&self) -> &[u8] {
        &self.data[self.written..]
    }

    /// Takes note of `count` bytes written; `true` if that was all.
    ///
    /// # Errors
    /// A medium that takes nothing, or part of a block of a direct write, cannot be written on.
    pub(super) fn advance(&mut self, count: usize) -> Result<bool, Errno> {
        self.written += count;
        let done = self.rest().is_empty();
        let stuck = count == 0 || (self.file.is_direct() && !count.is_multiple_of(BLOCK_BYTES));
        if stuck && !done { Err(Errno::IO) } else { Ok(done) }
    }
}

/// What the kernel says of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct FileStat {
    pub(super) stat: Stat,
    /// Its size must be asked for in another way.
    pub(super) is_block_device: bool,
    is_regular: bool,
}

impl FileStat {
    /// Whether it is storage: bytes that stay where they are written.
    pub(super) fn holds_bytes(&self) -> bool {
        self.is_regular || self.is_block_device
    }
}

impl From<&Statx> for FileStat {
    fn from(statx: &Statx) -> Self {
        const STAT_BLOCK_BYTES: u64 = 512;
        let kind = FileType::from_raw_mode(statx.stx_mode.into());
        let is_block_device = kind == FileType::BlockDevice;
        let device = if is_block_device {
            makedev(statx.stx_rdev_major, statx.stx_rdev_minor)
        } else {
            makedev(statx.stx_dev_major, statx.stx_dev_minor)
        };
        let stat = Stat {
            size_bytes: statx.stx_size,
            allocated_bytes: statx.stx_blocks * STAT_BLOCK_BYTES,
            device,
            inode: statx.stx_ino,
            is_dir: kind == FileType::Directory,
        };
        Self { stat, is_block_device, is_regular: kind == FileType::RegularFile }
    }
}
