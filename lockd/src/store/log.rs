//! The log itself: items in, items back, generations. It knows no content.

use bytes::Bytes;
use csnap_storage::{Access, BLOCK_BYTES, Storage, StorageError};

use super::record::{self, LogPlace, Snapshot, encode_batch, encode_snapshot};
use super::{LOG_BYTES_MAX, LOG_BYTES_MIN, PIECE_BYTES, Result, SNAPSHOT_BYTES_MAX, StoreError};
use crate::canary::{Broken, Canary};

/// How a log is opened.
#[derive(Clone, Copy, Debug)]
pub struct LogOptions {
    /// Drawn at random; becomes part of every checksum if the directory is new, so that no client can write bytes that
    /// look like a record.
    pub fresh_id: [u8; 16],
    /// Size of new logs, bytes, a multiple of [`BLOCK_BYTES`]; [`LOG_BYTES`](super::LOG_BYTES) but in tests.
    pub log_bytes: u64,
    /// The rule that it breaks: none, outside tests.
    pub broken: Broken,
}

/// What a log gave back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// The directory's own id: another one after the content was lost.
    pub id: [u8; 16],
    /// The content with which the generation began.
    pub content: Bytes,
    /// What was appended since, each with its place for errors: file and offset of its batch.
    pub items: Vec<(u64, Bytes)>,
    /// The file that the items are in.
    pub file: String,
}

/// See the module.
pub struct Log<S: Storage> {
    storage: S,
    /// Held for as long as the log lives.
    _lock: S::File,
    log: S::File,
    pub(super) place: LogPlace,
    log_bytes: u64,
    new_log_bytes: u64,
    failed: bool,
}

impl<S: Storage> Log<S> {
    /// Opens the directory, or makes a log in an empty one, which begins with the content that `first` makes of the
    /// directory's new id. Safe to interrupt and to repeat.
    ///
    /// # Errors
    /// If another process has it, it is damaged or of another version, or the medium fails.
    pub async fn open(
        storage: S,
        options: LogOptions,
        first: impl FnOnce([u8; 16]) -> Bytes,
    ) -> Result<(Self, Recovered)> {
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
            let content = first(place.id);
            let (log, place) = begin_generation(&storage, place, &content, new_log_bytes).await?;
            let (failed, log_bytes) = (false, new_log_bytes);
            let store = Self { storage, _lock: lock, log, place, log_bytes, new_log_bytes, failed };
            let file = log_name(place.generation);
            return Ok((store, Recovered { id: place.id, content, items: Vec::new(), file }));
        }
        let (bytes, Snapshot { place, content }) = read_snapshot(&storage).await?;
        let (log, log_bytes, place, items) = replay(&storage, place, options.broken).await?;
        match publish_snapshot(&storage, bytes).await {
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
        Ok((store, Recovered { id: place.id, content, items, file: log_name(place.generation) }))
    }

    /// Appends a batch and makes it durable. It must fit ([`Self::fits`]).
    ///
    /// # Errors
    /// Any is final.
    pub async fn append(&mut self, items: &[Bytes]) -> Result<()> {
        assert!(self.fits(items) && !items.is_empty(), "the caller rolls first");
        self.enter()?;
        let batch = encode_batch(self.place, items);
        let len = batch.len() as u64;
        self.storage.write(&self.log, self.place.offset, batch).await?;
        self.storage.sync(&self.log).await?;
        self.place.offset += len;
        self.place.sequence += items.len() as u64;
        self.failed = false;
        Ok(())
    }

    /// Whether the batch has room in the log as it is.
    #[must_use]
    pub fn fits(&self, items: &[Bytes]) -> bool {
        self.place.offset + record::batch_len(items) <= self.log_bytes
    }

