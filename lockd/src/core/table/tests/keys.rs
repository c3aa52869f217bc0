//! Keys: versions, conditions, ephemerals, watches, limits.

use csnap_proto::Revision;
use csnap_proto::limits::{
    EPHEMERAL_KEYS_PER_SESSION_MAX, EVENTS_PER_SESSION_MAX, KEY_VALUE_BYTES_MAX, KEYS_PER_PAGE_MAX,
};
use csnap_proto::message::lock::{Expect, KeyOp, KeyReply, KeyView};

use super::*;
use crate::core::table::Missed;

fn key(bench: &mut Bench, session: SessionId, op: KeyOp) -> KeyReply {
    match bench.op(session, LockOp::Key(op)) {
        LockReply::Key(reply) => reply,
        other => panic!("{other:?}"),
    }
}

fn put(key: &str, value: &[u8], expect: Expect) -> KeyOp {
    KeyOp::Put { key: key.into(), value: value.into(), expect, ephemeral: false }
}

fn ephemeral(key: &str) -> KeyOp {
    KeyOp::Put { key: key.into(), value: Vec::new(), expect: Expect::Any, ephemeral: true }
}

fn delete(key: &str) -> KeyOp {
    KeyOp::Delete { key: key.into(), expect: Expect::Any }
}

fn done(version: u64) -> KeyReply {
    KeyReply::Done { version: Revision(version) }
}

fn conflict(version: Option<u64>) -> KeyReply {
    KeyReply::Conflict { version: version.map(Revision) }
}

fn get(bench: &mut Bench, name: &str) -> Option<KeyView> {
    match key(bench, A, KeyOp::Get { key: name.into() }) {
        KeyReply::Found(view) => view,
        other => panic!("{other:?}"),
    }
}

/// The watched keys that C was told of, and whether each is there.
fn news(bench: &mut Bench) -> Vec<(String, bool)> {
    let news = bench.events().into_iter().filter_map(|(session, event)| match event {
        LockEvent::Key { key, entry, .. } if session == C => Some((key, entry.is_some())),
        _ => None,
    });
    news.collect()
}

#[test]
fn a_key_changes_only_if_it_is_as_expected_and_its_version_never_comes_back() {
    let mut bench = Bench::new();
    assert_eq!(key(&mut bench, A, put("k", b"1", Expect::Version(Revision(0)))), conflict(None));
    assert_eq!(key(&mut bench, A, put("k", b"1", Expect::Absent)), done(1));
    assert_eq!(key(&mut bench, B, put("k", b"2", Expect::Absent)), conflict(Some(1)));
    assert_eq!(key(&mut bench, B, put("k", b"2", Expect::Version(Revision(1)))), done(2));
    assert_eq!(
        get(&mut bench, "k").map(|view| (view.version, view.created)),
        Some((Revision(2), Revision(1)))
    );
    assert_eq!(key(&mut bench, A, delete("k")), done(3));
    assert_eq!(key(&mut bench, A, delete("k")), KeyReply::Found(None));
    assert_eq!(key(&mut bench, A, put("k", b"3", Expect::Absent)), done(4));
    assert_eq!(key(&mut bench, A, put("k", b"4", Expect::Version(Revision(2)))), conflict(Some(4)));
    assert_eq!(get(&mut bench, "k").map(|view| view.value), Some(b"3".to_vec()));
}

#[test]
fn an_ephemeral_key_goes_with_the_session_that_wrote_it_last() {
    let mut bench = Bench::new();
    for name in ["a", "b", "c"] {
        key(&mut bench, A, ephemeral(name));
    }
    key(&mut bench, B, ephemeral("b"));
    key(&mut bench, B, put("c", b"", Expect::Any));
    bench.apply(Command::Expire { session: A });
    bench.apply(open(A));
    let left = ["a", "b", "c"].map(|name| get(&mut bench, name).map(|view| view.session));
    assert_eq!(left, [None, Some(Some(B)), Some(None)]);
}

#[test]
fn watches_of_a_key_and_of_prefixes_tell_every_change_once() {
    let mut bench = Bench::new();
    for what in [Watched::Key("a/x".into()), Watched::Prefix("a/".into()), Watched::Prefix(String::new())] {
        bench.op(C, LockOp::watch(what));
    }
    for name in ["a/x", "b"] {
        key(&mut bench, A, ephemeral(name));
    }
    assert_eq!(news(&mut bench), [("a/x".into(), true), ("b".into(), true)]);
    bench.op(C, LockOp::Unwatch { what: Watched::Prefix(String::new()) });
    bench.apply(Command::Expire { session: A });
    assert_eq!(news(&mut bench), [("a/x".into(), false)]);
}

