//! The per-node agent: anoints a server, supervises its children, hands out connections.
//!
//! It holds the node's session with lockd and decides nothing about data. Clients and exporters of the node, its
//! server child and the command line talk to it on one unix socket. [`core`] decides and is pure; `shell` (feature
//! `shell`) moves events between it and the world; [`etcd`] is lockd's part played by etcd; [`config`] is the node's
//! one configuration file.

pub mod config;
pub mod core;
pub mod etcd;
#[cfg(feature = "shell")]
pub mod shell;

pub use config::{Io, NodeConfig};
