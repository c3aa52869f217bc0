//! `csnap lockspace …`: asks the group of lockds that is found at `--at`, or else the one under `--dir`.
//!
//! A move is the source group's: this command starts it, watches it, and may be ended at any time.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::BytesMut;
use clap::{Args, Subcommand};
use csnap_proto::frame::{FrameDecoder, encode};
use csnap_proto::limits::GROUP_ADDRESSES_MAX;
use csnap_proto::message::lock::{FromLockd, SpaceReply, SpaceRequest, SpaceState, SpaceView, ToLockd, Way};
use csnap_proto::{Frame, MigrationId, Name, RequestId, Term};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::operator::draw;
use crate::{lockds, output};

/// One lockd: beyond, another one of its group is asked.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// A group without a leader elects one in a second.
const PATIENCE: Duration = Duration::from_secs(10);

/// Between two looks at what becomes of something.
const AGAIN: Duration = Duration::from_millis(50);

/// What to do with lockspaces, and where.
#[derive(Debug, Args)]
pub(crate) struct Lockspaces {
    /// Addresses of the group's lockds; without it the lockds under --dir.
    #[arg(long, global = true, value_delimiter = ',', value_name = "ADDR[,ADDR…]")]
    at: Vec<SocketAddr>,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the group's lockspaces.
    List,
    /// Make a lockspace.
    Create { name: Name },
    /// Move a lockspace to another group; its sessions, locks and keys go with it.
    Migrate {
        name: Name,
        /// Addresses of the other group's lockds.
        #[arg(long, required = true, value_delimiter = ',', value_name = "ADDR[,ADDR…]")]
        to: Vec<SocketAddr>,
    },
    /// Give a move up, unless the lockspace is forwarded already.
    Abort { name: Name },
    /// Serve a lockspace that came whole and whose source is gone for good.
    Activate {
        name: Name,
        /// You made sure that no lockd of the source will ever run again.
        #[arg(long)]
        source_is_lost: bool,
    },
    /// Forget a lockspace that came and is served by its source.
    Discard {
        name: Name,
        /// You saw that its source serves it.
        #[arg(long)]
        source_serves: bool,
    },
}

pub(crate) async fn run(dir: &Path, json: bool, command: Lockspaces) -> anyhow::Result<()> {
    let at = if command.at.is_empty() { addresses_under(dir)? } else { command.at };
    let done = |said: Value| if json { output::json(&said) } else { Ok(()) };
    match command.action {
        Action::List => {
            let all = list(&at).await?;
            if json { output::json(&all.iter().map(as_json).collect()) } else { output::print(&table(&all)) }
        }
        Action::Create { name } => {
            ask_done(&at, SpaceRequest::Create { name: name.clone() }).await?;
            done(json!({ "name": name }))
        }
        Action::Migrate { name, to } => migrate(&at, json, name, to).await,
        Action::Abort { name } => {
            ask_done(&at, SpaceRequest::Abort { name: name.clone() }).await?;
            done(json!({ "name": name }))
        }
        Action::Activate { name, source_is_lost } => {
            if !source_is_lost {
                bail!(
                    "lockspace {name} stays as it is: if its source still runs, two groups would serve it; make sure that it is gone for good, then add --source-is-lost"
                );
            }
            let migration = came_by(&at, &name).await?;
            ask_done(&at, SpaceRequest::Activate { name: name.clone(), migration }).await?;
            done(json!({ "name": name }))
        }
        Action::Discard { name, source_serves } => {
            if !source_serves {
                bail!(
                    "lockspace {name} stays as it is: if its source forwarded it, this is the only copy; see that its source serves it (csnap lockspace list --at SOURCE), then add --source-serves"
                );
            }
            let migration = came_by(&at, &name).await?;
            ask_done(&at, SpaceRequest::Discard { name: name.clone(), migration }).await?;
            done(json!({ "name": name }))
        }
    }
}

