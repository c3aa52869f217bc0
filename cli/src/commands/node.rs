//! `csnap node …`

use std::path::Path;

use csnap_proto::message::local::ToAgent;

use super::{not_yet, status};
use crate::args::{Node, Priority};
use crate::{agents, output};

pub(crate) async fn run(dir: &Path, json: bool, command: Node) -> anyhow::Result<()> {
    match command {
        Node::List => {
            let gathered = status::gather(dir).await?;
            if json { output::json(&gathered.nodes_json()) } else { output::print(&gathered.nodes_table()) }
        }
        Node::Priority { priority: Priority::Auto, .. } => not_yet("node priority auto"),
        Node::Priority { node, priority: Priority::Fixed(priority) } => {
            let (socket, _) = agents::any(dir).await?;
            agents::wish(&socket, ToAgent::SetPriority { node, priority }).await
        }
    }
}
