//! Connections that come and go, liveness, refusals, release.

use super::*;

#[test]
fn what_is_unanswered_is_asked_again_on_the_next_connection_and_caches_stay() {
    let mut rig = writer(false);
    let (id, _) = one_sent(&rig.write(3, 1));
    rig.grant(id, 1, &[3]);
    one_sent(&rig.write(4, 1));
    let out = rig.step(Input::Disconnected { conn: ConnId(1) });
    assert_eq!(out, [Output::NeedServer { suspect: Term(1) }]);
    one_io(&rig.write(3, 1));
    rig.term = 2;
    let (_, message) = one_sent(&rig.attach(identify_ok(1, false, false)));
    assert_eq!(message, ToServer::QueryWrite { ranges: vec![range(4, 1)] });
    one_io(&rig.write(3, 1));
}

#[test]
fn another_epoch_at_identification_drops_the_cache() {
    let mut rig = writer(true);
    rig.step(Input::Disconnected { conn: ConnId(1) });
    rig.attach(identify_ok(2, false, false));
    let out = rig.write(3, 1);
    assert!(matches!(one_sent(&out).1, ToServer::QueryWrite { .. }));
}

#[test]
fn frames_of_older_terms_change_nothing() {
    let mut rig = Rig::new(writer_config());
    rig.term = 5;
    rig.attach(identify_ok(1, false, false));
    let (id, _) = one_sent(&rig.write(3, 1));
    rig.term = 4;
    assert_eq!(rig.grant(id, 1, &[3]), []);
    rig.term = 5;
    one_io(&rig.grant(id, 1, &[3]));
    rig.step(Input::Disconnected { conn: ConnId(1) });
    rig.term = 4;
    let out = rig.attach(identify_ok(1, true, false));
    assert!(matches!(out.as_slice(), [Output::Disconnect { .. }]), "{out:?}");
    assert_eq!(rig.after(20), [Output::NeedServer { suspect: Term(4) }]);
}

#[test]
fn a_renew_unanswered_for_half_a_lease_makes_the_server_suspect() {
    let mut rig = writer(true);
    let (id, message) = one_sent(&rig.after(LEASE_MS / 5));
    assert_eq!(message, ToServer::Renew { forgotten: FreeBatchId(0) });
    rig.frame(id, FromServer::Renewed { forget: vec![], all_unique: true, epoch: Epoch(1) });
    one_sent(&rig.after(LEASE_MS / 5));
    assert_eq!(rig.after(LEASE_MS / 2 - 1), []);
    let out = rig.after(1);
    assert!(matches!(out[0], Output::Disconnect { conn: ConnId(1), .. }));
    assert_eq!(out[1], Output::NeedServer { suspect: Term(1) });
}

#[test]
fn a_refusal_ends_a_first_attach_and_only_a_gone_session_a_later_one() {
    let busy = Refusal::new(RefusalKind::Busy, "held by n2");
    let mut rig = Rig::new(writer_config());
    let id = rig.connect();
    let out = rig.frame(id, FromServer::Refused(busy.clone()));
    assert_eq!(out[1], Output::Ended(RequestError::Refused(busy.clone())));

    let mut rig = writer(true);
    rig.step(Input::Disconnected { conn: ConnId(1) });
    let id = rig.connect();
    rig.frame(id, FromServer::Refused(busy));
    assert_eq!(rig.after(20), [Output::NeedServer { suspect: Term(1) }]);
    let id = rig.connect();
    let out = rig.frame(id, FromServer::Refused(Refusal::new(RefusalKind::NotFound, "fenced")));
    assert!(matches!(out[1], Output::Ended(RequestError::Lost(_))), "{out:?}");
    assert!(matches!(completed(&rig.write(1, 1))[0].1, Err(RequestError::Lost(_))));
}

