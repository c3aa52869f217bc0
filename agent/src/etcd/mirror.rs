//! The keys below the prefix as they were at one revision, and what that means in lockd's words.

use std::collections::BTreeMap;

use csnap_proto::limits::LOCKD_SESSIONS_MAX;
use csnap_proto::message::lock::{Holder, LockEvent, Member, ValueBlock};
use csnap_proto::{SessionId, Term};

use super::call::{Entry, Revision};
use super::keys::{self, Key, LockRecord, MemberRecord, ValueRecord};

/// A key with its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen<T> {
    pub(super) record: T,
    pub(super) created: Revision,
    pub(super) written: Revision,
}

/// Somebody else wrote there.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("etcd's key {} holds what this version of csnap does not write there; give csnap a prefix of its own", .0.name())]
pub(super) struct Foreign(Key);

/// See the module. Bounded by the members that lockd would admit; further ones are passed over.
#[derive(Clone, Debug, Default)]
pub(super) struct Mirror {
    pub(super) revision: Revision,
    members: BTreeMap<SessionId, Seen<MemberRecord>>,
    pub(super) lock: Option<Seen<LockRecord>>,
    term: Option<Seen<Term>>,
    pub(super) value: Option<Seen<ValueRecord>>,
}

impl Mirror {
    /// What a read of every key told.
    pub(super) fn read(revision: Revision, entries: &[Entry]) -> Result<Self, Foreign> {
        let mut mirror = Self { revision, ..Self::default() };
        for entry in entries {
            mirror.take_in(entry)?;
        }
        Ok(mirror)
    }

    /// A key is so from now on; names that are not ours mean nothing.
    pub(super) fn take_in(&mut self, entry: &Entry) -> Result<(), Foreign> {
        let Some(key) = Key::parse(&entry.key) else { return Ok(()) };
        match key {
            Key::Member(session) => {
                let seen = entry.value.as_deref().and_then(keys::decode_member);
                let known = self.members.contains_key(&session);
                match seen.filter(|_| known || self.members.len() < LOCKD_SESSIONS_MAX) {
                    Some(record) => drop(self.members.insert(session, entry.seen(record))),
                    None => drop(self.members.remove(&session)),
                }
            }
            Key::Lock => self.lock = entry.decoded(key, keys::decode_lock)?,
            Key::Term => self.term = entry.decoded(key, keys::decode_term)?,
            Key::Value => self.value = entry.decoded(key, keys::decode_value)?,
        }
        Ok(())
    }

    pub(super) fn member(&self, session: SessionId) -> Option<&Seen<MemberRecord>> {
        self.members.get(&session)
    }

    pub(super) fn members(&self) -> Vec<Member> {
        self.members.iter().map(|(session, seen)| as_member(*session, seen)).collect()
    }

    /// The highest term that was ever given, as far as etcd knows.
    pub(super) fn term(&self) -> Term {
        let held = self.lock.as_ref().map(|lock| lock.record.term);
        held.max(self.term.as_ref().map(|term| term.record)).unwrap_or_default()
    }

    /// When the term was written last; 0 if it never was.
    pub(super) fn term_written(&self) -> Revision {
        self.term.as_ref().map_or(0, |term| term.written)
    }

    /// When the value was written last; 0 if it never was.
    pub(super) fn value_written(&self) -> Revision {
        self.value.as_ref().map_or(0, |value| value.written)
    }

    /// The lock as it was created then is held still.
    pub(super) fn is_held(&self, created: Revision) -> bool {
        self.lock.as_ref().is_some_and(|lock| lock.created == created)
    }

    pub(super) fn is_vacant(&self) -> bool {
        self.lock.is_none()
    }

    /// The value block as a reader of lockd's would see it: valid if the present holder wrote it, or it is the last word
    /// of the holder before, or nobody holds the lock and it is the last word of the latest holder. A lock whose lease
    /// ended leaves no last word.
    pub(super) fn value_block(&self) -> ValueBlock {
        let Some(Seen { record, written, .. }) = &self.value else { return ValueBlock::default() };
        let valid = match &self.lock {
            Some(Seen { record: lock, .. }) => {
                record.term == lock.term || (record.last && record.term == lock.after)
            }
            None => record.last && record.term == self.term(),
        };
        ValueBlock {
            bytes: record.bytes.clone(),
            sequence: u64::try_from(*written).unwrap_or_default(),
            valid: valid && !record.bytes.is_empty(),
            writer: Holder { session: Some(record.session), owner: None },
            term: record.term,
        }
    }

    /// What somebody who watches `resource` is told of the way from `before` to here.
    pub(super) fn value_news(&self, before: &Self, resource: &str) -> Option<LockEvent> {
        let holder = |mirror: &Self| mirror.lock.as_ref().map(|lock| lock.created);
        let (value, vacant) = (self.value_block(), self.is_vacant());
        let changed = value != before.value_block() || holder(self) != holder(before);
        changed.then(|| LockEvent::Changed { resource: resource.to_owned(), value, vacant })
    }

    /// What somebody who watches the members is told of the way from `before` to here.
    pub(super) fn member_news(&self, before: &Self) -> Vec<LockEvent> {
        let gone = before.members.iter().filter(|(session, _)| !self.members.contains_key(session));
        let gone = gone.map(|(session, seen)| LockEvent::MemberDown {
            session: *session,
            node: seen.record.node.clone(),
        });
        let here = self.members.iter().filter(|(session, seen)| before.members.get(session) != Some(seen));
        gone.chain(here.map(|(session, seen)| LockEvent::MemberUp(as_member(*session, seen)))).collect()
    }
}

fn as_member(session: SessionId, seen: &Seen<MemberRecord>) -> Member {
    Member { session, node: seen.record.node.clone(), info: seen.record.info.clone() }
}

impl Entry {
    fn seen<T>(&self, record: T) -> Seen<T> {
        Seen { record, created: self.created, written: self.written }
    }

    fn decoded<T>(
        &self,
        key: Key,
        decode: impl FnOnce(&[u8]) -> Option<T>,
    ) -> Result<Option<Seen<T>>, Foreign> {
        let Some(value) = self.value.as_deref() else { return Ok(None) };
        decode(value).map(|record| Some(self.seen(record))).ok_or(Foreign(key))
    }
}