    /// Whether items of these sizes have room in the log as it is, in as many batches as it takes.
    #[must_use]
    pub fn fits_batches(&self, sizes: impl IntoIterator<Item = usize>) -> bool {
        // A batch is cut short by less than its largest item, and padded by less than a block.
        let (mut bytes, mut largest) = (0, 0);
        for size in sizes {
            bytes += size + 4;
            largest = largest.max(size + 4);
        }
        let batches = bytes.div_ceil(record::BATCH_BYTES_MAX.saturating_sub(largest).max(1));
        self.place.offset + (bytes + batches * 2 * BLOCK_BYTES) as u64 <= self.log_bytes
    }

    /// Whether it is time for [`Self::roll`].
    #[must_use]
    pub fn is_nearly_full(&self) -> bool {
        self.place.offset > self.log_bytes / 4 * 3
    }

    /// Begins the next generation with `content`, in place of everything before. If space is short
    /// ([`StorageError::NoSpace`]) the present generation goes on; any other failure is final, that of a sync of the
    /// directory whatever it says ([`StoreError::Names`]): the snapshot may name the next generation already.
    ///
    /// # Errors
    /// Those.
    pub async fn roll(&mut self, content: &[u8]) -> Result<()> {
        self.enter()?;
        let old = self.place.generation;
        match begin_generation(&self.storage, self.place, content, self.new_log_bytes).await {
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

    /// Marks the log as failed until the operation succeeds: also one that is dropped half-way leaves it so.
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
    content: &[u8],
    log_bytes: u64,
) -> Result<(S::File, LogPlace)> {
    let place = LogPlace { generation: last.generation + 1, offset: 0, ..last };
    let log_name = log_name(place.generation);
    unlink_if_there(storage, &log_name).await?;
    let log = storage.create(&log_name).await?;
    write_all(storage, &log, Bytes::from(vec![0; usize::try_from(log_bytes).expect("a few megabytes")]))
        .await?;
    storage.sync(&log).await?;
    publish_snapshot(storage, encode_snapshot(place, content)).await?;
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
    Ok((content.into(), snapshot))
}

/// The items of the generation's log.
async fn replay<S: Storage>(
    storage: &S,
    mut place: LogPlace,
    broken: Broken,
) -> Result<(S::File, u64, LogPlace, Vec<(u64, Bytes)>)> {
    let name = log_name(place.generation);
    let corrupt = |at, what| StoreError::Corrupt { file: name.clone(), at, what };
    let log = match storage.open(&name, Access::ReadWrite).await {
        Err(StorageError::NotFound { .. }) => {
            return Err(corrupt(0, "the log that the snapshot names is missing"));
        }
        opened => opened?,
    };
    let content = Bytes::from(read_all(storage, &log, &name, LOG_BYTES_MAX).await?);
    if !content.len().is_multiple_of(BLOCK_BYTES) || content.is_empty() {
        return Err(corrupt(content.len() as u64, "the file was cut"));
    }
    let (mut items, mut last) = (Vec::new(), None);
    while let Some(batch) = record::decode_batch(&content, place) {
        items.extend(batch.items.iter().map(|item| (place.offset, content.slice_ref(item))));
        last = Some(place.offset);
        place.offset += batch.len;
        place.sequence += batch.items.len() as u64;
    }
    if record::has_batch_after(&content, place) && !broken.breaks(Canary::AcceptTornMiddle) {
        return Err(corrupt(place.offset, "batches after this one are whole, so it was whole once"));
    }
    let log_bytes = content.len() as u64;
    // The last batch may be readable and not durable; nobody may learn of it before it is.
    if let Some(start) = last {
        let index = |offset: u64| usize::try_from(offset).expect("it lies in what was read");
        let batch = content.slice(index(start)..index(place.offset));
        storage.write(&log, start, batch).await?;
    }
    storage.sync(&log).await?;
    Ok((log, log_bytes, place, items))
}

/// Removes what an interrupted [`Log::roll`] left.
async fn remove_leftovers<S: Storage>(storage: &S, names: &[String], generation: u64) -> Result<()> {
    let current = log_name(generation);
    for name in names {
        if *name != current && (name.starts_with("log-") || name == "snapshot.tmp") {
            unlink_if_there(storage, name).await?;
        }
    }
    Ok(())
}
