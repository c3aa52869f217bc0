//! Connected sockets to the server. The agent knows where the server is; it connects and hands the socket over its own unix
//! socket, beside a message. A connection to the agent lives for one such question, so an agent that was replaced is found
//! by asking again.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::BytesMut;
use csnap_proto::frame;
use csnap_proto::message::local::{FromAgent, ToAgent};
use csnap_proto::{Frame, FrameDecoder, FrameError, Name, RequestId, Term};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

/// Pause before the next agent is tried, or the same again.
const AGENT_PAUSE: Duration = Duration::from_millis(50);

/// Data that the peer has not acknowledged for this long breaks the connection, though no packet says so (a cut cable).
/// Well below half a lease, so that the kernel notices before a Renew does.
const USER_TIMEOUT: Duration = Duration::from_secs(3);

/// Bytes taken from an agent at a time; its answers are short.
const READ_BYTES: usize = 4096;

/// Where connected server sockets come from.
#[derive(Clone, Debug)]
pub enum ServerSource {
    /// Unix sockets of agents, tried in turn.
    Agents(Vec<PathBuf>),
    /// A server at a known address, of a known node and term.
    Address {
        /// Where it listens.
        address: SocketAddr,
        /// Its node.
        node: Name,
        /// Its term.
        term: Term,
    },
}

/// Why there is no connected socket yet.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody listens, or the connection broke.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The agent does not speak the protocol.
    #[error("the agent sent something that is no message: {0}")]
    Frame(#[from] FrameError),
    /// The agent says why not.
    #[error("the agent has no server for us: {0}")]
    Failed(String),
    /// The message came, the socket did not.
    #[error("the agent sent no socket with its answer")]
    NoSocket,
}

/// A connected server socket.
#[derive(Debug)]
pub(super) struct Connected {
    pub(super) stream: TcpStream,
    pub(super) node: Name,
    pub(super) term: Term,
}

impl ServerSource {
    /// Asks until there is one. `note` learns why it takes time.
    pub(super) async fn connect(&self, suspect: Term, mut note: impl FnMut(&LinkError)) -> Connected {
        loop {
            match self {
                Self::Agents(agents) => {
                    for agent in agents {
                        match ask(agent, suspect).await {
                            Ok(connected) => return connected,
                            Err(error) => note(&error),
                        }
                    }
                }
                Self::Address { address, node, term } => match TcpStream::connect(address).await {
                    Ok(stream) => {
                        set_options(&stream);
                        return Connected { stream, node: node.clone(), term: *term };
                    }
                    Err(error) => note(&error.into()),
                },
            }
            tokio::time::sleep(AGENT_PAUSE).await;
        }
    }
}

/// Asks one agent, which answers as soon as there is a server.
async fn ask(agent: &Path, suspect: Term) -> Result<Connected, LinkError> {
    let stream = UnixStream::connect(agent).await?;
    let mut request = BytesMut::new();
    let message = ToAgent::NeedServer { suspect };
    frame::encode(&Frame { id: RequestId(1), term: Term(0), message }, &mut request);
    send_all(&stream, &request).await?;
    let mut decoder = FrameDecoder::default();
    let mut socket = None;
    loop {
        if let Some(frame) = decoder.next::<FromAgent>()? {
            return match frame.message {
                FromAgent::Connected { node, term } => {
                    let socket = socket.ok_or(LinkError::NoSocket)?;
                    Ok(Connected { stream: adopt(socket)?, node, term })
                }
                FromAgent::Failed { reason } => Err(LinkError::Failed(reason)),
                _ => continue,
            };
        }
        let (bytes, received) = stream.async_io(Interest::READABLE, || receive(&stream)).await?;
        if bytes.is_empty() {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        decoder.buffer().extend_from_slice(&bytes);
        socket = received.or(socket);
    }
}

async fn send_all(stream: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Bytes, and the socket that travelled beside them, if one did. More than one is not taken: the kernel closes the rest.
fn receive(stream: &UnixStream) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut bytes = vec![0; READ_BYTES];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let received = rustix::net::recvmsg(stream, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    let mut sockets = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(sockets) => Some(sockets),
        _ => None,
    });
    let socket = sockets.next().and_then(|mut sockets| sockets.next());
    bytes.truncate(received.bytes);
    Ok((bytes, socket))
}

fn adopt(socket: OwnedFd) -> io::Result<TcpStream> {
    let stream = std::net::TcpStream::from(socket);
    stream.set_nonblocking(true)?;
    let stream = TcpStream::from_std(stream)?;
    set_options(&stream);
    Ok(stream)
}

/// Best effort: without them the connection works, and breaks later.
fn set_options(stream: &TcpStream) {
    let socket = socket2::SockRef::from(stream);
    let result = socket.set_tcp_nodelay(true).and_then(|()| socket.set_tcp_user_timeout(Some(USER_TIMEOUT)));
    if let Err(error) = result {
        tracing::debug!(%error, "cannot set options of the server connection");
    }
}
