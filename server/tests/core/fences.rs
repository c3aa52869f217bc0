//! Reaping and fencing: what is known dead gives everything up, and nothing that may come back does.

use std::time::Duration;

use csnap_proto::message::operate::{Fenced, OperatorReply, OperatorRequest, RefusalKind};
use csnap_proto::message::volume::{Attach, FromServer, Identify, ToServer};
use csnap_proto::{Epoch, FreeBatchId, InstanceId, SessionId, Term};
use csnap_server::core::{ConnId, Input};
use csnap_server::state::Record;

use crate::desk::Desk;
use crate::words::{create_volume, name, newcomer, refused, target};

#[test]
fn a_reaped_writer_gives_its_volume_up() {
    let mut desk = Desk::with_writer();
    let looked_at = vec![desk.volume_named("v")];
    desk.operate(1, 2, OperatorRequest::Reaped { instance: InstanceId([2; 16]), looked_at });
    assert!(matches!(desk.connect(3, 3, Attach::Writer(name("v"))), FromServer::IdentifyOk(_)));
}

#[test]
fn a_writer_is_reaped_only_when_every_head_that_it_writes_was_looked_at() {
    let mut desk = Desk::with_writer();
    desk.operate(1, 2, create_volume("w"));
    // The same process writes a second volume; a reader's volume is nothing to look at.
    let (v, w) = (desk.volume_named("v"), desk.volume_named("w"));
    desk.snapshot(3, "a");
    desk.connect_of(2, 4, 4, Attach::Writer(name("w")));
    desk.connect_of(2, 5, 5, Attach::Snapshot(target("v@a")));
    let reaped = |looked_at| OperatorRequest::Reaped { instance: InstanceId([2; 16]), looked_at };
    for (sequence, looked_at) in [(4, vec![]), (5, vec![v]), (6, vec![w])] {
        assert_eq!(refused(&desk.operate(1, sequence, reaped(looked_at))), Some(RefusalKind::Busy));
        assert_eq!(refused(&desk.connect(6, 6, Attach::Writer(name("v")))), Some(RefusalKind::Busy));
    }
    let done = desk.operate(1, 7, reaped(vec![w, v, w]));
    assert!(matches!(done, FromServer::Operated(OperatorReply::Done)), "{done:?}");
    for (conn, volume) in [(7, "v"), (8, "w")] {
        let attached = desk.connect(conn, u8::try_from(conn).expect("small"), Attach::Writer(name(volume)));
        assert!(matches!(attached, FromServer::IdentifyOk(_)), "{attached:?}");
    }
}

#[test]
fn a_fenced_writer_that_comes_back_is_told_and_not_attached_anew() {
    let mut desk = Desk::with_writer();
    desk.operate(1, 2, OperatorRequest::Fence { whom: Fenced::Session(SessionId([2; 16])) });
    let back = Identify { cached_epoch: Some(Epoch(1)), ..newcomer(2, Attach::Writer(name("v"))) };
    let answer = desk.identify(8, back);
    assert_eq!(refused(&answer), Some(RefusalKind::NotFound));
}

#[test]
fn a_fenced_node_gives_everything_up_and_a_node_that_is_heard_of_is_not_fenced() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.say(ConnId(2), ToServer::Release);
    desk.connect_from("n2", 3, 3, Attach::Writer(name("v")));
    desk.connect_from("n2", 4, 4, Attach::Snapshot(target("v@a")));
    desk.connect_from("n3", 5, 5, Attach::Snapshot(target("v@a")));
    let fence = |node| OperatorRequest::Fence { whom: Fenced::Node(name(node)) };
    desk.give(Input::Closed { conn: ConnId(3) });
    let FromServer::Refused(refusal) = desk.operate(1, 3, fence("n2")) else { panic!("refused") };
    assert!(refusal.kind == RefusalKind::Busy && refusal.reason.contains("pid 4"), "{}", refusal.reason);
    assert_eq!(refused(&desk.operate(1, 7, fence("n4"))), Some(RefusalKind::NotFound), "also at once");
    desk.give(Input::Closed { conn: ConnId(4) });
    assert_eq!(refused(&desk.operate(1, 4, fence("n2"))), Some(RefusalKind::Busy), "it may come back");
    for _ in 0..15 {
        desk.say(ConnId(1), ToServer::Renew { forgotten: FreeBatchId(0) });
        desk.say(ConnId(5), ToServer::Renew { forgotten: FreeBatchId(0) });
        desk.pass(Duration::from_secs(1));
    }
    assert!(matches!(desk.operate(1, 6, fence("n2")), FromServer::Operated(OperatorReply::Done)));
    assert!(matches!(desk.connect(6, 6, Attach::Writer(name("v"))), FromServer::IdentifyOk(_)));
    let readers: Vec<_> = desk.core.state().sessions().map(|s| s.node.to_string()).collect();
    assert!(readers.contains(&"n3".to_owned()) && !readers.contains(&"n2".to_owned()), "{readers:?}");
    desk.check();
}

#[test]
fn a_fenced_node_gives_up_what_its_older_servers_held() {
    let mut desk = Desk::with_writer();
    desk.snapshot(2, "a");
    desk.write(0, 4);
    desk.operate(1, 3, create_volume("w"));
    desk.operate(1, 4, OperatorRequest::VolumeDelete { name: name("w") });
    let mut state = desk.core.state().clone();
    state.apply(&Record::TermBegin { term: Term(2), node: name("n2") }).expect("a later term");
    let mut desk = Desk::over(Term(3), state);
    desk.connect_from("n3", 1, 9, Attach::Operator);
    let because = desk.core.state().held().because.join("; ");
    assert!(because.contains("bytes until the server of term 1 on node n1 is known dead"), "{because}");
    let fence = |node| OperatorRequest::Fence { whom: Fenced::Node(name(node)) };
    desk.operate(1, 1, OperatorRequest::ServerReaped { term: Term(2) });
    assert_eq!(refused(&desk.operate(1, 2, fence("n1"))), Some(RefusalKind::Busy), "it may come back");
    for _ in 0..15 {
        desk.say(ConnId(1), ToServer::Renew { forgotten: FreeBatchId(0) });
        desk.pass(Duration::from_secs(1));
    }
    assert_eq!(refused(&desk.operate(1, 3, fence("n3"))), Some(RefusalKind::Busy), "it is connected");
    assert_eq!(refused(&desk.operate(1, 4, fence("n2"))), Some(RefusalKind::NotFound), "it is known dead");
    let older = |desk: &Desk| desk.core.state().older_terms().collect::<Vec<_>>();
    assert_eq!(older(&desk), [Term(1)]);
    assert!(matches!(desk.operate(1, 5, fence("n1")), FromServer::Operated(OperatorReply::Done)));
    assert_eq!(older(&desk), []);
    desk.pass(Duration::from_secs(1));
    assert_eq!((desk.core.state().held().because, desk.core.state().removable_heads().count()), (vec![], 0));
    desk.check();
}
