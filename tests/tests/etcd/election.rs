//! Who serves: an etcd of one member.

use std::time::Instant;

use super::cluster::{is_alive, signal, wait_until};
use super::etcd::Etcd;
use super::nodes::{Nodes, number};
use super::writer::Writer;

/// Blocks that the guest writes.
const BLOCKS: u64 = 1024;

fn start(count: usize) -> (tempfile::TempDir, Etcd, Nodes) {
    let dir = tempfile::Builder::new().prefix("csnap-").tempdir().expect("a temporary directory");
    let etcd = Etcd::start(dir.path(), 1);
    let nodes = Nodes::start(dir.path(), count, &etcd.endpoints());
    (dir, etcd, nodes)
}

#[test]
fn a_killed_server_and_a_killed_agent_are_pauses() {
    let (_dir, _etcd, mut nodes) = start(3);
    let guest = Writer::start(&nodes.socket(1), "demo", BLOCKS);
    guest.wait_for(100);
    let mut server = nodes.server("a server serves", |_| true);
    for round in 0..3 {
        nodes.csnap(&["snapshot", "create", &format!("demo@s{round}")]);
        guest.take_stall();
        signal(server.pid, "KILL");
        let next = nodes.server("another server serves", |next| next.pid != server.pid);
        assert!(next.term > server.term, "terms only grow: {server:?}, {next:?}");
        guest.wait_for(100);
        println!("server killed: stall {:?}", guest.take_stall());
        server = next;
    }
    // Nobody starts it again: its lease must end.
    let killed = number(&server.node);
    nodes.csnap(&["snapshot", "create", "demo@t"]);
    let began = Instant::now();
    nodes.kill_agent(killed);
    let next = nodes.server("another node serves", |next| next.node != server.node);
    println!("agent killed: another serves after {:?}", began.elapsed());
    assert!(next.term > server.term);
    // A guest of that node waits for its agent: nobody else gives its exporter a way to the server.
    nodes.start_agent(killed);
    guest.wait_for(100);
    wait_until("the killed agent takes part again", || {
        let status = nodes.status();
        status["nodes"].as_array().is_some_and(|all| {
            all.iter().any(|node| node["id"] == server.node.as_str() && node["state"] == "up")
        })
    });
    // Killed and started at once, it finds its session and gives the lock back without a wait.
    let server = nodes.server("it serves still", |_| true);
    let began = Instant::now();
    nodes.kill_agent(number(&server.node));
    nodes.start_agent(number(&server.node));
    let next = nodes.server("somebody serves", |next| next.term > server.term);
    println!("agent killed and started: {} serves after {:?}", next.node, began.elapsed());
    let writes = guest.stop_and_verify();
    println!("{writes} acknowledged writes, none lost");
}

#[test]
fn a_node_frozen_past_its_lease_is_replaced_and_can_do_nothing_when_it_is_back() {
    let (_dir, _etcd, nodes) = start(3);
    let server = nodes.server("a server serves", |_| true);
    let away = if server.node == "n1" { 2 } else { 1 };
    let guest = Writer::start(&nodes.socket(away), "demo", BLOCKS);
    guest.wait_for(100);
    nodes.csnap(&["snapshot", "create", "demo@a"]);
    let agent = nodes.agent(number(&server.node));
    signal(agent, "STOP");
    signal(server.pid, "STOP");
    let began = Instant::now();
    let next = nodes.server("another node serves", |next| next.node != server.node);
    println!("node frozen: another serves after {:?}", began.elapsed());
    assert!(next.term > server.term);
    guest.wait_for(100);
    signal(agent, "CONT");
    signal(server.pid, "CONT");
    wait_until("the thawed server is gone", || !is_alive(server.pid));
    guest.wait_for(300);
    // What the thawed agent had to say of the lock was refused: the next server is known as it was, by every node.
    let still = nodes.server("the same server serves", |still| still.term >= next.term);
    assert_eq!(still, next);
    guest.stop_and_verify();
}

#[test]
fn priorities_and_moves_work_as_with_lockd() {
    let (_dir, _etcd, nodes) = start(3);
    nodes.server("a server serves", |_| true);
    nodes.csnap(&["node", "priority", "n2", "200"]);
    let best = nodes.server("the best node gets the server", |server| server.node == "n2");
    nodes.csnap(&["server", "move", "n3"]);
    let moved = nodes.server("it is moved", |server| server.node == "n3");
    assert!(moved.term > best.term);
    nodes.csnap(&["node", "priority", "n1", "0"]);
    nodes.csnap(&["node", "priority", "n2", "0"]);
    // Nobody else may serve now.
    signal(moved.pid, "KILL");
    let next = nodes.server("a server serves", |server| server.pid != moved.pid);
    assert_eq!(next.node, "n3");
}
