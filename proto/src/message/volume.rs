//! The conversation between clients and the server: identify, make chunks writable, read snapshots, drain for a
//! snapshot, stay alive. Operators' requests ([`super::operate`]) travel on the same stream.
//!
//! Fully asynchronous: answers come in any order and are matched by the frame's request id. Each answer carries the
//! term of the server; a client drops anything of a term older than the newest that it identified with.

use serde::{Deserialize, Serialize};

use super::Family;
use super::operate::{OperatorReply, OperatorRequest, Refusal};
use crate::frame::Message;
use crate::ids::{
    Epoch, FreeBatchId, InstanceId, Name, ReadId, RequestToken, Secret, Sequence, SessionId, Target, Term,
    VolumeId,
};
use crate::limits::{CHUNKS_PER_MESSAGE_MAX, CHUNKS_PER_PAGE, PATH_BYTES_MAX, RANGES_PER_MESSAGE_MAX};
use crate::units::{ChunkRange, ChunkSize, Location, StoreExtent};

/// Bytes of uniqueness bits of one page.
pub const PAGE_BITS_BYTES: usize = (CHUNKS_PER_PAGE / 8) as usize;

/// What a connection is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Attach {
    /// The one writing session of a volume.
    Writer(Name),
    /// A reader of a snapshot.
    Snapshot(Target),
    /// An operator: no volume, only [`ToServer::Operate`].
    Operator,
}

/// First message on every connection. Durable before its answer: the session record, if it is new.
///
/// It ends the session's older connection and its unprocessed requests first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identify {
    /// The session; new ones are drawn by the client.
    pub session: SessionId,
    /// Must equal the one that the session was opened with.
    pub secret: Secret,
    /// The run of the process that speaks; reaping is declared by instance.
    pub instance: InstanceId,
    /// Node of the process, for people.
    pub node: Name,
    /// Process id on that node, for people.
    pub pid: u32,
    /// What is wanted. Ignored for a session that exists: it keeps what it attached, also over renames.
    pub attach: Attach,
    /// Epoch that the client's caches belong to. Present on every Identify after the session's first IdentifyOk (never
    /// from operators): a server that does not know a session that says so refuses it as not found, it has ended; without
    /// it the session is new.
    pub cached_epoch: Option<Epoch>,
}

/// Where the head of an in-place volume lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Head {
    /// `POOL/head/<volume id>`.
    Pool,
    /// A device or image that was adopted. Whoever opens it checks device and inode.
    Adopted {
        /// Absolute path.
        path: String,
        /// Device number of the file system, or of the device itself.
        device: u64,
        /// Inode.
        inode: u64,
    },
}

impl Head {
    /// Path of an adopted origin; none for a head in the pool.
    #[must_use]
    pub fn adopted_path(&self) -> Option<&str> {
        match self {
            Self::Pool => None,
            Self::Adopted { path, .. } => Some(path),
        }
    }
}

/// What a client must know of what it attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    /// Identity, stable over renames.
    pub volume: VolumeId,
    /// Of a snapshot: its identity in the volume, stable over renames.
    pub snapshot: Option<Epoch>,
    /// Name at this moment, for people.
    pub target: Target,
    /// Bytes; of the snapshot, if it is one.
    pub size_bytes: u64,
    /// Chunk size.
    pub chunk: ChunkSize,
    /// Where the origin is.
    pub head: Head,
}

/// Answer to [`Identify`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentifyOk {
    /// Of the volume or snapshot; absent for operators, and for a reader whose snapshot was deleted by force while it was
    /// away: [`FromServer::SnapshotGone`] follows, and the session has only to forget, to renew and to release.
    pub geometry: Option<Geometry>,
    /// Current epoch of the volume; of a snapshot, its own. A writer whose cache is of another epoch drops it.
    pub epoch: Epoch,
    /// No snapshot lives: the writer needs no grant for any chunk in this epoch.
    pub all_unique: bool,
    /// How long the server counts a silent client as present, milliseconds.
    pub lease_ms: u64,
    /// The client must drain before it may write: an Advice follows. Otherwise this is also the Resume.
    pub advice_follows: bool,
}

/// Uniqueness bits of one page of chunks: bit set, the chunk may be overwritten in place in this epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UniquePage {
    /// Number of the page: chunk index divided by [`CHUNKS_PER_PAGE`].
    pub page: u64,
    /// Little-endian bits, [`PAGE_BITS_BYTES`] bytes; empty means every chunk of the page.
    pub bits: Vec<u8>,
}

