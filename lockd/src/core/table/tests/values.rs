//! Value blocks: who writes, who reads, what makes them invalid; watches.

use super::*;
use crate::core::mode::{Direction, MODES, direction, is_writer};

fn watched() -> Bench {
    let mut bench = Bench::new();
    let reply = bench.op(C, LockOp::watch(Watched::Value("r".into())));
    assert_eq!(reply, LockReply::Value { value: ValueBlock::default(), vacant: true });
    bench
}

/// What C's watch told, as content, validity, vacancy.
fn news(bench: &mut Bench) -> Vec<(Vec<u8>, bool, bool)> {
    let news = bench.events().into_iter().filter_map(|(session, event)| match event {
        LockEvent::Changed { value, vacant, .. } if session == C => Some((value.bytes, value.valid, vacant)),
        _ => None,
    });
    news.collect()
}

#[test]
fn conversions_write_or_read_as_in_the_direction_table() {
    for from in MODES {
        for to in MODES {
            let mut bench = Bench::new();
            let writer = bench.locked(A, Mode::Pw);
            bench.write(A, writer, Mode::Pw, b"old");
            bench.unlock(A, writer, ValueChange::Keep);
            let lock = bench.locked(B, from);
            let reply = bench.write(B, lock, to, b"new");
            if direction(from, to) == Direction::Write {
                let value = granted(&reply).1.expect("what was written");
                assert_eq!(
                    (value.bytes.as_slice(), value.valid),
                    (b"new".as_slice(), true),
                    "{from:?} {to:?}"
                );
            } else {
                assert!(is_invalid(&reply), "{from:?} {to:?}");
                assert_eq!(
                    bench.table.locks[&lock].granted,
                    Some(from),
                    "a refused conversion changes nothing"
                );
                let reply = bench.convert(B, lock, to);
                let read = granted(&reply).1.map(|value| value.bytes.as_slice());
                let reads = direction(from, to) == Direction::Read;
                assert_eq!(read, reads.then_some(b"old".as_slice()), "{from:?} {to:?}");
            }
            assert_eq!(granted(&bench.lock(C, Mode::Nl)).1, Some(&bench.value()), "a new lock reads");
        }
    }
}

#[test]
fn a_value_names_the_term_of_the_grant_that_wrote_it() {
    let mut bench = Bench::new();
    let a = bench.locked(A, Mode::Cr);
    let term = granted(&bench.convert(A, a, Mode::Pw)).0.term;
    bench.write(A, a, Mode::Pw, b"x");
    assert_eq!(bench.value().term, term);
    bench.write(A, a, Mode::Cr, b"y");
    assert_eq!((bench.value().term, bench.value().sequence), (term, 2));
}

#[test]
fn unlock_from_a_writer_mode_keeps_writes_or_invalidates() {
    for mode in MODES {
        let mut bench = Bench::new();
        let first = bench.locked(A, Mode::Pw);
        bench.unlock(A, first, ValueChange::Write(b"1".to_vec()));
        assert_eq!((bench.value().bytes, bench.value().valid), (b"1".to_vec(), true));
        let lock = bench.locked(A, mode);
        bench.unlock(A, lock, ValueChange::Keep);
        assert!(bench.value().valid);
        let lock = bench.locked(A, mode);
        bench.unlock(A, lock, ValueChange::Write(b"2".to_vec()));
        assert_eq!(bench.value().bytes == b"2", is_writer(mode), "{mode:?}");
        let lock = bench.locked(A, mode);
        bench.unlock(A, lock, ValueChange::Invalidate);
        assert_eq!(bench.value().valid, !is_writer(mode), "{mode:?}");
    }
}

