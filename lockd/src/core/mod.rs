//! What lockd decides, without I/O, clock or randomness.
//!
//! - [`mode`]: the compatibility matrix and the direction of value blocks;
//! - [`table`]: the lock table, a state machine replicable by a log.

pub mod mode;
pub mod table;
