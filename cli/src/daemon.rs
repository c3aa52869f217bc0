//! The daemons: each reads its configuration once, and runs until a signal.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use csnap_agent::shell::Programs;
use csnap_agent::{Io, NodeConfig};
use csnap_lockd::shell::LockdConfig;
use csnap_nbd_export::ExportConfig;
use csnap_server::shell::ServerConfig;
use csnap_storage::posix::Backend;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

use crate::args::Daemon;
use crate::{pool, supervisor};

/// How long a snapshot create waits for the writer to drain.
const DRAIN_PATIENCE: Duration = Duration::from_secs(5);

/// Descriptors that every daemon asks for, as far as the hard limit goes: of an exporter, which needs the most, a
/// connection takes one and an attachment up to 64 arenas.
const DESCRIPTORS: u64 = 65_536;

/// `csnap agent`
pub(crate) fn agent(daemon: &Daemon) -> anyhow::Result<()> {
    let config = begin(daemon)?;
    let programs = Programs {
        // The server dies with its agent; the exporter does not, but with whoever supervises the agent.
        server: program("server", &daemon.config, Some(std::process::id()))?,
        exporter: program("export", &daemon.config, daemon.supervisor_pid)?,
    };
    block_on(async { csnap_agent::shell::run(config, programs, shutdown()?).await })
}

/// `csnap server --config`
pub(crate) fn server(daemon: &Daemon) -> anyhow::Result<()> {
    let config = begin(daemon)?;
    let config = ServerConfig {
        node: config.node,
        pool: config.pool,
        agent_sock: config.agent_sock,
        listen: config.server_listen,
        backend: backend(config.io),
        client_lease: Duration::from_millis(config.client_lease_ms),
        drain_patience: DRAIN_PATIENCE,
    };
    block_on(async { Box::pin(csnap_server::shell::run(config, shutdown()?)).await })
}

fn backend(io: Io) -> Backend {
    match io {
        Io::Auto => Backend::Auto,
        Io::Uring => Backend::Uring,
        Io::Threads => Backend::Threads,
    }
}

/// `csnap lockd`
pub(crate) fn lockd(daemon: &Daemon) -> anyhow::Result<()> {
    let text = read(daemon)?;
    let config = LockdConfig::parse(&text, &daemon.config)?;
    block_on(async { csnap_lockd::shell::run(config, shutdown()?).await })
}

/// `csnap export`
pub(crate) fn export(daemon: &Daemon) -> anyhow::Result<()> {
    let config = begin(daemon)?;
    let runtime = csnap_nbd_export::runtime().context("cannot start")?;
    let pool_shared = runtime.block_on(pool::open(&config.pool))?.toml.shared;
    let unique_cache_bytes = usize::try_from(config.unique_cache_bytes).context("unique_cache_bytes")?;
    let config = ExportConfig {
        node: config.node,
        pool: config.pool,
        pool_shared,
        agent_sock: config.agent_sock,
        nbd_unix: config.nbd_unix,
        nbd_tcp: config.nbd_tcp,
        unique_cache_bytes,
    };
    let result = runtime.block_on(async { csnap_nbd_export::run(config, shutdown()?).await });
    runtime.shutdown_background();
    result
}

/// What every daemon of a node does first, while it has one thread.
fn begin(daemon: &Daemon) -> anyhow::Result<NodeConfig> {
    Ok(NodeConfig::parse(&read(daemon)?, &daemon.config)?)
}

fn read(daemon: &Daemon) -> anyhow::Result<String> {
    start(daemon)?;
    std::fs::read_to_string(&daemon.config).with_context(|| daemon.config.display().to_string())
}

/// Ties the process to its supervisor, logs to stderr, and raises what it may have open.
fn start(daemon: &Daemon) -> anyhow::Result<()> {
    if let Some(supervisor) = daemon.supervisor_pid {
        supervisor::tie_to(supervisor)?;
    }
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    // What cannot be logged is dropped: to complain about it on the same stderr would end the process.
    let log = tracing_subscriber::fmt().with_env_filter(filter).log_internal_errors(false);
    log.with_writer(std::io::stderr).with_ansi(false).init();
    raise_descriptors();
    Ok(())
}

/// The soft limit of descriptors is made for programs that use `select`.
fn raise_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(DESCRIPTORS, |maximum| maximum.min(DESCRIPTORS));
    if limit.current.is_some_and(|current| current < wanted) {
        let raised = Rlimit { current: Some(wanted), maximum: limit.maximum };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            tracing::warn!("cannot raise the limit of open descriptors to {wanted}: {error}");
        }
    }
}

/// This very binary as another daemon.
fn program(daemon: &str, config: &Path, supervisor: Option<u32>) -> anyhow::Result<Vec<OsString>> {
    let config = config.canonicalize().with_context(|| config.display().to_string())?;
    let mut words: Vec<OsString> =
        vec![std::env::current_exe()?.into(), daemon.into(), "--config".into(), config.into()];
    words.extend(supervisor.into_iter().flat_map(|pid| ["--supervisor-pid".into(), pid.to_string().into()]));
    Ok(words)
}

fn block_on(daemon: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start")?;
    let result = runtime.block_on(daemon);
    runtime.shutdown_background();
    result
}

/// Done at the first SIGTERM or SIGINT.
fn shutdown() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
