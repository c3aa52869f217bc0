//! `csnap pool create`: the one thing that is done to a pool before any daemon runs on it.

use std::path::Path;

use anyhow::Context;
use csnap_proto::PoolId;
use csnap_server::term::{PoolToml, create_pool};
use csnap_storage::posix::{PosixOptions, PosixStorage};
use serde_json::json;

use crate::args::Pool;
use crate::operator::draw;
use crate::output;

pub(crate) async fn run(json: bool, command: Pool) -> anyhow::Result<()> {
    let Pool::Create { path, shared } = command;
    let id = create(&path, shared).await.with_context(|| format!("pool {}", path.display()))?;
    if json { output::json(&json!({ "id": id.to_string(), "shared": shared })) } else { Ok(()) }
}

async fn create(path: &Path, shared: bool) -> anyhow::Result<PoolId> {
    std::fs::create_dir_all(path)?;
    let storage = PosixStorage::open(path, PosixOptions { shared, ..PosixOptions::default() })?;
    let wanted = PoolToml::new(PoolId(draw()?), shared);
    // The storage's futures are of one thread.
    let made = tokio::task::LocalSet::new().run_until(create_pool(&storage, &wanted)).await?;
    Ok(made.id())
}
