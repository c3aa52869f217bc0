//! `csnap server show` and `csnap server move`.

use std::path::Path;

use csnap_proto::message::local::ToAgent;

use super::status;
use crate::args::ServerAction;
use crate::{agents, output};

pub(crate) async fn run(dir: &Path, json: bool, action: ServerAction) -> anyhow::Result<()> {
    match action {
        ServerAction::Show => {
            let gathered = status::gather(dir).await?;
            if json { output::json(&gathered.server_json()) } else { output::print(&gathered.server_line()) }
        }
        ServerAction::Move { node } => {
            let (socket, _) = agents::any(dir).await?;
            agents::wish(&socket, ToAgent::MoveServer { node }).await
        }
    }
}
