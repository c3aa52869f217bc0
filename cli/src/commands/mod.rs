//! The operator's commands: each asks an agent or the server, and shows the answer.

mod attach;
pub(crate) mod cert;
mod check;
mod import;
pub(crate) mod lockd;
pub(crate) mod lockspace;
mod node;
mod pool;
mod server;
mod snapshot;
pub(crate) mod status;
pub(crate) mod volume;

pub(crate) use attach::uri as attach_uri;

use std::path::Path;

use anyhow::{Context, bail};

use crate::args::{Command, LockdUse, ServerUse};

/// Runs a command other than `up` and the daemons.
pub(crate) fn run(dir: &Path, json: bool, command: Command) -> anyhow::Result<()> {
    // Two threads: an import reads its file while the volume's own tasks go on.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.context("cannot start")?;
    let result = runtime.block_on(async {
        tokio::select! {
            result = dispatch(dir, json, command) => result,
            _ = tokio::signal::ctrl_c() => bail!("interrupted; what was asked for may still be done"),
        }
    });
    // Tasks that wait for nobody's answer must not hold the command up.
    runtime.shutdown_background();
    result
}

async fn dispatch(dir: &Path, json: bool, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Volume(volume) => volume::run(dir, json, volume).await,
        Command::Snapshot(snapshot) => snapshot::run(dir, json, snapshot).await,
        Command::Attach { target, device: None } => attach::run(dir, json, target).await,
        Command::Node(node) => node::run(dir, json, node).await,
        Command::Cert(cert) => cert::run(dir, json, cert),
        Command::Lockspace(lockspace) => lockspace::run(dir, json, lockspace).await,
        Command::Pool(pool) => pool::run(json, pool).await,
        Command::Server(server) => match server.usage() {
            Ok(ServerUse::Action(action)) => server::run(dir, json, action).await,
            Ok(ServerUse::Daemon(_)) | Err(_) => bail!("csnap server needs a command"),
        },
        Command::Lockd(lockd) => match lockd.usage() {
            Ok(LockdUse::Action(action)) => lockd::run(dir, json, action).await,
            Ok(LockdUse::Daemon(_)) | Err(_) => bail!("csnap lockd needs a command"),
        },
        Command::Status { watch } => status::run(dir, json, watch).await,
        Command::Check { pool, repair } => check::run(&pool, json, repair).await,
        Command::Clone { .. } => not_yet("clone"),
        Command::Diff { .. } => not_yet("diff"),
        Command::Attach { device: Some(_), .. } => not_yet("attach with a device"),
        Command::Detach { .. } => not_yet("detach"),
        Command::Lock(_) | Command::Kv(_) => bail!("it has a way of its own"),
        Command::Up(_) | Command::Agent(_) | Command::Export(_) => {
            bail!("a daemon is not a command")
        }
    }
}

/// A command whose name is taken and whose work is not built.
fn not_yet<T>(what: &str) -> anyhow::Result<T> {
    bail!("{what}: not yet; this version cannot do it")
}
