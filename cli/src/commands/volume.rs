//! `csnap volume …`

use std::path::Path;

use anyhow::Context;
use csnap_proto::message::operate::{Attachment, OperatorReply, OperatorRequest, Source, VolumeInfo};
use serde_json::{Value, json};

use super::{import, not_yet};
use crate::args::{Layout, Volume, VolumeCreate};
use crate::operator::{Session, unexpected};
use crate::{output, pool, size};

pub(crate) async fn run(dir: &Path, json: bool, command: Volume) -> anyhow::Result<()> {
    match command {
        Volume::Create(create) => self::create(dir, json, create).await,
        Volume::List => list(dir, json).await,
        Volume::Show { name } => {
            let volume = ask(dir, OperatorRequest::VolumeShow { name }).await?;
            show(json, &volume)
        }
        Volume::Rename { from, to } => done(dir, OperatorRequest::VolumeRename { from, to }).await,
        Volume::Delete { name } => done(dir, OperatorRequest::VolumeDelete { name }).await,
        Volume::Resize { .. } => not_yet("volume resize"),
        Volume::Flatten { .. } => not_yet("volume flatten"),
    }
}

async fn create(dir: &Path, json: bool, create: VolumeCreate) -> anyhow::Result<()> {
    if create.layout == Layout::Thin {
        return not_yet("thin volumes");
    }
    let volume = match (&create.origin, &create.from) {
        (Some(origin), _) => {
            let path = absolute(origin)?;
            request_create(dir, &create, create.size.unwrap_or(0), Source::Adopt { path }).await?
        }
        (None, Some(file)) => import::run(dir, &create, file).await?,
        (None, None) => {
            let size_bytes = create.size.context("clap requires --size here")?;
            request_create(dir, &create, size_bytes, Source::Empty).await?
        }
    };
    show(json, &volume)
}

async fn request_create(
    dir: &Path,
    create: &VolumeCreate,
    size_bytes: u64,
    source: Source,
) -> anyhow::Result<VolumeInfo> {
    let mut session = Session::open(dir).await?;
    let chunk = match create.chunk {
        Some(chunk) => chunk,
        None => pool::default_chunk(&session.agent).await?,
    };
    let name = create.name.clone();
    let reply = session.request(OperatorRequest::VolumeCreate { name, size_bytes, chunk, source }).await?;
    session.close().await;
    volume_of(reply)
}

/// The server and every client open the origin by this path.
fn absolute(path: &Path) -> anyhow::Result<String> {
    let path = path.canonicalize().with_context(|| format!("origin {}", path.display()))?;
    path.into_os_string().into_string().map_err(|path| anyhow::anyhow!("{} is not UTF-8", path.display()))
}

async fn ask(dir: &Path, request: OperatorRequest) -> anyhow::Result<VolumeInfo> {
    let mut session = Session::open(dir).await?;
    let reply = session.request(request).await?;
    session.close().await;
    volume_of(reply)
}

fn volume_of(reply: OperatorReply) -> anyhow::Result<VolumeInfo> {
    match reply {
        OperatorReply::Volume(volume) => Ok(volume),
        other => Err(unexpected(&other)),
    }
}

async fn done(dir: &Path, request: OperatorRequest) -> anyhow::Result<()> {
    let mut session = Session::open(dir).await?;
    session.done(request).await?;
    session.close().await;
    Ok(())
}

async fn list(dir: &Path, json: bool) -> anyhow::Result<()> {
    let mut session = Session::open(dir).await?;
    let volumes = session.volumes().await?;
    session.close().await;
    if json {
        return output::json(&volumes.iter().map(as_json).collect());
    }
    let row = |volume: &VolumeInfo| {
        vec![
            volume.name.to_string(),
            size::show(volume.size_bytes),
            size::show(volume.chunk.bytes()),
            volume.snapshots.to_string(),
            size::show(volume.store_bytes),
            attached_to(&volume.attached),
        ]
    };
    let rows: Vec<_> = volumes.iter().map(row).collect();
    output::print(&output::table(&["NAME", "SIZE", "CHUNK", "SNAPSHOTS", "STORE", "ATTACHED"], &rows))
}

fn show(json: bool, volume: &VolumeInfo) -> anyhow::Result<()> {
    if json {
        return output::json(&as_json(volume));
    }
    let mut rows = vec![
        ("name", volume.name.to_string()),
        ("size", size::show(volume.size_bytes)),
        ("layout", "in-place".to_owned()),
        ("chunk", size::show(volume.chunk.bytes())),
        ("snapshots", volume.snapshots.to_string()),
        ("store", size::show(volume.store_bytes)),
        ("attached", attached_to(&volume.attached)),
        ("head", head_of(volume)),
    ];
    rows.extend(volume.blocked.clone().map(|why| ("blocked", why)));
    let lines: Vec<_> = rows.iter().map(|(key, value)| format!("{key:<10} {value}\n")).collect();
    output::print(&lines.concat())
}

/// Who has it, in a word or two.
pub(crate) fn attached_to(attached: &[Attachment]) -> String {
    let one = |a: &Attachment| {
        let what = a.snapshot.as_ref().map(|snapshot| format!("@{snapshot} ")).unwrap_or_default();
        let lost = if a.present { "" } else { " (lost)" };
        format!("{what}{}:{}{lost}", a.node, a.pid)
    };
    if attached.is_empty() { "-".to_owned() } else { attached.iter().map(one).collect::<Vec<_>>().join(", ") }
}

fn head_of(volume: &VolumeInfo) -> String {
    let adopted = volume.head.adopted_path();
    adopted.map_or_else(|| format!("head/{}", volume.id.file_name()), str::to_owned)
}

/// A volume as scripts see it.
pub(crate) fn as_json(volume: &VolumeInfo) -> Value {
    json!({
        "id": volume.id.file_name(),
        "name": volume.name,
        "size_bytes": volume.size_bytes,
        "layout": "in-place",
        "chunk_bytes": volume.chunk.bytes(),
        "origin": volume.head.adopted_path(),
        "created_ms": volume.created.0,
        "snapshots": volume.snapshots,
        "epoch": volume.epoch.0,
        "store_bytes": volume.store_bytes,
        "attached": volume.attached.iter().map(attachment_json).collect::<Vec<_>>(),
        "blocked": volume.blocked,
    })
}

/// A session of a volume or snapshot as scripts see it.
pub(crate) fn attachment_json(a: &Attachment) -> Value {
    json!({
        "session": a.session.to_string(),
        "node": a.node,
        "pid": a.pid,
        "snapshot": a.snapshot,
        "present": a.present,
    })
}
