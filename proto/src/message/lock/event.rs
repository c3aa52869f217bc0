//! What a session is told without having asked just now.

use serde::{Deserialize, Serialize};

use super::{Fenced, KeyView, LockRow, LockView, Member, Mode, Told, ValueBlock};
use crate::ids::{LockId, Name, Revision, SessionId, Term};

/// Something that happened, numbered in its session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockEvent {
    /// A queued request or conversion was granted.
    Granted {
        /// The lock.
        lock: LockView,
        /// Value block as of the grant; absent where the direction table has nothing.
        value: Option<ValueBlock>,
        /// Anything unusual.
        told: Told,
    },
    /// A queued request or conversion ended without a grant.
    Cancelled {
        /// The lock.
        lock: LockId,
    },
    /// A conversion with CONVDEADLK gave its granted mode up, for NL.
    Demoted {
        /// The lock.
        lock: LockId,
    },
    /// This waiting request stands in a circle of waits that a grant closed, which nobody could be refused for. It will
    /// wait until someone in the circle lets go.
    Deadlock {
        /// The lock that waits.
        lock: LockId,
    },
    /// This granted lock stands in the way of someone who wants `wanted`. May be stale when it arrives.
    Blocking {
        /// Our lock.
        lock: LockId,
        /// Mode that someone waits for.
        wanted: Mode,
    },
    /// The lock was taken from this session.
    Lost {
        /// What is gone.
        lock: LockView,
        /// How.
        how: Loss,
    },
    /// A watched resource changed: value written, invalidated, or a PW or EX lock granted or gone.
    Changed {
        /// Which.
        resource: String,
        /// As it is now.
        value: ValueBlock,
        /// Nobody holds PW or EX.
        vacant: bool,
    },
    /// A lock on a watched resource was granted, converted, or went from one holder to another; without a mode it is gone.
    Held {
        /// Which resource.
        resource: String,
        /// The lock as it is now.
        row: LockRow,
    },
    /// A watched key was written or deleted.
    Key {
        /// Which.
        key: String,
        /// As it is now; absent if it is gone.
        entry: Option<KeyView>,
        /// Revision of the change.
        revision: Revision,
    },
    /// A member came or changed.
    MemberUp(Member),
    /// A member's session ended.
    MemberDown {
        /// Its session.
        session: SessionId,
        /// Its node.
        node: Name,
    },
    /// Two thirds of the lease passed without a renewal.
    Jeopardy,
    /// Events were dropped (the session fell [`crate::limits::EVENTS_PER_SESSION_MAX`] behind): look anew. Watches for one
    /// event may have had theirs among them.
    Overrun,
}

/// How a lock was lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Loss {
    /// An operator broke it: whatever has this term or a lower one will be refused.
    Broken(Fenced),
    /// Its owner adopted it in another session, under this term (0 in modes below PW).
    Adopted(Term),
}
