//! What goes into the core and what comes out of it. Data of requests stays with the caller; the core sees ranges.

use csnap_proto::message::operate::{Refusal, RefusalKind};
use csnap_proto::message::volume::{Attach, FromServer, Geometry, ToServer};
use csnap_proto::{Epoch, Frame, InstanceId, Location, Name, Secret, SessionId, Term};

use super::canary::Canaries;

/// A connection to a server, numbered by the shell; never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ConnId(pub u64);

/// A request of the caller, numbered by it; never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct RequestKey(pub u64);

/// An I/O that the core started; never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct IoId(pub u64);

/// How a core is set up.
#[derive(Clone, Debug)]
pub struct CoreConfig {
    /// Identity of this attachment, drawn at random.
    pub session: SessionId,
    /// Its proof of ownership, drawn at random.
    pub secret: Secret,
    /// The run of this process.
    pub instance: InstanceId,
    /// Node of this process, for people.
    pub node: Name,
    /// This process, for people.
    pub pid: u32,
    /// What to attach; an operator has no volume and does not use this core.
    pub attach: Attach,
    /// Bound of the cache of known-unique chunks, bytes; see [`UNIQUE_CACHE_BYTES`].
    pub unique_cache_bytes: usize,
    /// Fewest written bytes after which writeback is started, so that drains stay short; 0 for never.
    pub writeback_bytes: u64,
    /// Deliberate breaks, for tests of the tests.
    pub canaries: Canaries,
}

/// Default of [`CoreConfig::unique_cache_bytes`]: a terabyte of scattered 4 KiB chunks' pages does not fit, a hundred
/// gigabytes do; fully unique gigabytes take two hundred bytes each.
pub const UNIQUE_CACHE_BYTES: usize = 64 << 20;

/// Default of [`CoreConfig::writeback_bytes`]: a third of a second of a slow disk.
pub const WRITEBACK_BYTES: u64 = 64 << 20;

/// What a caller wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Read the head or the snapshot.
    Read,
    /// Write; with `fua` it completes only when it is durable.
    Write {
        /// Durable before it completes.
        fua: bool,
    },
    /// The content is not needed any more; reads as zeros afterwards where the medium can punch.
    Trim {
        /// Durable before it completes.
        fua: bool,
    },
    /// Zeros.
    WriteZeroes {
        /// Durable before it completes.
        fua: bool,
        /// The space may be given back.
        may_punch: bool,
    },
    /// Everything that completed before it is durable when it completes.
    Flush,
    /// The attachment ends: drained, synced, given back. No request may follow.
    Release,
}

/// A request of the caller. `offset` and `len` are bytes, 0 for [`Op::Flush`] and [`Op::Release`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// Comes back in [`Output::Complete`].
    pub key: RequestKey,
    /// What to do.
    pub op: Op,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// Something happened.
#[derive(Clone, PartialEq, Debug)]
pub enum Input {
    /// A connected socket to a server, as asked for by [`Output::NeedServer`].
    Connected {
        /// New.
        conn: ConnId,
        /// Node of the server.
        node: Name,
        /// Its term, as the agent heard of it.
        term: Term,
    },
    /// The connection broke. Not reported for one that the core closed with [`Output::Disconnect`] (harmless if it is).
    Disconnected {
        /// Which.
        conn: ConnId,
    },
    /// The agent heard that a server serves under this term: an older one's connection is of no more use, even if it has
    /// not broken (its node may be gone without a word).
    ServerServes {
        /// Of the server that serves.
        term: Term,
    },
    /// A frame arrived; frames of a connection come in stream order.
    Frame {
        /// On which connection.
        conn: ConnId,
        /// What.
        frame: Frame<FromServer>,
    },
    /// The caller wants something.
    Request(Request),
    /// An I/O returned.
    IoDone {
        /// Which.
        io: IoId,
        /// How.
        result: Result<(), IoFailure>,
    },
    /// Fast writes (see [`Output::OpenFast`]) put this many bytes on the head since the last such input.
    Written {
        /// How many.
        bytes: u64,
    },
    /// Time passed; call at `next_deadline` at the latest. Early or spurious ticks are harmless.
    Tick,
}

/// Why an I/O of the data plane failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IoFailure {
    /// The file system is full.
    #[error("no space left")]
    NoSpace,
    /// Anything else, with the kernel's words.
    #[error("{0}")]
    Media(String),
}

