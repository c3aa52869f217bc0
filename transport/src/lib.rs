//! Streams between csnap's processes, and who is at the other end of them.
//!
//! A daemon listens on TCP, with TLS or on this machine alone without, and on unix sockets. Whatever it is, whoever comes
//! through is a [`Caller`](csnap_proto::Caller) before a byte of the conversation is read: by certificate, or because this
//! machine's own sockets were open to them. What a caller may ask for is not decided here.
//!
//! - [`Address`]: where somebody listens;
//! - [`TlsConfig`]: the `[tls]` of a configuration file, and where it is required;
//! - [`Strangers`]: who may be half-way in, pure;
//! - [`Unreached`]: why there is nobody, and whether to try again is of use;
//! - `Stream`, `Tls`, `unix` (feature `shell`): the streams;
//! - `issue` (feature `issue`): makes certificates.
//!
//! *Architecture Invariant*: bytes leave the machine encrypted or not at all. Both ways onto a network, [`check_listen`]
//! and `dial`, refuse an address that other machines reach while there is no certificate.

mod address;
mod config;
#[cfg(feature = "shell")]
mod explain;
#[cfg(feature = "issue")]
pub mod issue;
#[cfg(feature = "shell")]
mod metered;
#[cfg(feature = "shell")]
mod pem;
mod strangers;
#[cfg(feature = "shell")]
mod stream;
#[cfg(feature = "shell")]
mod tls;
#[cfg(feature = "shell")]
pub mod unix;
mod unreached;

pub use address::{Address, AddressError, SOCKET_PATH_BYTES_MAX};
pub use config::{TlsConfig, check_listen};
#[cfg(feature = "shell")]
pub use explain::explain;
pub use strangers::{HANDSHAKES_MAX, Source, Strangers, Ticket};
#[cfg(feature = "shell")]
pub use stream::{ReadHalf, Stream, WriteHalf};
#[cfg(feature = "shell")]
pub use tls::{HANDSHAKE_BYTES_MAX, Tls, is_tls};
pub use unreached::Unreached;
