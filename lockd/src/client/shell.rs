//! A small shell around [`LockClient`] for owners without an event loop of their own: tests, tools.
//!
//! A task keeps the connection: it tries the lockds in turn, steps the client, carries out its outputs. It ends when
//! the session does, or its owner drops [`LockSession`].

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use csnap_proto::frame::{FrameDecoder, encode};
use csnap_proto::limits::OPERATIONS_PER_SESSION_MAX;
use csnap_proto::message::lock::{FromLockd, LockOp, LockReply};
use csnap_proto::{Frame, Time};
use csnap_transport::{Stream, Unreached};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::debug;

use super::{ClientEvent, ClientInput, ClientOutput, LockClient, Lockds, Ticket};
pub use crate::shell::socket::now;

/// Events that the owner has not taken; beyond, the task waits for it, and the lease may run out.
const EVENTS_MAX: usize = 4096;

/// Frames that a connection has not written yet: every operation that lockd lets a session leave unanswered, what opens and
/// renews it, and some for an owner that closes it more than once. A lockd that answers what it never read could make more
/// of them; its connection is dropped instead.
const OUTGOING_MAX: usize = OPERATIONS_PER_SESSION_MAX + 16;

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
    confirmed: watch::Receiver<Option<Time>>,
    unreached: watch::Receiver<Option<Unreached>>,
}

impl LockSession {
    /// Keeps `client`'s session with any of `lockds` (addresses, or [`Lockds`] with certificates), or with whom those say
    /// leads; bound by its lease. Answers to [`Self::operate`] go to their askers,
    /// everything else to the receiver.
    #[must_use]
    pub fn spawn(client: LockClient, lockds: impl Into<Lockds>) -> (Self, mpsc::Receiver<ClientEvent>) {
        let (requests, asked) = mpsc::channel(super::PENDING_MAX / 2);
        let (events, taken) = mpsc::channel(EVENTS_MAX);
        let (link_events, link) = mpsc::channel(EVENTS_MAX);
        let (confirmations, confirmed) = watch::channel(None);
        let (attempts, unreached) = watch::channel(None);
        let (client, waiting) = (client.bound_by_lease(), BTreeMap::new());
        let lockds = lockds.into();
        let (attempts, current) = (Arc::new(attempts), None);
        let keeper =
            Keeper { client, lockds, events, link_events, confirmations, attempts, current, waiting };
        tokio::spawn(keeper.keep(asked, link));
        (Self { requests, confirmed, unreached }, taken)
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

    /// As [`LockClient::confirmed_at`], as it changes; what a holder counts its [`Tenure`](super::Tenure) from.
    #[must_use]
    pub fn confirmed(&self) -> watch::Receiver<Option<Time>> {
        self.confirmed.clone()
    }

    /// Why the last attempt reached no lockd, as it changes; nothing once one did. The session goes on trying: whether an
    /// owner waits for somebody who refuses it, it decides itself.
    #[must_use]
    pub fn unreached(&self) -> watch::Receiver<Option<Unreached>> {
        self.unreached.clone()
    }

    /// As [`ClientInput::Close`].
    pub async fn close(&self) {
        let _ = self.requests.send(Request::Close).await;
    }
}

/// The connection that the client asked for last.
struct Current {
    attempt: u64,
    outgoing: mpsc::Sender<BytesMut>,
    task: tokio::task::JoinHandle<()>,
}

struct Keeper {
    client: LockClient,
    lockds: Lockds,
    events: mpsc::Sender<ClientEvent>,
    link_events: mpsc::Sender<ClientInput>,
    confirmations: watch::Sender<Option<Time>>,
    attempts: Arc<watch::Sender<Option<Unreached>>>,
    current: Option<Current>,
    waiting: BTreeMap<Ticket, oneshot::Sender<LockReply>>,
}

impl Keeper {
    async fn keep(mut self, mut asked: mpsc::Receiver<Request>, mut link: mpsc::Receiver<ClientInput>) {
        let mut out = Vec::new();
        self.client.step(now(), ClientInput::Tick, &mut out);
        while self.carry_out(&mut out).await.is_some() && !self.client.is_over() {
            self.confirmations.send_if_modified(|known| {
                let confirmed = self.client.confirmed_at();
                std::mem::replace(known, confirmed) != confirmed
            });
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
        while !out.is_empty() {
            if let Some(attempt) = self.carry_out_each(std::mem::take(out)).await? {
                self.client.step(now(), ClientInput::Disconnected { attempt }, out);
            }
        }
        Some(())
    }

    /// As above; and the connection that was dropped because it takes nothing more, if one was.
    async fn carry_out_each(&mut self, outputs: Vec<ClientOutput>) -> Option<Option<u64>> {
        let mut full = None;
        for output in outputs {
            match output {
                ClientOutput::Connect { attempt } => {
                    let (outgoing, queue) = mpsc::channel(OUTGOING_MAX);
                    let (lockds, hint) = (self.lockds.clone(), self.client.hint());
                    let (attempts, events) = (Arc::clone(&self.attempts), self.link_events.clone());
                    let task = async move {
                        let reached = lockds.connect_any(attempt, hint).await;
                        attempts.send_replace(reached.as_ref().err().cloned());
                        converse(reached, attempt, queue, events).await;
                    };
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
                    if let Some(current) = self.current.take_if(|current| current.attempt == attempt) {
                        let mut bytes = BytesMut::new();
                        encode(&frame, &mut bytes);
                        match current.outgoing.try_send(bytes) {
                            Err(TrySendError::Full(_)) => {
                                current.task.abort();
                                full = Some(attempt);
                            }
                            // One that ended says so itself.
                            Ok(()) | Err(TrySendError::Closed(_)) => self.current = Some(current),
                        }
                    }
                }
                ClientOutput::Moved { to } => self.lockds = self.lockds.moved_to(to),
                ClientOutput::Event(ClientEvent::Answer { ticket, reply, .. }) => {
                    if let Some(asker) = self.waiting.remove(&ticket) {
                        let _ = asker.send(reply);
                    }
                }
                ClientOutput::Event(event) => self.events.send(event).await.ok()?,
            }
        }
        Some(full)
    }
}

async fn converse(
    reached: Result<Stream, Unreached>,
    attempt: u64,
    queue: mpsc::Receiver<BytesMut>,
    events: mpsc::Sender<ClientInput>,
) {
    match reached {
        Ok(stream) => {
            let _ = events.send(ClientInput::Connected { attempt }).await;
            // However it ends, the client is told the same.
            let _ = exchange(stream, attempt, queue, &events).await;
        }
        Err(error) => debug!("{error}"),
    }
    let _ = events.send(ClientInput::Disconnected { attempt }).await;
}

async fn exchange(
    stream: Stream,
    attempt: u64,
    mut queue: mpsc::Receiver<BytesMut>,
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
            writer.flush().await?;
        }
        Ok(())
    };
    tokio::select! {
        ended = read => ended,
        ended = write => ended,
    }
}
