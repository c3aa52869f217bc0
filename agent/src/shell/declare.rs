//! Tells the server who died, after making sure that their last I/O is gone.
//!
//! A writing exporter holds an exclusive lock on the file description that it writes a head through, and a serving server
//! one on its gate. The kernel gives a lock up only when the last I/O through that description has returned, also I/O
//! that outlives its process; so whoever gets the lock knows. The server itself says which heads the dead had open for
//! writing.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use csnap_proto::message::operate::{OperatorReply, OperatorRequest, RefusalKind, VolumeInfo};
use csnap_proto::{InstanceId, Term};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::io::Errno;
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::server::Caller;
use super::{Event, Events};
use crate::core::{Dead, Input};

/// Declarations that wait for the one in hand; the core repeats what does not fit.
const WAITING_MAX: usize = 64;

/// One declaration, from connecting to the answer.
const DECLARE_WITHIN: Duration = Duration::from_secs(5);

/// Between attempts to get the lock of a file whose I/O is still on its way.
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
        Dead::Server { term } => {
            wait_for_last_io(gate_of(pool, term)).await?;
            OperatorRequest::ServerReaped { term }
        }
        Dead::Client(run) => {
            let mut after = None;
            loop {
                let request = OperatorRequest::VolumeList { after };
                let (rows, more) = match caller.operate(&mut call, request).await? {
                    Ok(OperatorReply::Volumes { rows, more }) => (rows, more),
                    Ok(_) => bail!("the server did not list its volumes"),
                    Err(refusal) => bail!("{refusal}"),
                };
                for head in heads_written_by(&rows, run.instance, pool) {
                    wait_for_last_io(head).await?;
                }
                after = rows.last().map(|last| last.name.clone());
                if !more || after.is_none() {
                    break;
                }
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

/// A file that the dead held a lock on.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    path: PathBuf,
    /// That it is not there proves that it has no I/O: only we make and delete such files.
    ours: bool,
}

/// A term without a gate never served.
fn gate_of(pool: &Path, term: Term) -> Held {
    Held { path: pool.join("term").join(term.to_string()).join("gate"), ours: true }
}

/// Heads that the dead run had open for writing, as the server knows it: those of the very sessions that the server
/// ends when it is told.
fn heads_written_by(volumes: &[VolumeInfo], dead: InstanceId, pool: &Path) -> Vec<Held> {
    let written =
        |volume: &&VolumeInfo| volume.attached.iter().any(|a| a.snapshot.is_none() && a.instance == dead);
    let head = |volume: &VolumeInfo| match &volume.origin {
        Some(path) => Held { path: PathBuf::from(path), ours: false },
        None => Held { path: pool.join("head").join(volume.id.file_name()), ours: true },
    };
    volumes.iter().filter(written).map(head).collect()
}

/// Waits until the lock of a file can be had.
async fn wait_for_last_io(held: Held) -> anyhow::Result<()> {
    loop {
        let looked = held.clone();
        if tokio::task::spawn_blocking(move || is_free(&looked)).await?? {
            return Ok(());
        }
        tokio::time::sleep(LOCK_AGAIN).await;
    }
}

/// Whether the lock of a file can be had; it is let go again at once.
fn is_free(held: &Held) -> anyhow::Result<bool> {
    let shown = held.path.display();
    let file = match open(&held.path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty()) {
        Err(Errno::NOENT) if held.ours => return Ok(true),
        Err(Errno::NOENT) => {
            bail!(
                "{shown} is missing, so I/O to it may still be on its way; put it back, or fence the session"
            )
        }
        file => file.with_context(|| format!("cannot open {shown}"))?,
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot lock {shown}")),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use csnap_proto::message::operate::Attachment;
    use csnap_proto::{ChunkSize, Epoch, Name, SessionId, VolumeId, WallMillis};

    use super::*;

    #[test]
    fn a_server_is_dead_only_when_the_lock_of_its_gate_can_be_had() {
        let pool = tempfile::tempdir().expect("a directory");
        let gate = gate_of(pool.path(), Term(7));
        assert!(is_free(&gate).expect("it never served"));
        std::fs::create_dir_all(gate.path.parent().expect("in a directory")).expect("fresh");
        let server = File::create(&gate.path).expect("fresh");
        flock(&server, FlockOperation::NonBlockingLockExclusive).expect("fresh");
        let in_flight = server.try_clone().expect("one more handle");
        assert!(!is_free(&gate).expect("looks"));
        drop(server);
        assert!(!is_free(&gate).expect("looks"), "its last I/O is still on its way");
        drop(in_flight);
        assert!(is_free(&gate).expect("looks"));
        assert!(is_free(&gate).expect("looks"), "looking holds nothing");
    }

    #[test]
    fn a_missing_origin_proves_nothing_and_a_missing_head_of_the_pool_does() {
        let pool = tempfile::tempdir().expect("a directory");
        let path = pool.path().join("gone");
        assert!(is_free(&Held { path: path.clone(), ours: true }).expect("looks"));
        let error = is_free(&Held { path, ours: false }).expect_err("nobody knows");
        assert!(error.to_string().contains("put it back"), "{error}");
    }

    #[test]
    fn the_heads_of_exactly_the_sessions_that_end_are_looked_at() {
        let dead = InstanceId([1; 16]);
        let snapshot = || Some(Name::new("snap").expect("a name"));
        let volume = |id, origin: Option<&str>, attached: &[(InstanceId, Option<Name>)]| VolumeInfo {
            id: VolumeId(id),
            name: Name::new("demo").expect("a name"),
            size_bytes: 1 << 20,
            chunk: ChunkSize::MIN,
            origin: origin.map(str::to_owned),
            created: WallMillis(0),
            snapshots: 0,
            epoch: Epoch(1),
            store_bytes: 0,
            attached: attached
                .iter()
                .map(|(instance, snapshot)| Attachment {
                    session: SessionId([0; 16]),
                    instance: *instance,
                    node: Name::new("renamed").expect("a name"),
                    pid: 1,
                    snapshot: snapshot.clone(),
                    present: false,
                })
                .collect(),
            blocked: None,
        };
        let other = InstanceId([2; 16]);
        let volumes = [
            volume(1, None, &[(dead, None)]),
            volume(2, None, &[(dead, snapshot()), (other, None)]),
            volume(3, Some("/dev/disk"), &[(other, snapshot()), (dead, None)]),
            volume(4, None, &[]),
        ];
        let expected = [
            Held { path: Path::new("/pool/head").join(VolumeId(1).file_name()), ours: true },
            Held { path: PathBuf::from("/dev/disk"), ours: false },
        ];
        assert_eq!(heads_written_by(&volumes, dead, Path::new("/pool")), expected);
    }
}
