//! `csnap node …`

use std::path::Path;

use anyhow::bail;
use csnap_proto::Name;
use csnap_proto::message::local::ToAgent;
use csnap_proto::message::operate::{Fenced, OperatorRequest};

use super::{not_yet, status};
use crate::args::{Node, Priority};
use crate::operator::Session;
use crate::{agents, output};

pub(crate) async fn run(dir: &Path, json: bool, command: Node) -> anyhow::Result<()> {
    match command {
        Node::List => {
            let gathered = status::gather(dir).await?;
            if json { output::json(&gathered.nodes_json()) } else { output::print(&gathered.nodes_table()) }
        }
        Node::Fence { node, fenced: false } => bail!(
            "node {node} keeps what it has attached: a lost node may still write; make sure that it cannot (power, storage), then add --fenced"
        ),
        Node::Fence { node, fenced: true } => fence(dir, node).await,
        Node::Priority { priority: Priority::Auto, .. } => not_yet("node priority auto"),
        Node::Priority { node, priority: Priority::Fixed(priority) } => {
            let (socket, _) = agents::any(dir).await?;
            agents::wish(&socket, ToAgent::SetPriority { node, priority }).await
        }
    }
}

/// The operator vouches for the node: its sessions end.
async fn fence(dir: &Path, node: Name) -> anyhow::Result<()> {
    let mut session = Session::open(dir).await?;
    session.done(OperatorRequest::Fence { whom: Fenced::Node(node) }).await?;
    session.close().await;
    Ok(())
}
