//! What a change of one resource means for everybody else: grants, blocking notices, news for watchers.

use std::collections::{BTreeMap, BTreeSet};

use csnap_proto::message::lock::{Flags, LockEvent, LockReply, LockRow, Mode, Watched};
use csnap_proto::{LockId, SessionId, Term};

use super::{Effect, Table};
use crate::core::canary::Canary;

/// What watchers of a resource are told of when it differs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Standing {
    value_sequence: u64,
    writer: Option<(LockId, Term)>,
    /// Granted locks; looked up only while somebody watches them.
    grants: BTreeMap<LockId, LockRow>,
}

impl Table {
    /// How the resource stands, to be compared by [`Self::settle`].
    pub(super) fn standing(&self, name: &str) -> Standing {
        let Some(resource) = self.resources.get(name) else { return Standing::default() };
        let row =
            |id: &LockId| (*id, LockRow { wanted: None, flags: Flags::NONE, ..self.locks[id].row(*id) });
        let watched = self.watchers.contains_key(&Watched::Grants(name.to_owned()));
        let grants = if watched { resource.granted.iter().map(row).collect() } else { BTreeMap::new() };
        Standing { value_sequence: resource.value.sequence, writer: resource.writer(&self.locks), grants }
    }

    /// Brings the resource to rest after a change: grants what can be granted, tells holders whom they block, watchers
    /// what is new since `before`, and forgets the resource if nothing is left of it.
    pub(super) fn settle(&mut self, name: &str, before: Standing, effects: &mut Vec<Effect>) {
        if !self.resources.contains_key(name) {
            return;
        }
        let granted = self.grant_pending(name, effects);
        self.tell_blocking(name, effects);
        self.tell_news(name, before, effects);
        if self.resources[name].is_unused() {
            self.resources.remove(name);
            if self.broken.breaks(Canary::ReuseTermAfterDelete) {
                self.term = self.locks.values().map(|lock| lock.term).max().unwrap_or_default();
            }
        }
        for session in granted {
            self.tell_circles(session, effects);
        }
    }

    /// Grants what can be granted and, where conversions wait for each other, demotes those that allow it. Gives the
    /// sessions that were granted something.
    fn grant_pending(&mut self, name: &str, effects: &mut Vec<Effect>) -> BTreeSet<SessionId> {
        let mut granted = BTreeSet::new();
        loop {
            while let Some((id, mode, told)) = self.resources[name].next_grantable(&self.locks, self.broken) {
                let session = self.locks[&id].session.expect("orphans want nothing");
                let LockReply::Granted { lock, value, told } = self.grant(id, mode, told) else {
                    unreachable!("grants answer that they are")
                };
                self.event(session, LockEvent::Granted { lock, value, told }, effects);
                granted.insert(session);
            }
            let Some(id) = self.next_demoted(name) else { return granted };
            self.demote(id);
            let session = self.locks[&id].session.expect("orphans want nothing");
            self.event(session, LockEvent::Demoted { lock: id }, effects);
        }
    }

    /// Grants the conversions that can be granted, in the middle of an operation that settles the rest.
    pub(super) fn grant_conversions(&mut self, name: &str, effects: &mut Vec<Effect>) {
        while let Some((id, mode, told)) = self.resources[name].next_grantable(&self.locks, self.broken)
            && self.locks[&id].granted.is_some()
        {
            let session = self.locks[&id].session.expect("orphans want nothing");
            if let LockReply::Granted { lock, value, told } = self.grant(id, mode, told) {
                self.event(session, LockEvent::Granted { lock, value, told }, effects);
            }
        }
    }

    /// A waiting conversion that waits for one that waits for it, and is ready to give its mode up.
    fn next_demoted(&self, name: &str) -> Option<LockId> {
        let resource = &self.resources[name];
        let willing = resource.converting.iter().copied().filter(|id| {
            self.locks[id].flags.has(Flags::CONVDEADLK) && self.locks[id].granted != Some(Mode::Nl)
        });
        let mut willing = willing.into_iter();
        willing.find(|id| {
            let lock = &self.locks[id];
            let wanted = lock.wanted.expect("queued locks want a mode");
            resource.is_conversion_deadlock(*id, wanted, lock.flags, &self.locks)
        })
    }

    /// Takes a lock's mode down to NL by its owner's own wish: the value block is left as it is.
    pub(super) fn demote(&mut self, id: LockId) {
        let lock = self.locks.get_mut(&id).expect("looked up by the caller");
        (lock.granted, lock.term, lock.told) = (Some(Mode::Nl), Term(0), None);
    }

    /// Each holder is told once per higher mode; one that blocks nobody any more is told anew the next time.
    fn tell_blocking(&mut self, name: &str, effects: &mut Vec<Effect>) {
        for (id, blocks) in self.resources[name].blocking(&self.locks) {
            let lock = self.locks.get_mut(&id).expect("granted locks are known");
            let Some(wanted) = blocks else {
                lock.told = None;
                continue;
            };
            if lock.told < Some(wanted) {
                lock.told = Some(wanted);
                if let Some(session) = lock.session {
                    self.event(session, LockEvent::Blocking { lock: id, wanted }, effects);
                }
            }
        }
    }

    fn tell_news(&mut self, name: &str, before: Standing, effects: &mut Vec<Effect>) {
        let now = self.standing(name);
        if (now.value_sequence, now.writer) != (before.value_sequence, before.writer) {
            let (value, vacant) = (self.resources[name].value.clone(), now.writer.is_none());
            let event = LockEvent::Changed { resource: name.into(), value, vacant };
            self.tell_watchers(&Watched::Value(name.to_owned()), &event, effects);
        }
        let gone = before.grants.values().filter(|row| !now.grants.contains_key(&row.lock));
        let gone: Vec<LockRow> = gone.map(|row| LockRow { mode: None, term: Term(0), ..*row }).collect();
        let new = now.grants.values().filter(|row| before.grants.get(&row.lock) != Some(*row));
        for row in gone.into_iter().chain(new.copied().collect::<Vec<_>>()) {
            let event = LockEvent::Held { resource: name.into(), row };
            self.tell_watchers(&Watched::Grants(name.to_owned()), &event, effects);
        }
    }
}
