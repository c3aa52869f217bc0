//! Where the server is: by priority, after a loss, and by plan.

use std::time::Duration;

use super::cluster::{Cluster, number, signal, wait_until};
use super::writer::{Writer, summary};

#[test]
fn the_best_live_node_serves_and_gets_the_server_back() {
    let cluster = Cluster::start(3);
    for (node, priority) in [("n1", "100"), ("n2", "50"), ("n3", "10")] {
        cluster.csnap(&["node", "priority", node, priority]);
    }
    wait_until("the best node serves", || cluster.server().node == "n1");
    let guest = Writer::start(&cluster.socket(3), "demo", 1024);
    let away = |node: &str| {
        let agent = cluster.pid(node, "agent_pid");
        let server = cluster.server();
        assert_eq!(server.node, node);
        signal(agent, "STOP");
        signal(server.pid, "STOP");
        agent
    };
    let serves = |node: &str, what: &str| {
        wait_until(what, || cluster.server().node == node);
        guest.wait_for(100);
    };
    let first = away("n1");
    serves("n2", "the next best serves");
    let second = away("n2");
    serves("n3", "the only one left serves");
    signal(second, "CONT");
    serves("n2", "a better node has it back");
    signal(first, "CONT");
    serves("n1", "the best node has it back");
    guest.stop_and_verify();
}

#[test]
fn a_planned_move_is_a_short_pause() {
    let cluster = Cluster::start(3);
    let guest = Writer::start(&cluster.socket(1), "demo", 1024);
    guest.wait_for(100);
    let mut stalls: Vec<Duration> = Vec::new();
    for turn in 0..number("CSNAP_MOVES", 10) {
        let from = cluster.server();
        let to = if from.node == "n2" { "n3" } else { "n2" };
        if turn % 3 == 0 {
            cluster.csnap(&["snapshot", "create", &format!("demo@m{turn}")]);
        }
        guest.take_stall();
        cluster.csnap(&["server", "move", to]);
        assert_eq!(cluster.server().node, to);
        guest.wait_for(100);
        stalls.push(guest.take_stall());
    }
    println!("planned moves: {}", summary(&mut stalls));
    guest.stop_and_verify();
}

#[test]
fn priorities_are_kept_and_shown() {
    let cluster = Cluster::start(2);
    cluster.csnap(&["node", "priority", "n2", "0"]);
    wait_until("status shows it", || cluster.node("n2")["priority"] == 0);
    let server = cluster.server();
    if server.node == "n1" {
        signal(server.pid, "KILL");
        wait_until("a server serves", || cluster.server().pid != server.pid);
    }
    wait_until("a node of priority 0 is never chosen", || cluster.server().node == "n1");
    assert!(cluster.csnap(&["node", "list"]).contains("n2"));
    cluster.refused(1, &["node", "priority", "n9", "5"]);
}
