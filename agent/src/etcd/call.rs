//! What is asked of etcd, and what it answers. One call, one answer, in order; renewals and the watch have streams of
//! their own.

use csnap_proto::SessionId;

use super::Key;

/// A revision of etcd's store. 0 stands for a key that is absent, as in etcd's own comparisons.
pub type Revision = i64;

/// A lease, with an id that its owner chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LeaseId(pub i64);

impl LeaseId {
    /// The lease of a session: whoever goes on with the session finds it by that alone. Positive, as etcd wants it.
    #[must_use]
    pub fn of(session: SessionId) -> Self {
        let bytes = session.0.first_chunk().expect("a session id has sixteen bytes");
        Self((i64::from_be_bytes(*bytes) & i64::MAX).max(1))
    }
}

/// What must be so for a transaction to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// The key was created at this revision; 0: it is absent.
    Created(Key, Revision),
    /// The key was last written at this revision; 0: it is absent.
    Written(Key, Revision),
}

/// A key to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Put {
    /// Which.
    pub key: Key,
    /// Content.
    pub value: Vec<u8>,
    /// It goes with the session's lease.
    pub leased: bool,
}

/// All of it at one revision if every guard holds, else nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// Guards.
    pub when: Vec<Guard>,
    /// Written.
    pub puts: Vec<Put>,
    /// Deleted.
    pub deletes: Vec<Key>,
}

/// A request to etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// Make the session's lease, seconds. → [`Answer::Leased`]; one that is there is as good.
    Grant(LeaseId, u32),
    /// End it, with every key bound to it. → [`Answer::Revoked`], also if it is gone.
    Revoke(LeaseId),
    /// Every key below the prefix, linearizable. → [`Answer::Entries`].
    Read,
    /// A transaction; `leased` puts are bound to this lease. → [`Answer::Txn`] or [`Answer::LeaseGone`].
    Txn(LeaseId, Txn),
    /// Renew. → [`News::Kept`](super::News::Kept) or [`News::Gone`](super::News::Gone), beside the calls.
    KeepAlive(LeaseId),
    /// Tell every change below the prefix, from this revision on, in place of an earlier watch. →
    /// [`News::Changes`](super::News::Changes), [`News::Compacted`](super::News::Compacted).
    Watch(Revision),
}

/// A key as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Which, as etcd has it, without the prefix.
    pub key: Vec<u8>,
    /// Content; none if it was deleted.
    pub value: Option<Vec<u8>>,
    /// When it was created.
    pub created: Revision,
    /// When it was last written, or deleted.
    pub written: Revision,
}

/// Answer to a [`Call`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The lease is there and runs so many seconds, which may be more than asked.
    Leased(u32),
    /// The lease is gone.
    Revoked,
    /// The keys at a revision.
    Entries(Revision, Vec<Entry>),
    /// Whether the guards held, and the revision after it.
    Txn(bool, Revision),
    /// A put was bound to a lease that is gone: nothing was written.
    LeaseGone,
}
