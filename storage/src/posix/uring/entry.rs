//! One operation in the terms of the ring: what the kernel is told, and what its answer means.

use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use io_uring::{opcode, squeue, types};
use rustix::fs::{AtFlags, Statx, StatxFlags};
use rustix::io::Errno;

use crate::posix::operation::{FileStat, Finished, Operation, Outcome};
use crate::posix::perform::{DIR_MODE, FILE_MODE};

/// The longest piece of one read or write, bytes: the kernel's own limit, and a page less than 2 GiB.
const PIECE_BYTES_MAX: usize = 0x7fff_f000;

/// What became of an entry.
pub(super) enum Step {
    /// The operation is over.
    Finished(Finished),
    /// It goes on with another entry: the kernel did a part, or asks to be asked again.
    Again,
}

/// Where the kernel writes the answer of a `statx`. Its address stays as long as the box.
pub(super) type StatxBox = Box<Statx>;

/// Room for an answer, if the operation needs it.
pub(super) fn statx_box(operation: &Operation) -> Option<StatxBox> {
    let needed = matches!(operation, Operation::StatPath { .. } | Operation::StatFile { .. });
    // SAFETY: `Statx` is plain integers, for which zero is a value.
    needed.then(|| Box::new(unsafe { std::mem::zeroed() }))
}

/// The entry of an operation's next step; none if it is not one for the ring. Its pointers lead into the heap memory
/// of `operation` and into `statx`, which must both outlive the kernel's answer, and not be touched before it.
pub(super) fn entry(operation: &mut Operation, statx: Option<&mut StatxBox>) -> Option<squeue::Entry> {
    let entry = match operation {
        Operation::Open { root, path, flags } => {
            opcode::OpenAt::new(types::Fd(root.as_raw_fd()), path.as_ptr())
                .flags(flags.bits().cast_signed())
                .mode(FILE_MODE.as_raw_mode())
                .build()
        }
        Operation::Close { fd } => opcode::Close::new(types::Fd(fd.as_raw_fd())).build(),
        Operation::MakeDir { root, path } => opcode::MkDirAt::new(types::Fd(root.as_raw_fd()), path.as_ptr())
            .mode(DIR_MODE.as_raw_mode())
            .build(),
        Operation::Remove { root, path, dir } => {
            let flags = if *dir { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            opcode::UnlinkAt::new(types::Fd(root.as_raw_fd()), path.as_ptr())
                .flags(flags.bits().cast_signed())
                .build()
        }
        Operation::Link { root, from, to } => {
            let root = types::Fd(root.as_raw_fd());
            opcode::LinkAt::new(root, from.as_ptr(), root, to.as_ptr()).build()
        }
        Operation::Rename { root, from, to } => {
            let root = types::Fd(root.as_raw_fd());
            opcode::RenameAt::new(root, from.as_ptr(), root, to.as_ptr()).build()
        }
        Operation::StatPath { root, path } => {
            statx_entry(root.as_raw_fd(), path.as_ptr(), AtFlags::empty(), statx?)
        }
        Operation::StatFile { file } => {
            statx_entry(file.fd().as_raw_fd(), c"".as_ptr(), AtFlags::EMPTY_PATH, statx?)
        }
        Operation::Read(job) => {
            let (fd, position) = (types::Fd(job.file.fd().as_raw_fd()), job.position());
            let space = job.space();
            opcode::Read::new(fd, space.as_mut_ptr(), piece(space.len())).offset(position).build()
        }
        Operation::Write(job) => {
            let fd = types::Fd(job.file.fd().as_raw_fd());
            let rest = job.rest();
            opcode::Write::new(fd, rest.as_ptr(), piece(rest.len())).offset(job.position()).build()
        }
        Operation::Sync { file } => {
            opcode::Fsync::new(types::Fd(file.fd().as_raw_fd())).flags(types::FsyncFlags::DATASYNC).build()
        }
        Operation::SyncDir { fd } => opcode::Fsync::new(types::Fd(fd.as_raw_fd())).build(),
        Operation::Allocate { file, mode, offset, len } => {
            opcode::Fallocate::new(types::Fd(file.fd().as_raw_fd()), *len)
                .offset(*offset)
                .mode(mode.bits().cast_signed())
                .build()
        }
        Operation::SetLen { .. }
        | Operation::List { .. }
        | Operation::Lock { .. }
        | Operation::Space { .. }
        | Operation::DeviceSize { .. }
        | Operation::DeviceSizeOf { .. } => return None,
    };
    Some(entry)
}

/// The opcodes that [`entry`] uses.
pub(super) const OPCODES: [u8; 11] = [
    opcode::OpenAt::CODE,
    opcode::Close::CODE,
    opcode::MkDirAt::CODE,
    opcode::UnlinkAt::CODE,
    opcode::LinkAt::CODE,
    opcode::RenameAt::CODE,
    opcode::Statx::CODE,
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];

/// What `result`, the kernel's answer to the operation's last entry, means.
pub(super) fn step(operation: &mut Operation, statx: Option<&StatxBox>, result: i32) -> Step {
    let count = match result {
        0.. => result.unsigned_abs(),
        _ => match Errno::from_raw_os_error(-result) {
            // Cancelled: the thread that submitted it ended before it began.
            Errno::INTR | Errno::AGAIN | Errno::CANCELED => return Step::Again,
            errno => return Step::Finished(Err(errno)),
        },
    };
    let bytes = count as usize;
    match operation {
        Operation::Open { .. } => {
            // SAFETY: the kernel just gave us this descriptor, and nobody else knows of it.
            let fd = unsafe { OwnedFd::from_raw_fd(result) };
            Step::Finished(Ok(Outcome::Opened(fd)))
        }
        Operation::StatPath { .. } | Operation::StatFile { .. } => {
            let statx = statx.expect("an operation with a statx entry has room for its answer");
            Step::Finished(Ok(Outcome::Stat(FileStat::from(&**statx))))
        }
        Operation::Read(job) => match job.advance(bytes) {
            true => Step::Finished(Ok(job.take())),
            false => Step::Again,
        },
        Operation::Write(job) => match job.advance(bytes) {
            Ok(true) => Step::Finished(Ok(Outcome::Done)),
            Ok(false) => Step::Again,
            Err(errno) => Step::Finished(Err(errno)),
        },
        _ => Step::Finished(Ok(Outcome::Done)),
    }
}

/// Takes an operation apart that is over. A descriptor that the kernel closed must not be closed again: the number
/// may be another file's by now.
pub(super) fn dispose(operation: Operation) {
    if let Operation::Close { fd } = operation {
        let _ = fd.into_raw_fd();
    }
}

fn statx_entry(
    fd: i32,
    path: *const std::ffi::c_char,
    flags: AtFlags,
    statx: &mut StatxBox,
) -> squeue::Entry {
    let answer: *mut Statx = &mut **statx;
    opcode::Statx::new(types::Fd(fd), path, answer.cast())
        .flags(flags.bits().cast_signed())
        .mask(StatxFlags::BASIC_STATS.bits())
        .build()
}

fn piece(len: usize) -> u32 {
    u32::try_from(len.min(PIECE_BYTES_MAX)).expect("a piece is less than 2 GiB")
}
