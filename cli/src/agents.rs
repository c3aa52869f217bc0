//! The agents under a directory: found by their sockets, asked one question each.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::BytesMut;
use csnap_proto::frame::{FrameDecoder, encode};
use csnap_proto::message::local::{AgentStatus, FromAgent, ToAgent};
use csnap_proto::{Frame, Name, RequestId, Term};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// An agent answers within 100 ms; one that takes this long is frozen.
pub(crate) const ANSWER_WITHIN: Duration = Duration::from_secs(1);

/// An agent gives a wish ten seconds.
pub(crate) const WISH_WITHIN: Duration = Duration::from_secs(15);

/// A node's agent, up or not.
#[derive(Clone, Debug)]
pub(crate) struct AgentSocket {
    pub(crate) path: PathBuf,
    /// Name of the node, if its directory says so.
    pub(crate) node: Option<Name>,
}

/// Every agent's socket under `dir`, in node order, up or not. `dir` may also be one node's own directory.
pub(crate) fn find(dir: &Path) -> anyhow::Result<Vec<AgentSocket>> {
    let entries = std::fs::read_dir(dir)
        .with_context(|| format!("cannot read {}: start csnap up there, or say --dir", dir.display()))?;
    let mut found = Vec::new();
    if dir.join("agent.sock").exists() {
        found.push(AgentSocket { path: dir.join("agent.sock"), node: None });
    }
    for entry in entries.flatten() {
        let is_node = entry.path().join("agent.toml").exists() || entry.path().join("agent.sock").exists();
        if let Some(node) = entry.file_name().to_str().and_then(|name| Name::new(name).ok())
            && is_node
        {
            found.push(AgentSocket { path: entry.path().join("agent.sock"), node: Some(node) });
        }
    }
    if found.is_empty() {
        bail!("{} has no agents: start csnap up there, or say --dir", dir.display());
    }
    found.sort_by_key(|agent| {
        let name = agent.node.as_ref().map(Name::as_str).unwrap_or_default().to_owned();
        (name.len(), name)
    });
    Ok(found)
}

/// One question, one answer, within `patience`.
pub(crate) async fn ask(socket: &Path, question: ToAgent, patience: Duration) -> anyhow::Result<FromAgent> {
    let conversation = async {
        let mut stream = UnixStream::connect(socket).await?;
        let id = RequestId(1);
        let mut bytes = BytesMut::new();
        encode(&Frame { id, term: Term(0), message: question }, &mut bytes);
        stream.write_all(&bytes).await?;
        let mut decoder = FrameDecoder::default();
        loop {
            while let Some(frame) = decoder.next::<FromAgent>()? {
                if frame.id == id {
                    return anyhow::Ok(frame.message);
                }
            }
            decoder.buffer().reserve(16 << 10);
            if stream.read_buf(decoder.buffer()).await? == 0 {
                bail!("it closed the connection");
            }
        }
    };
    let answer = tokio::time::timeout(patience, conversation).await;
    answer
        .map_err(|_| anyhow::anyhow!("no answer in {} s", patience.as_secs()))
        .and_then(|answer| answer)
        .with_context(|| format!("agent at {}", socket.display()))
}

/// The status of one agent.
pub(crate) async fn status(socket: &Path) -> anyhow::Result<AgentStatus> {
    match ask(socket, ToAgent::Status, ANSWER_WITHIN).await? {
        FromAgent::Status(status) => Ok(*status),
        _ => bail!("agent at {} answered another question", socket.display()),
    }
}

/// The first agent that answers, with its status.
pub(crate) async fn any(dir: &Path) -> anyhow::Result<(PathBuf, AgentStatus)> {
    let mut last = None;
    for agent in find(dir)? {
        match status(&agent.path).await {
            Ok(status) => return Ok((agent.path, status)),
            Err(error) => last = Some(error),
        }
    }
    let last = last.context("no agent")?;
    Err(last.context(format!("no agent under {} answers; is csnap up running there?", dir.display())))
}

/// A request that is done or not.
pub(crate) async fn wish(socket: &Path, wish: ToAgent) -> anyhow::Result<()> {
    match ask(socket, wish, WISH_WITHIN).await? {
        FromAgent::Done => Ok(()),
        FromAgent::Failed { reason } => bail!("{reason}"),
        _ => bail!("agent at {} answered another question", socket.display()),
    }
}
