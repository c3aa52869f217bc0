//! Everything else that dies: agents, lockd, `up` itself, the operator's command half way.

use std::process::{Command, Stdio};

use super::cluster::{Cluster, binary, is_alive, signal, wait_until};
use super::failover::Fio;
use super::flusher::Flusher;
use super::guest::Story;
use super::nbd::Nbd;
use super::writer::Writer;

#[test]
fn a_killed_agent_takes_its_server_along_and_nothing_else() {
    let cluster = Cluster::start(1);
    let fio = Fio::start(&cluster, "8M");
    cluster.csnap(&["volume", "create", "guest", "--size", "4M"]);
    let guest = Writer::start(&cluster.socket(1), "guest", 1024);
    guest.wait_for(100);
    cluster.csnap(&["snapshot", "create", "guest@a", "demo@a"]);
    let (agent, exporter) = (cluster.pid("n1", "agent_pid"), cluster.pid("n1", "export_pid"));
    let server = cluster.server();
    signal(agent, "KILL");
    wait_until("the server goes with its agent", || !is_alive(server.pid));
    wait_until("a new server serves", || cluster.server().term > server.term);
    guest.wait_for(200);
    assert_eq!(cluster.pid("n1", "export_pid"), exporter, "the exporter was found again");
    assert_ne!(cluster.pid("n1", "agent_pid"), agent);
    let log = std::fs::read_to_string(cluster.data().join("n1/log")).expect("a log");
    assert!(log.contains("resumed: true"), "the session with lockd was resumed by its secret: {log}");
    guest.stop_and_verify();
    fio.verified();
}

#[test]
fn the_server_serves_on_while_lockd_is_away() {
    let cluster = Cluster::start(1);
    let fio = Fio::start(&cluster, "8M");
    cluster.csnap(&["volume", "create", "guest", "--size", "4M"]);
    let guest = Writer::start(&cluster.socket(1), "guest", 1024);
    guest.wait_for(100);
    let server = cluster.server();
    for turn in 0..3 {
        let lockd = lockd_pid(&cluster).expect("lockd runs");
        signal(lockd, "KILL");
        cluster.csnap(&["snapshot", "create", &format!("guest@l{turn}")]);
        guest.wait_for(200);
        wait_until("lockd is back", || lockd_pid(&cluster).is_some_and(|pid| pid != lockd));
    }
    assert_eq!(cluster.server(), server, "nothing moved");
    signal(server.pid, "KILL");
    wait_until("takeovers work again", || cluster.server().term > server.term);
    guest.wait_for(100);
    guest.stop_and_verify();
    fio.verified();
}

/// As the agents know it; absent while they cannot reach it.
fn lockd_pid(cluster: &Cluster) -> Option<u32> {
    let pid = cluster.status()["lockd"]["members"][0]["pid"].as_u64()?;
    u32::try_from(pid).ok()
}

#[test]
fn a_killed_up_leaves_nothing_and_the_next_one_recovers() {
    let mut cluster = Cluster::start(3);
    let guest = Flusher::start(&cluster.socket(2), "demo");
    guest.wait_for_flushes(5);
    cluster.csnap(&["snapshot", "create", "demo@a"]);
    guest.wait_for_flushes(5);
    cluster.kill_up();
    let began = std::time::Instant::now();
    wait_until("nothing is left", || cluster.processes().is_empty());
    assert!(began.elapsed() < std::time::Duration::from_secs(5), "within five seconds");
    cluster.up();
    wait_until("the dead exporter is reaped, and its volume free", || {
        Nbd::open(&cluster.socket(1), "demo").is_ok()
    });
    let flushed = guest.broken().verify(&cluster.socket(1));
    println!("{flushed} flushed blocks, all there");
    assert!(cluster.csnap(&["snapshot", "list", "demo"]).contains("demo@a"));
    let guest = Writer::start(&cluster.socket(1), "demo", 512);
    guest.wait_for(100);
    guest.stop_and_verify();
    cluster.down();
    assert!(cluster.processes().is_empty(), "nothing is left after an orderly stop either");
}

#[test]
fn a_second_up_on_the_same_directory_is_refused() {
    let cluster = Cluster::start(1);
    let line = cluster.refused(1, &["up"]);
    assert!(line.contains("data"), "names the directory: {line}");
    cluster.csnap(&["status"]);
}

#[test]
fn a_snapshot_whose_command_was_killed_is_whole_or_not_there() {
    let cluster = Cluster::start(1);
    let mut story = Story::new(&cluster, 1);
    story.fill();
    for turn in 0..12 {
        story.snapshot_by(|cluster, name| {
            let mut create = Command::new(binary())
                .arg("--dir")
                .arg(cluster.data())
                .args(["snapshot", "create", name])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("the binary starts");
            std::thread::sleep(std::time::Duration::from_millis(turn));
            let _ = create.kill();
            create.wait().expect("it ends").success()
        });
        story.burst(false);
        story.forget_oldest();
    }
    story.verify();
}

#[test]
fn a_create_whose_command_was_killed_is_whole_or_not_there() {
    let cluster = Cluster::start(1);
    let image = cluster.scratch().join("image");
    std::fs::write(&image, vec![9; 64 << 20]).expect("an image");
    let image = image.to_str().expect("text");
    for after_ms in [1, 5, 20, 60, 150] {
        let name = format!("v{after_ms}");
        let mut create = Command::new(binary())
            .arg("--dir")
            .arg(cluster.data())
            .args(["volume", "create", &name, "--from", image])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the binary starts");
        std::thread::sleep(std::time::Duration::from_millis(after_ms));
        let _ = create.kill();
        let _ = create.wait();
    }
    wait_until("every half made volume is gone", || {
        let volumes = cluster.csnap(&["volume", "list", "--json"]);
        let volumes: serde_json::Value = serde_json::from_str(&volumes).expect("JSON");
        let names: Vec<String> = volumes
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|v| v["name"].as_str().map(str::to_owned))
            .collect();
        let heads = std::fs::read_dir(cluster.data().join("pool/head")).expect("heads").count();
        heads == names.len()
    });
    cluster.csnap(&["volume", "create", "whole", "--from", image]);
}
