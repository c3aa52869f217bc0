//! `csnap lockspace …`: lockspaces of a group of lockds, and their move to another.
//!
//! A move is the source group's: this command starts it, watches it, and may be ended at any time.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use csnap_lockd::client::Lockds;
use csnap_proto::limits::GROUP_ADDRESSES_MAX;
use csnap_proto::message::lock::{SpaceReply, SpaceRequest, SpaceState, SpaceView, Way};
use csnap_proto::{MigrationId, Name, Term};
use serde_json::{Value, json};

use crate::lockds::At;
use crate::operator::draw;
use crate::{group, lockds, output};

/// Between two looks at what becomes of something.
const AGAIN: Duration = Duration::from_millis(50);

/// What to do with lockspaces, and where.
#[derive(Debug, Args)]
#[command(mut_arg("lockd", |arg| arg.global(true).alias("at")))]
pub(crate) struct Lockspaces {
    #[command(flatten)]
    at: At,
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
    let lockds = &lockds::find(dir, &command.at)?;
    let done = |said: Value| if json { output::json(&said) } else { Ok(()) };
    match command.action {
        Action::List => {
            let all = list(lockds).await?;
            if json { output::json(&all.iter().map(as_json).collect()) } else { output::print(&table(&all)) }
        }
        Action::Create { name } => {
            ask_done(lockds, SpaceRequest::Create { name: name.clone() }).await?;
            done(json!({ "name": name }))
        }
        Action::Migrate { name, to } => migrate(lockds, json, name, to).await,
        Action::Abort { name } => {
            ask_done(lockds, SpaceRequest::Abort { name: name.clone() }).await?;
            done(json!({ "name": name }))
        }
        Action::Activate { name, source_is_lost } => {
            if !source_is_lost {
                bail!(
                    "lockspace {name} stays as it is: if its source still runs, two groups would serve it; make sure that it is gone for good, then add --source-is-lost"
                );
            }
            let migration = came_by(lockds, &name).await?;
            ask_done(lockds, SpaceRequest::Activate { name: name.clone(), migration }).await?;
            done(json!({ "name": name }))
        }
        Action::Discard { name, source_serves } => {
            if !source_serves {
                bail!(
                    "lockspace {name} stays as it is: if its source forwarded it, this is the only copy; see that its source serves it (csnap lockspace list --lockd SOURCE), then add --source-serves"
                );
            }
            let migration = came_by(lockds, &name).await?;
            ask_done(lockds, SpaceRequest::Discard { name: name.clone(), migration }).await?;
            done(json!({ "name": name }))
        }
    }
}

/// Starts the move, and watches it to its end.
#[allow(clippy::disallowed_methods, reason = "a person is told how long it took")]
async fn migrate(lockds: &Lockds, json: bool, name: Name, to: Vec<SocketAddr>) -> anyhow::Result<()> {
    if to.len() > GROUP_ADDRESSES_MAX {
        bail!("--to has {} addresses; give at most {GROUP_ADDRESSES_MAX}", to.len());
    }
    // Before anybody is kept from their locks.
    let destination = lockds::over(to.iter().copied().map(Into::into).collect())?;
    let there = list(&destination).await.context("the destination")?;
    if let Some(known) = there.iter().find(|space| space.name == name).filter(|space| !may_come(space)) {
        bail!(
            "the destination has a lockspace {name} ({}); move or discard that first, or use another group",
            state(known)
        );
    }
    let way = Way { migration: MigrationId(draw()?), to };
    let began = Instant::now();
    ask_done(lockds, SpaceRequest::Migrate { name: name.clone(), way: way.clone() }).await?;
    loop {
        let all = list(lockds)
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
async fn came_by(lockds: &Lockds, name: &Name) -> anyhow::Result<MigrationId> {
    let all = list(lockds).await?;
    match all.iter().find(|space| space.name == *name).map(|space| &space.state) {
        Some(SpaceState::Imported { migration } | SpaceState::Importing { migration, .. }) => Ok(*migration),
        Some(_) => bail!("lockspace {name} is not on its way here; see csnap lockspace list"),
        None => bail!("there is no lockspace {name} here; see csnap lockspace list"),
    }
}

async fn list(lockds: &Lockds) -> anyhow::Result<Vec<SpaceView>> {
    match group::request_space(lockds, SpaceRequest::List).await? {
        SpaceReply::Spaces(all) => Ok(all),
        other => bail!("lockd answered another question: {other:?}"),
    }
}

async fn ask_done(lockds: &Lockds, request: SpaceRequest) -> anyhow::Result<()> {
    match group::request_space(lockds, request).await? {
        SpaceReply::Done => Ok(()),
        other => bail!("lockd answered another question: {other:?}"),
    }
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
