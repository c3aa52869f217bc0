//! Where the lock table lives: a log of commands and a snapshot of the table, as procedures over any [`Storage`].
//!
//! What it is not: a cache or a judge. It keeps commands in order and gives back the table that they make; what they
//! mean is [`core`](crate::core)'s.
//!
//! ```text
//! DIR/lock          held (advisory) by the lockd that uses the directory
//! DIR/snapshot      the table at the start of a generation; names the generation
//! DIR/log-<g>       batches of commands since, in a file that was zero-written ahead
//! ```
//!
//! A generation ends when its log is nearly full. The next one's log is made and synced, then the snapshot is replaced
//! (temporary file, sync, rename, sync of the directory): that rename is the one instant in which the generation
//! changes. The old log is removed afterwards.
//!
//! Invariants:
//! - [`Store::append`] returns once its commands are durable; one batch is synced before the next is written;
//! - [`Store::open`] gives the table after every batch whose append returned, and possibly after the one that was under
//!   way; what it gives is durable;
//! - damage is told from a batch that a crash tore: a torn batch is the last. Damage before a whole batch is refused;
//! - after any failure of a write or a sync the store refuses everything: its process ends, and the next one reads what
//!   there is;
//! - what can be read may be a cache that no sync will write any more: a sync of it failed. So [`Store::open`] writes
//!   anew what it relies on and what nobody has synced for certain: the last batch, and the snapshot's name.
//!
//! Formats are in [`record`].

pub mod record;
#[cfg(test)]
mod tests;

use bytes::Bytes;
use csnap_storage::{Access, BLOCK_BYTES, Storage, StorageError};

use self::record::{BATCH_BYTES_MAX, LogPlace, Snapshot, encode_batch, encode_snapshot};
use crate::core::table::{Command, Table};

/// Size of a log, bytes: a thousand batches, and zero-written in some milliseconds.
pub const LOG_BYTES: u64 = 4 << 20;

/// Smallest size of a log that can be asked for, bytes: two of the largest batches.
pub const LOG_BYTES_MIN: u64 = 4 * BATCH_BYTES_MAX as u64;

/// Largest log that is read, bytes; a larger file is not ours.
const LOG_BYTES_MAX: u64 = 64 << 20;

/// Largest snapshot that is read, bytes: every session with every lock, answer and event that it may have.
const SNAPSHOT_BYTES_MAX: u64 = 512 << 20;

const PIECE_BYTES: usize = 1 << 20;

/// Why the store cannot be used (any more).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The medium.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Another lockd has the directory.
    #[error("another lockd runs on this directory: stop it first, or give this one a directory of its own")]
    Busy,
    /// Content that no crash explains.
    #[error("{file} is damaged at byte {at}: {what}; restore it from a copy, lockd does not guess")]
    Corrupt {
        /// Which file.
        file: String,
        /// Where.
        at: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// Written by another version.
    #[error(
        "{file} has format version {found}, this lockd reads version {}: use the lockd that wrote it",
        record::VERSION
    )]
    Version {
        /// Which file.
        file: String,
        /// Its version.
        found: u32,
    },
    /// A sync of the directory. Final also where space is short: what it was about may be read, and no later sync makes it
    /// durable.
    #[error("the names in lockd's directory may not be durable, a sync of it failed: {0}")]
    Names(StorageError),
    /// An earlier write or sync failed.
    #[error("the store failed before and is not used again")]
    Failed,
}

/// Result of a store operation.
pub type Result<T> = std::result::Result<T, StoreError>;

/// How a store is opened.
#[derive(Clone, Copy, Debug)]
pub struct StoreOptions {
    /// Drawn at random; becomes part of every checksum if the directory is new, so that no client can write bytes that
    /// look like a record.
    pub fresh_id: [u8; 16],
    /// Size of new logs, bytes, a multiple of [`BLOCK_BYTES`]; [`LOG_BYTES`] but in tests.
    pub log_bytes: u64,
}

/// See the module.
pub struct Store<S: Storage> {
    storage: S,
    /// Held for as long as the store lives.
    _lock: S::File,
    log: S::File,
    place: LogPlace,
    log_bytes: u64,
    new_log_bytes: u64,
    failed: bool,
}

