//! Copy-out, the procedure: a head's old content goes to the places reserved for it in the store, durable before it
//! is reported.
//!
//! It is the only place where the server moves data, and it never writes a head. Content that is all zeros is not
//! written. What it writes is referred to by nobody until the core has recorded it.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use csnap_proto::limits::CHUNK_BYTES_MIN;
use csnap_proto::{Chunk, ChunkRange, Location, Term, VolumeId};
use csnap_storage::{Access, Storage, StorageError};

use crate::core::canary::{Broken, Canary};
use crate::core::{CopyError, CopyOut};
use crate::state::Origin;

/// Path of an arena of the store.
#[must_use]
pub fn arena_path(term: Term, arena: u32) -> String {
    format!("store/{}/{arena}", term.0)
}

/// Path of a pool volume's head.
#[must_use]
pub fn head_path(volume: VolumeId) -> String {
    format!("head/{}", volume.file_name())
}

/// Why a copy-out failed.
#[derive(Debug)]
pub enum Failure {
    /// The queries that wait for it fail; the server goes on.
    Refused(CopyError),
    /// The store cannot be trusted any more: the process ends, a successor reads what is durable.
    Fatal(StorageError),
}

/// Open files of heads and arenas, by what they hold: opening is not repeated for every copy-out.
#[derive(Clone)]
pub struct Files<S: Storage> {
    storage: S,
    heads: Shelf<VolumeId, S::File>,
    arenas: Shelf<(Term, u32), S::File>,
    broken: Broken,
}

type Shelf<K, F> = Rc<RefCell<BTreeMap<K, F>>>;

impl<S: Storage> Files<S> {
    /// Nothing open yet.
    pub fn new(storage: S) -> Self {
        Self { storage, heads: Rc::default(), arenas: Rc::default(), broken: Broken::default() }
    }

    /// The same, with the rule that a test breaks.
    pub(crate) fn breaking(self, broken: Broken) -> Self {
        Self { broken, ..self }
    }

    /// The head of a volume, for reading. An adopted origin must still be what was adopted.
    pub async fn head(&self, volume: VolumeId, origin: &Origin) -> Result<S::File, StorageError> {
        if let Some(file) = self.heads.borrow().get(&volume) {
            return Ok(file.clone());
        }
        let file = match origin {
            Origin::Pool => self.storage.open(&head_path(volume), Access::Read).await?,
            Origin::Adopted { path, device, inode } => {
                let file = self.storage.open_origin(path).await?;
                let stat = self.storage.stat_file(&file).await?;
                if (stat.device, stat.inode) != (*device, *inode) {
                    let reason = "it is not the device or file that was adopted".to_owned();
                    return Err(StorageError::Io { path: path.clone(), what: "open", errno: 116, reason });
                }
                file
            }
        };
        self.heads.borrow_mut().insert(volume, file.clone());
        Ok(file)
    }

    /// Forgets the head of a volume that is going away.
    pub fn close_head(&self, volume: VolumeId) {
        self.heads.borrow_mut().remove(&volume);
    }

    /// An arena, for writing.
    pub async fn arena(&self, term: Term, arena: u32) -> Result<S::File, StorageError> {
        if let Some(file) = self.arenas.borrow().get(&(term, arena)) {
            return Ok(file.clone());
        }
        let file = self.storage.open(&arena_path(term, arena), Access::ReadWrite).await?;
        self.arenas.borrow_mut().insert((term, arena), file.clone());
        Ok(file)
    }
}

/// Does one copy-out: reads every run, writes what is not zero, syncs each arena that was written. The runs that were
/// all zeros.
pub async fn copy_out<S: Storage>(files: &Files<S>, job: &CopyOut) -> Result<Vec<ChunkRange>, Failure> {
    let origin = |error: StorageError| Failure::Refused(CopyError::Origin(error.to_string()));
    let head = files.head(job.volume, &job.origin).await.map_err(origin)?;
    let mut zeros = Vec::new();
    let mut store = StoreWriter { files, gathered: None, written: BTreeSet::new() };
    for &(run, extent) in &job.moves {
        let data = read_run(files, &head, job, run).await.map_err(origin)?;
        for (part, zero) in split_zeros(run, &data, job.chunk_bytes) {
            if zero {
                zeros.push(part);
                continue;
            }
            let skip = (part.first.0 - run.first.0) * job.chunk_bytes;
            let len = part.count * job.chunk_bytes;
            let blocks = u32::try_from(skip / CHUNK_BYTES_MIN).expect("a run lies in one arena");
            store.put(extent.at.plus(blocks), &data[index(skip)..index(skip + len)]).await?;
        }
    }
    store.sync().await?;
    Ok(zeros)
}

