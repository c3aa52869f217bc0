//! What clients asked of keys and locks and what they were told, and whether that is linearizable: whether each operation can
//! have happened at one instant between its call and its answer, in one order for everybody.
//!
//! The judge is the WGL checker of `todc-utils`; ours are the recorder here, the [`client`] whose doings are recorded, and the
//! two sequential specifications, [`key`] and [`lock`]. Linearizability is local (Herlihy and Wing, 1990): every key and
//! every lock is checked by itself.
//!
//! An operation that was not answered is unknown: it may have happened at any later time, or never, which is the same as
//! at the very end. The judge may need longer than anybody waits: what it has not found out within a bound is undecided, which is
//! counted and is no verdict. A session that ended is an operation too: somewhere between its last sign of life and the moment when its
//! owner was told, everything that it held was released.

pub mod client;
mod key;
mod lock;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

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

/// What the judge may spend on one history: it spends [`STEP`] where it tries an operation in a place, and as much as there are
/// operations where it fits there and is remembered. So it is about the bytes that it keeps, and some ten seconds. The history of five
/// real clients took 0.4 thousandths of it for eight seconds, and 6 for thirty.
const BUDGET: u64 = 1 << 30;
const STEP: u64 = 64;

/// What the judge says of a history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Linearizable,
    Not,
    /// It would have taken more than the budget.
    Undecided,
}

/// What was checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Keys and locks.
    pub histories: u64,
    /// Operations on them.
    pub operations: u64,
    /// Of which nobody knows whether they happened.
    pub unknown: u64,
    /// Histories that the judge did not come to the end of.
    pub undecided: u64,
    /// The most that was spent on one history, in millionths of what may be.
    pub spent_ppm: u64,
}

impl Checked {
    /// Both together.
    pub fn add(&mut self, other: Self) {
        self.histories += other.histories;
        self.operations += other.operations;
        self.unknown += other.unknown;
        self.undecided += other.undecided;
        self.spent_ppm = self.spent_ppm.max(other.spent_ppm);
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
            let judge = |records: &[Record<KeyOp, KeyReply>]| key::check(records, BUDGET);
            let verdict = judge(records);
            if verdict == Verdict::Not {
                return Err(format!("key {key}: {}", first_wrong(records, judge)));
            }
            checked.add(count(records, verdict));
        }
        for (resource, records) in &self.locks {
            let judge =
                |records: &[Record<LockCall, LockAnswer>]| lock::check(records, &self.sessions, BUDGET);
            let verdict = judge(records);
            if verdict == Verdict::Not {
                return Err(format!("lock {resource}: {}", first_wrong(records, judge)));
            }
            checked.add(count(records, verdict));
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

/// Right after it was judged.
fn count<C, A>(records: &[Record<C, A>], verdict: Verdict) -> Checked {
    let unknown = records.iter().filter(|record| record.answer.is_none()).count() as u64;
    let undecided = u64::from(verdict == Verdict::Undecided);
    let spent_ppm = (BUDGET - PURSE.get().left) / (BUDGET / 1_000_000);
    Checked { histories: 1, operations: records.len() as u64, unknown, undecided, spent_ppm }
}

/// What the judge has left for the history before it.
#[derive(Clone, Copy, Debug)]
struct Purse {
    left: u64,
    /// For an operation that fits where it was tried.
    fits: u64,
}

thread_local! {
    static PURSE: Cell<Purse> = const { Cell::new(Purse { left: BUDGET, fits: 0 }) };
}

/// The judge stops.
struct Spent;

/// A specification that stops the judge, who knows no bound of his own, when the budget is spent.
struct Bounded<S>(PhantomData<S>);

impl<S: Specification> Specification for Bounded<S> {
    type State = S::State;
    type Operation = S::Operation;

    fn init() -> S::State {
        S::init()
    }

    fn apply(operation: &S::Operation, state: &S::State) -> (bool, S::State) {
        let (valid, after) = S::apply(operation, state);
        let Purse { left, fits } = PURSE.get();
        let Some(left) = left.checked_sub(if valid { STEP + fits } else { STEP }) else {
            // Not a panic: nobody is told.
            resume_unwind(Box::new(Spent))
        };
        PURSE.set(Purse { left, fits });
        (valid, after)
    }
}

/// An operation as the checker takes it: between which moments, and what it was.
struct Span<O> {
    called: Moment,
    answered: Option<Moment>,
    op: O,
}

/// Asks the checker. Each operation is a process of its own; those without an end end last.
fn judge<S: Specification>(spans: Vec<Span<S::Operation>>, budget: u64) -> Verdict {
    PURSE.set(Purse { left: budget, fits: spans.len() as u64 });
    if spans.is_empty() {
        return Verdict::Linearizable;
    }
    let mut actions = Vec::with_capacity(2 * spans.len());
    for (process, Span { called, answered, op }) in spans.into_iter().enumerate() {
        actions.push((called, process, Action::Call(op.clone())));
        actions.push((answered.unwrap_or(Moment::MAX), process, Action::Response(op)));
    }
    actions.sort_by_key(|(at, process, _)| (*at, *process));
    let actions = actions.into_iter().map(|(_, process, action)| (process, action)).collect();
    let history = History::from_actions(actions);
    match catch_unwind(AssertUnwindSafe(|| WGLChecker::<Bounded<S>>::is_linearizable(history))) {
        Ok(true) => Verdict::Linearizable,
        Ok(false) => Verdict::Not,
        Err(stopped) if stopped.is::<Spent>() => Verdict::Undecided,
        Err(panic) => resume_unwind(panic),
    }
}

/// Every beginning of a linearizable history is linearizable: the shortest one that is not ends with the answer to look at. One
/// that is undecided is not looked at.
fn first_wrong<C: Clone + Debug, A: Clone + Debug>(
    records: &[Record<C, A>],
    judge: impl Fn(&[Record<C, A>]) -> Verdict,
) -> String {
    let mut ends: Vec<Moment> = records.iter().filter_map(|r| r.answer.as_ref()).map(|(at, _)| *at).collect();
    ends.sort_unstable();
    let until = |end: Moment| -> Vec<Record<C, A>> {
        let begun = records.iter().filter(|record| record.called < end).cloned();
        begun.map(|r| Record { answer: r.answer.clone().filter(|(at, _)| *at <= end), ..r }).collect()
    };
    let wrong = ends.partition_point(|end| judge(&until(*end)) != Verdict::Not);
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
