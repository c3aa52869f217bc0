//! The group of lockds under `csnap up`: any of them killed, all of them restarted, most of them frozen, one moved, lost,
//! added and removed; with lock clients and guests beside it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use csnap_lockd::client::ClientEvent;
use csnap_proto::message::lock::{Flags, LockOp, LockReply, Mode};
use serde_json::Value;

use super::cluster::{Cluster, number, signal, wait_until};
use super::failover::Fio;
use super::lock_load::{LEASE_MS, LockLoad, session};
use super::writer::{Writer, summary};

/// Where the lockds listen, in order.
fn addresses(cluster: &Cluster) -> Vec<SocketAddr> {
    let address = |n: u32| {
        let path = cluster.data().join(format!("lockd{n}/data/address"));
        std::fs::read_to_string(path).expect("it listened once").trim().parse().expect("an address")
    };
    (1..=3).map(address).collect()
}

/// What the lockds say of themselves.
fn group(cluster: &Cluster) -> Value {
    let output = cluster.run(&["lockd", "show", "--json"]);
    serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
}

fn members(group: &Value) -> Vec<Value> {
    group["members"].as_array().cloned().unwrap_or_default()
}

fn member(cluster: &Cluster, node: &str) -> Value {
    members(&group(cluster)).into_iter().find(|one| one["node"] == node).unwrap_or(Value::Null)
}

fn pid(cluster: &Cluster, node: &str) -> u32 {
    let mut found = None;
    wait_until(&format!("the lockd of {node} answers"), || {
        let one = member(cluster, node);
        let answers = one["state"] != "away";
        found = one["pid"].as_u64().filter(|_| answers).and_then(|pid| u32::try_from(pid).ok());
        found.is_some()
    });
    found.expect("just found")
}

fn leader(cluster: &Cluster) -> String {
    let mut found = None;
    wait_until("a lockd leads", || {
        found = group(cluster)["leader"].as_str().map(str::to_owned);
        found.is_some()
    });
    found.expect("just found")
}

/// All three vote and are there, and one leads.
fn wait_whole(cluster: &Cluster) {
    wait_until("three lockds are a group", || {
        let group = group(cluster);
        let well =
            |one: &Value| one["votes"] == true && (one["state"] == "leads" || one["state"] == "follows");
        group["leader"].is_string() && members(&group).len() == 3 && members(&group).iter().all(well)
    });
}

/// Three nodes, whose lockds are a group.
fn start() -> Cluster {
    let cluster = Cluster::start(3);
    wait_whole(&cluster);
    cluster
}

/// Killed, and back under another number.
fn restart(cluster: &Cluster, node: &str, how: &str) {
    let before = pid(cluster, node);
    signal(before, how);
    wait_until("it is started again", || {
        let now = member(cluster, node);
        now["pid"].as_u64().is_some_and(|now| now != u64::from(before)) && now["state"] != "away"
    });
    wait_whole(cluster);
}

#[test]
fn three_nodes_have_three_lockds_and_status_tells_of_them_also_without_a_majority() {
    let cluster = start();
    let lockd = cluster.status()["lockd"].take();
    let nodes: Vec<_> = members(&lockd).iter().map(|one| one["node"].clone()).collect();
    assert_eq!(nodes, ["n1", "n2", "n3"]);
    assert!(lockd["leader"].is_string() && members(&lockd).iter().all(|one| one["pid"].is_u64()), "{lockd}");
    assert!(cluster.csnap(&["status"]).contains(" leads 3\n"));
    let pids: Vec<_> = ["n1", "n2"].map(|node| pid(&cluster, node)).to_vec();
    pids.iter().for_each(|pid| signal(*pid, "STOP"));
    wait_until("status says that nobody leads", || {
        let lockd = cluster.status()["lockd"].take();
        let away = members(&lockd).iter().filter(|one| one["state"] == "away").count();
        lockd["leader"].is_null() && members(&lockd).len() == 3 && away == 2
    });
    let line = cluster.refused(1, &["lockd", "move", "n3"]);
    assert!(line.contains("no lockd leads"), "{line}");
    pids.iter().for_each(|pid| signal(*pid, "CONT"));
    wait_whole(&cluster);
}

