//! What a change of one resource means for everybody else: grants, blocking notices, news for watchers.

use csnap_proto::message::lock::{LockEvent, LockReply};

use super::resource::Standing;
use super::{Effect, Table};

impl Table {
    /// How the resource stands, to be compared by [`Self::settle`].
    pub(super) fn standing(&self, name: &str) -> Standing {
        self.resources[name].standing(&self.locks)
    }

    /// Brings the resource to rest after a change: grants what can be granted, tells holders whom they block, watchers
    /// what is new since `before`, and forgets the resource if nothing is left of it.
    pub(super) fn settle(&mut self, name: &str, before: Standing, effects: &mut Vec<Effect>) {
        if !self.resources.contains_key(name) {
            return;
        }
        self.grant_pending(name, effects);
        self.tell_blocking(name, effects);
        let resource = &self.resources[name];
        if resource.standing(&self.locks) != before {
            let vacant = resource.is_vacant(&self.locks);
            let watchers: Vec<_> = resource.watchers.iter().copied().collect();
            let event = LockEvent::Changed { resource: name.into(), value: resource.value.clone(), vacant };
            for watcher in watchers {
                self.event(watcher, event.clone(), effects);
            }
        }
        self.drop_if_unused(name);
    }

    fn grant_pending(&mut self, name: &str, effects: &mut Vec<Effect>) {
        while let Some(id) = self.resources[name].next_grantable(&self.locks) {
            let (session, wanted) = (self.locks[&id].session, self.locks[&id].wanted);
            let reply = self.grant(id, wanted.expect("queued locks want a mode"));
            let LockReply::Granted { lock, value } = reply else {
                unreachable!("grants answer that they are")
            };
            self.event(session, LockEvent::Granted { lock, value }, effects);
        }
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
                let session = lock.session;
                self.event(session, LockEvent::Blocking { lock: id, wanted }, effects);
            }
        }
    }

    pub(super) fn drop_if_unused(&mut self, name: &str) {
        if self.resources.get(name).is_some_and(super::Resource::is_unused) {
            self.resources.remove(name);
        }
    }
}
