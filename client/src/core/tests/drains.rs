//! Stopping for a snapshot create.

use super::*;

/// Until the fast path is stopped: the fast path's I/O and the pre-sync.
fn advise(rig: &mut Rig, advice: u8) -> IoId {
    let (sync, op) =
        one_io(&rig.frame(RequestId(0), FromServer::SnapshotAdvice { advice: RequestToken([advice; 16]) }));
    assert_eq!(op, IoOp::HeadSync);
    sync
}

#[test]
fn an_advice_is_answered_after_stop_drain_and_sync() {
    let mut rig = writer(true);
    let sync = advise(&mut rig, 1);
    let (late, _) = one_io(&rig.write(1, 1));
    let (stop, op) = one_io(&rig.done(sync));
    assert_eq!(op, IoOp::StopFast);
    assert_eq!(rig.write(2, 1), []);
    assert_eq!(ios(&rig.done(stop)), []);
    let (last, op) = one_io(&rig.done(late));
    assert_eq!(op, IoOp::HeadSync);
    let (_, message) = one_sent(&rig.done(last));
    assert_eq!(message, ToServer::SnapshotAdviceOk { advice: RequestToken([1; 16]) });
    assert_eq!(rig.write(3, 1), []);
    let resume = FromServer::Resume { advice: RequestToken([1; 16]), epoch: Epoch(2), all_unique: false };
    let out = rig.frame(RequestId(0), resume);
    let (_, message) = one_sent(&out);
    assert_eq!(message, ToServer::QueryWrite { ranges: vec![range(2, 2)] });
}

#[test]
fn grants_that_arrive_during_a_drain_are_thrown_away() {
    let mut rig = writer(false);
    let (id, _) = one_sent(&rig.write(3, 1));
    let sync = advise(&mut rig, 1);
    assert_eq!(rig.grant(id, 1, &[3]), []);
    let stop = one_io(&rig.done(sync)).0;
    let last = one_io(&rig.done(stop)).0;
    rig.done(last);
    let resume = FromServer::Resume { advice: RequestToken([1; 16]), epoch: Epoch(1), all_unique: false };
    assert!(matches!(one_sent(&rig.frame(RequestId(0), resume)).1, ToServer::QueryWrite { .. }));
}

#[test]
fn a_known_advice_is_drained_anew() {
    let mut rig = writer(true);
    for _ in 0..2 {
        let sync = advise(&mut rig, 1);
        let stop = one_io(&rig.done(sync)).0;
        let last = one_io(&rig.done(stop)).0;
        one_sent(&rig.done(last));
        let resume = FromServer::Resume { advice: RequestToken([1; 16]), epoch: Epoch(1), all_unique: true };
        rig.frame(RequestId(0), resume);
        let io = one_io(&rig.write(1, 1)).0;
        rig.done(io);
    }
}

#[test]
fn told_that_an_advice_follows_the_client_writes_nothing_until_resumed() {
    let mut rig = Rig::new(writer_config());
    rig.attach(identify_ok(1, true, true));
    assert_eq!(rig.write(1, 1), []);
    let last = advise(&mut rig, 1);
    one_sent(&rig.done(last));
    assert_eq!(rig.write(2, 1), []);
    let resume = FromServer::Resume { advice: RequestToken([1; 16]), epoch: Epoch(2), all_unique: false };
    one_sent(&rig.frame(RequestId(0), resume));
}

#[test]
fn an_unanswered_advice_dies_with_its_connection() {
    let mut rig = writer(true);
    let sync = advise(&mut rig, 1);
    let stop = one_io(&rig.done(sync)).0;
    let last = one_io(&rig.done(stop)).0;
    rig.step(Input::Disconnected { conn: ConnId(1) });
    assert_eq!(sent(&rig.done(last)), []);
    assert_eq!(rig.write(1, 1), []);
    rig.term = 2;
    let out = rig.attach(identify_ok(1, true, false));
    assert!(ios(&out).iter().any(|(_, op)| matches!(op, IoOp::HeadWrite { .. })));
}
