//! The naive model: one list of locks, one list of everything else, every rule looked up anew each time. It shares
//! nothing with the table but the messages.

use std::collections::{BTreeMap, BTreeSet};

use csnap_proto::message::lock::{
    Fenced, Flags, Holder, KeyReply, ListedLock, LockEvent, LockOp, LockReply, LockRow, LockView, Loss,
    Member, Mode, Owner, ResourceView, Told, ValueBlock, ValueChange, Watched,
};
use csnap_proto::{LockId, Name, Revision, SessionId, Term};

use super::store::Keys;
use super::tables::{compatible, is_writer, queues_conversion, reads, writes};

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

    fn new_lock(
        &mut self,
        session: SessionId,
        resource: &str,
        mode: Mode,
        flags: Flags,
        owner: Option<Owner>,
    ) -> LockReply {
        let only_conversions = Flags::QUECVT | Flags::CONVDEADLK;
        let expedite = flags.has(Flags::EXPEDITE) && (mode != Mode::Nl || flags.has(Flags::NOQUEUE));
        if flags.has_any(only_conversions) || expedite || nonsense(flags) {
            return invalid();
        }
        let before = self.seen(resource);
        let lock = L {
            id: LockId(self.last_lock + 1),
            session: Some(session),
            owner,
            resource: resource.to_owned(),
            granted: None,
            wanted: None,
            flags: Flags::NONE,
            term: Term(0),
            place: 0,
            told: None,
            told_circle: false,
        };
        let id = lock.id;
        let chosen = self.choose(&lock, mode, flags, false);
        if chosen.is_none() && flags.has(Flags::NOQUEUE) {
            return self.would_block(&lock, mode, flags);
        }
        self.last_lock += 1;
        self.locks.push(lock);
        let reply = match chosen {
            Some((mode, alternate)) => self.grant(id, mode, Told { alternate, ..Told::default() }),
            None => {
                self.wait(id, mode, flags);
                let deadlock = self.closes_circle(session, id, flags);
                if deadlock && !flags.has(Flags::NODLCKWT) {
                    self.locks.retain(|l| l.id != id);
                    return LockReply::Deadlock;
                }
                LockReply::Queued { lock: id, told: Told { deadlock, ..Told::default() } }
            }
        };
        self.settle(resource, &before);
        self.tell_circles_if(&reply, session);
        reply
    }

    fn convert(
        &mut self,
        session: SessionId,
        id: LockId,
        mode: Mode,
        flags: Flags,
        value: &ValueChange,
    ) -> LockReply {
        let Some(lock) = self.own_lock(session, id) else { return invalid() };
        let (Some(from), None) = (lock.granted, lock.wanted) else { return LockReply::Busy };
        let no_demotion = flags.has(Flags::CONVDEADLK | Flags::NOQUEUE);
        if flags.has(Flags::EXPEDITE) || no_demotion || nonsense(flags) {
            return invalid();
        }
        if flags.has(Flags::QUECVT) && !queues_conversion(from, mode) {
            return invalid();
        }
        if *value != ValueChange::Keep && !writes(from, mode) {
            return invalid();
        }
        let before = self.seen(&lock.resource);
        let mut told = Told::default();
        let mut chosen = self.choose(&lock, mode, flags, false);
        if chosen.is_none() {
            if flags.has(Flags::NOQUEUE) {
                return self.would_block(&lock, mode, flags);
            }
            let place = if flags.has(Flags::HEADQUE) { i64::MIN } else { i64::MAX };
            if self.never_ends(&lock, mode, flags, place) {
                if flags.has(Flags::CONVDEADLK) {
                    told.demoted = true;
                    self.demote(id);
                    while let Some((next, mode, alternate)) =
                        self.next(&lock.resource).filter(|(next, ..)| self.lock(*next).granted.is_some())
                    {
                        self.grant_queued(next, mode, alternate);
                    }
                    let now = self.lock(id).clone();
                    chosen = self.may(&now, mode, flags, false).then_some((mode, false));
                } else if flags.has(Flags::NODLCKWT) {
                    told.deadlock = true;
                } else {
                    return LockReply::Deadlock;
                }
            }
        }
        let reply = if let Some((mode, alternate)) = chosen {
            self.change_value(id, value.clone());
            self.grant(id, mode, Told { alternate, ..told })
        } else {
            self.wait(id, mode, flags);
            let circle = self.closes_circle(session, id, flags);
            if circle && !flags.has(Flags::NODLCKWT) {
                self.stop_waiting(id);
                if told.demoted {
                    self.events.push((session, LockEvent::Demoted { lock: id }));
                }
                LockReply::Deadlock
            } else {
                LockReply::Queued { lock: id, told: Told { deadlock: told.deadlock || circle, ..told } }
            }
        };
        self.settle(&lock.resource, &before);
        self.tell_circles_if(&reply, session);
        reply
    }

    fn cancel(&mut self, session: SessionId, id: LockId) -> LockReply {
        let Some(lock) = self.own_lock(session, id) else { return invalid() };
        if lock.wanted.is_none() {
            let value = self.values.get(&lock.resource).cloned().unwrap_or_default();
            return LockReply::Granted { lock: lock.view(), value: Some(value), told: Told::default() };
        }
        let before = self.seen(&lock.resource);
        if lock.granted.is_none() {
            self.locks.retain(|l| l.id != id);
        } else {
            self.stop_waiting(id);
        }
        self.events.push((session, LockEvent::Cancelled { lock: id }));
        self.settle(&lock.resource, &before);
        LockReply::Done
    }

    fn adopt(&mut self, session: SessionId, id: LockId, owner: Owner) -> LockReply {
        let Some(lock) = self.locks.iter().find(|l| l.id == id && l.owner == Some(owner)).cloned() else {
            return invalid();
        };
        if lock.granted.is_none() {
            return invalid();
        }
        let before = self.seen(&lock.resource);
        self.stop_waiting(id);
        if is_writer(lock.granted) {
            self.term = Term(self.term.0 + 1);
            self.lock_mut(id).term = self.term;
        }
        let now = self.lock_mut(id);
        (now.session, now.told) = (Some(session), None);
        let now = now.clone();
        if let Some(earlier) = lock.session {
            if lock.wanted.is_some() {
                self.events.push((earlier, LockEvent::Cancelled { lock: id }));
            }
            if earlier != session {
                let how = Loss::Adopted(now.term);
                self.events.push((earlier, LockEvent::Lost { lock: lock.view(), how }));
            }
        }
        let value = Some(self.values.get(&lock.resource).cloned().unwrap_or_default());
        self.settle(&lock.resource, &before);
        let reply = LockReply::Granted { lock: now.view(), value, told: Told::default() };
        self.tell_circles_if(&reply, session);
        reply
    }

    fn break_lock(&mut self, id: LockId) -> LockReply {
        let Some(lock) = self.locks.iter().find(|l| l.id == id && l.granted.is_some()).cloned() else {
            return invalid();
        };
        let before = self.seen(&lock.resource);
        self.remove(id, ValueChange::Invalidate);
        self.term = Term(self.term.0 + 1);
        let fenced = Fenced { lock: lock.view(), holder: lock.holder(), by: self.term };
        if let Some(session) = lock.session {
            let how = Loss::Broken(fenced.clone());
            self.events.push((session, LockEvent::Lost { lock: lock.view(), how }));
        }
        self.settle(&lock.resource, &before);
        LockReply::Broken(fenced)
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

    fn would_block(&mut self, lock: &L, mode: Mode, flags: Flags) -> LockReply {
        if flags.has(Flags::NOQUEUEBAST) {
            for l in self.locks.iter_mut().filter(|l| l.resource == lock.resource && l.id != lock.id) {
                if l.granted.is_some_and(|granted| !compatible(granted, mode)) && l.told < Some(mode) {
                    l.told = Some(mode);
                    let wanted = mode;
                    self.events.extend(l.session.map(|to| (to, LockEvent::Blocking { lock: l.id, wanted })));
                }
            }
        }
        LockReply::WouldBlock
    }

    fn tell_blocking(&mut self, resource: &str) {
        let ids: Vec<LockId> = self.locks.iter().filter(|l| l.resource == resource).map(|l| l.id).collect();
        for id in ids {
            let Some(held) = self.lock(id).granted else { continue };
            let wanted = self.others(resource, id).filter_map(|o| o.wanted);
            let highest = wanted.filter(|wanted| !compatible(held, *wanted)).max();
            let lock = self.lock_mut(id);
            match highest {
                None => lock.told = None,
                Some(wanted) if lock.told < Some(wanted) => {
                    lock.told = Some(wanted);
                    let told =
                        lock.session.map(|session| (session, LockEvent::Blocking { lock: id, wanted }));
                    self.events.extend(told);
                }
                Some(_) => {}
            }
        }
    }

    fn seen(&self, resource: &str) -> Seen {
        let here = || self.locks.iter().filter(|l| l.resource == resource && l.granted.is_some());
        let writer = here().find(|l| is_writer(l.granted)).map(|l| (l.id, l.term));
        let rows = here().map(|l| LockRow { wanted: None, flags: Flags::NONE, ..l.row() });
        (self.values.get(resource).map_or(0, |value| value.sequence), writer, rows.collect())
    }

    fn tell_news(&mut self, resource: &str, before: &Seen) {
        let now = self.seen(resource);
        if (now.0, now.1) != (before.0, before.1) {
            let value = self.values.get(resource).cloned().unwrap_or_default();
            let event = LockEvent::Changed { resource: resource.into(), value, vacant: now.1.is_none() };
            self.tell(&Watched::Value(resource.into()), &event);
        }
        let is_gone = |row: &&LockRow| now.2.iter().all(|other| other.lock != row.lock);
        let gone = before.2.iter().filter(is_gone).map(|row| LockRow { mode: None, term: Term(0), ..*row });
        let new = now.2.iter().filter(|row| !before.2.contains(row)).copied();
        for row in gone.chain(new) {
            let event = LockEvent::Held { resource: resource.into(), row };
            self.tell(&Watched::Grants(resource.into()), &event);
        }
    }

    fn tell(&mut self, what: &Watched, event: &LockEvent) {
        let watchers: Vec<SessionId> =
            self.watches.keys().filter(|(_, watched)| watched == what).map(|(session, _)| *session).collect();
        for session in watchers {
            self.events.push((session, event.clone()));
            let watch = (session, what.clone());
            if self.watches[&watch] {
                self.watches.remove(&watch);
            }
        }
    }

    fn tell_key(&mut self, key: &str) {
        let (entry, revision) = (self.keys.get(key), Revision(self.keys.revision));
        let event = LockEvent::Key { key: key.into(), entry, revision };
        let mut told = BTreeSet::new();
        self.watches.retain(|(session, what), once| {
            let meant = match what {
                Watched::Key(name) => name == key,
                Watched::Prefix(prefix) => key.starts_with(prefix.as_str()),
                _ => false,
            };
            if meant {
                told.insert(*session);
            }
            !meant || !*once
        });
        self.events.extend(told.into_iter().map(|session| (session, event.clone())));
    }

    fn look(&self, what: &Watched) -> LockReply {
        match what {
            Watched::Value(name) => {
                let value = self.values.get(name).cloned().unwrap_or_default();
                LockReply::Value { value, vacant: self.seen(name).1.is_none() }
            }
            Watched::Grants(name) => LockReply::Resource(self.resource(name).unwrap_or_default()),
            Watched::Members => LockReply::Members(self.members.values().cloned().collect()),
            Watched::Key(key) => LockReply::Key(KeyReply::Found(self.keys.get(key))),
            Watched::Prefix(prefix) => LockReply::Key(self.keys.list(prefix, None)),
        }
    }

    pub(crate) fn resource(&self, name: &str) -> Option<ResourceView> {
        let here = || self.locks.iter().filter(|l| l.resource == name);
        let value = self.values.get(name).cloned();
        if here().count() == 0 && value.is_none() {
            return None;
        }
        let by_place = |mut locks: Vec<&L>| -> Vec<LockRow> {
            locks.sort_by_key(|l| l.place);
            locks.into_iter().map(L::row).collect()
        };
        Some(ResourceView {
            value: value.unwrap_or_default(),
            granted: here().filter(|l| l.granted.is_some()).map(L::row).collect(),
            converting: by_place(here().filter(|l| l.is_converting()).collect())
                .iter()
                .map(|row| row.lock)
                .collect(),
            waiting: by_place(here().filter(|l| l.granted.is_none()).collect()),
        })
    }

    /// The sessions that a waiting request waits for.
    fn waits_for(&self, lock: &L) -> BTreeSet<SessionId> {
        let Some(wanted) = lock.wanted else { return BTreeSet::new() };
        let in_the_way = |o: &&L| {
            let modes = [Some(wanted), other_mode(wanted, lock.flags)];
            let closed = |granted| modes.iter().flatten().all(|mode| !compatible(granted, *mode));
            let before = match (lock.granted.is_some(), o.wanted.is_some(), o.granted.is_some()) {
                (_, false, _) => false,
                (true, true, converts) => converts && o.place < lock.place,
                (false, true, true) => true,
                (false, true, false) => o.place < lock.place,
            };
            o.granted.is_some_and(closed) || before && !lock.flags.has(Flags::NOORDER)
        };
        let others = self.others(&lock.resource, lock.id).filter(in_the_way);
        others.filter_map(|o| o.session).filter(|other| Some(*other) != lock.session).collect()
    }

    fn counted(&self, session: SessionId) -> Vec<L> {
        let own = self.locks.iter().filter(|l| l.session == Some(session) && l.wanted.is_some());
        own.filter(|l| !l.flags.has(Flags::NODLCKWT)).cloned().collect()
    }

    fn comes_back(&self, session: SessionId, from: &[L]) -> bool {
        let mut reached: BTreeSet<SessionId> = from.iter().flat_map(|l| self.waits_for(l)).collect();
        loop {
            if reached.contains(&session) {
                return true;
            }
            let further = reached.iter().flat_map(|other| self.counted(*other));
            let further: BTreeSet<SessionId> = further.flat_map(|l| self.waits_for(&l)).collect();
            if further.is_subset(&reached) {
                return false;
            }
            reached.extend(further);
        }
    }

    fn closes_circle(&self, session: SessionId, id: LockId, flags: Flags) -> bool {
        let mut from = vec![self.lock(id).clone()];
        if flags.has(Flags::HEADQUE) {
            from.extend(self.counted(session));
        }
        self.comes_back(session, &from)
    }

    fn tell_circles_if(&mut self, reply: &LockReply, session: SessionId) {
        if matches!(reply, LockReply::Granted { .. }) {
            self.tell_circles(session);
        }
    }

    fn tell_circles(&mut self, session: SessionId) {
        for lock in self.counted(session) {
            if !lock.told_circle && self.comes_back(session, std::slice::from_ref(&lock)) {
                self.lock_mut(lock.id).told_circle = true;
                self.events.push((session, LockEvent::Deadlock { lock: lock.id }));
            }
        }
    }
}

fn other_mode(wanted: Mode, flags: Flags) -> Option<Mode> {
    let wishes = [(Flags::ALTPR, Mode::Pr), (Flags::ALTCW, Mode::Cw)];
    wishes.into_iter().find(|(flag, mode)| flags.has(*flag) && *mode != wanted).map(|(_, mode)| mode)
}

/// Flags that do not go together, on any request.
fn nonsense(flags: Flags) -> bool {
    flags.has(Flags::FORCEUNLOCK)
        || flags.has(Flags::NOQUEUEBAST) && !flags.has(Flags::NOQUEUE)
        || flags.has(Flags::ALTPR | Flags::ALTCW)
        || flags.has(Flags::NOQUEUE) && flags.has_any(Flags::HEADQUE | Flags::NODLCKWT)
}
