//! Reads of a snapshot: a mark confirms one read, and a grant breaks it without waiting for the reader.

use csnap_proto::ReadId;
use csnap_proto::limits::SNAPSHOT_READS_MAX;
use csnap_proto::message::operate::RefusalKind;
use csnap_proto::message::volume::{Attach, FromServer, Place, ToServer};
use csnap_server::core::ConnId;

use crate::desk::Desk;
use crate::words::{range, refused, target};

#[test]
fn a_read_of_the_origin_is_confirmed_once_it_is_finished() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.connect(3, 3, Attach::Snapshot(target("v@a")));
    let read = ReadId(9);
    let located = desk.ask(ConnId(3), ToServer::QuerySnapshotRead { read, ranges: vec![range(0, 4)] });
    let FromServer::SnapshotRead { extents, .. } = located else { panic!("{located:?}") };
    assert!(extents.iter().all(|e| e.place == Place::Origin));
    let confirmed = desk.ask(ConnId(3), ToServer::FinishSnapshotRead { read });
    assert_eq!(confirmed, FromServer::FinishSnapshotReadOk { read });
    let again = desk.ask(ConnId(3), ToServer::FinishSnapshotRead { read });
    assert_eq!(again, FromServer::Retry { read }, "a mark confirms one read");
}

#[test]
fn a_grant_breaks_the_mark_and_does_not_wait_for_the_reader() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.connect(3, 3, Attach::Snapshot(target("v@a")));
    let read = ReadId(9);
    desk.ask(ConnId(3), ToServer::QuerySnapshotRead { read, ranges: vec![range(0, 4)] });
    assert!(matches!(desk.write(3, 1), FromServer::WriteOk { .. }), "the writer does not wait");
    let finished = desk.ask(ConnId(3), ToServer::FinishSnapshotRead { read });
    assert_eq!(finished, FromServer::Retry { read });
    let located = desk.ask(ConnId(3), ToServer::QuerySnapshotRead { read, ranges: vec![range(3, 1)] });
    let FromServer::SnapshotRead { extents, .. } = located else { panic!("{located:?}") };
    assert!(matches!(extents[0].place, Place::Store(_)), "the retry is served from the store");
}

#[test]
fn unfinished_reads_of_a_connection_are_bounded() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.connect(3, 3, Attach::Snapshot(target("v@a")));
    let query = |read| ToServer::QuerySnapshotRead { read: ReadId(read), ranges: vec![range(0, 4)] };
    for read in 0..SNAPSHOT_READS_MAX as u64 {
        assert!(matches!(desk.ask(ConnId(3), query(read)), FromServer::SnapshotRead { .. }));
    }
    assert_eq!(refused(&desk.ask(ConnId(3), query(1000))), Some(RefusalKind::Invalid));
    let read = ReadId(5);
    let finished = desk.ask(ConnId(3), ToServer::FinishSnapshotRead { read });
    assert_eq!(finished, FromServer::FinishSnapshotReadOk { read }, "those that it has are kept");
    assert!(matches!(desk.ask(ConnId(3), query(1001)), FromServer::SnapshotRead { .. }));
}

#[test]
fn a_mark_dies_with_its_connection() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.connect(3, 3, Attach::Snapshot(target("v@a")));
    let read = ReadId(9);
    desk.ask(ConnId(3), ToServer::QuerySnapshotRead { read, ranges: vec![range(0, 4)] });
    desk.connect(4, 3, Attach::Snapshot(target("v@a")));
    assert!(desk.closed.contains_key(&ConnId(3)), "the session's older connection is ended");
    assert_eq!(desk.ask(ConnId(4), ToServer::FinishSnapshotRead { read }), FromServer::Retry { read });
}
