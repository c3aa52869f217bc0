//! Grants: a shared chunk is written only after its copy is recorded, once, and with the gate open.

use std::time::Duration;

use csnap_proto::message::operate::{OperatorRequest, RefusalKind};
use csnap_proto::message::volume::{Attach, FromServer, IdentifyOk, ToServer};
use csnap_server::core::{ConnId, Input, Output};
use csnap_server::state::Record;

use crate::desk::{Desk, Held};
use crate::words::{create_volume, name, range, refused, target};

#[test]
fn without_snapshots_every_chunk_is_unique() {
    let mut desk = Desk::new();
    desk.connect(1, 1, Attach::Operator);
    desk.operate(1, 1, create_volume("v"));
    let welcome = desk.connect(2, 2, Attach::Writer(name("v")));
    assert!(matches!(welcome, FromServer::IdentifyOk(IdentifyOk { all_unique: true, .. })));
    let grant = desk.write(0, 4096);
    assert!(matches!(grant, FromServer::WriteOk { all_unique: true, ref pages, .. } if pages.is_empty()));
}

#[test]
fn a_shared_chunk_is_granted_after_its_copy_is_recorded_and_the_gate_was_open() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.held.copies = true;
    let id = desk.say(ConnId(2), ToServer::QueryWrite { ranges: vec![range(5, 2)] });
    assert_eq!(desk.answer_to(id), None, "not before the copy-out");
    desk.held = Held { gates: true, ..Held::default() };
    for output in std::mem::take(&mut desk.waiting) {
        let input = desk.carry_out(output).expect("a copy-out ends");
        desk.give(input);
    }
    assert!(desk.journal.iter().any(|r| matches!(r, Record::Superseded { .. })), "recorded");
    assert_eq!(desk.answer_to(id), None, "not before the gate");
    desk.release();
    let granted = desk.answer_to(id).expect("granted");
    let FromServer::WriteOk { pages, all_unique: false, .. } = granted else { panic!("{granted:?}") };
    assert_eq!(pages[0].bits[0], 0b0110_0000, "these two and no others");
    desk.check();
}

#[test]
fn a_rewrite_copies_nothing() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.write(5, 2);
    let recorded = desk.journal.len();
    assert!(matches!(desk.write(5, 2), FromServer::WriteOk { .. }));
    assert_eq!(desk.journal.len(), recorded);
}

#[test]
fn queries_that_want_the_same_chunk_share_its_copy() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.held.copies = true;
    let first = desk.say(ConnId(2), ToServer::QueryWrite { ranges: vec![range(0, 8)] });
    let second = desk.say(ConnId(2), ToServer::QueryWrite { ranges: vec![range(4, 8)] });
    desk.release();
    assert!(desk.answer_to(first).is_some() && desk.answer_to(second).is_some());
    assert_eq!(desk.core.state().used_bytes(), 12 * 4096);
    desk.check();
}

#[test]
fn a_chunk_that_is_being_copied_is_not_copied_again_for_a_client_that_comes_back() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.held.copies = true;
    desk.say(ConnId(2), ToServer::QueryWrite { ranges: vec![range(0, 1)] });
    desk.connect(4, 2, Attach::Writer(name("v")));
    let id = desk.say(ConnId(4), ToServer::QueryWrite { ranges: vec![range(0, 1)] });
    assert_eq!(desk.waiting.len(), 1, "it joins the copy under way");
    desk.release();
    assert!(matches!(desk.answer_to(id), Some(FromServer::WriteOk { .. })));
    assert_eq!(desk.core.state().used_bytes(), 4096);
    desk.check();
}

#[test]
fn a_copy_out_whose_snapshot_was_deleted_meanwhile_leaves_nothing_behind() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.held.copies = true;
    let id = desk.say(ConnId(2), ToServer::QueryWrite { ranges: vec![range(0, 4)] });
    desk.operate(1, 3, OperatorRequest::SnapshotDelete { target: target("v@a"), force: false });
    desk.release();
    assert!(matches!(desk.answer_to(id), Some(FromServer::WriteOk { all_unique: true, .. })));
    assert_eq!(desk.core.state().used_bytes(), 0);
    desk.check();
}

/// A copy-out that read its chunk while a snapshot was deleted, the chunk overwritten, and another snapshot made.
#[test]
fn a_copy_from_before_a_delete_is_not_believed_after_another_create() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.held.copies = true;
    let id = desk.say(ConnId(2), ToServer::QueryWrite { ranges: vec![range(0, 1)] });
    desk.operate(1, 3, OperatorRequest::SnapshotDelete { target: target("v@a"), force: false });
    desk.snapshot(4, "b");
    let copies = desk.waiting.len();
    for output in std::mem::take(&mut desk.waiting) {
        let Output::CopyOut { copy, .. } = output else { continue };
        desk.give(Input::CopiedOut { copy, result: Ok(Vec::new()) });
    }
    assert!(
        !desk.journal.iter().any(|r| matches!(r, Record::Superseded { .. })),
        "the old copy is thrown away"
    );
    assert_eq!(desk.answer_to(id), None, "and the chunk is copied again");
    assert_eq!((copies, desk.waiting.len()), (1, 1));
    desk.release();
    assert!(matches!(desk.answer_to(id), Some(FromServer::WriteOk { all_unique: false, .. })));
    desk.check();
}

#[test]
fn a_full_pool_refuses_the_chunks_that_it_cannot_take_and_no_others() {
    let mut desk = Desk::with_writer();
    desk.write(0, 1);
    desk.snapshot(2, "a");
    desk.held.growth_fails = true;
    let FromServer::WriteOk { no_space, .. } = desk.write(3, 2) else { panic!("answered") };
    assert_eq!(no_space, [range(3, 2)]);
    desk.held.growth_fails = false;
    desk.pass(Duration::from_secs(2));
    let FromServer::WriteOk { no_space, .. } = desk.write(3, 2) else { panic!("answered") };
    assert!(no_space.is_empty(), "space came back");
    desk.check();
}

#[test]
fn ranges_beyond_the_volume_are_refused() {
    let mut desk = Desk::with_writer();
    assert_eq!(refused(&desk.write(4095, 2)), Some(RefusalKind::Invalid));
    assert_eq!(refused(&desk.write(u64::MAX - 1, 1)), Some(RefusalKind::Invalid));
}
