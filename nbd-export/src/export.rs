//! What the server stands in front of: a set of [`Exports`], each an [`Export`] once it is attached.
//!
//! An export has *two speeds*. [`Export::try_read`] and [`Export::try_write`] are called on the connection's own task:
//! they never wait for a disk, a lock that is held over I/O, or a message; what cannot be done at once answers
//! [`Attempt::WouldBlock`] and is asked again through the asynchronous operations, each on its own task.
//!
//! Callers guarantee: every range lies within the size that [`ExportInfo`] gave; nothing is written to a read-only
//! export. Any operation's future may be dropped before it is done, when the client is gone: what it did so far stays.

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;

/// What can be known of an export without attaching it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Canonical name; differs from the asked one for the default export.
    pub name: String,
    /// One line for people; may be empty.
    pub description: String,
    /// Size, bytes. Fixed for as long as a connection lasts.
    pub size_bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Block that clients should align to, bytes; a power of two. Any alignment is served all the same.
    pub block_preferred: u32,
    /// A flush on one connection covers what was acknowledged on every other, and all see one content.
    pub multi_conn: bool,
    /// Zeroing never costs what writing zeros would.
    pub fast_zero: bool,
}

/// A row of the list of exports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Name to ask for.
    pub name: String,
    /// One line for people; may be empty.
    pub description: String,
}

/// Why an export is not given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// No such export.
    #[error("{0}")]
    NotFound(String),
    /// Someone else has it; the text names the holder.
    #[error("{0}")]
    Busy(String),
    /// Anything else: one line, what and why.
    #[error("{0}")]
    Refused(String),
    /// The server is about to end.
    #[error("the exporter is shutting down")]
    ShuttingDown,
}

/// What kind of failure a request met; [`crate::core::errno`] makes an error number of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The medium, or whatever stands before it, failed.
    Io,
    /// No space left.
    NoSpace,
    /// Not without a cost that the caller excluded ([`Zeroing::fast_only`]).
    NotSupported,
    /// It cannot be changed.
    ReadOnly,
    /// It makes no sense to the export.
    Invalid,
    /// The export ends.
    ShuttingDown,
}

/// A failed request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ExportError {
    /// What the client's program may branch on.
    pub kind: ErrorKind,
    /// One line for people; sent to clients that negotiated structured replies.
    pub message: String,
}

impl ExportError {
    /// A failure with its line.
    #[must_use]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// Outcome of an operation that must not wait.
#[derive(Debug)]
#[must_use]
pub enum Attempt {
    /// Done, all of it.
    Done,
    /// Ask again through the asynchronous operation. Nothing is known of what was done so far.
    WouldBlock,
    /// It failed, and would fail again.
    Failed(ExportError),
}

/// How a range is to be zeroed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zeroing {
    /// Space may be given back; otherwise the range must be able to take writes without finding the medium full.
    pub may_punch: bool,
    /// Fail with [`ErrorKind::NotSupported`], leaving all as it was, rather than write zeros.
    pub fast_only: bool,
}

/// A run of bytes of one allocation state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockExtent {
    /// Length, bytes; not zero.
    pub len: u64,
    /// Takes no space; a write there may find the medium full.
    pub hole: bool,
    /// Reads as zeros.
    pub zero: bool,
}

/// An attached export. Shared by all connections of it that [`Exports::open`] gave the same one to.
pub trait Export: Send + Sync + 'static {
    /// Fills `out` from `offset` if that needs no waiting. After anything but `Done` the content of `out` is void.
    fn try_read(&self, offset: u64, out: &mut [u8]) -> Attempt;

    /// Writes `data` at `offset` if that needs no waiting. `Done` promises visibility, not durability.
    fn try_write(&self, offset: u64, data: &[u8]) -> Attempt;

    /// Exactly `len` bytes at `offset`.
    fn read(&self, offset: u64, len: usize) -> impl Future<Output = Result<Bytes, ExportError>> + Send;

    /// All of `data` at `offset`; visible, not durable.
    fn write(&self, offset: u64, data: Bytes) -> impl Future<Output = Result<(), ExportError>> + Send;

    /// Makes durable whatever was acknowledged before this call, on every connection.
    fn flush(&self) -> impl Future<Output = Result<(), ExportError>> + Send;

    /// The content of the range is no longer needed; a hint.
    fn trim(&self, offset: u64, len: u64) -> impl Future<Output = Result<(), ExportError>> + Send;

    /// The range reads as zeros afterwards.
    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        how: Zeroing,
    ) -> impl Future<Output = Result<(), ExportError>> + Send;

    /// The range will be read soon; a hint.
    fn cache(&self, offset: u64, len: u64) -> impl Future<Output = Result<(), ExportError>> + Send;

    /// Allocation state from `offset` on: at least one extent, at most `extents_max`, the last may reach beyond `len`
    /// and all together may end before it.
    fn block_status(
        &self,
        offset: u64,
        len: u64,
        extents_max: usize,
    ) -> impl Future<Output = Result<Vec<BlockExtent>, ExportError>> + Send;
}

/// Everything that clients can ask for by name. Its futures may be dropped halfway, when a client goes away.
pub trait Exports: Send + Sync + 'static {
    /// What is attached.
    type Export: Export;

    /// All of them, in the order to show.
    fn list(&self) -> impl Future<Output = Result<Vec<Listed>, OpenError>> + Send;

    /// What `name` is, attaching nothing. The empty name is the default export.
    fn info(&self, name: &str) -> impl Future<Output = Result<ExportInfo, OpenError>> + Send;

    /// Attaches `name` for one connection. Each success is paired with one [`Self::release`].
    fn open(
        &self,
        name: &str,
    ) -> impl Future<Output = Result<(ExportInfo, Arc<Self::Export>), OpenError>> + Send;

    /// One connection of `export` has ended; with the last the attachment ends.
    fn release(&self, export: Arc<Self::Export>) -> impl Future<Output = ()> + Send;
}
