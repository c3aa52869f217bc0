//! What lockd decides, without I/O, clock or randomness.
//!
//! - [`mode`]: the compatibility matrix and the direction of value blocks;
//! - [`permission`]: who may ask for what;
//! - [`table`]: the lock table, a state machine replicable by a log;
//! - [`spaces`]: several tables side by side, and their move between groups;
//! - [`Lockd`]: connections and leases around it, and the order of log and answers.

pub mod canary;
mod connection;
pub mod flags;
mod lease;
mod lockd;
pub mod mode;
pub mod permission;
pub mod spaces;
pub mod table;
#[cfg(test)]
mod tests;

pub use connection::{ConnectionId, LOCKD_CONNECTIONS_MAX};
pub use lease::Overslept;
pub use lockd::{Input, Leader, Lockd, Output};
