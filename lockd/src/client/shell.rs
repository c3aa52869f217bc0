//! A small shell around [`LockClient`] for owners without an event loop of their own: tests, tools.
//!
//! A task keeps the connection: it tries the addresses in turn, steps the client, carries out its outputs. It ends when
//! the session does, or its owner drops [`LockSession`].

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::BytesMut;
use csnap_proto::frame::{FrameDecoder, encode};
use csnap_proto::message::lock::{FromLockd, LockOp, LockReply};
use csnap_proto::{Frame, Time};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};

use super::{ClientEvent, ClientInput, ClientOutput, LockClient, Ticket};
use crate::shell::socket::{connect, now};

/// An address that does not answer by then is passed over for the next.
const CONNECT_WITHIN: Duration = Duration::from_millis(250);

/// Events that the owner has not taken; beyond, the task waits for it, and the lease may run out.
const EVENTS_MAX: usize = 4096;

/// Bytes read at once.
const READ_BYTES: usize = 16 << 10;

enum Request {
    Operate(LockOp, oneshot::Sender<LockReply>),
    SetRenewing(bool),
    Close,
}

/// The session is over; the events said why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the lockd session is over")]
pub struct SessionOver;

/// Asks on behalf of a session. Clones ask for the same one.
#[derive(Clone)]
pub struct LockSession {
    requests: mpsc::Sender<Request>,
}

impl LockSession {
    /// Keeps `client`'s session with any of the lockds at `addresses`. Answers to [`Self::operate`] go to their askers,
    /// everything else to the receiver.
    #[must_use]
    pub fn spawn(client: LockClient, addresses: Vec<SocketAddr>) -> (Self, mpsc::Receiver<ClientEvent>) {
        let (requests, asked) = mpsc::channel(super::PENDING_MAX / 2);
        let (events, taken) = mpsc::channel(EVENTS_MAX);
        let (link_events, link) = mpsc::channel(EVENTS_MAX);
        let waiting = BTreeMap::new();
        let keeper = Keeper { client, addresses, events, link_events, current: None, waiting };
        tokio::spawn(keeper.keep(asked, link));
        (Self { requests }, taken)
    }

    /// Asks and waits for the answer, over as many connections as it takes.
    ///
    /// # Errors
    /// When the session ends first.
    pub async fn operate(&self, op: LockOp) -> Result<LockReply, SessionOver> {
        let (answer, answered) = oneshot::channel();
        self.requests.send(Request::Operate(op, answer)).await.map_err(|_| SessionOver)?;
        answered.await.map_err(|_| SessionOver)
    }

    /// As [`LockClient::set_renewing`].
    pub async fn set_renewing(&self, renewing: bool) {
        let _ = self.requests.send(Request::SetRenewing(renewing)).await;
    }

    /// As [`ClientInput::Close`].
    pub async fn close(&self) {
        let _ = self.requests.send(Request::Close).await;
    }
}

/// The connection that the client asked for last.
struct Current {
    attempt: u64,
    outgoing: mpsc::UnboundedSender<BytesMut>,
    task: tokio::task::JoinHandle<()>,
}

struct Keeper {
    client: LockClient,
    addresses: Vec<SocketAddr>,
    events: mpsc::Sender<ClientEvent>,
    link_events: mpsc::Sender<ClientInput>,
    current: Option<Current>,
    waiting: BTreeMap<Ticket, oneshot::Sender<LockReply>>,
}

impl Keeper {
    async fn keep(mut self, mut asked: mpsc::Receiver<Request>, mut link: mpsc::Receiver<ClientInput>) {
        let mut out = Vec::new();
        self.client.step(now(), ClientInput::Tick, &mut out);
        while self.carry_out(&mut out).await.is_some() && !self.client.is_over() {
            let deadline = self.client.next_deadline().unwrap_or(Time(u64::MAX));
            let wait = deadline.since(now()).min(Duration::from_secs(3600));
            tokio::select! {
                biased;
                input = link.recv() => {
                    self.client.step(now(), input.expect("we hold a sender"), &mut out);
                }
                request = asked.recv() => match request {
                    Some(Request::Operate(op, answer)) => {
                        // A full client drops the asker's end, which says that it is over; the bound is ours to keep.
                        if let Some(ticket) = self.client.operate(now(), op, &mut out) {
                            self.waiting.insert(ticket, answer);
                        }
                    }
                    Some(Request::SetRenewing(renewing)) => self.client.set_renewing(now(), renewing, &mut out),
                    Some(Request::Close) => self.client.step(now(), ClientInput::Close, &mut out),
                    None => break,
                },
                () = tokio::time::sleep(wait) => self.client.step(now(), ClientInput::Tick, &mut out),
            }
        }
        if let Some(current) = self.current {
            current.task.abort();
        }
    }

