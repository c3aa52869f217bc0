//! An operator's requests to the server: one at a time, each sent again after a failover with the same sequence, so that it
//! is done once and answered once.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use csnap_proto::message::operate::{OperatorReply, OperatorRequest, Refusal};
use csnap_proto::message::volume::{Attach, FromServer, Identify, ToServer};
use csnap_proto::{
    Frame, FrameDecoder, FreeBatchId, InstanceId, Name, RequestId, Secret, Sequence, SessionId, Term, frame,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::link::{Connected, ServerSource};
use super::volume::draw;
use crate::core::RequestError;

/// Pause before a server is asked for again.
const PAUSE: Duration = Duration::from_millis(20);

/// A server that does not answer an Identify for this long is taken for dead.
const IDENTIFY_PATIENCE: Duration = Duration::from_millis(2_000);

/// Why a request is not done.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// The server says no, and why.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// This process cannot ask.
    #[error(transparent)]
    Local(#[from] RequestError),
}

/// A session of an operator. Opened with the first request; given back by [`Self::close`].
#[derive(Debug)]
pub struct Operator {
    source: ServerSource,
    identity: Identify,
    sequence: Sequence,
    line: Option<Line>,
    /// Newest term identified with; answers of older ones do not count.
    term: Term,
}

/// An identified connection.
#[derive(Debug)]
struct Line {
    connected: Connected,
    decoder: FrameDecoder,
    last_id: RequestId,
    term: Term,
    lease: Duration,
}

impl Operator {
    /// A session that is not open yet.
    ///
    /// # Errors
    /// The kernel gives no random numbers.
    pub fn new(source: ServerSource, node: Name, instance: InstanceId) -> Result<Self, OperatorError> {
        let identity = Identify {
            session: SessionId(draw()?),
            secret: Secret(draw()?),
            instance,
            node,
            pid: std::process::id(),
            attach: Attach::Operator,
            cached_epoch: None,
        };
        Ok(Self { source, identity, sequence: Sequence(0), line: None, term: Term(0) })
    }

    /// Asks, over as many servers as it takes; waits as long as none serves. Safe to give up by dropping the future: the
    /// request may or may not be done then.
    ///
    /// # Errors
    /// The server refused it.
    pub async fn request(&mut self, request: OperatorRequest) -> Result<OperatorReply, OperatorError> {
        self.sequence = self.sequence.next();
        let sequence = self.sequence;
        let message = ToServer::Operate { sequence, lowest_unanswered: sequence, request };
        loop {
            match self.ask(&message).await? {
                Some(FromServer::Operated(reply)) => return Ok(reply),
                Some(FromServer::Refused(refusal)) => return Err(refusal.into()),
                Some(_) | None => self.line = None,
            }
        }
    }

    /// Gives the session back. Best effort: a server that is not there now keeps its record until this process is reaped.
    pub async fn close(mut self) {
        if let Some(line) = &mut self.line {
            let _ = tokio::time::timeout(IDENTIFY_PATIENCE, line.exchange(&ToServer::Release)).await;
        }
    }

    /// One attempt on one connection; `None` when it broke.
    async fn ask(&mut self, message: &ToServer) -> Result<Option<FromServer>, OperatorError> {
        let Some(mut line) = self.take_line().await? else { return Ok(None) };
        let answer = line.exchange(message).await;
        match answer {
            Ok(answer) => {
                self.line = Some(line);
                Ok(Some(answer))
            }
            Err(error) => {
                tracing::debug!(%error, "the connection to the server broke; asking the next");
                Ok(None)
            }
        }
    }

    /// The identified connection, or a new one; `None` when that broke before it was identified.
    async fn take_line(&mut self) -> Result<Option<Line>, OperatorError> {
        if let Some(line) = self.line.take() {
            return Ok(Some(line));
        }
        let connected =
            self.source.connect(self.term, |error| tracing::debug!(%error, "no server yet")).await;
        let mut line = Line {
            term: connected.term,
            connected,
            decoder: FrameDecoder::default(),
            last_id: RequestId(0),
            lease: IDENTIFY_PATIENCE,
        };
        let message = ToServer::Identify(self.identity.clone());
        match tokio::time::timeout(IDENTIFY_PATIENCE, line.identify(&message, self.term)).await {
            Ok(Ok(FromServer::IdentifyOk(ok))) => {
                line.lease = Duration::from_millis(ok.lease_ms).max(Duration::from_millis(100));
                self.term = line.term;
                return Ok(Some(line));
            }
            Ok(Ok(FromServer::Refused(refusal))) => return Err(refusal.into()),
            Ok(Ok(_)) | Err(_) => {}
            Ok(Err(error)) => tracing::debug!(%error, "the server did not take the session"),
        }
        tokio::time::sleep(PAUSE).await;
        Ok(None)
    }
}

impl Line {
    async fn identify(&mut self, message: &ToServer, newest: Term) -> io::Result<FromServer> {
        let id = self.send(message).await?;
        let frame = self.receive(id).await?;
        if frame.term < newest {
            return Err(io::Error::other("a server of an older term"));
        }
        self.term = frame.term;
        Ok(frame.message)
    }

    /// Sends and waits for the answer, renewing meanwhile; a server that leaves a Renew unanswered for half a lease is dead.
    async fn exchange(&mut self, message: &ToServer) -> io::Result<FromServer> {
        let id = self.send(message).await?;
        let mut renew: Option<RequestId> = None;
        loop {
            let patience = if renew.is_some() { self.lease / 2 } else { self.lease / 5 };
            match tokio::time::timeout(patience, self.next()).await {
                Ok(frame) => {
                    let frame = frame?;
                    if frame.term != self.term {
                        continue;
                    }
                    if frame.id == id {
                        return Ok(frame.message);
                    }
                    renew = renew.filter(|renew| *renew != frame.id);
                }
                Err(_) if renew.is_some() => return Err(io::ErrorKind::TimedOut.into()),
                Err(_) => renew = Some(self.send(&ToServer::Renew { forgotten: FreeBatchId(0) }).await?),
            }
        }
    }

    async fn send(&mut self, message: &ToServer) -> io::Result<RequestId> {
        self.last_id = self.last_id.next();
        let mut bytes = BytesMut::new();
        frame::encode(&Frame { id: self.last_id, term: Term(0), message: message.clone() }, &mut bytes);
        self.connected.stream.write_all(&bytes).await?;
        Ok(self.last_id)
    }

    async fn receive(&mut self, id: RequestId) -> io::Result<Frame<FromServer>> {
        loop {
            let frame = self.next().await?;
            if frame.id == id {
                return Ok(frame);
            }
        }
    }

    /// The next frame. Loses nothing when it is dropped half-way: what arrived stays in the decoder.
    async fn next(&mut self) -> io::Result<Frame<FromServer>> {
        loop {
            if let Some(frame) = self.decoder.next().map_err(io::Error::other)? {
                return Ok(frame);
            }
            if self.connected.stream.read_buf(self.decoder.buffer()).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}
