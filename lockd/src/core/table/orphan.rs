//! Persistent locks: they belong to an owner and stay when the session that speaks for them ends.
//!
//! An orphan is granted as ever: whoever waits for it waits on, its value block keeps its validity, for nobody let go and
//! nobody else can have written. What the value says may be out of date, as with any holder that stands still. When the
//! lock is broken, a writer is gone other than by its own unlock: the value block turns invalid. An adoption changes
//! nothing but the session and, in PW and EX, the term.

use csnap_proto::limits::LOCKS_PER_SESSION_MAX;
use csnap_proto::message::lock::{Fenced, LockEvent, LockReply, Loss, Owner, Told, ValueChange};
use csnap_proto::{LockId, SessionId};

use super::Table;
use super::operate::{Outcome, invalid};
use crate::core::canary::Canary;
use crate::core::mode::Direction;

impl Table {
    /// The session of a granted persistent lock is over. What the lock waited for is nobody's wish any more.
    pub(super) fn orphan(&mut self, id: LockId) {
        self.dequeue(id);
        let lock = self.locks.get_mut(&id).expect("looked up by the caller");
        (lock.session, lock.told) = (None, None);
    }

    pub(super) fn adopt(&mut self, session: SessionId, id: LockId, owner: Owner) -> Outcome {
        let theirs = self.locks.get(&id).filter(|lock| lock.owner.is_some_and(|known| known.id == owner.id));
        let Some(lock) = theirs else { return invalid("the owner has no such lock").into() };
        let proves = lock.owner == Some(owner) || self.broken.breaks(Canary::AdoptWithoutSecret);
        let (Some(mode), true) = (lock.granted, proves) else {
            let why = if proves { "the lock is not granted yet" } else { "the secret is not the owner's" };
            return invalid(why).into();
        };
        let moves = lock.session != Some(session);
        if moves && self.sessions[&session].locks.len() >= LOCKS_PER_SESSION_MAX {
            return invalid("the session has as many locks as one may have").into();
        }
        let (name, earlier, waited) = (lock.resource.clone(), lock.session, lock.wanted.is_some());
        let (before, had) = (self.standing(&name), self.lock_view(id).expect("granted, as seen above"));
        self.dequeue(id);
        let lock = self.locks.get_mut(&id).expect("looked up above");
        if lock.is_writer() && !self.broken.breaks(Canary::AdoptWithoutNewTerm) {
            self.term = self.term.next();
            lock.term = self.term;
        }
        (lock.session, lock.granted, lock.told) = (Some(session), Some(mode), None);
        let term = lock.term;
        let mut notices = Vec::new();
        if let Some(earlier) = earlier {
            notices.extend(waited.then_some((earlier, LockEvent::Cancelled { lock: id })));
            notices
                .extend(moves.then_some((earlier, LockEvent::Lost { lock: had, how: Loss::Adopted(term) })));
            self.sessions.get_mut(&earlier).expect("it is the lock's").locks.remove(&id);
        }
        self.sessions.get_mut(&session).expect("only live sessions ask").locks.insert(id);
        let reply = self.granted_reply(id, Direction::Read, Told::default());
        Outcome { reply, touched: Some((name, before)), notices }
    }

    pub(super) fn break_lock(&mut self, id: LockId) -> Outcome {
        let Some(lock) = self.locks.get(&id) else { return invalid("no such lock").into() };
        let (holder, session, name) = (lock.holder(), lock.session, lock.resource.clone());
        let Some(view) = self.lock_view(id) else {
            return invalid("the lock is not granted: there is nothing to break").into();
        };
        let before = self.standing(&name);
        self.drop_lock(id, ValueChange::Invalidate);
        self.term = self.term.next();
        let fenced = Fenced { lock: view.clone(), holder, by: self.term };
        let lost = LockEvent::Lost { lock: view, how: Loss::Broken(fenced.clone()) };
        let notices = session.map(|session| (session, lost)).into_iter().collect();
        Outcome { reply: LockReply::Broken(fenced), touched: Some((name, before)), notices }
    }
}
