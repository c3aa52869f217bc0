//! A volume that is being imported is its importer's alone, whole or not at all.

use csnap_proto::message::operate::{OperatorRequest, RefusalKind};
use csnap_proto::message::volume::{Attach, FromServer, ToServer};
use csnap_proto::{InstanceId, Sequence};
use csnap_server::core::ConnId;

use crate::desk::Desk;
use crate::words::{import_volume, name, refused, target, token};

#[test]
fn a_volume_that_is_being_imported_has_no_snapshots() {
    let mut desk = Desk::with_writer();
    desk.operate(1, 2, import_volume("i"));
    let request = OperatorRequest::SnapshotCreate { target: target("i@a"), token: token(3) };
    assert_eq!(refused(&desk.operate(1, 3, request)), Some(RefusalKind::Busy));
}

#[test]
fn an_import_is_nobody_elses_and_goes_with_its_importer() {
    let mut desk = Desk::with_writer();
    desk.operate(1, 2, import_volume("i"));
    assert_eq!(refused(&desk.connect(3, 3, Attach::Writer(name("i")))), Some(RefusalKind::Busy));
    let writing = desk.connect_of(1, 4, 4, Attach::Writer(name("i")));
    assert!(matches!(writing, FromServer::IdentifyOk(_)), "{writing:?}");
    // Nobody lists it, so nobody looked at its head.
    desk.operate(1, 3, OperatorRequest::Reaped { instance: InstanceId([1; 16]), looked_at: Vec::new() });
    assert_eq!(desk.core.state().volumes().count(), 1, "whole or not at all");
}

#[test]
fn an_importer_that_left_leaves_nothing_in_hand() {
    let mut desk = Desk::with_writer();
    desk.connect(3, 3, Attach::Operator);
    desk.held.tasks = true;
    let import = ToServer::Operate {
        sequence: Sequence(2),
        lowest_unanswered: Sequence(2),
        request: import_volume("i"),
    };
    desk.say(ConnId(1), import.clone());
    let reaped = OperatorRequest::Reaped { instance: InstanceId([1; 16]), looked_at: Vec::new() };
    desk.operate(3, 1, reaped);
    desk.release();
    assert_eq!(desk.core.state().volumes().count(), 1, "the importer is gone");
    // Were it in hand still, this would be taken for a resend, and never answered.
    desk.connect(5, 1, Attach::Operator);
    let id = desk.say(ConnId(5), import);
    assert!(matches!(desk.answer_to(id), Some(FromServer::Operated(_))), "{:?}", desk.answer_to(id));
}
