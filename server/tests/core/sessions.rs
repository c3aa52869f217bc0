//! Sessions: who holds a volume, what a resend and a late word count for, what a deposed server says.

use std::time::Duration;

use csnap_proto::message::operate::RefusalKind;
use csnap_proto::message::volume::{Attach, FromServer, Identify, ToServer};
use csnap_proto::{Frame, FreeBatchId, RequestId, Sequence, SessionId, Term};
use csnap_server::core::{CloseReason, ConnId, Exit, Input, Output, TASKS_AT_ONCE};

use crate::desk::Desk;
use crate::words::{create_volume, name, newcomer, range, refused};

#[test]
fn a_second_writer_is_refused_and_told_who_holds_the_volume() {
    let mut desk = Desk::with_writer();
    let FromServer::Refused(refusal) = desk.connect(3, 3, Attach::Writer(name("v"))) else {
        panic!("refused")
    };
    assert_eq!(refusal.kind, RefusalKind::Busy);
    assert!(refusal.reason.contains("pid 2"), "{}", refusal.reason);
}

#[test]
fn silence_takes_a_connection_and_not_the_volume() {
    let mut desk = Desk::with_writer();
    desk.pass(Duration::from_secs(60));
    assert_eq!(desk.closed[&ConnId(2)], Some(CloseReason::Silent));
    desk.connect(5, 1, Attach::Operator);
    assert_eq!(refused(&desk.connect(3, 3, Attach::Writer(name("v")))), Some(RefusalKind::Busy));
    assert!(
        matches!(desk.connect(4, 2, Attach::Writer(name("v"))), FromServer::IdentifyOk(_)),
        "it comes back"
    );
}

#[test]
fn a_session_belongs_to_whoever_has_its_secret() {
    let mut desk = Desk::with_writer();
    let stranger = newcomer(9, Attach::Writer(name("v")));
    let answer = desk.identify(8, Identify { session: SessionId([2; 16]), node: name("n2"), ..stranger });
    assert_eq!(refused(&answer), Some(RefusalKind::Denied));
    assert!(!desk.closed.contains_key(&ConnId(2)));
}

#[test]
fn a_resend_is_answered_with_the_stored_result_also_by_a_successor() {
    let mut desk = Desk::with_writer();
    let first = desk.operate(1, 2, create_volume("w"));
    let again = desk.operate(1, 2, create_volume("w"));
    assert_eq!(first, again);
    let mut successor = Desk::over(Term(2), desk.core.state().clone());
    successor.connect(1, 1, Attach::Operator);
    assert_eq!(successor.operate(1, 2, create_volume("w")), first);
    successor.check();
}

#[test]
fn requests_beyond_what_a_session_may_leave_unacknowledged_are_refused_and_harm_nobody() {
    let mut desk = Desk::with_writer();
    desk.held.gates = true;
    for sequence in 2..200 {
        let request = create_volume(&format!("v{sequence}"));
        let lowest_unanswered = Sequence(2);
        desk.say(ConnId(1), ToServer::Operate { sequence: Sequence(sequence), lowest_unanswered, request });
    }
    desk.release();
    let refusals = desk.to(1).into_iter().filter(|m| refused(m) == Some(RefusalKind::Invalid)).count();
    assert_eq!(refusals, 198 - 64);
    desk.check();
}

#[test]
fn what_a_session_says_after_its_end_does_not_count() {
    let mut desk = Desk::with_writer();
    desk.say(ConnId(2), ToServer::Release);
    let late = desk.say(ConnId(2), ToServer::QueryWrite { ranges: vec![range(0, 1)] });
    assert_eq!(desk.answer_to(late), None);
    assert!(desk.closed.contains_key(&ConnId(2)));
}

#[test]
fn unnumbered_requests_end_the_connection() {
    let mut desk = Desk::with_writer();
    let message = ToServer::QueryWrite { ranges: vec![range(0, 1)] };
    desk.give(Input::Frame { conn: ConnId(2), frame: Frame { id: RequestId(0), term: Term(0), message } });
    assert!(desk.closed.contains_key(&ConnId(2)));
}

#[test]
fn a_deposed_server_answers_nothing_and_ends() {
    let mut desk = Desk::with_writer();
    desk.held.gates = true;
    let id = desk.say(ConnId(2), ToServer::Renew { forgotten: FreeBatchId(0) });
    let Some(Output::ReadGate { batch }) = desk.waiting.pop() else { panic!("an answer waits for the gate") };
    desk.give(Input::Gate { batch, open: false });
    assert_eq!(desk.exit, Some(Exit::Deposed));
    assert_eq!(desk.answer_to(id), None);
    desk.give(Input::Accepted { conn: ConnId(9) });
    assert_eq!(desk.answer_to(id), None, "and stays silent");
}

#[test]
fn every_close_says_why_but_where_nothing_is_wrong() {
    let mut desk = Desk::with_writer();
    let query = || ToServer::QueryWrite { ranges: vec![range(0, 1)] };
    desk.give(Input::Accepted { conn: ConnId(3) });
    desk.say(ConnId(3), query());
    desk.connect(4, 4, Attach::Operator);
    desk.say(ConnId(4), ToServer::Identify(newcomer(4, Attach::Operator)));
    desk.connect(5, 5, Attach::Writer(name("v")));
    desk.connect(6, 2, Attach::Writer(name("v")));
    let message = query();
    desk.give(Input::Frame { conn: ConnId(1), frame: Frame { id: RequestId(0), term: Term(0), message } });
    desk.say(ConnId(6), ToServer::Release);
    desk.give(Input::Accepted { conn: ConnId(7) });
    desk.pass(Duration::from_secs(60));
    let wanted = [
        (ConnId(1), Some(CloseReason::Unnumbered)),
        (ConnId(2), Some(CloseReason::Superseded)),
        (ConnId(3), Some(CloseReason::NotIdentified)),
        (ConnId(4), Some(CloseReason::IdentifiedTwice)),
        (ConnId(5), Some(CloseReason::Refused)),
        (ConnId(6), None),
        (ConnId(7), Some(CloseReason::Unidentified)),
    ];
    assert_eq!(desk.closed.into_iter().collect::<Vec<_>>(), wanted);
}

#[test]
fn connections_beyond_the_most_are_closed_and_those_that_are_there_stay() {
    let mut desk = Desk::with_writer();
    let most = csnap_proto::limits::CONNECTIONS_MAX as u64;
    for conn in 10..10 + most {
        desk.give(Input::Accepted { conn: ConnId(conn) });
    }
    assert_eq!(desk.closed.len(), 2, "two were there before");
    assert!(desk.closed.values().all(|reason| *reason == Some(CloseReason::TooMany)));
    assert_eq!(refused(&desk.write(0, 1)), None);
}

#[test]
fn file_operations_that_sessions_ask_for_are_so_many_at_once_and_all_are_done() {
    let mut desk = Desk::with_writer();
    desk.held.tasks = true;
    let ask = |desk: &mut Desk, sequence: u64| {
        let request = create_volume(&format!("v{sequence}"));
        let sequence = Sequence(sequence);
        desk.say(ConnId(1), ToServer::Operate { sequence, lowest_unanswered: Sequence(2), request })
    };
    let asked: Vec<RequestId> = (2..62).map(|sequence| ask(&mut desk, sequence)).collect();
    assert_eq!(desk.waiting.len(), TASKS_AT_ONCE);
    desk.release();
    assert!(asked.iter().all(|&id| matches!(desk.answer_to(id), Some(FromServer::Operated(_)))));
}
