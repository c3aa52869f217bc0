//! Connections to lockds of another group, which a lockspace moves to: this lockd is a client there.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::BytesMut;
use csnap_proto::Frame;
use csnap_proto::frame::{FrameDecoder, encode};
use csnap_proto::message::lock::{FromLockd, ToLockd};
use csnap_transport::{Address, Stream, Tls, Unreached};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::warn;

use super::{Event, Events, greeting, socket};
use crate::core::spaces::mover::{CallId, Lost};
use crate::replicated::Input;

/// One that did not greet by then is given up; another one of its group is called.
const REACH_WITHIN: Duration = Duration::from_secs(2);

/// Bytes read at once.
const READ_BYTES: usize = 16 << 10;

struct Call {
    to: SocketAddr,
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
    /// What was logged last: attempts follow each other closely.
    last_error: String,
}

impl Calls {
    pub(super) fn new(tls: Option<Tls>, events: Events) -> Self {
        Self { tls, events, open: BTreeMap::new(), last_error: String::new() }
    }

    pub(super) fn call(&mut self, id: CallId, address: SocketAddr) {
        let (outgoing, queue) = mpsc::unbounded_channel();
        let (tls, events) = (self.tls.clone(), self.events.clone());
        let task = tokio::task::spawn_local(async move {
            let lost = match converse(id, address, tls.as_ref(), queue, &events).await {
                Unreached::Away(why) => Lost::Away(why),
                Unreached::Refused(why) => Lost::Refused(why),
            };
            let _ = events.send(Event::Called(Input::Lost(id, lost))).await;
        });
        self.open.insert(id, Call { to: address, outgoing, task });
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

    /// It is gone by itself.
    pub(super) fn lost(&mut self, id: CallId, lost: &Lost) {
        let Some(Call { to, .. }) = self.open.remove(&id) else { return };
        let error = format!("lockd at {to}, for a lockspace that moves: {lost}");
        if error != self.last_error {
            warn!("{error}");
            self.last_error = error;
        }
    }
}

/// A lockd of a group that is another cluster.
async fn reach(address: SocketAddr, tls: Option<&Tls>) -> Result<Stream, Unreached> {
    let mut stream = socket::dial(&Address::Tcp(address), tls).await?;
    greeting::greet_lockd(&mut stream, None).await?;
    Ok(stream)
}

/// Until the connection ends, and why it did.
async fn converse(
    id: CallId,
    address: SocketAddr,
    tls: Option<&Tls>,
    mut queue: mpsc::UnboundedReceiver<BytesMut>,
    events: &Events,
) -> Unreached {
    let stream = match tokio::time::timeout(REACH_WITHIN, reach(address, tls)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(unreached)) => return unreached,
        Err(_) => return Unreached::Away("it does not answer in time".to_owned()),
    };
    let _ = events.send(Event::Called(Input::Called(id))).await;
    let (mut reader, mut writer) = stream.into_split();
    let read = async {
        let mut decoder = FrameDecoder::default();
        loop {
            match decoder.next::<FromLockd>() {
                Ok(Some(frame)) => {
                    let _ = events.send(Event::Called(Input::Heard(id, frame))).await;
                    continue;
                }
                Ok(None) => decoder.buffer().reserve(READ_BYTES),
                Err(error) => return Unreached::Away(error.to_string()),
            }
            match reader.read_buf(decoder.buffer()).await {
                Ok(0) => return Unreached::Away("it closed the connection".to_owned()),
                Ok(_) => {}
                Err(error) => return error.into(),
            }
        }
    };
    let write = async {
        while let Some(mut bytes) = queue.recv().await {
            writer.write_all_buf(&mut bytes).await?;
            writer.flush().await?;
        }
        std::io::Result::Ok(())
    };
    tokio::select! {
        ended = read => ended,
        ended = write => ended.map_or_else(Unreached::from, |()| Unreached::Away("it is not called any more".to_owned())),
    }
}