#[test]
fn a_value_turns_invalid_if_and_only_if_its_writer_dies() {
    for mode in MODES {
        for command in [Command::Expire { session: B }, Command::Close { session: B }] {
            let mut bench = Bench::new();
            let a = bench.locked(A, Mode::Pw);
            bench.write(A, a, Mode::Nl, b"x");
            bench.locked(B, mode);
            bench.apply(command);
            let value = bench.value();
            assert_eq!(
                (value.valid, value.bytes.as_slice()),
                (!is_writer(mode), b"x".as_slice()),
                "{mode:?}"
            );
            granted(&bench.convert(A, a, Mode::Ex));
            bench.write(A, a, Mode::Ex, b"y");
            assert!(bench.value().valid, "the next write makes it valid again");
        }
    }
}

#[test]
fn a_writer_that_dies_while_it_waits_for_more_was_a_writer() {
    let mut bench = Bench::new();
    bench.locked(A, Mode::Cr);
    let b = bench.locked(B, Mode::Pw);
    bench.write(B, b, Mode::Pw, b"x");
    assert_eq!(bench.convert(B, b, Mode::Ex), waits(b));
    bench.apply(Command::Expire { session: B });
    assert!(!bench.value().valid);
}

#[test]
fn a_reader_that_waits_to_write_invalidates_nothing_when_it_dies() {
    let mut bench = Bench::new();
    let a = bench.locked(A, Mode::Pw);
    bench.write(A, a, Mode::Pw, b"x");
    let b = bench.locked(B, Mode::Cr);
    assert_eq!(bench.convert(B, b, Mode::Pw), waits(b));
    bench.apply(Command::Expire { session: B });
    assert!(bench.value().valid);
}

#[test]
fn a_resource_with_a_value_outlives_its_locks_and_one_without_does_not() {
    let mut bench = Bench::new();
    let a = bench.locked(A, Mode::Ex);
    bench.unlock(A, a, ValueChange::Write(b"x".to_vec()));
    let lock = bench.locked(B, Mode::Ex);
    let sequence = bench.value().sequence;
    bench.unlock(B, lock, ValueChange::Write(Vec::new()));
    assert!(bench.table.resources.is_empty());
    let lock = bench.locked(B, Mode::Ex);
    bench.write(B, lock, Mode::Ex, b"z");
    assert!(bench.value().sequence > sequence + 1, "numbers of values do not come back either");
}

#[test]
fn watchers_learn_of_writes_invalidation_and_vacancy() {
    let mut bench = watched();
    let a = bench.locked(A, Mode::Cr);
    assert_eq!(news(&mut bench), []);
    bench.convert(A, a, Mode::Pw);
    assert_eq!(news(&mut bench), [(vec![], false, false)]);
    bench.write(A, a, Mode::Pw, b"x");
    assert_eq!(news(&mut bench), [(b"x".to_vec(), true, false)]);
    bench.convert(A, a, Mode::Ex);
    assert_eq!(news(&mut bench), []);
    bench.convert(A, a, Mode::Cr);
    assert_eq!(news(&mut bench), [(b"x".to_vec(), true, true)]);
    bench.convert(A, a, Mode::Pw);
    bench.events();
    bench.apply(Command::Expire { session: A });
    assert_eq!(news(&mut bench), [(b"x".to_vec(), false, true)]);
}

#[test]
fn watchers_learn_that_one_writer_followed_another() {
    let mut bench = watched();
    let a = bench.locked(A, Mode::Ex);
    bench.queued(B, Mode::Ex);
    bench.events();
    bench.unlock(A, a, ValueChange::Keep);
    assert_eq!(news(&mut bench), [(vec![], false, false)]);
    bench.op(C, LockOp::Unwatch { what: Watched::Value("r".into()) });
    bench.apply(Command::Expire { session: B });
    assert_eq!(news(&mut bench), []);
}

#[test]
fn a_watch_keeps_its_resource_and_goes_with_its_session() {
    let mut bench = watched();
    bench.locked(C, Mode::Ex);
    assert_eq!(bench.table.resources.len(), 1);
    bench.apply(Command::Expire { session: C });
    assert!(bench.table.resources.is_empty());
}
