//! What clients asked of keys and locks and what they were told, and whether that is linearizable: whether each operation can
//! have happened at one instant between its call and its answer, in one order for everybody.
//!
//! The judge is the WGL checker of `todc-utils`; ours are the recorder here, the [`client`] whose doings are recorded, and the
//! two sequential specifications, [`key`] and [`lock`]. Linearizability is local (Herlihy and Wing, 1990): every key and
//! every lock is checked by itself.
//!
//! An operation that was not answered is unknown: it may have happened at any later time, or never, which is the same as
//! at the very end. A session that ended is an operation too: somewhere between its last sign of life and the moment when its
//! owner was told, everything that it held was released.

pub mod client;
mod key;
mod lock;

use std::collections::BTreeMap;
use std::fmt::Debug;

use csnap_proto::message::lock::{KeyOp, KeyReply};
use todc_utils::{Action, History, Specification, WGLChecker};

pub use self::lock::{LockAnswer, LockCall};

/// A session of a client; a client that loses one goes on in another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionNumber(pub u32);

/// An operation under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallNumber(usize);

/// An instant: things are numbered in the order in which they were recorded.
type Moment = u64;

#[derive(Clone, Debug)]
struct Record<C, A> {
    session: SessionNumber,
    called: Moment,
    call: C,
    answer: Option<(Moment, A)>,
}

/// How long a session was there.
#[derive(Clone, Copy, Debug)]
struct Session {
    /// The call of the last operation that was answered in it.
    alive: Moment,
    end: End,
}

#[derive(Clone, Copy, Debug)]
enum End {
    Lives,
    /// Its owner went on without it; it ends when its lease does.
    Abandoned,
    /// Its owner was told that nothing of it is held.
    Told(Moment),
}

enum Object {
    Key(String, usize),
    Lock(String, usize),
}

/// Operations that are shown of a history that is not linearizable.
const AROUND: usize = 12;

/// What was checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Keys and locks.
    pub histories: u64,
    /// Operations on them.
    pub operations: u64,
    /// Of which nobody knows whether they happened.
    pub unknown: u64,
}

impl Checked {
    /// Both together.
    pub fn add(&mut self, other: Self) {
        self.histories += other.histories;
        self.operations += other.operations;
        self.unknown += other.unknown;
    }
}

/// See the module.
#[derive(Default)]
pub struct Recorder {
    now: Moment,
    sessions: BTreeMap<SessionNumber, Session>,
    calls: Vec<Object>,
    keys: BTreeMap<String, Vec<Record<KeyOp, KeyReply>>>,
    locks: BTreeMap<String, Vec<Record<LockCall, LockAnswer>>>,
}

impl Recorder {
    /// A client begins a session.
    pub fn open(&mut self) -> SessionNumber {
        let number = SessionNumber(u32::try_from(self.sessions.len()).expect("few sessions"));
        let alive = self.tick();
        self.sessions.insert(number, Session { alive, end: End::Lives });
        number
    }

    /// Its owner was told that it is over.
    pub fn told_lost(&mut self, session: SessionNumber) {
        let now = self.tick();
        self.session(session).end = End::Told(now);
    }

    /// Its owner goes on without it.
    pub fn abandon(&mut self, session: SessionNumber) {
        self.session(session).end = End::Abandoned;
    }

    /// A put, get or delete of `key` is about to be asked for. What is put must be put only once in a history.
    pub fn call_key(&mut self, session: SessionNumber, key: &str, op: KeyOp) -> CallNumber {
        let called = self.tick();
        let records = self.keys.entry(key.to_owned()).or_default();
        records.push(Record { session, called, call: op, answer: None });
        self.calls.push(Object::Key(key.to_owned(), records.len() - 1));
        CallNumber(self.calls.len() - 1)
    }

    /// An operation on the lock `resource` is about to be asked for.
    pub fn call_lock(&mut self, session: SessionNumber, resource: &str, call: LockCall) -> CallNumber {
        let called = self.tick();
        let records = self.locks.entry(resource.to_owned()).or_default();
        records.push(Record { session, called, call, answer: None });
        self.calls.push(Object::Lock(resource.to_owned(), records.len() - 1));
        CallNumber(self.calls.len() - 1)
    }

    /// The answer to an operation on a key came.
    ///
    /// # Panics
    /// If the operation was on a lock.
    pub fn answer_key(&mut self, call: CallNumber, reply: KeyReply) {
        let now = self.tick();
        let Object::Key(key, index) = &self.calls[call.0] else { panic!("{call:?} is on a lock") };
        let record = &mut self.keys.get_mut(key).expect("it was called")[*index];
        record.answer = Some((now, reply));
        let (session, called) = (record.session, record.called);
        self.lives(session, called);
    }

