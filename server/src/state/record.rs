//! What the journal records of the state: every change, as plain facts.
//!
//! A record says what became so, never what was asked: it carries the epoch, the places, the ids that the server
//! chose, so that applying it needs no choice and gives the same state live and in replay. Records that must become
//! durable together (a change and the stored result that reports it) travel in one batch of the journal: one record
//! after the other, without a frame, for the journal frames the batch.
//!
//! Decoding checks every limit that can be checked without the state; `State::apply` checks the rest.

use csnap_proto::ids::{
    Epoch, FreeBatchId, InstanceId, Name, PoolId, RequestToken, Secret, Sequence, SessionId, Term, VolumeId,
};
use csnap_proto::limits::{CHUNKS_PER_MESSAGE_MAX, PATH_BYTES_MAX, VOLUME_BYTES_MAX};
use csnap_proto::message::operate::{OperatorReply, Refusal};
use csnap_proto::message::volume::Place;
use csnap_proto::units::{BLOCKS_PER_ARENA, ChunkRange, ChunkSize, Location, StoreExtent, WallMillis};
use serde::{Deserialize, Serialize};

use super::Corrupt;

/// Largest encoded record, bytes: a superseding of [`CHUNKS_PER_MESSAGE_MAX`] scattered chunks takes 170 KiB.
pub const RECORD_BYTES_MAX: usize = 256 << 10;

/// Largest stored reply, bytes. Replies to mutating requests describe one volume or snapshot: a few hundred bytes and
/// the path of an origin.
pub const RESULT_BYTES_MAX: usize = 64 << 10;

/// Most runs or extents in one record.
pub const RUNS_PER_RECORD_MAX: usize = 4096;

/// Where the head of a volume lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    /// In the pool, named by the volume's id.
    Pool,
    /// A device or image outside that was adopted: never truncated, never unlinked.
    Adopted {
        /// Absolute path.
        path: String,
        /// Device number of the file system, or of the device itself.
        device: u64,
        /// Inode.
        inode: u64,
    },
}

/// Where the content of a version that left the head is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kept {
    /// It was all zeros: takes no space.
    Zero,
    /// In the store; of a run of chunks, contiguous from here.
    Store(Location),
}

impl From<Kept> for Place {
    fn from(kept: Kept) -> Self {
        match kept {
            Kept::Zero => Self::Zero,
            Kept::Store(at) => Self::Store(at),
        }
    }
}

/// A run of chunks whose old content was moved out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SupersededRun {
    /// Which chunks.
    pub range: ChunkRange,
    /// Birth of the content that moved, the same for all.
    pub old_birth: Epoch,
    /// Where it is now.
    pub place: Kept,
}

/// A run of chunks each of which loses its version of this birth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadRun {
    /// Which chunks.
    pub range: ChunkRange,
    /// Birth of the version.
    pub birth: Epoch,
}

/// How far the background work of a deleted snapshot has come: everything before it in the index of births is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ReapCursor {
    /// Epoch of the births that are looked at next.
    pub epoch: Epoch,
    /// First page of them.
    pub page: u64,
}

/// What a session is attached to, by identity: names may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Attached {
    /// It is the one writer of a volume.
    Writer(VolumeId),
    /// It reads a snapshot.
    Snapshot(VolumeId, Epoch),
    /// It only asks and orders.
    Operator,
}

