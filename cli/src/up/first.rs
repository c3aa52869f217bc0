//! From the start of the daemons to the moment when volumes can be had.

use std::time::Duration;

use anyhow::Context;
use csnap_proto::message::local::ServerState;
use csnap_proto::message::operate::{OperatorRequest, Source};

use super::layout::{Layout, NodeDir, first_volume};
use crate::operator::Session;
use crate::{agents, pool};

/// Size of the first volume: enough to play with, nothing until it is written.
const FIRST_VOLUME_BYTES: u64 = 1 << 30;

/// Between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// After this long, and then as often, a person is told what is waited for.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// Exporters are waited for this long; one that does not come up is told in its log, and started again.
const EXPORTERS_WITHIN: Duration = Duration::from_secs(10);

/// Waits for a server that serves, and says what is missing.
pub(super) async fn wait_for_server(layout: &Layout) -> anyhow::Result<()> {
    let mut tell_at = tokio::time::Instant::now() + TELL_EVERY;
    loop {
        let mut why = "the agents do not answer yet".to_owned();
        for node in &layout.nodes {
            let Ok(status) = agents::status(&node.config.agent_sock).await else { continue };
            if status.server.is_some_and(|server| server.state == ServerState::Ready) {
                return Ok(());
            }
            why = status.vacancy.unwrap_or(why);
        }
        if tokio::time::Instant::now() >= tell_at {
            tell_at += TELL_EVERY;
            eprintln!("csnap: waiting for a server: {why}; the logs are in the nodes' directories");
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Makes the first volume, once in the life of a directory. Says whether it is there.
pub(super) async fn make_volume(layout: &Layout) -> anyhow::Result<bool> {
    let node = layout.nodes.first().context("there is a node")?;
    let mut session = Session::through(node.config.agent_sock.clone(), node.config.node.clone())?;
    let name = first_volume();
    let mut there = session.request(OperatorRequest::VolumeShow { name: name.clone() }).await.is_ok();
    if !layout.first_volume_made() {
        if !there {
            let chunk = pool::default_chunk(&node.config.agent_sock).await?;
            let (size_bytes, source) = (FIRST_VOLUME_BYTES, Source::Empty);
            let create = OperatorRequest::VolumeCreate { name, size_bytes, chunk, source };
            session.request(create).await.context("the first volume")?;
            there = true;
        }
        layout.remember_first_volume()?;
    }
    session.close().await;
    Ok(there)
}

/// Waits until every exporter listens, within reason.
pub(super) async fn wait_for_exporters(layout: &Layout) {
    let waiting = async {
        for node in &layout.nodes {
            while !listens(node).await {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        }
    };
    if tokio::time::timeout(EXPORTERS_WITHIN, waiting).await.is_err() {
        eprintln!("csnap: not every exporter is up yet; see csnap node list and the logs");
    }
}

async fn listens(node: &NodeDir) -> bool {
    let Ok(status) = agents::status(&node.config.agent_sock).await else { return false };
    status.nodes.iter().any(|other| other.node == status.node && !other.info.nbd.is_empty())
}
