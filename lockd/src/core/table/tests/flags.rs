//! What each flag changes.

use super::*;

fn lock(bench: &mut Bench, session: SessionId, mode: Mode, flags: Flags) -> LockReply {
    bench.op(session, LockOp::lock("r", mode, flags))
}

fn convert(bench: &mut Bench, session: SessionId, lock: LockId, mode: Mode, flags: Flags) -> LockReply {
    bench.op(session, LockOp::convert(lock, mode, flags))
}

fn waiting(reply: LockReply) -> LockId {
    match reply {
        LockReply::Queued { lock, .. } => lock,
        other => panic!("{other:?}"),
    }
}

fn told(reply: &LockReply) -> Told {
    match reply {
        LockReply::Granted { told, .. } | LockReply::Queued { told, .. } => *told,
        other => panic!("{other:?}"),
    }
}

#[test]
fn refused_requests_tell_holders_only_with_noqueuebast_and_once_per_higher_mode() {
    let mut bench = Bench::new();
    let a = bench.locked(A, Mode::Pr);
    let tell = Flags::NOQUEUE | Flags::NOQUEUEBAST;
    assert_eq!(lock(&mut bench, B, Mode::Cw, tell), LockReply::WouldBlock);
    assert_eq!(bench.events(), [(A, LockEvent::Blocking { lock: a, wanted: Mode::Cw })]);
    assert_eq!(lock(&mut bench, C, Mode::Cw, tell), LockReply::WouldBlock);
    assert_eq!(bench.events(), []);
    assert_eq!(lock(&mut bench, B, Mode::Ex, tell), LockReply::WouldBlock);
    assert_eq!(bench.events(), [(A, LockEvent::Blocking { lock: a, wanted: Mode::Ex })]);
}

#[test]
fn a_conversion_overtakes_conversions_that_wait_unless_it_asks_to_be_queued() {
    for (flags, overtakes) in [(Flags::NONE, true), (Flags::QUECVT, false)] {
        let mut bench = Bench::new();
        let a = bench.locked(A, Mode::Nl);
        let b = bench.locked(B, Mode::Cr);
        bench.locked(C, Mode::Pr);
        assert_eq!(bench.convert(B, b, Mode::Pw), waits(b));
        let reply = convert(&mut bench, A, a, Mode::Cr, flags);
        assert_eq!(matches!(reply, LockReply::Granted { .. }), overtakes, "{flags}");
    }
}

#[test]
fn a_demoted_conversion_lets_the_other_through_and_follows_it() {
    let mut bench = Bench::new();
    let a = bench.locked(A, Mode::Pr);
    let b = bench.locked(B, Mode::Pr);
    assert_eq!(bench.convert(A, a, Mode::Ex), waits(a));
    bench.events();
    let reply = convert(&mut bench, B, b, Mode::Ex, Flags::CONVDEADLK);
    assert_eq!(reply, LockReply::Queued { lock: b, told: Told { demoted: true, ..Told::default() } });
    assert_eq!(grants(&bench.events()), [(A, a, Mode::Ex)]);
    // What it has now is NL: that is what a cancel leaves.
    bench.op(B, LockOp::Cancel { lock: b });
    assert_eq!(granted(&bench.op(B, LockOp::Cancel { lock: b })).0.mode, Mode::Nl);
}

#[test]
fn a_writer_that_is_demoted_leaves_the_value_and_gets_a_new_term() {
    let mut bench = Bench::new();
    let a = bench.locked(A, Mode::Cr);
    let b = bench.locked(B, Mode::Pw);
    bench.write(B, b, Mode::Pw, b"x");
    assert_eq!(bench.convert(A, a, Mode::Pr), waits(a));
    let reply = convert(&mut bench, B, b, Mode::Ex, Flags::CONVDEADLK);
    assert!(told(&reply).demoted);
    assert!(bench.value().valid, "it was its own wish");
    bench.events();
    bench.unlock(A, a, ValueChange::Keep);
    let events = bench.events();
    let term = events.iter().find_map(|(_, event)| match event {
        LockEvent::Granted { lock, .. } => Some(lock.term),
        _ => None,
    });
    assert_eq!(term, Some(Term(2)), "another could have written in between");
}

