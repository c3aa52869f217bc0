//! What lockd decides, without I/O, clock or randomness.
//!
//! - [`mode`]: the compatibility matrix and the direction of value blocks;
//! - [`table`]: the lock table, a state machine replicable by a log;
//! - [`Lockd`]: connections and leases around it, and the order of log and answers.

pub mod canary;
mod connection;
pub mod flags;
mod lease;
mod lockd;
pub mod mode;
pub mod table;
#[cfg(test)]
mod tests;

pub use connection::{ConnectionId, LOCKD_CONNECTIONS_MAX};
pub use lockd::{Input, Lockd, Output};
