//! An NBD server in front of anything that implements [`Export`].
//!
//! - [`export`]: the traits in front of which it stands, and the words they use;
//! - [`core`]: the protocol as pure code: negotiation, requests, replies, errors, limits;
//! - [`shell`]: sockets and tasks around it;
//! - [`exporter`]: the daemon, with volumes and snapshots as exports.
//!
//! What it is not: all but [`exporter`] know nothing of snapshots, terms or the server.
//!
//! *Architecture Invariants*: only this crate knows NBD. A request that can be answered from memory is answered by the
//! task that read it, without allocation; one that would wait never holds up another of the same connection. What a
//! connection may pin has an upper bound ([`core::limits`]), whatever the client sends or leaves unread.

pub mod core;
pub mod export;
#[cfg(feature = "shell")]
pub mod exporter;
#[cfg(feature = "shell")]
pub mod shell;

pub use export::{
    Attempt, BlockExtent, ErrorKind, Export, ExportError, ExportInfo, Exports, Listed, OpenError, Zeroing,
};
#[cfg(feature = "shell")]
pub use exporter::{ExportConfig, run, runtime};
