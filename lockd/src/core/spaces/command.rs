//! What goes into the lockspaces and what comes out.

use csnap_proto::message::lock::{Manifest, SpaceReply, Way};
use csnap_proto::{MigrationId, Name};
use serde::{Deserialize, Serialize};

use super::SpaceId;
use crate::core::table;

/// A change, as it stands in the log. Whether it makes sense is decided when it is applied, by every replica alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Of the table of a lockspace that is served.
    In(SpaceId, table::Command),
    /// A new lockspace, empty.
    Create {
        /// Its name.
        name: Name,
    },
    /// Source: it is served no more, and moves.
    Freeze {
        /// Which.
        space: SpaceId,
        /// Where to.
        way: Way,
    },
    /// Source: the move is given up; it is served again. Only before [`Command::Forward`].
    Thaw {
        /// Which.
        space: SpaceId,
        /// Which move.
        migration: MigrationId,
        /// For people.
        why: String,
    },
    /// Source: the destination has all of it, and from now on alone.
    Forward {
        /// Which.
        space: SpaceId,
        /// By which move.
        migration: MigrationId,
    },
    /// Source: the destination said that it serves it. Nothing is left to do.
    Settle {
        /// Which.
        space: SpaceId,
        /// By which move.
        migration: MigrationId,
    },
    /// Destination: a piece.
    Import {
        /// Its name.
        name: Name,
        /// By which move.
        migration: MigrationId,
        /// The whole.
        manifest: Manifest,
        /// Where the piece belongs.
        offset: u64,
        /// The piece.
        bytes: Vec<u8>,
    },
    /// Destination: it is served from now on. Only once it is forwarded, durably, or its source is gone for good.
    Activate {
        /// Its name.
        name: Name,
        /// By which move it came.
        migration: MigrationId,
    },
    /// Destination: what came is forgotten.
    Discard {
        /// Its name.
        name: Name,
        /// By which move it came.
        migration: MigrationId,
    },
}

/// What follows from a command, in order, once the command is durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// In the table of a lockspace.
    In(SpaceId, table::Effect),
    /// A command for a lockspace that is not served: it had no effect and never will.
    Dropped(SpaceId),
    /// No session of it ends, and none is served, until it goes on here or elsewhere.
    Frozen(SpaceId),
    /// It goes on here.
    Thawed(SpaceId),
    /// It goes on elsewhere.
    Forwarded(SpaceId),
    /// It begins here: every session of it gets its full lease.
    Activated(SpaceId),
    /// Answer to whoever asked for a change of the lockspaces themselves.
    Answer(SpaceReply),
}
