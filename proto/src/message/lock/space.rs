//! Lockspaces: tables of locks that a group of lockds serves side by side, each under a name, and their move to another
//! group. An operator asks for the first five; the group that a lockspace moves away from asks for the rest, and so does
//! an operator where that group is gone for good.

use core::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::ids::{MigrationId, Name, Term};
use crate::limits::{
    GROUP_ADDRESSES_MAX, IMPORT_BYTES_MAX, LOCKSPACE_BYTES_MAX, LOCKSPACES_MAX, REASON_BYTES_MAX,
};

/// What is asked. Each is durable before it is answered, and does nothing the second time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SpaceRequest {
    /// Every lockspace of this group. → [`SpaceReply::Spaces`].
    List,
    /// A new one, empty. → [`SpaceReply::Done`].
    Create {
        /// Its name.
        name: Name,
    },
    /// Freeze it and move it; the leader does the rest by itself. → [`SpaceReply::Done`] when it is frozen.
    Migrate {
        /// Which.
        name: Name,
        /// This move and where to.
        way: Way,
    },
    /// Give the move up that is under way, unless the lockspace is forwarded already. → [`SpaceReply::Done`] when it is
    /// served here again.
    Abort {
        /// Of which one.
        name: Name,
    },
    /// A piece of a lockspace that comes. → [`SpaceReply::Imported`].
    Import {
        /// Its name.
        name: Name,
        /// By which move.
        migration: MigrationId,
        /// What it is to be as a whole.
        manifest: Manifest,
        /// Where in it the piece belongs.
        offset: u64,
        /// At most [`IMPORT_BYTES_MAX`] bytes.
        bytes: Vec<u8>,
    },
    /// Serve what was imported: its source forwards to this group, durably, or is gone for good. → [`SpaceReply::Done`].
    Activate {
        /// Its name.
        name: Name,
        /// By which move it came.
        migration: MigrationId,
    },
    /// Forget what was imported: its source serves it. → [`SpaceReply::Done`].
    Discard {
        /// Its name.
        name: Name,
        /// By which move it came.
        migration: MigrationId,
    },
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SpaceReply {
    /// It is so.
    Done,
    /// Every lockspace.
    Spaces(Vec<SpaceView>),
    /// So much of it is there, from its start; all of it is checked and whole.
    Imported {
        /// Bytes.
        have: u64,
    },
    /// It will not be.
    Refused {
        /// One line for people.
        reason: String,
    },
}

/// A move and its destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Way {
    /// The move.
    pub migration: MigrationId,
    /// Where the group is found that it goes to.
    pub to: Vec<SocketAddr>,
}

/// A whole lockspace as it travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Its length, bytes.
    pub bytes: u64,
    /// Its BLAKE3 hash.
    pub hash: [u8; 32],
}

/// A lockspace as people see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpaceView {
    /// Its name.
    pub name: Name,
    /// What becomes of it.
    pub state: SpaceState,
    /// Live sessions, while its table is here.
    pub sessions: u64,
    /// Locks, granted or waiting, while its table is here.
    pub locks: u64,
    /// Highest term ever granted in it, while its table is here.
    pub term: Term,
    /// Why the last move was given up.
    pub trouble: Option<String>,
}

/// Where a lockspace stands between two groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SpaceState {
    /// Served here.
    Active,
    /// Served nowhere: on its way to another group.
    Frozen(Way),
    /// Coming; not served here.
    Importing {
        /// By which move.
        migration: MigrationId,
        /// What is there.
        have: u64,
        /// Of how much.
        bytes: u64,
    },
    /// All of it came; not served here until its source says so.
    Imported {
        /// By which move.
        migration: MigrationId,
    },
    /// Served by another group, whose it is.
    Forwarded {
        /// Which.
        way: Way,
        /// That group said that it serves it.
        activated: bool,
    },
}

impl SpaceRequest {
    /// Whether every field is within its limits.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        match self {
            Self::Migrate { way, .. } => check_addresses(&way.to),
            Self::Import { manifest, offset, bytes, .. } => {
                if bytes.len() > IMPORT_BYTES_MAX {
                    return Err("length of a piece of a lockspace");
                }
                let end = offset.checked_add(bytes.len() as u64);
                if manifest.bytes > LOCKSPACE_BYTES_MAX as u64 || end.is_none_or(|end| end > manifest.bytes) {
                    return Err("length of a lockspace");
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl SpaceReply {
    pub(super) fn check(&self) -> Result<(), &'static str> {
        match self {
            Self::Spaces(spaces) if spaces.len() > LOCKSPACES_MAX => Err("number of lockspaces"),
            Self::Spaces(spaces) => spaces.iter().try_for_each(|space| match &space.state {
                SpaceState::Frozen(way) | SpaceState::Forwarded { way, .. } => check_addresses(&way.to),
                _ => Ok(()),
            }),
            Self::Refused { reason } if reason.len() > REASON_BYTES_MAX => Err("length of a reason"),
            _ => Ok(()),
        }
    }
}

/// There is somewhere to go, and not more than a group has.
pub(super) fn check_addresses(to: &[SocketAddr]) -> Result<(), &'static str> {
    if to.is_empty() || to.len() > GROUP_ADDRESSES_MAX {
        Err("number of addresses of a group")
    } else {
        Ok(())
    }
}

const _: () = assert!(LOCKSPACES_MAX * (2 * REASON_BYTES_MAX) < crate::limits::FRAME_BYTES_MAX);

#[cfg(test)]
mod tests {
    use super::*;

    fn import(bytes: u64, offset: u64, piece: usize) -> SpaceRequest {
        SpaceRequest::Import {
            name: Name::new("s").expect("a name"),
            migration: MigrationId([1; 16]),
            manifest: Manifest { bytes, hash: [0; 32] },
            offset,
            bytes: vec![0; piece],
        }
    }

    #[test]
    fn pieces_stay_within_what_they_are_pieces_of() {
        assert_eq!(import(100, 90, 10).check(), Ok(()));
        for bad in [
            import(100, 91, 10),
            import(100, u64::MAX, 10),
            import(1 << 40, 0, 10),
            import(1 << 20, 0, IMPORT_BYTES_MAX + 1),
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_group_is_found_somewhere() {
        let to = |n: usize| vec![SocketAddr::from(([127, 0, 0, 1], 1)); n];
        assert!(check_addresses(&to(1)).is_ok() && check_addresses(&to(GROUP_ADDRESSES_MAX)).is_ok());
        assert!(check_addresses(&to(0)).is_err() && check_addresses(&to(GROUP_ADDRESSES_MAX + 1)).is_err());
    }
}
