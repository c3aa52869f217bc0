//! The vocabulary of csnap: ids and units as types, limits with names, the messages of every
//! conversation, and the frames that carry them.
//!
//! Nothing here does I/O, reads a clock or draws a random number. Every daemon depends on this crate;
//! it depends on none of them.
//!
//! - [`ids`]: what things are called (volumes, snapshots, sessions, terms, epochs);
//! - [`caller`]: who is at the other end: roles, and how certificates write them;
//! - [`units`]: how much of something (time, chunks, byte ranges, places in the store);
//! - [`descriptors`]: how open files are shared out;
//! - [`limits`]: every bound that a peer can run into;
//! - [`frame`]: header, checksum, incremental decoding;
//! - [`message`]: what is said, family by family.
//!
//! *Architecture Invariant*: decoding never panics and never allocates more than a frame may hold
//! ([`limits::FRAME_BYTES_MAX`]), whatever the bytes are.

pub mod caller;
pub mod descriptors;
pub mod frame;
pub mod ids;
pub mod limits;
pub mod message;
pub mod units;

pub use caller::{Caller, Principal, PrincipalError, Role};
pub use descriptors::Descriptors;
pub use frame::{Frame, FrameDecoder, FrameError};
pub use ids::*;
pub use units::*;
