//! The connection to lockd: made, fed and dropped as the client core says.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use csnap_lockd::client::{ClientInput, Lockds};
use csnap_proto::Frame;
use csnap_proto::frame::{FrameDecoder, encode};
use csnap_proto::message::lock::{FromLockd, ToLockd};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::warn;

use super::{Event, Events};
use crate::core::Input;

/// Frames that wait to be sent; the client core has few outstanding.
const OUTGOING_MAX: usize = 2048;

/// Bytes read at once.
const READ_BYTES: usize = 16 << 10;

struct Current {
    attempt: u64,
    outgoing: mpsc::Sender<Bytes>,
    task: JoinHandle<()>,
}

/// At most one connection at a time.
pub(super) struct Link {
    lockds: Lockds,
    events: Events,
    current: Option<Current>,
    /// Why the last attempt failed; the same is not said again.
    last_error: Arc<Mutex<String>>,
}

impl Link {
    pub(super) fn new(lockds: Lockds, events: Events) -> Self {
        Self { lockds, events, current: None, last_error: Arc::default() }
    }

    /// Lockds are found there from now on: of another group, and another cluster.
    pub(super) fn move_to(&mut self, addresses: Vec<SocketAddr>) {
        self.lockds = self.lockds.moved_to(addresses);
    }

    /// To any lockd, rather to the one at `hint`.
    pub(super) fn connect(&mut self, attempt: u64, hint: Option<SocketAddr>) {
        self.drop_current();
        let (outgoing, queue) = mpsc::channel(OUTGOING_MAX);
        let (lockds, events, last_error) =
            (self.lockds.clone(), self.events.clone(), self.last_error.clone());
        let task = tokio::spawn(async move {
            if let Err(error) = converse(&lockds, attempt, hint, queue, &events).await {
                let error = error.to_string();
                let mut last = last_error.lock().unwrap_or_else(PoisonError::into_inner);
                if *last != error {
                    warn!("{error}");
                    *last = error;
                }
            }
            let _ = events.send(Event::Input(Input::Lockd(ClientInput::Disconnected { attempt }))).await;
        });
        self.current = Some(Current { attempt, outgoing, task });
    }

    pub(super) fn disconnect(&mut self, attempt: u64) {
        if self.current.as_ref().is_some_and(|current| current.attempt == attempt) {
            self.drop_current();
        }
    }

    /// False when the connection is not there any more, or does not take it.
    pub(super) fn send(&self, attempt: u64, frame: &Frame<ToLockd>) -> bool {
        let Some(current) = self.current.as_ref().filter(|current| current.attempt == attempt) else {
            return false;
        };
        let mut bytes = BytesMut::new();
        encode(frame, &mut bytes);
        current.outgoing.try_send(bytes.freeze()).is_ok()
    }

    fn drop_current(&mut self) {
        if let Some(current) = self.current.take() {
            current.task.abort();
        }
    }
}

async fn converse(
    lockds: &Lockds,
    attempt: u64,
    hint: Option<SocketAddr>,
    mut queue: mpsc::Receiver<Bytes>,
    events: &Events,
) -> anyhow::Result<()> {
    let stream = lockds.connect_any(attempt, hint).await.map_err(anyhow::Error::msg)?;
    let _ = events.send(Event::Input(Input::Lockd(ClientInput::Connected { attempt }))).await;
    let (mut reader, mut writer) = stream.into_split();
    let read = async {
        let mut decoder = FrameDecoder::default();
        loop {
            while let Some(frame) = decoder.next::<FromLockd>()? {
                let _ =
                    events.send(Event::Input(Input::Lockd(ClientInput::Received { attempt, frame }))).await;
            }
            decoder.buffer().reserve(READ_BYTES);
            if reader.read_buf(decoder.buffer()).await? == 0 {
                anyhow::bail!("lockd closed the connection");
            }
        }
    };
    let write = async {
        while let Some(bytes) = queue.recv().await {
            writer.write_all(&bytes).await?;
            writer.flush().await?;
        }
        anyhow::Ok(())
    };
    tokio::select! {
        result = read => result,
        result = write => result,
    }
}