    /// `None` when the owner does not listen any more.
    async fn carry_out(&mut self, out: &mut Vec<ClientOutput>) -> Option<()> {
        for output in out.drain(..) {
            match output {
                ClientOutput::Connect { attempt } => {
                    let (outgoing, queue) = mpsc::unbounded_channel();
                    let task = converse(self.addresses.clone(), attempt, queue, self.link_events.clone());
                    let task = tokio::spawn(task);
                    if let Some(older) = self.current.replace(Current { attempt, outgoing, task }) {
                        older.task.abort();
                    }
                }
                ClientOutput::Disconnect { attempt } => {
                    if let Some(current) = self.current.take_if(|current| current.attempt == attempt) {
                        current.task.abort();
                    }
                }
                ClientOutput::Send { attempt, frame } => {
                    if let Some(current) = self.current.as_ref().filter(|current| current.attempt == attempt)
                    {
                        let mut bytes = BytesMut::new();
                        encode(&frame, &mut bytes);
                        let _ = current.outgoing.send(bytes);
                    }
                }
                ClientOutput::Event(ClientEvent::Answer { ticket, reply, .. }) => {
                    if let Some(asker) = self.waiting.remove(&ticket) {
                        let _ = asker.send(reply);
                    }
                }
                ClientOutput::Event(event) => self.events.send(event).await.ok()?,
            }
        }
        Some(())
    }
}

async fn converse(
    addresses: Vec<SocketAddr>,
    attempt: u64,
    queue: mpsc::UnboundedReceiver<BytesMut>,
    events: mpsc::Sender<ClientInput>,
) {
    if let Some(stream) = connect_any(&addresses, attempt).await {
        let _ = events.send(ClientInput::Connected { attempt }).await;
        // However it ends, the client is told the same.
        let _ = exchange(stream, attempt, queue, &events).await;
    }
    let _ = events.send(ClientInput::Disconnected { attempt }).await;
}

/// The first that can be reached, beginning with another one at each attempt.
async fn connect_any(addresses: &[SocketAddr], attempt: u64) -> Option<TcpStream> {
    let count = addresses.len();
    let first = usize::try_from(attempt % count.max(1) as u64).expect("below a count");
    for address in addresses.iter().cycle().skip(first).take(count) {
        if let Ok(Ok(stream)) = tokio::time::timeout(CONNECT_WITHIN, connect(*address)).await {
            return Some(stream);
        }
    }
    None
}

async fn exchange(
    stream: TcpStream,
    attempt: u64,
    mut queue: mpsc::UnboundedReceiver<BytesMut>,
    events: &mpsc::Sender<ClientInput>,
) -> io::Result<()> {
    let (mut reader, mut writer) = stream.into_split();
    let read = async {
        let mut decoder = FrameDecoder::default();
        loop {
            while let Some(frame) = decoder.next::<FromLockd>().map_err(io::Error::other)? {
                let frame: Frame<FromLockd> = frame;
                let _ = events.send(ClientInput::Received { attempt, frame }).await;
            }
            decoder.buffer().reserve(READ_BYTES);
            if reader.read_buf(decoder.buffer()).await? == 0 {
                return Ok(());
            }
        }
    };
    let write = async {
        while let Some(mut bytes) = queue.recv().await {
            writer.write_all_buf(&mut bytes).await?;
        }
        Ok(())
    };
    tokio::select! {
        ended = read => ended,
        ended = write => ended,
    }
}