/// One change of the state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record {
    /// The journal belongs to this pool.
    PoolInit {
        /// Must be the state's own.
        pool: PoolId,
    },
    /// A server begins to serve: its term's arenas are allocated from, older ones are not until their term is dead.
    TermBegin {
        /// Above every term before.
        term: Term,
        /// Where its server runs: what an operator who vouches for a lost node says is of these.
        node: Name,
    },
    /// The server of `term` is known dead with its I/O returned, or its node is fenced, and its clients came back or are
    /// fenced: its arenas are allocated from and punched from now on.
    TermDead {
        /// Below the current one.
        term: Term,
    },
    /// A volume exists; its head was made durable before.
    VolumeCreate {
        /// Of the current term, never used before.
        id: VolumeId,
        /// Free until now.
        name: Name,
        /// Bytes, not 0.
        size_bytes: u64,
        /// Chunk size.
        chunk: ChunkSize,
        /// Where its head lies.
        origin: Origin,
        /// For people.
        created: WallMillis,
        /// Hidden until published: this session fills it.
        importer: Option<SessionId>,
    },
    /// An imported volume is complete.
    VolumePublish {
        /// Which.
        volume: VolumeId,
    },
    /// A volume has another name.
    VolumeRename {
        /// Which.
        volume: VolumeId,
        /// Free until now.
        name: Name,
    },
    /// A volume without live snapshots and without a writer is gone from the names. What is left of it (deleted
    /// snapshots not reaped yet, then the head) goes in the background.
    VolumeDelete {
        /// Which.
        volume: VolumeId,
    },
    /// The head of a deleted volume was removed; nothing of it is left.
    HeadRemoved {
        /// Of which volume; see `State::removable_heads`.
        volume: VolumeId,
    },
    /// An epoch ended and has a name: a snapshot.
    SnapshotCreate {
        /// Of which volume.
        volume: VolumeId,
        /// The volume's epoch until now.
        epoch: Epoch,
        /// Free in that volume.
        name: Name,
        /// The volume's size, bytes.
        size_bytes: u64,
        /// For people.
        created: WallMillis,
        /// Of the request: recognises its resends.
        token: RequestToken,
    },
    /// A snapshot has another name.
    SnapshotRename {
        /// Of which volume.
        volume: VolumeId,
        /// Which.
        epoch: Epoch,
        /// Free in that volume.
        name: Name,
    },
    /// A snapshot is gone from the names, although sessions may still have it open; its space comes back in the
    /// background.
    SnapshotDelete {
        /// Of which volume.
        volume: VolumeId,
        /// Which.
        epoch: Epoch,
    },
    /// Old contents were moved out and are durable there: the chunks' heads are born in the current epoch.
    Superseded {
        /// Of which volume.
        volume: VolumeId,
        /// Its current epoch.
        birth: Epoch,
        /// Each chunk at most once, each shared until now.
        runs: Vec<SupersededRun>,
    },
    /// A slice of the work for a deleted snapshot: these versions are gone from the map, their space is in the batch.
    Reaped {
        /// Of which volume.
        volume: VolumeId,
        /// The deleted snapshot.
        snapshot: Epoch,
        /// What goes; may be empty, when everything that the slice looked at lives on.
        dead: Vec<DeadRun>,
        /// Where the next slice begins.
        next: ReapCursor,
        /// The open batch.
        batch: FreeBatchId,
    },
    /// Nothing is left to do for a deleted snapshot.
    SnapshotReaped {
        /// Of which volume.
        volume: VolumeId,
        /// Which.
        snapshot: Epoch,
    },
    /// Space in an arena is reserved on disk: writes there cannot run out of it. The arena exists, durably; a number
    /// that is new to the current term is recorded by its first reservation.
    ArenaReserve {
        /// Where.
        extent: StoreExtent,
    },
    /// The open batch of frees is closed: sessions that may know its places are asked to forget them.
    FreeBatchSealed {
        /// The open batch, not empty.
        batch: FreeBatchId,
    },
    /// A session forgot every place of the batches up to this one, with no I/O in flight.
    FreesConfirmed {
        /// Which.
        session: SessionId,
        /// A sealed batch, or one that is reusable already.
        upto: FreeBatchId,
    },
    /// Everybody confirmed: the batch's space is free. Recorded only after what it relies on was durable and the gate
    /// was then seen open; see `State::confirmed_batches`.
    BatchReusable {
        /// A sealed batch that nobody is waited for.
        batch: FreeBatchId,
    },
    /// Free space was given back to the file system: it is not reserved any more.
    Punched {
        /// Where.
        extents: Vec<StoreExtent>,
    },
    /// A session exists.
    SessionOpen {
        /// New.
        session: SessionId,
        /// Proof of ownership.
        secret: Secret,
        /// Run of the process.
        instance: InstanceId,
        /// Node of the process, for people.
        node: Name,
        /// Process on that node, for people.
        pid: u32,
        /// What it has open.
        attached: Attached,
        /// For people.
        opened: WallMillis,
    },
    /// A session is over, and with it its results and everything that waited for it.
    SessionEnd {
        /// Which.
        session: SessionId,
    },
    /// A mutating request was answered; a resend gets the same.
    Result {
        /// Who asked.
        session: SessionId,
        /// Position of the request.
        sequence: Sequence,
        /// Results before this position are dropped.
        lowest_unanswered: Sequence,
        /// The answer.
        result: Result<OperatorReply, Refusal>,
    },
}

impl Record {
    /// Appends the record to a batch.
    #[must_use]
    pub fn encode_onto(&self, batch: Vec<u8>) -> Vec<u8> {
        debug_assert_eq!(self.check(), Ok(()));
        postcard::to_extend(self, batch).expect("records hold nothing that postcard cannot encode")
    }