/// An I/O for the shell to carry out. Those with a `request` move data of that request's buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoOp {
    /// Read `len` bytes at `offset` of the head into the buffer at `buffer_at`.
    HeadRead {
        /// Whose buffer.
        request: RequestKey,
        /// Byte offset in the head.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Byte position in the buffer.
        buffer_at: u64,
    },
    /// Put zeros into the buffer.
    ReadZeros {
        /// Whose buffer.
        request: RequestKey,
        /// Bytes.
        len: u64,
        /// Byte position in the buffer.
        buffer_at: u64,
    },
    /// Read `len` bytes, `skip` bytes after `location`, from its arena.
    StoreRead {
        /// Whose buffer.
        request: RequestKey,
        /// Start of the run.
        location: Location,
        /// Bytes after it.
        skip: u64,
        /// Bytes.
        len: u64,
        /// Byte position in the buffer.
        buffer_at: u64,
    },
    /// Write the whole buffer at `offset` of the head.
    HeadWrite {
        /// Whose buffer.
        request: RequestKey,
        /// Byte offset in the head.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Give the range's space back.
    HeadPunch {
        /// For which request.
        request: RequestKey,
        /// Byte offset in the head.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Zero the range.
    HeadZero {
        /// For which request.
        request: RequestKey,
        /// Byte offset in the head.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Its space may be given back.
        may_punch: bool,
    },
    /// Make everything written to the head before durable. A failure is final.
    HeadSync,
    /// Push dirty data towards the medium. Its success promises nothing; its failure is a failed sync.
    Writeback,
    /// No fast write may begin any more; done when none is in flight.
    StopFast,
}

/// What the shell must do, in order.
#[derive(Clone, PartialEq, Debug)]
pub enum Output {
    /// Get a connected server socket. Stands until [`Input::Connected`]; the shell keeps asking.
    NeedServer {
        /// Not this one: it broke or does not answer; 0 for no complaint.
        suspect: Term,
    },
    /// Send a frame.
    Send {
        /// On which connection.
        conn: ConnId,
        /// What.
        frame: Frame<ToServer>,
    },
    /// Close the connection; the core has forgotten it.
    Disconnect {
        /// Which.
        conn: ConnId,
        /// For the log.
        why: &'static str,
    },
    /// Attached, for the first time. Comes once.
    Attached {
        /// What was attached.
        geometry: Geometry,
        /// The volume's epoch, or the snapshot's own.
        epoch: Epoch,
    },
    /// Not attached, refused by the server; or the session is gone, or the medium failed it: every request fails from
    /// now on, only [`Op::Release`] makes sense. Comes once.
    Ended(RequestError),
    /// Fast writes may begin: those to chunks that [`super::ClientCore::known_unique`] knows, or to any if `all_unique`.
    OpenFast {
        /// No chunk needs a look-up.
        all_unique: bool,
    },
    /// Start an I/O; answer with [`Input::IoDone`].
    StartIo {
        /// Its number.
        io: IoId,
        /// What.
        op: IoOp,
    },
    /// A request is over.
    Complete {
        /// Which.
        request: RequestKey,
        /// How.
        result: Result<(), RequestError>,
    },
}

/// Why a request failed, or an attachment.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RequestError {
    /// The server does not let us attach.
    #[error("{0}")]
    Refused(Refusal),
    /// The pool cannot take the write.
    #[error("no space left in the pool; delete snapshots or add space")]
    NoSpace,
    /// A snapshot cannot be written.
    #[error("a snapshot cannot be written")]
    ReadOnly,
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(&'static str),
    /// The medium failed this request, or a sync before it: the attachment is of no use until it is made anew.
    #[error("{0}")]
    Media(String),
    /// The session was ended by the server or the operator.
    #[error("the attachment is gone: {0}; attach anew")]
    Lost(String),
    /// The attachment was released.
    #[error("the volume was released by this client")]
    Released,
}

/// What a caller over NBD or anywhere else is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ErrnoClass {
    /// EIO.
    Io,
    /// ENOSPC.
    NoSpace,
    /// EROFS; NBD says EPERM.
    ReadOnly,
    /// EINVAL.
    Invalid,
}

impl RequestError {
    /// The one place where an error number is chosen.
    #[must_use]
    pub fn errno(&self) -> ErrnoClass {
        match self {
            Self::NoSpace => ErrnoClass::NoSpace,
            Self::ReadOnly => ErrnoClass::ReadOnly,
            Self::Invalid(_) => ErrnoClass::Invalid,
            Self::Refused(refusal) => match refusal.kind {
                RefusalKind::NoSpace => ErrnoClass::NoSpace,
                RefusalKind::Invalid => ErrnoClass::Invalid,
                _ => ErrnoClass::Io,
            },
            Self::Media(_) | Self::Lost(_) | Self::Released => ErrnoClass::Io,
        }
    }
}

impl From<IoFailure> for RequestError {
    fn from(failure: IoFailure) -> Self {
        match failure {
            IoFailure::NoSpace => Self::NoSpace,
            IoFailure::Media(reason) => Self::Media(reason),
        }
    }
}
