//! New locks and conversions: granted at once, refused, or queued.

use csnap_proto::limits::{LOCKS_PER_RESOURCE_MAX, LOCKS_PER_SESSION_MAX, PERSISTENT_LOCKS_MAX};
use csnap_proto::message::lock::{Flags, LockEvent, LockReply, Mode, Owner, Told, ValueChange};
use csnap_proto::{LockId, SessionId, Term};

use super::operate::{Outcome, invalid};
use super::resource::{Asked, Lock};
use super::{Effect, RESOURCES_MAX, Table};
use crate::core::flags::{check_convert, check_lock};
use crate::core::mode::{Direction, direction};

impl Table {
    pub(super) fn lock(
        &mut self,
        session: SessionId,
        name: String,
        mode: Mode,
        flags: Flags,
        owner: Option<Owner>,
    ) -> Outcome {
        if let Err(why) = check_lock(mode, flags) {
            return invalid(why).into();
        }
        if let Some(full) = self.has_no_room(session, &name, owner.is_some()) {
            return invalid(full).into();
        }
        let before = self.standing(&name);
        let asked =
            Asked { id: None, wanted: mode, flags, converts: false, queued: false, broken: self.broken };
        let resource = self.resources.entry(name.clone()).or_default();
        let grantable = resource.grantable(&asked, &self.locks);
        if grantable.is_none() && flags.has(Flags::NOQUEUE) {
            return self.would_block(&name, None, mode, flags);
        }
        let id = self.make_lock(session, name.clone(), owner);
        let reply = match grantable {
            Some((mode, told)) => self.grant(id, mode, told),
            None => {
                self.enqueue(id, mode, flags);
                let Some(told) = self.judge_circle(session, id, flags) else {
                    self.drop_lock(id, ValueChange::Keep);
                    return LockReply::Deadlock.into();
                };
                LockReply::Queued { lock: id, told }
            }
        };
        Outcome { touched: Some((name, before)), ..reply.into() }
    }

