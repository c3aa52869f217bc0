//! The naive model: one list of locks, one list of everything else, every rule looked up anew each time. It shares
//! nothing with the table but the messages.
//!
//! Here: sessions, who is granted, and what follows for everybody else; `requests`: what a request does to locks; `circles`:
//! who waits for whom; `telling`: blocking notices, watches and looks.

mod circles;
mod requests;
mod telling;

use std::collections::{BTreeMap, BTreeSet};

use csnap_proto::message::lock::{
    Flags, Holder, ListedLock, LockEvent, LockOp, LockReply, LockRow, LockView, Member, Mode, Owner, Told,
    ValueBlock, ValueChange, Watched,
};
use csnap_proto::{LockId, Name, SessionId, Term};

use super::store::Keys;
use super::tables::{compatible, is_writer, reads, writes};

#[derive(Clone)]
pub(crate) struct L {
    id: LockId,
    session: Option<SessionId>,
    owner: Option<Owner>,
    resource: String,
    granted: Option<Mode>,
    wanted: Option<Mode>,
    flags: Flags,
    term: Term,
    /// Position among those that wait.
    place: i64,
    told: Option<Mode>,
    told_circle: bool,
}

impl L {
    fn holder(&self) -> Holder {
        Holder { session: self.session, owner: self.owner.map(|owner| owner.id) }
    }

    fn row(&self) -> LockRow {
        let (lock, mode, wanted, flags, term) = (self.id, self.granted, self.wanted, self.flags, self.term);
        LockRow { lock, holder: self.holder(), mode, wanted, flags, term }
    }

    fn view(&self) -> LockView {
        let mode = self.granted.expect("a granted lock");
        LockView { lock: self.id, resource: self.resource.clone(), mode, term: self.term }
    }

    fn is_converting(&self) -> bool {
        self.granted.is_some() && self.wanted.is_some()
    }
}

/// See the module.
#[derive(Default)]
pub(crate) struct Model {
    members: BTreeMap<SessionId, Member>,
    pub(crate) locks: Vec<L>,
    values: BTreeMap<String, ValueBlock>,
    watches: BTreeMap<(SessionId, Watched), bool>,
    keys: Keys,
    last_lock: u64,
    pub(crate) term: Term,
    sequence: u64,
    places: i64,
    pub(crate) events: Vec<(SessionId, LockEvent)>,
}

/// What watchers see of a resource.
type Seen = (u64, Option<(LockId, Term)>, Vec<LockRow>);

fn invalid() -> LockReply {
    LockReply::Invalid(String::new())
}

impl Model {
    pub(crate) fn open(&mut self, session: SessionId, node: Name, info: Vec<u8>) {
        let member = Member { session, node, info };
        self.members.insert(session, member.clone());
        self.tell(&Watched::Members, &LockEvent::MemberUp(member));
    }

    pub(crate) fn is_open(&self, session: SessionId) -> bool {
        self.members.contains_key(&session)
    }

    /// Locks of a session, or of nobody.
    pub(crate) fn own(&self, session: Option<SessionId>) -> Vec<LockId> {
        self.locks.iter().filter(|l| l.session == session).map(|l| l.id).collect()
    }

    pub(crate) fn end(&mut self, session: SessionId) {
        let member = self.members.remove(&session).expect("open");
        self.watches.retain(|(watcher, _), _| *watcher != session);
        let own: Vec<L> = self.locks.iter().filter(|l| l.session == Some(session)).cloned().collect();
        let resources: BTreeSet<String> = own.iter().map(|l| l.resource.clone()).collect();
        let before: Vec<Seen> = resources.iter().map(|name| self.seen(name)).collect();
        for lock in own {
            if lock.owner.is_some() && lock.granted.is_some() {
                self.stop_waiting(lock.id);
                let lock = self.lock_mut(lock.id);
                (lock.session, lock.told) = (None, None);
            } else {
                self.remove(lock.id, ValueChange::Invalidate);
            }
        }
        for (name, before) in resources.iter().zip(before) {
            self.settle(name, &before);
        }
        while let Some(key) = self.keys.end_one(session) {
            self.tell_key(&key);
        }
        self.tell(&Watched::Members, &LockEvent::MemberDown { session, node: member.node });
    }