/// Writes neighbouring places with one call: scattered chunks of a busy volume get contiguous places, and a write of its
/// own for each would cost more than all the rest.
struct StoreWriter<'a, S: Storage> {
    files: &'a Files<S>,
    /// Where it begins, and what follows from there.
    gathered: Option<(Location, BytesMut)>,
    written: BTreeSet<(Term, u32)>,
}

impl<S: Storage> StoreWriter<'_, S> {
    async fn put(&mut self, at: Location, data: &[u8]) -> Result<(), Failure> {
        let follows = |(start, bytes): &(Location, BytesMut)| {
            let end = start.offset() + bytes.len() as u64;
            (start.term, start.arena, end) == (at.term, at.arena, at.offset())
        };
        if !self.gathered.as_ref().is_some_and(follows) {
            self.write_gathered().await?;
        }
        let (_, bytes) = self.gathered.get_or_insert_with(|| (at, BytesMut::new()));
        bytes.extend_from_slice(data);
        Ok(())
    }

    async fn write_gathered(&mut self) -> Result<(), Failure> {
        let Some((at, data)) = self.gathered.take() else { return Ok(()) };
        let file = self.files.arena(at.term, at.arena).await.map_err(Failure::Fatal)?;
        self.written.insert((at.term, at.arena));
        let written = self.files.storage.write(&file, at.offset(), data.freeze()).await;
        written.map_err(|error| match error {
            StorageError::NoSpace { .. } => Failure::Refused(CopyError::NoSpace),
            error => Failure::Fatal(error),
        })
    }

    /// Makes everything that was put durable.
    async fn sync(mut self) -> Result<(), Failure> {
        self.write_gathered().await?;
        if self.files.broken.breaks(Canary::LeaveCopyUnsynced) {
            return Ok(());
        }
        for &(term, arena) in &self.written {
            let file = self.files.arena(term, arena).await.map_err(Failure::Fatal)?;
            self.files.storage.sync(&file).await.map_err(Failure::Fatal)?;
        }
        Ok(())
    }
}

/// The content of a run; what lies beyond the end of the head or of the volume reads as zeros.
async fn read_run<S: Storage>(
    files: &Files<S>,
    head: &S::File,
    job: &CopyOut,
    run: ChunkRange,
) -> Result<Bytes, StorageError> {
    let offset = run.first.0 * job.chunk_bytes;
    let len = index(run.count * job.chunk_bytes);
    let inside = index((job.size_bytes - offset).min(len as u64));
    let data = files.storage.read(head, offset, inside).await?;
    if data.len() == len {
        return Ok(data);
    }
    let mut padded = data.to_vec();
    padded.resize(len, 0);
    Ok(padded.into())
}

/// Cuts a run where it changes between zeros and content, chunk by chunk.
fn split_zeros(run: ChunkRange, data: &[u8], chunk_bytes: u64) -> Vec<(ChunkRange, bool)> {
    let mut parts: Vec<(ChunkRange, bool)> = Vec::new();
    for (content, i) in data.chunks_exact(index(chunk_bytes)).zip(0..) {
        let zero = is_zero(content);
        match parts.last_mut() {
            Some((part, same)) if *same == zero => part.count += 1,
            _ => parts.push((ChunkRange::one(Chunk(run.first.0 + i)), zero)),
        }
    }
    parts
}

/// Whether every byte is zero: a look at the first ones, then a comparison with itself shifted, which the C library
/// does at memory speed.
fn is_zero(bytes: &[u8]) -> bool {
    let (first, rest) = bytes.split_at(bytes.len().min(16));
    first.iter().all(|&b| b == 0) && *rest == bytes[..rest.len()]
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a copy-out is far below the address space")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_recognised_wherever_the_one_byte_is() {
        assert!(is_zero(&[0; 4096]) && is_zero(&[]) && is_zero(&[0; 3]));
        for at in [0, 1, 15, 16, 17, 31, 2048, 4095] {
            let mut bytes = [0; 4096];
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "byte {at}");
        }
    }

    #[test]
    fn runs_are_cut_where_zeros_begin_and_end() {
        let run = ChunkRange { first: Chunk(7), count: 4 };
        let mut data = vec![0; 4 * 4096];
        data[4096] = 1;
        data[2 * 4096 + 9] = 1;
        let range = |first, count| ChunkRange { first: Chunk(first), count };
        let cut = split_zeros(run, &data, 4096);
        assert_eq!(cut, [(range(7, 1), true), (range(8, 2), false), (range(10, 1), true)]);
    }
}
