//! Connections to lockds of another group, which a lockspace moves to: this lockd is a client there.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::BytesMut;
use csnap_proto::Frame;
use csnap_proto::frame::{FrameDecoder, encode};
use csnap_proto::message::lock::{FromLockd, ToLockd};
use csnap_transport::{Address, Stream, Tls};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::debug;

use super::{Event, Events, greeting, socket};
use crate::core::spaces::mover::CallId;
use crate::replicated::Input;

/// One that did not greet by then is given up; another one of its group is called.
const REACH_WITHIN: Duration = Duration::from_secs(2);

/// Bytes read at once.
const READ_BYTES: usize = 16 << 10;

struct Call {
    /// Bounded by what the mover leaves unanswered.
    outgoing: mpsc::UnboundedSender<BytesMut>,
    task: JoinHandle<()>,
}

impl Drop for Call {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// See the module.
pub(super) struct Calls {
    tls: Option<Tls>,
    events: Events,
    open: BTreeMap<CallId, Call>,
}

impl Calls {
    pub(super) fn new(tls: Option<Tls>, events: Events) -> Self {
        Self { tls, events, open: BTreeMap::new() }
    }

    pub(super) fn call(&mut self, id: CallId, address: SocketAddr) {
        let (outgoing, queue) = mpsc::unbounded_channel();
        let (tls, events) = (self.tls.clone(), self.events.clone());
        let task = tokio::task::spawn_local(async move {
            if let Err(error) = converse(id, address, tls.as_ref(), queue, &events).await {
                debug!("lockd at {address}, for a lockspace that moves: {error}");
            }
            let _ = events.send(Event::Called(Input::Lost(id))).await;
        });
        self.open.insert(id, Call { outgoing, task });
    }

    pub(super) fn say(&self, id: CallId, frame: &Frame<ToLockd>) {
        if let Some(call) = self.open.get(&id) {
            let mut bytes = BytesMut::new();
            encode(frame, &mut bytes);
            let _ = call.outgoing.send(bytes);
        }
    }

    pub(super) fn hang_up(&mut self, id: CallId) {
        self.open.remove(&id);
    }
}

/// A lockd of a group that is another cluster.
async fn reach(address: SocketAddr, tls: Option<&Tls>) -> Result<Stream, String> {
    let mut stream = socket::dial(&Address::Tcp(address), tls).await?;
    greeting::greet_lockd(&mut stream, None).await?;
    Ok(stream)
}

async fn converse(
    id: CallId,
    address: SocketAddr,
    tls: Option<&Tls>,
    mut queue: mpsc::UnboundedReceiver<BytesMut>,
    events: &Events,
) -> io::Result<()> {
    let reached = tokio::time::timeout(REACH_WITHIN, reach(address, tls)).await;
    let stream = reached.map_err(|_| io::ErrorKind::TimedOut)?.map_err(io::Error::other)?;
    let _ = events.send(Event::Called(Input::Called(id))).await;
    let (mut reader, mut writer) = stream.into_split();
    let read = async {
        let mut decoder = FrameDecoder::default();
        loop {
            while let Some(frame) = decoder.next::<FromLockd>().map_err(io::Error::other)? {
                let _ = events.send(Event::Called(Input::Heard(id, frame))).await;
            }
            decoder.buffer().reserve(READ_BYTES);
            if reader.read_buf(decoder.buffer()).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
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
