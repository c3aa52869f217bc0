//! The connection to lockd: made, fed and dropped as the client core says.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use csnap_lockd::client::ClientInput;
use csnap_proto::Frame;
use csnap_proto::frame::{FrameDecoder, encode};
use csnap_proto::message::lock::{FromLockd, ToLockd};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::debug;

use super::server::connect;
use super::{Event, Events};
use crate::core::Input;

/// Frames that wait to be sent; the client core has few outstanding.
const OUTGOING_MAX: usize = 2048;

/// Bytes read at once.
const READ_BYTES: usize = 16 << 10;

/// An address that does not answer by then is passed over for the next.
const CONNECT_WITHIN: Duration = Duration::from_millis(250);

struct Current {
    attempt: u64,
    outgoing: mpsc::Sender<Bytes>,
    task: JoinHandle<()>,
}

/// At most one connection at a time.
pub(super) struct Link {
    addresses: Vec<SocketAddr>,
    events: Events,
    current: Option<Current>,
}

impl Link {
    pub(super) fn new(addresses: Vec<SocketAddr>, events: Events) -> Self {
        Self { addresses, events, current: None }
    }

    pub(super) fn connect(&mut self, attempt: u64) {
        self.drop_current();
        let (outgoing, queue) = mpsc::channel(OUTGOING_MAX);
        let (addresses, events) = (self.addresses.clone(), self.events.clone());
        let task = tokio::spawn(async move {
            if let Err(error) = converse(&addresses, attempt, queue, &events).await {
                debug!("lockd: {error}");
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

/// Any lockd, another first with each attempt.
async fn connect_any(addresses: &[SocketAddr], attempt: u64) -> io::Result<TcpStream> {
    let count = addresses.len() as u64;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "no address is configured");
    for i in 0..count {
        let at = usize::try_from(attempt.wrapping_add(i) % count).expect("below the number of addresses");
        match tokio::time::timeout(CONNECT_WITHIN, connect(addresses[at])).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = error,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(last)
}

async fn converse(
    addresses: &[SocketAddr],
    attempt: u64,
    mut queue: mpsc::Receiver<Bytes>,
    events: &Events,
) -> anyhow::Result<()> {
    let stream = connect_any(addresses, attempt).await?;
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
                anyhow::bail!("closed");
            }
        }
    };
    let write = async {
        while let Some(bytes) = queue.recv().await {
            writer.write_all(&bytes).await?;
        }
        anyhow::Ok(())
    };
    tokio::select! {
        result = read => result,
        result = write => result,
    }
}
