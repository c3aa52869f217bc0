//! Copy-out, the procedure: a head's old content goes to the places reserved for it in the store, durable before it
//! is reported.
//!
//! It is the only place where the server moves data, and it never writes a head. Content that is all zeros is not
//! written. What it writes is referred to by nobody until the core has recorded it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use csnap_proto::limits::CHUNK_BYTES_MIN;
use csnap_proto::{Chunk, ChunkRange, Location, StoreExtent, Term, VolumeId};
use csnap_storage::{Access, Storage, StorageError};
use futures_util::stream::{self, StreamExt, TryStreamExt};

use crate::core::canary::{Broken, Canary};
use crate::core::{CopyError, CopyOut};
use crate::shelf::Shelf;
use crate::state::Origin;

/// Runs of one copy-out that are read side by side. On a cold disk each read is a seek, and a queue this deep keeps any
/// device busy; at most the bytes of one copy-out wait to be written.
const READS_AT_ONCE: usize = 64;

/// Heads that are kept open, and as many arenas, which are a quarter of a terabyte of the store; another costs an open.
pub const FILES_KEPT_OPEN_MAX: usize = 256;

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

/// Open files of heads and arenas, by what they hold: opening is not repeated for every copy-out. Whoever writes to an
/// arena syncs it through the very file that it wrote to; of a head, every sync stands for itself, and what one of them
/// found lost is the core's to remember.
#[derive(Clone)]
pub struct Files<S: Storage> {
    storage: S,
    heads: Shared<VolumeId, S::File>,
    arenas: Shared<(Term, u32), S::File>,
    broken: Broken,
}

type Shared<K, F> = Rc<RefCell<Shelf<K, F>>>;

impl<S: Storage> Files<S> {
    /// Nothing open yet.
    pub fn new(storage: S) -> Self {
        let (heads, arenas) = (shared(FILES_KEPT_OPEN_MAX), shared(FILES_KEPT_OPEN_MAX));
        Self { storage, heads, arenas, broken: Broken::default() }
    }

    /// The same, with nothing open and fewer heads and arenas kept so, where the process may not have many.
    pub(crate) fn keeping_open(self, most: usize) -> Self {
        Self { heads: shared(most), arenas: shared(most), ..self }
    }

    /// The same, with the rule that a test breaks.
    pub(crate) fn breaking(self, broken: Broken) -> Self {
        Self { broken, ..self }
    }