#[test]
fn a_watch_for_one_event_has_one() {
    let mut bench = Bench::new();
    for what in [Watched::Key("k".into()), Watched::Value("r".into()), Watched::Grants("r".into())] {
        bench.op(C, LockOp::Watch { what, once: true });
    }
    for _ in 0..2 {
        key(&mut bench, A, put("k", b"", Expect::Any));
        let lock = bench.locked(A, Mode::Pw);
        bench.unlock(A, lock, ValueChange::Keep);
    }
    let told: Vec<_> = bench.events().into_iter().filter(|(session, _)| *session == C).collect();
    assert_eq!(told.len(), 3, "{told:?}");
    assert!(bench.table.watchers.is_empty() && bench.table.sessions[&C].watches.is_empty());
}

#[test]
fn watchers_of_grants_see_who_holds_what() {
    let mut bench = Bench::new();
    bench.op(C, LockOp::watch(Watched::Grants("r".into())));
    let held = |bench: &mut Bench| -> Vec<_> {
        let held = bench.events().into_iter().filter_map(|(_, event)| match event {
            LockEvent::Held { row, .. } => Some((row.holder.session, row.mode, row.term)),
            _ => None,
        });
        held.collect()
    };
    let a = bench.locked(A, Mode::Cr);
    bench.convert(A, a, Mode::Pw);
    assert_eq!(held(&mut bench), [(Some(A), Some(Mode::Cr), Term(0)), (Some(A), Some(Mode::Pw), Term(1))]);
    bench.queued(B, Mode::Ex);
    assert_eq!(held(&mut bench), [], "who waits holds nothing");
    bench.apply(Command::Expire { session: A });
    assert_eq!(held(&mut bench), [(Some(A), None, Term(0)), (Some(B), Some(Mode::Ex), Term(2))]);
}

#[test]
fn keys_are_listed_by_prefix_and_in_pages() {
    let mut bench = Bench::new();
    for n in 0..KEYS_PER_PAGE_MAX + 3 {
        key(&mut bench, A, put(&format!("k/{n:04}"), b"", Expect::Any));
    }
    key(&mut bench, A, put("l", b"", Expect::Any));
    let page = |bench: &mut Bench, prefix: &str, after: Option<String>| -> (Vec<String>, bool) {
        match key(bench, B, KeyOp::List { prefix: prefix.into(), after }) {
            KeyReply::Page { keys, more, .. } => (keys.into_iter().map(|view| view.key).collect(), more),
            other => panic!("{other:?}"),
        }
    };
    let (first, more) = page(&mut bench, "k/", None);
    assert_eq!((first.len(), more), (KEYS_PER_PAGE_MAX, true));
    let (rest, more) = page(&mut bench, "k/", first.last().cloned());
    assert_eq!((rest.len(), more), (3, false));
    assert_eq!(page(&mut bench, "x", None), (vec![], false));
}

#[test]
fn who_misses_more_changes_than_are_kept_is_told_so_and_nobody_misses_less() {
    let mut bench = Bench::new();
    bench.op(C, LockOp::watch(Watched::Key("k".into())));
    for _ in 0..EVENTS_PER_SESSION_MAX {
        key(&mut bench, A, put("k", b"", Expect::Any));
    }
    let missed = |bench: &Bench| -> Vec<LockEvent> {
        let missed = bench.table.missed(C, csnap_proto::EventNumber(0)).into_iter();
        missed.filter_map(|m| if let Missed::Event(_, event) = m { Some(event) } else { None }).collect()
    };
    assert_eq!(missed(&bench).len(), EVENTS_PER_SESSION_MAX);
    assert!(matches!(missed(&bench)[0], LockEvent::Key { revision: Revision(1), .. }));
    key(&mut bench, A, put("k", b"", Expect::Any));
    assert_eq!(missed(&bench)[0], LockEvent::Overrun);
    // Long values are more events than their number says.
    key(&mut bench, A, put("k", &[0; KEY_VALUE_BYTES_MAX], Expect::Any));
    assert_eq!(bench.table.check(), Ok(()));
}

#[test]
fn ephemeral_keys_of_a_session_have_a_limit() {
    let mut bench = Bench::new();
    for n in 0..EPHEMERAL_KEYS_PER_SESSION_MAX {
        let sequence = bench.table.sessions[&A].last_sequence.next();
        let op = LockOp::Key(ephemeral(&n.to_string()));
        let command = Command::Operate { session: A, sequence, lowest_unanswered: sequence, op };
        bench.table.apply(command, &mut Vec::new());
    }
    assert!(is_invalid(&bench.op(A, LockOp::Key(ephemeral("more")))));
    assert_eq!(key(&mut bench, A, ephemeral("0")), done(EPHEMERAL_KEYS_PER_SESSION_MAX as u64 + 1));
    key(&mut bench, A, put("more", b"", Expect::Any));
    key(&mut bench, B, ephemeral("b"));
}
