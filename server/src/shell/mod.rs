//! The daemon around the core: `csnap server`.
//!
//! One thread, one runtime. It connects to its agent, follows the journal as a standby, and, once anointed, takes over
//! and serves. It moves events and decides nothing. It ends when its agent goes, when its gate is closed, when storage
//! fails it, or when it is told to; whatever the reason, what is durable is all that matters.

mod closings;
mod connection;
mod link;
mod serve;
mod standby;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use csnap_proto::{Name, Time, WallMillis};
use csnap_storage::posix::{Backend, PosixOptions, PosixStorage};

use crate::core::Config as CoreConfig;
use crate::term::{Pool, PoolError, open_pool};

/// What a server is started with.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Its node: for people, and what its term is recorded with.
    pub node: Name,
    /// The pool's directory.
    pub pool: PathBuf,
    /// Its agent's socket.
    pub agent_sock: PathBuf,
    /// Where clients connect; port 0 takes a free one.
    pub listen: SocketAddr,
    /// How files are read and written.
    pub backend: Backend,
    /// A client that is silent for so long is counted absent.
    pub client_lease: Duration,
    /// How long a snapshot create waits for the writer to drain.
    pub drain_patience: Duration,
}

/// Runs until there is nothing more to do: drained, deposed, told to stop, or the agent is gone.
///
/// # Errors
/// When storage fails, the pool cannot be used, or the agent cannot be reached.
pub async fn run(config: ServerConfig, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
    let local = tokio::task::LocalSet::new();
    let all = async {
        tokio::select! {
            result = serve_node(&config) => result,
            () = shutdown => Ok(()),
        }
    };
    local.run_until(all).await
}

async fn serve_node(config: &ServerConfig) -> anyhow::Result<()> {
    let listener = connection::listen(config.listen)
        .with_context(|| format!("cannot listen on {}; set another server_listen", config.listen))?;
    let address = listener.local_addr()?;
    let (mut link, orders) = link::connect(&config.agent_sock, address).await?;
    let pool = open_pool_at(&config.pool, config.backend).await;
    let pool = pool.with_context(|| format!("cannot open the pool {}", config.pool.display()))?;
    let anointed = Box::pin(standby::stand_by(&pool, &listener, &mut link, orders)).await?;
    let Some((taken, orders)) = anointed else { return Ok(()) };
    let core = CoreConfig {
        client_lease: config.client_lease,
        drain_patience: config.drain_patience,
        ..CoreConfig::of(config.node.clone())
    };
    serve::serve(core, pool, taken, listener, link, orders).await
}

/// Opens the pool in a directory as its own `pool.toml` wants it: buffered, or past this host's page cache where other
/// hosts see it. Whoever reads a pool opens it here.
///
/// # Errors
/// It cannot be read, or is none.
pub async fn open_pool_at(path: &Path, backend: Backend) -> Result<Pool<PosixStorage>, PoolError> {
    let pool = open_pool(&PosixStorage::open(path, PosixOptions { backend, shared: false })?).await?;
    if !pool.toml.shared {
        return Ok(pool);
    }
    open_pool(&PosixStorage::open(path, PosixOptions { backend, shared: true })?).await
}

/// The machine's monotonic clock, which also counts while it is suspended.
fn now() -> Time {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).expect("the machine booted in the past");
    Time(seconds * 1_000_000 + u64::try_from(time.tv_nsec).expect("within a second") / 1000)
}

/// Wall time, for people.
fn wall() -> WallMillis {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    WallMillis(seconds * 1000 + u64::try_from(time.tv_nsec).unwrap_or(0) / 1_000_000)
}
