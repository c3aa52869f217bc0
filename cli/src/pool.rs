//! What a pool says of itself, which nothing else repeats: whether hosts share it, and its defaults.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use csnap_proto::ChunkSize;
use csnap_proto::message::local::{FromAgent, ToAgent};
use csnap_server::term::Pool;
use csnap_storage::posix::{Backend, PosixStorage};

use crate::agents;

/// Opens the pool at `path`, past the page cache if it says that hosts share it.
pub(crate) async fn open(path: &Path) -> anyhow::Result<Pool<PosixStorage>> {
    // The storage's futures are of one thread.
    let opening = csnap_server::shell::open_pool_at(path, Backend::Auto);
    let opened = tokio::task::LocalSet::new().run_until(opening).await;
    opened.with_context(|| format!("pool {}", path.display()))
}

/// Where the pool of the node is whose agent listens here.
pub(crate) async fn path_of(agent: &Path) -> anyhow::Result<PathBuf> {
    match agents::ask(agent, ToAgent::Pool, agents::ANSWER_WITHIN).await? {
        FromAgent::Pool { path } => Ok(path.into()),
        _ => bail!("the agent did not say where the pool is"),
    }
}

/// Chunk size of a volume that does not say.
pub(crate) async fn default_chunk(agent: &Path) -> anyhow::Result<ChunkSize> {
    let pool = open(&path_of(agent).await?).await?;
    ChunkSize::from_bytes(pool.toml.chunk_bytes).context("an open pool has a checked chunk size")
}
