//! What operators ask of the server, and what it answers. Every request that changes something is replayed by
//! (session, sequence) when it is resent, also at another server.

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, InstanceId, Name, PoolId, RequestToken, SessionId, Target, Term, VolumeId};
use crate::limits::{LOOKED_AT_MAX, PATH_BYTES_MAX, REASON_BYTES_MAX};
use crate::message::volume::Head;
use crate::units::{ChunkSize, WallMillis};

/// How the content of a new volume comes to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// A new, empty head in the pool.
    Empty,
    /// An existing device or image, used where it lies.
    Adopt {
        /// Absolute path.
        path: String,
    },
    /// An empty head that the asking session fills; hidden until [`OperatorRequest::VolumePublish`].
    Import,
}

/// Who cannot write any more, by the operator's word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fenced {
    /// One session.
    Session(SessionId),
    /// A node: every session of its processes, and every older server that ran there. Refused while one of the sessions
    /// is connected.
    Node(Name),
}

/// A request of an operator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OperatorRequest {
    /// Make a volume. → [`OperatorReply::Volume`].
    VolumeCreate {
        /// Must be free.
        name: Name,
        /// Bytes; 0 with `Adopt` takes the origin's size.
        size_bytes: u64,
        /// Chunk size.
        chunk: ChunkSize,
        /// Where the content comes from.
        source: Source,
    },
    /// An imported volume is complete: it gets visible. → [`OperatorReply::Done`].
    VolumePublish {
        /// Of the create.
        name: Name,
    },
    /// Volumes in name order, a page at a time. → [`OperatorReply::Volumes`].
    VolumeList {
        /// Continue after this one, which need not be there any more.
        after: Option<Name>,
    },
    /// One volume. → [`OperatorReply::Volume`].
    VolumeShow {
        /// Its name.
        name: Name,
    },
    /// → [`OperatorReply::Done`].
    VolumeRename {
        /// Old name.
        from: Name,
        /// New name, free.
        to: Name,
    },
    /// Refused while attached or while it has snapshots. → [`OperatorReply::Done`].
    VolumeDelete {
        /// Its name.
        name: Name,
    },
    /// → [`OperatorReply::Snapshot`] once drained and durable.
    SnapshotCreate {
        /// New snapshot.
        target: Target,
        /// Kept over resends and failover: makes the create idempotent.
        token: RequestToken,
    },
    /// Snapshots of a volume, or of all. → [`OperatorReply::Snapshots`].
    SnapshotList {
        /// Only of this one.
        volume: Option<Name>,
        /// Continue after this one, which need not be there any more.
        after: Option<(Name, Epoch)>,
    },
    /// → [`OperatorReply::Snapshot`].
    SnapshotShow {
        /// Which.
        target: Target,
    },
    /// → [`OperatorReply::Done`].
    SnapshotRename {
        /// Which.
        target: Target,
        /// New name, free in that volume.
        to: Name,
    },
    /// Acknowledged at once; space comes back in the background. → [`OperatorReply::Done`].
    SnapshotDelete {
        /// Which.
        target: Target,
        /// Also while it is read: the readers get I/O errors.
        force: bool,
    },
    /// → [`OperatorReply::Status`].
    Status,
    /// The process `instance` is known dead with its I/O returned: its sessions end. Only an agent says this, after
    /// it obtained the locks that the process held. Refused as busy while the process has a volume open for writing whose
    /// head the agent did not look at: lists are read a page at a time, and a volume that is renamed meanwhile may be on
    /// none. → [`OperatorReply::Done`].
    Reaped {
        /// Run of the dead process.
        instance: InstanceId,
        /// Volumes whose heads have no I/O of the process left; at most [`LOOKED_AT_MAX`].
        looked_at: Vec<VolumeId>,
    },
    /// The server of `term` is known dead with its I/O returned. → [`OperatorReply::Done`].
    ServerReaped {
        /// Of the dead server.
        term: Term,
    },
    /// The operator vouches that these cannot write any more: their sessions end, and a node's older servers count as dead,
    /// although nobody saw them die. → [`OperatorReply::Done`].
    Fence {
        /// Whoever is lost.
        whom: Fenced,
    },
}

/// Most rows in one page of a list; fewer where they would not fit a frame.
pub const PAGE_ROWS_MAX: usize = 1000;

/// Most reasons for held space that are told one by one: more than anybody reads, and few enough for a frame.
pub const HELD_REASONS_MAX: usize = 100;

/// A volume, as shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// Identity.
    pub id: VolumeId,
    /// Name.
    pub name: Name,
    /// Bytes.
    pub size_bytes: u64,
    /// Chunk size.
    pub chunk: ChunkSize,
    /// Where its content is.
    pub head: Head,
    /// When it was made.
    pub created: WallMillis,
    /// Live snapshots.
    pub snapshots: u64,
    /// Current epoch.
    pub epoch: Epoch,
    /// Store space of its snapshots, bytes.
    pub store_bytes: u64,
    /// Who has it or its snapshots open, the writer first: a list that is cut short still has it.
    pub attached: Vec<Attachment>,
    /// Why nobody can have it, if so.
    pub blocked: Option<String>,
}

