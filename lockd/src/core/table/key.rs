//! The configuration store: keys with versions, some of which go with their session.
//!
//! Invariants: a key's version is the revision at which it was written, revisions only grow, so no version comes back; an
//! ephemeral key's session is live and lists it; the sizes add up to `bytes`.

use std::collections::BTreeMap;
use std::ops::Bound;

use csnap_proto::limits::{
    EPHEMERAL_KEYS_PER_SESSION_MAX, KEYS_MAX, KEYS_PER_PAGE_MAX, KEYS_TOTAL_BYTES_MAX,
};
use csnap_proto::message::lock::{Expect, KeyOp, KeyReply, KeyView, LockEvent, LockReply};
use csnap_proto::{Revision, SessionId};
use serde::{Deserialize, Serialize};

use super::operate::invalid;
use super::session::Session;
use super::{Effect, Table};
use crate::core::canary::Canary;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Keys {
    entries: BTreeMap<String, Entry>,
    /// Of names and values.
    bytes: usize,
    revision: Revision,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    #[serde(with = "crate::blob")]
    value: Vec<u8>,
    version: Revision,
    created: Revision,
    session: Option<SessionId>,
}

/// A key that changed, and the revision at which it did.
pub(super) struct Changed {
    key: String,
    revision: Revision,
}

impl Keys {
    fn view(&self, key: &str) -> Option<KeyView> {
        let (key, entry) = self.entries.get_key_value(key)?;
        let Entry { value, version, created, session } = entry.clone();
        Some(KeyView { key: key.clone(), value, version, created, session })
    }

    /// Why the change does not happen, if so.
    fn conflict(&self, key: &str, expect: Expect) -> Option<KeyReply> {
        let version = self.entries.get(key).map(|entry| entry.version);
        let meets = match expect {
            Expect::Any => true,
            Expect::Absent => version.is_none(),
            Expect::Version(expected) => version == Some(expected),
        };
        (!meets).then_some(KeyReply::Conflict { version })
    }

    /// Takes a key out.
    fn take(&mut self, key: &str) -> Option<Entry> {
        let entry = self.entries.remove(key)?;
        self.bytes -= key.len() + entry.value.len();
        Some(entry)
    }

    /// Numbers a change.
    fn next_revision(&mut self) -> Revision {
        self.revision = self.revision.next();
        self.revision
    }

    pub(super) fn list(&self, prefix: &str, after: Option<&str>) -> KeyReply {
        let from = match after.filter(|after| *after >= prefix) {
            Some(after) => Bound::Excluded(after),
            None => Bound::Included(prefix),
        };
        let mut rest = self.entries.range::<str, _>((from, Bound::Unbounded)).map(|(key, _)| key);
        let within = rest.by_ref().take_while(|key| key.starts_with(prefix));
        let mut names: Vec<&String> = within.take(KEYS_PER_PAGE_MAX + 1).collect();
        let more = names.len() > KEYS_PER_PAGE_MAX;
        names.truncate(KEYS_PER_PAGE_MAX);
        let keys = names.into_iter().filter_map(|key| self.view(key)).collect();
        KeyReply::Page { keys, more, revision: self.revision }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn revision(&self) -> Revision {
        self.revision
    }

    /// Names and values.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&String, &Vec<u8>)> {
        self.entries.iter().map(|(key, entry)| (key, &entry.value))
    }

    /// Whether everything agrees; a table that was read back is checked with it.
    pub(super) fn check(&self, sessions: &BTreeMap<SessionId, Session>) -> Result<(), &'static str> {
        let mut bytes = 0;
        for (key, entry) in &self.entries {
            bytes += key.len() + entry.value.len();
            if entry.version > self.revision || entry.created > entry.version {
                return Err("a key from the future");
            }
            let lists = |session| sessions.get(&session).is_some_and(|state| state.ephemerals.contains(key));
            if !entry.session.is_none_or(lists) {
                return Err("an ephemeral key without its session");
            }
        }
        let listed = sessions.values().flat_map(|session| &session.ephemerals);
        let ephemeral = self.entries.values().filter(|entry| entry.session.is_some()).count();
        if bytes != self.bytes || listed.count() != ephemeral {
            return Err("sizes of the keys");
        }
        Ok(())
    }
}