    /// The head of a volume, for reading. An adopted origin must still be what was adopted.
    pub async fn head(&self, volume: VolumeId, origin: &Origin) -> Result<S::File, StorageError> {
        let known = self.heads.borrow_mut().get(volume);
        if let Some(file) = known {
            return Ok(file);
        }
        let file = match origin {
            Origin::Pool => self.storage.open(&head_path(volume), Access::ReadScattered).await?,
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
        self.heads.borrow_mut().put(volume, file.clone());
        Ok(file)
    }

    /// Forgets the head of a volume that is going away.
    pub fn close_head(&self, volume: VolumeId) {
        self.heads.borrow_mut().remove(volume);
    }

    /// An arena, for writing.
    pub async fn arena(&self, term: Term, arena: u32) -> Result<S::File, StorageError> {
        let known = self.arenas.borrow_mut().get((term, arena));
        if let Some(file) = known {
            return Ok(file);
        }
        let file = self.storage.open(&arena_path(term, arena), Access::ReadWrite).await?;
        self.arenas.borrow_mut().put((term, arena), file.clone());
        Ok(file)
    }
}

fn shared<K: Ord + Copy, F: Clone>(most: usize) -> Shared<K, F> {
    Rc::new(RefCell::new(Shelf::new(most)))
}

/// Does one copy-out: reads the runs, [`READS_AT_ONCE`] side by side, writes what is not zero in their order, syncs each
/// arena that was written. The runs that were all zeros.
pub async fn copy_out<S: Storage>(files: &Files<S>, job: &CopyOut) -> Result<Vec<ChunkRange>, Failure> {
    let origin = |error: StorageError| Failure::Refused(CopyError::Origin(error.to_string()));
    let head = files.head(job.volume, &job.origin).await.map_err(origin)?;
    let mut zeros = Vec::new();
    let mut store = StoreWriter { files, gathered: None, written: BTreeMap::new() };
    let read = async |&(run, extent): &(ChunkRange, StoreExtent)| {
        let data = read_run(files, &head, job, run).await.map_err(origin)?;
        Ok((run, extent, data))
    };
    let mut reads = stream::iter(&job.moves).map(read).buffered(READS_AT_ONCE);
    while let Some((run, extent, data)) = reads.try_next().await? {
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
    /// What was written to, held until it is synced: another description of the same file might not be told of an error.
    written: BTreeMap<(Term, u32), S::File>,
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
        let file = match self.written.get(&(at.term, at.arena)) {
            Some(file) => file.clone(),
            None => self.files.arena(at.term, at.arena).await.map_err(Failure::Fatal)?,
        };
        self.written.insert((at.term, at.arena), file.clone());
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
        for file in self.written.values() {
            self.files.storage.sync(file).await.map_err(Failure::Fatal)?;
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
    use csnap_storage::sim::executor::{Task, run};
    use csnap_storage::sim::{OperationKind, SimDisk, SimNode};

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
    fn runs_are_read_side_by_side_and_no_more_of_them_than_that() {
        let disk = SimDisk::new(1);
        let volume = VolumeId(7);
        disk.put_file(&head_path(volume), &vec![1; 400 * 4096]).expect("a fresh disk");
        disk.put_file(&arena_path(Term(1), 0), &[]).expect("a fresh disk");
        disk.set_stepped(true);
        let at = |block| Location { term: Term(1), arena: 0, block };
        let one = |n: u32| {
            let run = ChunkRange::one(Chunk(u64::from(n) * 3));
            (run, StoreExtent { at: at(n), blocks: 1 })
        };
        let (origin, moves) = (Origin::Pool, (0..100).map(one).collect());
        let job = CopyOut { volume, origin, chunk_bytes: 4096, size_bytes: 400 * 4096, moves };
        let files = Files::new(disk.storage(SimNode(1)));
        let mut copying = Task::new(copy_out(&files, &job));
        let mut most = 0;
        while !copying.poll() {
            let reading = disk.pending().iter().filter(|one| one.kind == OperationKind::Read).count();
            most = most.max(reading);
            disk.complete_oldest().expect("it waits for the disk");
        }
        assert_eq!(copying.into_output().expect("it is done").expect("the disk is well"), []);
        assert_eq!(most, READS_AT_ONCE);
    }

    /// One chunk of a volume's head into an arena of its own.
    fn one_chunk(volume: VolumeId, arenas: std::ops::Range<u32>) -> CopyOut {
        let at = |arena| StoreExtent { at: Location { term: Term(1), arena, block: 0 }, blocks: 1 };
        let moves =
            arenas.zip(0..).map(|(arena, chunk)| (ChunkRange::one(Chunk(chunk)), at(arena))).collect();
        CopyOut { volume, origin: Origin::Pool, chunk_bytes: 4096, size_bytes: 64 * 4096, moves }
    }

    fn heads_and_arenas(count: u32) -> SimDisk {
        let disk = SimDisk::new(1);
        for n in 0..count {
            let content = vec![u8::try_from(n + 1).expect("few"); 64 * 4096];
            disk.put_file(&head_path(VolumeId(n.into())), &content).expect("a fresh disk");
            disk.put_file(&arena_path(Term(1), n), &[]).expect("a fresh disk");
        }
        disk
    }

    #[test]
    fn heads_and_arenas_stay_within_what_is_kept_open() {
        let disk = heads_and_arenas(40);
        let files = Files::new(disk.storage(SimNode(1))).keeping_open(4);
        for turn in 0..2 {
            for n in 0..40 {
                run(copy_out(&files, &one_chunk(VolumeId(n.into()), n..n + 1))).expect("the disk is well");
                assert!(disk.open_files() <= 2 * 4, "{} are open", disk.open_files());
                let content = disk.peek(&arena_path(Term(1), n)).expect("it is there");
                assert!(content.iter().all(|&byte| u32::from(byte) == n + 1), "turn {turn}, arena {n}");
            }
        }
        assert_eq!(disk.open_files(), 2 * 4, "and they are used");
    }

    #[test]
    fn an_arena_is_synced_through_what_was_written_to_though_the_shelf_let_it_go() {
        let disk = heads_and_arenas(8);
        disk.set_stepped(true);
        let files = Files::new(disk.storage(SimNode(1))).keeping_open(1);
        let job = one_chunk(VolumeId(0), 0..8);
        let mut copying = Task::new(copy_out(&files, &job));
        let mut opened = Vec::new();
        while !copying.poll() {
            let oldest = disk.pending().into_iter().next().expect("it waits for the disk");
            if oldest.kind == OperationKind::Open && oldest.path.contains("store") {
                opened.push(oldest.path);
            }
            disk.complete_oldest();
        }
        copying.into_output().expect("it is done").expect("the disk is well");
        assert_eq!(opened.len(), 8, "once each: {opened:?}");
        disk.set_stepped(false);
        disk.power_loss(7);
        for n in 0..8 {
            let content = disk.peek(&arena_path(Term(1), n)).expect("it is there");
            assert_eq!(content, [1; 4096][..], "arena {n}");
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
