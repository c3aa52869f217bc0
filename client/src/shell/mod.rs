//! Sockets, tasks and files around the core, and the API.
//!
//! - [`Volume`]: what exporters and the command line use;
//! - `shared`: the core behind its mutex, and carrying out what it says; `gate`: writes that go around it;
//! - `driver`: the task that owns the connection; `link`: connected sockets from the agent;
//! - [`Operator`]: an operator's requests to the server.

pub(crate) mod clock;
mod driver;
mod gate;
mod link;
mod operator;
mod shared;
mod volume;

pub use link::{LinkError, ServerSource};
pub use operator::{Operator, OperatorError};
pub use volume::{Attempt, ClientConfig, Volume};
