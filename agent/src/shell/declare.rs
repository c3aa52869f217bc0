//! Tells the server who died, after making sure that their last I/O is gone.
//!
//! A writing exporter holds an exclusive lock on the file description that it writes a head through. The kernel gives
//! it up only when the last I/O through that description has returned, also I/O that outlives its process; so whoever
//! gets the lock knows. The server itself says which heads the dead had open for writing.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use csnap_proto::message::operate::{OperatorReply, OperatorRequest, RefusalKind, VolumeInfo};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::server::Caller;
use super::{Event, Events};
use crate::core::{ClientRun, Dead, Input};

/// Declarations that wait for the one in hand; the core repeats what does not fit.
const WAITING_MAX: usize = 64;

/// One declaration, from connecting to the answer.
const DECLARE_WITHIN: Duration = Duration::from_secs(5);

/// Between attempts to get the lock of a head whose I/O is still on its way.
const LOCK_AGAIN: Duration = Duration::from_millis(20);

/// One declaration at a time, on one operator session.
pub(super) struct Declarer {
    queue: mpsc::Sender<(Dead, String)>,
    events: Events,
}

impl Declarer {
    pub(super) fn start(mut caller: Caller, pool: PathBuf, events: Events) -> Self {
        let (queue, mut waiting) = mpsc::channel::<(Dead, String)>(WAITING_MAX);
        let report = events.clone();
        tokio::spawn(async move {
            while let Some((dead, tcp)) = waiting.recv().await {
                let result =
                    tokio::time::timeout(DECLARE_WITHIN, declare(&mut caller, &pool, dead, &tcp)).await;
                let done = match result.context("it took too long").and_then(|result| result) {
                    Ok(()) => true,
                    Err(error) => {
                        warn!("{dead:?} could not be declared dead, trying again: {error:#}");
                        false
                    }
                };
                let _ = report.send(Event::Input(Input::Declared { dead, done })).await;
            }
        });
        Self { queue, events }
    }

    pub(super) fn declare(&self, dead: Dead, tcp: String) {
        if self.queue.try_send((dead, tcp)).is_err() {
            let events = self.events.clone();
            tokio::spawn(async move {
                let _ = events.send(Event::Input(Input::Declared { dead, done: false })).await;
            });
        }
    }
}

async fn declare(caller: &mut Caller, pool: &Path, dead: Dead, tcp: &str) -> anyhow::Result<()> {
    let mut call = caller.call(tcp).await?;
    let request = match dead {
        Dead::Server { term } => OperatorRequest::ServerReaped { term },
        Dead::Client(run) => {
            let volumes = match caller.operate(&mut call, OperatorRequest::VolumeList).await? {
                Ok(OperatorReply::Volumes(volumes)) => volumes,
                Ok(_) => bail!("the server did not list its volumes"),
                Err(refusal) => bail!("{refusal}"),
            };
            let heads = heads_written_by(&volumes, caller.node(), run, pool);
            for head in heads {
                wait_for_last_io(head).await?;
            }
            OperatorRequest::Reaped { instance: run.instance }
        }
    };
    match caller.operate(&mut call, request).await? {
        Ok(_) => {
            info!("declared dead: {dead:?}");
            Ok(())
        }
        // It held nothing.
        Err(refusal) if refusal.kind == RefusalKind::NotFound => Ok(()),
        Err(refusal) => bail!("{refusal}"),
    }
}

/// Heads that the dead exporter had open for writing, as the server knows it.
fn heads_written_by(
    volumes: &[VolumeInfo],
    node: &csnap_proto::Name,
    run: ClientRun,
    pool: &Path,
) -> Vec<PathBuf> {
    let written = |volume: &&VolumeInfo| {
        let writes = |a: &csnap_proto::message::operate::Attachment| {
            a.snapshot.is_none() && a.node == *node && a.pid == run.process.pid
        };
        volume.attached.iter().any(writes)
    };
    let head = |volume: &VolumeInfo| match &volume.origin {
        Some(path) => PathBuf::from(path),
        None => pool.join("head").join(volume.id.file_name()),
    };
    volumes.iter().filter(written).map(head).collect()
}

/// Waits until the lock of a head can be had, and lets it go again.
async fn wait_for_last_io(head: PathBuf) -> anyhow::Result<()> {
    loop {
        let path = head.clone();
        let free = tokio::task::spawn_blocking(move || {
            let file = open(&path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => Ok(true),
                Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
                Err(error) => Err(error),
            }
        });
        match free.await? {
            Ok(true) => return Ok(()),
            Ok(false) => tokio::time::sleep(LOCK_AGAIN).await,
            // A head that does not exist has no I/O.
            Err(rustix::io::Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error).with_context(|| head.display().to_string()),
        }
    }
}
