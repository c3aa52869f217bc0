//! A plain raw file, or a block device, as an export: for measurements and tests of the server.
//!
//! Reads that the page cache answers are done at once (`preadv2` with `RWF_NOWAIT`), everything else on the runtime's
//! blocking pool. Buffered writes cannot be tried without waiting on every file system, so they are done at once as long as
//! that is quick (`pace`). Flushes that wait at the same time share one sync (`sync`).
//!
//! Invariant: after a failed sync nothing is promised any more: every later write and flush fails. The kernel forgets
//! which pages were lost, so a second sync would lie.

mod pace;
mod status;
mod sync;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use rustix::fs::FallocateFlags;
use rustix::io::{Errno, ReadWriteFlags};

use self::pace::Pace;
use self::sync::GroupSync;
use crate::export::{
    Attempt, BlockExtent, ErrorKind, Export, ExportError, ExportInfo, Exports, Listed, OpenError, Zeroing,
};

/// Zeros are written in pieces of this size where the file system cannot zero by itself, bytes.
const ZERO_PIECE_BYTES: usize = 1 << 20;

/// An open file. See the module.
#[derive(Debug)]
pub struct FileExport {
    file: Arc<File>,
    size_bytes: u64,
    read_only: bool,
    pace: Pace,
    sync: GroupSync,
}

impl FileExport {
    /// Opens the file or block device at `path`.
    pub fn open(path: &Path, read_only: bool) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(!read_only).open(path)?;
        let size_bytes = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))?;
        let file = Arc::new(file);
        Ok(Self { sync: GroupSync::new(Arc::clone(&file)), file, size_bytes, read_only, pace: Pace::new() })
    }

    /// Size, bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Runs `what` on the blocking pool.
    async fn on_pool<T: Send + 'static>(
        &self,
        what: impl FnOnce(&File) -> Result<T, ExportError> + Send + 'static,
    ) -> Result<T, ExportError> {
        let file = Arc::clone(&self.file);
        tokio::task::spawn_blocking(move || what(&file)).await.unwrap_or_else(|error| {
            Err(ExportError::new(ErrorKind::Io, format!("the operation was lost: {error}")))
        })
    }
}

/// The failure of a system call in an export's words.
fn failed(what: &str, error: Errno) -> ExportError {
    let kind = match error {
        Errno::NOSPC | Errno::DQUOT | Errno::FBIG => ErrorKind::NoSpace,
        Errno::OPNOTSUPP => ErrorKind::NotSupported,
        _ => ErrorKind::Io,
    };
    ExportError::new(kind, format!("{what}: {error}"))
}

fn read_exact(file: &File, mut offset: u64, mut out: &mut [u8]) -> Result<(), ExportError> {
    while !out.is_empty() {
        match rustix::io::pread(file, &mut *out, offset) {
            Ok(0) => return Err(ExportError::new(ErrorKind::Io, "read: the file has become shorter")),
            Ok(count) => {
                out = &mut out[count..];
                offset += count as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(failed("read", error)),
        }
    }
    Ok(())
}

fn write_all(file: &File, mut offset: u64, mut data: &[u8]) -> Result<(), ExportError> {
    while !data.is_empty() {
        match rustix::io::pwrite(file, data, offset) {
            Ok(0) => return Err(ExportError::new(ErrorKind::Io, "write: nothing was taken")),
            Ok(count) => {
                data = &data[count..];
                offset += count as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(failed("write", error)),
        }
    }
    Ok(())
}

fn zero(file: &File, offset: u64, len: u64, how: Zeroing) -> Result<(), ExportError> {
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let flags = if how.may_punch { punch } else { FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE };
    match rustix::fs::fallocate(file, flags, offset, len) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP) if !how.fast_only => {
            let zeros = vec![0; ZERO_PIECE_BYTES];
            let mut done = 0;
            while done < len {
                let piece = usize::try_from(len - done).unwrap_or(usize::MAX).min(ZERO_PIECE_BYTES);
                write_all(file, offset + done, &zeros[..piece])?;
                done += piece as u64;
            }
            Ok(())
        }
        Err(error) => Err(failed("zero", error)),
    }
}

