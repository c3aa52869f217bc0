//! Sockets and tasks around the core.
//!
//! - [`listen`]: unix and TCP listeners with their options;
//! - [`mod@serve`]: accepts, bounds the number of connections, ends them in order;
//! - [`negotiate`]: one connection until it has its export; [`connection`]: from then on;
//! - [`work`]: what a connection has handed over to tasks of its own.
//!
//! One task a connection reads *everything that has arrived*, does each request at once where the export can, and sends
//! *all replies with one write*: that, and not handing a cache hit to another thread, is where the speed comes from.

pub mod connection;
pub mod listen;
pub mod negotiate;
pub mod serve;
pub mod work;

pub use listen::Listener;
pub use serve::serve;
