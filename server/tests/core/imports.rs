//! A volume that is being imported is its importer's alone, whole or not at all.

use csnap_proto::InstanceId;
use csnap_proto::message::operate::{OperatorRequest, RefusalKind};
use csnap_proto::message::volume::{Attach, FromServer};

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
