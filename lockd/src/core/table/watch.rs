//! Watches: who is told of changes of resources, and of the coming and going of sessions.

use csnap_proto::SessionId;
use csnap_proto::limits::WATCHES_PER_SESSION_MAX;
use csnap_proto::message::lock::{LockEvent, LockReply};

use super::{Effect, Table};

impl Table {
    pub(super) fn watch(&mut self, id: SessionId, name: String) -> LockReply {
        let session = self.sessions.get_mut(&id).expect("checked by the caller");
        let known = session.watches.contains(&name);
        if !known && session.watches.len() >= WATCHES_PER_SESSION_MAX {
            return LockReply::Invalid("the session has as many watches as one may have".into());
        }
        if let Err(full) = self.make_resource(&name) {
            return full;
        }
        let resource = self.resources.get_mut(&name).expect("made above");
        resource.watchers.insert(id);
        let (value, vacant) = (resource.value.clone(), resource.is_vacant(&self.locks));
        self.sessions.get_mut(&id).expect("looked up above").watches.insert(name);
        LockReply::Value { value, vacant }
    }

    pub(super) fn unwatch(&mut self, id: SessionId, name: &str) -> LockReply {
        self.sessions.get_mut(&id).expect("checked by the caller").watches.remove(name);
        self.unwatch_resource(id, name);
        LockReply::Done
    }

    pub(super) fn unwatch_resource(&mut self, id: SessionId, name: &str) {
        if let Some(resource) = self.resources.get_mut(name) {
            resource.watchers.remove(&id);
        }
        self.drop_if_unused(name);
    }

    pub(super) fn watch_members(&mut self, id: SessionId) {
        self.sessions.get_mut(&id).expect("checked by the caller").watches_members = true;
    }

    pub(super) fn set_info(&mut self, id: SessionId, info: Vec<u8>, effects: &mut Vec<Effect>) {
        let session = self.sessions.get_mut(&id).expect("checked by the caller");
        session.info = info;
        let member = session.member(id);
        self.tell_members(&LockEvent::MemberUp(member), effects);
    }

    pub(super) fn tell_members(&mut self, event: &LockEvent, effects: &mut Vec<Effect>) {
        let watchers = self.sessions.iter().filter(|(_, session)| session.watches_members);
        let watchers: Vec<SessionId> = watchers.map(|(id, _)| *id).collect();
        for watcher in watchers {
            self.event(watcher, event.clone(), effects);
        }
    }
}
