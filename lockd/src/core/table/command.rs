//! What goes into the table and what comes out: the log's content, and what is released once it is durable.

use csnap_proto::message::lock::{LockEvent, LockOp, LockReply};
use csnap_proto::{EventNumber, Name, Secret, Sequence, SessionId};
use serde::{Deserialize, Serialize};

/// A change of the table, as it stands in the log. Whether it makes sense is decided when it is applied, by every
/// replica alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// A session begins. Again with the same secret: no change, the same effect.
    Open {
        /// Identity.
        session: SessionId,
        /// Proof.
        secret: Secret,
        /// For people and membership.
        node: Name,
        /// Kept for whoever counts the lease; the table has no clock.
        lease_ms: u64,
        /// What other members see.
        info: Vec<u8>,
    },
    /// A lock operation of a session.
    Operate {
        /// Whose.
        session: SessionId,
        /// Position in the session.
        sequence: Sequence,
        /// Answers below are forgotten.
        lowest_unanswered: Sequence,
        /// What.
        op: LockOp,
    },
    /// The owner has seen the events up to this one.
    Seen {
        /// Whose.
        session: SessionId,
        /// Last one.
        last_event: EventNumber,
    },
    /// Two thirds of the lease passed without renewal.
    Jeopardy {
        /// Whose.
        session: SessionId,
    },
    /// The owner ends the session.
    Close {
        /// Which.
        session: SessionId,
    },
    /// The lease ran out.
    Expire {
        /// Which.
        session: SessionId,
    },
    /// An operation that its session's owner may not ask for: it takes its place in the session and changes nothing else.
    Deny {
        /// Whose.
        session: SessionId,
        /// Position in the session.
        sequence: Sequence,
        /// Answers below are forgotten.
        lowest_unanswered: Sequence,
        /// For people.
        reason: String,
    },
}

/// What follows from a command, in order, once the command is durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The session of an [`Command::Open`] exists.
    Opened {
        /// Which.
        session: SessionId,
    },
    /// It does not, or belongs to somebody else.
    Refused {
        /// For people.
        reason: String,
    },
    /// Answer to an operation; also stored.
    Answer {
        /// To whom.
        session: SessionId,
        /// Of which operation.
        sequence: Sequence,
        /// What.
        reply: LockReply,
    },
    /// An event for a session; also queued.
    Event {
        /// To whom.
        session: SessionId,
        /// Position in its events.
        number: EventNumber,
        /// What.
        event: LockEvent,
    },
    /// The session is over; nothing of it is left but the persistent locks of its owners.
    Ended {
        /// Which.
        session: SessionId,
        /// Its lease ran out, rather than that its owner closed it.
        expired: bool,
    },
}