/// An open session of a volume or snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Its session.
    pub session: SessionId,
    /// Run of the exporter: what a node's agent knows it by.
    pub instance: InstanceId,
    /// Node of the exporter.
    pub node: Name,
    /// Process on that node.
    pub pid: u32,
    /// Snapshot that it reads; none for the writer.
    pub snapshot: Option<Name>,
    /// Connected and renewing, or lost.
    pub present: bool,
}

/// A snapshot, as shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Identity of the volume.
    pub volume: VolumeId,
    /// Volume and name.
    pub target: Target,
    /// Identity in the volume.
    pub epoch: Epoch,
    /// Size of the volume then, bytes.
    pub size_bytes: u64,
    /// When it was made.
    pub created: WallMillis,
    /// Bytes that deleting it would free: versions that only it holds.
    pub own_bytes: u64,
    /// Sessions that read it.
    pub readers: Vec<Attachment>,
}

/// The server's part of `csnap status`, but for the volumes, which are a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// Pool.
    pub pool: PoolId,
    /// Store space in use by live versions, and heads of the pool as allocated, bytes.
    pub used_bytes: u64,
    /// Space that the file system has free for the pool, bytes. What is set aside (segments of journals to come, reserved
    /// parts of arenas) takes room on it already, so it is not in here.
    pub free_bytes: u64,
    /// Freed or reserved, and not reusable until lost clients or older servers are known gone, bytes.
    pub held_bytes: u64,
    /// Why space is held, a line a reason; [`HELD_REASONS_MAX`] and how many more.
    pub held_because: Vec<String>,
    /// How long snapshot creates took.
    pub creates: CreateTimes,
}

/// Snapshot creates of a server's term, timed from taking the request to letting the answer go, microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateTimes {
    /// How many it made.
    pub count: u64,
    /// How many of them, the last ones, the other figures are of; 0: they say nothing.
    pub recent: u64,
    /// Median of all of it, the writer's drain included.
    pub total_p50_micros: u64,
    /// Longest of those.
    pub total_max_micros: u64,
    /// Median of what was the server's own: without the wait for the writer's drain.
    pub own_p50_micros: u64,
    /// Longest of those.
    pub own_max_micros: u64,
}

/// Answer to an [`OperatorRequest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OperatorReply {
    /// Done, nothing to tell.
    Done,
    /// One volume.
    Volume(VolumeInfo),
    /// A page of volumes, ordered by name, and whether more follow.
    Volumes {
        /// At most [`PAGE_ROWS_MAX`]; at least one, if there are any.
        rows: Vec<VolumeInfo>,
        /// Ask again after the last row.
        more: bool,
    },
    /// One snapshot.
    Snapshot(SnapshotInfo),
    /// A page of snapshots, ordered by (volume name, epoch), and whether more follow.
    Snapshots {
        /// At most [`PAGE_ROWS_MAX`]; at least one, if there are any.
        rows: Vec<SnapshotInfo>,
        /// Ask again after the last row.
        more: bool,
    },
    /// Status.
    Status(Box<ServerStatus>),
}

/// Kinds of refusal that a caller tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusalKind {
    /// No such volume, snapshot or session.
    NotFound,
    /// The name is taken.
    Exists,
    /// Held or in use by someone; the reason names them.
    Busy,
    /// No space left.
    NoSpace,
    /// The request makes no sense (sizes, ranges, wrong kind of session).
    Invalid,
    /// A client did not drain within its time.
    TimedOut,
    /// Wrong secret.
    Denied,
    /// The snapshot is gone.
    Gone,
    /// The storage reported an error.
    Media,
}

/// A request that is not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    /// What the caller may branch on.
    pub kind: RefusalKind,
    /// What, why, what to do: one line for people.
    pub reason: String,
}

impl Refusal {
    /// A refusal with its reason, cut to what a message may carry.
    #[must_use]
    pub fn new(kind: RefusalKind, reason: impl Into<String>) -> Self {
        let mut reason = reason.into();
        if reason.len() > REASON_BYTES_MAX {
            let cut = (0..=REASON_BYTES_MAX).rev().find(|&at| reason.is_char_boundary(at)).unwrap_or(0);
            reason.truncate(cut);
        }
        Self { kind, reason }
    }
}

impl OperatorRequest {
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        match self {
            Self::VolumeCreate { source: Source::Adopt { path }, .. } if path.len() > PATH_BYTES_MAX => {
                Err("length of a path")
            }
            Self::Reaped { looked_at, .. } if looked_at.len() > LOOKED_AT_MAX => Err("number of volumes"),
            _ => Ok(()),
        }
    }

    /// Whether it changes durable state, so that its result is stored for resends.
    #[must_use]
    pub fn is_mutating(&self) -> bool {
        !matches!(
            self,
            Self::VolumeList { .. }
                | Self::VolumeShow { .. }
                | Self::SnapshotList { .. }
                | Self::SnapshotShow { .. }
                | Self::Status
        )
    }
}
