//! The protocol, pure: bytes and answers in, bytes and questions out. No socket, clock or task.
//!
//! - [`handshake`]: fixed newstyle negotiation, with [`option`] (what clients ask) and [`option_reply`] (what they get);
//! - [`request`]: request headers and whether they may be carried out; [`errno`]: the error numbers;
//! - [`reply`] and [`status`]: simple and structured replies;
//! - [`window`]: the byte buffers on both sides of it; [`wire`]: numbers of the protocol; [`limits`]: our own.
//!
//! Reference: the NBD project's `doc/proto.md`. Not offered: oldstyle negotiation, TLS, extended headers.

pub mod errno;
pub mod handshake;
pub mod limits;
pub mod option;
pub mod option_reply;
pub mod reply;
pub mod request;
pub mod status;
pub mod window;
pub mod wire;
