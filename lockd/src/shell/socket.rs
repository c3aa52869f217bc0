//! Sockets and the clock, as both halves of the conversation use them, and the way to a lockd.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use csnap_proto::{Role, Time};
use csnap_transport::{Address, Stream, Tls, Unreached};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixStream};

/// Data that a peer leaves unacknowledged this long breaks the connection. Its session survives that.
const USER_TIMEOUT: Duration = Duration::from_secs(5);

/// A silent connection is checked after this long, and then as often.
const KEEPALIVE: Duration = Duration::from_secs(2);

/// Connections that the kernel keeps for us while we are busy: every agent at once, twice.
const BACKLOG: i32 = 512;

/// This machine's clock as cores know it: it also counts while the machine is suspended.
pub fn now() -> Time {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Time(seconds * 1_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0) / 1000)
}

/// Binds an address. A lockd that died a moment ago may have had it.
pub(super) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Connects to a lockd: one that proves to be one, or on this machine whoever listens there.
pub(crate) async fn dial(address: &Address, tls: Option<&Tls>) -> Result<Stream, Unreached> {
    match (address, tls) {
        (Address::Unix(path), _) => Ok(Stream::Unix(UnixStream::connect(path).await?)),
        (Address::Tcp(tcp), Some(tls)) => {
            let (stream, caller) = tls.connect(connect(*tcp).await?).await?;
            if caller.role != Role::Lockd {
                return Err(Unreached::Refused(format!("it is {caller}, and no lockd")));
            }
            Ok(stream)
        }
        (Address::Tcp(tcp), None) if address.is_local() => Ok(Stream::Tcp(connect(*tcp).await?)),
        (Address::Tcp(_), None) => {
            Err(Unreached::Refused("other machines are reached only with a [tls]".to_owned()))
        }
    }
}

/// Connects, with the options that both ends have.
async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    let stream = TcpSocket::from_std_stream(socket.into()).connect(address).await?;
    tune(&stream)?;
    Ok(stream)
}

/// Small messages leave at once, and a peer that is gone is noticed.
pub(super) fn tune(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    socket
        .set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE).with_retries(3))
}
