//! What the node's agent is told: that we run, what we listen on, what is attached. The agent may go and another come at any
//! time; nothing here is in the way of any request.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use csnap_proto::frame::{self, FrameDecoder};
use csnap_proto::message::local::{FromAgent, ToAgent};
use csnap_proto::{Frame, InstanceId, RequestId, Term};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tracing::debug;

use super::volumes::Volumes;

/// Pause before the agent is tried again: a new one waits a few of these for a running exporter before it starts another.
const RECONNECT_PAUSE: Duration = Duration::from_millis(50);

/// Talks to one agent after the other, for ever.
pub(super) async fn converse(agent: PathBuf, instance: InstanceId, nbd: Vec<String>, volumes: Arc<Volumes>) {
    loop {
        let hello = ToAgent::ExporterHello { instance, pid: std::process::id(), nbd: nbd.clone() };
        match converse_once(&agent, hello, &volumes).await {
            Ok(never) => match never {},
            Err(error) => debug!("no agent at {}: {error}", agent.display()),
        }
        tokio::time::sleep(RECONNECT_PAUSE).await;
    }
}

/// Talks to the agent until it is gone.
async fn converse_once(
    agent: &Path,
    hello: ToAgent,
    volumes: &Volumes,
) -> io::Result<std::convert::Infallible> {
    let mut stream = UnixStream::connect(agent).await?;
    debug!("found the agent");
    let mut decoder = FrameDecoder::default();
    say(&mut stream, RequestId(0), hello).await?;
    say(&mut stream, RequestId(0), report(volumes)).await?;
    loop {
        tokio::select! {
            () = volumes.changed() => say(&mut stream, RequestId(0), report(volumes)).await?,
            heard = hear(&mut stream, &mut decoder) => {
                let Frame { id, message, .. } = heard?;
                match message {
                    FromAgent::ReportPlease => say(&mut stream, id, report(volumes)).await?,
                    FromAgent::ServerReady { term } => volumes.server_serves(term),
                    other => debug!(?other, "not for an exporter"),
                }
            }
        }
    }
}

fn report(volumes: &Volumes) -> ToAgent {
    ToAgent::ExporterReport { clients: volumes.report() }
}

async fn say(stream: &mut UnixStream, id: RequestId, message: ToAgent) -> io::Result<()> {
    let mut bytes = BytesMut::new();
    frame::encode(&Frame { id, term: Term(0), message }, &mut bytes);
    stream.write_all(&bytes).await
}

/// The next message. Loses nothing when it is dropped halfway: what arrived stays in the decoder.
async fn hear(stream: &mut UnixStream, decoder: &mut FrameDecoder) -> io::Result<Frame<FromAgent>> {
    loop {
        if let Some(frame) = decoder.next().map_err(io::Error::other)? {
            return Ok(frame);
        }
        if stream.read_buf(decoder.buffer()).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}
