//! Who is granted, who waits, who is next, who is told.

use super::*;
use crate::core::mode::{MODES, compatible, is_writer};

#[test]
fn a_new_lock_is_granted_if_and_only_if_it_goes_with_the_granted_one() {
    for held in MODES {
        for wanted in MODES {
            let mut bench = Bench::new();
            bench.locked(A, held);
            let reply = bench.lock(B, wanted);
            assert_eq!(
                matches!(reply, LockReply::Granted { .. }),
                compatible(held, wanted),
                "{held:?} {wanted:?}"
            );
            let again = bench.op(C, LockOp::lock("r", wanted, Flags::NOQUEUE));
            if !compatible(held, wanted) {
                assert_eq!(again, LockReply::WouldBlock, "{held:?} {wanted:?}");
            }
        }
    }
}

#[test]
fn a_conversion_is_granted_if_and_only_if_it_goes_with_the_others() {
    for held in MODES {
        for from in MODES.into_iter().filter(|from| compatible(held, *from)) {
            for to in MODES {
                let mut bench = Bench::new();
                bench.locked(A, held);
                let lock = bench.locked(B, from);
                let reply = bench.convert(B, lock, to);
                assert_eq!(
                    matches!(reply, LockReply::Granted { .. }),
                    compatible(held, to),
                    "{held:?}: {from:?} {to:?}"
                );
            }
        }
    }
}

#[test]
fn waiters_are_granted_in_order_and_only_together_with_the_first() {
    let mut bench = Bench::new();
    let holder = bench.locked(A, Mode::Pw);
    let writer = bench.queued(B, Mode::Ex);
    // A reader that would be compatible with the holder waits behind the writer.
    let reader = bench.queued(C, Mode::Cr);
    bench.events();
    bench.unlock(A, holder, ValueChange::Keep);
    assert_eq!(grants(&bench.events()), [(B, writer, Mode::Ex)]);
    bench.unlock(B, writer, ValueChange::Keep);
    assert_eq!(grants(&bench.events()), [(C, reader, Mode::Cr)]);
}

#[test]
fn compatible_waiters_are_granted_at_once() {
    let mut bench = Bench::new();
    let holder = bench.locked(A, Mode::Ex);
    let (b, c) = (bench.queued(B, Mode::Pr), bench.queued(C, Mode::Pr));
    bench.events();
    bench.unlock(A, holder, ValueChange::Keep);
    assert_eq!(grants(&bench.events()), [(B, b, Mode::Pr), (C, c, Mode::Pr)]);
}

#[test]
fn null_locks_wait_their_turn_unless_expedited() {
    let mut bench = Bench::new();
    bench.locked(A, Mode::Ex);
    bench.locked(C, Mode::Nl);
    bench.queued(B, Mode::Ex);
    bench.queued(C, Mode::Nl);
    granted(&bench.op(C, LockOp::lock("r", Mode::Nl, Flags::EXPEDITE)));
}

#[test]
fn a_conversion_overtakes_waiters_and_blocks_new_requests() {
    let mut bench = Bench::new();
    let a = bench.locked(A, Mode::Cr);
    let b = bench.locked(B, Mode::Pr);
    let waiter = bench.queued(C, Mode::Ex);
    assert_eq!(bench.convert(A, a, Mode::Pw), waits(a));
    bench.events();
    bench.unlock(B, b, ValueChange::Keep);
    assert_eq!(grants(&bench.events()), [(A, a, Mode::Pw)]);
    bench.unlock(A, a, ValueChange::Keep);
    assert_eq!(grants(&bench.events()), [(C, waiter, Mode::Ex)]);
}

#[test]
fn a_conversion_that_nothing_blocks_is_granted_in_place() {
    let mut bench = Bench::new();
    let a = bench.locked(A, Mode::Nl);
    let b = bench.locked(B, Mode::Cr);
    bench.locked(C, Mode::Pr);
    assert_eq!(bench.convert(B, b, Mode::Pw), waits(b));
    granted(&bench.convert(A, a, Mode::Cr));
}

#[test]
fn two_conversions_that_wait_for_each_other_are_refused() {
    let mut bench = Bench::new();
    let a = bench.locked(A, Mode::Pr);
    let b = bench.locked(B, Mode::Pr);
    assert_eq!(bench.convert(A, a, Mode::Ex), waits(a));
    assert_eq!(bench.convert(B, b, Mode::Ex), LockReply::Deadlock);
    bench.events();
    // The refused one keeps what it had; giving it up lets the other through.
    bench.unlock(B, b, ValueChange::Keep);
    assert_eq!(grants(&bench.events()), [(A, a, Mode::Ex)]);
}

#[test]
fn a_lock_that_waits_cannot_be_converted() {
    let mut bench = Bench::new();
    let a = bench.locked(A, Mode::Pr);
    let b = bench.locked(B, Mode::Pr);
    let waiter = bench.queued(C, Mode::Ex);
    assert_eq!(bench.convert(C, waiter, Mode::Cr), LockReply::Busy);
    bench.convert(A, a, Mode::Ex);
    assert_eq!(bench.convert(A, a, Mode::Nl), LockReply::Busy);
    assert!(is_invalid(&bench.convert(A, b, Mode::Nl)), "somebody else's lock");
}

