//! Operations of a session that are not answered yet, in the order in which the owner asked for them.

use std::collections::VecDeque;

use csnap_proto::Sequence;
use csnap_proto::limits::OPERATIONS_PER_SESSION_MAX;
use csnap_proto::message::lock::{LockOp, ToLockd};

/// Most operations that wait for their answers or for their turn; an owner that has more to ask is at fault.
pub const PENDING_MAX: usize = 1024;

/// An operation as its owner knows it: unique in a client, unlike the wire's sequence known before the session is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Ticket(pub u64);

#[derive(Debug)]
struct Operation {
    ticket: Ticket,
    /// Given when it is sent; taken back when lockd turns out not to have it.
    sequence: Option<Sequence>,
    op: LockOp,
}

/// See the module. Invariant: the numbered ones come first and their sequences are consecutive but for answered ones.
#[derive(Debug, Default)]
pub(super) struct Pending {
    ops: VecDeque<Operation>,
    tickets: u64,
    /// Last sequence given.
    last: Sequence,
}

impl Pending {
    /// Takes an operation in; `None` when too many wait.
    pub(super) fn push(&mut self, op: LockOp) -> Option<Ticket> {
        if !self.has_room() {
            return None;
        }
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        self.ops.push_back(Operation { ticket, sequence: None, op });
        Some(ticket)
    }

    pub(super) fn has_room(&self) -> bool {
        self.ops.len() < PENDING_MAX
    }

    /// A new session: what is asked from now on is numbered from its start.
    pub(super) fn restart(&mut self) {
        *self = Self { tickets: self.tickets, ..Self::default() };
    }

    /// Lockd has taken in the operations up to `taken` and lost the rest for good, if it had them: those are numbered
    /// and sent anew. That also goes on behind the operations of an earlier life of the owner, lost or not.
    pub(super) fn resume_after(&mut self, taken: Sequence) {
        self.last = taken;
        for lost in self.ops.iter_mut().filter(|o| o.sequence.is_some_and(|sequence| sequence > taken)) {
            lost.sequence = None;
        }
    }

    /// The next operation to send, if lockd would take it now.
    pub(super) fn next_to_send(&mut self) -> Option<ToLockd> {
        let lowest_unanswered = self.lowest_unanswered();
        let sequence = self.last.next();
        if sequence.0 - lowest_unanswered.0 >= OPERATIONS_PER_SESSION_MAX as u64 {
            return None;
        }
        let next = self.ops.iter_mut().find(|o| o.sequence.is_none())?;
        next.sequence = Some(sequence);
        self.last = sequence;
        Some(ToLockd::Operate { sequence, lowest_unanswered, op: next.op.clone() })
    }

    /// The answer to `sequence` came: the operation, unless it was answered before or is not of this life.
    pub(super) fn answered(&mut self, sequence: Sequence) -> Option<(Ticket, LockOp)> {
        let at = self.ops.iter().position(|o| o.sequence == Some(sequence))?;
        self.ops.remove(at).map(|o| (o.ticket, o.op))
    }

    /// Answers below are not needed.
    fn lowest_unanswered(&self) -> Sequence {
        self.ops.front().and_then(|o| o.sequence).unwrap_or(self.last.next())
    }
}
