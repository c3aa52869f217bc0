//! What is shown of the table: to owners that resume, to people, to tests.

use std::ops::Bound;

use csnap_proto::limits::LOCKS_PER_PAGE_MAX;
use csnap_proto::message::lock::{
    KeyOp, ListedLock, LockOp, LockReply, LockView, Member, QueuedView, ResourceView, Watched,
};
use csnap_proto::{EventNumber, LockId, Name, Secret, Sequence, SessionId, Term};

use super::session::StoredReply;
use super::{Missed, Table};

/// A session as its owner gets it back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionView {
    /// Locks that it holds.
    pub locks: Vec<LockView>,
    /// Requests that wait.
    pub queued: Vec<QueuedView>,
    /// Last event made for it.
    pub last_event: EventNumber,
    /// Last operation applied.
    pub last_sequence: Sequence,
}

impl Table {
    /// What an operation that only looks sees now.
    pub(crate) fn look(&self, op: &LockOp) -> LockReply {
        match op {
            LockOp::Watch { what: Watched::Value(name), .. } => {
                let resource = self.resources.get(name);
                let vacant = resource.is_none_or(|resource| resource.writer(&self.locks).is_none());
                let value = resource.map(|resource| resource.value.clone()).unwrap_or_default();
                LockReply::Value { value, vacant }
            }
            LockOp::Watch { what: Watched::Grants(name), .. } | LockOp::Show { resource: name } => {
                LockReply::Resource(self.resource(name).unwrap_or_default())
            }
            LockOp::Watch { what: Watched::Members, .. } => LockReply::Members(self.members()),
            LockOp::Watch { what: Watched::Key(key), .. } | LockOp::Key(KeyOp::Get { key }) => {
                LockReply::Key(self.key(key))
            }
            LockOp::Watch { what: Watched::Prefix(prefix), .. } => {
                LockReply::Key(self.keys.list(prefix, None))
            }
            LockOp::Key(KeyOp::List { prefix, after }) => {
                LockReply::Key(self.keys.list(prefix, after.as_deref()))
            }
            LockOp::Locks { after, orphans } => self.list_locks(*after, *orphans),
            op => unreachable!("{op:?} does more than look"),
        }
    }

    fn list_locks(&self, after: LockId, orphans: bool) -> LockReply {
        let rest = self.locks.range((Bound::Excluded(after), Bound::Unbounded));
        let mut chosen = rest.filter(|(_, lock)| !orphans || lock.session.is_none());
        let listed = chosen.by_ref().take(LOCKS_PER_PAGE_MAX).map(|(id, lock)| ListedLock {
            resource: lock.resource.clone(),
            node: lock.session.and_then(|session| self.node(session)).cloned(),
            row: lock.row(*id),
        });
        let locks = listed.collect();
        LockReply::Locks { locks, more: chosen.next().is_some() }
    }

    /// A resource with its queues; `None` when there is nothing of it.
    #[must_use]
    pub fn resource(&self, name: &str) -> Option<ResourceView> {
        let resource = self.resources.get(name)?;
        let row = |id: &LockId| self.locks[id].row(*id);
        Some(ResourceView {
            value: resource.value.clone(),
            granted: resource.granted.iter().map(row).collect(),
            converting: resource.converting.iter().copied().collect(),
            waiting: resource.waiting.iter().map(row).collect(),
        })
    }

    /// The answer to an operation that was applied, unless its owner no longer needs it.
    #[must_use]
    pub fn stored_answer(&self, id: SessionId, sequence: Sequence) -> Option<LockReply> {
        match &self.sessions.get(&id)?.answers.get(&sequence)?.reply {
            StoredReply::Reply(reply) => Some(reply.clone()),
            StoredReply::Again(op) => Some(self.look(op)),
        }
    }

    /// What the owner of a session may have missed since it saw `last_event`, in the order in which it happened.
    #[must_use]
    pub fn missed(&self, id: SessionId, last_event: EventNumber) -> Vec<Missed> {
        let Some(session) = self.sessions.get(&id) else { return Vec::new() };
        let mut missed = Vec::new();
        let mut answers = session.answers.iter().peekable();
        let answer = |sequence: &Sequence| {
            let reply = self.stored_answer(id, *sequence).expect("listed just now");
            Missed::Answer(*sequence, reply)
        };
        for (number, event) in session.events_after(last_event) {
            while let Some((sequence, _)) = answers.next_if(|(_, stored)| stored.after < number) {
                missed.push(answer(sequence));
            }
            missed.push(Missed::Event(number, event));
        }
        missed.extend(answers.map(|(sequence, _)| answer(sequence)));
        missed
    }

    /// A session, for an owner that resumes it; `None` when there is none.
    #[must_use]
    pub fn view(&self, id: SessionId) -> Option<SessionView> {
        let session = self.sessions.get(&id)?;
        let locks = session.locks.iter().filter_map(|lock| self.lock_view(*lock)).collect();
        let queued = session.waits.iter().filter_map(|id| {
            let lock = &self.locks[id];
            let wanted = lock.wanted?;
            Some(QueuedView { lock: *id, resource: lock.resource.clone(), wanted })
        });
        let queued = queued.collect();
        let (last_event, last_sequence) = (session.last_event, session.last_sequence);
        Some(SessionView { locks, queued, last_event, last_sequence })
    }

    /// Whether `secret` is the session's; `None` when there is no such session.
    #[must_use]
    pub fn proves(&self, id: SessionId, secret: Secret) -> Option<bool> {
        self.sessions.get(&id).map(|session| session.secret == secret)
    }

    /// Locks, granted or waiting.
    #[must_use]
    pub fn lock_count(&self) -> usize {
        self.locks.len()
    }

    /// Every session with its lease, milliseconds.
    pub fn leases(&self) -> impl Iterator<Item = (SessionId, u64)> {
        self.sessions.iter().map(|(id, session)| (*id, session.lease_ms))
    }

    /// Lease of a session, milliseconds.
    #[must_use]
    pub fn lease_ms(&self, id: SessionId) -> Option<u64> {
        self.sessions.get(&id).map(|session| session.lease_ms)
    }

    /// The last event made for a session.
    #[must_use]
    pub fn last_event(&self, id: SessionId) -> Option<EventNumber> {
        self.sessions.get(&id).map(|session| session.last_event)
    }

    /// The last event of a session that is no longer kept.
    #[must_use]
    pub fn forgotten(&self, id: SessionId) -> Option<EventNumber> {
        self.sessions.get(&id).map(|session| session.forgotten)
    }

    /// Every live session, as others see it.
    #[must_use]
    pub fn members(&self) -> Vec<Member> {
        self.sessions.iter().map(|(id, session)| session.member(*id)).collect()
    }

    /// Node of a session, for people.
    #[must_use]
    pub fn node(&self, id: SessionId) -> Option<&Name> {
        self.sessions.get(&id).map(|session| &session.node)
    }

    /// Highest term ever granted.
    #[must_use]
    pub fn term(&self) -> Term {
        self.term
    }
}
