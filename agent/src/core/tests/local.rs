//! What an agent does for its own node: sockets, the exporter, the dead, the conversation.

use std::time::Duration;

use csnap_proto::frame::{BODY_BYTES_MAX, Message};
use csnap_proto::limits::{
    CLIENTS_PER_REPORT_MAX, LOCKD_SESSIONS_MAX, MEMBER_INFO_BYTES_MAX, MESSAGE_COUNTERS_MAX, NAME_BYTES_MAX,
    WAITING_BYTES_MAX,
};
use csnap_proto::message::local::{ClientReport, FromAgent, NodeInfo, ToAgent};
use csnap_proto::message::lock::LockEvent;
use csnap_proto::{EventNumber, InstanceId, Name, RequestId, Target, Term};

use super::super::{Dead, Failback, Input, Process};
use super::world::World;

const FAST: Duration = Duration::from_millis(10);

/// Everything has been started by then, exporters last.
const STARTED: Duration = Duration::from_secs(1);

/// One node with everything running.
fn alone() -> World {
    let mut world = World::new(&[100], Failback::Auto);
    world.run(STARTED);
    world.settled();
    world
}

/// Two nodes with everything running.
fn pair() -> World {
    let mut world = World::new(&[100, 50], Failback::Manual);
    world.run(STARTED);
    world.settled();
    world
}

#[test]
fn a_client_without_a_suspicion_gets_the_server_that_is_known() {
    let mut world = World::new(&[100, 50], Failback::Auto);
    let early = world.ask(1, ToAgent::NeedServer { suspect: Term(0) });
    let server = world.settled();
    world.run(FAST);
    let late = world.ask(1 - server, ToAgent::NeedServer { suspect: Term(0) });
    world.run(FAST);
    let term = world.term();
    assert_eq!(world.nodes[1].handed_out.iter().find(|(conn, _)| *conn == early), Some(&(early, term)));
    assert!(world.nodes[1 - server].handed_out.contains(&(late, term)));
}

#[test]
fn a_suspected_server_is_handed_out_again_only_after_it_answered() {
    let mut world = pair();
    let server = world.server();
    let other = 1 - server;
    let term = world.term();
    let conn = world.ask(other, ToAgent::NeedServer { suspect: term });
    world.run(FAST);
    assert_eq!(world.nodes[other].probes, 1);
    assert_eq!(world.nodes[other].handed_out, [(conn, term)]);
}

#[test]
fn a_client_of_a_frozen_server_waits_for_its_successor() {
    let mut world = pair();
    let server = world.server();
    let other = 1 - server;
    let term = world.term();
    world.nodes[server].child.as_mut().expect("it serves").frozen = true;
    let conn = world.ask(other, ToAgent::NeedServer { suspect: term });
    world.run(Duration::from_secs(1));
    let successor = world.term();
    assert!(successor > term);
    assert_eq!(world.nodes[other].handed_out, [(conn, successor)]);
}

#[test]
fn exporters_learn_of_every_new_server() {
    let mut world = pair();
    let server = world.server();
    world.kill_server(server);
    world.settled();
    world.run(FAST);
    for node in &world.nodes {
        let terms: Vec<_> = node
            .told
            .iter()
            .filter_map(
                |(_, _, message)| {
                    if let FromAgent::ServerReady { term } = message { Some(*term) } else { None }
                },
            )
            .collect();
        assert!(terms.contains(&world.term()) && terms.is_sorted(), "{terms:?}");
    }
}

#[test]
fn an_exporter_is_found_again_by_the_next_agent() {
    let mut world = alone();
    let exporter = world.nodes[0].exporter;
    world.kill_agent(0);
    world.run(Duration::from_millis(100));
    world.start_agent(0);
    world.run(Duration::from_secs(5));
    assert_eq!((world.nodes[0].exporter, world.nodes[0].exporters_started), (exporter, 1));
    assert_eq!(
        world.nodes[0].declared.len(),
        1,
        "only the old server is dead: {:?}",
        world.nodes[0].declared
    );
}

