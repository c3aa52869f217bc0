//! A csnap volume as an asynchronous API: caches, resends, four-message reads.
//!
//! - [`core`]: every decision, pure: one [`core::ClientCore`] an attachment;
//! - `head`: the data plane, files and arenas (feature `shell`, as what follows);
//! - `shell`: sockets and tasks, and the API: [`Volume`] for exporters and the command line, [`Operator`] for operators.

pub mod core;
#[cfg(feature = "shell")]
mod head;
#[cfg(feature = "shell")]
mod shell;

pub use core::{ErrnoClass, RequestError};
#[cfg(feature = "shell")]
pub use head::BlockRun;
#[cfg(feature = "shell")]
pub use shell::{Attempt, ClientConfig, LinkError, Operator, OperatorError, ServerSource, Volume};
