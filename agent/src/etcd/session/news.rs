//! What etcd tells: renewals, changes, and what they mean for the session.

use csnap_proto::Time;
use csnap_proto::message::lock::{FromLockd, LockOp};

use super::{Goal, Link, News, Output, Purpose, Session};
use crate::etcd::call::{Call, Entry, Revision};
use crate::etcd::mirror::Mirror;

impl Session {
    pub(super) fn on_news(&mut self, now: Time, news: News, out: &mut Vec<Output>) {
        match news {
            News::Kept(ttl_s) => {
                let Some((id, sent_at)) = self.renewals.pop_front() else { return };
                self.ttl_s = ttl_s.unwrap_or(self.ttl_s).max(1);
                self.doubt_after(sent_at);
                self.send(id, FromLockd::Renewed, out);
            }
            News::Gone => self.end(now, "its lease ended".to_owned(), out),
            News::Changes(entries) if self.link == Link::Open => self.on_changes(now, &entries, out),
            News::Compacted if self.link == Link::Open => {
                self.rewatch = true;
                self.ask(now, Purpose::Refresh, Call::Read, out);
            }
            News::Changes(_) | News::Compacted => {}
        }
    }

    /// The watch goes on: a revision at a time, those that a read told already left out.
    fn on_changes(&mut self, now: Time, entries: &[Entry], out: &mut Vec<Output>) {
        for changed in entries.chunk_by(|a, b| a.written == b.written) {
            let revision = changed[0].written;
            if revision <= self.mirror.revision {
                continue;
            }
            let before = self.mirror.clone();
            self.mirror.revision = revision;
            if let Err(foreign) = changed.iter().try_for_each(|entry| self.mirror.take_in(entry)) {
                return self.end(now, foreign.to_string(), out);
            }
            self.tell_what_changed(&before, out);
        }
        self.check_standing(now, out);
        self.release_stray();
    }

    pub(super) fn catch_up(
        &mut self,
        now: Time,
        revision: Revision,
        entries: &[Entry],
        out: &mut Vec<Output>,
    ) {
        match Mirror::read(revision, entries) {
            Ok(found) => {
                let before = std::mem::replace(&mut self.mirror, found);
                self.tell_what_changed(&before, out);
                self.check_standing(now, out);
                self.release_stray();
            }
            Err(foreign) => self.end(now, foreign.to_string(), out),
        }
    }

    pub(super) fn tell_what_changed(&mut self, before: &Mirror, out: &mut Vec<Output>) {
        if self.standing.watches_members {
            for event in self.mirror.member_news(before) {
                self.tell(event, out);
            }
        }
        if self.standing.watches_value
            && let Some(event) = self.mirror.value_news(before, &self.resource)
        {
            self.tell(event, out);
        }
    }

    /// Ends the session if what it stands on is gone.
    pub(super) fn check_standing(&mut self, now: Time, out: &mut Vec<Output>) {
        let closing = self.expected.iter().any(|(purpose, _)| *purpose == Purpose::Close);
        let Some(session) = self.session.filter(|_| self.link == Link::Open && !closing) else { return };
        let is_unlock = |goal: &Goal| matches!(goal, Goal::Asked(_, LockOp::Unlock { .. }));
        let taken = self.standing.writer.is_some_and(|writer| !self.mirror.is_held(writer.created));
        if self.mirror.member(session).is_none() {
            self.end(now, "its lease ended".to_owned(), out);
        } else if taken && !self.goals.iter().any(is_unlock) {
            self.end(now, "the server lock was taken from it".to_owned(), out);
        }
    }

    /// Gives back a lock that is ours and that nobody waits for: an attempt to take it that arrived late.
    fn release_stray(&mut self) {
        let is_take = |goal: &Goal| matches!(goal, Goal::Asked(_, LockOp::Convert { .. }) | Goal::Release(_));
        let ours = self.mirror.lock.as_ref().filter(|lock| Some(lock.record.session) == self.session);
        if let Some(lock) = ours
            && self.link == Link::Open
            && self.standing.writer.is_none()
            && !self.goals.iter().any(is_take)
        {
            self.goals.push_front(Goal::Release(lock.created));
        }
    }
}