#[test]
fn an_exporter_that_dies_is_started_again_and_declared_dead() {
    let mut world = alone();
    let exporter = world.nodes[0].exporter.expect("runs");
    world.end(0, exporter);
    world.run(Duration::from_secs(1));
    assert_eq!(world.nodes[0].exporters_started, 2);
    let dead = world.nodes[0]
        .declared
        .iter()
        .any(|dead| matches!(dead, Dead::Client(run) if run.process == exporter));
    assert!(dead, "{:?}", world.nodes[0].declared);
}

#[test]
fn an_exporter_that_died_with_its_agent_is_declared_dead_by_the_next() {
    let mut world = alone();
    let exporter = world.nodes[0].exporter.take().expect("runs");
    world.kill_agent(0);
    world.start_agent(0);
    world.run(Duration::from_secs(3));
    let dead = world.nodes[0]
        .declared
        .iter()
        .any(|dead| matches!(dead, Dead::Client(run) if run.process == exporter));
    assert!(dead && world.nodes[0].exporters_started == 2);
}

#[test]
fn a_writer_that_dies_is_declared_dead() {
    let mut world = alone();
    let process = Process { pid: 9, started: 9 };
    let conn = world.connect(0, process);
    let message = ToAgent::WriterHello { instance: InstanceId([9; 16]) };
    world.step(0, Input::Received { conn, id: RequestId(1), message });
    assert_eq!(world.answers(0, conn), [&FromAgent::Done]);
    world.end(0, process);
    world.run(FAST);
    assert!(matches!(world.nodes[0].declared[..], [Dead::Client(run)] if run.process == process));
}

#[test]
fn a_dead_client_is_declared_twice_for_its_last_words_may_come_late() {
    let mut world = alone();
    let process = Process { pid: 9, started: 9 };
    let conn = world.connect(0, process);
    let message = ToAgent::WriterHello { instance: InstanceId([9; 16]) };
    world.step(0, Input::Received { conn, id: RequestId(1), message });
    world.end(0, process);
    let mut seen = Vec::new();
    for _ in 0..15 {
        world.run(Duration::from_secs(1));
        let remembered = world.nodes[0].saved.as_ref().is_some_and(|saved| !saved.dead.is_empty());
        seen.push((world.nodes[0].declared.len(), remembered));
    }
    seen.dedup();
    assert_eq!(seen, [(1, true), (2, false)]);
}

#[test]
fn a_dead_server_is_declared_to_its_successor() {
    let mut world = pair();
    let server = world.server();
    let term = world.term();
    world.kill_server(server);
    world.settled();
    world.run(Duration::from_secs(1));
    assert_eq!(world.nodes[server].declared, [Dead::Server { term }]);
}

#[test]
fn the_late_end_of_a_process_says_nothing_of_a_later_one_with_its_number() {
    let mut world = alone();
    let server = world.nodes[0].child.as_ref().expect("it serves").process;
    let term = world.term();
    world.step(0, Input::Ended(Process { started: server.started + 1, ..server }));
    world.run(Duration::from_secs(1));
    assert_eq!((world.server(), world.term()), (0, term));
    assert_eq!(world.nodes[0].child.as_ref().map(|child| child.process), Some(server));
    assert_eq!(world.nodes[0].declared, []);
}

#[test]
fn what_an_earlier_child_said_last_is_not_taken_for_the_present_one() {
    let mut world = alone();
    let server = world.nodes[0].child.as_ref().expect("it serves").process;
    let (before, term) = (world.server_conn(0), world.term());
    // It is reaped before its last words are read.
    world.nodes[0].child = None;
    world.step(0, Input::Ended(server));
    world.run_until(STARTED, "the next child's hello", |world| world.server_conn(0) > before);
    let message = ToAgent::ServerStandby { ready: true };
    world.step(0, Input::Received { conn: before, id: RequestId(0), message });
    world.run(Duration::from_millis(1));
    assert_eq!(world.term(), term, "it has not said itself that it is ready");
}

#[test]
fn a_server_that_cannot_start_is_started_now_and_then() {
    let mut world = World::new(&[100], Failback::Auto);
    world.nodes[0].starts_fail = true;
    world.run(Duration::from_secs(60));
    assert!((10..=20).contains(&world.nodes[0].servers_started), "{}", world.nodes[0].servers_started);
}

