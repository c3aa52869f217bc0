//! Distributed lock manager: sessions, six modes, value blocks, watches, terms.
//!
//! It knows nothing of storage or servers; csnap's agents give its locks their meaning. The lock table is a state machine
//! that a log replays; one, three or five replicas keep the log.
//!
//! - [`core`]: what is decided, pure;
//! - [`store`]: the durable log, as procedures over any storage;
//! - [`replica`]: several replicas of a log of commands (feature `replica`);
//! - [`replicated`]: the two together, what a daemon runs;
//! - [`shell`]: the daemon (feature `shell`);
//! - [`client`]: the other half of the conversation, for agents.

mod blob;
pub mod broken;
pub mod canary;
pub mod client;
pub mod core;
#[cfg(feature = "replica")]
pub mod replica;
#[cfg(feature = "replica")]
pub mod replicated;
#[cfg(feature = "shell")]
pub mod shell;
pub mod store;

#[cfg(feature = "shell")]
pub use shell::{LockdConfig, run};
