//! `csnap lock …` and `csnap kv …`: lockd for people and scripts.
//!
//! Each command has a session of its own, which it closes at its end, however it ends. Files: `run` (a command on a held
//! lock), with `holding` (what is owed then), `command` and `guard` (its processes), `alarm`; `owned` (persistent locks) with
//! `owner` (their file); `show`, `watch`, `kv`; `session`, `obtain`, `interrupts`, `who`, `bytes` under all of them.

mod alarm;
mod bytes;
mod command;
mod guard;
mod holding;
mod interrupts;
mod kv;
mod obtain;
mod owned;
mod owner;
mod run;
mod session;
mod show;
mod watch;
mod who;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;

use self::owned::Request;
use self::session::Place;
use self::watch::What;
use crate::args::kv::{Kv, KvAction, KvWatch};
use crate::args::lock::{Lock, LockAction, LockWatch};
use crate::{lockds, output};

/// `csnap lock …`
pub(crate) fn run(dir: &Path, json: bool, lock: Lock) -> ExitCode {
    // A command of the user's has statuses of its own: csnap's failures must not look like them.
    let is_run = matches!(lock.action, LockAction::Run(_) | LockAction::Guard(_) | LockAction::Exec { .. });
    ended(block_on(dispatch(dir, json, lock)), if is_run { run::FAILED } else { 1 })
}

/// `csnap kv …`
pub(crate) fn run_kv(dir: &Path, json: bool, kv: Kv) -> ExitCode {
    let is_run = matches!(&kv.action, KvAction::Put(put) if put.ephemeral);
    ended(block_on(dispatch_kv(dir, json, kv)), if is_run { run::FAILED } else { 1 })
}

fn ended(result: anyhow::Result<u8>, failed: u8) -> ExitCode {
    ExitCode::from(result.unwrap_or_else(|error| {
        output::error(&error);
        failed
    }))
}

/// One thread: a command asks for a signal at the death of the thread that started it.
fn block_on(command: impl Future<Output = anyhow::Result<u8>>) -> anyhow::Result<u8> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start")?;
    let result = runtime.block_on(command);
    runtime.shutdown_background();
    result
}

async fn dispatch(dir: &Path, json: bool, Lock { at, space, action }: Lock) -> anyhow::Result<u8> {
    let action = match action {
        LockAction::Guard(guard) => return guard::guard(guard).await,
        LockAction::Exec { guard, command } => return guard::exec(guard, &command),
        action => action,
    };
    let place = &Place { lockds: lockds::find(dir, &at)?, space: space.space };
    let owned = |name, owned| Request { place, json, name, owned };
    match action {
        LockAction::Run(run) => return run::run(place, run).await,
        LockAction::Acquire { name, mode, owned: owner, patience } => {
            owned(name, owner).acquire(mode, &patience).await?;
        }
        LockAction::Convert { name, mode, owned: owner, value, patience } => {
            owned(name, owner).convert(mode, &value, &patience).await?;
        }
        LockAction::Release { name, owned: owner, value } => owned(name, owner).release(&value).await?,
        LockAction::List { orphans } => show::list(place, json, orphans).await?,
        LockAction::Show { name } => show::show(place, json, name).await?,
        LockAction::Watch(LockWatch { name, key, prefix, members: _ }) => {
            let what = name.map(What::Lock).or(key.map(What::Key)).or(prefix.map(What::Prefix));
            watch::watch(place, json, what.unwrap_or(What::Members)).await?;
        }
        LockAction::Break { lock } => show::break_lock(place, json, lock).await?,
        LockAction::Guard(_) | LockAction::Exec { .. } => unreachable!("seen above"),
    }
    Ok(0)
}

async fn dispatch_kv(dir: &Path, json: bool, Kv { at, space, action }: Kv) -> anyhow::Result<u8> {
    let place = &Place { lockds: lockds::find(dir, &at)?, space: space.space };
    match action {
        KvAction::Get { key } => kv::get(place, json, key).await?,
        KvAction::Put(put) => return kv::put(place, json, put).await,
        KvAction::Delete { key, if_version } => kv::delete(place, json, key, if_version).await?,
        KvAction::List { prefix } => kv::list(place, json, prefix).await?,
        KvAction::Watch(KvWatch { key, prefix }) => {
            let what =
                key.map(What::Key).or(prefix.map(What::Prefix)).context("clap sees that there is one")?;
            watch::watch(place, json, what).await?;
        }
    }
    Ok(0)
}