#[test]
fn an_exporter_that_is_told_to_stop_stays_stopped() {
    let mut world = alone();
    let conn = world.ask(0, ToAgent::StopExporter);
    world.run(Duration::from_secs(10));
    assert_eq!(world.answers(0, conn), [&FromAgent::Done]);
    assert_eq!((world.nodes[0].exporter, world.nodes[0].exporters_started), (None, 1));
}

#[test]
fn a_status_is_answered_within_a_hundred_milliseconds_whatever_is_missing() {
    for lockd_too in [false, true] {
        let mut world = if lockd_too { World::new(&[100], Failback::Auto) } else { alone() };
        if lockd_too {
            world.kill_lockd();
        }
        let conn = world.ask(0, ToAgent::Status);
        world.run(Duration::from_millis(100));
        assert!(matches!(world.answers(0, conn)[..], [FromAgent::Status(_)]));
    }
}

#[test]
fn what_lockd_is_to_know_does_not_add_up_while_it_is_away() {
    let mut world = alone();
    world.kill_lockd();
    world.run(FAST);
    let node = world.nodes[0].name.clone();
    for priority in 1..=2_000 {
        let conn = world.ask(0, ToAgent::SetPriority { node: node.clone(), priority });
        assert_eq!(world.answers(0, conn), [&FromAgent::Done]);
    }
    world.start_lockd();
    world.run(STARTED);
    let members = world.lockd.as_ref().expect("runs").table().members();
    let info: NodeInfo = postcard::from_bytes(&members[0].info).expect("a description");
    assert_eq!(info.priority, 2_000);
}

#[test]
fn a_lockd_that_says_again_and_again_that_news_was_lost_is_asked_once() {
    let mut world = alone();
    let term = world.term();
    for number in 0..3_000 {
        world.hear_event(0, EventNumber(1_000_000 + number), LockEvent::Overrun);
    }
    world.run(STARTED);
    assert_eq!((world.server(), world.term()), (0, term));
    assert!(world.asked_of_lockd < 20, "{}", world.asked_of_lockd);
}

#[test]
fn a_second_exporter_gets_no_way_to_the_server_and_is_not_forgotten() {
    let mut world = alone();
    let second = Process { pid: 9, started: 9 };
    let hello = |instance| ToAgent::ExporterHello { instance, pid: 9, nbd: Vec::new() };
    // Its questions have connections of their own; one is asked before it says what it is.
    world.nodes[0].child.as_mut().expect("it serves").frozen = true;
    let suspect = world.term();
    let early = world.connect(0, second);
    world
        .step(0, Input::Received { conn: early, id: RequestId(1), message: ToAgent::NeedServer { suspect } });
    let conn = world.connect(0, second);
    world.step(0, Input::Received { conn, id: RequestId(0), message: hello(InstanceId([9; 16])) });
    assert!(world.nodes[0].closed.contains(&conn));
    let late = world.connect(0, second);
    let message = ToAgent::NeedServer { suspect: Term(0) };
    world.step(0, Input::Received { conn: late, id: RequestId(1), message });
    world.run(STARTED);
    for conn in [early, late] {
        assert!(matches!(world.answers(0, conn)[..], [FromAgent::Failed { .. }]));
    }
    assert_eq!(world.nodes[0].handed_out, []);
    world.step(0, Input::Ended(second));
    world.run(FAST);
    let declared = &world.nodes[0].declared;
    let dead = |dead: &Dead| matches!(dead, Dead::Client(run) if run.process == second);
    assert!(declared.iter().any(dead), "{declared:?}");
}

#[test]
fn an_exporter_gets_no_way_to_the_server_before_it_can_be_declared() {
    let mut world = alone();
    let first = world.nodes[0].exporter.expect("runs");
    world.end(0, first);
    world.run_until(STARTED, "another exporter", |world| world.nodes[0].exporters_started == 2);
    let second = world.nodes[0].exporter.expect("just started");
    let ask = |world: &mut World| {
        let conn = world.connect(0, second);
        let message = ToAgent::NeedServer { suspect: Term(0) };
        world.step(0, Input::Received { conn, id: RequestId(1), message });
        conn
    };
    let early = ask(&mut world);
    assert!(matches!(world.answers(0, early)[..], [FromAgent::Failed { .. }]));
    world.run(STARTED);
    let before = world.nodes[0].handed_out.len();
    ask(&mut world);
    world.run(FAST);
    assert_eq!(world.nodes[0].handed_out.len(), before + 1);
}

