//! The naive configuration store of the model: a list of keys.

use csnap_proto::message::lock::{Expect, KeyOp, KeyReply, KeyView};
use csnap_proto::{Revision, SessionId};

#[derive(Default)]
pub(crate) struct Keys {
    keys: Vec<KeyView>,
    pub(crate) revision: u64,
}

impl Keys {
    pub(crate) fn get(&self, key: &str) -> Option<KeyView> {
        self.keys.iter().find(|view| view.key == key).cloned()
    }

    pub(crate) fn list(&self, prefix: &str, after: Option<&str>) -> KeyReply {
        let mut keys = self.keys.clone();
        keys.retain(|view| {
            view.key.starts_with(prefix) && after.is_none_or(|after| view.key.as_str() > after)
        });
        keys.sort_by(|a, b| a.key.cmp(&b.key));
        KeyReply::Page { keys, more: false, revision: Revision(self.revision) }
    }

    /// The answer, and the key if it changed.
    pub(crate) fn change(&mut self, session: SessionId, op: &KeyOp) -> (KeyReply, Option<String>) {
        match op {
            KeyOp::Get { key } => (KeyReply::Found(self.get(key)), None),
            KeyOp::List { prefix, after } => (self.list(prefix, after.as_deref()), None),
            KeyOp::Put { key, value, expect, ephemeral } => {
                if let Some(conflict) = self.conflict(key, *expect) {
                    return (conflict, None);
                }
                let before = self.delete(key);
                self.revision += 1;
                let version = Revision(self.revision);
                let created = before.map_or(version, |before| before.created);
                let session = ephemeral.then_some(session);
                self.keys.push(KeyView { key: key.clone(), value: value.clone(), version, created, session });
                (KeyReply::Done { version }, Some(key.clone()))
            }
            KeyOp::Delete { key, expect } => {
                if let Some(conflict) = self.conflict(key, *expect) {
                    return (conflict, None);
                }
                if self.delete(key).is_none() {
                    return (KeyReply::Found(None), None);
                }
                self.revision += 1;
                (KeyReply::Done { version: Revision(self.revision) }, Some(key.clone()))
            }
        }
    }

    /// Deletes one of the session's ephemeral keys, the first by name.
    pub(crate) fn end_one(&mut self, session: SessionId) -> Option<String> {
        let own = self.keys.iter().filter(|view| view.session == Some(session));
        let key = own.map(|view| view.key.clone()).min()?;
        self.delete(&key);
        self.revision += 1;
        Some(key)
    }

    fn delete(&mut self, key: &str) -> Option<KeyView> {
        let at = self.keys.iter().position(|view| view.key == key)?;
        Some(self.keys.remove(at))
    }

    fn conflict(&self, key: &str, expect: Expect) -> Option<KeyReply> {
        let version = self.get(key).map(|view| view.version);
        let meets = match expect {
            Expect::Any => true,
            Expect::Absent => version.is_none(),
            Expect::Version(_) if version.is_none() => false,
            Expect::Version(wanted) => version == Some(wanted),
        };
        (!meets).then_some(KeyReply::Conflict { version })
    }
}
