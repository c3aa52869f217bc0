//! Circles of waits over several resources.

use super::*;

fn lock(bench: &mut Bench, session: SessionId, resource: &str, flags: Flags) -> LockReply {
    bench.op(session, LockOp::lock(resource, Mode::Ex, flags))
}

fn held(bench: &mut Bench, session: SessionId, resource: &str) -> LockId {
    granted(&lock(bench, session, resource, Flags::NONE)).0.lock
}

#[test]
fn the_request_that_closes_a_circle_is_refused_and_leaves_nothing() {
    let mut bench = Bench::new();
    for (session, resource) in [(A, "a"), (B, "b"), (C, "c")] {
        held(&mut bench, session, resource);
    }
    assert!(matches!(lock(&mut bench, A, "b", Flags::NONE), LockReply::Queued { .. }));
    assert!(matches!(lock(&mut bench, B, "c", Flags::NONE), LockReply::Queued { .. }));
    let before = bench.table.resources.clone();
    assert_eq!(lock(&mut bench, C, "a", Flags::NONE), LockReply::Deadlock);
    assert_eq!(bench.table.resources, before);
    assert!(matches!(lock(&mut bench, C, "d", Flags::NONE), LockReply::Granted { .. }));
}

#[test]
fn one_that_asks_for_it_is_queued_in_a_circle_and_told() {
    let mut bench = Bench::new();
    let a = held(&mut bench, A, "a");
    held(&mut bench, B, "b");
    let LockReply::Queued { lock: waiting, .. } = lock(&mut bench, A, "b", Flags::NONE) else { panic!() };
    let reply = lock(&mut bench, B, "a", Flags::NODLCKWT);
    assert!(matches!(reply, LockReply::Queued { told: Told { deadlock: true, .. }, .. }), "{reply:?}");
    // Its wait counts in nobody's circle: A may ask for more.
    assert!(matches!(lock(&mut bench, A, "b", Flags::NONE), LockReply::Queued { .. }));
    bench.op(A, LockOp::Cancel { lock: waiting });
    bench.unlock(A, a, ValueChange::Keep);
    assert_eq!(grants(&bench.events()).len(), 1);
}

#[test]
fn order_in_a_queue_is_a_wait_too() {
    let mut bench = Bench::new();
    bench.op(A, LockOp::lock("r", Mode::Pr, Flags::NONE));
    held(&mut bench, B, "b");
    assert!(matches!(bench.lock(C, Mode::Ex), LockReply::Queued { .. }));
    // C waits for A's lock, B behind C although A's lock would let it in.
    assert!(matches!(bench.lock(B, Mode::Pr), LockReply::Queued { .. }));
    assert_eq!(lock(&mut bench, A, "b", Flags::NONE), LockReply::Deadlock);
    // Who minds no order waits for holders only.
    let cancelled = bench.table.sessions[&B].waits.first().copied().expect("it waits");
    bench.op(B, LockOp::Cancel { lock: cancelled });
    assert!(matches!(lock(&mut bench, A, "b", Flags::NONE), LockReply::Queued { .. }));
}

#[test]
fn a_session_does_not_wait_for_itself_nor_for_an_orphan() {
    let mut bench = Bench::new();
    held(&mut bench, A, "a");
    assert!(matches!(lock(&mut bench, A, "a", Flags::NONE), LockReply::Queued { .. }));
    let owner = Some(csnap_proto::message::lock::Owner {
        id: csnap_proto::OwnerId([1; 16]),
        secret: Secret([1; 16]),
    });
    bench.op(B, LockOp::Lock { resource: "b".into(), mode: Mode::Ex, flags: Flags::NONE, owner });
    bench.apply(Command::Expire { session: B });
    assert!(matches!(lock(&mut bench, A, "b", Flags::NONE), LockReply::Queued { .. }));
}

#[test]
fn a_grant_that_closes_a_circle_is_told_to_those_who_wait_in_it() {
    let mut bench = Bench::new();
    let a = granted(&bench.op(A, LockOp::lock("r", Mode::Nl, Flags::NONE))).0.lock;
    bench.op(C, LockOp::lock("r", Mode::Pr, Flags::NONE));
    held(&mut bench, B, "b");
    assert!(matches!(bench.lock(B, Mode::Ex), LockReply::Queued { .. }));
    let LockReply::Queued { lock: waiting, .. } = lock(&mut bench, A, "b", Flags::NONE) else { panic!() };
    bench.events();
    // In place, past B: now B waits for A as well.
    granted(&bench.convert(A, a, Mode::Pr));
    let deadlock = (A, LockEvent::Deadlock { lock: waiting });
    assert!(bench.events().contains(&deadlock));
}
