//! One lock: an exclusive one that is tried for, given up, and released when its session ends.

use std::collections::{BTreeMap, BTreeSet};

use csnap_proto::Term;
use todc_utils::Specification;

use super::{End, Record, Session, SessionNumber, Span, Verdict, judge};

/// What a client asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockCall {
    /// EX with NOQUEUE.
    Try,
    /// Give it up.
    Unlock,
}

/// What it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockAnswer {
    /// It holds it, under this term.
    Granted(Term),
    /// Somebody else does.
    Refused,
    /// It holds it no more.
    Done,
}

#[derive(Clone, Copy, Debug)]
enum What {
    Call(LockCall, Option<LockAnswer>),
    /// The session ends.
    End,
}

#[derive(Clone, Copy, Debug)]
struct Event {
    session: SessionNumber,
    what: What,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    holder: Option<SessionNumber>,
    /// The highest that was told.
    term: Term,
    /// Nothing is done for these any more.
    ended: BTreeSet<SessionNumber>,
}

struct Lock;

impl Specification for Lock {
    type State = State;
    type Operation = Event;

    fn init() -> State {
        State { holder: None, term: Term(0), ended: BTreeSet::new() }
    }

    fn apply(event: &Event, state: &State) -> (bool, State) {
        let (session, mut after) = (event.session, state.clone());
        let lives = !state.ended.contains(&session);
        let holds = state.holder == Some(session);
        let valid = match event.what {
            What::Call(LockCall::Try, Some(LockAnswer::Granted(term))) => {
                (after.holder, after.term) = (Some(session), term);
                lives && state.holder.is_none() && term > state.term
            }
            What::Call(LockCall::Try, Some(LockAnswer::Refused)) => lives && state.holder.is_some(),
            What::Call(LockCall::Try, None) => {
                if lives && state.holder.is_none() {
                    after.holder = Some(session);
                }
                true
            }
            What::Call(LockCall::Unlock, Some(LockAnswer::Done)) => {
                after.holder = None;
                lives && holds
            }
            What::Call(LockCall::Unlock, None) => {
                after.holder = state.holder.filter(|_| !holds);
                true
            }
            What::End => {
                after.holder = state.holder.filter(|_| !holds);
                after.ended.insert(session);
                true
            }
            // No such answer to this.
            What::Call(..) => false,
        };
        (valid, if valid { after } else { state.clone() })
    }
}

/// Whether the history of one lock is linearizable.
pub(super) fn check(
    records: &[Record<LockCall, LockAnswer>],
    sessions: &BTreeMap<SessionNumber, Session>,
    budget: u64,
) -> Verdict {
    let calls = |unknown: bool| {
        let wanted = records.iter().filter(move |record| unknown || record.answer.is_some());
        wanted.map(|record| {
            let answer = record.answer.map(|(_, answer)| answer);
            let what = What::Call(record.call, answer);
            Span {
                called: record.called,
                answered: record.answer.map(|(at, _)| at),
                op: Event { session: record.session, what },
            }
        })
    };
    let concerned: BTreeSet<SessionNumber> = records.iter().filter(may_hold).map(|r| r.session).collect();
    let ends = || {
        sessions.iter().filter(|(session, _)| concerned.contains(session)).filter_map(|(session, known)| {
            let answered = match known.end {
                End::Lives => return None,
                End::Abandoned => None,
                End::Told(at) => Some(at),
            };
            let op = Event { session: *session, what: What::End };
            Some(Span { called: known.alive + 1, answered, op })
        })
    };
    // That what nobody saw never happened is one way to explain it, and nearly always one.
    match judge::<Lock>(calls(false).chain(ends()).collect(), budget) {
        Verdict::Linearizable => Verdict::Linearizable,
        _ => judge::<Lock>(calls(true).chain(ends()).collect(), budget),
    }
}

/// After this its session may have the lock.
fn may_hold(record: &&Record<LockCall, LockAnswer>) -> bool {
    let refused = matches!(record.answer, Some((_, LockAnswer::Refused)));
    record.call == LockCall::Try && !refused
}

#[cfg(test)]
mod tests {
    use super::super::BUDGET;
    use super::*;

    type Op = Record<LockCall, LockAnswer>;

    fn check(records: &[Op], sessions: &BTreeMap<SessionNumber, Session>) -> bool {
        super::check(records, sessions, BUDGET) == Verdict::Linearizable
    }

    fn op(session: u32, called: u64, call: LockCall, answer: Option<(u64, LockAnswer)>) -> Op {
        Record { session: SessionNumber(session), called, call, answer }
    }

    fn tried(session: u32, called: u64, answered: u64, term: Option<u64>) -> Op {
        let answer = term.map_or(LockAnswer::Refused, |term| LockAnswer::Granted(Term(term)));
        op(session, called, LockCall::Try, Some((answered, answer)))
    }

    fn unlocked(session: u32, called: u64, answered: u64) -> Op {
        op(session, called, LockCall::Unlock, Some((answered, LockAnswer::Done)))
    }

    fn sessions(ends: &[End]) -> BTreeMap<SessionNumber, Session> {
        let session = |(n, end): (usize, &End)| {
            (SessionNumber(u32::try_from(n).expect("few")), Session { alive: 2, end: *end })
        };
        ends.iter().enumerate().map(session).collect()
    }

    #[test]
    fn one_holds_it_at_a_time_and_terms_grow() {
        let live = sessions(&[End::Lives, End::Lives]);
        let first = [tried(0, 2, 4, Some(1)), tried(1, 6, 8, None), unlocked(0, 10, 12)];
        let then = |op| [first.to_vec(), vec![op]].concat();
        assert!(check(&then(tried(1, 14, 16, Some(2))), &live));
        assert!(!check(&then(tried(1, 14, 16, Some(1))), &live), "a term again");
        assert!(!check(&then(tried(1, 7, 9, Some(2))), &live), "two holders");
        assert!(!check(&then(tried(1, 14, 16, None)), &live), "refused by nobody");
    }

    #[test]
    fn a_session_that_ended_released_it_before_its_owner_was_told() {
        let ops = [tried(0, 2, 4, Some(1)), tried(1, 6, 8, Some(2))];
        assert!(!check(&ops, &sessions(&[End::Lives, End::Lives])));
        assert!(check(&ops, &sessions(&[End::Abandoned, End::Lives])));
        assert!(check(&ops, &sessions(&[End::Told(20), End::Lives])));
        let late = [tried(0, 2, 4, Some(1)), tried(1, 22, 24, None)];
        assert!(check(&late, &sessions(&[End::Abandoned, End::Lives])));
        assert!(!check(&late, &sessions(&[End::Told(20), End::Lives])), "told, and held all the same");
    }

    #[test]
    fn an_unknown_try_may_hold_it_until_its_session_ends() {
        let unknown = op(0, 2, LockCall::Try, None);
        let ops = [unknown, tried(1, 4, 6, None), tried(1, 8, 10, Some(3))];
        assert!(check(&ops, &sessions(&[End::Abandoned, End::Lives])));
        assert!(!check(&ops, &sessions(&[End::Lives, End::Lives])), "who lives lets go only by itself");
    }
}
