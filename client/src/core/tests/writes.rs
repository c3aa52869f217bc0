//! Writes, grants and flushes.

use super::super::gather::LATE;
use super::*;

#[test]
fn a_head_read_and_a_write_without_snapshots_send_nothing() {
    let mut rig = writer(true);
    let before = rig.core.messages().clone();
    let (io, op) = one_io(&rig.request(Op::Read, 5, 2));
    assert!(matches!(op, IoOp::HeadRead { offset: 20480, len: 8192, .. }));
    assert_eq!(completed(&rig.done(io)), [(1, Ok(()))]);
    let (io, _) = one_io(&rig.write(5, 2));
    assert_eq!(completed(&rig.done(io)), [(2, Ok(()))]);
    assert_eq!(rig.core.messages(), &before);
}

#[test]
fn the_first_write_costs_two_messages_and_the_second_none() {
    let mut rig = writer(false);
    let (id, message) = one_sent(&rig.write(3, 2));
    assert_eq!(message, ToServer::QueryWrite { ranges: vec![range(3, 2)] });
    let (io, op) = one_io(&rig.grant(id, 1, &[3, 4, 9]));
    assert!(matches!(op, IoOp::HeadWrite { offset: 12288, len: 8192, .. }));
    rig.done(io);
    one_io(&rig.write(3, 1));
    one_io(&rig.write(9, 1));
    assert_eq!((rig.count("QueryWrite"), rig.count("WriteOk")), (1, 1));
}

#[test]
fn writes_that_come_while_a_message_is_unanswered_share_the_next() {
    let mut rig = writer(false);
    let (first, _) = one_sent(&rig.write(0, 1));
    for chunk in 1..32 {
        assert_eq!(sent(&rig.write(chunk * 2, 1)), []);
    }
    let (_, message) = one_sent(&rig.grant(first, 1, &[0]));
    let ToServer::QueryWrite { ranges } = message else { panic!("{message:?}") };
    assert_eq!(ranges.len(), 31);
}

#[test]
fn a_late_answer_holds_up_no_other_write() {
    let mut rig = writer(false);
    let mut asked = sent(&rig.write(0, 1)).len();
    for chunk in 1..32 {
        rig.write(chunk * 2, 1);
        let late = rig.core.next_deadline().expect("an answer is late one day");
        let late = late.since(rig.now).min(LATE);
        asked += sent(&rig.after(u64::try_from(late.as_millis()).expect("short"))).len();
    }
    assert_eq!(asked, QUERIES_IN_FLIGHT_MAX);
    assert!(rig.core.next_deadline().is_some_and(|next| next > rig.now), "it does not spin");
}

#[test]
fn a_large_write_is_asked_for_in_pieces_and_issued_whole() {
    let mut rig = writer(false);
    let queries = sent(&rig.write(0, 10_000));
    assert_eq!(queries.len(), 3);
    let all: Vec<u64> = (0..10_240).collect();
    assert_eq!(ios(&rig.grant(queries[1].0, 1, &all[4096..8192])), []);
    assert_eq!(ios(&rig.grant(queries[0].0, 1, &all[..4096])), []);
    let (_, op) = one_io(&rig.grant(queries[2].0, 1, &all[8192..10_000]));
    assert!(matches!(op, IoOp::HeadWrite { offset: 0, len: 40_960_000, .. }));
}

#[test]
fn a_cache_without_room_costs_messages_not_progress() {
    let mut rig = Rig::new(CoreConfig { unique_cache_bytes: 0, ..writer_config() });
    rig.attach(identify_ok(1, false, false));
    for round in 1..3 {
        let (id, _) = one_sent(&rig.write(3, 1));
        let (io, _) = one_io(&rig.grant(id, 1, &[3]));
        assert_eq!(completed(&rig.done(io)), [(round, Ok(()))]);
    }
}

