//! What a session says and asks, step by step.

use std::time::Duration;

use csnap_proto::message::lock::{
    Flags, FromLockd, LockEvent, LockOp, LockReply, Mode, ToLockd, ValueBlock, ValueChange, Watched,
};
use csnap_proto::{EventNumber, Frame, LockId, Name, RequestId, Secret, Sequence, SessionId, Term, Time};
use proptest::prelude::*;

use super::model::{Done, Etcd};
use super::played::{LEASE, Played, RESOURCE};
use crate::etcd::{Answer, Broken, Call, Input, Key, Output, Txn, keys};

/// The last value that an event told, and whether the lock was vacant then.
fn told(events: &[LockEvent]) -> Option<(ValueBlock, bool)> {
    events.iter().rev().find_map(|event| match event {
        LockEvent::Changed { value, vacant, .. } => Some((value.clone(), *vacant)),
        _ => None,
    })
}

const NOW: Time = Time(1_000_000);

#[test]
fn one_of_two_is_granted_and_terms_only_grow() {
    let mut etcd = Etcd::default();
    let (mut a, mut b) = (Played::open(1, NOW, &mut etcd), Played::open(2, NOW, &mut etcd));
    let (lock, first) = a.take(NOW, &mut etcd);
    let reader = b.read(NOW, &mut etcd);
    // With and without news of it.
    assert_eq!(
        b.ask(NOW, &mut etcd, LockOp::convert(reader, Mode::Pw, Flags::NOQUEUE)),
        Some(LockReply::WouldBlock)
    );
    assert_eq!(b.convert(NOW, &mut etcd, reader), Some(LockReply::WouldBlock));
    assert_eq!(a.ask(NOW, &mut etcd, LockOp::unlock(lock, ValueChange::Invalidate)), Some(LockReply::Done));
    let Some(LockReply::Granted { lock, .. }) = b.convert(NOW, &mut etcd, reader) else {
        panic!("it is free")
    };
    assert!(lock.term > first);
}

#[test]
fn a_value_is_told_while_its_writer_holds_the_lock_and_not_after_its_lease() {
    let mut etcd = Etcd::default();
    let (mut a, mut b) = (Played::open(1, NOW, &mut etcd), Played::open(2, NOW, &mut etcd));
    let (lock, term) = a.take(NOW, &mut etcd);
    let (_, vacant) = told(&b.hear(NOW, &mut etcd)).expect("a grant is news");
    assert!(!vacant);
    a.publish(NOW, &mut etcd, lock, b"here");
    let (value, vacant) = told(&b.hear(NOW, &mut etcd)).expect("a value is news");
    assert!(value.valid && !vacant && value.bytes == b"here" && value.term == term);
    // Only b renews.
    let later = NOW.after(LEASE - Duration::from_millis(1));
    b.say(later, &mut etcd, ToLockd::Renew { last_event: EventNumber(0) });
    let expired = NOW.after(LEASE);
    etcd.expire(expired);
    let events = b.hear(expired, &mut etcd);
    let (value, vacant) = told(&events).expect("an expiry is news");
    assert!(!value.valid && vacant && value.bytes == b"here", "kept, and not valid");
    let down =
        |event: &LockEvent| matches!(event, LockEvent::MemberDown { session, .. } if *session == a.id());
    assert!(events.iter().any(down));
}

#[test]
fn a_last_word_is_valid_until_the_next_holder_goes_without_one() {
    let mut etcd = Etcd::default();
    let (mut a, mut b) = (Played::open(1, NOW, &mut etcd), Played::open(2, NOW, &mut etcd));
    let (lock, _) = a.take(NOW, &mut etcd);
    a.publish(NOW, &mut etcd, lock, b"here");
    a.ask(NOW, &mut etcd, LockOp::unlock(lock, ValueChange::Write(b"to b".to_vec())));
    let (value, vacant) = told(&b.hear(NOW, &mut etcd)).expect("a last word is news");
    assert!(value.valid && vacant && value.bytes == b"to b");
    let reader = b.read(NOW, &mut etcd);
    let Some(LockReply::Granted { value: Some(value), lock, .. }) = b.convert(NOW, &mut etcd, reader) else {
        panic!("it is free")
    };
    assert!(value.valid && value.bytes == b"to b", "whoever takes the lock hears it");
    b.ask(NOW, &mut etcd, LockOp::unlock(lock.lock, ValueChange::Invalidate));
    let (value, vacant) = told(&a.hear(NOW, &mut etcd)).expect("news");
    assert!(!value.valid && vacant);
}

