//! Deletes of snapshots: whoever still reads is told, and space comes back when nobody can be reading it.

use std::time::Duration;

use csnap_proto::message::operate::{OperatorReply, OperatorRequest, RefusalKind};
use csnap_proto::message::volume::{Attach, FromServer, IdentifyOk, ToServer};
use csnap_proto::{FreeBatchId, InstanceId, ReadId};
use csnap_server::core::{ConnId, Input};

use crate::desk::Desk;
use crate::words::{name, range, refused, target};

#[test]
fn a_snapshot_in_use_is_deleted_only_by_force_and_its_readers_are_told() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.connect(3, 3, Attach::Snapshot(target("v@a")));
    let read = ReadId(1);
    desk.ask(ConnId(3), ToServer::QuerySnapshotRead { read, ranges: vec![range(0, 1)] });
    let delete = |force| OperatorRequest::SnapshotDelete { target: target("v@a"), force };
    let FromServer::Refused(refusal) = desk.operate(1, 3, delete(false)) else { panic!("refused") };
    assert!(refusal.kind == RefusalKind::Busy && refusal.reason.contains("pid 3"), "{}", refusal.reason);
    assert!(matches!(desk.operate(1, 4, delete(true)), FromServer::Operated(OperatorReply::Done)));
    assert!(desk.to(3).contains(&&FromServer::SnapshotGone));
    let finished = desk.ask(ConnId(3), ToServer::FinishSnapshotRead { read });
    assert_eq!(finished, FromServer::Retry { read }, "its mark is broken");
    let next = desk.ask(ConnId(3), ToServer::QuerySnapshotRead { read, ranges: vec![range(0, 1)] });
    assert_eq!(refused(&next), Some(RefusalKind::Gone));
}

#[test]
fn a_reader_that_was_away_when_its_snapshot_went_is_told_and_holds_nothing_any_more() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.write(0, 4);
    desk.connect(3, 3, Attach::Snapshot(target("v@a")));
    desk.give(Input::Closed { conn: ConnId(3) });
    desk.operate(1, 3, OperatorRequest::SnapshotDelete { target: target("v@a"), force: true });
    let looked_at = vec![desk.volume_named("v")];
    desk.operate(1, 4, OperatorRequest::Reaped { instance: InstanceId([2; 16]), looked_at });
    desk.operate(1, 5, OperatorRequest::VolumeDelete { name: name("v") });
    desk.pass(Duration::from_secs(1));
    assert_eq!(desk.core.state().held().bytes, 4 * 4096, "it may be reading them");
    let welcome = desk.connect(4, 3, Attach::Snapshot(target("v@a")));
    assert!(matches!(welcome, FromServer::IdentifyOk(IdentifyOk { geometry: None, .. })), "{welcome:?}");
    assert_eq!(desk.to(4).last(), Some(&&FromServer::SnapshotGone));
    let told = desk.ask(ConnId(4), ToServer::Renew { forgotten: FreeBatchId(0) });
    let FromServer::Renewed { forget, .. } = told else { panic!("{told:?}") };
    desk.ask(ConnId(4), ToServer::Renew { forgotten: forget[0].batch });
    desk.pass(Duration::from_secs(1));
    assert_eq!(desk.core.state().held().bytes, 0);
    desk.check();
}

#[test]
fn a_reader_of_a_deleted_snapshot_does_not_pass_for_the_writer() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.connect(3, 3, Attach::Snapshot(target("v@a")));
    desk.operate(1, 3, OperatorRequest::SnapshotDelete { target: target("v@a"), force: true });
    let shown = desk.operate(1, 4, OperatorRequest::VolumeShow { name: name("v") });
    let FromServer::Operated(OperatorReply::Volume(info)) = shown else { panic!("{shown:?}") };
    let attached: Vec<_> = info.attached.iter().map(|a| (a.pid, a.snapshot.clone())).collect();
    assert_eq!(attached, [(2, None)], "whoever waits for its writer's lock would wait for another's");
}

#[test]
fn deleting_every_snapshot_gives_all_space_back() {
    let mut desk = Desk::with_writer();
    for (sequence, snapshot) in [(2, "a"), (3, "b"), (4, "c")] {
        desk.snapshot(sequence, snapshot);
        desk.write(sequence, 600);
    }
    for (sequence, snapshot) in [(5, "b"), (6, "a"), (7, "c")] {
        let request =
            OperatorRequest::SnapshotDelete { target: target(&format!("v@{snapshot}")), force: false };
        desk.operate(1, sequence, request);
    }
    for _ in 0..20 {
        desk.say(ConnId(2), ToServer::Renew { forgotten: FreeBatchId(0) });
        desk.pass(Duration::from_millis(50));
    }
    assert_eq!(desk.core.state().used_bytes(), 0);
    assert_eq!(desk.core.state().held().bytes, 0);
    desk.check();
}
