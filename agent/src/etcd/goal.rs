//! An operation as a goal: reached, out of reach, or one transaction away.
//!
//! A goal is held against the mirror, again after every transaction, whether it wrote or not. So it does not matter how
//! often it was sent, or that the answer to one that took effect was lost: what is there tells.

use std::collections::BTreeSet;

use csnap_proto::message::lock::{
    Flags, LockOp, LockReply, LockView, Mode, Told, ValueBlock, ValueChange, Watched,
};
use csnap_proto::{LockId, SessionId, Term};

use super::call::{Guard, Put, Revision, Txn};
use super::canary::{Broken, Canary};
use super::keys::{self, Key, LockRecord, MemberRecord, ValueRecord};
use super::mirror::Mirror;

/// Most locks that a session reads under; an agent has two at most.
const READERS_MAX: usize = 16;

/// What follows for an operation from what is.
#[derive(Debug)]
pub(super) enum Next {
    /// It is done, or cannot be.
    Answer(LockReply),
    /// This brings it on.
    Txn(Txn),
    /// The session is over: what it held is not held any more.
    Over(&'static str),
}

/// The lock is ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Writer {
    pub(super) lock: LockId,
    pub(super) created: Revision,
    pub(super) term: Term,
}

/// What a session has. Locks in CR are known here alone: nobody waits for a reader of this lock, so etcd has no word of it.
#[derive(Debug, Default)]
pub(super) struct Standing {
    last_lock: u64,
    readers: BTreeSet<LockId>,
    pub(super) writer: Option<Writer>,
    pub(super) watches_value: bool,
    pub(super) watches_members: bool,
}

/// What an operation is held against.
pub(super) struct Scene<'a> {
    pub(super) session: SessionId,
    pub(super) resource: &'a str,
    /// No term up to this one is given any more, whatever etcd says.
    pub(super) floor: Term,
    pub(super) mirror: &'a Mirror,
    pub(super) broken: Broken,
}

impl Standing {
    /// Takes up the lock that an earlier life of the agent left, if there is one.
    pub(super) fn find_writer(&mut self, scene: &Scene<'_>) {
        let left = scene.mirror.lock.as_ref().filter(|lock| lock.record.session == scene.session);
        self.writer = left.map(|seen| {
            self.last_lock += 1;
            Writer { lock: LockId(self.last_lock), created: seen.created, term: seen.record.term }
        });
    }

    /// Every lock, as its owner sees it.
    pub(super) fn locks(&self, resource: &str) -> Vec<LockView> {
        let readers = self.readers.iter().map(|lock| view(*lock, resource, Mode::Cr, Term(0)));
        readers.chain(self.writer.map(|writer| writer.view(resource))).collect()
    }

    /// What follows for `op`.
    pub(super) fn next(&mut self, op: &LockOp, scene: &Scene<'_>) -> Next {
        match op {
            LockOp::Lock { resource, mode: Mode::Cr, flags, owner: None }
                if resource == scene.resource && flags.without(Flags::NOQUEUE) == Flags::NONE =>
            {
                self.read(scene)
            }
            LockOp::Convert { lock, mode: Mode::Pw, flags, value } => match (self.writer, value) {
                (Some(writer), ValueChange::Write(bytes)) if writer.lock == *lock => {
                    write(writer, bytes, scene)
                }
                (None, ValueChange::Keep) if *flags == Flags::NOQUEUE => self.take(*lock, scene),
                _ => beyond(op),
            },
            LockOp::Unlock { lock, value, .. } => self.unlock(*lock, value, scene),
            LockOp::SetInfo { info } => describe(info, scene),
            LockOp::Watch { what: Watched::Value(resource), once: false } if resource == scene.resource => {
                self.watches_value = true;
                let (value, vacant) = (scene.mirror.value_block(), scene.mirror.is_vacant());
                Next::Answer(LockReply::Value { value, vacant })
            }
            LockOp::Watch { what: Watched::Members, once: false } => {
                self.watches_members = true;
                Next::Answer(LockReply::Members(scene.mirror.members()))
            }
            _ => beyond(op),
        }
    }

    fn read(&mut self, scene: &Scene<'_>) -> Next {
        if self.readers.len() >= READERS_MAX {
            return refuse(format!("a session reads under at most {READERS_MAX} locks"));
        }
        self.last_lock += 1;
        let lock = LockId(self.last_lock);
        self.readers.insert(lock);
        granted(view(lock, scene.resource, Mode::Cr, Term(0)), Some(scene.mirror.value_block()))
    }

    /// CR to PW, without queueing.
    fn take(&mut self, lock: LockId, scene: &Scene<'_>) -> Next {
        if !self.readers.contains(&lock) {
            return no_such(lock);
        }
        let mirror = scene.mirror;
        match &mirror.lock {
            None => Next::Txn(take(scene)),
            Some(seen) if seen.record.session == scene.session => {
                self.readers.remove(&lock);
                let writer = Writer { lock, created: seen.created, term: seen.record.term };
                self.writer = Some(writer);
                granted(writer.view(scene.resource), Some(mirror.value_block()))
            }
            Some(_) => Next::Answer(LockReply::WouldBlock),
        }
    }