    /// The records of a batch, in order; checks every limit. `batch` is at most as long as the journal allows.
    pub fn decode_batch(mut batch: &[u8]) -> Result<Vec<Self>, Corrupt> {
        let mut records = Vec::new();
        while !batch.is_empty() {
            let (record, rest) = postcard::take_from_bytes::<Self>(batch)
                .map_err(|error| Corrupt::new(format!("a record does not decode: {error}")))?;
            if batch.len() - rest.len() > RECORD_BYTES_MAX {
                return Err(Corrupt::new("a record longer than its limit"));
            }
            record.check()?;
            records.push(record);
            batch = rest;
        }
        Ok(records)
    }

    /// Checks what can be checked without the state: sizes, ranges, counts.
    pub fn check(&self) -> Result<(), Corrupt> {
        let good = match self {
            Self::VolumeCreate { size_bytes, origin, .. } => {
                (1..=VOLUME_BYTES_MAX).contains(size_bytes) && origin_is_bounded(origin)
            }
            Self::Superseded { runs, .. } => {
                let ranges = runs.iter().map(|run| run.range);
                !runs.is_empty() && runs.len() <= RUNS_PER_RECORD_MAX && ranges_are_bounded(ranges)
            }
            Self::Reaped { dead, .. } => {
                dead.len() <= RUNS_PER_RECORD_MAX && ranges_are_bounded(dead.iter().map(|run| run.range))
            }
            Self::ArenaReserve { extent } => extent_fits_arena(*extent),
            Self::Punched { extents } => {
                extents.len() <= RUNS_PER_RECORD_MAX && extents.iter().copied().all(extent_fits_arena)
            }
            Self::Result { result, .. } => result_is_bounded(result),
            _ => true,
        };
        if good { Ok(()) } else { Err(Corrupt::new(format!("{} beyond a limit", self.name()))) }
    }

    /// The record's name, for messages and statistics.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::PoolInit { .. } => "PoolInit",
            Self::TermBegin { .. } => "TermBegin",
            Self::TermDead { .. } => "TermDead",
            Self::VolumeCreate { .. } => "VolumeCreate",
            Self::VolumePublish { .. } => "VolumePublish",
            Self::VolumeRename { .. } => "VolumeRename",
            Self::VolumeDelete { .. } => "VolumeDelete",
            Self::HeadRemoved { .. } => "HeadRemoved",
            Self::SnapshotCreate { .. } => "SnapshotCreate",
            Self::SnapshotRename { .. } => "SnapshotRename",
            Self::SnapshotDelete { .. } => "SnapshotDelete",
            Self::Superseded { .. } => "Superseded",
            Self::Reaped { .. } => "Reaped",
            Self::SnapshotReaped { .. } => "SnapshotReaped",
            Self::ArenaReserve { .. } => "ArenaReserve",
            Self::FreeBatchSealed { .. } => "FreeBatchSealed",
            Self::FreesConfirmed { .. } => "FreesConfirmed",
            Self::BatchReusable { .. } => "BatchReusable",
            Self::Punched { .. } => "Punched",
            Self::SessionOpen { .. } => "SessionOpen",
            Self::SessionEnd { .. } => "SessionEnd",
            Self::Result { .. } => "Result",
        }
    }
}

/// Whether an origin's path is one that messages can carry.
pub(super) fn origin_is_bounded(origin: &Origin) -> bool {
    match origin {
        Origin::Pool => true,
        Origin::Adopted { path, .. } => path.len() <= PATH_BYTES_MAX,
    }
}

/// Whether a stored answer keeps its limit.
pub(super) fn result_is_bounded(result: &Result<OperatorReply, Refusal>) -> bool {
    postcard::to_stdvec(result).is_ok_and(|bytes| bytes.len() <= RESULT_BYTES_MAX)
}

/// Whether an extent is not empty and lies in one arena.
pub(super) fn extent_fits_arena(extent: StoreExtent) -> bool {
    let end = u64::from(extent.at.block) + u64::from(extent.blocks);
    extent.blocks > 0 && end <= u64::from(BLOCKS_PER_ARENA)
}

/// Whether no range is empty or overflows and all together are what one message can ask for.
fn ranges_are_bounded(mut ranges: impl Iterator<Item = ChunkRange>) -> bool {
    let mut chunks = 0u64;
    ranges.all(|range| {
        chunks = chunks.saturating_add(range.count);
        range.count > 0 && range.checked_end().is_some() && chunks <= CHUNKS_PER_MESSAGE_MAX
    })
}
