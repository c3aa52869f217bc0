//! Processes that stop and go on as if nothing had happened.

use super::cluster::{Cluster, is_alive, signal, wait_until};
use super::nbd::{ERR_POLICY, Nbd};
use super::writer::Writer;

#[test]
fn a_frozen_server_is_replaced_by_its_agent() {
    let cluster = Cluster::start(1);
    let guest = Writer::start(&cluster.socket(1), "demo", 1024);
    guest.wait_for(100);
    cluster.csnap(&["snapshot", "create", "demo@a"]);
    let server = cluster.server();
    signal(server.pid, "STOP");
    wait_until("another server serves", || cluster.server().pid != server.pid);
    guest.wait_for(100);
    wait_until("the frozen server is gone", || !is_alive(server.pid));
    guest.stop_and_verify();
}

#[test]
fn a_frozen_agent_and_server_are_replaced_by_another_node_and_the_thawed_server_exits() {
    let cluster = Cluster::start(3);
    let server = cluster.server();
    let away = if server.node == "n1" { 2 } else { 1 };
    let guest = Writer::start(&cluster.socket(away), "demo", 1024);
    guest.wait_for(100);
    cluster.csnap(&["snapshot", "create", "demo@a"]);
    let agent = cluster.pid(&server.node, "agent_pid");
    signal(agent, "STOP");
    signal(server.pid, "STOP");
    wait_until("another node serves", || {
        let now = cluster.server();
        now.node != server.node && now.term > server.term
    });
    guest.wait_for(500);
    signal(server.pid, "CONT");
    signal(agent, "CONT");
    wait_until("the thawed server is gone", || !is_alive(server.pid));
    guest.wait_for(100);
    guest.stop_and_verify();
}

#[test]
fn a_frozen_exporters_volume_is_nobody_elses_and_status_says_why() {
    let cluster = Cluster::start(2);
    let mut held = Nbd::must_open(&cluster.socket(1), "demo");
    assert_eq!(held.write(0, &[1; 4096]), 0);
    let exporter = cluster.pid("n1", "export_pid");
    signal(exporter, "STOP");
    // However long: a timeout is no evidence. Three seconds are twice the lease of servers.
    std::thread::sleep(std::time::Duration::from_secs(3));
    let refused = Nbd::open(&cluster.socket(2), "demo").err().expect("the volume is held");
    assert_eq!(refused.code, ERR_POLICY);
    assert!(refused.message.contains("n1"), "names the holder: {}", refused.message);
    signal(exporter, "CONT");
    assert_eq!(held.write(4096, &[2; 4096]), 0, "thawed, it goes on");
    drop(held);
    wait_until("the volume is free", || Nbd::open(&cluster.socket(2), "demo").is_ok());
}

#[test]
fn a_killed_exporter_is_reaped_and_its_volume_free_with_what_was_flushed() {
    let cluster = Cluster::start(2);
    let mut held = Nbd::must_open(&cluster.socket(1), "demo");
    assert_eq!(held.write(0, &[7; 4096]), 0);
    assert_eq!(held.flush(), 0);
    let exporter = cluster.pid("n1", "export_pid");
    signal(exporter, "KILL");
    wait_until("the volume is free", || Nbd::open(&cluster.socket(2), "demo").is_ok());
    let mut other = Nbd::must_open(&cluster.socket(2), "demo");
    assert_eq!(other.read(0, 4096).expect("a read"), vec![7; 4096]);
    wait_until("a new exporter serves", || cluster.pid("n1", "export_pid") != exporter);
}