#[test]
fn lockds_restarted_one_at_a_time_under_load_lose_no_session_and_no_lock() {
    let cluster = start();
    let fio = Fio::start(&cluster, "8M");
    cluster.csnap(&["volume", "create", "guest", "--size", "16M"]);
    let guest = Writer::start(&cluster.socket(2), "guest", 1024);
    let load = LockLoad::start(8, &addresses(&cluster));
    let server = cluster.server();
    load.wait_for(100);
    for how in ["TERM", "KILL"] {
        for node in ["n1", "n2", "n3"] {
            restart(&cluster, node, how);
            load.wait_for(50);
            guest.wait_for(100);
        }
    }
    assert_eq!(cluster.server(), server, "the same server under the same term");
    let mut took = load.stop();
    println!("lockds restarted six times, a lock and an unlock: {}", summary(&mut took));
    guest.stop_and_verify();
    fio.verified();
}

/// What a client that holds a lock was told, and when.
struct Told {
    jeopardy: Instant,
    lost: Instant,
}

/// A client takes a lock of its own and holds it until it is told that it may be lost. Whether it has it is said at once.
fn holder(
    addresses: Vec<SocketAddr>,
    lock: &'static str,
    has_it: std::sync::mpsc::Sender<()>,
) -> std::thread::JoinHandle<Told> {
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let (session, mut events) = session(addresses);
            let reply = session.operate(LockOp::lock(lock, Mode::Ex, Flags::NONE)).await;
            assert!(matches!(reply, Ok(LockReply::Granted { .. })), "{reply:?}");
            has_it.send(()).expect("it is waited for");
            let mut jeopardy = None;
            loop {
                match events.recv().await.expect("told before it ends") {
                    ClientEvent::Jeopardy => jeopardy = jeopardy.or(Some(Instant::now())),
                    ClientEvent::SessionLost { .. } => {
                        let jeopardy = jeopardy.expect("told of jeopardy first");
                        break Told { jeopardy, lost: Instant::now() };
                    }
                    _ => {}
                }
            }
        })
    })
}

#[test]
fn a_frozen_majority_stops_lock_clients_in_time_and_no_guest_and_all_of_it_goes_on_afterwards() {
    let cluster = start();
    let server = cluster.server();
    cluster.csnap(&["volume", "create", "guest", "--size", "16M"]);
    let guest = Writer::start(&cluster.socket(2), "guest", 1024);
    for frozen in [["n1", "n2"], ["n2", "n3"], ["n3", "n1"]] {
        let fio = Fio::start(&cluster, "8M");
        let (has_it, waits) = std::sync::mpsc::channel();
        // The lock of the turn before goes with its lease, which begins anew with the leader.
        let holder = holder(addresses(&cluster), frozen[0], has_it);
        waits.recv().expect("it has the lock");
        let pids = frozen.map(|node| pid(&cluster, node));
        let stopped_at = Instant::now();
        pids.iter().for_each(|pid| signal(*pid, "STOP"));
        let told = holder.join().expect("it is told");
        let (jeopardy, lost) = (told.jeopardy - stopped_at, told.lost - stopped_at);
        println!("{frozen:?} frozen: jeopardy after {jeopardy:?}, lost after {lost:?} of {LEASE_MS} ms");
        assert!(jeopardy < lost && lost <= Duration::from_millis(LEASE_MS + 300), "in time");
        // The server's own lease is over as well by now, and it does not matter.
        guest.wait_for(500);
        cluster.csnap(&["snapshot", "create", &format!("guest@{}", frozen[0])]);
        assert_eq!(cluster.server(), server, "it serves on");
        pids.iter().for_each(|pid| signal(*pid, "CONT"));
        wait_whole(&cluster);
        wait_until("the agents have their sessions", || {
            let nodes = cluster.status()["nodes"].take();
            nodes.as_array().is_some_and(|all| all.len() == 3 && all.iter().all(|one| one["state"] == "up"))
        });
        guest.wait_for(500);
        assert_eq!(cluster.server(), server, "the same server under the same term");
        fio.verified();
    }
    guest.stop_and_verify();
    signal(server.pid, "KILL");
    wait_until("takeovers work again", || cluster.server().term > server.term);
}