/// Starts the move, and watches it to its end.
#[allow(clippy::disallowed_methods, reason = "a person is told how long it took")]
async fn migrate(at: &[SocketAddr], json: bool, name: Name, to: Vec<SocketAddr>) -> anyhow::Result<()> {
    if to.len() > GROUP_ADDRESSES_MAX {
        bail!("--to has {} addresses; give at most {GROUP_ADDRESSES_MAX}", to.len());
    }
    // Before anybody is kept from their locks.
    let there = list(&to).await.context("the destination")?;
    if let Some(known) = there.iter().find(|space| space.name == name).filter(|space| !may_come(space)) {
        bail!(
            "the destination has a lockspace {name} ({}); move or discard that first, or use another group",
            state(known)
        );
    }
    let way = Way { migration: MigrationId(draw()?), to };
    let began = Instant::now();
    ask_done(at, SpaceRequest::Migrate { name: name.clone(), way: way.clone() }).await?;
    loop {
        let all = list(at)
            .await
            .with_context(|| format!("lockspace {name} is on its way; see csnap lockspace list"))?;
        let space = all.into_iter().find(|space| space.name == name);
        match space.as_ref().map(|space| &space.state) {
            Some(SpaceState::Forwarded { way: known, activated: true }) if *known == way => break,
            Some(SpaceState::Frozen(known) | SpaceState::Forwarded { way: known, .. }) if *known == way => {}
            _ => {
                let why = space.and_then(|space| space.trouble).unwrap_or_else(|| "it is gone".into());
                bail!("lockspace {name} did not move and goes on where it was: {why}");
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
    let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    if json { output::json(&json!({ "name": name, "to": way.to, "took_ms": took_ms })) } else { Ok(()) }
}

/// Nothing of it is there, or it moved away from there.
fn may_come(space: &SpaceView) -> bool {
    let empty = space.sessions == 0 && space.locks == 0 && space.term == Term(0);
    match space.state {
        SpaceState::Active => empty,
        SpaceState::Forwarded { activated, .. } => activated,
        SpaceState::Frozen(_) | SpaceState::Importing { .. } | SpaceState::Imported { .. } => false,
    }
}

/// The move that brought a lockspace that is not served yet.
async fn came_by(at: &[SocketAddr], name: &Name) -> anyhow::Result<MigrationId> {
    let all = list(at).await?;
    match all.iter().find(|space| space.name == *name).map(|space| &space.state) {
        Some(SpaceState::Imported { migration } | SpaceState::Importing { migration, .. }) => Ok(*migration),
        Some(_) => bail!("lockspace {name} is not on its way here; see csnap lockspace list"),
        None => bail!("there is no lockspace {name} here; see csnap lockspace list"),
    }
}

async fn list(at: &[SocketAddr]) -> anyhow::Result<Vec<SpaceView>> {
    match ask(at, SpaceRequest::List).await? {
        SpaceReply::Spaces(all) => Ok(all),
        SpaceReply::Refused { reason } => bail!("{reason}"),
        other => bail!("lockd answered another question: {other:?}"),
    }
}

async fn ask_done(at: &[SocketAddr], request: SpaceRequest) -> anyhow::Result<()> {
    match ask(at, request).await? {
        SpaceReply::Done => Ok(()),
        SpaceReply::Refused { reason } => bail!("{reason}"),
        other => bail!("lockd answered another question: {other:?}"),
    }
}

/// Asks one after the other until the leader answers. What is asked does nothing the second time.
async fn ask(at: &[SocketAddr], request: SpaceRequest) -> anyhow::Result<SpaceReply> {
    let asking = async {
        loop {
            for address in at {
                if let Ok(Ok(reply)) = tokio::time::timeout(ANSWER_WITHIN, ask_one(*address, &request)).await
                {
                    return reply;
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
    };
    tokio::time::timeout(PATIENCE, asking).await.map_err(|_| {
        let at: Vec<String> = at.iter().map(SocketAddr::to_string).collect();
        let (at, seconds) = (at.join(", "), PATIENCE.as_secs());
        anyhow::anyhow!("no lockd that leads answers at {at} in {seconds} s; is a majority of them running?")
    })
}

async fn ask_one(address: SocketAddr, request: &SpaceRequest) -> anyhow::Result<SpaceReply> {
    let lockds = lockds::over(&[address])?;
    let mut stream = lockds.connect_to(&address.into()).await.map_err(anyhow::Error::msg)?;
    let mut bytes = BytesMut::new();
    let id = RequestId(1);
    encode(&Frame { id, term: Term(0), message: ToLockd::Space(request.clone()) }, &mut bytes);
    stream.write_all(&bytes).await?;
    stream.flush().await?;
    let mut decoder = FrameDecoder::default();
    loop {
        while let Some(frame) = decoder.next::<FromLockd>()? {
            match frame.message {
                FromLockd::Space(reply) => return Ok(reply),
                FromLockd::Refused { reason } => return Ok(SpaceReply::Refused { reason }),
                _ => {}
            }
        }
        decoder.buffer().reserve(16 << 10);
        if stream.read_buf(decoder.buffer()).await? == 0 {
            bail!("it follows");
        }
    }
}

/// Where the lockds under a directory of `csnap up` listen.
fn addresses_under(dir: &Path) -> anyhow::Result<Vec<SocketAddr>> {
    let entries = std::fs::read_dir(dir).with_context(|| {
        format!("cannot read {}: say where the lockds are with --at, or start csnap up there", dir.display())
    })?;
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        let lockd = entry.file_name().to_str().is_some_and(|name| name.starts_with("lockd"));
        let published = std::fs::read_to_string(entry.path().join("data/address"));
        if let Ok(text) = published
            && lockd
        {
            found.extend(text.lines().filter_map(|line| line.parse::<SocketAddr>().ok()));
        }
    }
    if found.is_empty() {
        bail!("no lockd under {}: say where they are with --at", dir.display());
    }
    found.sort_unstable();
    Ok(found)
}

fn addresses(to: &[SocketAddr]) -> String {
    to.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(",")
}

fn state(space: &SpaceView) -> String {
    match &space.state {
        SpaceState::Active => "active".into(),
        SpaceState::Frozen(way) => format!("frozen, goes to {}", addresses(&way.to)),
        SpaceState::Importing { have, bytes, .. } => format!("importing, {have} of {bytes} bytes"),
        SpaceState::Imported { .. } => "imported, waits for its source".into(),
        SpaceState::Forwarded { way, activated: true } => format!("moved to {}", addresses(&way.to)),
        SpaceState::Forwarded { way, .. } => format!("forwarded to {}", addresses(&way.to)),
    }
}

fn table(all: &[SpaceView]) -> String {
    let row = |space: &SpaceView| {
        let trouble = space.trouble.as_ref().map_or(String::new(), |why| format!(" (last move: {why})"));
        let state = state(space) + &trouble;
        vec![
            space.name.to_string(),
            space.sessions.to_string(),
            space.locks.to_string(),
            space.term.to_string(),
            state,
        ]
    };
    let rows: Vec<_> = all.iter().map(row).collect();
    output::table(&["NAME", "SESSIONS", "LOCKS", "TERM", "STATE"], &rows)
}

fn as_json(space: &SpaceView) -> Value {
    let (word, to) = match &space.state {
        SpaceState::Active => ("active", None),
        SpaceState::Frozen(way) => ("frozen", Some(&way.to)),
        SpaceState::Importing { .. } => ("importing", None),
        SpaceState::Imported { .. } => ("imported", None),
        SpaceState::Forwarded { way, activated: true } => ("moved", Some(&way.to)),
        SpaceState::Forwarded { way, .. } => ("forwarded", Some(&way.to)),
    };
    json!({
        "name": space.name,
        "state": word,
        "to": to,
        "sessions": space.sessions,
        "locks": space.locks,
        "term": space.term.0,
        "trouble": space.trouble,
    })
}
