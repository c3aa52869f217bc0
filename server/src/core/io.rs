//! What goes into a [`ServerCore`](super::ServerCore), and what comes out, in the order in which it must be done.

use csnap_proto::message::operate::Refusal;
use csnap_proto::message::volume::{FromServer, ToServer};
use csnap_proto::{ChunkRange, Frame, StoreExtent, Term, VolumeId};

use super::closing::CloseReason;
use crate::state::{Origin, State};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
        pub struct $name(pub u64);
    };
}

number! {
    /// A connection, numbered by the shell; never reused.
    ConnId
}
number! {
    /// A batch of records and effects.
    BatchId
}
number! {
    /// A copy-out in flight.
    CopyId
}
number! {
    /// A file operation on behalf of an operator.
    TaskId
}

/// Moves of one copy-out: the head's content goes to the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyOut {
    /// Whose head.
    pub volume: VolumeId,
    /// Where the head lies.
    pub origin: Origin,
    /// Bytes of a chunk.
    pub chunk_bytes: u64,
    /// Bytes of the volume; what lies beyond reads as zeros.
    pub size_bytes: u64,
    /// Each run of chunks with the place that was reserved for it, of the same length.
    pub moves: Vec<(ChunkRange, StoreExtent)>,
}

/// Why a copy-out did not happen. Nothing refers to what was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopyError {
    /// The head could not be read.
    Origin(String),
    /// The store has no room after all.
    NoSpace,
}

/// A file operation that a request waits for. None of them touches anything that is referred to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// Make the head of a new volume: exclusive, sparse, synced.
    CreateHead {
        /// Its id.
        volume: VolumeId,
        /// Its size.
        size_bytes: u64,
    },
    /// Look at an origin that is to be adopted.
    InspectOrigin {
        /// Absolute path.
        path: String,
    },
    /// Make durable what was written to a head that nobody has open.
    SyncHead {
        /// Its id.
        volume: VolumeId,
        /// Where it lies.
        origin: Origin,
    },
    /// Ask the file system what is free, and what the heads take.
    Measure {
        /// Heads in the pool.
        heads: Vec<VolumeId>,
    },
}

/// What came of a [`Task`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TaskDone {
    /// Created, or synced.
    Done,
    /// An origin, with its canonical path.
    Inspected {
        /// Absolute, without symbolic links.
        path: String,
        /// Bytes.
        size_bytes: u64,
        /// Device number.
        device: u64,
        /// Inode.
        inode: u64,
        /// It lies in the pool itself.
        in_pool: bool,
    },
    /// Space.
    Measured {
        /// Free in the file system, bytes.
        free_bytes: u64,
        /// Taken by the heads asked for, bytes.
        heads_bytes: u64,
    },
    /// A head was opened, and its sync failed: nothing is known of what was written to it since the last good one.
    SyncFailed {
        /// What the medium said.
        reason: String,
    },
    /// It failed, and changed nothing.
    Failed(Refusal),
}

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// A connection came in.
    Accepted {
        /// Its number.
        conn: ConnId,
    },
    /// A connection is gone.
    Closed {
        /// Its number.
        conn: ConnId,
    },
    /// A frame arrived.
    Frame {
        /// On this connection.
        conn: ConnId,
        /// The frame.
        frame: Frame<ToServer>,
    },
    /// The batch is in the journal, durable.
    Appended {
        /// Which.
        batch: BatchId,
    },
    /// The gate was read for the batch.
    Gate {
        /// Which.
        batch: BatchId,
        /// Whether it was open.
        open: bool,
    },
    /// A copy-out ended: the data is durable.
    CopiedOut {
        /// Which.
        copy: CopyId,
        /// Runs whose content was all zeros (nothing was written for them), or why it failed.
        result: Result<Vec<ChunkRange>, CopyError>,
    },
    /// Room was made in the store, or could not be.
    ArenaGrown {
        /// Where.
        extent: StoreExtent,
        /// False when the file system is full.
        grown: bool,
    },
    /// A task ended.
    TaskEnded {
        /// Which.
        task: TaskId,
        /// How.
        done: TaskDone,
    },
    /// Space was given back to the file system.
    Punched {
        /// Which.
        extents: Vec<StoreExtent>,
    },
    /// Heads were removed.
    HeadRemoved {
        /// Of which volume.
        volume: VolumeId,
    },
    /// Servers of older terms are dead, with their I/O returned: somebody saw it.
    TermsDead {
        /// Which.
        terms: Vec<Term>,
    },
    /// The journal wants a checkpoint with one of the next batches.
    CheckpointDue,
    /// The agent wants the server to go: finish what is in flight, then exit.
    Drain,
    /// Time passed.
    Tick,
}

/// What is to be done, in the order given.
#[derive(Debug)]
pub enum Output {
    /// Append to the journal, sync, report [`Input::Appended`]. A failure ends the process.
    Append {
        /// Which.
        batch: BatchId,
        /// Records.
        body: Vec<u8>,
        /// The state as of this batch, if the journal wanted one: to be written beside, while serving.
        checkpoint: Option<Box<State>>,
    },
    /// Read the own gate, report [`Input::Gate`].
    ReadGate {
        /// For which batch.
        batch: BatchId,
    },
    /// Send a frame.
    Send {
        /// On this connection.
        conn: ConnId,
        /// The frame.
        frame: Frame<FromServer>,
    },
    /// Close a connection, after what was sent on it.
    Close {
        /// Which.
        conn: ConnId,
        /// For the log; none where nothing is wrong.
        reason: Option<CloseReason>,
    },
    /// Copy heads' content to the store and sync it, report [`Input::CopiedOut`].
    CopyOut {
        /// Which.
        copy: CopyId,
        /// What.
        job: CopyOut,
    },
    /// Reserve room in the store, report [`Input::ArenaGrown`].
    GrowArena {
        /// Where.
        extent: StoreExtent,
        /// The arena is new: make its file first.
        create: bool,
    },
    /// Do a file operation, report [`Input::TaskEnded`].
    Start {
        /// Which.
        task: TaskId,
        /// What.
        what: Task,
    },
    /// Give space back to the file system, report [`Input::Punched`].
    Punch {
        /// Which.
        extents: Vec<StoreExtent>,
    },
    /// Remove a head that nothing refers to, report [`Input::HeadRemoved`].
    RemoveHead {
        /// Of which volume.
        volume: VolumeId,
    },
    /// End the process.
    Exit {
        /// Why.
        reason: Exit,
    },
}

/// Why a server ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The gate is closed: a successor reigns.
    Deposed,
    /// Drained for a hand-over.
    Drained,
}
