//! Reads of a snapshot.

use super::*;

/// Asks for a read and gives the ids of its message 1.
fn ask(rig: &mut Rig, first: u64, count: u64) -> (RequestId, ReadId) {
    match one_sent(&rig.request(Op::Read, first, count)) {
        (id, ToServer::QuerySnapshotRead { read, .. }) => (id, read),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_snapshot_read_of_the_store_takes_two_messages() {
    let mut rig = reader();
    let (id, read) = ask(&mut rig, 10, 3);
    let extents = vec![extent(10, 1, Place::Zero), extent(11, 2, stored(77))];
    let out = rig.frame(id, FromServer::SnapshotRead { read, extents });
    let started = ios(&out);
    assert!(matches!(started[0].1, IoOp::ReadZeros { len: 4096, buffer_at: 0, .. }));
    assert!(matches!(started[1].1, IoOp::StoreRead { skip: 0, len: 8192, buffer_at: 4096, .. }));
    assert_eq!(completed(&rig.done(started[0].0)), []);
    assert_eq!(completed(&rig.done(started[1].0)), [(1, Ok(()))]);
    assert_eq!((rig.count("QuerySnapshotRead"), rig.count("SnapshotReadOk")), (1, 1));
    assert_eq!(rig.count("FinishSnapshotRead"), 0);
}

#[test]
fn a_snapshot_read_of_the_origin_is_complete_only_after_message_4() {
    let mut rig = reader();
    let (id, read) = ask(&mut rig, 10, 1);
    let extents = vec![extent(10, 1, Place::Origin)];
    let io = one_io(&rig.frame(id, FromServer::SnapshotRead { read, extents })).0;
    let out = rig.done(io);
    assert_eq!(completed(&out), []);
    let (finish, message) = one_sent(&out);
    assert_eq!(message, ToServer::FinishSnapshotRead { read });
    assert_eq!(completed(&rig.frame(finish, FromServer::FinishSnapshotReadOk { read })), [(1, Ok(()))]);
}

#[test]
fn a_broken_mark_or_connection_starts_the_read_again() {
    let mut rig = reader();
    let (id, read) = ask(&mut rig, 10, 1);
    let origin = || vec![extent(10, 1, Place::Origin)];
    let io = one_io(&rig.frame(id, FromServer::SnapshotRead { read, extents: origin() })).0;
    let (finish, _) = one_sent(&rig.done(io));
    let out = rig.frame(finish, FromServer::Retry { read });
    let (id, ToServer::QuerySnapshotRead { read: second, .. }) = one_sent(&out) else { panic!("{out:?}") };
    assert_ne!(read, second);
    let io = one_io(&rig.frame(id, FromServer::SnapshotRead { read: second, extents: origin() })).0;
    rig.step(Input::Disconnected { conn: ConnId(1) });
    let out = rig.attach(identify_ok(1, false, false));
    assert_eq!(sent(&out), [], "the first try's I/O is still in flight");
    let out = rig.done(io);
    assert_eq!(completed(&out), []);
    let (id, ToServer::QuerySnapshotRead { read, .. }) = one_sent(&out) else { panic!("{out:?}") };
    let io =
        one_io(&rig.frame(id, FromServer::SnapshotRead { read, extents: vec![extent(10, 1, stored(1))] })).0;
    assert_eq!(completed(&rig.done(io)), [(1, Ok(()))]);
}

#[test]
fn extents_that_do_not_cover_the_ranges_break_the_connection() {
    let wrong = [
        vec![],
        vec![extent(10, 1, Place::Zero)],
        vec![extent(11, 2, Place::Zero)],
        vec![extent(10, 3, Place::Zero)],
        vec![extent(10, 2, Place::Zero), extent(12, 1, Place::Zero)],
        vec![extent(10, 2, stored(BLOCKS_PER_ARENA - 1))],
    ];
    for extents in wrong {
        let mut rig = reader();
        let (id, read) = ask(&mut rig, 10, 2);
        let out = rig.frame(id, FromServer::SnapshotRead { read, extents });
        assert!(matches!(out.as_slice(), [Output::Disconnect { .. }]), "{out:?}");
    }
}

#[test]
fn a_batch_is_forgotten_only_when_reads_located_before_it_have_returned() {
    let mut rig = reader();
    let (id, read) = ask(&mut rig, 10, 1);
    let io =
        one_io(&rig.frame(id, FromServer::SnapshotRead { read, extents: vec![extent(10, 1, stored(5))] })).0;
    let forget = vec![Forget { batch: FreeBatchId(9), extents: vec![] }];
    let (renew, _) = one_sent(&rig.after(LEASE_MS / 5));
    rig.frame(renew, FromServer::Renewed { forget, all_unique: false, epoch: Epoch(1) });
    let (renew, message) = one_sent(&rig.after(LEASE_MS / 5));
    assert_eq!(message, ToServer::Renew { forgotten: FreeBatchId(0) });
    rig.done(io);
    rig.frame(renew, FromServer::Renewed { forget: vec![], all_unique: false, epoch: Epoch(1) });
    let (_, message) = one_sent(&rig.after(LEASE_MS / 5));
    assert_eq!(message, ToServer::Renew { forgotten: FreeBatchId(9) });
}

#[test]
fn a_snapshot_that_is_gone_fails_its_reads() {
    let mut rig = reader();
    let (id, read) = ask(&mut rig, 10, 1);
    let io =
        one_io(&rig.frame(id, FromServer::SnapshotRead { read, extents: vec![extent(10, 1, stored(5))] })).0;
    ask(&mut rig, 20, 1);
    let out = rig.frame(RequestId(0), FromServer::SnapshotGone);
    assert!(matches!(completed(&out).as_slice(), [(2, Err(RequestError::Lost(_)))]), "{out:?}");
    assert!(matches!(completed(&rig.done(io)).as_slice(), [(1, Err(RequestError::Lost(_)))]));
    assert_eq!(completed(&rig.request(Op::Write { fua: false }, 1, 1)).len(), 1);
}

#[test]
fn a_refused_query_or_finish_of_any_kind_ends_or_repeats_the_read_once() {
    use RefusalKind as K;
    let kinds = [K::Gone, K::NotFound, K::Busy, K::TimedOut, K::Invalid];
    for (kind, finishing) in kinds.iter().flat_map(|kind| [(*kind, false), (*kind, true)]) {
        let mut rig = reader();
        let (mut id, read) = ask(&mut rig, 10, 1);
        if finishing {
            let extents = vec![extent(10, 1, Place::Origin)];
            let io = one_io(&rig.frame(id, FromServer::SnapshotRead { read, extents })).0;
            id = one_sent(&rig.done(io)).0;
        }
        let refused = || FromServer::Refused(Refusal::new(kind, "no"));
        let out = rig.frame(id, refused());
        let lost = matches!(kind, K::Gone | K::NotFound);
        match completed(&out).as_slice() {
            [(1, Err(RequestError::Lost(_)))] => assert!(lost, "{kind:?}"),
            [(1, Err(RequestError::Refused(_)))] => assert!(!lost && !finishing, "{kind:?}"),
            [] => assert!(!lost, "{kind:?}"),
            other => panic!("{kind:?} {finishing}: {other:?}"),
        }
        assert_eq!(completed(&rig.frame(id, refused())), [], "{kind:?}: said twice");
    }
}

#[test]
fn a_snapshot_is_not_written_and_ranges_are_checked() {
    let mut rig = reader();
    assert_eq!(completed(&rig.write(1, 1)), [(1, Err(RequestError::ReadOnly))]);
    for (first, count) in [(CHUNKS, 1), (0, 0), (0, CHUNKS + 1), (u64::MAX / CHUNK, 2)] {
        let result = &completed(&rig.request(Op::Read, first, count))[0].1;
        assert!(matches!(result, Err(RequestError::Invalid(_))), "{first}+{count}: {result:?}");
    }
}

/// Chunks that each query of a step asks for.
fn sizes(out: &[Output]) -> Vec<u64> {
    let chunks = |(_, message): (RequestId, ToServer)| match message {
        ToServer::QuerySnapshotRead { ranges, .. } => ranges.iter().map(|range| range.count).sum(),
        other => panic!("{other:?}"),
    };
    sent(out).into_iter().map(chunks).collect()
}

/// Answers the queries of a step from the origin; their messages 3.
fn read_origin(rig: &mut Rig, out: &[Output]) -> Vec<(RequestId, ReadId)> {
    let mut finishes = Vec::new();
    for (id, message) in sent(out) {
        let ToServer::QuerySnapshotRead { read, ranges } = message else { panic!("{message:?}") };
        let extents = ranges.iter().map(|range| Extent { range: *range, place: Place::Origin }).collect();
        let started = rig.frame(id, FromServer::SnapshotRead { read, extents });
        for (io, _) in ios(&started) {
            finishes.extend(sent(&rig.done(io)).into_iter().map(|(id, _)| (id, read)));
        }
    }
    finishes
}

#[test]
fn messages_shrink_after_a_retry_and_grow_back() {
    let mut rig = reader();
    let out = rig.request(Op::Read, 0, 256);
    assert_eq!(sizes(&out), [256]);
    let [(finish, read)] = read_origin(&mut rig, &out)[..] else { panic!("one message") };
    let again = rig.frame(finish, FromServer::Retry { read });
    assert_eq!(sizes(&again), [128, 128]);
    assert_eq!(sizes(&rig.request(Op::Read, 1000, 256)), [128, 128], "a new read begins as small");
    for (finish, read) in read_origin(&mut rig, &again) {
        rig.frame(finish, FromServer::FinishSnapshotReadOk { read });
    }
    assert_eq!(sizes(&rig.request(Op::Read, 2000, 512)), [512], "twice as large with each that came through");
}

#[test]
fn a_large_snapshot_read_is_cut_to_what_a_message_carries() {
    let mut rig = reader();
    assert_eq!(sizes(&rig.request(Op::Read, 1, 9000)), [4096, 4096, 808]);
}
