//! The exporter: `csnap export`, a node's NBD server in front of its volumes and snapshots.
//!
//! - [`mod@volumes`]: what can be attached, by name, and who shares an attachment;
//! - [`volume`]: one attachment as an [`crate::Export`];
//! - `agent`: what the node's agent is told.
//!
//! It is started by the agent and outlives it: NBD connections last over the end of any agent, server or lockd, and
//! requests wait meanwhile. It decides nothing about snapshots; that is the server's part.

mod agent;
pub mod volume;
pub mod volumes;

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use csnap_client::{ClientConfig, Operator, ServerSource};
use csnap_proto::{InstanceId, Name};
use tracing::info;

use self::volumes::Volumes;
use crate::shell::{Listener, serve};

/// Threads that serve connections: copying is what they do, and a client takes a core itself.
const WORKERS: usize = 2;

/// Threads that may wait for a disk: the depth that a disk makes use of.
const BLOCKING_THREADS_MAX: usize = 64;

/// What an exporter is started with.
#[derive(Clone, Debug)]
pub struct ExportConfig {
    /// Its node, for people.
    pub node: Name,
    /// The pool's directory on this node.
    pub pool: PathBuf,
    /// Other hosts use the pool too: I/O goes past the page cache.
    pub pool_shared: bool,
    /// The agent's unix socket.
    pub agent_sock: PathBuf,
    /// Unix socket to listen on.
    pub nbd_unix: PathBuf,
    /// TCP address to listen on, if any; port 0 takes a free one.
    pub nbd_tcp: Option<SocketAddr>,
    /// Bound of the cache of known-unique chunks, bytes a volume.
    pub unique_cache_bytes: usize,
}

/// The runtime that [`run`] is made for.
///
/// # Errors
/// When the kernel refuses threads or descriptors.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .enable_all()
        .build()
}

/// Serves until `shutdown`; then finishes what clients were promised, gives the volumes back, and returns. To be run on
/// [`runtime`].
///
/// # Errors
/// When a socket cannot be had: another exporter runs, or the path or address is taken.
pub async fn run(config: ExportConfig, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
    let mut listeners = vec![
        Listener::unix(&config.nbd_unix)
            .with_context(|| format!("cannot listen on {}", config.nbd_unix.display()))?,
    ];
    if let Some(address) = config.nbd_tcp {
        let listener = Listener::tcp(address)
            .with_context(|| format!("cannot listen on {address}; set another nbd_tcp, or end who has it"))?;
        listeners.push(listener);
    }
    let uris = listeners.iter().map(Listener::uri).collect::<Result<Vec<_>, _>>()?;
    info!(?uris, "listening");

    let instance = draw_instance()?;
    let volumes = Arc::new(volumes(&config, instance)?);
    let told = tokio::spawn(agent::converse(config.agent_sock, instance, uris, Arc::clone(&volumes)));
    serve(listeners, volumes, shutdown).await;
    told.abort();
    Ok(())
}

fn volumes(config: &ExportConfig, instance: InstanceId) -> anyhow::Result<Volumes> {
    let source = ServerSource::Agents(vec![config.agent_sock.clone()]);
    let operator = Operator::new(source.clone(), config.node.clone(), instance)?;
    let mut client = ClientConfig::new(source, config.pool.clone(), config.node.clone(), instance);
    client.shared = config.pool_shared;
    client.unique_cache_bytes = config.unique_cache_bytes;
    Ok(Volumes::new(client, operator))
}

fn draw_instance() -> anyhow::Result<InstanceId> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| anyhow::anyhow!("the kernel gives no random numbers: {error}"))?;
    Ok(InstanceId(bytes))
}