#[test]
fn a_deposed_holder_writes_nothing() {
    let mut etcd = Etcd::default();
    let (mut a, mut b) = (Played::open(1, NOW, &mut etcd), Played::open(2, NOW, &mut etcd));
    let (lock, _) = a.take(NOW, &mut etcd);
    a.publish(NOW, &mut etcd, lock, b"a");
    // Frozen past its lease; b, which goes on, follows.
    let later = NOW.after(LEASE / 2);
    b.say(later, &mut etcd, ToLockd::Renew { last_event: EventNumber(0) });
    let later = NOW.after(LEASE);
    etcd.expire(later);
    let (b_lock, _) = b.take(later, &mut etcd);
    b.publish(later, &mut etcd, b_lock, b"b");
    // Thawed, with something to say, on the connection that it had.
    for op in [
        LockOp::write(lock, Mode::Pw, *b"a again"),
        LockOp::unlock(lock, ValueChange::Write(b"a's last".to_vec())),
    ] {
        a.ask(later, &mut etcd, op);
    }
    assert!(a.refusal().is_some(), "{:?}", a.heard);
    b.hear(later, &mut etcd);
    let Some(LockReply::Value { value, vacant }) =
        b.ask(later, &mut etcd, LockOp::watch(Watched::Value(RESOURCE.to_owned())))
    else {
        panic!("a look is answered")
    };
    assert!(value.bytes == b"b" && value.valid && !vacant);
}

#[test]
fn a_holder_that_is_deposed_between_two_looks_cannot_write_even_with_its_own_transaction() {
    late_write(Broken::NONE);
}

fn late_write(broken: Broken) {
    let mut etcd = Etcd::default();
    let mut a = Played::open_breaking(1, NOW, &mut etcd, broken);
    let mut b = Played::open(2, NOW, &mut etcd);
    let (lock, _) = a.take(NOW, &mut etcd);
    a.publish(NOW, &mut etcd, lock, b"a");
    a.txns.clear();
    a.ask(NOW, &mut etcd, LockOp::write(lock, Mode::Pw, *b"a again"));
    let (lease, late) = a.txns.pop().expect("it wrote");
    a.ask(NOW, &mut etcd, LockOp::unlock(lock, ValueChange::Invalidate));
    let (b_lock, _) = b.take(NOW, &mut etcd);
    b.publish(NOW, &mut etcd, b_lock, b"b");
    // The same bytes arrive once more.
    let again = etcd.call(NOW, Call::Txn(lease, late));
    assert!(matches!(again, Done::Answer(Answer::Txn(false, _))), "{again:?}");
}

#[test]
fn what_was_asked_twice_takes_effect_once() {
    let mut etcd = Etcd::default();
    let mut a = Played::open(1, NOW, &mut etcd);
    let lock = a.read(NOW, &mut etcd);
    a.hear(NOW, &mut etcd);
    // The transaction takes effect, its answer is lost with the connection.
    let frame = |sequence, op| {
        let message = ToLockd::Operate { sequence, lowest_unanswered: sequence, op };
        Input::Frame(Frame { id: RequestId(1), term: Term(0), message })
    };
    let op = LockOp::convert(lock, Mode::Pw, Flags::NOQUEUE);
    let mut out = Vec::new();
    a.session.step(NOW, frame(Sequence(a.sequence + 1), op.clone()), &mut out);
    let [Output::Call(call)] = out.as_slice() else { panic!("one transaction: {out:?}") };
    etcd.call(NOW, call.clone());
    a.resume(NOW, &mut etcd, EventNumber(0));
    let Some(LockReply::Granted { lock: view, .. }) = a.ask(NOW, &mut etcd, op) else {
        panic!("it is ours: {:?}", a.heard)
    };
    assert_eq!(view.term, Term(1), "of the transaction that took effect");
    assert!(etcd.has(Key::Lock));
}