/// The longest stalls of a guest, one for each turn of some trouble.
fn stalls(cluster: &Cluster, volume: &str, turns: u32, mut trouble: impl FnMut(u32)) -> Vec<Duration> {
    cluster.csnap(&["volume", "create", volume, "--size", "16M"]);
    let guest = Writer::start(&cluster.socket(3), volume, 1024);
    guest.wait_for(200);
    let mut stalls = Vec::new();
    for turn in 0..turns {
        cluster.csnap(&["snapshot", "create", &format!("{volume}@s{turn}")]);
        guest.wait_for(100);
        guest.take_stall();
        trouble(turn);
        guest.wait_for(500);
        stalls.push(guest.take_stall());
    }
    guest.stop_and_verify();
    stalls
}

#[test]
fn any_lockd_killed_under_load_is_no_error_and_no_pause() {
    let cluster = start();
    let turns = number("CSNAP_LOCKD_KILLS", 6);
    let fio = Fio::start(&cluster, "8M");
    let mut without = stalls(&cluster, "control", turns, |_| std::thread::sleep(Duration::from_millis(500)));
    let server = cluster.server();
    let mut with = stalls(&cluster, "killed", turns, |turn| {
        restart(&cluster, ["n1", "n2", "n3"][turn as usize % 3], "KILL");
    });
    println!("no lockd killed:  {}", summary(&mut without));
    println!("a lockd killed:   {}", summary(&mut with));
    assert_eq!(cluster.server(), server, "nothing moved");
    assert!(with.last() < Some(&(without[without.len() - 1] + Duration::from_secs(2))), "it is no takeover");
    fio.verified();
}

#[test]
fn the_lead_is_moved_under_load_and_nothing_is_lost_or_granted_twice() {
    let cluster = start();
    let server = cluster.server();
    let moves = number("CSNAP_LOCKD_MOVES", 12);
    let load = LockLoad::start(8, &addresses(&cluster));
    load.wait_for(200);
    let (mut moved, mut with, mut without) = (Vec::new(), Vec::new(), Vec::new());
    for turn in 0..moves {
        let from = leader(&cluster);
        let to = if from == "n1" { "n2" } else { "n1" };
        load.take_stall();
        load.wait_for(100);
        without.push(load.take_stall());
        let began = Instant::now();
        cluster.csnap(&["lockd", "move", to]);
        moved.push(began.elapsed());
        load.wait_for(100);
        with.push(load.take_stall());
        assert_eq!(leader(&cluster), to);
        if turn == 0 {
            assert!(cluster.csnap(&["lockd", "move", to]).contains("leads"), "again, and nothing happens");
        }
    }
    assert_eq!(cluster.server(), server, "the same server under the same term");
    let mut took = load.stop();
    println!("{moves} moves of the lead, 8 clients; each time the longest answer of all of them:");
    println!("  with a move:  {}", summary(&mut with));
    println!("  without:      {}", summary(&mut without));
    println!("  a whole turn: {}", summary(&mut took));
    println!("  the command:  {}", summary(&mut moved));
}

