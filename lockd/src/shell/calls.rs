//! Connections to lockds of another group, which a lockspace moves to: this lockd is a client there.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;

use bytes::BytesMut;
use csnap_proto::Frame;
use csnap_proto::frame::{FrameDecoder, encode};
use csnap_proto::message::lock::{FromLockd, ToLockd};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::debug;

use super::{Event, Events, socket};
use crate::core::spaces::mover::CallId;
use crate::replicated::Input;

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
    events: Events,
    open: BTreeMap<CallId, Call>,
}

impl Calls {
    pub(super) fn new(events: Events) -> Self {
        Self { events, open: BTreeMap::new() }
    }

    pub(super) fn call(&mut self, id: CallId, address: SocketAddr) {
        let (outgoing, queue) = mpsc::unbounded_channel();
        let events = self.events.clone();
        let task = tokio::task::spawn_local(async move {
            if let Err(error) = converse(id, address, queue, &events).await {
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

async fn converse(
    id: CallId,
    address: SocketAddr,
    mut queue: mpsc::UnboundedReceiver<BytesMut>,
    events: &Events,
) -> io::Result<()> {
    let stream: TcpStream = socket::connect(address).await?;
    let _ = events.send(Event::Called(Input::Reached(id))).await;
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
        }
        Ok(())
    };
    tokio::select! {
        ended = read => ended,
        ended = write => ended,
    }
}