#[test]
fn a_conversion_that_was_told_of_its_deadlock_ends_when_the_other_is_demoted() {
    let mut bench = Bench::new();
    let a = bench.locked(A, Mode::Pr);
    let b = bench.locked(B, Mode::Pr);
    assert_eq!(convert(&mut bench, A, a, Mode::Ex, Flags::CONVDEADLK), waits(a));
    bench.events();
    let reply = convert(&mut bench, B, b, Mode::Ex, Flags::NODLCKWT);
    assert!(told(&reply).deadlock);
    let events = bench.events();
    assert!(events.contains(&(A, LockEvent::Demoted { lock: a })), "{events:?}");
    assert_eq!(grants(&events), [], "B is behind A, whom B's mode does not stop any more; A waits for B");
}

#[test]
fn a_new_null_lock_is_granted_past_everybody_with_expedite() {
    let mut bench = Bench::new();
    bench.locked(A, Mode::Ex);
    bench.queued(B, Mode::Ex);
    granted(&lock(&mut bench, C, Mode::Nl, Flags::EXPEDITE));
}

#[test]
fn the_head_of_the_queue_is_granted_first() {
    let mut bench = Bench::new();
    let a = bench.locked(A, Mode::Ex);
    bench.queued(B, Mode::Ex);
    let c = waiting(lock(&mut bench, C, Mode::Ex, Flags::HEADQUE));
    bench.events();
    bench.unlock(A, a, ValueChange::Keep);
    assert_eq!(grants(&bench.events()), [(C, c, Mode::Ex)]);
}

#[test]
fn without_order_a_request_is_granted_as_soon_as_no_lock_is_in_its_way() {
    let mut bench = Bench::new();
    let a = bench.locked(A, Mode::Pr);
    bench.queued(B, Mode::Ex);
    let c = granted(&lock(&mut bench, C, Mode::Pr, Flags::NOORDER)).0.lock;
    bench.unlock(C, c, ValueChange::Keep);
    // Also when it had to wait at first.
    let d = waiting(lock(&mut bench, C, Mode::Cw, Flags::NOORDER));
    bench.events();
    bench.convert(A, a, Mode::Cr);
    assert_eq!(grants(&bench.events()), [(C, d, Mode::Cw)]);
}

#[test]
fn the_alternative_mode_is_granted_where_the_wanted_one_is_not_and_told() {
    for (flags, alternative) in [(Flags::ALTPR, Mode::Pr), (Flags::ALTCW, Mode::Cw)] {
        let mut bench = Bench::new();
        let a = bench.locked(A, alternative);
        let reply = lock(&mut bench, B, Mode::Ex, flags);
        assert_eq!(granted(&reply).0.mode, alternative);
        assert!(told(&reply).alternate);
        // Also of a conversion, and when it had to wait.
        let b = granted(&reply).0.lock;
        bench.convert(B, b, Mode::Nl);
        bench.convert(A, a, Mode::Ex);
        assert_eq!(convert(&mut bench, B, b, Mode::Ex, flags), waits(b));
        bench.events();
        bench.convert(A, a, alternative);
        assert_eq!(grants(&bench.events()), [(B, b, alternative)]);
    }
}

#[test]
fn flags_that_do_not_go_together_are_refused_with_the_reason_and_change_nothing() {
    let mut bench = Bench::new();
    let a = bench.locked(A, Mode::Pw);
    let before = bench.table.resources.clone();
    let LockReply::Invalid(why) = lock(&mut bench, B, Mode::Cr, Flags::EXPEDITE) else { panic!() };
    assert!(why.contains("NL"), "{why}");
    for flags in [Flags::QUECVT, Flags::CONVDEADLK, Flags::NOQUEUEBAST, Flags::FORCEUNLOCK] {
        assert!(is_invalid(&lock(&mut bench, B, Mode::Cr, flags)), "{flags}");
    }
    assert!(is_invalid(&convert(&mut bench, A, a, Mode::Cr, Flags::QUECVT)), "down");
    let op = LockOp::Unlock { lock: a, flags: Flags::NOQUEUE, value: ValueChange::Keep };
    assert!(is_invalid(&bench.op(A, op)));
    assert_eq!(bench.table.resources, before);
}
