//! `csnap attach`: where a volume or snapshot is to be had over NBD.

use std::path::Path;

use anyhow::Context;
use csnap_proto::Target;
use csnap_proto::message::operate::OperatorRequest;
use serde_json::json;

use crate::operator::Session;
use crate::{agents, output};

pub(crate) async fn run(dir: &Path, json: bool, target: Target) -> anyhow::Result<()> {
    let mut session = Session::open(dir).await?;
    let request = match &target.snapshot {
        None => OperatorRequest::VolumeShow { name: target.volume.clone() },
        Some(_) => OperatorRequest::SnapshotShow { target: target.clone() },
    };
    session.request(request).await?;
    let status = agents::status(&session.agent).await?;
    session.close().await;
    let own = status.nodes.into_iter().find(|node| node.node == status.node);
    let bases = own.map(|node| node.info.nbd).unwrap_or_default();
    let uris: Vec<_> = bases.iter().map(|base| uri(base, &target)).collect();
    let first = uris
        .first()
        .with_context(|| format!("node {} has no exporter up; see csnap status and its log", status.node))?;
    if json {
        output::json(&json!({ "uri": first, "uris": uris }))
    } else {
        output::print(&format!("{first}\n"))
    }
}

/// The URI of one export, from that of its exporter.
pub(crate) fn uri(base: &str, target: &Target) -> String {
    let (address, query) = match base.split_once('?') {
        Some((address, query)) => (address, format!("?{query}")),
        None => (base, String::new()),
    };
    let slash = if address.ends_with('/') { "" } else { "/" };
    format!("{address}{slash}{target}{query}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_goes_before_the_query() {
        let target = "demo@a".parse().expect("a target");
        for (base, full) in [
            ("nbd://127.0.0.1:10809", "nbd://127.0.0.1:10809/demo@a"),
            ("nbd://127.0.0.1:10809/", "nbd://127.0.0.1:10809/demo@a"),
            ("nbd+unix:///?socket=/d/n1/nbd.sock", "nbd+unix:///demo@a?socket=/d/n1/nbd.sock"),
        ] {
            assert_eq!(uri(base, &target), full);
        }
    }
}
