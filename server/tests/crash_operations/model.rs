//! What was promised: the volumes and snapshots that every later server must have, sector by sector, and the one
//! request that is in hand.

use std::collections::{BTreeMap, BTreeSet};

use csnap_proto::message::operate::{OperatorRequest, Source};
use csnap_proto::message::volume::Place;
use csnap_proto::{Chunk, ChunkRange, ChunkSize, InstanceId, Name, RequestToken, Target, VolumeId};
use csnap_server::copy::{arena_path, head_path};
use csnap_server::state::{Origin, State, Volume as ServersVolume};
use csnap_storage::sim::{SECTOR_BYTES, SimStorage};
use csnap_storage::{Access, Storage, StorageError};

/// Content of a sector: this number, over and over; 0 in one that was never written.
pub(crate) type Stamp = u64;

/// A sector of a head.
#[derive(Clone, Debug, Default, PartialEq)]
struct Sector {
    /// What the last acknowledged flush covered.
    flushed: Stamp,
    /// What was written since, in order: any of these may be there after a crash.
    since: Vec<Stamp>,
}

impl Sector {
    fn latest(&self) -> Stamp {
        self.since.last().copied().unwrap_or(self.flushed)
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Volume {
    pub(crate) chunk: ChunkSize,
    pub(crate) adopted: bool,
    head: Vec<Sector>,
    snapshots: BTreeMap<&'static str, Vec<Stamp>>,
}

impl Volume {
    fn new(size_bytes: u64, chunk: ChunkSize, adopted: bool) -> Self {
        let head = vec![Sector::default(); index(size_bytes) / SECTOR_BYTES];
        Self { chunk, adopted, head, snapshots: BTreeMap::new() }
    }

    fn size_bytes(&self) -> u64 {
        (self.head.len() * SECTOR_BYTES) as u64
    }

    fn flush(&mut self) {
        for sector in &mut self.head {
            sector.flushed = sector.latest();
            sector.since.clear();
        }
    }
}

/// All volumes, by name.
pub(crate) type Volumes = BTreeMap<&'static str, Volume>;

/// An operator's request that changes what there is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Change {
    Create {
        volume: &'static str,
        size_bytes: u64,
        chunk: ChunkSize,
    },
    Adopt {
        volume: &'static str,
        size_bytes: u64,
    },
    Rename {
        volume: &'static str,
        to: &'static str,
    },
    Delete {
        volume: &'static str,
    },
    Snapshot {
        volume: &'static str,
        snapshot: &'static str,
    },
    RenameSnapshot {
        volume: &'static str,
        snapshot: &'static str,
        to: &'static str,
    },
    DeleteSnapshot {
        volume: &'static str,
        snapshot: &'static str,
    },
    /// A writer died; the volume that it has open, if it has one, was looked at.
    Reap {
        writer: InstanceId,
        wrote: Option<VolumeId>,
    },
}

/// Where adopted origins lie.
pub(crate) fn origin_path(volume: &str) -> String {
    format!("/origins/{volume}")
}

impl Change {
    pub(crate) fn request(self, token: RequestToken) -> OperatorRequest {
        match self {
            Self::Create { volume, size_bytes, chunk } => {
                OperatorRequest::VolumeCreate { name: name(volume), size_bytes, chunk, source: Source::Empty }
            }
            Self::Adopt { volume, .. } => OperatorRequest::VolumeCreate {
                name: name(volume),
                size_bytes: 0,
                chunk: ChunkSize::MIN,
                source: Source::Adopt { path: origin_path(volume) },
            },
            Self::Rename { volume, to } => OperatorRequest::VolumeRename { from: name(volume), to: name(to) },
            Self::Delete { volume } => OperatorRequest::VolumeDelete { name: name(volume) },
            Self::Snapshot { volume, snapshot } => {
                OperatorRequest::SnapshotCreate { target: target(volume, snapshot), token }
            }
            Self::RenameSnapshot { volume, snapshot, to } => {
                OperatorRequest::SnapshotRename { target: target(volume, snapshot), to: name(to) }
            }
            Self::DeleteSnapshot { volume, snapshot } => {
                OperatorRequest::SnapshotDelete { target: target(volume, snapshot), force: false }
            }
            Self::Reap { writer, wrote } => {
                OperatorRequest::Reaped { instance: writer, looked_at: wrote.into_iter().collect() }
            }
        }
    }

