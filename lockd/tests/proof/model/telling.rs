//! What holders in the way and watchers are told, and what a look shows.

use std::collections::BTreeSet;

use csnap_proto::message::lock::{
    Flags, KeyReply, LockEvent, LockReply, LockRow, Mode, ResourceView, Watched,
};
use csnap_proto::{LockId, Revision, SessionId, Term};

use super::super::tables::{compatible, is_writer};
use super::{L, Model, Seen};

impl Model {
    pub(super) fn would_block(&mut self, lock: &L, mode: Mode, flags: Flags) -> LockReply {
        if flags.has(Flags::NOQUEUEBAST) {
            for l in self.locks.iter_mut().filter(|l| l.resource == lock.resource && l.id != lock.id) {
                if l.granted.is_some_and(|granted| !compatible(granted, mode)) && l.told < Some(mode) {
                    l.told = Some(mode);
                    let wanted = mode;
                    self.events.extend(l.session.map(|to| (to, LockEvent::Blocking { lock: l.id, wanted })));
                }
            }
        }
        LockReply::WouldBlock
    }

    pub(super) fn tell_blocking(&mut self, resource: &str) {
        let ids: Vec<LockId> = self.locks.iter().filter(|l| l.resource == resource).map(|l| l.id).collect();
        for id in ids {
            let Some(held) = self.lock(id).granted else { continue };
            let wanted = self.others(resource, id).filter_map(|o| o.wanted);
            let highest = wanted.filter(|wanted| !compatible(held, *wanted)).max();
            let lock = self.lock_mut(id);
            match highest {
                None => lock.told = None,
                Some(wanted) if lock.told < Some(wanted) => {
                    lock.told = Some(wanted);
                    let told =
                        lock.session.map(|session| (session, LockEvent::Blocking { lock: id, wanted }));
                    self.events.extend(told);
                }
                Some(_) => {}
            }
        }
    }

    pub(super) fn seen(&self, resource: &str) -> Seen {
        let here = || self.locks.iter().filter(|l| l.resource == resource && l.granted.is_some());
        let writer = here().find(|l| is_writer(l.granted)).map(|l| (l.id, l.term));
        let rows = here().map(|l| LockRow { wanted: None, flags: Flags::NONE, ..l.row() });
        (self.values.get(resource).map_or(0, |value| value.sequence), writer, rows.collect())
    }

    pub(super) fn tell_news(&mut self, resource: &str, before: &Seen) {
        let now = self.seen(resource);
        if (now.0, now.1) != (before.0, before.1) {
            let value = self.values.get(resource).cloned().unwrap_or_default();
            let event = LockEvent::Changed { resource: resource.into(), value, vacant: now.1.is_none() };
            self.tell(&Watched::Value(resource.into()), &event);
        }
        let is_gone = |row: &&LockRow| now.2.iter().all(|other| other.lock != row.lock);
        let gone = before.2.iter().filter(is_gone).map(|row| LockRow { mode: None, term: Term(0), ..*row });
        let new = now.2.iter().filter(|row| !before.2.contains(row)).copied();
        for row in gone.chain(new) {
            let event = LockEvent::Held { resource: resource.into(), row };
            self.tell(&Watched::Grants(resource.into()), &event);
        }
    }

    pub(super) fn tell(&mut self, what: &Watched, event: &LockEvent) {
        let watchers: Vec<SessionId> =
            self.watches.keys().filter(|(_, watched)| watched == what).map(|(session, _)| *session).collect();
        for session in watchers {
            self.events.push((session, event.clone()));
            let watch = (session, what.clone());
            if self.watches[&watch] {
                self.watches.remove(&watch);
            }
        }
    }

    pub(super) fn tell_key(&mut self, key: &str) {
        let (entry, revision) = (self.keys.get(key), Revision(self.keys.revision));
        let event = LockEvent::Key { key: key.into(), entry, revision };
        let mut told = BTreeSet::new();
        self.watches.retain(|(session, what), once| {
            let meant = match what {
                Watched::Key(name) => name == key,
                Watched::Prefix(prefix) => key.starts_with(prefix.as_str()),
                _ => false,
            };
            if meant {
                told.insert(*session);
            }
            !meant || !*once
        });
        self.events.extend(told.into_iter().map(|session| (session, event.clone())));
    }

    pub(super) fn look(&self, what: &Watched) -> LockReply {
        match what {
            Watched::Value(name) => {
                let value = self.values.get(name).cloned().unwrap_or_default();
                LockReply::Value { value, vacant: self.seen(name).1.is_none() }
            }
            Watched::Grants(name) => LockReply::Resource(self.resource(name).unwrap_or_default()),
            Watched::Members => LockReply::Members(self.members.values().cloned().collect()),
            Watched::Key(key) => LockReply::Key(KeyReply::Found(self.keys.get(key))),
            Watched::Prefix(prefix) => LockReply::Key(self.keys.list(prefix, None)),
        }
    }

    pub(crate) fn resource(&self, name: &str) -> Option<ResourceView> {
        let here = || self.locks.iter().filter(|l| l.resource == name);
        let value = self.values.get(name).cloned();
        if here().count() == 0 && value.is_none() {
            return None;
        }
        let by_place = |mut locks: Vec<&L>| -> Vec<LockRow> {
            locks.sort_by_key(|l| l.place);
            locks.into_iter().map(L::row).collect()
        };
        Some(ResourceView {
            value: value.unwrap_or_default(),
            granted: here().filter(|l| l.granted.is_some()).map(L::row).collect(),
            converting: by_place(here().filter(|l| l.is_converting()).collect())
                .iter()
                .map(|row| row.lock)
                .collect(),
            waiting: by_place(here().filter(|l| l.granted.is_none()).collect()),
        })
    }
}