impl<S: Storage> Store<S> {
    /// Opens the directory, or makes a store in an empty one. Safe to interrupt and to repeat.
    pub async fn open(storage: S, options: StoreOptions) -> Result<(Self, Table)> {
        assert!(options.log_bytes >= LOG_BYTES_MIN && options.log_bytes.is_multiple_of(BLOCK_BYTES as u64));
        let lock = open_or_create(&storage, "lock").await?;
        if !storage.try_lock(&lock).await? {
            return Err(StoreError::Busy);
        }
        let names = storage.list("").await?;
        let new_log_bytes = options.log_bytes;
        if !names.iter().any(|name| name == "snapshot") {
            check_unused(&storage, &names).await?;
            let place = LogPlace::start(options.fresh_id, 0, 1);
            let (log, place) = begin_generation(&storage, place, &Table::default(), new_log_bytes).await?;
            let store = Self {
                storage,
                _lock: lock,
                log,
                place,
                log_bytes: new_log_bytes,
                new_log_bytes,
                failed: false,
            };
            return Ok((store, Table::default()));
        }
        let (content, Snapshot { place, table }) = read_snapshot(&storage).await?;
        let (log, log_bytes, place, table) = replay(&storage, place, table).await?;
        match publish_snapshot(&storage, content).await {
            Ok(()) => {}
            // A full disk must not keep lockd from starting. Its names may be those of a lockd that was killed before it
            // made them durable; only those that a failed sync was about stay in doubt.
            Err(StoreError::Storage(StorageError::NoSpace { .. })) => {
                sync_names(&storage).await?;
                unlink_if_there(&storage, "snapshot.tmp").await?;
            }
            Err(error) => return Err(error),
        }
        remove_leftovers(&storage, &names, place.generation).await?;
        let store = Self { storage, _lock: lock, log, place, log_bytes, new_log_bytes, failed: false };
        Ok((store, table))
    }

    /// Appends a batch and makes it durable. It must fit ([`Self::fits`]).
    pub async fn append(&mut self, commands: &[Bytes]) -> Result<()> {
        assert!(self.fits(commands) && !commands.is_empty(), "the caller rolls first");
        self.enter()?;
        let batch = encode_batch(self.place, commands);
        let len = batch.len() as u64;
        self.storage.write(&self.log, self.place.offset, batch).await?;
        self.storage.sync(&self.log).await?;
        self.place.offset += len;
        self.place.sequence += commands.len() as u64;
        self.failed = false;
        Ok(())
    }

    /// Whether the batch has room in the log as it is.
    #[must_use]
    pub fn fits(&self, commands: &[Bytes]) -> bool {
        self.place.offset + record::batch_len(commands) <= self.log_bytes
    }

    /// Whether it is time for [`Self::roll`].
    #[must_use]
    pub fn is_nearly_full(&self) -> bool {
        self.place.offset > self.log_bytes / 4 * 3
    }

    /// Begins the next generation with `table`, which must be what the commands appended so far make. If space is
    /// short ([`StorageError::NoSpace`]) the present generation goes on; any other failure is final, that of a sync of the
    /// directory whatever it says ([`StoreError::Names`]): the snapshot may name the next generation already.
    pub async fn roll(&mut self, table: &Table) -> Result<()> {
        self.enter()?;
        let old = self.place.generation;
        match begin_generation(&self.storage, self.place, table, self.new_log_bytes).await {
            Ok((log, place)) => (self.log, self.place, self.log_bytes) = (log, place, self.new_log_bytes),
            Err(StoreError::Storage(error @ StorageError::NoSpace { .. })) => {
                self.failed = false;
                return Err(error.into());
            }
            Err(error) => return Err(error),
        }
        unlink_if_there(&self.storage, &log_name(old)).await?;
        self.failed = false;
        Ok(())
    }

    /// Marks the store as failed until the operation succeeds: also one that is dropped half-way leaves it so.
    fn enter(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.failed, true) { Err(StoreError::Failed) } else { Ok(()) }
    }
}

fn log_name(generation: u64) -> String {
    format!("log-{generation}")
}

async fn open_or_create<S: Storage>(storage: &S, path: &str) -> Result<S::File> {
    match storage.open(path, Access::ReadWrite).await {
        Err(StorageError::NotFound { .. }) => {}
        opened => return Ok(opened?),
    }
    match storage.create(path).await {
        Err(StorageError::Exists { .. }) => Ok(storage.open(path, Access::ReadWrite).await?),
        created => Ok(created?),
    }
}

async fn unlink_if_there<S: Storage>(storage: &S, path: &str) -> Result<()> {
    match storage.unlink(path).await {
        Err(StorageError::NotFound { .. }) => Ok(()),
        done => Ok(done?),
    }
}

/// A directory without a snapshot is new, or its first opening was interrupted: then its first log is all zeros.
async fn check_unused<S: Storage>(storage: &S, names: &[String]) -> Result<()> {
    for name in names.iter().filter(|name| name.starts_with("log-")) {
        let file = storage.open(name, Access::Read).await?;
        let content = read_all(storage, &file, name, LOG_BYTES_MAX).await?;
        if let Some(at) = content.iter().position(|byte| *byte != 0) {
            let what = "a log with records, but the snapshot that it belongs to is missing";
            return Err(StoreError::Corrupt { file: name.clone(), at: at as u64, what });
        }
    }
    Ok(())
}

