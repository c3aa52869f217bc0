//! `csnap check`: the offline verifier.

use std::path::Path;

use super::not_yet;

pub(crate) async fn run(_pool: &Path, _json: bool, _repair: bool) -> anyhow::Result<()> {
    not_yet("check")
}