    pub(crate) fn operate(&mut self, session: SessionId, op: &LockOp) -> LockReply {
        match op {
            LockOp::Lock { resource, mode, flags, owner } => {
                self.new_lock(session, resource, *mode, *flags, *owner)
            }
            LockOp::Convert { lock, mode, flags, value } => {
                self.convert(session, *lock, *mode, *flags, value)
            }
            LockOp::Unlock { lock, flags, value } => {
                let Some(own) = self.own_lock(session, *lock) else { return invalid() };
                if flags.without(Flags::FORCEUNLOCK) != Flags::NONE {
                    return invalid();
                }
                if own.wanted.is_some() && *flags == Flags::NONE {
                    return LockReply::Busy;
                }
                let before = self.seen(&own.resource);
                self.remove(*lock, value.clone());
                self.settle(&own.resource, &before);
                LockReply::Done
            }
            LockOp::Cancel { lock } => self.cancel(session, *lock),
            LockOp::Adopt { lock, owner } => self.adopt(session, *lock, *owner),
            LockOp::Break { lock } => self.break_lock(*lock),
            LockOp::Watch { what, once } => {
                self.watches.insert((session, what.clone()), *once);
                self.look(what)
            }
            LockOp::Unwatch { what } => {
                self.watches.remove(&(session, what.clone()));
                LockReply::Done
            }
            LockOp::SetInfo { info } => {
                let member = self.members.get_mut(&session).expect("open");
                member.info.clone_from(info);
                let up = LockEvent::MemberUp(member.clone());
                self.tell(&Watched::Members, &up);
                LockReply::Done
            }
            LockOp::Key(op) => {
                let (reply, changed) = self.keys.change(session, op);
                if let Some(key) = changed {
                    self.tell_key(&key);
                }
                LockReply::Key(reply)
            }
            LockOp::Show { resource } => LockReply::Resource(self.resource(resource).unwrap_or_default()),
            LockOp::Locks { after, orphans } => {
                let chosen = self.locks.iter().filter(|l| l.id > *after && (!orphans || l.session.is_none()));
                let locks = chosen.map(|l| ListedLock {
                    resource: l.resource.clone(),
                    node: l.session.map(|session| self.members[&session].node.clone()),
                    row: l.row(),
                });
                LockReply::Locks { locks: locks.collect(), more: false }
            }
        }
    }

    fn own_lock(&self, session: SessionId, id: LockId) -> Option<L> {
        self.locks.iter().find(|l| l.id == id && l.session == Some(session)).cloned()
    }

    fn lock(&self, id: LockId) -> &L {
        self.locks.iter().find(|l| l.id == id).expect("known")
    }

    fn lock_mut(&mut self, id: LockId) -> &mut L {
        self.locks.iter_mut().find(|l| l.id == id).expect("known")
    }

    fn others(&self, resource: &str, id: LockId) -> impl Iterator<Item = &L> {
        self.locks.iter().filter(move |l| l.resource == resource && l.id != id)
    }

    /// Whether a request may be granted in this mode now; `queued`: it waits already.
    fn may(&self, lock: &L, mode: Mode, flags: Flags, queued: bool) -> bool {
        let others = || self.others(&lock.resource, lock.id);
        if flags.has(Flags::EXPEDITE) {
            return true;
        }
        if others().any(|o| o.granted.is_some_and(|granted| !compatible(granted, mode))) {
            return false;
        }
        let converting = || others().filter(|o| o.is_converting());
        let waiting = || others().filter(|o| o.granted.is_none());
        if lock.granted.is_some() && !queued {
            return !flags.has(Flags::QUECVT) || converting().count() == 0;
        }
        if flags.has(Flags::NOORDER) {
            return true;
        }
        match (lock.granted.is_some(), queued) {
            (true, _) => converting().all(|o| o.place > lock.place),
            (false, false) => converting().count() == 0 && waiting().count() == 0,
            (false, true) => converting().count() == 0 && waiting().all(|o| o.place > lock.place),
        }
    }

    /// The wanted mode or the alternative, whichever may be.
    fn choose(&self, lock: &L, wanted: Mode, flags: Flags, queued: bool) -> Option<(Mode, bool)> {
        if self.may(lock, wanted, flags, queued) {
            return Some((wanted, false));
        }
        let other = other_mode(wanted, flags)?;
        self.may(lock, other, flags, queued).then_some((other, true))
    }

    fn wait(&mut self, id: LockId, wanted: Mode, flags: Flags) {
        self.places += 1;
        let place = if flags.has(Flags::HEADQUE) { -self.places } else { self.places };
        let lock = self.lock_mut(id);
        (lock.wanted, lock.flags, lock.place) = (Some(wanted), flags, place);
    }

    fn stop_waiting(&mut self, id: LockId) {
        let lock = self.lock_mut(id);
        (lock.wanted, lock.flags, lock.told_circle) = (None, Flags::NONE, false);
    }

    fn demote(&mut self, id: LockId) {
        let lock = self.lock_mut(id);
        (lock.granted, lock.term, lock.told) = (Some(Mode::Nl), Term(0), None);
    }

    fn remove(&mut self, id: LockId, value: ValueChange) {
        self.change_value(id, value);
        self.locks.retain(|l| l.id != id);
    }

