//! Creates of snapshots: recorded only once the writer drained, or once nobody writes.

use std::time::Duration;

use csnap_proto::FreeBatchId;
use csnap_proto::message::operate::{OperatorReply, Refusal, RefusalKind};
use csnap_proto::message::volume::{Attach, FromServer, IdentifyOk, ToServer};
use csnap_server::core::{ConnId, Input, TaskDone};
use csnap_server::state::Record;

use crate::desk::Desk;
use crate::words::{create_snapshot, name, token};

#[test]
fn a_create_records_only_after_the_writer_drained() {
    let mut desk = Desk::with_writer();
    let id = desk.say(ConnId(1), create_snapshot(2, "a"));
    assert!(desk.to(2).iter().any(|m| matches!(m, FromServer::SnapshotAdvice { .. })));
    assert_eq!(desk.answer_to(id), None);
    assert!(!desk.journal.iter().any(|r| matches!(r, Record::SnapshotCreate { .. })));
    desk.drained(2, 9);
    assert_eq!(desk.answer_to(id), None, "an answer for another create does not count");
    desk.say(ConnId(2), ToServer::SnapshotAdviceOk { advice: token(2) });
    assert_eq!(desk.answer_to(id), None, "nor one to another Advice of this create");
    desk.drained(2, 2);
    assert!(matches!(desk.answer_to(id), Some(FromServer::Operated(OperatorReply::Snapshot(_)))));
    assert!(desk.to(2).iter().any(|m| matches!(m, FromServer::Resume { epoch, .. } if epoch.0 == 2)));
}

#[test]
fn a_writer_that_comes_back_is_drained_anew() {
    let mut desk = Desk::with_writer();
    desk.give(Input::Closed { conn: ConnId(2) });
    let id = desk.say(ConnId(1), create_snapshot(2, "a"));
    assert_eq!(desk.answer_to(id), None, "an absent writer is waited for");
    let welcome = desk.connect(4, 2, Attach::Writer(name("v")));
    assert!(matches!(welcome, FromServer::IdentifyOk(IdentifyOk { advice_follows: true, .. })));
    assert_eq!(desk.answer_to(id), None);
    desk.drained(4, 2);
    assert!(matches!(desk.answer_to(id), Some(FromServer::Operated(_))));
}

#[test]
fn a_writer_that_does_not_drain_fails_the_create_and_is_named_and_resumed() {
    let mut desk = Desk::with_writer();
    let id = desk.say(ConnId(1), create_snapshot(2, "a"));
    for _ in 0..6 {
        desk.say(ConnId(2), ToServer::Renew { forgotten: FreeBatchId(0) });
        desk.pass(Duration::from_secs(1));
    }
    let Some(FromServer::Refused(refusal)) = desk.answer_to(id) else { panic!("refused") };
    assert_eq!(refusal.kind, RefusalKind::TimedOut);
    assert!(refusal.reason.contains("n1") && refusal.reason.contains("pid 2"), "{}", refusal.reason);
    assert!(desk.to(2).iter().any(|m| matches!(m, FromServer::Resume { epoch, .. } if epoch.0 == 1)));
    desk.drained(2, 2);
    assert!(!desk.journal.iter().any(|r| matches!(r, Record::SnapshotCreate { .. })), "late is too late");
}

#[test]
fn a_create_without_a_writer_syncs_the_head_and_a_newcomer_is_drained() {
    let mut desk = Desk::with_writer();
    desk.say(ConnId(2), ToServer::Release);
    let id = desk.say(ConnId(1), create_snapshot(2, "a"));
    assert!(matches!(desk.answer_to(id), Some(FromServer::Operated(OperatorReply::Snapshot(_)))));
}

#[test]
fn a_head_that_cannot_be_opened_fails_one_create_in_its_own_words() {
    let mut desk = Desk::with_writer();
    desk.say(ConnId(2), ToServer::Release);
    let kind = RefusalKind::NotFound;
    desk.held.sync = Some(TaskDone::Failed(Refusal::new(kind, "/mnt/origin: not found")));
    let id = desk.say(ConnId(1), create_snapshot(2, "a"));
    let Some(FromServer::Refused(refusal)) = desk.answer_to(id) else { panic!("refused") };
    assert_eq!(refusal.kind, kind);
    assert!(refusal.reason.contains("/mnt/origin: not found"), "{}", refusal.reason);
    assert!(refusal.reason.contains("n1") && !refusal.reason.contains("anew"), "{}", refusal.reason);
    desk.held.sync = None;
    let id = desk.say(ConnId(1), create_snapshot(3, "a"));
    assert!(matches!(desk.answer_to(id), Some(FromServer::Operated(_))), "it is mounted by now");
}

#[test]
fn a_head_whose_sync_failed_has_no_snapshot_until_a_writer_drained() {
    let mut desk = Desk::with_writer();
    desk.say(ConnId(2), ToServer::Release);
    desk.held.sync = Some(TaskDone::SyncFailed { reason: "the disk is gone".to_owned() });
    desk.held.tasks = true;
    desk.say(ConnId(1), create_snapshot(2, "a"));
    // A failure counts also where a writer came meanwhile, and did not drain.
    desk.connect(3, 3, Attach::Writer(name("v")));
    let sync = desk.waiting.pop().expect("a sync is under way");
    desk.held.tasks = false;
    let ended = desk.carry_out(sync).expect("it ends");
    desk.give(ended);
    desk.say(ConnId(3), ToServer::Release);
    desk.held.sync = None;
    for sequence in [3, 4] {
        let id = desk.say(ConnId(1), create_snapshot(sequence, "b"));
        let Some(FromServer::Refused(refusal)) = desk.answer_to(id) else { panic!("refused") };
        assert_eq!(refusal.kind, RefusalKind::Media);
        assert!(refusal.reason.contains("the disk is gone"), "{}", refusal.reason);
    }
    desk.connect(4, 4, Attach::Writer(name("v")));
    let id = desk.say(ConnId(1), create_snapshot(5, "c"));
    desk.drained(4, 5);
    assert!(matches!(desk.answer_to(id), Some(FromServer::Operated(_))), "the writer vouches for its own");
}
