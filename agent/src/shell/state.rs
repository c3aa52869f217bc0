//! What the agent remembers over its own restart: one small file, replaced as a whole, and a lock against a second
//! agent on the same state.
//!
//! The file is synced: a power loss ends the processes that it names, but the server goes on holding their sessions, and
//! only who remembers them can declare them dead. So a run is in the file before it gets a way to the server. What
//! cannot be written is left to the operator's fence. A file that does not decode counts as none.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::warn;

use crate::core::SavedState;

/// First bytes of the file: what it is, and the version of what follows.
///
/// 1: the first.
const MAGIC: &[u8] = b"csnap agent state 1\n";

#[derive(Serialize, Deserialize)]
struct StateFile {
    boot: String,
    state: SavedState,
}

/// A state, counted, and the number of the first one that knew the same runs.
#[derive(Clone, Default)]
struct Latest {
    number: u64,
    runs_number: u64,
    state: Option<SavedState>,
}

/// Writes the latest state in the background.
pub(super) struct Saver {
    latest: watch::Sender<Latest>,
    /// Number of the state that was written last, or that could not be.
    tried: watch::Receiver<u64>,
    task: JoinHandle<()>,
    /// Held as long as the agent lives.
    _lock: File,
}

impl Saver {
    /// Locks the directory and reads what an earlier life left; the flag says whether it is of this boot.
    pub(super) fn open(dir: &Path) -> anyhow::Result<(Self, Option<SavedState>, bool)> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let lock = lock(&dir.join("agent.lock"))?;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let path = dir.join("agent.state");
        let found = match read(&path) {
            Ok(found) => found,
            Err(error) => {
                warn!("{}: {error}; starting without it", path.display());
                None
            }
        };
        let same_boot = found.as_ref().is_some_and(|file| file.boot == boot);
        let (latest, mut changes) = watch::channel(Latest::default());
        let (report, tried) = watch::channel(0);
        let task = tokio::spawn(async move {
            while changes.changed().await.is_ok() {
                let Latest { number, state, .. } = changes.borrow_and_update().clone();
                let Some(state) = state else { continue };
                let (path, boot) = (path.clone(), boot.clone());
                let written = tokio::task::spawn_blocking(move || write(&path, boot, state)).await;
                if let Ok(Err(error)) = written {
                    warn!("the agent's state cannot be saved: {error}; a restart will start anew");
                }
                report.send_replace(number);
            }
        });
        Ok((Self { latest, tried, task, _lock: lock }, found.map(|file| file.state), same_boot))
    }

    pub(super) fn save(&self, state: SavedState) {
        self.latest.send_modify(|latest| {
            latest.number += 1;
            let runs = |state: &SavedState| (state.exporter, state.writers.clone());
            if latest.state.as_ref().map(runs) != Some(runs(&state)) {
                latest.runs_number = latest.number;
            }
            latest.state = Some(state);
        });
    }

    /// What waits until every run that is known now is saved; none if they are. Nothing else is waited for, so a
    /// takeover is not held up by a slow disk.
    pub(super) fn runs_unsaved(&self) -> Option<impl Future<Output = ()> + Send + 'static> {
        let wanted = self.latest.borrow().runs_number;
        let mut tried = self.tried.clone();
        let unsaved = *tried.borrow() < wanted;
        unsaved.then_some(async move {
            // The writer is gone when the agent ends; then nobody is waiting.
            let _ = tried.wait_for(|number| *number >= wanted).await;
        })
    }

    /// Waits until the latest state is written.
    pub(super) async fn flush(self) {
        drop(self.latest);
        // The task ends when it has seen the last change; a panic in it was reported by the runtime.
        let _ = self.task.await;
    }
}

fn lock(path: &Path) -> anyhow::Result<File> {
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            bail!("{} is held: an agent runs on this state already; stop it first", path.display())
        }
        Err(error) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}

fn read(path: &Path) -> io::Result<Option<StateFile>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let body =
        bytes.strip_prefix(MAGIC).ok_or_else(|| io::Error::other("not an agent's state of this version"))?;
    postcard::from_bytes(body).map(Some).map_err(io::Error::other)
}

fn write(path: &PathBuf, boot: String, state: SavedState) -> io::Result<()> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(postcard::to_stdvec(&StateFile { boot, state }).map_err(io::Error::other)?);
    let new = path.with_extension("new");
    // The session's secret is in it.
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    std::fs::rename(new, path)?;
    let dir = path.parent().ok_or_else(|| io::Error::other("the state has no directory"))?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use csnap_proto::{EventNumber, InstanceId, Secret, SessionId, Term};

    use super::*;
    use crate::core::{ClientRun, Process};

    fn run(number: u8) -> ClientRun {
        ClientRun { instance: InstanceId([number; 16]), process: Process { pid: number.into(), started: 1 } }
    }

    fn state(exporter: Option<ClientRun>, writers: &[ClientRun]) -> SavedState {
        SavedState {
            session: SessionId([1; 16]),
            secret: Secret([2; 16]),
            last_event: EventNumber(0),
            priority: None,
            exporter,
            writers: writers.iter().copied().collect(),
            servers: Vec::new(),
            dead: BTreeSet::new(),
        }
    }

    #[tokio::test]
    async fn a_run_is_in_the_file_once_nothing_is_unsaved() {
        let dir = tempfile::tempdir().expect("a directory");
        let (saver, found, _) = Saver::open(dir.path()).expect("opens");
        assert!(found.is_none() && saver.runs_unsaved().is_none());
        for state in [state(Some(run(1)), &[]), state(Some(run(1)), &[run(2)])] {
            saver.save(state.clone());
            saver.runs_unsaved().expect("a new run").await;
            assert!(saver.runs_unsaved().is_none());
            let file = read(&dir.path().join("agent.state")).expect("reads").expect("is there");
            assert_eq!(file.state, state);
        }
        let mut served = state(Some(run(1)), &[run(2)]);
        served.servers.push((run(3).process, Term(4)));
        saver.save(served.clone());
        assert!(saver.runs_unsaved().is_none(), "a takeover waits for no disk");
        assert!(Saver::open(dir.path()).is_err(), "a second agent on the same state");
        saver.flush().await;
        let (_, found, same_boot) = Saver::open(dir.path()).expect("opens");
        assert_eq!((found, same_boot), (Some(served), true));
    }

    #[tokio::test]
    async fn a_state_that_cannot_be_written_holds_nobody_up() {
        let dir = tempfile::tempdir().expect("a directory");
        let (saver, ..) = Saver::open(dir.path()).expect("opens");
        std::fs::create_dir(dir.path().join("agent.new")).expect("in the way");
        saver.save(state(Some(run(1)), &[]));
        saver.runs_unsaved().expect("a new run").await;
        assert!(saver.runs_unsaved().is_none());
    }
}
