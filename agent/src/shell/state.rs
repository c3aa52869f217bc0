//! What the agent remembers over its own restart: one small file, replaced as a whole, and a lock against a second
//! agent on the same state.
//!
//! The file is about this boot of the machine and is not synced: after a power loss, sessions and processes are gone
//! anyway. A file that does not decode counts as none.

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

/// Writes the latest state in the background.
pub(super) struct Saver {
    latest: watch::Sender<Option<SavedState>>,
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
        let (latest, mut changes) = watch::channel(None);
        let task = tokio::spawn(async move {
            while changes.changed().await.is_ok() {
                let Some(state) = changes.borrow_and_update().clone() else { continue };
                let (path, boot) = (path.clone(), boot.clone());
                let written = tokio::task::spawn_blocking(move || write(&path, boot, state)).await;
                if let Ok(Err(error)) = written {
                    warn!("the agent's state cannot be saved: {error}; a restart will start anew");
                }
            }
        });
        Ok((Self { latest, task, _lock: lock }, found.map(|file| file.state), same_boot))
    }

    pub(super) fn save(&self, state: SavedState) {
        self.latest.send_replace(Some(state));
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
    std::fs::rename(new, path)
}
