//! Watches: who is told of changes of resources, keys and members.
//!
//! What a watch tells is an event of the session, so it is numbered, kept and replayed like any other: a change is missed
//! only together with an Overrun that says so.

use std::collections::{BTreeMap, BTreeSet};

use csnap_proto::SessionId;
use csnap_proto::limits::WATCHES_PER_SESSION_MAX;
use csnap_proto::message::lock::{LockEvent, LockReply, Watched};

use super::operate::invalid;
use super::{Effect, Table};

/// By what is watched: the sessions that do, and whether the first event is the last.
pub(super) type Watchers = BTreeMap<Watched, BTreeMap<SessionId, bool>>;

impl Table {
    /// Begins a watch, or replaces it; gives the refusal, if it is one.
    pub(super) fn watch(&mut self, id: SessionId, what: Watched, once: bool) -> Option<LockReply> {
        let session = self.sessions.get_mut(&id).expect("only live sessions ask");
        if !session.watches.contains(&what) && session.watches.len() >= WATCHES_PER_SESSION_MAX {
            return Some(invalid("the session has as many watches as one may have"));
        }
        session.watches.insert(what.clone());
        self.watchers.entry(what).or_default().insert(id, once);
        None
    }

    pub(super) fn unwatch(&mut self, id: SessionId, what: &Watched) {
        if let Some(session) = self.sessions.get_mut(&id) {
            session.watches.remove(what);
        }
        if let Some(watchers) = self.watchers.get_mut(what) {
            watchers.remove(&id);
            if watchers.is_empty() {
                self.watchers.remove(what);
            }
        }
    }

    pub(super) fn tell_watchers(&mut self, what: &Watched, event: &LockEvent, effects: &mut Vec<Effect>) {
        let Some(watchers) = self.watchers.get(what) else { return };
        for (watcher, once) in watchers.clone() {
            if once {
                self.unwatch(watcher, what);
            }
            self.event(watcher, event.clone(), effects);
        }
    }

    /// Tells those who watch the key or a prefix of it, each once, whatever they watch.
    pub(super) fn tell_key_watchers(&mut self, key: &str, event: &LockEvent, effects: &mut Vec<Effect>) {
        let prefixes = (0..=key.len()).filter(|end| key.is_char_boundary(*end));
        let prefixes = prefixes.map(|end| Watched::Prefix(key[..end].to_owned()));
        let mut told = BTreeSet::new();
        for what in prefixes.chain([Watched::Key(key.to_owned())]) {
            for (watcher, once) in self.watchers.get(&what).cloned().unwrap_or_default() {
                if once {
                    self.unwatch(watcher, &what);
                }
                told.insert(watcher);
            }
        }
        for watcher in told {
            self.event(watcher, event.clone(), effects);
        }
    }

    pub(super) fn set_info(&mut self, id: SessionId, info: Vec<u8>, effects: &mut Vec<Effect>) {
        let session = self.sessions.get_mut(&id).expect("only live sessions ask");
        session.info = info;
        let event = LockEvent::MemberUp(session.member(id));
        self.tell_watchers(&Watched::Members, &event, effects);
    }
}