    fn change_value(&mut self, id: LockId, change: ValueChange) {
        let lock = self.lock(id).clone();
        if !is_writer(lock.granted) || change == ValueChange::Keep {
            return;
        }
        self.sequence += 1;
        let value = self.values.entry(lock.resource.clone()).or_default();
        value.sequence = self.sequence;
        match change {
            ValueChange::Write(bytes) => {
                *value = ValueBlock {
                    valid: !bytes.is_empty(),
                    bytes,
                    sequence: self.sequence,
                    writer: lock.holder(),
                    term: lock.term,
                };
            }
            _ => value.valid = false,
        }
    }

    fn grant(&mut self, id: LockId, mode: Mode, told: Told) -> LockReply {
        self.stop_waiting(id);
        let from = self.lock(id).granted;
        let term = match (is_writer(from), is_writer(Some(mode))) {
            (true, true) => self.lock(id).term,
            (false, true) => {
                self.term = Term(self.term.0 + 1);
                self.term
            }
            _ => Term(0),
        };
        let lock = self.lock_mut(id);
        (lock.granted, lock.term, lock.told) = (Some(mode), term, None);
        let lock = lock.clone();
        let moves = reads(from, mode) || from.is_some_and(|from| writes(from, mode));
        let value = moves.then(|| self.values.get(&lock.resource).cloned().unwrap_or_default());
        LockReply::Granted { lock: lock.view(), value, told }
    }

    fn grant_queued(&mut self, id: LockId, mode: Mode, alternate: bool) -> SessionId {
        let session = self.lock(id).session.expect("orphans do not wait");
        let reply = self.grant(id, mode, Told { alternate, ..Told::default() });
        let LockReply::Granted { lock, value, told } = reply else { unreachable!() };
        self.events.push((session, LockEvent::Granted { lock, value, told }));
        session
    }

    /// The first waiting request that may be granted: conversions, then new ones, each by place.
    fn next(&self, resource: &str) -> Option<(LockId, Mode, bool)> {
        let here = self.locks.iter().filter(|l| l.resource == resource);
        let mut waiting: Vec<&L> = here.filter(|l| l.wanted.is_some()).collect();
        waiting.sort_by_key(|l| (l.granted.is_none(), l.place));
        waiting.into_iter().find_map(|l| {
            let (mode, alternate) = self.choose(l, l.wanted.expect("it waits"), l.flags, true)?;
            Some((l.id, mode, alternate))
        })
    }

    /// Whether anything waits that could be granted.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.locks.iter().all(|l| self.next(&l.resource).is_none())
    }

    /// A conversion that waits for one that waits for it.
    fn never_ends(&self, lock: &L, wanted: Mode, flags: Flags, place: i64) -> bool {
        let held = lock.granted.expect("it converts");
        self.others(&lock.resource, lock.id).filter(|o| o.is_converting()).any(|o| {
            let behind = o.place < place && !flags.has(Flags::NOORDER);
            let for_other = behind || !compatible(o.granted.expect("it converts"), wanted);
            for_other && !compatible(held, o.wanted.expect("it converts"))
        })
    }

    fn settle(&mut self, resource: &str, before: &Seen) {
        let mut granted = BTreeSet::new();
        loop {
            while let Some((id, mode, alternate)) = self.next(resource) {
                granted.insert(self.grant_queued(id, mode, alternate));
            }
            let here = self.locks.iter().filter(|l| l.resource == resource);
            let mut willing: Vec<L> = here.filter(|l| l.is_converting()).cloned().collect();
            willing.retain(|l| l.flags.has(Flags::CONVDEADLK) && l.granted != Some(Mode::Nl));
            willing.sort_by_key(|l| l.place);
            let stuck =
                willing.iter().find(|l| self.never_ends(l, l.wanted.expect("it waits"), l.flags, l.place));
            let Some(lock) = stuck.cloned() else { break };
            self.demote(lock.id);
            self.events.push((lock.session.expect("it waits"), LockEvent::Demoted { lock: lock.id }));
        }
        self.tell_blocking(resource);
        self.tell_news(resource, before);
        let unused = self.locks.iter().all(|l| l.resource != resource);
        if unused && self.values.get(resource).is_some_and(|value| value.bytes.is_empty()) {
            self.values.remove(resource);
        }
        for session in granted {
            self.tell_circles(session);
        }
    }
}

fn other_mode(wanted: Mode, flags: Flags) -> Option<Mode> {
    let wishes = [(Flags::ALTPR, Mode::Pr), (Flags::ALTCW, Mode::Cw)];
    wishes.into_iter().find(|(flag, mode)| flags.has(*flag) && *mode != wanted).map(|(_, mode)| mode)
}