/// Where a run of chunks of a snapshot lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// Reads as zeros, takes no space.
    Zero,
    /// In the store, contiguous from here.
    Store(Location),
    /// Still on the origin: marked, to be confirmed by message 4.
    Origin,
}

/// A run of chunks with its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Which chunks.
    pub range: ChunkRange,
    /// Where they lie.
    pub place: Place,
}

/// Locations that the client must forget: no I/O to them may be in flight when it confirms the batch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forget {
    /// Number of the batch; confirmed by [`ToServer::Renew`].
    pub batch: FreeBatchId,
    /// The places; empty means "everything that you cached" (a batch too large for a frame).
    pub extents: Vec<StoreExtent>,
}

/// Client or operator to server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToServer {
    /// Who I am. First on every connection, and only there.
    Identify(Identify),
    /// Make these chunks mine to overwrite in the current epoch. → [`FromServer::WriteOk`].
    QueryWrite {
        /// The runs, in any order, each within the volume.
        ranges: Vec<ChunkRange>,
    },
    /// Message 1 of a snapshot read. → [`FromServer::SnapshotRead`].
    QuerySnapshotRead {
        /// New on this connection.
        read: ReadId,
        /// The runs.
        ranges: Vec<ChunkRange>,
    },
    /// Message 3 of the four-message read: the origin has been read. → [`FromServer::FinishSnapshotReadOk`] or
    /// [`FromServer::Retry`].
    FinishSnapshotRead {
        /// The read of message 1, on this same connection.
        read: ReadId,
    },
    /// Everything issued before the Advice is durable, nothing is writable any more. Its frame carries the id of the
    /// Advice's frame: a late answer to an earlier Advice of the same create does not count for a later one.
    SnapshotAdviceOk {
        /// Of the Advice that is answered.
        advice: RequestToken,
    },
    /// I am alive. → [`FromServer::Renewed`].
    Renew {
        /// Highest batch of [`Forget`] that is forgotten with no I/O in flight; 0 for none.
        forgotten: FreeBatchId,
    },
    /// The session ends: drained, synced, nothing cached. → [`FromServer::Released`].
    Release,
    /// A request of an operator. → [`FromServer::Operated`] or [`FromServer::Refused`].
    Operate {
        /// Position in this session; a resend carries the same.
        sequence: Sequence,
        /// Lowest sequence that the session still awaits an answer to; stored results below are dropped.
        lowest_unanswered: Sequence,
        /// What is wanted.
        request: OperatorRequest,
    },
}

/// Server to client or operator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromServer {
    /// Answer to [`ToServer::Identify`].
    IdentifyOk(IdentifyOk),
    /// Grant. Durable before it: the copied-out data, then its record.
    WriteOk {
        /// Epoch that the grant belongs to; a client that is in another one asks again.
        epoch: Epoch,
        /// Runs of the request that could not be made unique for want of space; all others are granted.
        no_space: Vec<ChunkRange>,
        /// No snapshot lives: every chunk of the volume is unique in this epoch; `pages` is empty.
        all_unique: bool,
        /// The bits of every page that the request touched.
        pages: Vec<UniquePage>,
    },
    /// Message 2. If no extent is [`Place::Origin`] it is final; otherwise the server keeps a mark for
    /// (connection, read id) and the client must finish.
    SnapshotRead {
        /// Of message 1.
        read: ReadId,
        /// Covers the ranges of message 1 exactly, in their order.
        extents: Vec<Extent>,
    },
    /// Message 4: what was read from the origin is the snapshot's content.
    FinishSnapshotReadOk {
        /// Of message 3.
        read: ReadId,
    },
    /// Message 4, the other way: the mark was broken or is not known on this connection; read again from message 1.
    Retry {
        /// Of message 3.
        read: ReadId,
    },
    /// Stop writing, drain, make durable, forget what is writable, then answer. Its frame's id is new on the connection
    /// with each Advice, also with one of a create that was advised before.
    SnapshotAdvice {
        /// Identity of the create; an Advice seen before is drained anew all the same.
        advice: RequestToken,
    },
    /// The create is over, either way.
    Resume {
        /// Of the Advice.
        advice: RequestToken,
        /// Epoch from now on.
        epoch: Epoch,
        /// As in [`IdentifyOk::all_unique`].
        all_unique: bool,
    },
    /// Answer to [`ToServer::Renew`], in stream order with everything else.
    Renewed {
        /// Batches to forget, oldest first.
        forget: Vec<Forget>,
        /// No snapshot lives any more: as in [`IdentifyOk::all_unique`].
        all_unique: bool,
        /// Epoch that `all_unique` speaks of.
        epoch: Epoch,
    },
    /// The session is gone.
    Released,
    /// Answer to [`ToServer::Operate`].
    Operated(OperatorReply),
    /// Any request that is not done, with the reason. On [`ToServer::Identify`] the connection closes after it.
    Refused(Refusal),
    /// The snapshot that this session reads was deleted by force: every read of it is an I/O error from now on.
    SnapshotGone,
}