/// Makes the log and the snapshot of the generation after `last`, durable and in that order.
async fn begin_generation<S: Storage>(
    storage: &S,
    last: LogPlace,
    table: &Table,
    log_bytes: u64,
) -> Result<(S::File, LogPlace)> {
    let place = LogPlace { generation: last.generation + 1, offset: 0, ..last };
    let log_name = log_name(place.generation);
    unlink_if_there(storage, &log_name).await?;
    let log = storage.create(&log_name).await?;
    write_all(storage, &log, Bytes::from(vec![0; usize::try_from(log_bytes).expect("a few megabytes")]))
        .await?;
    storage.sync(&log).await?;
    publish_snapshot(storage, encode_snapshot(place, table)).await?;
    Ok((log, place))
}

/// Makes the names durable as they are.
async fn sync_names<S: Storage>(storage: &S) -> Result<()> {
    storage.sync_dir("").await.map_err(StoreError::Names)
}

/// Puts a snapshot in the place of the one that is there, whole and durable.
async fn publish_snapshot<S: Storage>(storage: &S, content: Bytes) -> Result<()> {
    unlink_if_there(storage, "snapshot.tmp").await?;
    let snapshot = storage.create("snapshot.tmp").await?;
    write_all(storage, &snapshot, content).await?;
    storage.sync(&snapshot).await?;
    // The log must be there before anything says that it is.
    sync_names(storage).await?;
    storage.rename("snapshot.tmp", "snapshot").await?;
    sync_names(storage).await
}

async fn write_all<S: Storage>(storage: &S, file: &S::File, content: Bytes) -> Result<()> {
    for at in (0..content.len()).step_by(PIECE_BYTES) {
        let end = content.len().min(at + PIECE_BYTES);
        storage.write(file, at as u64, content.slice(at..end)).await?;
    }
    Ok(())
}

async fn read_all<S: Storage>(storage: &S, file: &S::File, name: &str, max: u64) -> Result<Vec<u8>> {
    let size = storage.stat_file(file).await?.size_bytes;
    if size > max {
        let what = "it is larger than any that lockd writes";
        return Err(StoreError::Corrupt { file: name.into(), at: max, what });
    }
    let mut content = Vec::new();
    while (content.len() as u64) < size {
        let piece = storage.read(file, content.len() as u64, PIECE_BYTES).await?;
        if piece.is_empty() {
            break;
        }
        content.extend_from_slice(&piece);
    }
    Ok(content)
}

/// The snapshot, and the bytes that it was read from.
async fn read_snapshot<S: Storage>(storage: &S) -> Result<(Bytes, Snapshot)> {
    let file = storage.open("snapshot", Access::Read).await?;
    let content = read_all(storage, &file, "snapshot", SNAPSHOT_BYTES_MAX).await?;
    // Its content was synced before it got its name, so nothing that a crash does explains damage.
    let snapshot = record::decode_snapshot(&content)?;
    let corrupt = |what| StoreError::Corrupt { file: "snapshot".into(), at: 0, what };
    snapshot.table.check().map_err(corrupt)?;
    Ok((content.into(), snapshot))
}

/// Applies the generation's log to its snapshot.
async fn replay<S: Storage>(
    storage: &S,
    mut place: LogPlace,
    mut table: Table,
) -> Result<(S::File, u64, LogPlace, Table)> {
    let name = log_name(place.generation);
    let corrupt = |at, what| StoreError::Corrupt { file: name.clone(), at, what };
    let log = match storage.open(&name, Access::ReadWrite).await {
        Err(StorageError::NotFound { .. }) => {
            return Err(corrupt(0, "the log that the snapshot names is missing"));
        }
        opened => opened?,
    };
    let content = read_all(storage, &log, &name, LOG_BYTES_MAX).await?;
    if !content.len().is_multiple_of(BLOCK_BYTES) || content.is_empty() {
        return Err(corrupt(content.len() as u64, "the file was cut"));
    }
    let mut effects = Vec::new();
    let mut last = None;
    while let Some(batch) = record::decode_batch(&content, place) {
        for command in &batch.commands {
            let command: Command = postcard::from_bytes(command)
                .map_err(|_| corrupt(place.offset, "a command that does not decode"))?;
            table.apply(command, &mut effects);
            effects.clear();
        }
        last = Some(place.offset);
        place.offset += batch.len;
        place.sequence += batch.commands.len() as u64;
    }
    if record::has_batch_after(&content, place) {
        return Err(corrupt(place.offset, "batches after this one are whole, so it was whole once"));
    }
    let log_bytes = content.len() as u64;
    // The last batch may be readable and not durable; nobody may learn of it before it is.
    if let Some(start) = last {
        let index = |offset: u64| usize::try_from(offset).expect("it lies in what was read");
        let batch = Bytes::from(content).slice(index(start)..index(place.offset));
        storage.write(&log, start, batch).await?;
    }
    storage.sync(&log).await?;
    Ok((log, log_bytes, place, table))
}

/// Removes what an interrupted [`Store::roll`] left.
async fn remove_leftovers<S: Storage>(storage: &S, names: &[String], generation: u64) -> Result<()> {
    let current = log_name(generation);
    for name in names {
        if *name != current && (name.starts_with("log-") || name == "snapshot.tmp") {
            unlink_if_there(storage, name).await?;
        }
    }
    Ok(())
}
