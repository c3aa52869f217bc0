//! The client half of the conversation with lockd: keeps one session alive over any number of connections.
//!
//! [`LockClient`] is pure: it neither connects nor waits nor draws random numbers. An owner (the agent's core)
//! embeds it by value, feeds it what happened and carries out what it asks for; a small shell does so for owners
//! that want channels. What it is not: a cache of locks, or a judge of leases. Whether the session is still there, lockd
//! alone decides; time only makes the client send, reconnect and warn, and an owner that asked for it stop in time.
//!
//! ```text
//! LockClient::new(config, identity, info)              a session that lockd does not know yet
//! LockClient::resume(config, identity, last_event)     one of an earlier life, saved by its owner
//! client.in_lockspace(name)                            before the first step; without it in the default one
//! client.step(now, ClientInput, &mut Vec<ClientOutput>)
//! client.operate(now, LockOp, &mut Vec<ClientOutput>) -> Option<Ticket>   None: too many wait already
//! client.set_renewing(now, bool, &mut out)             false: the lease runs out unless it is set again
//! client.restart(now, identity, info, &mut out)        after SessionLost or Closed: a new session
//! client.bound_by_lease() -> LockClient                gives the session up when its lease may be over
//! client.hint() -> Option<SocketAddr>                  where a Connect goes first
//! client.next_deadline() -> Option<Time>               then step with ClientInput::Tick
//! client.last_event() -> EventNumber, client.is_open() -> bool
//!
//! ClientInput:  Tick | Connected { attempt } | Disconnected { attempt } | Received { attempt, frame }
//!               | Status | Close
//! ClientOutput: Connect { attempt } | Disconnect { attempt } | Send { attempt, frame } | Moved { to }
//!               | Event(ClientEvent)
//! ClientEvent:  Opened { locks, queued, resumed } | Answer { ticket, op, reply } | Event(LockEvent)
//!               | Jeopardy | Disconnected | SessionLost { reason } | Closed | Status(LockdStatus)
//! ```
//!
//! The owner starts it with one `Tick`. `Connect` asks for a connection to any lockd; the owner answers it with
//! `Connected` or `Disconnected` of the same `attempt`, and anything of another attempt is ignored, so a stale
//! connection cannot speak. `Moved` says where any lockd is from then on. An attempt that brought no answer within a
//! third of the lease is given up by the client (`Disconnect`). A lockd that does not lead says who does, if it knows:
//! the next attempt follows at once, to [`LockClient::hint`] and then to the others, but not more than a few such hints
//! in a row.
//!
//! Invariants:
//! - an operation takes effect once and is answered once, whatever happens to connections, until the session is lost;
//! - events and answers surface in the order in which lockd decided them, each once;
//! - after `SessionLost` or `Closed` nothing of the session surfaces any more, and nothing of it is held.

mod core;
pub mod election;
#[cfg(feature = "shell")]
pub mod elector;
#[cfg(feature = "shell")]
mod lockds;
mod pending;
#[cfg(feature = "shell")]
pub mod shell;
pub mod tenure;
#[cfg(test)]
mod tests;

pub use self::core::{ClientConfig, ClientEvent, ClientInput, ClientOutput, GAVE_UP, Identity, LockClient};
#[cfg(feature = "shell")]
pub use self::lockds::Lockds;
pub use self::pending::{PENDING_MAX, Ticket};
pub use self::tenure::{Duty, Tenure};
#[cfg(feature = "shell")]
pub use crate::shell::greeting::{GREETING_BYTES, encode as greeting};