impl Export for FileExport {
    fn try_read(&self, offset: u64, out: &mut [u8]) -> Attempt {
        let len = out.len();
        let read =
            rustix::io::preadv2(&self.file, &mut [IoSliceMut::new(out)], offset, ReadWriteFlags::NOWAIT);
        match read {
            Ok(count) if count == len => Attempt::Done,
            // Not cached, or not all of it; or the file system cannot tell; or a failure, which will be met again.
            _ => Attempt::WouldBlock,
        }
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Attempt {
        if self.sync.has_failed() || !self.pace.may_write_now() {
            return Attempt::WouldBlock;
        }
        let flags = ReadWriteFlags::empty();
        let timer = self.pace.begin();
        let written = rustix::io::pwritev2(&self.file, &[IoSlice::new(data)], offset, flags);
        self.pace.end(timer, data.len());
        match written {
            Ok(count) if count == data.len() => Attempt::Done,
            _ => Attempt::WouldBlock,
        }
    }

    async fn read(&self, offset: u64, len: usize) -> Result<Bytes, ExportError> {
        self.on_pool(move |file| {
            let mut data = vec![0; len];
            read_exact(file, offset, &mut data)?;
            Ok(data.into())
        })
        .await
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), ExportError> {
        self.sync.check()?;
        self.on_pool(move |file| write_all(file, offset, &data)).await
    }

    async fn flush(&self) -> Result<(), ExportError> {
        self.sync.flush().await
    }

    async fn trim(&self, offset: u64, len: u64) -> Result<(), ExportError> {
        self.sync.check()?;
        let how = Zeroing { may_punch: true, fast_only: true };
        match self.on_pool(move |file| zero(file, offset, len, how)).await {
            Err(ExportError { kind: ErrorKind::NotSupported, .. }) => Ok(()),
            done => done,
        }
    }

    async fn write_zeroes(&self, offset: u64, len: u64, how: Zeroing) -> Result<(), ExportError> {
        self.sync.check()?;
        self.on_pool(move |file| zero(file, offset, len, how)).await
    }

    async fn cache(&self, offset: u64, len: u64) -> Result<(), ExportError> {
        self.on_pool(move |file| {
            let len = std::num::NonZero::new(len);
            rustix::fs::fadvise(file, offset, len, rustix::fs::Advice::WillNeed)
                .map_err(|error| failed("cache", error))
        })
        .await
    }

    async fn block_status(
        &self,
        offset: u64,
        len: u64,
        extents_max: usize,
    ) -> Result<Vec<BlockExtent>, ExportError> {
        let size_bytes = self.size_bytes;
        self.on_pool(move |file| {
            status::extents(file, size_bytes, offset, len, extents_max)
                .map_err(|error| failed("block status", error))
        })
        .await
    }
}

/// Files by export name. The first in name order is the default export too.
#[derive(Debug, Default)]
pub struct FileExports(BTreeMap<String, Arc<FileExport>>);

impl FileExports {
    /// No export yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a file under a name.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, file: FileExport) -> Self {
        self.0.insert(name.into(), Arc::new(file));
        self
    }

    fn find(&self, name: &str) -> Result<(ExportInfo, Arc<FileExport>), OpenError> {
        let found = if name.is_empty() { self.0.iter().next() } else { self.0.get_key_value(name) };
        let (name, file) =
            found.ok_or_else(|| OpenError::NotFound(format!("there is no export {name:?}")))?;
        let info = ExportInfo {
            name: name.clone(),
            description: "a raw file".to_owned(),
            size_bytes: file.size_bytes,
            read_only: file.read_only,
            block_preferred: 4096,
            multi_conn: true,
            fast_zero: true,
        };
        Ok((info, Arc::clone(file)))
    }
}

impl Exports for FileExports {
    type Export = FileExport;

    async fn list(&self) -> Result<Vec<Listed>, OpenError> {
        let listed = |name: &String| Listed { name: name.clone(), description: "a raw file".to_owned() };
        Ok(self.0.keys().map(listed).collect())
    }

    async fn info(&self, name: &str) -> Result<ExportInfo, OpenError> {
        self.find(name).map(|(info, _)| info)
    }

    async fn open(&self, name: &str) -> Result<(ExportInfo, Arc<FileExport>), OpenError> {
        self.find(name)
    }

    async fn release(&self, _: Arc<FileExport>) {}
}
