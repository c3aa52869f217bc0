//! Distributed lock manager: sessions, six modes, value blocks, watches, terms.

pub mod client;
pub mod core;
