//! Carries declarations of the dead out, one after the other: what is to be looked at and said,
//! [`Declaration`] decides.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::io::Errno;
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::server::Caller;
use super::{Event, Events};
use crate::core::{DECLARE_WITHIN, Dead, Declaration, Held, Input, LOOK_AGAIN, Next, Sight};

/// Declarations that wait for the one in hand; the core repeats what does not fit.
const WAITING_MAX: usize = 64;

/// Every pool has it; a directory without is none, most likely because nothing is mounted there.
const POOL_FILE: &str = "pool.toml";

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
    let (mut declaration, mut next) = Declaration::begin(dead);
    loop {
        next = match next {
            Next::Ask(request) => declaration.on_answer(caller.operate(&mut call, request).await?),
            Next::Look(file) => declaration.on_sight(look_at(pool, file).await?),
            Next::LookAgain(file) => {
                tokio::time::sleep(LOOK_AGAIN).await;
                declaration.on_sight(look_at(pool, file).await?)
            }
            Next::Done => {
                info!("declared dead: {dead:?}");
                return Ok(());
            }
            Next::Failed(why) => bail!("{why}"),
        };
    }
}

async fn look_at(pool: &Path, file: Held) -> anyhow::Result<Sight> {
    let pool = pool.to_path_buf();
    Ok(tokio::task::spawn_blocking(move || look(&pool, &file)).await?)
}

/// Whether the lock of a file can be had; it is let go again at once.
fn look(pool: &Path, file: &Held) -> Sight {
    let (path, identity) = match file {
        Held::Gate(term) => (pool.join("term").join(term.to_string()).join("gate"), None),
        Held::Head(volume) => (pool.join("head").join(volume.file_name()), None),
        Held::Origin { path, device, inode } => (PathBuf::from(path), Some((*device, *inode))),
    };
    let shown = path.display();
    let opened = match open(&path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty()) {
        Ok(opened) => File::from(opened),
        Err(Errno::NOENT) if identity.is_some() || pool.join(POOL_FILE).exists() => return Sight::Missing,
        Err(Errno::NOENT) => {
            return Sight::Unknown(format!("{shown} is not there, and neither is the pool; mount it"));
        }
        Err(error) => return Sight::Unknown(format!("cannot open {shown}: {error}")),
    };
    match (identity, identity_of(&opened)) {
        (_, Err(error)) => return Sight::Unknown(format!("cannot examine {shown}: {error}")),
        (Some(adopted), Ok(found)) if found != adopted => return Sight::Replaced,
        _ => {}
    }
    match flock(&opened, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Sight::Free,
        Err(Errno::WOULDBLOCK) => Sight::Locked,
        Err(error) => Sight::Unknown(format!("cannot lock {shown}: {error}")),
    }
}

/// Device and inode, as whoever adopted an origin noted them: of a block device, its own number.
fn identity_of(file: &File) -> std::io::Result<(u64, u64)> {
    let known = file.metadata()?;
    let device = if known.file_type().is_block_device() { known.rdev() } else { known.dev() };
    Ok((device, known.ino()))
}

#[cfg(test)]
mod tests {
    use csnap_proto::{Term, VolumeId};

    use super::*;

    fn pool() -> tempfile::TempDir {
        let pool = tempfile::tempdir().expect("a directory");
        std::fs::write(pool.path().join(POOL_FILE), "").expect("fresh");
        pool
    }

    fn lock(file: &File) {
        flock(file, FlockOperation::NonBlockingLockExclusive).expect("nobody has it");
    }

    #[test]
    fn a_lock_can_be_had_only_when_the_last_handle_is_gone() {
        let pool = pool();
        let gate = Held::Gate(Term(7));
        assert_eq!(look(pool.path(), &gate), Sight::Missing);
        let dir = pool.path().join("term").join(Term(7).to_string());
        std::fs::create_dir_all(&dir).expect("fresh");
        let server = File::create(dir.join("gate")).expect("fresh");
        lock(&server);
        let in_flight = server.try_clone().expect("one more handle");
        assert_eq!(look(pool.path(), &gate), Sight::Locked);
        drop(server);
        assert_eq!(look(pool.path(), &gate), Sight::Locked, "its last I/O is still on its way");
        drop(in_flight);
        assert_eq!(look(pool.path(), &gate), Sight::Free);
        assert_eq!(look(pool.path(), &gate), Sight::Free, "looking holds nothing");
    }

    #[test]
    fn nothing_is_said_of_a_pool_that_is_not_mounted() {
        let empty = tempfile::tempdir().expect("a directory");
        for file in [Held::Gate(Term(7)), Held::Head(VolumeId(1))] {
            assert!(matches!(look(empty.path(), &file), Sight::Unknown(_)), "{file:?}");
        }
    }

    #[test]
    fn another_file_in_the_place_of_an_origin_is_not_taken_for_it() {
        let pool = pool();
        let path = pool.path().join("image");
        let adopted = File::create(&path).expect("fresh");
        lock(&adopted);
        let (device, inode) = identity_of(&adopted).expect("open");
        let origin = Held::Origin { path: path.to_str().expect("text").to_owned(), device, inode };
        assert_eq!(look(pool.path(), &origin), Sight::Locked);
        std::fs::remove_file(&path).expect("it is there");
        assert_eq!(look(pool.path(), &origin), Sight::Missing);
        std::fs::write(&path, "").expect("free");
        assert_eq!(look(pool.path(), &origin), Sight::Replaced, "the old one is still locked");
    }
}