#[test]
fn a_write_with_a_chunk_without_space_fails_before_any_of_it_is_written() {
    let mut rig = writer(false);
    let (id, _) = one_sent(&rig.write(0, 4));
    let no_space = vec![range(2, 1)];
    let message =
        FromServer::WriteOk { epoch: Epoch(1), no_space, all_unique: false, pages: pages(&[0, 1, 3]) };
    let out = rig.frame(id, message);
    assert_eq!(completed(&out), [(1, Err(RequestError::NoSpace))]);
    assert_eq!(ios(&out), []);
    one_io(&rig.write(3, 1));
}

#[test]
fn a_refused_batch_is_asked_again_one_by_one() {
    let mut rig = writer(false);
    for chunk in 0..3 {
        rig.write(chunk * 10, 1);
    }
    let first: Vec<RequestId> = rig.core.writes_asked();
    let (batch, _) = one_sent(&rig.grant(first[0], 1, &[0]));
    let refusal = Refusal::new(RefusalKind::Media, "unreadable");
    let (alone, message) = one_sent(&rig.frame(batch, FromServer::Refused(refusal.clone())));
    assert_eq!(message, ToServer::QueryWrite { ranges: vec![range(10, 1)] });
    let out = rig.frame(alone, FromServer::Refused(refusal.clone()));
    assert_eq!(completed(&out), [(2, Err(RequestError::Refused(refusal)))]);
    one_sent(&out);
}

#[test]
fn a_grant_of_another_epoch_is_asked_for_again() {
    let mut rig = writer(false);
    let (id, _) = one_sent(&rig.write(3, 1));
    let out = rig.grant(id, 2, &[3]);
    assert_eq!(ios(&out), []);
    assert!(matches!(one_sent(&out).1, ToServer::QueryWrite { .. }));
}

#[test]
fn a_flush_is_not_satisfied_by_a_sync_that_began_before_it() {
    let mut rig = writer(true);
    let (first, _) = one_io(&rig.request(Op::Flush, 0, 0));
    assert_eq!(ios(&rig.request(Op::Flush, 0, 0)), []);
    assert_eq!(ios(&rig.request(Op::Flush, 0, 0)), []);
    let out = rig.done(first);
    assert_eq!(completed(&out), [(1, Ok(()))]);
    let (second, op) = one_io(&out);
    assert_eq!(op, IoOp::HeadSync);
    assert_eq!(completed(&rig.done(second)), [(2, Ok(())), (3, Ok(()))]);
}

#[test]
fn a_write_with_fua_completes_after_its_sync() {
    let mut rig = writer(true);
    let (write, _) = one_io(&rig.request(Op::Write { fua: true }, 1, 1));
    let out = rig.done(write);
    assert_eq!(completed(&out), []);
    assert_eq!(completed(&rig.done(one_io(&out).0)), [(1, Ok(()))]);
}

#[test]
fn a_failed_sync_ends_the_attachment_and_is_not_repeated() {
    let mut rig = writer(false);
    rig.write(1, 1);
    let (sync, _) = one_io(&rig.request(Op::Flush, 0, 0));
    rig.request(Op::Flush, 0, 0);
    let out = rig.step(Input::IoDone { io: sync, result: Err(IoFailure::Media("EIO".into())) });
    assert_eq!(completed(&out).len(), 3);
    assert!(completed(&out).iter().all(|(_, result)| matches!(result, Err(RequestError::Media(_)))));
    assert_eq!(ios(&out).iter().filter(|(_, op)| *op == IoOp::HeadSync).count(), 0);
    assert!(matches!(completed(&rig.request(Op::Read, 1, 1))[0].1, Err(RequestError::Media(_))));
}

#[test]
fn writeback_starts_when_enough_is_dirty() {
    let mut rig = writer(true);
    let (io, _) = one_io(&rig.write(0, 255));
    assert_eq!(ios(&rig.done(io)), []);
    let (_, op) = one_io(&rig.step(Input::Written { bytes: CHUNK }));
    assert_eq!(op, IoOp::Writeback);
}