    /// The answer to an operation on a lock came.
    ///
    /// # Panics
    /// If the operation was on a key.
    pub fn answer_lock(&mut self, call: CallNumber, answer: LockAnswer) {
        let now = self.tick();
        let Object::Lock(resource, index) = &self.calls[call.0] else { panic!("{call:?} is on a key") };
        let record = &mut self.locks.get_mut(resource).expect("it was called")[*index];
        record.answer = Some((now, answer));
        let (session, called) = (record.session, record.called);
        self.lives(session, called);
    }

    /// Judges everything that was recorded.
    ///
    /// # Errors
    /// The first history that is not linearizable, and the first answer in it that nothing explains.
    pub fn check(&self) -> Result<Checked, String> {
        let mut checked = Checked::default();
        for (key, records) in &self.keys {
            checked.add(count(records));
            let holds = |records: &[Record<KeyOp, KeyReply>]| key::check(records);
            if !holds(records) {
                return Err(format!("key {key}: {}", first_wrong(records, holds)));
            }
        }
        for (resource, records) in &self.locks {
            checked.add(count(records));
            let holds = |records: &[Record<LockCall, LockAnswer>]| lock::check(records, &self.sessions);
            if !holds(records) {
                return Err(format!("lock {resource}: {}", first_wrong(records, holds)));
            }
        }
        Ok(checked)
    }

    fn tick(&mut self) -> Moment {
        // Room in between for what follows from one of them.
        self.now += 2;
        self.now
    }

    fn session(&mut self, session: SessionNumber) -> &mut Session {
        self.sessions.get_mut(&session).expect("it was opened")
    }

    fn lives(&mut self, session: SessionNumber, called: Moment) {
        let session = self.session(session);
        session.alive = session.alive.max(called);
    }
}

fn count<C, A>(records: &[Record<C, A>]) -> Checked {
    let unknown = records.iter().filter(|record| record.answer.is_none()).count() as u64;
    Checked { histories: 1, operations: records.len() as u64, unknown }
}

/// An operation as the checker takes it: between which moments, and what it was.
struct Span<O> {
    called: Moment,
    answered: Option<Moment>,
    op: O,
}

/// Asks the checker. Each operation is a process of its own; those without an end end last.
fn is_linearizable<S: Specification>(spans: Vec<Span<S::Operation>>) -> bool {
    if spans.is_empty() {
        return true;
    }
    let mut actions = Vec::with_capacity(2 * spans.len());
    for (process, Span { called, answered, op }) in spans.into_iter().enumerate() {
        actions.push((called, process, Action::Call(op.clone())));
        actions.push((answered.unwrap_or(Moment::MAX), process, Action::Response(op)));
    }
    actions.sort_by_key(|(at, process, _)| (*at, *process));
    let actions = actions.into_iter().map(|(_, process, action)| (process, action)).collect();
    WGLChecker::<S>::is_linearizable(History::from_actions(actions))
}

/// Every beginning of a linearizable history is linearizable: the shortest one that is not ends with the answer to look at.
fn first_wrong<C: Clone + Debug, A: Clone + Debug>(
    records: &[Record<C, A>],
    holds: impl Fn(&[Record<C, A>]) -> bool,
) -> String {
    let mut ends: Vec<Moment> = records.iter().filter_map(|r| r.answer.as_ref()).map(|(at, _)| *at).collect();
    ends.sort_unstable();
    let until = |end: Moment| -> Vec<Record<C, A>> {
        let begun = records.iter().filter(|record| record.called < end).cloned();
        begun.map(|r| Record { answer: r.answer.clone().filter(|(at, _)| *at <= end), ..r }).collect()
    };
    let wrong = ends.partition_point(|end| holds(&until(*end)));
    let Some(end) = ends.get(wrong) else { return "not linearizable".to_owned() };
    let mut text = format!("not linearizable; the first {wrong} of {} answers are. Around it:", ends.len());
    let begun = &records[..records.partition_point(|record| record.called < *end)];
    for record in &begun[begun.len().saturating_sub(AROUND)..] {
        let mark = if record.answer.as_ref().is_some_and(|(at, _)| at == end) { ">>" } else { "  " };
        let Record { session, called, call, answer } = record;
        text += &format!("\n  {mark} session {} at {called}: {call:?} -> {answer:?}", session.0);
    }
    text
}
