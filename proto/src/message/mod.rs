//! What is said, family by family. One file a conversation; docs/protocol.md has a row for every message.

pub mod local;
pub mod lock;
pub mod operate;
pub mod volume;

/// Which conversation, and in which direction. A socket carries one pair; anything else on it is an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Family {
    /// Client or operator to server ([`volume::ToServer`]).
    ToServer = 1,
    /// Server to client or operator ([`volume::FromServer`]).
    FromServer = 2,
    /// Agent to lockd ([`lock::ToLockd`]).
    ToLockd = 3,
    /// Lockd to agent ([`lock::FromLockd`]).
    FromLockd = 4,
    /// Child, exporter or command line to its node's agent ([`local::ToAgent`]).
    ToAgent = 5,
    /// Agent to child, exporter or command line ([`local::FromAgent`]).
    FromAgent = 6,
}