#[test]
fn cancel_takes_a_request_back_unless_it_was_granted() {
    let mut bench = Bench::new();
    let a = bench.locked(A, Mode::Pr);
    let b = bench.locked(B, Mode::Pr);
    let waiter = bench.queued(C, Mode::Ex);
    bench.convert(A, a, Mode::Ex);
    bench.events();
    assert_eq!(bench.op(C, LockOp::Cancel { lock: waiter }), LockReply::Done);
    assert_eq!(bench.events(), [(C, LockEvent::Cancelled { lock: waiter })]);
    assert!(is_invalid(&bench.op(C, LockOp::Cancel { lock: waiter })));
    assert_eq!(bench.op(A, LockOp::Cancel { lock: a }), LockReply::Done);
    assert_eq!(bench.events(), [(A, LockEvent::Cancelled { lock: a })]);
    // Back at the old mode; and a grant that came first wins.
    assert_eq!(granted(&bench.op(A, LockOp::Cancel { lock: a })).0.mode, Mode::Pr);
    assert_eq!(granted(&bench.op(B, LockOp::Cancel { lock: b })).0.mode, Mode::Pr);
}

#[test]
fn cancelling_the_first_in_line_lets_the_next_through() {
    let mut bench = Bench::new();
    bench.locked(A, Mode::Pw);
    let first = bench.queued(B, Mode::Ex);
    let second = bench.queued(C, Mode::Cr);
    bench.events();
    bench.op(B, LockOp::Cancel { lock: first });
    assert_eq!(grants(&bench.events()), [(C, second, Mode::Cr)]);
}

#[test]
fn giving_up_a_waiting_lock_needs_no_cancel() {
    let mut bench = Bench::new();
    bench.locked(A, Mode::Pw);
    let waiting = bench.queued(B, Mode::Ex);
    let plain = LockOp::Unlock { lock: waiting, flags: Flags::NONE, value: ValueChange::Keep };
    assert_eq!(bench.op(B, plain), LockReply::Busy, "only by force");
    bench.unlock(B, waiting, ValueChange::Invalidate);
    assert_eq!(bench.value(), ValueBlock::default());
}

#[test]
fn holders_are_told_once_per_higher_mode() {
    let mut bench = Bench::new();
    let a = bench.locked(A, Mode::Pr);
    let told = |bench: &mut Bench| {
        let events =
            bench.events().into_iter().filter(|(_, event)| matches!(event, LockEvent::Blocking { .. }));
        events.collect::<Vec<_>>()
    };
    let b = bench.queued(B, Mode::Cw);
    assert_eq!(told(&mut bench), [(A, LockEvent::Blocking { lock: a, wanted: Mode::Cw })]);
    let c = bench.queued(C, Mode::Cw);
    assert_eq!(told(&mut bench), []);
    bench.queued(C, Mode::Ex);
    assert_eq!(told(&mut bench), [(A, LockEvent::Blocking { lock: a, wanted: Mode::Ex })]);
    // The grants of B and C are in the way of the EX request behind them, each of its own.
    bench.unlock(A, a, ValueChange::Keep);
    let wanted = Mode::Ex;
    assert_eq!(
        told(&mut bench),
        [(B, LockEvent::Blocking { lock: b, wanted }), (C, LockEvent::Blocking { lock: c, wanted })]
    );
}

#[test]
fn no_queue_tells_nobody_and_leaves_nothing() {
    let mut bench = Bench::new();
    bench.locked(A, Mode::Ex);
    bench.events();
    let before = bench.table.resources.clone();
    for mode in MODES.into_iter().skip(1) {
        assert_eq!(bench.op(B, LockOp::lock("r", mode, Flags::NOQUEUE)), LockReply::WouldBlock);
    }
    assert_eq!(bench.events(), []);
    assert_eq!(bench.table.resources, before);
}

#[test]
fn every_grant_into_a_writer_mode_is_a_new_term_and_conversions_within_keep_it() {
    let mut bench = Bench::new();
    let mut last = Term(0);
    for from in MODES {
        for to in MODES {
            let lock = bench.locked(A, from);
            let had = bench.table.locks[&lock].term;
            assert_eq!(is_writer(from), had > last);
            last = last.max(had);
            let got = granted(&bench.convert(A, lock, to)).0.term;
            match (is_writer(from), is_writer(to)) {
                (true, true) => assert_eq!(got, had),
                (false, true) => assert!(got > last),
                (_, false) => assert_eq!(got, Term(0)),
            }
            last = last.max(got);
            bench.unlock(A, lock, ValueChange::Keep);
            assert!(bench.table.resources.is_empty(), "deleted, and made anew in the next round");
        }
    }
    assert_eq!(bench.table.term(), last);
}