#[test]
fn a_lock_that_nobody_waits_for_is_given_back() {
    late_take(Broken::NONE);
}

fn late_take(broken: Broken) {
    let mut etcd = Etcd::default();
    let mut a = Played::open_breaking(1, NOW, &mut etcd, broken);
    let lock = a.read(NOW, &mut etcd);
    let Some(LockReply::WouldBlock | LockReply::Granted { .. }) = a.convert(NOW, &mut etcd, lock) else {
        panic!("an answer")
    };
    let (lease, take) = a.txns.last().expect("it tried").clone();
    // An agent that starts anew on the same session, and finds nothing.
    a.ask(NOW, &mut etcd, LockOp::unlock(lock, ValueChange::Invalidate));
    let mut next = Played::new(1);
    next.resume(NOW, &mut etcd, EventNumber(0));
    assert!(!etcd.has(Key::Lock));
    // The earlier attempt arrives late: void, because the term has moved on.
    let late = etcd.call(NOW, Call::Txn(lease, take.clone()));
    assert!(matches!(late, Done::Answer(Answer::Txn(false, _))));
    // Even one that is not void does not stay.
    let unguarded = Txn { when: Vec::new(), ..take };
    etcd.call(NOW, Call::Txn(lease, unguarded));
    assert!(etcd.has(Key::Lock));
    next.hear(NOW, &mut etcd);
    assert!(!etcd.has(Key::Lock));
}

#[test]
fn the_next_life_of_an_agent_finds_its_lock_and_gives_it_back() {
    let mut etcd = Etcd::default();
    let mut a = Played::open(1, NOW, &mut etcd);
    let (_, term) = a.take(NOW, &mut etcd);
    let mut next = Played::new(1);
    next.resume(NOW, &mut etcd, EventNumber(77));
    let Some(FromLockd::Opened { locks, last_event, .. }) = next.heard.first() else {
        panic!("{:?}", next.heard)
    };
    assert_eq!((locks.len(), locks[0].mode, locks[0].term), (1, Mode::Pw, term));
    assert_eq!(*last_event, EventNumber(77), "events go on behind those of the earlier life");
    let lock = locks[0].lock;
    assert_eq!(
        next.ask(NOW, &mut etcd, LockOp::unlock(lock, ValueChange::Invalidate)),
        Some(LockReply::Done)
    );
    assert!(!etcd.has(Key::Lock));
}

#[test]
fn a_compacted_watch_looks_at_everything_again() {
    let mut etcd = Etcd::default();
    let (mut a, mut b) = (Played::open(1, NOW, &mut etcd), Played::open(2, NOW, &mut etcd));
    b.hear(NOW, &mut etcd);
    let (lock, _) = a.take(NOW, &mut etcd);
    a.publish(NOW, &mut etcd, lock, b"here");
    let c = Played::open(3, NOW, &mut etcd);
    etcd.compact();
    let events = b.hear(NOW, &mut etcd);
    let (value, vacant) = told(&events).expect("what was missed is told");
    assert!(value.bytes == b"here" && value.valid && !vacant);
    let up = |event: &LockEvent| matches!(event, LockEvent::MemberUp(member) if member.session == c.id());
    assert!(events.iter().any(up));
    // And the watch goes on.
    a.publish(NOW, &mut etcd, lock, b"there");
    assert_eq!(told(&b.hear(NOW, &mut etcd)).expect("news").0.bytes, b"there");
}

#[test]
fn what_happened_while_the_connection_was_gone_is_told() {
    let mut etcd = Etcd::default();
    let (mut a, mut b) = (Played::open(1, NOW, &mut etcd), Played::open(2, NOW, &mut etcd));
    let (lock, _) = a.take(NOW, &mut etcd);
    b.hear(NOW, &mut etcd);
    a.publish(NOW, &mut etcd, lock, b"here");
    b.heard.clear();
    b.resume(NOW, &mut etcd, EventNumber(0));
    assert!(b.events().contains(&LockEvent::Overrun), "it had not heard all that was said before");
    assert_eq!(told(&b.events()).expect("news").0.bytes, b"here");
}