    /// Why there can be no further lock, if so.
    fn has_no_room(&self, session: SessionId, name: &str, persistent: bool) -> Option<&'static str> {
        let resource = self.resources.get(name);
        if self.sessions[&session].locks.len() >= LOCKS_PER_SESSION_MAX {
            Some("the session has as many locks as one may have")
        } else if persistent && self.persistent >= PERSISTENT_LOCKS_MAX {
            Some("lockd has as many persistent locks as it may have: adopt and unlock, or break, some")
        } else if resource.is_none() && self.resources.len() >= RESOURCES_MAX {
            Some("lockd has as many resources as it may have")
        } else if resource.is_some_and(|resource| resource.lock_count() >= LOCKS_PER_RESOURCE_MAX) {
            Some("the resource has as many locks as one may have")
        } else {
            None
        }
    }

    fn make_lock(&mut self, session: SessionId, resource: String, owner: Option<Owner>) -> LockId {
        self.last_lock = self.last_lock.next();
        let id = self.last_lock;
        let lock = Lock {
            session: Some(session),
            owner,
            resource,
            granted: None,
            wanted: None,
            flags: Flags::NONE,
            term: Term(0),
            told: None,
            told_circle: false,
        };
        self.locks.insert(id, lock);
        self.persistent += usize::from(owner.is_some());
        self.sessions.get_mut(&session).expect("only live sessions ask").locks.insert(id);
        id
    }

    pub(super) fn convert(
        &mut self,
        session: SessionId,
        id: LockId,
        mode: Mode,
        flags: Flags,
        value: ValueChange,
        effects: &mut Vec<Effect>,
    ) -> Outcome {
        let Some(lock) = self.own_lock(session, id) else { return invalid("no such lock").into() };
        let (Some(from), None) = (lock.granted, lock.wanted) else { return LockReply::Busy.into() };
        if let Err(why) = check_convert(from, mode, flags) {
            return invalid(why).into();
        }
        if value != ValueChange::Keep && direction(from, mode) != Direction::Write {
            return invalid("this conversion does not write the value block").into();
        }
        let name = lock.resource.clone();
        let before = self.standing(&name);
        let asked =
            Asked { id: Some(id), wanted: mode, flags, converts: true, queued: false, broken: self.broken };
        if let Some((mode, told)) = self.resources[&name].grantable(&asked, &self.locks) {
            self.change_value(id, value);
            let reply = self.grant(id, mode, told);
            return Outcome { touched: Some((name, before)), ..reply.into() };
        }
        assert!(
            value == ValueChange::Keep,
            "whatever goes with a mode goes with a lower one: no write waits"
        );
        if flags.has(Flags::NOQUEUE) {
            return self.would_block(&name, Some(id), mode, flags);
        }
        let Some(told) = self.resolve_deadlock(&name, &asked, effects) else {
            return LockReply::Deadlock.into();
        };
        let outcome = self.wait_or_not(session, &name, &asked, told);
        Outcome { touched: Some((name, before)), ..outcome }
    }

    /// A conversion that could not be granted: queued, unless a demotion made room for it or it would close a circle.
    fn wait_or_not(&mut self, session: SessionId, name: &str, asked: &Asked, told: Told) -> Outcome {
        let id = asked.id.expect("conversions are of locks");
        // After a demotion only the wanted mode will do: the alternative was for what it held.
        let strict = Asked { flags: asked.flags.without(Flags::ALTPR | Flags::ALTCW), ..*asked };
        let now = told.demoted && self.resources[name].grantable(&strict, &self.locks).is_some();
        if now {
            return self.grant(id, asked.wanted, told).into();
        }
        self.enqueue(id, asked.wanted, asked.flags);
        if let Some(circle) = self.judge_circle(session, id, asked.flags) {
            let told = Told { deadlock: told.deadlock || circle.deadlock, ..told };
            return LockReply::Queued { lock: id, told }.into();
        }
        self.dequeue(id);
        let demoted = told.demoted.then_some((session, LockEvent::Demoted { lock: id }));
        Outcome { notices: demoted.into_iter().collect(), ..LockReply::Deadlock.into() }
    }

    /// A conversion that cannot be granted may be one that never can. Then it gives its mode up, or is told; or `None`: it
    /// is refused.
    fn resolve_deadlock(&mut self, name: &str, asked: &Asked, effects: &mut Vec<Effect>) -> Option<Told> {
        let id = asked.id.expect("conversions are of locks");
        if !self.resources[name].is_conversion_deadlock(id, asked.wanted, asked.flags, &self.locks) {
            return Some(Told::default());
        }
        if asked.flags.has(Flags::CONVDEADLK) {
            self.demote(id);
            // Those that it kept waiting come first.
            self.grant_conversions(name, effects);
            return Some(Told { demoted: true, ..Told::default() });
        }
        asked.flags.has(Flags::NODLCKWT).then_some(Told { deadlock: true, ..Told::default() })
    }

    /// What the owner of a request that was just queued is told; `None`: it closes a circle and must not stay.
    fn judge_circle(&self, session: SessionId, id: LockId, flags: Flags) -> Option<Told> {
        // At the head of the queue it makes others wait for its session too: then any request of it may close a circle.
        let others = self.counted_waits(session).filter(|_| flags.has(Flags::HEADQUE));
        let deadlock = self.is_in_circle(session, others.chain([id]));
        (!deadlock || flags.has(Flags::NODLCKWT)).then_some(Told { deadlock, ..Told::default() })
    }

    /// Someone is in the way. With NOQUEUEBAST they are told, each once per higher mode.
    fn would_block(&mut self, name: &str, id: Option<LockId>, mode: Mode, flags: Flags) -> Outcome {
        let mut notices = Vec::new();
        let in_the_way: Vec<LockId> = self.resources[name].in_the_way(id, mode, &self.locks).collect();
        for holder in in_the_way.into_iter().filter(|_| flags.has(Flags::NOQUEUEBAST)) {
            let lock = self.locks.get_mut(&holder).expect("granted locks are known");
            if lock.told < Some(mode) {
                lock.told = Some(mode);
                notices
                    .extend(lock.session.map(|to| (to, LockEvent::Blocking { lock: holder, wanted: mode })));
            }
        }
        Outcome { notices, ..LockReply::WouldBlock.into() }
    }
}
