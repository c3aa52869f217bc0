//! Lists and status fit a frame each, and go on where they stopped.

use std::time::Duration;

use csnap_proto::Epoch;
use csnap_proto::message::operate::{HELD_REASONS_MAX, OperatorReply, OperatorRequest, Source};
use csnap_proto::message::volume::{Attach, FromServer};

use crate::desk::Desk;
use crate::words::{name, target, volume_from};

#[test]
fn lists_go_on_after_any_row_that_a_peer_names() {
    let mut desk = Desk::with_writer();
    let after = Some((name("v"), Epoch(u64::MAX)));
    let rows = desk.operate(1, 2, OperatorRequest::SnapshotList { volume: None, after });
    assert!(
        matches!(rows, FromServer::Operated(OperatorReply::Snapshots { rows, more: false }) if rows.is_empty())
    );
}

/// More volumes and snapshots than fit a frame: paths, and readers, make their rows long.
#[test]
fn lists_that_do_not_fit_a_frame_come_in_pages() {
    let mut desk = Desk::new();
    desk.connect(1, 1, Attach::Operator);
    let path = |i| format!("/{}/{i:04}", "d".repeat(4000));
    for i in 0..400u32 {
        let request = volume_from(Source::Adopt { path: path(i) }, &format!("v{i:04}"), 0);
        let made = desk.operate(1, 1 + u64::from(i), request);
        assert!(matches!(made, FromServer::Operated(OperatorReply::Volume(_))), "{made:?}");
    }
    let (mut names, mut pages, mut after) = (Vec::new(), 0, None);
    loop {
        let reply = desk.operate(1, 1000 + pages, OperatorRequest::VolumeList { after: after.take() });
        let FromServer::Operated(OperatorReply::Volumes { rows, more }) = reply else { panic!("{reply:?}") };
        pages += 1;
        after = rows.last().map(|row| row.name.clone());
        names.extend(rows.into_iter().map(|row| row.name.to_string()));
        if !more {
            break;
        }
    }
    assert_eq!(names, (0..400).map(|i| format!("v{i:04}")).collect::<Vec<_>>());
    assert_eq!(pages, 2, "a frame carries a mebibyte");
}

#[test]
fn pages_of_snapshots_go_on_where_the_last_one_ended() {
    let mut desk = Desk::with_writer();
    let long = |i: u64| format!("{i:03}{}", "s".repeat(120));
    for i in 0..240 {
        desk.snapshot(2 + i, &long(i));
        for reader in 0..16 {
            desk.read_from_node(10_000 + i * 16 + reader, &long(i), &"n".repeat(128));
        }
    }
    let (mut epochs, mut pages, mut after) = (Vec::new(), 0, None);
    loop {
        let request = OperatorRequest::SnapshotList { volume: None, after: after.take() };
        let reply = desk.operate(1, 1000 + pages, request);
        let FromServer::Operated(OperatorReply::Snapshots { rows, more }) = reply else {
            panic!("{reply:?}")
        };
        pages += 1;
        after = rows.last().map(|row| (row.target.volume.clone(), row.epoch));
        epochs.extend(rows.into_iter().map(|row| row.epoch.0));
        if !more {
            break;
        }
    }
    assert_eq!(epochs, (1..=240).collect::<Vec<_>>());
    assert!(pages > 1);
}

#[test]
fn status_fits_a_frame_however_many_hold_space() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.write(0, 1);
    for reader in 0..HELD_REASONS_MAX as u64 + 20 {
        desk.read_from_node(10_000 + reader, "a", &"n".repeat(128));
    }
    desk.operate(1, 3, OperatorRequest::SnapshotDelete { target: target("v@a"), force: true });
    desk.pass(Duration::from_secs(1));
    let reply = desk.operate(1, 4, OperatorRequest::Status);
    let FromServer::Operated(OperatorReply::Status(status)) = reply else { panic!("{reply:?}") };
    assert_eq!(status.held_because.len(), HELD_REASONS_MAX + 1);
    assert_eq!(status.held_because.last().map(String::as_str), Some("and 20 more reasons"));
}
