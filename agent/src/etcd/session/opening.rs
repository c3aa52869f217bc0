//! How a session begins, and how it goes on over another connection or in another life of the agent.

use csnap_proto::message::lock::{FromLockd, LockEvent};
use csnap_proto::{EventNumber, Name, SessionId, Time};

use super::{Link, Output, Purpose, Session};
use crate::etcd::call::{Call, Entry, Put, Revision, Txn};
use crate::etcd::canary::Canary;
use crate::etcd::goal::Standing;
use crate::etcd::keys::{self, Key, MemberRecord};
use crate::etcd::mirror::Mirror;

impl Session {
    pub(super) fn open(
        &mut self,
        now: Time,
        session: SessionId,
        who: (Name, u32, Vec<u8>),
        out: &mut Vec<Output>,
    ) {
        if self.session != Some(session) {
            // What an earlier session holds, its owner does not know any more.
            self.call_for(now, Purpose::Farewell, Call::Revoke, out);
            self.begin(session);
        }
        self.link = Link::Opening;
        let lease_s = who.1;
        self.opening = Some(who);
        self.call_for(now, Purpose::Lease, |lease| Call::Grant(lease, lease_s), out);
    }

    /// Another session: of the one before only the term counts, and what is on its way on the connection.
    fn begin(&mut self, session: SessionId) {
        let expected = std::mem::take(&mut self.expected);
        let (session, floor) = (Some(session), self.known_term());
        *self = Self { session, floor, expected, ..Self::breaking(&self.resource, self.broken) };
    }

    pub(super) fn resume(
        &mut self,
        now: Time,
        session: SessionId,
        last_event: EventNumber,
        out: &mut Vec<Output>,
    ) {
        if matches!(self.link, Link::Over(_)) && self.session == Some(session) {
            return self.repeat_the_end(out);
        }
        if self.session != Some(session) {
            self.begin(session);
        }
        self.link = Link::Resuming(last_event);
        self.ask(now, Purpose::Look, Call::Read, out);
    }

    /// The lease is there: make its owner a member.
    pub(super) fn join(&mut self, now: Time, out: &mut Vec<Output>) {
        let (Some(session), Some((node, _, info))) = (self.session, &self.opening) else { return };
        let record = MemberRecord { node: node.clone(), info: info.clone() };
        let put = Put { key: Key::Member(session), value: keys::encode(&record), leased: true };
        let txn = Txn { puts: vec![put], ..Txn::default() };
        self.call_for(now, Purpose::Member, |lease| Call::Txn(lease, txn), out);
    }

    /// The first look on a connection.
    pub(super) fn on_look(
        &mut self,
        now: Time,
        revision: Revision,
        entries: &[Entry],
        out: &mut Vec<Output>,
    ) {
        if revision < self.mirror.revision && !self.broken.breaks(Canary::ResumeOverRestore) {
            let went_back = "etcd's revisions went back: it was restored from a backup";
            return self.end(now, went_back.to_owned(), out);
        }
        let first = self.mirror.revision == 0;
        let found = match Mirror::read(revision, entries) {
            Ok(found) => found,
            Err(foreign) => return self.end(now, foreign.to_string(), out),
        };
        if self.session.is_none_or(|session| found.member(session).is_none()) {
            return self.end(now, "its lease ended".to_owned(), out);
        }
        let before = std::mem::replace(&mut self.mirror, found);
        if first {
            let (mut standing, scene) = (Standing::default(), self.scene());
            standing.find_writer(&scene);
            self.standing = standing;
        }
        let seen = match std::mem::replace(&mut self.link, Link::Open) {
            Link::Resuming(last_event) => last_event,
            _ => EventNumber(0),
        };
        self.opened(seen, out);
        self.tell_what_changed(&before, out);
        out.push(Output::Call(Call::Watch(revision + 1)));
        self.check_standing(now, out);
    }

    /// Says Opened, with everything that the client may have missed.
    fn opened(&mut self, seen: EventNumber, out: &mut Vec<Output>) {
        self.events = self.events.max(seen);
        let locks = self.standing.locks(&self.resource);
        let (last_event, last_sequence) = (self.events, self.answered);
        self.say(FromLockd::Opened { locks, queued: Vec::new(), last_event, last_sequence }, out);
        for (sequence, reply) in self.answers.clone() {
            self.say(FromLockd::Answer { sequence, reply }, out);
        }
        if seen != self.events {
            self.tell(LockEvent::Overrun, out);
        }
    }
}
