//! One key: what put, get and delete do to it, one after the other.
//!
//! Versions are revisions of the whole store, so of one key it is only known that they grow. A put whose answer is unknown has
//! the version under which somebody saw its value, if anybody did.

use std::collections::BTreeMap;

use csnap_proto::Revision;
use csnap_proto::message::lock::{Expect, KeyOp, KeyReply};
use todc_utils::Specification;

use super::{Record, Span, Verdict, judge};

#[derive(Clone, Debug)]
struct Event {
    op: KeyOp,
    /// Absent where nobody knows.
    reply: Option<KeyReply>,
    /// That somebody saw of what an unknown put wrote: then it happened.
    seen: Option<Revision>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Entry {
    value: Vec<u8>,
    /// Absent where nobody has seen it yet.
    version: Option<Revision>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    entry: Option<Entry>,
    /// The next change has a higher revision.
    revision: Revision,
}

struct Key;

impl Specification for Key {
    type State = State;
    type Operation = Event;

    fn init() -> State {
        State { entry: None, revision: Revision(0) }
    }

    fn apply(event: &Event, state: &State) -> (bool, State) {
        let after = match (&event.op, &event.reply) {
            (KeyOp::Get { .. }, Some(KeyReply::Found(None))) => state.entry.is_none().then(|| state.clone()),
            (KeyOp::Get { .. }, Some(KeyReply::Found(Some(view)))) => state.read(&view.value, view.version),
            (KeyOp::Put { value, expect, .. }, Some(KeyReply::Done { version })) => {
                state.put(value, *expect, Some(*version))
            }
            (KeyOp::Put { value, expect, .. }, None) => match event.seen {
                Some(version) => state.put(value, *expect, Some(version)),
                None => Some(state.put(value, *expect, None).unwrap_or_else(|| state.clone())),
            },
            (KeyOp::Delete { expect, .. }, Some(KeyReply::Done { version })) => {
                state.delete(*expect, Some(*version))
            }
            (KeyOp::Delete { .. }, Some(KeyReply::Found(None))) => {
                state.entry.is_none().then(|| state.clone())
            }
            (KeyOp::Delete { expect, .. }, None) => {
                Some(state.delete(*expect, None).unwrap_or_else(|| state.clone()))
            }
            (
                KeyOp::Put { expect, .. } | KeyOp::Delete { expect, .. },
                Some(KeyReply::Conflict { version }),
            ) => state.conflict(*expect, *version),
            (KeyOp::Get { .. }, None) => Some(state.clone()),
            // No such answer to this.
            _ => None,
        };
        let valid = after.is_some();
        (valid, after.unwrap_or_else(|| state.clone()))
    }
}

impl State {
    fn meets(&self, expect: Expect) -> bool {
        match expect {
            Expect::Any => true,
            Expect::Absent => self.entry.is_none(),
            Expect::Version(version) => {
                self.entry.as_ref().is_some_and(|entry| entry.version == Some(version))
            }
        }
    }

    fn grown(&self, version: Option<Revision>) -> Option<Revision> {
        match version {
            Some(version) => (version > self.revision).then_some(version),
            None => Some(self.revision),
        }
    }

    /// The entry is shown with this version.
    fn shown(&self, version: Revision) -> Option<Self> {
        let entry = self.entry.as_ref()?;
        match entry.version {
            Some(known) => (known == version).then(|| self.clone()),
            None => {
                let revision = self.grown(Some(version))?;
                let entry = Entry { version: Some(version), ..entry.clone() };
                Some(Self { entry: Some(entry), revision })
            }
        }
    }

    fn read(&self, value: &[u8], version: Revision) -> Option<Self> {
        self.entry.as_ref().filter(|entry| entry.value == value)?;
        self.shown(version)
    }

    fn put(&self, value: &[u8], expect: Expect, version: Option<Revision>) -> Option<Self> {
        let revision = self.grown(version).filter(|_| self.meets(expect))?;
        Some(Self { entry: Some(Entry { value: value.to_vec(), version }), revision })
    }

    fn delete(&self, expect: Expect, version: Option<Revision>) -> Option<Self> {
        let revision = self.grown(version).filter(|_| self.entry.is_some() && self.meets(expect))?;
        Some(Self { entry: None, revision })
    }

    fn conflict(&self, expect: Expect, version: Option<Revision>) -> Option<Self> {
        let shown = match version {
            None => self.entry.is_none().then(|| self.clone()),
            Some(version) => self.shown(version),
        };
        shown.filter(|state| !state.meets(expect))
    }
}

/// Whether the history of one key is linearizable.
pub(super) fn check(records: &[Record<KeyOp, KeyReply>], budget: u64) -> Verdict {
    let Some(versions) = versions(records) else { return Verdict::Not };
    let span = |record: &Record<KeyOp, KeyReply>| {
        let reply = record.answer.as_ref().map(|(_, reply)| reply.clone());
        let seen = match (&record.call, &reply) {
            (KeyOp::Put { value, .. }, None) => versions.get(value).copied(),
            _ => None,
        };
        let op = Event { op: record.call.clone(), reply, seen };
        Span { called: record.called, answered: record.answer.as_ref().map(|(at, _)| *at), op }
    };
    let known = |span: &Span<Event>| span.answered.is_some() || span.op.seen.is_some();
    // That what nobody saw never happened is one way to explain it, and nearly always one.
    match judge::<Key>(records.iter().map(span).filter(known).collect(), budget) {
        Verdict::Linearizable => Verdict::Linearizable,
        _ => judge::<Key>(records.iter().map(span).collect(), budget),
    }
}

/// The version of every value that anybody saw; none if one value had two, for each is put once.
fn versions(records: &[Record<KeyOp, KeyReply>]) -> Option<BTreeMap<Vec<u8>, Revision>> {
    let mut versions = BTreeMap::new();
    for record in records {
        let shown = match (&record.call, record.answer.as_ref().map(|(_, reply)| reply)) {
            (KeyOp::Put { value, .. }, Some(KeyReply::Done { version })) => Some((value, *version)),
            (_, Some(KeyReply::Found(Some(view)))) => Some((&view.value, view.version)),
            _ => None,
        };
        if let Some((value, version)) = shown
            && *versions.entry(value.clone()).or_insert(version) != version
        {
            return None;
        }
    }
    Some(versions)
}

#[cfg(test)]
mod tests {
    use csnap_proto::message::lock::KeyView;