#[test]
fn doubt_comes_before_etcd_can_give_the_lock_to_another() {
    let mut etcd = Etcd::default();
    let mut a = Played::open(1, NOW, &mut etcd);
    let (_, term) = a.take(NOW, &mut etcd);
    // A renewal that is sent now reaches etcd later; the lease there counts from then, the doubt from now.
    let at = a.session.next_deadline().expect("a lease is counted");
    assert!(at < NOW.after(LEASE));
    a.step(NOW.after(LEASE / 4), &mut etcd, Input::Tick);
    assert!(a.doubts.is_empty());
    a.step(at, &mut etcd, Input::Tick);
    assert_eq!(a.doubts, [Some(term)]);
    assert!(a.refusal().is_none(), "a doubt ends nothing");
    // The whole of etcd was away; its new leader lets every lease run anew: nothing was lost.
    etcd.change_leader(NOW.after(LEASE * 3));
    let mut healed = a;
    healed.resume(NOW.after(LEASE * 3), &mut etcd, EventNumber(0));
    assert!(healed.refusal().is_none() && etcd.has(Key::Lock));
    assert_eq!(healed.session.next_deadline(), None);
    healed.say(NOW.after(LEASE * 3), &mut etcd, ToLockd::Renew { last_event: EventNumber(0) });
    assert!(healed.session.next_deadline().is_some());
}

#[test]
fn a_session_whose_lease_ended_is_refused_and_stays_so() {
    let mut etcd = Etcd::default();
    let mut a = Played::open(1, NOW, &mut etcd);
    let later = NOW.after(LEASE);
    a.say(later, &mut etcd, ToLockd::Renew { last_event: EventNumber(0) });
    assert_eq!(a.refusal(), Some("its lease ended"));
    a.heard.clear();
    a.resume(later, &mut etcd, EventNumber(0));
    assert_eq!(a.refusal(), Some("its lease ended"));
}

#[test]
fn an_operator_who_takes_the_lock_away_ends_the_session() {
    let mut etcd = Etcd::default();
    let mut a = Played::open(1, NOW, &mut etcd);
    a.take(NOW, &mut etcd);
    etcd.remove(Key::Lock);
    a.hear(NOW, &mut etcd);
    assert_eq!(a.refusal(), Some("the server lock was taken from it"));
    assert!(!etcd.has(Key::Member(a.id())), "its lease goes too");
}

#[test]
fn an_etcd_that_was_restored_gives_no_term_twice() {
    restored(Broken::NONE);
}

fn restored(broken: Broken) {
    let mut etcd = Etcd::default();
    let mut a = Played::open_breaking(1, NOW, &mut etcd, broken);
    let backup = etcd.clone();
    let mut last = Term(0);
    for _ in 0..5 {
        let (lock, term) = a.take(NOW, &mut etcd);
        assert!(term > last);
        last = term;
        a.ask(NOW, &mut etcd, LockOp::unlock(lock, ValueChange::Invalidate));
    }
    let mut etcd = backup;
    a.resume(NOW, &mut etcd, EventNumber(0));
    assert!(a.refusal().is_some_and(|reason| reason.contains("restored")), "{:?}", a.heard);
    // Its next session knows, and so does a fresh agent that has read the pool.
    a.n = 9;
    a.connect(NOW, &mut etcd);
    let (session, secret) = (a.id(), Secret([9; 16]));
    let node = Name::new("n1").expect("a name");
    a.say(NOW, &mut etcd, ToLockd::Open { session, secret, node, lease_ms: 2000, info: Vec::new() });
    let (lock, term) = a.take(NOW, &mut etcd);
    assert!(term > last);
    a.ask(NOW, &mut etcd, LockOp::unlock(lock, ValueChange::Invalidate));
    let mut fresh = Played::open(2, NOW, &mut etcd);
    fresh.step(NOW, &mut etcd, Input::Floor(Term(5000)));
    assert_eq!(fresh.take(NOW, &mut etcd).1, Term(5001));
}