    /// What it makes of the volumes. A snapshot holds what its volume held when the writer had drained, or when the
    /// server had synced the head in its place: the latest of every sector, and durable.
    fn apply(self, volumes: &mut Volumes) {
        let known = "the history changes what is there";
        match self {
            Self::Create { volume, size_bytes, chunk } => {
                volumes.insert(volume, Volume::new(size_bytes, chunk, false));
            }
            Self::Adopt { volume, size_bytes } => {
                volumes.insert(volume, Volume::new(size_bytes, ChunkSize::MIN, true));
            }
            Self::Rename { volume, to } => {
                let renamed = volumes.remove(volume).expect(known);
                volumes.insert(to, renamed);
            }
            Self::Delete { volume } => drop(volumes.remove(volume).expect(known)),
            Self::Snapshot { volume, snapshot } => {
                let volume = volumes.get_mut(volume).expect(known);
                volume.flush();
                volume.snapshots.insert(snapshot, volume.head.iter().map(Sector::latest).collect());
            }
            Self::RenameSnapshot { volume, snapshot, to } => {
                let snapshots = &mut volumes.get_mut(volume).expect(known).snapshots;
                let content = snapshots.remove(snapshot).expect(known);
                snapshots.insert(to, content);
            }
            Self::DeleteSnapshot { volume, snapshot } => {
                volumes.get_mut(volume).expect(known).snapshots.remove(snapshot).expect(known);
            }
            Self::Reap { .. } => {}
        }
    }
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ledger {
    pub(crate) volumes: Volumes,
    /// Asked, and not answered yet.
    pub(crate) in_hand: Option<Change>,
    /// Number of the request in hand, or of the last one.
    pub(crate) sequence: u64,
    /// What is done at this moment, for the counts.
    pub(crate) doing: &'static str,
    stamps: Stamp,
}

impl Ledger {
    pub(crate) fn ask(&mut self, change: Change) {
        assert_eq!(self.in_hand, None, "one request at a time");
        self.in_hand = Some(change);
        self.sequence += 1;
    }

    pub(crate) fn token(&self) -> RequestToken {
        RequestToken([u8::try_from(self.sequence).expect("a short history"); 16])
    }

    /// The request in hand is done: what it was.
    pub(crate) fn acknowledged(&mut self) -> Change {
        let change = self.in_hand.take().expect("what is answered was asked");
        change.apply(&mut self.volumes);
        change
    }

    /// A chunk is about to be written: its bytes.
    pub(crate) fn write(&mut self, volume: &str, chunk: Chunk) -> (u64, Vec<u8>) {
        self.stamps += 1;
        let stamp = self.stamps;
        let volume = self.volumes.get_mut(volume).expect("the history writes to what is there");
        let offset = volume.chunk.offset_of(chunk);
        let len = index(volume.chunk.bytes().min(volume.size_bytes() - offset));
        let first = index(offset) / SECTOR_BYTES;
        for sector in &mut volume.head[first..first + len / SECTOR_BYTES] {
            sector.since.push(stamp);
        }
        (offset, stamp.to_le_bytes().repeat(len / 8))
    }

    pub(crate) fn flushed(&mut self, volume: &str) {
        self.volumes.get_mut(volume).expect("the history flushes what is there").flush();
    }

