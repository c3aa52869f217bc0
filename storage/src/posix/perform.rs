//! Carries out an operation with system calls, on a thread that may wait.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, Mode, OFlags, SeekFrom, StatxFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::{fs, io};

use super::operation::{FileStat, Finished, Operation, Outcome, ReadJob, WriteJob};

/// Mode of new files: a pool belongs to the one user that the daemons run as.
pub(super) const FILE_MODE: Mode = Mode::from_raw_mode(0o600);
/// Mode of new directories.
pub(super) const DIR_MODE: Mode = Mode::from_raw_mode(0o700);

/// Does it, waiting as long as it takes.
pub(super) fn perform(operation: Operation) -> Finished {
    let done = |result: Result<(), Errno>| result.map(|()| Outcome::Done);
    match operation {
        Operation::Open { root, path, flags } => {
            let opened = retry_on_intr(|| fs::openat(&*root, &path, flags, FILE_MODE))?;
            Ok(Outcome::Opened(opened))
        }
        Operation::Close { fd } => {
            drop(fd);
            Ok(Outcome::Done)
        }
        Operation::MakeDir { root, path } => done(fs::mkdirat(&*root, &path, DIR_MODE)),
        Operation::Remove { root, path, dir } => {
            let flags = if dir { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            done(fs::unlinkat(&*root, &path, flags))
        }
        Operation::Link { root, from, to } => done(fs::linkat(&*root, &from, &*root, &to, AtFlags::empty())),
        Operation::Rename { root, from, to } => done(fs::renameat(&*root, &from, &*root, &to)),
        Operation::StatPath { root, path } => {
            let statx = fs::statx(&*root, &path, AtFlags::empty(), StatxFlags::BASIC_STATS)?;
            Ok(Outcome::Stat(FileStat::from(&statx)))
        }
        Operation::StatFile { file } => {
            let statx = fs::statx(file.fd(), c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
            Ok(Outcome::Stat(FileStat::from(&statx)))
        }
        Operation::Read(job) => read(job),
        Operation::Write(job) => write(job),
        Operation::Sync { file } => done(retry_on_intr(|| fs::fdatasync(file.fd()))),
        Operation::SyncDir { fd } => done(retry_on_intr(|| fs::fsync(&*fd))),
        Operation::Allocate { file, mode, offset, len } => {
            done(retry_on_intr(|| fs::fallocate(file.fd(), mode, offset, len)))
        }
        Operation::SetLen { file, len } => done(retry_on_intr(|| fs::ftruncate(file.fd(), len))),
        Operation::List { root, path } => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let dir = retry_on_intr(|| fs::openat(&*root, &path, flags, Mode::empty()))?;
            names(dir.as_fd()).map(Outcome::Names)
        }
        Operation::Lock { file, how } => done(retry_on_intr(|| fs::flock(file.fd(), how))),
        Operation::Space { root } => {
            let space = fs::fstatvfs(&*root)?;
            Ok(Outcome::Bytes(space.f_bavail.saturating_mul(space.f_frsize)))
        }
        Operation::DeviceSize { root, path } => {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            let device = retry_on_intr(|| fs::openat(&*root, &path, flags, Mode::empty()))?;
            fs::seek(device, SeekFrom::End(0)).map(Outcome::Bytes)
        }
        // The seek position is nobody's: all I/O here names its offset.
        Operation::DeviceSizeOf { file } => fs::seek(file.fd(), SeekFrom::End(0)).map(Outcome::Bytes),
    }
}

fn read(mut job: ReadJob) -> Finished {
    loop {
        let file = job.file.clone();
        let position = job.position();
        let count = retry_on_intr(|| io::pread(file.fd(), &mut *job.space(), position))?;
        if job.advance(count) {
            return Ok(job.take());
        }
    }
}

fn write(mut job: WriteJob) -> Finished {
    loop {
        let count = retry_on_intr(|| io::pwrite(job.file.fd(), job.rest(), job.position()))?;
        if job.advance(count)? {
            return Ok(Outcome::Done);
        }
    }
}

/// Names in an open directory, sorted, without `.` and `..`.
fn names(dir: BorrowedFd<'_>) -> Result<Vec<String>, Errno> {
    let mut names = Vec::new();
    for entry in fs::Dir::read_from(dir)? {
        let entry = entry?;
        match entry.file_name().to_str() {
            Ok("." | "..") => {}
            Ok(name) => names.push(name.to_owned()),
            // Nothing of ours: every name that we make is ASCII.
            Err(_) => {}
        }
    }
    names.sort_unstable();
    Ok(names)
}