    fn unlock(&mut self, lock: LockId, value: &ValueChange, scene: &Scene<'_>) -> Next {
        if self.readers.remove(&lock) {
            return Next::Answer(LockReply::Done);
        }
        let Some(writer) = self.writer.filter(|writer| writer.lock == lock) else { return no_such(lock) };
        if !scene.mirror.is_held(writer.created) {
            self.writer = None;
            return Next::Answer(LockReply::Done);
        }
        let last_word = match value {
            ValueChange::Write(bytes) => Some(bytes.clone()),
            ValueChange::Invalidate => None,
            ValueChange::Keep => {
                Some(scene.mirror.value_block()).filter(|value| value.valid).map(|v| v.bytes)
            }
        };
        let written = last_word.map(|bytes| value_write(writer, bytes, true, scene)).unwrap_or_default();
        Next::Txn(Txn { deletes: vec![Key::Lock], ..holding(writer, written, scene) })
    }
}

impl Writer {
    pub(super) fn view(self, resource: &str) -> LockView {
        view(self.lock, resource, Mode::Pw, self.term)
    }

    /// Gives back what nobody asked for any more.
    pub(super) fn release(created: Revision) -> Txn {
        Txn { when: vec![Guard::Created(Key::Lock, created)], deletes: vec![Key::Lock], ..Txn::default() }
    }
}

/// Creates the lock under the next term. The guard on the term makes the number fresh, and an attempt that arrives late
/// void: once anybody took the lock after it was sent, it writes nothing.
fn take(scene: &Scene<'_>) -> Txn {
    let after = scene.mirror.term();
    let term = after.max(scene.floor).next();
    let lock = LockRecord { session: scene.session, term, after };
    let mut when = vec![Guard::Created(Key::Lock, 0)];
    if !scene.broken.breaks(Canary::TakeUnguarded) {
        when.push(Guard::Written(Key::Term, scene.mirror.term_written()));
    }
    Txn {
        when,
        puts: vec![
            Put { key: Key::Lock, value: keys::encode(&lock), leased: true },
            Put { key: Key::Term, value: keys::encode(&term), leased: false },
        ],
        deletes: Vec::new(),
    }
}

/// PW to PW, with a value.
fn write(writer: Writer, bytes: &[u8], scene: &Scene<'_>) -> Next {
    if !scene.mirror.is_held(writer.created) {
        return Next::Over("the server lock was taken from this session");
    }
    let there = scene.mirror.value.as_ref().map(|value| &value.record);
    if there.is_some_and(|value| value.term == writer.term && !value.last && value.bytes == bytes) {
        return granted(writer.view(scene.resource), None);
    }
    Next::Txn(holding(writer, value_write(writer, bytes.to_vec(), false, scene), scene))
}

/// Adds the guard without which a holder writes nothing: it must be the holder still.
fn holding(writer: Writer, mut txn: Txn, scene: &Scene<'_>) -> Txn {
    txn.when.insert(0, Guard::Created(Key::Lock, writer.created));
    if scene.broken.breaks(Canary::WriteUnguarded) {
        txn.when.clear();
    }
    txn
}

/// Replaces the value that the mirror shows: an older write of ours that arrives late replaces nothing.
fn value_write(writer: Writer, bytes: Vec<u8>, last: bool, scene: &Scene<'_>) -> Txn {
    let record = ValueRecord { session: scene.session, term: writer.term, last, bytes };
    Txn {
        when: vec![Guard::Written(Key::Value, scene.mirror.value_written())],
        puts: vec![Put { key: Key::Value, value: keys::encode(&record), leased: false }],
        deletes: Vec::new(),
    }
}

fn describe(info: &[u8], scene: &Scene<'_>) -> Next {
    let Some(seen) = scene.mirror.member(scene.session) else { return Next::Over("its lease ended") };
    if seen.record.info == info {
        return Next::Answer(LockReply::Done);
    }
    let key = Key::Member(scene.session);
    let record = MemberRecord { node: seen.record.node.clone(), info: info.to_vec() };
    Next::Txn(Txn {
        when: vec![Guard::Written(key, seen.written)],
        puts: vec![Put { key, value: keys::encode(&record), leased: true }],
        deletes: Vec::new(),
    })
}

fn view(lock: LockId, resource: &str, mode: Mode, term: Term) -> LockView {
    LockView { lock, resource: resource.to_owned(), mode, term }
}

fn granted(lock: LockView, value: Option<ValueBlock>) -> Next {
    Next::Answer(LockReply::Granted { lock, value, told: Told::default() })
}

fn refuse(why: String) -> Next {
    Next::Answer(LockReply::Invalid(why))
}

fn no_such(lock: LockId) -> Next {
    refuse(format!("no lock {lock} in this session"))
}

fn beyond(op: &LockOp) -> Next {
    refuse(format!("etcd keeps only the server lock and the members, so it cannot do this: {op:?}"))
}