    /// Holds a state and the files that it speaks of against what was promised. The request in hand is done whole, or not
    /// at all. What comes of it is promised from now on: what the heads hold, and what was done.
    pub(crate) async fn found(&self, storage: &SimStorage, state: &State) -> Result<Self, String> {
        let mut found = self.clone();
        if self.in_hand.is_some() {
            found.acknowledged();
        }
        let shape = shape_of(state);
        if shape != shape_of_model(&found.volumes) {
            found = self.clone();
        }
        if shape != shape_of_model(&found.volumes) {
            let (promised, in_hand) = (shape_of_model(&self.volumes), self.in_hand);
            return Err(format!("promised {promised:?}, in hand {in_hand:?}, found {shape:?}"));
        }
        for (volume, model) in &mut found.volumes {
            let found = state.volume_by_name(&name(volume)).expect("it is of this shape");
            let head = read_head(storage, found).await.map_err(|error| error.to_string())?;
            model.hold_against(volume, &head)?;
            for (snapshot, promised) in &model.snapshots {
                let content = read_snapshot(storage, state, found, snapshot).await;
                let content = content.map_err(|error| error.to_string())?;
                hold_snapshot_against(&format!("{volume}@{snapshot}"), promised, &content)?;
            }
        }
        Ok(found)
    }
}

impl Volume {
    /// Every sector holds what was flushed last, or something written since; from now on exactly what it holds.
    fn hold_against(&mut self, volume: &str, head: &[u8]) -> Result<(), String> {
        let content = stamps_of(head).map_err(|torn| format!("{volume}: {torn}"))?;
        for (at, (sector, stamp)) in self.head.iter_mut().zip(content).enumerate() {
            if stamp != sector.flushed && !sector.since.contains(&stamp) {
                return Err(format!("{volume}: sector {at} holds {stamp} in place of {sector:?}"));
            }
            *sector = Sector { flushed: stamp, since: Vec::new() };
        }
        Ok(())
    }
}

fn hold_snapshot_against(target: &str, promised: &[Stamp], content: &[u8]) -> Result<(), String> {
    let content = stamps_of(content).map_err(|torn| format!("{target}: {torn}"))?;
    match promised.iter().zip(&content).position(|(promised, found)| promised != found) {
        Some(at) => Err(format!("{target} changed: sector {at} was {}, is {}", promised[at], content[at])),
        None => Ok(()),
    }
}

/// The stamp of each sector.
fn stamps_of(bytes: &[u8]) -> Result<Vec<Stamp>, String> {
    let stamp_of = |(at, sector): (usize, &[u8])| {
        let mut words =
            sector.chunks_exact(8).map(|word| Stamp::from_le_bytes(word.try_into().expect("eight")));
        let first = words.next().expect("sectors are longer");
        let whole = words.all(|word| word == first);
        if whole { Ok(first) } else { Err(format!("sector {at} is a mixture")) }
    };
    bytes.chunks_exact(SECTOR_BYTES).enumerate().map(stamp_of).collect()
}

/// Names, sizes and snapshots: what an operator sees.
type Shape = BTreeMap<String, (u64, u64, bool, BTreeSet<String>)>;

fn shape_of(state: &State) -> Shape {
    let shape = |volume: &ServersVolume| {
        let snapshots = state.snapshots(volume.id).map(|snapshot| snapshot.name.to_string()).collect();
        let adopted = volume.origin != Origin::Pool;
        (volume.name.to_string(), (volume.size_bytes, volume.chunk.bytes(), adopted, snapshots))
    };
    state.volumes().map(shape).collect()
}

fn shape_of_model(volumes: &Volumes) -> Shape {
    let shape = |(name, volume): (&&'static str, &Volume)| {
        let snapshots = volume.snapshots.keys().map(|snapshot| (*snapshot).to_owned()).collect();
        let sizes = (volume.size_bytes(), volume.chunk.bytes(), volume.adopted, snapshots);
        ((*name).to_owned(), sizes)
    };
    volumes.iter().map(shape).collect()
}

/// Opens the head of a volume as its writer does.
pub(crate) async fn open_head(
    storage: &SimStorage,
    volume: &ServersVolume,
    access: Access,
) -> Result<<SimStorage as Storage>::File, StorageError> {
    match &volume.origin {
        Origin::Pool => storage.open(&head_path(volume.id), access).await,
        Origin::Adopted { path, .. } => storage.open(path, access).await,
    }
}

async fn read_head(storage: &SimStorage, volume: &ServersVolume) -> Result<Vec<u8>, StorageError> {
    let file = open_head(storage, volume, Access::Read).await?;
    Ok(storage.read(&file, 0, index(volume.size_bytes)).await?.to_vec())
}

/// The content of a snapshot, from wherever the state says that its chunks lie.
async fn read_snapshot(
    storage: &SimStorage,
    state: &State,
    volume: &ServersVolume,
    snapshot: &str,
) -> Result<Vec<u8>, StorageError> {
    let epoch = state.snapshot_by_name(volume.id, &name(snapshot)).expect("it is of this shape").epoch;
    let mut content = Vec::new();
    for extent in state.locate(volume.id, epoch, all_chunks(volume)) {
        let len = index(extent.range.count * volume.chunk.bytes());
        match extent.place {
            Place::Zero => content.resize(content.len() + len, 0),
            Place::Origin => {
                let file = open_head(storage, volume, Access::Read).await?;
                let offset = volume.chunk.offset_of(extent.range.first);
                content.extend_from_slice(&storage.read(&file, offset, len).await?);
            }
            Place::Store(at) => {
                let file = storage.open(&arena_path(at.term, at.arena), Access::Read).await?;
                content.extend_from_slice(&storage.read(&file, at.offset(), len).await?);
            }
        }
    }
    Ok(content)
}

/// Bytes of the store that the live snapshots reach.
pub(crate) fn reachable_bytes(state: &State) -> u64 {
    let mut reached = BTreeSet::new();
    for volume in state.volumes() {
        for snapshot in state.snapshots(volume.id) {
            for extent in state.locate(volume.id, snapshot.epoch, all_chunks(volume)) {
                if let Place::Store(at) = extent.place {
                    let blocks = u32::try_from(extent.range.count).expect("small") * volume.chunk.blocks();
                    reached.extend((0..blocks).map(|block| at.plus(block)));
                }
            }
        }
    }
    reached.len() as u64 * ChunkSize::MIN.bytes()
}

fn all_chunks(volume: &ServersVolume) -> ChunkRange {
    ChunkRange { first: Chunk(0), count: volume.chunk.chunks_in(volume.size_bytes) }
}

pub(crate) fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

pub(crate) fn target(volume: &str, snapshot: &str) -> Target {
    Target { volume: name(volume), snapshot: Some(name(snapshot)) }
}

pub(crate) fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("small volumes")
}