#[test]
fn a_reader_whose_snapshot_went_while_it_was_away_forgets_and_releases() {
    let without = IdentifyOk { geometry: None, ..identify_ok(1, false, false) };
    for attached_before in [true, false] {
        let mut rig = Rig::new(reader_config());
        if attached_before {
            rig.attach(identify_ok(1, false, false));
        } else {
            rig.connect();
        }
        rig.step(Input::Disconnected { conn: ConnId(1) });
        let out = rig.attach(without.clone());
        match out.as_slice() {
            [Output::Ended(RequestError::Lost(_))] => assert!(attached_before),
            [Output::Ended(RequestError::Refused(Refusal { kind: RefusalKind::Gone, .. }))] => {
                assert!(!attached_before)
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(rig.frame(RequestId(0), FromServer::SnapshotGone), [], "said twice");
        let (renew, _) = one_sent(&rig.after(LEASE_MS / 5));
        let forget = vec![Forget { batch: FreeBatchId(3), extents: vec![] }];
        rig.frame(renew, FromServer::Renewed { forget, all_unique: false, epoch: Epoch(1) });
        let (_, message) = one_sent(&rig.after(LEASE_MS / 5));
        assert_eq!(message, ToServer::Renew { forgotten: FreeBatchId(3) });
        let (release, message) = one_sent(&rig.request(Op::Release, 0, 0));
        assert_eq!(message, ToServer::Release);
        assert_eq!(completed(&rig.frame(release, FromServer::Released)), [(1, Ok(()))]);
    }
}

/// Also while the session has no volume that an answer could be measured by. Panics end the process and with it all
/// attachments.
#[test]
fn what_nobody_asked_for_is_survived() {
    let with = identify_ok(1, false, false);
    let without = IdentifyOk { geometry: None, ..with.clone() };
    let (read, advice, epoch) = (ReadId(1), RequestToken([9; 16]), Epoch(2));
    let messages = [
        FromServer::IdentifyOk(without.clone()),
        FromServer::WriteOk { epoch, no_space: vec![range(0, 1)], all_unique: true, pages: pages(&[1]) },
        FromServer::SnapshotRead { read, extents: vec![extent(0, 1, stored(0))] },
        FromServer::FinishSnapshotReadOk { read },
        FromServer::Retry { read },
        FromServer::SnapshotAdvice { advice },
        FromServer::Resume { advice, epoch, all_unique: true },
        FromServer::Renewed { forget: vec![], all_unique: true, epoch },
        FromServer::Released,
        FromServer::Refused(Refusal::new(RefusalKind::Busy, "not now")),
        FromServer::SnapshotGone,
    ];
    for (config, ok) in [(reader_config(), without), (reader_config(), with.clone()), (writer_config(), with)]
    {
        for message in &messages {
            let mut rig = Rig::new(config.clone());
            rig.attach(ok.clone());
            for id in [0, 1, 99] {
                rig.frame(RequestId(id), message.clone());
            }
            rig.after(LEASE_MS);
        }
    }
}

#[test]
fn a_writer_without_a_volume_is_no_session() {
    let mut rig = Rig::new(writer_config());
    let out = rig.attach(IdentifyOk { geometry: None, ..identify_ok(1, false, false) });
    assert!(matches!(out.as_slice(), [Output::Disconnect { .. }]), "{out:?}");
}

#[test]
fn a_release_waits_for_what_came_before_syncs_and_is_sent_again() {
    let mut rig = writer(true);
    let write = one_io(&rig.write(1, 1)).0;
    let stop = one_io(&rig.request(Op::Release, 0, 0)).0;
    assert_eq!(ios(&rig.done(stop)), []);
    let sync = ios(&rig.done(write))[0];
    assert_eq!(sync.1, IoOp::HeadSync);
    assert_eq!(one_sent(&rig.done(sync.0)).1, ToServer::Release);
    assert_eq!(completed(&rig.write(1, 1)), [(3, Err(RequestError::Released))]);
    rig.step(Input::Disconnected { conn: ConnId(1) });
    let (id, message) = one_sent(&rig.attach(identify_ok(1, true, false)));
    assert_eq!(message, ToServer::Release);
    assert_eq!(completed(&rig.frame(id, FromServer::Released)), [(2, Ok(()))]);
    assert_eq!(rig.core.next_deadline(), None);
}
