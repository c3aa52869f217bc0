//! The file that makes persistent locks somebody's: an owner's id and secret, kept between the owner's commands.
//!
//! Whoever can read it has the owner's locks, so it is for its user alone. It is whole and on the disk before lockd hears of
//! the owner: a lock that is granted to a command that dies can always be taken over. One command uses it at a time, and
//! holds it by `flock` meanwhile.

use std::fs::{File, Permissions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use csnap_proto::message::lock::Owner;
use csnap_proto::{OwnerId, Secret};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::bytes::{hex, unhex};
use crate::operator::draw;

/// Longest owner file, bytes; those that are written have a hundred and some.
const FILE_BYTES_MAX: u64 = 4096;

/// Read and written by its user alone.
const MODE: u32 = 0o600;

/// What it begins with.
const ABOUT: &str = "# An owner of csnap's locks. Who can read this file has the owner's locks.\n";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    id: String,
    secret: String,
}

/// An owner whose file this command holds.
pub(super) struct OwnerFile {
    pub(super) owner: Owner,
    path: PathBuf,
    _held: File,
}

impl OwnerFile {
    /// The owner in the file at `path`.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        Self::try_open(path)?
            .with_context(|| format!("{} is not there; csnap lock acquire makes it", path.display()))
    }

    /// The owner in the file at `path`; a new one, if there is no such file.
    pub(super) fn open_or_make(path: &Path) -> anyhow::Result<Self> {
        if let Some(there) = Self::try_open(path)? {
            return Ok(there);
        }
        make(path).with_context(|| format!("cannot make {}", path.display()))?;
        Self::open(path)
    }

    /// For people.
    pub(super) fn path(&self) -> std::path::Display<'_> {
        self.path.display()
    }

    fn try_open(path: &Path) -> anyhow::Result<Option<Self>> {
        let shown = path.display();
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| shown.to_string()),
        };
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.len() > FILE_BYTES_MAX {
            bail!("{shown} is no owner file");
        }
        if metadata.permissions().mode() & 0o077 != 0 {
            bail!("{shown} can be read or written by others, who would have its locks: chmod 600 it");
        }
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => bail!("{shown} is in use by another csnap lock command"),
            Err(error) => return Err(error).with_context(|| shown.to_string()),
        }
        let mut text = String::new();
        (&mut file).take(FILE_BYTES_MAX).read_to_string(&mut text).with_context(|| shown.to_string())?;
        let owner = parse(&text).with_context(|| format!("{shown} is no owner file"))?;
        Ok(Some(Self { owner, path: path.to_owned(), _held: file }))
    }
}

fn parse(text: &str) -> Option<Owner> {
    let Text { id, secret } = toml::from_str(text).ok()?;
    let sixteen = |text: &str| <[u8; 16]>::try_from(unhex(text)?).ok();
    Some(Owner { id: OwnerId(sixteen(&id)?), secret: Secret(sixteen(&secret)?) })
}

/// Writes a new owner beside `path`, syncs it, and gives it its name. If somebody else was first, theirs stays.
fn make(path: &Path) -> anyhow::Result<()> {
    let text = Text { id: hex(&draw()?), secret: hex(&draw()?) };
    let text = format!("{ABOUT}{}", toml::to_string(&text)?);
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new("."));
    let new = directory.join(format!(".csnap-owner-{}", hex(&draw()?)));
    let named = write_synced(&new, &text).and_then(|()| std::fs::hard_link(&new, path));
    let _ = std::fs::remove_file(&new);
    match named {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error.into()),
        _ => {}
    }
    Ok(File::open(directory)?.sync_all()?)
}

fn write_synced(path: &Path, text: &str) -> std::io::Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(MODE).open(path)?;
    // Whatever the umask says.
    file.set_permissions(Permissions::from_mode(MODE))?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_made_once_and_found_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("owner");
        let owner = OwnerFile::open_or_make(&path).expect("made").owner;
        assert_eq!(OwnerFile::open_or_make(&path).expect("there").owner, owner);
        assert_eq!(OwnerFile::open(&path).expect("there").owner, owner);
        assert_eq!(path.metadata().expect("a file").permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).expect("a directory").count(), 1, "nothing else is left");
    }

    #[test]
    fn what_is_no_owner_file_is_refused_in_one_line() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("owner");
        let refused = |says: &str| {
            let error = OwnerFile::open(&path).err().expect("refused");
            let line = format!("{error:#}");
            assert!(line.contains(says) && line.lines().count() == 1, "{line}");
        };
        refused("not there");
        let long = format!("{ABOUT}id = '{}'", "0".repeat(5000));
        for bad in ["", "id = '00'\nsecret = '00'\n", "nonsense", "id = 'zz'", &long] {
            std::fs::write(&path, bad).expect("writes");
            std::fs::set_permissions(&path, Permissions::from_mode(MODE)).expect("ours");
            refused("no owner file");
        }
        std::fs::remove_file(&path).expect("there");
        let held = OwnerFile::open_or_make(&path).expect("made");
        refused("in use");
        drop(held);
        std::fs::set_permissions(&path, Permissions::from_mode(0o640)).expect("ours");
        refused("chmod 600");
    }
}