    use super::super::{BUDGET, SessionNumber};
    use super::*;

    type Op = Record<KeyOp, KeyReply>;

    fn check(records: &[Op]) -> bool {
        super::check(records, BUDGET) == Verdict::Linearizable
    }

    fn op(called: u64, call: KeyOp, answered: u64, reply: Option<KeyReply>) -> Op {
        Record { session: SessionNumber(0), called, call, answer: reply.map(|reply| (answered, reply)) }
    }

    fn put(called: u64, value: u8, expect: Expect, answered: u64, reply: Option<KeyReply>) -> Op {
        let op_of = KeyOp::Put { key: "k".into(), value: vec![value], expect, ephemeral: false };
        op(called, op_of, answered, reply)
    }

    fn get(called: u64, answered: u64, found: Option<(u8, u64)>) -> Op {
        let view = found.map(|(value, version)| KeyView {
            key: "k".into(),
            value: vec![value],
            version: Revision(version),
            created: Revision(1),
            session: None,
        });
        op(called, KeyOp::Get { key: "k".into() }, answered, Some(KeyReply::Found(view)))
    }

    fn done(version: u64) -> Option<KeyReply> {
        Some(KeyReply::Done { version: Revision(version) })
    }

    #[test]
    fn a_read_sees_the_last_write_that_ended_or_one_that_is_under_way() {
        let written = put(1, 1, Expect::Any, 4, done(5));
        assert!(check(&[written.clone(), get(2, 3, None), get(5, 6, Some((1, 5)))]));
        assert!(check(&[written.clone(), get(2, 3, Some((1, 5)))]));
        assert!(!check(&[written.clone(), get(5, 6, None)]), "a stale read");
        assert!(!check(&[written, get(2, 3, Some((1, 5))), get(4, 5, None)]), "read, and then not there");
    }

    #[test]
    fn an_unknown_write_may_have_happened_and_then_only_once() {
        let unknown = put(1, 1, Expect::Any, 0, None);
        let later = put(4, 2, Expect::Any, 5, done(8));
        assert!(check(&[unknown.clone(), get(2, 3, None)]));
        assert!(check(&[unknown.clone(), get(2, 3, None), later.clone(), get(6, 7, Some((1, 9)))]));
        assert!(!check(&[unknown.clone(), get(2, 3, Some((1, 6))), later.clone(), get(6, 7, Some((1, 6)))]));
        assert!(
            !check(&[unknown, get(2, 3, Some((1, 6))), later, get(6, 7, Some((1, 9)))]),
            "applied twice: one value with two versions"
        );
    }

    #[test]
    fn of_two_that_expect_the_same_version_one_wins() {
        let base = put(1, 1, Expect::Absent, 2, done(5));
        let swap = |value, version| {
            put(
                3,
                value,
                Expect::Version(Revision(5)),
                4,
                Some(KeyReply::Done { version: Revision(version) }),
            )
        };
        let conflict = put(
            3,
            3,
            Expect::Version(Revision(5)),
            4,
            Some(KeyReply::Conflict { version: Some(Revision(6)) }),
        );
        assert!(check(&[base.clone(), swap(2, 6), conflict]));
        assert!(!check(&[base, swap(2, 6), swap(3, 7)]));
    }

    #[test]
    fn a_delete_that_nobody_saw_explains_what_is_gone() {
        let base = put(1, 1, Expect::Any, 2, done(5));
        let gone = op(3, KeyOp::Delete { key: "k".into(), expect: Expect::Any }, 0, None);
        assert!(check(&[base.clone(), gone.clone(), get(4, 5, Some((1, 5))), get(6, 7, None)]));
        assert!(!check(&[base, gone, get(4, 5, None), get(6, 7, Some((1, 5)))]));
    }

    #[test]
    fn what_the_judge_cannot_find_out_within_its_budget_is_undecided() {
        // Any order of these writes explains any of them, and none explains the read.
        let mut ops: Vec<Op> = (1..=16).map(|n| put(n, 0, Expect::Any, 40, None)).collect();
        for (n, op) in ops.iter_mut().enumerate() {
            let value = vec![u8::try_from(n).expect("few")];
            op.call = KeyOp::Put { key: "k".into(), value, expect: Expect::Any, ephemeral: false };
        }
        ops.push(op(41, KeyOp::Delete { key: "k".into(), expect: Expect::Any }, 42, done(3)));
        ops.push(get(43, 44, Some((99, 9))));
        assert_eq!(super::check(&ops, 1 << 20), Verdict::Undecided);
        assert_eq!(super::check(&ops[16..], 1 << 20), Verdict::Not);
        ops.pop();
        assert_eq!(super::check(&ops, 1 << 20), Verdict::Linearizable);
    }
}
