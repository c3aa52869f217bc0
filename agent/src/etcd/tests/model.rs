//! A played etcd: one store, revisions, leases, transactions, a history that can be compacted and a state that can be
//! restored. Written from etcd's documentation of its API, not from the session.

use std::collections::BTreeMap;
use std::time::Duration;

use csnap_proto::Time;

use crate::etcd::{Answer, Call, Entry, Guard, Key, LeaseId, News, Revision, Txn};

#[derive(Clone, Debug)]
struct Stored {
    value: Vec<u8>,
    created: Revision,
    written: Revision,
    lease: Option<LeaseId>,
}

#[derive(Clone, Copy, Debug)]
struct Lease {
    ttl: Duration,
    ends: Time,
}

/// What a call brings about on its connection.
#[derive(Debug)]
pub(crate) enum Done {
    Answer(Answer),
    News(News),
    WatchFrom(Revision),
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Etcd {
    pub(crate) revision: Revision,
    keys: BTreeMap<Vec<u8>, Stored>,
    leases: BTreeMap<LeaseId, Lease>,
    history: Vec<Entry>,
    compacted: Revision,
}

impl Etcd {
    pub(crate) fn call(&mut self, now: Time, call: Call) -> Done {
        self.expire(now);
        Done::Answer(match call {
            Call::Grant(lease, ttl_s) => {
                let ttl = Duration::from_secs(u64::from(ttl_s));
                self.leases.entry(lease).or_insert(Lease { ttl, ends: now.after(ttl) });
                Answer::Leased(ttl_s)
            }
            Call::Revoke(lease) => {
                self.end_lease(lease);
                Answer::Revoked
            }
            Call::Read => Answer::Entries(self.revision, self.entries()),
            Call::Txn(lease, txn) => self.transact(lease, txn),
            Call::KeepAlive(lease) => return Done::News(self.keep(now, lease)),
            Call::Watch(from) => return Done::WatchFrom(from),
        })
    }

    fn keep(&mut self, now: Time, lease: LeaseId) -> News {
        let Some(lease) = self.leases.get_mut(&lease) else { return News::Gone };
        lease.ends = now.after(lease.ttl);
        News::Kept(u32::try_from(lease.ttl.as_secs()).ok())
    }

    fn entries(&self) -> Vec<Entry> {
        self.keys.iter().map(|(key, stored)| stored.entry(key)).collect()
    }

    fn transact(&mut self, lease: LeaseId, txn: Txn) -> Answer {
        if !txn.when.iter().all(|guard| self.holds(*guard)) {
            return Answer::Txn(false, self.revision);
        }
        if txn.puts.iter().any(|put| put.leased) && !self.leases.contains_key(&lease) {
            return Answer::LeaseGone;
        }
        self.revision += 1;
        for put in txn.puts {
            let lease = put.leased.then_some(lease);
            let key = put.key.name().into_bytes();
            let created = self.keys.get(&key).map_or(self.revision, |stored| stored.created);
            let stored = Stored { value: put.value, created, written: self.revision, lease };
            self.history.push(stored.entry(&key));
            self.keys.insert(key, stored);
        }
        for key in txn.deletes {
            self.delete(key.name().into_bytes());
        }
        Answer::Txn(true, self.revision)
    }

    fn holds(&self, guard: Guard) -> bool {
        let stored = |key: Key| self.keys.get(key.name().as_bytes());
        match guard {
            Guard::Created(key, revision) => stored(key).map_or(0, |stored| stored.created) == revision,
            Guard::Written(key, revision) => stored(key).map_or(0, |stored| stored.written) == revision,
        }
    }

    fn delete(&mut self, key: Vec<u8>) {
        if self.keys.remove(&key).is_some() {
            self.history.push(Entry { key, value: None, created: 0, written: self.revision });
        }
    }

    /// An operator's hand.
    pub(crate) fn put(&mut self, key: Key, value: &[u8]) {
        self.revision += 1;
        let key = key.name().into_bytes();
        let stored =
            Stored { value: value.to_vec(), created: self.revision, written: self.revision, lease: None };
        self.history.push(stored.entry(&key));
        self.keys.insert(key, stored);
    }

    /// An operator's hand.
    pub(crate) fn remove(&mut self, key: Key) {
        self.revision += 1;
        self.delete(key.name().into_bytes());
    }

    pub(crate) fn has(&self, key: Key) -> bool {
        self.keys.contains_key(key.name().as_bytes())
    }

    /// Somebody else's keys change.
    pub(crate) fn pass_revisions(&mut self, count: Revision) {
        self.revision += count;
    }

    fn end_lease(&mut self, lease: LeaseId) {
        if self.leases.remove(&lease).is_none() {
            return;
        }
        let bound = self.keys.iter().filter(|(_, stored)| stored.lease == Some(lease));
        let bound: Vec<_> = bound.map(|(key, _)| key.clone()).collect();
        if !bound.is_empty() {
            self.revision += 1;
            bound.into_iter().for_each(|key| self.delete(key));
        }
    }

    pub(crate) fn expire(&mut self, now: Time) {
        while let Some((lease, _)) = self.leases.iter().find(|(_, lease)| lease.ends <= now) {
            self.end_lease(*lease);
        }
    }

    pub(crate) fn next_expiry(&self) -> Option<Time> {
        self.leases.values().map(|lease| lease.ends).min()
    }

    /// A new leader: every lease runs anew.
    pub(crate) fn change_leader(&mut self, now: Time) {
        self.leases.values_mut().for_each(|lease| lease.ends = now.after(lease.ttl));
    }

    /// What a watch from `from` tells by now.
    pub(crate) fn watch(&self, from: Revision) -> News {
        if from <= self.compacted {
            return News::Compacted;
        }
        News::Changes(self.history.iter().filter(|entry| entry.written >= from).cloned().collect())
    }

    pub(crate) fn compact(&mut self) {
        self.compacted = self.revision;
        self.history.clear();
    }
}

impl Stored {
    fn entry(&self, key: &[u8]) -> Entry {
        Entry {
            key: key.to_vec(),
            value: Some(self.value.clone()),
            created: self.created,
            written: self.written,
        }
    }
}
