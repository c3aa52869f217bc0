//! Where somebody listens: a numeric address, or a unix socket.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest path of a unix socket that the kernel takes, bytes.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Before the path of a unix socket.
const UNIX: &str = "unix:";

/// See the module. As text `10.0.0.1:7000`, `[::1]:7000` or `unix:/run/csnap/lockd.sock`; names are not looked up.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    /// TCP.
    Tcp(SocketAddr),
    /// A unix socket, by its absolute path.
    Unix(PathBuf),
}

/// Why a text is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Neither form.
    #[error("{0:?} is no address: give a numeric one with its port, as 10.0.0.1:7000, or unix:/path")]
    Form(String),
    /// A path that the kernel does not take, or that means something else in another directory.
    #[error("{0:?}: the path of a unix socket is absolute and has at most {SOCKET_PATH_BYTES_MAX} bytes")]
    Path(String),
}

impl Address {
    /// Whether only this machine reaches it.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().to_canonical().is_loopback(),
            Self::Unix(_) => true,
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match text.strip_prefix(UNIX) {
            Some(path) if path.starts_with('/') && path.len() <= SOCKET_PATH_BYTES_MAX => {
                Ok(Self::Unix(path.into()))
            }
            Some(path) => Err(AddressError::Path(path.to_owned())),
            None => text.parse().map(Self::Tcp).map_err(|_| AddressError::Form(text.to_owned())),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "{UNIX}{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        text.parse().expect("an address")
    }

    #[test]
    fn what_is_written_is_read() {
        for text in ["10.0.0.1:7000", "[::1]:7", "unix:/run/csnap/lockd.sock"] {
            assert_eq!(address(text).to_string(), text);
        }
    }

    #[test]
    fn nothing_else_is_an_address() {
        for bad in ["", "localhost:7", "10.0.0.1", "unix:", "unix:lockd.sock", "/run/lockd.sock"] {
            let error = bad.parse::<Address>().expect_err(bad).to_string();
            assert_eq!(error.lines().count(), 1, "{error}");
        }
        assert!(format!("unix:/{}", "x".repeat(SOCKET_PATH_BYTES_MAX)).parse::<Address>().is_err());
    }

    #[test]
    fn only_loopback_and_unix_are_this_machine_s() {
        for local in ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "[::ffff:127.0.0.1]:1", "unix:/a"] {
            assert!(address(local).is_local(), "{local}");
        }
        for other in ["10.0.0.1:1", "0.0.0.0:1", "[::]:1", "[fe80::1]:1", "[::ffff:10.0.0.1]:1"] {
            assert!(!address(other).is_local(), "{other}");
        }
    }
}
