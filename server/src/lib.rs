//! The csnap server: owns all metadata of a pool; carries no client data; writes no head.
//!
//! - [`core`]: decisions, a pure step machine;
//! - [`state`]: what the journal records: volumes, snapshots, the versioned chunk map, store space, sessions;
//! - [`term`]: procedures that make a server a term: journal, gate, seal, takeover, checkpoint;
//! - [`replay`]: the seam between the two;
//! - [`copy`], [`work`]: procedures that carry a core's outputs out;
//! - [`check`]: the offline verifier;
//! - `shell`: the daemon.

pub mod check;
pub mod copy;
pub mod core;
pub mod replay;
mod shelf;
#[cfg(feature = "shell")]
pub mod shell;
pub mod state;
pub mod term;
pub mod work;
