//! Processes that stop and go on as if nothing had happened.

use std::time::{Duration, Instant};

use super::cluster::{Cluster, is_alive, is_stopped, signal, wait_until};
use super::flusher::Flusher;
use super::nbd::{ERR_POLICY, Nbd, WRITE};
use super::strace::Strace;
use super::writer::{Writer, ms};

#[test]
fn a_frozen_server_is_replaced_by_its_agent() {
    let cluster = Cluster::start(1);
    let guest = Writer::start(&cluster.socket(1), "demo", 1024);
    guest.wait_for(100);
    cluster.csnap(&["snapshot", "create", "demo@a"]);
    let server = cluster.server();
    guest.take_stall();
    signal(server.pid, "STOP");
    wait_until("another server serves", || cluster.server().pid != server.pid);
    let next = cluster.server();
    assert!(next.term > server.term, "terms only grow: {server:?} then {next:?}");
    guest.wait_for(100);
    wait_until("the frozen server is gone", || !is_alive(server.pid));
    println!(
        "server frozen: term {}, then {}; guest's stall {}",
        server.term,
        next.term,
        ms(guest.take_stall())
    );
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
    guest.take_stall();
    signal(agent, "STOP");
    signal(server.pid, "STOP");
    wait_until("another node serves", || {
        let now = cluster.server();
        now.node != server.node && now.term > server.term
    });
    guest.wait_for(500);
    let (term, stall) = (cluster.server().term, ms(guest.take_stall()));
    println!("server and agent frozen: term {}, then {term}; guest's stall {stall}", server.term);
    signal(server.pid, "CONT");
    signal(agent, "CONT");
    wait_until("the thawed server is gone", || !is_alive(server.pid));
    guest.wait_for(100);
    guest.stop_and_verify();
}

/// Clients' sessions end soon: the shortest lease that a configuration takes.
const SHORT_LEASE: (&str, &str) = ("client_lease_ms = 15000", "client_lease_ms = 1000");

/// No freeze takes so long, unless strace hangs.
const TRACED_WITHIN: Duration = Duration::from_secs(60);

/// A guest's two writes have reached the exporter of node 1, which is frozen in the first of them: when it goes on, the
/// second lands whatever happened meanwhile.
fn freeze_with_writes_in_hand(cluster: &Cluster, held: &mut Nbd, exporter: u32, content: u8) {
    let head = cluster.data().join("pool/head/00000001-00000000");
    let head = head.to_str().expect("temporary directories are text");
    let calls = "pwrite64";
    let (trace, inject) = (format!("trace={calls}"), format!("inject={calls}:signal=SIGSTOP:when=1"));
    let log = cluster.scratch().join(format!("writes-{content}.log"));
    let arguments = ["-P", head, "-e", &trace, "-e", &inject];
    let trap = Strace::attach(log, &[exporter], TRACED_WITHIN, &arguments).expect("it lives");
    for block in 0..2 {
        held.send(WRITE, block * 4096, 4096, &[content; 4096]);
    }
    wait_until("the exporter is stopped in a write", || trap.has_stopped());
    trap.detach();
    assert!(is_stopped(exporter), "it stays frozen");
}

/// What status says of `demo` while its writer is lost; waits until it does.
fn why_blocked(cluster: &Cluster) -> String {
    let mut why = None;
    wait_until("status says why the volume is held", || {
        let status = cluster.status();
        let demo = status["volumes"].as_array().and_then(|all| all.iter().find(|v| v["name"] == "demo"));
        why = demo.and_then(|demo| demo["blocked"].as_str().map(str::to_owned));
        why.is_some()
    });
    why.expect("just found")
}

/// Nobody gets the volume, and its epoch does not end. What is said of it.
fn assert_held(cluster: &Cluster, exporter: u32) {
    let why = why_blocked(cluster);
    assert!(why.contains("n1") && why.contains(&exporter.to_string()), "status names the holder: {why}");
    let refused = Nbd::open(&cluster.socket(2), "demo").err().expect("the volume is held");
    assert_eq!(refused.code, ERR_POLICY);
    assert!(refused.message.contains("n1"), "names the holder: {}", refused.message);
    let line = cluster.refused(1, &["snapshot", "create", "demo@held"]);
    assert!(line.contains("n1"), "names the holder: {line}");
    println!("status says: {why}\nGO is refused: {}\nsnapshot create: {line}", refused.message);
}

#[test]
fn an_exporter_frozen_past_its_session_with_a_write_in_hand_keeps_its_volume_until_it_is_reaped() {
    let cluster = Cluster::start_configured(2, &[SHORT_LEASE]);
    let mut held = Nbd::must_open(&cluster.socket(1), "demo");
    let exporter = cluster.pid("n1", "export_pid");
    freeze_with_writes_in_hand(&cluster, &mut held, exporter, 1);
    let frozen = Instant::now();
    assert_held(&cluster, exporter);
    // A new server knows it as well.
    let server = cluster.server();
    signal(server.pid, "KILL");
    wait_until("another server serves", || cluster.server().term > server.term);
    assert_held(&cluster, exporter);

    println!("held, over a change of servers, for {}", ms(frozen.elapsed()));
    signal(exporter, "CONT");
    for _ in 0..2 {
        assert_eq!(held.reply().1, 0, "thawed, it goes on: nobody was in between");
    }
    assert_eq!(held.flush(), 0);
    assert_eq!(held.read(0, 8192), Ok(vec![1; 8192]));

    freeze_with_writes_in_hand(&cluster, &mut held, exporter, 2);
    let frozen = Instant::now();
    assert_held(&cluster, exporter);
    let killed = Instant::now();
    signal(exporter, "KILL");
    wait_until("it is reaped, and the volume free", || Nbd::open(&cluster.socket(2), "demo").is_ok());
    println!("held for {} until SIGKILL, then free after {}", ms(killed - frozen), ms(killed.elapsed()));
    let mut other = Nbd::must_open(&cluster.socket(2), "demo");
    let found = other.read(4096, 4096).expect("a read");
    assert!(found == vec![1; 4096] || found == vec![2; 4096], "the write in hand is there or not");
    assert_eq!(other.write(4096, &[3; 4096]), 0);
    assert_eq!(other.read(4096, 4096), Ok(vec![3; 4096]), "nothing of the dead lands any more");
}

#[test]
fn a_killed_exporter_is_reaped_and_its_volume_free_with_what_was_flushed() {
    let cluster = Cluster::start(2);
    let guest = Flusher::start(&cluster.socket(1), "demo");
    guest.wait_for_flushes(5);
    cluster.csnap(&["snapshot", "create", "demo@a"]);
    guest.wait_for_flushes(5);
    let exporter = cluster.pid("n1", "export_pid");
    let killed = Instant::now();
    signal(exporter, "KILL");
    wait_until("the volume is free", || Nbd::open(&cluster.socket(2), "demo").is_ok());
    let free = ms(killed.elapsed());
    let flushed = guest.broken().verify(&cluster.socket(2));
    println!("exporter killed: its volume is free after {free}; {flushed} flushed blocks, all there");
    wait_until("a new exporter serves", || cluster.pid("n1", "export_pid") != exporter);
}