fn check_ranges(ranges: &[ChunkRange]) -> Result<(), &'static str> {
    if ranges.is_empty() || ranges.len() > RANGES_PER_MESSAGE_MAX {
        return Err("number of ranges");
    }
    let mut chunks = 0u64;
    for range in ranges {
        if range.count == 0 || range.checked_end().is_none() {
            return Err("an empty or overflowing range");
        }
        chunks = chunks.saturating_add(range.count);
    }
    if chunks > CHUNKS_PER_MESSAGE_MAX { Err("number of chunks") } else { Ok(()) }
}

impl Message for ToServer {
    const FAMILY: Family = Family::ToServer;

    fn check(&self) -> Result<(), &'static str> {
        match self {
            Self::QueryWrite { ranges } | Self::QuerySnapshotRead { ranges, .. } => check_ranges(ranges),
            Self::Operate { request, .. } => request.check(),
            _ => Ok(()),
        }
    }
}

impl Message for FromServer {
    const FAMILY: Family = Family::FromServer;

    fn check(&self) -> Result<(), &'static str> {
        match self {
            Self::WriteOk { pages, .. } => {
                let whole = |p: &UniquePage| p.bits.is_empty() || p.bits.len() == PAGE_BITS_BYTES;
                if pages.iter().all(whole) { Ok(()) } else { Err("length of uniqueness bits") }
            }
            Self::SnapshotRead { extents, .. } => {
                let good = |e: &Extent| e.range.count > 0 && e.range.checked_end().is_some();
                if extents.iter().all(good) { Ok(()) } else { Err("an empty or overflowing extent") }
            }
            Self::IdentifyOk(IdentifyOk {
                geometry: Some(Geometry { head: Head::Adopted { path, .. }, .. }),
                ..
            }) => {
                if path.len() <= PATH_BYTES_MAX {
                    Ok(())
                } else {
                    Err("length of a path")
                }
            }
            _ => Ok(()),
        }
    }
}

/// Names of the messages as `status` counts them: one a frame sent by a client or answered to it.
impl ToServer {
    /// The message's name in docs/protocol.md.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Identify(_) => "Identify",
            Self::QueryWrite { .. } => "QueryWrite",
            Self::QuerySnapshotRead { .. } => "QuerySnapshotRead",
            Self::FinishSnapshotRead { .. } => "FinishSnapshotRead",
            Self::SnapshotAdviceOk { .. } => "SnapshotAdviceOk",
            Self::Renew { .. } => "Renew",
            Self::Release => "Release",
            Self::Operate { .. } => "Operate",
        }
    }
}

impl FromServer {
    /// The message's name in docs/protocol.md.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::IdentifyOk(_) => "IdentifyOk",
            Self::WriteOk { .. } => "WriteOk",
            Self::SnapshotRead { extents, .. } => {
                let origin = extents.iter().any(|e| e.place == Place::Origin);
                if origin { "SnapshotReadOriginOk" } else { "SnapshotReadOk" }
            }
            Self::FinishSnapshotReadOk { .. } => "FinishSnapshotReadOk",
            Self::Retry { .. } => "Retry",
            Self::SnapshotAdvice { .. } => "SnapshotAdvice",
            Self::Resume { .. } => "Resume",
            Self::Renewed { .. } => "Renewed",
            Self::Released => "Released",
            Self::Operated(_) => "Operated",
            Self::Refused(_) => "Refused",
            Self::SnapshotGone => "SnapshotGone",
        }
    }
}

/// A server's term as the header of its frames carries it; operators and clients send 0.
pub const NO_TERM: Term = Term(0);
