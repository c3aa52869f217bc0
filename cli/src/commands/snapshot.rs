//! `csnap snapshot …`

use std::path::Path;

use csnap_proto::message::operate::{OperatorReply, OperatorRequest, SnapshotInfo};
use csnap_proto::{Name, RequestToken};
use serde_json::{Value, json};

use super::not_yet;
use super::volume::{attached_to, attachment_json};
use crate::args::{Snapshot, SnapshotName};
use crate::operator::{Session, draw, unexpected};
use crate::{output, size};

pub(crate) async fn run(dir: &Path, json: bool, command: Snapshot) -> anyhow::Result<()> {
    let request = match command {
        Snapshot::Create { targets } => return create(dir, json, targets).await,
        Snapshot::List { volume } => return list(dir, json, volume).await,
        Snapshot::Show { target } => return show(dir, json, target).await,
        Snapshot::Delete { targets, force } => return delete(dir, targets, force).await,
        Snapshot::Rename { target, to } => OperatorRequest::SnapshotRename { target: target.0, to },
        Snapshot::Rollback { .. } => return not_yet("snapshot rollback"),
        Snapshot::Priority { .. } => return not_yet("snapshot priority"),
    };
    let mut session = Session::open(dir).await?;
    session.done(request).await?;
    session.close().await;
    Ok(())
}

/// One after another; the first that is refused ends it, and those before it stay.
async fn create(dir: &Path, json: bool, targets: Vec<SnapshotName>) -> anyhow::Result<()> {
    let mut session = Session::open(dir).await?;
    for SnapshotName(target) in targets {
        let token = RequestToken(draw()?);
        let reply = session.request(OperatorRequest::SnapshotCreate { target, token }).await?;
        let OperatorReply::Snapshot(snapshot) = reply else { return Err(unexpected(&reply)) };
        if json {
            output::json(&as_json(&snapshot))?;
        }
    }
    session.close().await;
    Ok(())
}

/// One after another, as with create.
async fn delete(dir: &Path, targets: Vec<SnapshotName>, force: bool) -> anyhow::Result<()> {
    let mut session = Session::open(dir).await?;
    for SnapshotName(target) in targets {
        session.done(OperatorRequest::SnapshotDelete { target, force }).await?;
    }
    session.close().await;
    Ok(())
}

async fn list(dir: &Path, json: bool, volume: Option<Name>) -> anyhow::Result<()> {
    let mut session = Session::open(dir).await?;
    let mut all = Vec::new();
    loop {
        let last = all.last().map(|s: &SnapshotInfo| (s.target.volume.clone(), s.epoch));
        let request = OperatorRequest::SnapshotList { volume: volume.clone(), after: last };
        let reply = session.request(request).await?;
        let OperatorReply::Snapshots { rows, more } = reply else { return Err(unexpected(&reply)) };
        let over = !more || rows.is_empty();
        all.extend(rows);
        if over {
            break;
        }
    }
    session.close().await;
    if json {
        return output::json(&all.iter().map(as_json).collect());
    }
    let row = |s: &SnapshotInfo| {
        vec![s.target.to_string(), size::show(s.size_bytes), size::show(s.own_bytes), attached_to(&s.readers)]
    };
    output::print(&output::table(
        &["NAME", "SIZE", "OWN", "READERS"],
        &all.iter().map(row).collect::<Vec<_>>(),
    ))
}

async fn show(dir: &Path, json: bool, target: SnapshotName) -> anyhow::Result<()> {
    let mut session = Session::open(dir).await?;
    let reply = session.request(OperatorRequest::SnapshotShow { target: target.0 }).await?;
    session.close().await;
    let OperatorReply::Snapshot(snapshot) = reply else { return Err(unexpected(&reply)) };
    if json {
        return output::json(&as_json(&snapshot));
    }
    let rows = [
        ("name", snapshot.target.to_string()),
        ("size", size::show(snapshot.size_bytes)),
        ("own", size::show(snapshot.own_bytes)),
        ("readers", attached_to(&snapshot.readers)),
    ];
    output::print(&rows.map(|(key, value)| format!("{key:<10} {value}\n")).concat())
}

/// A snapshot as scripts see it.
fn as_json(snapshot: &SnapshotInfo) -> Value {
    json!({
        "name": snapshot.target.to_string(),
        "volume": snapshot.target.volume,
        "snapshot": snapshot.target.snapshot,
        "epoch": snapshot.epoch.0,
        "size_bytes": snapshot.size_bytes,
        "created_ms": snapshot.created.0,
        "own_bytes": snapshot.own_bytes,
        "readers": snapshot.readers.iter().map(attachment_json).collect::<Vec<_>>(),
    })
}
