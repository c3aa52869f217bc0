//! Sessions: proof, resends, replays, membership, limits.

use csnap_proto::EventNumber;
use csnap_proto::limits::{LOCKD_SESSIONS_MAX, LOCKS_PER_SESSION_MAX, WATCHES_PER_SESSION_MAX};
use csnap_proto::message::lock::Member;

use super::*;
use crate::core::table::Missed;

fn member(session: SessionId, info: u8) -> Member {
    Member { session, node: Name::new("node").expect("a name"), info: vec![info] }
}

#[test]
fn a_session_belongs_to_whoever_has_its_secret() {
    let mut bench = Bench::new();
    assert_eq!(bench.apply(open(A)), [Effect::Opened { session: A }], "a resent Open is no other session");
    let Command::Open { node, lease_ms, info, .. } = open(A) else { unreachable!() };
    let stolen = Command::Open { session: A, secret: secret(B), node, lease_ms, info };
    assert!(matches!(bench.apply(stolen)[..], [Effect::Refused { .. }]));
    assert_eq!(bench.table.proves(A, secret(A)), Some(true));
    assert_eq!(bench.table.proves(A, secret(B)), Some(false));
    assert_eq!(bench.table.proves(SessionId([9; 16]), secret(A)), None);
}

#[test]
fn a_resend_takes_effect_once_and_gets_the_same_answer() {
    let mut bench = Bench::new();
    let lock = LockOp::lock("r", Mode::Pr, Flags::NONE);
    let command = Command::Operate {
        session: A,
        sequence: Sequence(1),
        lowest_unanswered: Sequence(1),
        op: lock.clone(),
    };
    let first = bench.apply(command.clone());
    let before = bench.table.clone();
    assert_eq!(bench.apply(command.clone()), first);
    assert_eq!(bench.table, before);
    // Once it is acknowledged, or with a gap before it, it is neither done nor answered.
    bench.op(A, lock.clone());
    assert_eq!(bench.apply(command), []);
    let sequence = Sequence(9);
    assert_eq!(
        bench.apply(Command::Operate { session: A, sequence, lowest_unanswered: sequence, op: lock }),
        []
    );
    assert_eq!(bench.table.sessions[&A].locks.len(), 2);
}

#[test]
fn what_was_missed_comes_back_in_order() {
    let mut bench = Bench::new();
    let operate = |sequence: u64, op| Command::Operate {
        session: A,
        sequence: Sequence(sequence),
        lowest_unanswered: Sequence(1),
        op,
    };
    let holder = bench.locked(B, Mode::Ex);
    let wait = LockOp::lock("r", Mode::Cr, Flags::NONE);
    bench.apply(operate(1, wait));
    bench.unlock(B, holder, ValueChange::Keep);
    bench.apply(operate(2, LockOp::watch(Watched::Value("r".into()))));
    let missed = bench.table.missed(A, EventNumber(0));
    assert!(
        matches!(
            missed[..],
            [
                Missed::Answer(Sequence(1), LockReply::Queued { .. }),
                Missed::Event(EventNumber(1), LockEvent::Granted { .. }),
                Missed::Answer(Sequence(2), LockReply::Value { .. }),
            ]
        ),
        "{missed:?}"
    );
    let view = bench.table.view(A).expect("open");
    assert_eq!((view.last_event, view.last_sequence), (EventNumber(1), Sequence(2)));
    assert_eq!((view.locks.len(), view.queued.len()), (1, 0));
    assert_eq!(
        bench.table.missed(A, EventNumber(1)).len(),
        2,
        "answers are repeated, events that were seen are not"
    );
}

#[test]
fn a_session_that_ends_leaves_nothing_and_serves_who_waits() {
    let mut bench = Bench::new();
    bench.locked(A, Mode::Ex);
    bench.queued(A, Mode::Ex);
    let waiting = bench.queued(B, Mode::Ex);
    bench.events();
    let effects = bench.apply(Command::Expire { session: A });
    assert_eq!(effects[0], Effect::Ended { session: A, expired: true });
    assert_eq!(grants(&bench.events()), [(B, waiting, Mode::Ex)]);
    assert_eq!(bench.table.locks.len(), 1);
    assert_eq!(bench.table.view(A), None);
    assert_eq!(bench.apply(Command::Close { session: A }), []);
}

#[test]
fn a_dying_session_is_never_granted_its_own_queued_locks() {
    let mut bench = Bench::new();
    bench.locked(A, Mode::Ex);
    bench.queued(A, Mode::Ex);
    bench.events();
    bench.apply(Command::Expire { session: A });
    assert_eq!(bench.events(), []);
    assert_eq!(bench.table.term(), Term(1));
}

#[test]
fn members_come_change_and_go() {
    let mut bench = Bench::new();
    let all = [A, B, C].map(|session| member(session, session.0[0])).to_vec();
    assert_eq!(bench.op(A, LockOp::watch(Watched::Members)), LockReply::Members(all));
    bench.op(B, LockOp::SetInfo { info: vec![7] });
    assert_eq!(bench.events(), [(A, LockEvent::MemberUp(member(B, 7)))]);
    bench.apply(Command::Expire { session: B });
    let node = Name::new("node").expect("a name");
    assert_eq!(bench.events(), [(A, LockEvent::MemberDown { session: B, node })]);
    bench.apply(open(B));
    assert_eq!(bench.events(), [(A, LockEvent::MemberUp(member(B, 0xb)))]);
}

#[test]
fn every_table_has_its_limit() {
    let mut table = Table::default();
    let session = |n: usize| {
        SessionId(std::array::from_fn(|i| u8::try_from(n >> (8 * i.min(4)) & 0xff).expect("masked")))
    };
    let mut effects = Vec::new();
    for n in 0..LOCKD_SESSIONS_MAX {
        table.apply(open(session(n)), &mut effects);
    }
    effects.clear();
    table.apply(open(session(LOCKD_SESSIONS_MAX)), &mut effects);
    assert!(matches!(effects[..], [Effect::Refused { .. }]));

    let mut bench = Bench::new();
    let fill = |bench: &mut Bench, n: usize, op: fn(String) -> LockOp| {
        let mut effects = Vec::new();
        for i in 0..n {
            let sequence = bench.table.sessions[&A].last_sequence.next();
            let op = op(format!("r{i}"));
            bench.table.apply(
                Command::Operate { session: A, sequence, lowest_unanswered: sequence, op },
                &mut effects,
            );
        }
        assert_eq!(effects.len(), n);
        assert!(
            !effects
                .iter()
                .any(|effect| matches!(effect, Effect::Answer { reply: LockReply::Invalid(_), .. }))
        );
    };
    let watch: fn(String) -> LockOp = |resource| LockOp::watch(Watched::Value(resource));
    fill(&mut bench, WATCHES_PER_SESSION_MAX, watch);
    assert!(is_invalid(&bench.op(A, watch("more".into()))));
    fill(&mut bench, LOCKS_PER_SESSION_MAX, |resource| LockOp::lock(resource, Mode::Cr, Flags::NOQUEUE));
    assert!(is_invalid(&bench.lock(A, Mode::Cr)));
}