#[test]
fn terms_do_not_follow_the_revisions_of_a_busy_etcd() {
    let mut etcd = Etcd::default();
    etcd.pass_revisions(1 << 40);
    let mut a = Played::open(1, NOW, &mut etcd);
    assert_eq!(a.take(NOW, &mut etcd).1, Term(1), "volume ids have 32 bits for a term");
}

#[test]
fn what_others_write_below_the_prefix_is_no_panic_and_named() {
    for key in [Key::Lock, Key::Term, Key::Value] {
        let mut etcd = Etcd::default();
        let mut a = Played::open(1, NOW, &mut etcd);
        etcd.put(key, b"something else");
        a.hear(NOW, &mut etcd);
        let name = key.name();
        assert!(a.refusal().is_some_and(|reason| reason.contains(&name)), "{:?}", a.heard);
    }
    let mut etcd = Etcd::default();
    let mut a = Played::open(1, NOW, &mut etcd);
    etcd.put(Key::Member(SessionId([7; 16])), b"another version's");
    a.hear(NOW, &mut etcd);
    assert_eq!(a.refusal(), None, "a member of another version takes no part");
    assert_eq!(keys::decode_member(b""), None);
}

#[test]
fn what_etcd_cannot_do_is_refused_with_a_reason() {
    let mut etcd = Etcd::default();
    let mut a = Played::open(1, NOW, &mut etcd);
    let reader = a.read(NOW, &mut etcd);
    for op in [
        LockOp::lock("another", Mode::Cr, Flags::NONE),
        LockOp::lock(RESOURCE, Mode::Ex, Flags::NONE),
        LockOp::convert(reader, Mode::Pw, Flags::NONE),
        LockOp::convert(reader, Mode::Ex, Flags::NOQUEUE),
        LockOp::watch(Watched::Key("k".to_owned())),
        LockOp::Cancel { lock: reader },
        LockOp::unlock(LockId(99), ValueChange::Keep),
    ] {
        let reply = a.ask(NOW, &mut etcd, op.clone());
        assert!(matches!(reply, Some(LockReply::Invalid(_))), "{op:?}: {reply:?}");
    }
}

#[test]
fn answers_to_nothing_drop_the_connection() {
    let mut etcd = Etcd::default();
    let mut a = Played::new(1);
    a.connect(NOW, &mut etcd);
    a.step(NOW, &mut etcd, Input::Answer(Answer::Revoked));
    assert!(a.dropped);
}

proptest! {
    #[test]
    fn nothing_that_stands_below_the_prefix_is_a_panic(
        entries in prop::collection::vec((0..5u8, prop::collection::vec(any::<u8>(), 0..80), any::<bool>()), 0..20),
    ) {
        let mut etcd = Etcd::default();
        let mut a = Played::open(1, NOW, &mut etcd);
        a.take(NOW, &mut etcd);
        for (which, content, versioned) in entries {
            let keys = [Key::Lock, Key::Term, Key::Value, Key::Member(a.id()), Key::Member(SessionId([3; 16]))];
            let content = if versioned { [&[1], content.as_slice()].concat() } else { content };
            etcd.put(keys[usize::from(which)], &content);
            a.hear(NOW, &mut etcd);
        }
        a.resume(NOW, &mut etcd, EventNumber(0));
        prop_assert!(!a.dropped);
    }
}

/// Each rule broken, and the test that must notice.
#[cfg(feature = "canary")]
#[test]
fn every_broken_rule_is_noticed() {
    use crate::etcd::Canary;
    type Property = fn(Broken);
    let properties: [(Canary, Property); 3] = [
        (Canary::WriteUnguarded, late_write),
        (Canary::TakeUnguarded, late_take),
        (Canary::ResumeOverRestore, restored),
    ];
    for (canary, property) in properties {
        let noticed = std::panic::catch_unwind(|| property(Broken::rule(canary))).is_err();
        assert!(noticed, "{canary:?} was not noticed");
    }
}