#[test]
fn an_exporter_that_runs_already_is_taken_rather_than_another_started() {
    let mut world = alone();
    let first = world.nodes[0].exporter.expect("runs");
    world.end(0, first);
    let running = Process { pid: 9, started: 9 };
    let conn = world.connect(0, running);
    let message = ToAgent::ExporterHello { instance: InstanceId([9; 16]), pid: 9, nbd: Vec::new() };
    world.run_until(FAST, "news of the end", |world| {
        let status = world.nodes[0].core.as_ref().expect("runs").status();
        status.nodes[0].info.export_pid.is_none()
    });
    world.step(0, Input::Received { conn, id: RequestId(0), message });
    world.run(STARTED);
    assert_eq!((world.nodes[0].closed.contains(&conn), world.nodes[0].exporters_started), (false, 1));
}

#[test]
fn an_exporter_stays_the_run_that_it_said_it_is() {
    let mut world = alone();
    let exporter = world.nodes[0].exporter.expect("runs");
    let conn = world.connect(0, exporter);
    let message = ToAgent::ExporterHello { instance: InstanceId([0xee; 16]), pid: 1, nbd: Vec::new() };
    world.step(0, Input::Received { conn, id: RequestId(0), message });
    assert!(world.nodes[0].closed.contains(&conn));
}

#[test]
fn a_status_fits_a_frame_whatever_the_exporter_reports() {
    let mut world = alone();
    let exporter = world.nodes[0].exporter.expect("runs");
    let conn = world.connect(0, exporter);
    let instance = world.nodes[0].saved.as_ref().and_then(|saved| saved.exporter).expect("known").instance;
    let message = ToAgent::ExporterHello { instance, pid: exporter.pid, nbd: Vec::new() };
    world.step(0, Input::Received { conn, id: RequestId(0), message });
    let name = |n: usize| Name::new(format!("{n:0128}")).expect("a name");
    let client = |n| ClientReport {
        target: Target { volume: name(n), snapshot: Some(name(n)) },
        messages: (0..MESSAGE_COUNTERS_MAX).map(|n| (format!("{n:0128}"), u64::MAX)).collect(),
        connections: u32::MAX,
        waiting: Some("x".repeat(WAITING_BYTES_MAX)),
    };
    let clients: Vec<_> = (0..CLIENTS_PER_REPORT_MAX).map(client).collect();
    let message = ToAgent::ExporterReport { clients };
    assert_eq!(message.check(), Ok(()));
    world.step(0, Input::Received { conn, id: RequestId(0), message });
    let asker = world.ask(0, ToAgent::Status);
    world.run(STARTED);
    let [FromAgent::Status(status)] = world.answers(0, asker)[..] else { panic!("one answer") };
    assert!(!status.clients.is_empty());
    let members = LOCKD_SESSIONS_MAX * (MEMBER_INFO_BYTES_MAX + NAME_BYTES_MAX + 32);
    let bytes = postcard::to_stdvec(status).expect("encodes").len();
    assert!(bytes + members < BODY_BYTES_MAX, "{bytes}");
}

#[test]
fn whoever_speaks_out_of_its_role_is_cut_off() {
    let mut world = alone();
    let messages = [
        ToAgent::ServerHello { tcp: "127.0.0.1:1".to_owned() },
        ToAgent::ServerServing { term: Term(99) },
        ToAgent::Pong,
        ToAgent::ExporterReport { clients: Vec::new() },
        ToAgent::ExporterHello { instance: InstanceId([1; 16]), pid: 1, nbd: Vec::new() },
    ];
    world.run(FAST);
    for message in messages {
        let conn = world.ask(0, message.clone());
        assert!(world.nodes[0].closed.contains(&conn), "{message:?}");
    }
    assert_eq!(world.server(), 0);
}
