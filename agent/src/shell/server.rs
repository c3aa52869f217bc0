//! Connections to the server: for clients, who get the bare socket, and our own as an operator.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::BytesMut;
use csnap_lockd::client::Identity;
use csnap_proto::frame::{FrameDecoder, encode};
use csnap_proto::message::operate::{OperatorReply, OperatorRequest, Refusal};
use csnap_proto::message::volume::{Attach, FromServer, Identify, ToServer};
use csnap_proto::{Frame, InstanceId, Name, RequestId, Sequence, Term};
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use super::{Event, Events};
use crate::core::{Input, Ticket};

/// A server that does not take a connection by then is tried again; nodes are a local network apart.
const CONNECT_WITHIN: Duration = Duration::from_millis(250);

/// A suspected server must have answered a probe by then.
const PROBE_WITHIN: Duration = Duration::from_millis(250);

/// Bytes read at once.
const READ_BYTES: usize = 64 << 10;

/// Data that a peer leaves unacknowledged this long breaks the connection: its node is gone.
const USER_TIMEOUT: Duration = Duration::from_secs(5);

/// A silent connection is checked after this long, and then as often.
const KEEPALIVE: Duration = Duration::from_secs(2);

/// Connects with the options that every stream of csnap has.
pub(super) async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE).with_retries(3),
    )?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    TcpSocket::from_std_stream(socket.into()).connect(address).await
}

async fn connect_numeric(tcp: &str) -> anyhow::Result<TcpStream> {
    let address: SocketAddr = tcp.parse().with_context(|| format!("{tcp} is not a numeric address"))?;
    Ok(tokio::time::timeout(CONNECT_WITHIN, connect(address)).await??)
}

/// Connects on behalf of a client of this node.
pub(super) fn connect_for(ticket: Ticket, tcp: String, events: Events) {
    tokio::spawn(async move {
        let event = match connect_numeric(&tcp).await {
            Ok(stream) => Event::Connected { ticket, stream },
            Err(_) => Event::Input(Input::ServerConnect { ticket, made: false }),
        };
        let _ = events.send(event).await;
    });
}

/// One operator session of the agent.
pub(super) struct Caller {
    node: Name,
    instance: InstanceId,
    identity: Identity,
    sequence: Sequence,
}

/// A connection on which the session is identified.
pub(super) struct Call {
    stream: TcpStream,
    decoder: FrameDecoder,
    next_id: RequestId,
    /// Term in whose name the server answered.
    pub(super) term: Term,
}

impl Caller {
    pub(super) fn new(node: Name, instance: InstanceId, identity: Identity) -> Self {
        Self { node, instance, identity, sequence: Sequence(0) }
    }

    fn identify(&self) -> ToServer {
        ToServer::Identify(Identify {
            session: self.identity.session,
            secret: self.identity.secret,
            instance: self.instance,
            node: self.node.clone(),
            pid: std::process::id(),
            attach: Attach::Operator,
            cached_epoch: None,
        })
    }

    /// Connects and identifies.
    pub(super) async fn call(&self, tcp: &str) -> anyhow::Result<Call> {
        let stream = connect_numeric(tcp).await?;
        let mut call =
            Call { stream, decoder: FrameDecoder::default(), next_id: RequestId(1), term: Term(0) };
        let answer = call.ask(self.identify()).await?;
        call.term = answer.term;
        match answer.message {
            FromServer::IdentifyOk(_) => Ok(call),
            FromServer::Refused(refusal) => bail!("the server refused the agent: {refusal}"),
            _ => bail!("the server did not answer the agent's introduction"),
        }
    }

    /// One request. The outer error is the connection's, the inner one the server's answer.
    pub(super) async fn operate(
        &mut self,
        call: &mut Call,
        request: OperatorRequest,
    ) -> anyhow::Result<Result<OperatorReply, Refusal>> {
        self.sequence = self.sequence.next();
        let sequence = self.sequence;
        let ask = ToServer::Operate { sequence, lowest_unanswered: sequence, request };
        match call.ask(ask).await?.message {
            FromServer::Operated(reply) => Ok(Ok(reply)),
            FromServer::Refused(refusal) => Ok(Err(refusal)),
            _ => bail!("the server's answer is to another question"),
        }
    }
}

impl Call {
    async fn ask(&mut self, message: ToServer) -> anyhow::Result<Frame<FromServer>> {
        let id = self.next_id;
        self.next_id = id.next();
        let mut bytes = BytesMut::new();
        encode(&Frame { id, term: Term(0), message }, &mut bytes);
        self.stream.write_all(&bytes).await?;
        loop {
            while let Some(frame) = self.decoder.next::<FromServer>()? {
                if frame.id == id {
                    return Ok(frame);
                }
            }
            self.decoder.buffer().reserve(READ_BYTES);
            if self.stream.read_buf(self.decoder.buffer()).await? == 0 {
                bail!("the server closed the connection");
            }
        }
    }
}

/// Asks suspected servers for an answer.
pub(super) struct Prober {
    caller: Arc<Caller>,
    events: Events,
}

impl Prober {
    pub(super) fn new(caller: Caller, events: Events) -> Self {
        Self { caller: Arc::new(caller), events }
    }

    pub(super) fn probe(&self, tcp: String, term: Term) {
        let (caller, events) = (self.caller.clone(), self.events.clone());
        tokio::spawn(async move {
            let answer = tokio::time::timeout(PROBE_WITHIN, caller.call(&tcp)).await;
            let alive = matches!(answer, Ok(Ok(call)) if call.term == term);
            let _ = events.send(Event::Input(Input::Probed { term, alive })).await;
        });
    }
}