impl Table {
    /// Puts or deletes a key.
    pub(super) fn change_key(&mut self, session: SessionId, op: KeyOp) -> (LockReply, Option<Changed>) {
        let (KeyOp::Put { key, expect, .. } | KeyOp::Delete { key, expect }) = &op else {
            unreachable!("the caller looks up the rest")
        };
        if let Some(conflict) = self.keys.conflict(key, *expect) {
            return (LockReply::Key(conflict), None);
        }
        let key = match op {
            KeyOp::Put { key, value, ephemeral, .. } => {
                if let Some(full) = self.has_no_room_for_key(session, &key, value.len(), ephemeral) {
                    return (invalid(full), None);
                }
                self.put_key(&key, value, ephemeral.then_some(session));
                key
            }
            KeyOp::Delete { key, .. } => {
                if self.take_key(&key).is_none() {
                    return (LockReply::Key(KeyReply::Found(None)), None);
                }
                self.keys.next_revision();
                key
            }
            KeyOp::Get { .. } | KeyOp::List { .. } => unreachable!("seen above"),
        };
        let revision = self.keys.revision;
        (LockReply::Key(KeyReply::Done { version: revision }), Some(Changed { key, revision }))
    }

    fn has_no_room_for_key(
        &self,
        session: SessionId,
        key: &str,
        bytes: usize,
        ephemeral: bool,
    ) -> Option<&'static str> {
        let known = self.keys.entries.get(key);
        let freed = known.map_or(0, |entry| key.len() + entry.value.len());
        let ephemerals = &self.sessions[&session].ephemerals;
        if known.is_none() && self.keys.entries.len() >= KEYS_MAX {
            Some("lockd has as many keys as it may have: delete some")
        } else if self.keys.bytes - freed + key.len() + bytes > KEYS_TOTAL_BYTES_MAX {
            Some("the keys of lockd take as many bytes as they may: delete some")
        } else if ephemeral && !ephemerals.contains(key) && ephemerals.len() >= EPHEMERAL_KEYS_PER_SESSION_MAX
        {
            Some("the session has as many ephemeral keys as one may have")
        } else {
            None
        }
    }

    fn put_key(&mut self, key: &str, value: Vec<u8>, session: Option<SessionId>) {
        let created = self.take_key(key).map(|before| before.created);
        let mut version = self.keys.next_revision();
        if created.is_none() && self.broken.breaks(Canary::ReuseVersionAfterDelete) {
            version = Revision(1);
        }
        self.keys.bytes += key.len() + value.len();
        let entry = Entry { value, version, created: created.unwrap_or(version), session };
        self.keys.entries.insert(key.to_owned(), entry);
        if let Some(session) = session.and_then(|session| self.sessions.get_mut(&session)) {
            session.ephemerals.insert(key.to_owned());
        }
    }

    /// Takes a key out, also of the session that it goes with.
    fn take_key(&mut self, key: &str) -> Option<Entry> {
        let entry = self.keys.take(key)?;
        if let Some(session) = entry.session.and_then(|session| self.sessions.get_mut(&session)) {
            session.ephemerals.remove(key);
        }
        Some(entry)
    }

    /// The keys of a session that ended go, one change each.
    pub(super) fn end_ephemerals(&mut self, session: Session, effects: &mut Vec<Effect>) {
        if self.broken.breaks(Canary::KeepEphemerals) {
            return;
        }
        for key in session.ephemerals {
            self.keys.take(&key).expect("listed ephemerals are there");
            let revision = self.keys.next_revision();
            self.tell_key(Some(Changed { key, revision }), effects);
        }
    }

    pub(super) fn tell_key(&mut self, changed: Option<Changed>, effects: &mut Vec<Effect>) {
        let Some(Changed { key, revision }) = changed else { return };
        let event = LockEvent::Key { key: key.clone(), entry: self.keys.view(&key), revision };
        self.tell_key_watchers(&key, &event, effects);
    }

    pub(super) fn key(&self, key: &str) -> KeyReply {
        KeyReply::Found(self.keys.view(key))
    }
}