#[test]
fn what_is_not_there_or_must_not_go_is_refused_in_a_line() {
    let cluster = start();
    let leader = leader(&cluster);
    assert!(cluster.refused(1, &["lockd", "remove", "n9"]).contains("it has n1, n2, n3"));
    assert!(cluster.refused(1, &["lockd", "move", "n9"]).contains("no replica n9"));
    assert!(cluster.refused(1, &["lockd", "remove", &leader]).contains("leads"));
    assert!(cluster.refused(1, &["lockd", "add", "127.0.0.1:1"]).contains("must run"));
    let line = cluster.refused(1, &["lockd", "show", "--lockd", "127.0.0.1:1"]);
    assert!(line.contains("no lockd answers: lockd at 127.0.0.1:1"), "{line}");
    cluster.refused(2, &["lockd"]);
    let mut followers = ["n1", "n2", "n3"].into_iter().filter(|node| *node != leader);
    let (away, last) = (followers.next().expect("two follow"), followers.next().expect("two follow"));
    let frozen = pid(&cluster, away);
    signal(frozen, "KILL");
    // It is started again in a moment: the group must not shrink to a majority that is not there.
    let output = cluster.run(&["lockd", "remove", last]);
    let line = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() || line.contains("majority"), "{line}");
}

#[test]
fn a_lockd_that_lost_its_disk_votes_again_only_as_a_new_replica() {
    let mut cluster = start();
    let load = LockLoad::start(4, &addresses(&cluster));
    load.wait_for(50);
    let old = member(&cluster, "n2")["replica"].clone();
    load.stop();
    cluster.down();
    std::fs::remove_dir_all(cluster.data().join("lockd2/data")).expect("it has one");
    cluster.up();
    let load = LockLoad::start(4, &addresses(&cluster));
    load.wait_for(50);
    let apart =
        |group: &Value| members(group).iter().filter(|one| one["node"] == "n2").cloned().collect::<Vec<_>>();
    wait_until("the empty one is seen beside the one that is gone", || {
        let both = apart(&group(&cluster));
        both.iter().any(|one| one["replica"] == old && one["state"] == "away")
            && both.iter().any(|one| one["replica"] != old && one["state"] == "no member")
    });
    let said = cluster.csnap(&["lockd", "add", "n2"]);
    assert!(said.contains("3 vote"), "{said}");
    wait_whole(&cluster);
    assert_ne!(member(&cluster, "n2")["replica"], old);
    assert!(cluster.csnap(&["lockd", "add", "n2"]).contains("3 vote"), "again, and nothing happens");
    // It counts: without another one, it and the third are a majority.
    load.wait_for(50);
    let other = if leader(&cluster) == "n1" { "n1" } else { "n3" };
    let frozen = pid(&cluster, other);
    signal(frozen, "STOP");
    load.wait_for(50);
    signal(frozen, "CONT");
    load.stop();
}

#[test]
fn a_replica_is_removed_and_added_again_under_load() {
    let cluster = start();
    let load = LockLoad::start(4, &addresses(&cluster));
    load.wait_for(50);
    let gone = if leader(&cluster) == "n3" { "n1" } else { "n3" };
    let said = cluster.csnap(&["lockd", "remove", gone]);
    assert!(said.contains("2 vote"), "{said}");
    wait_until("it is no member", || {
        let group = group(&cluster);
        members(&group).iter().filter(|one| one["votes"] == true && one["state"] != "no member").count() == 2
    });
    load.wait_for(50);
    let said = cluster.csnap(&["lockd", "add", gone]);
    assert!(said.contains("3 vote"), "{said}");
    wait_whole(&cluster);
    load.wait_for(50);
    load.stop();
}

#[test]
fn a_directory_of_one_lockd_grows_to_three_and_keeps_what_it_has() {
    let mut cluster = Cluster::start(1);
    let server = cluster.server();
    cluster.csnap(&["snapshot", "create", "demo@before"]);
    cluster.down();
    cluster.set_nodes(3);
    cluster.up();
    wait_whole(&cluster);
    assert!(cluster.server().term > server.term, "terms go on");
    let load = LockLoad::start(4, &addresses(&cluster));
    load.wait_for(50);
    restart(&cluster, &leader(&cluster), "KILL");
    load.wait_for(50);
    load.stop();
}
