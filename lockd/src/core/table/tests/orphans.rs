//! Persistent locks: orphaned, adopted, broken.

use csnap_proto::OwnerId;
use csnap_proto::limits::PERSISTENT_LOCKS_MAX;
use csnap_proto::message::lock::{Holder, LockRow, Loss, Owner};

use super::*;
use crate::core::mode::{MODES, is_writer};

const OWNER: Owner = Owner { id: OwnerId([7; 16]), secret: Secret([8; 16]) };
const THIEF: Owner = Owner { id: OwnerId([7; 16]), secret: Secret([9; 16]) };

fn persistent(bench: &mut Bench, session: SessionId, mode: Mode) -> LockReply {
    let (resource, flags) = ("r".into(), Flags::NONE);
    bench.op(session, LockOp::Lock { resource, mode, flags, owner: Some(OWNER) })
}

fn row(bench: &Bench, lock: LockId) -> LockRow {
    let view = bench.table.resource("r").expect("there");
    *view.granted.iter().find(|row| row.lock == lock).expect("granted")
}

#[test]
fn a_persistent_lock_stays_with_its_owner_and_its_value_stays_valid() {
    for mode in MODES {
        let mut bench = Bench::new();
        let lock = granted(&persistent(&mut bench, A, mode)).0.lock;
        if is_writer(mode) {
            bench.write(A, lock, mode, b"x");
        }
        bench.apply(Command::Expire { session: A });
        assert_eq!(row(&bench, lock).holder, Holder { session: None, owner: Some(OWNER.id) });
        assert_eq!(bench.value().valid, is_writer(mode));
        assert_eq!(bench.table.check(), Ok(()));
        let LockReply::Locks { locks, more: false } =
            bench.op(B, LockOp::Locks { after: LockId(0), orphans: true })
        else {
            panic!()
        };
        assert_eq!(locks.iter().map(|listed| listed.row.lock).collect::<Vec<_>>(), [lock]);
    }
}

#[test]
fn what_an_orphan_waited_for_is_forgotten() {
    let mut bench = Bench::new();
    let lock = granted(&persistent(&mut bench, A, Mode::Pr)).0.lock;
    let b = bench.locked(B, Mode::Pr);
    assert_eq!(bench.convert(A, lock, Mode::Ex), waits(lock));
    assert!(matches!(persistent(&mut bench, A, Mode::Ex), LockReply::Queued { .. }));
    bench.apply(Command::Close { session: A });
    bench.unlock(B, b, ValueChange::Keep);
    assert_eq!(row(&bench, lock).mode, Some(Mode::Pr));
    assert_eq!(bench.table.locks.len(), 1);
}

#[test]
fn who_has_the_secret_adopts_under_a_new_term() {
    let mut bench = Bench::new();
    let reply = persistent(&mut bench, A, Mode::Pw);
    let (lock, term) = (granted(&reply).0.lock, granted(&reply).0.term);
    bench.apply(Command::Expire { session: A });
    assert!(is_invalid(&bench.op(B, LockOp::Adopt { lock, owner: THIEF })));
    let reply = bench.op(B, LockOp::Adopt { lock, owner: OWNER });
    assert!(granted(&reply).0.term > term);
    bench.write(B, lock, Mode::Pw, b"mine");
    assert_eq!(bench.value().writer, Holder { session: Some(B), owner: Some(OWNER.id) });
    assert_eq!(bench.value().term, granted(&reply).0.term);
}

#[test]
fn an_earlier_life_that_still_lives_is_told_of_the_adoption() {
    let mut bench = Bench::new();
    let lock = granted(&persistent(&mut bench, A, Mode::Pw)).0.lock;
    bench.locked(C, Mode::Cr);
    assert_eq!(bench.convert(A, lock, Mode::Ex), waits(lock));
    bench.events();
    granted(&bench.op(B, LockOp::Adopt { lock, owner: OWNER }));
    let events = bench.events();
    assert_eq!(events[0], (A, LockEvent::Cancelled { lock }));
    assert!(matches!(&events[1], (A, LockEvent::Lost { how: Loss::Adopted(Term(2)), .. })), "{events:?}");
    assert!(is_invalid(&bench.convert(A, lock, Mode::Nl)), "it is not A's any more");
}

#[test]
fn a_broken_lock_tells_its_holder_fences_it_and_serves_who_waits() {
    for mode in MODES.into_iter().filter(|mode| *mode != Mode::Nl && *mode != Mode::Cr) {
        let mut bench = Bench::new();
        let first = bench.locked(A, Mode::Ex);
        bench.write(A, first, Mode::Nl, b"x");
        let lock = bench.locked(A, mode);
        let waiting = bench.queued(B, Mode::Pw);
        bench.events();
        let LockReply::Broken(fenced) = bench.op(C, LockOp::Break { lock }) else { panic!("{mode:?}") };
        assert_eq!((fenced.lock.lock, fenced.lock.mode, fenced.holder.session), (lock, mode, Some(A)));
        assert!(fenced.by > fenced.lock.term);
        let events = bench.events();
        let lost = LockEvent::Lost { lock: fenced.lock.clone(), how: Loss::Broken(fenced.clone()) };
        assert_eq!(events[0], (A, lost));
        assert_eq!(grants(&events), [(B, waiting, Mode::Pw)]);
        assert!(bench.table.locks[&waiting].term > fenced.by);
        assert_eq!(bench.value().valid, !is_writer(mode), "{mode:?}");
    }
}

#[test]
fn persistent_locks_have_a_limit_of_their_own() {
    let mut bench = Bench::new();
    for n in 0..PERSISTENT_LOCKS_MAX {
        let resource = format!("r{n}");
        let (mode, flags, owner) = (Mode::Nl, Flags::NONE, Some(OWNER));
        let sequence = bench.table.sessions[&A].last_sequence.next();
        let op = LockOp::Lock { resource, mode, flags, owner };
        let command = Command::Operate { session: A, sequence, lowest_unanswered: sequence, op };
        bench.table.apply(command, &mut Vec::new());
    }
    assert_eq!(bench.table.persistent, PERSISTENT_LOCKS_MAX);
    assert!(is_invalid(&persistent(&mut bench, B, Mode::Nl)));
    bench.locked(B, Mode::Nl);
    bench.apply(Command::Expire { session: A });
    assert!(is_invalid(&persistent(&mut bench, B, Mode::Nl)), "orphans count");
}
