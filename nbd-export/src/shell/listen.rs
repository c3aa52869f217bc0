//! Listeners and what each accepted socket is set to.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::Mode;
use socket2::{Domain, SockAddr, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// Access to the unix socket: owner and group. Whoever may open it may read and write every volume.
const UNIX_MODE: u32 = 0o660;

/// Kernel buffer of replies, bytes: large enough that a client reads one megabyte while the next is being fetched. The
/// kernel cuts it to its own limit.
const SEND_BUFFER_BYTES: usize = 1 << 20;

/// A TCP peer that has been silent this long is probed; it is gone after three probes unanswered. There is no limit on
/// how long a live one may leave replies unread: a paused guest is not a dead one.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// A bound listener. A unix socket's file is removed when it is dropped.
#[derive(Debug)]
pub enum Listener {
    /// A unix socket with its path.
    Unix(UnixListener, PathBuf),
    /// A TCP socket.
    Tcp(TcpListener),
}

/// What a connection runs on.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Stream for S {}

/// An accepted socket.
#[derive(Debug)]
pub enum Accepted {
    /// From a unix socket.
    Unix(UnixStream),
    /// From a TCP socket.
    Tcp(TcpStream),
}

impl Listener {
    /// Listens at `path`. A socket file that nobody answers at is replaced; one that is in use is an error.
    pub fn unix(path: &Path) -> io::Result<Self> {
        let address = SockAddr::unix(path)?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        // The file that bind makes takes its mode from the socket, so it is never wider than this.
        rustix::fs::fchmod(&socket, Mode::from_raw_mode(UNIX_MODE))?;
        if let Err(error) = socket.bind(&address) {
            if error.kind() != io::ErrorKind::AddrInUse {
                return Err(error);
            }
            remove_stale(path, &address)?;
            socket.bind(&address)?;
        }
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(UNIX_MODE))?;
        socket.listen(BACKLOG)?;
        Ok(Self::Unix(UnixListener::from_std(socket.into())?, path.to_owned()))
    }

    /// Listens at `address`; port 0 takes a free one.
    pub fn tcp(address: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        // An exporter that is started again must not wait for the connections of the one before it to be forgotten.
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(Self::Tcp(TcpListener::from_std(socket.into())?))
    }

    /// The URI of the default export at this listener.
    pub fn uri(&self) -> io::Result<String> {
        match self {
            Self::Unix(_, path) => {
                Ok(format!("nbd+unix:///?socket={}", percent_encoded(&std::path::absolute(path)?)))
            }
            Self::Tcp(listener) => Ok(format!("nbd://{}", listener.local_addr()?)),
        }
    }

    /// The next connection, its options set.
    pub async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                SockRef::from(&stream).set_send_buffer_size(SEND_BUFFER_BYTES)?;
                Ok(Accepted::Unix(stream))
            }
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                let keepalive =
                    TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL);
                SockRef::from(&stream).set_tcp_keepalive(&keepalive.with_retries(3))?;
                Ok(Accepted::Tcp(stream))
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // Gone already is as good.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Removes the socket file at `path` if nobody listens there.
fn remove_stale(path: &Path, address: &SockAddr) -> io::Result<()> {
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        let what = format!("{}: is in the way and no socket; move it away", path.display());
        return Err(io::Error::new(io::ErrorKind::AddrInUse, what));
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    match probe.connect(address) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(()) => {
            let what = format!("{}: another process listens there; stop it first", path.display());
            Err(io::Error::new(io::ErrorKind::AddrInUse, what))
        }
    }
}

/// `path` as it stands in a URI's query.
fn percent_encoded(path: &Path) -> String {
    use std::fmt::Write;
    use std::os::unix::ffi::OsStrExt;
    let mut text = String::new();
    for &byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            text.push(char::from(byte));
        } else {
            write!(text, "%{byte:02X}").expect("writing to memory does not fail");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_file_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("nbd sock");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("binds"));
        assert!(path.exists(), "left by a process that was killed");
        let listener = Listener::unix(&path).expect("replaces it");
        let mode = std::fs::metadata(&path).expect("is there").permissions().mode();
        assert_eq!(mode & 0o7777, UNIX_MODE);
        let error = Listener::unix(&path).expect_err("in use");
        assert!(error.to_string().contains("another process listens"), "{error}");
        assert!(listener.uri().expect("has one").ends_with("nbd%20sock"));
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("precious");
        std::fs::write(&path, "data").expect("writes");
        assert!(Listener::unix(&path).is_err());
        assert_eq!(std::fs::read(&path).expect("is there"), b"data");
    }
}
