//! [`PosixStorage`] and its implementation of [`Storage`].

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use rustix::fs::{FallocateFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::buffer::aligned;
use super::engine::Engine;
use super::error::storage_error;
use super::file::PosixFile;
use super::operation::{FileStat, Operation, Outcome, ReadJob, Root, WriteJob};
use super::{Backend, PosixOptions};
use crate::{Access, BLOCK_BYTES, Result, Stat, Storage, StorageError};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// A directory of a real file system. Clones are the same storage.
#[derive(Clone)]
pub struct PosixStorage {
    root: Root,
    engine: Arc<Engine>,
    shared: bool,
}

impl PosixStorage {
    /// Opens the storage in the directory `root`, which must exist. It may be used by any number of threads and
    /// tasks.
    ///
    /// # Errors
    /// If the directory cannot be opened, or the backend that was asked for is not to be had.
    pub fn open(root: &Path, options: PosixOptions) -> Result<Self> {
        let name = root.display().to_string();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(root, flags, Mode::empty())
            .map_err(|errno| storage_error(&name, "open", errno))?;
        let engine = Engine::new(options.backend)
            .map_err(|errno| storage_error(&name, "opening of an io_uring", errno))?;
        Ok(Self { root: Arc::new(directory), engine: Arc::new(engine), shared: options.shared })
    }

    /// Opens an existing file or block device by absolute path: an adopted origin. Anything else, which might wait for a
    /// peer or end nowhere, is refused.
    ///
    /// # Errors
    /// As [`Storage::open`].
    pub async fn open_absolute(&self, path: &Path, access: Access) -> Result<PosixFile> {
        let name = path.display().to_string();
        if !path.is_absolute() {
            return Err(storage_error(&name, "open of a path that is not absolute", Errno::INVAL));
        }
        let absolute = CString::new(path.as_os_str().as_encoded_bytes());
        let absolute = absolute.map_err(|_| storage_error(&name, "open", Errno::INVAL))?;
        // A FIFO would wait for its other end. Once it is known to be none, reads may wait again: io_uring minds the flag.
        let file = self.open_with(&name, absolute, access_flags(access) | OFlags::NONBLOCK).await?;
        let stat = Operation::StatFile { file: file.clone() };
        let Outcome::Stat(stat) = self.submit(&name, "stat", stat).await? else {
            unreachable!("stat gives a stat")
        };
        if !stat.holds_bytes() {
            let reason = "it is neither a regular file nor a block device".to_owned();
            return Err(StorageError::Io {
                path: name,
                what: "open",
                errno: Errno::INVAL.raw_os_error(),
                reason,
            });
        }
        file.let_wait().map_err(|errno| storage_error(&name, "open", errno))?;
        file.expect_access(access);
        Ok(file)
    }

    /// The backend in use; never [`Backend::Auto`].
    #[must_use]
    pub fn backend(&self) -> Backend {
        if self.engine.is_uring() { Backend::Uring } else { Backend::Threads }
    }

    async fn open_with(&self, name: &str, path: CString, flags: OFlags) -> Result<PosixFile> {
        let direct = if self.shared { OFlags::DIRECT } else { OFlags::empty() };
        let fd = self.open_fd(name, path, flags | direct).await?;
        Ok(PosixFile::new(fd, name, self.shared, Arc::clone(&self.engine)))
    }

    async fn open_fd(&self, name: &str, path: CString, flags: OFlags) -> Result<OwnedFd> {
        let open = Operation::Open { root: self.root.clone(), path, flags: flags | OFlags::CLOEXEC };
        match self.submit(name, "open", open).await? {
            Outcome::Opened(fd) => Ok(fd),
            _ => unreachable!("opening gives a descriptor"),
        }
    }

    async fn submit(&self, path: &str, what: &'static str, operation: Operation) -> Result<Outcome> {
        self.engine.submit(operation).await.map_err(|errno| storage_error(path, what, errno))
    }

    async fn done(&self, path: &str, what: &'static str, operation: Operation) -> Result<()> {
        self.submit(path, what, operation).await.map(drop)
    }

    async fn stat_with(&self, path: &str, stat: Operation, size: Operation) -> Result<Stat> {
        let Outcome::Stat(FileStat { mut stat, is_block_device, .. }) =
            self.submit(path, "stat", stat).await?
        else {
            unreachable!("stat gives a stat")
        };
        if is_block_device {
            stat.size_bytes = self.bytes(path, "seek", size).await?;
        }
        Ok(stat)
    }

    async fn bytes(&self, path: &str, what: &'static str, operation: Operation) -> Result<u64> {
        match self.submit(path, what, operation).await? {
            Outcome::Bytes(bytes) => Ok(bytes),
            _ => unreachable!("the operation gives a number of bytes"),
        }
    }

    async fn read_whole(&self, file: &PosixFile, offset: u64, len: usize) -> Result<Bytes> {
        let job = ReadJob::new(file.clone(), offset, len);
        match self.submit(file.path(), "read", Operation::Read(job)).await? {
            Outcome::Read(bytes) => Ok(bytes),
            _ => unreachable!("reading gives bytes"),
        }
    }
}

impl Storage for PosixStorage {
    type File = PosixFile;

    async fn open(&self, path: &str, access: Access) -> Result<PosixFile> {
        let file = self.open_with(path, relative(path)?, access_flags(access)).await?;
        file.expect_access(access);
        Ok(file)
    }

    async fn open_origin(&self, path: &str) -> Result<PosixFile> {
        self.open_absolute(Path::new(path), Access::ReadScattered).await
    }

    async fn create(&self, path: &str) -> Result<PosixFile> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        self.open_with(path, relative(path)?, flags).await
    }

    async fn create_dir(&self, path: &str) -> Result<()> {
        let make = Operation::MakeDir { root: self.root.clone(), path: relative(path)? };
        self.done(path, "mkdir", make).await
    }

    async fn list(&self, path: &str) -> Result<Vec<String>> {
        let list = Operation::List { root: self.root.clone(), path: relative(path)? };
        match self.submit(path, "read directory", list).await? {
            Outcome::Names(names) => Ok(names),
            _ => unreachable!("listing gives names"),
        }
    }

    async fn stat(&self, path: &str) -> Result<Stat> {
        let stat = Operation::StatPath { root: self.root.clone(), path: relative(path)? };
        let size = Operation::DeviceSize { root: self.root.clone(), path: relative(path)? };
        self.stat_with(path, stat, size).await
    }

    async fn stat_file(&self, file: &PosixFile) -> Result<Stat> {
        let stat = Operation::StatFile { file: file.clone() };
        self.stat_with(file.path(), stat, Operation::DeviceSizeOf { file: file.clone() }).await
    }

    async fn unlink(&self, path: &str) -> Result<()> {
        let remove = Operation::Remove { root: self.root.clone(), path: relative(path)?, dir: false };
        self.done(path, "unlink", remove).await
    }

    async fn remove_dir(&self, path: &str) -> Result<()> {
        let remove = Operation::Remove { root: self.root.clone(), path: relative(path)?, dir: true };
        self.done(path, "rmdir", remove).await
    }

    async fn link(&self, from: &str, to: &str) -> Result<()> {
        let link = Operation::Link { root: self.root.clone(), from: relative(from)?, to: relative(to)? };
        self.done(to, "link", link).await
    }

    async fn rename(&self, from: &str, to: &str) -> Result<()> {
        let rename = Operation::Rename { root: self.root.clone(), from: relative(from)?, to: relative(to)? };
        self.done(to, "rename", rename).await
    }

    async fn sync_dir(&self, path: &str) -> Result<()> {
        let directory = self.open_fd(path, relative(path)?, OFlags::RDONLY | OFlags::DIRECTORY).await?;
        let fd = Arc::new(directory);
        self.done(path, "fsync", Operation::SyncDir { fd }).await
    }

    async fn read(&self, file: &PosixFile, offset: u64, len: usize) -> Result<Bytes> {
        if !file.is_direct() {
            return self.read_whole(file, offset, len).await;
        }
        // The blocks around the range; what lies before and after it is cut off again.
        let before = usize::try_from(offset % BLOCK).expect("less than a block");
        let around = (before + len).next_multiple_of(BLOCK_BYTES);
        let bytes = self.read_whole(file, offset - before as u64, around).await?;
        let end = bytes.len().min(before + len);
        Ok(bytes.slice(before.min(end)..end))
    }

    /// # Panics
    /// If the storage is shared and the range is not whole blocks.
    async fn write(&self, file: &PosixFile, offset: u64, data: Bytes) -> Result<()> {
        let data = if file.is_direct() {
            assert!(offset.is_multiple_of(BLOCK), "direct write at {offset} is not aligned to a block");
            assert!(data.len().is_multiple_of(BLOCK_BYTES), "direct write of {} bytes", data.len());
            aligned(data)
        } else {
            data
        };
        if data.is_empty() {
            return Ok(());
        }
        let job = WriteJob::new(file.clone(), offset, data);
        self.done(file.path(), "write", Operation::Write(job)).await
    }

    async fn sync(&self, file: &PosixFile) -> Result<()> {
        self.done(file.path(), "fdatasync", Operation::Sync { file: file.clone() }).await
    }

    async fn set_len(&self, file: &PosixFile, len: u64) -> Result<()> {
        self.done(file.path(), "truncate", Operation::SetLen { file: file.clone(), len }).await
    }

    async fn reserve(&self, file: &PosixFile, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let mode = FallocateFlags::KEEP_SIZE;
        let reserve = Operation::Allocate { file: file.clone(), mode, offset, len };
        self.done(file.path(), "reserve space", reserve).await
    }

    async fn punch(&self, file: &PosixFile, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let punch = Operation::Allocate { file: file.clone(), mode, offset, len };
        match self.engine.submit(punch).await {
            // A file system without holes, as the trait allows.
            Ok(_) | Err(Errno::OPNOTSUPP) => Ok(()),
            Err(errno) => Err(storage_error(file.path(), "punch hole", errno)),
        }
    }

    async fn try_lock(&self, file: &PosixFile) -> Result<bool> {
        let how = FlockOperation::NonBlockingLockExclusive;
        match self.engine.submit(Operation::Lock { file: file.clone(), how }).await {
            Ok(_) => {
                file.note_locked();
                Ok(true)
            }
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(errno) => Err(storage_error(file.path(), "flock", errno)),
        }
    }

    async fn unlock(&self, file: &PosixFile) -> Result<()> {
        let how = FlockOperation::Unlock;
        self.done(file.path(), "flock", Operation::Lock { file: file.clone(), how }).await
    }

    async fn free_bytes(&self) -> Result<u64> {
        self.bytes("", "statvfs", Operation::Space { root: self.root.clone() }).await
    }
}

fn access_flags(access: Access) -> OFlags {
    match access {
        Access::Read | Access::ReadScattered => OFlags::RDONLY,
        Access::ReadWrite => OFlags::RDWR,
    }
}

/// A path below the root. One that would lead out of it is refused: paths are built from numbers and checked names,
/// so it can only be a mistake.
fn relative(path: &str) -> Result<CString> {
    let leads_out = path.starts_with('/') || path.split('/').any(|name| name == "..");
    let path_or_root = if path.is_empty() { "." } else { path };
    match CString::new(path_or_root) {
        Ok(checked) if !leads_out => Ok(checked),
        _ => Err(storage_error(path, "use of a path that is not below the root", Errno::INVAL)),
    }
}
