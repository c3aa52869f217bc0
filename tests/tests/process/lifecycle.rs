//! Everything else that dies: agents, lockd, `up` itself, the operator's command half way.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::cluster::{Cluster, binary, changed, is_alive, signal, wait_until};
use super::failover::Fio;
use super::flusher::Flusher;
use super::guest::Story;
use super::nbd::Nbd;
use super::writer::{Writer, ms};

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
    guest.take_stall();
    let killed = Instant::now();
    signal(agent, "KILL");
    wait_until("the server goes with its agent", || !is_alive(server.pid));
    wait_until("a new server serves", || cluster.server().term > server.term);
    let served = ms(killed.elapsed());
    guest.wait_for(200);
    println!("agent killed: a new server after {served}; guest's stall {}", ms(guest.take_stall()));
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
    guest.take_stall();
    for turn in 0..3 {
        let lockd = lockd_pid(&cluster).expect("lockd runs");
        signal(lockd, "KILL");
        cluster.csnap(&["snapshot", "create", &format!("guest@l{turn}")]);
        guest.wait_for(200);
        wait_until("lockd is back", || lockd_pid(&cluster).is_some_and(|pid| pid != lockd));
    }
    assert_eq!(cluster.server(), server, "nothing moved");
    println!("lockd killed 3 times: nothing moved, guest's longest stall {}", ms(guest.take_stall()));
    let killed = Instant::now();
    signal(server.pid, "KILL");
    wait_until("takeovers work again", || cluster.server().term > server.term);
    println!("server killed after that: the next one serves after {}", ms(killed.elapsed()));
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
    let began = Instant::now();
    cluster.kill_up();
    wait_until("nothing is left", || cluster.processes().is_empty());
    let gone = began.elapsed();
    assert!(gone < Duration::from_secs(5), "within five seconds");
    let began = Instant::now();
    cluster.up();
    let up = ms(began.elapsed());
    wait_until("the dead exporter is reaped, and its volume free", || {
        Nbd::open(&cluster.socket(1), "demo").is_ok()
    });
    let free = ms(began.elapsed());
    let flushed = guest.broken().verify(&cluster.socket(1));
    println!(
        "up killed, 3 nodes: nothing left after {}; the next one serves after {up}, its volume is free after {free}; \
         {flushed} flushed blocks, all there",
        ms(gone)
    );
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
    println!("{line}");
    assert!(line.contains("data"), "names the directory: {line}");
    cluster.csnap(&["status"]);
}

/// Runs a command of the operator's and kills it after this time; whether it was done before.
fn killed_after(cluster: &Cluster, time: Duration, arguments: &[&str]) -> bool {
    let mut command = Command::new(binary())
        .arg("--dir")
        .arg(cluster.data())
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary starts");
    std::thread::sleep(time);
    let _ = command.kill();
    command.wait().expect("it ends").success()
}

#[test]
fn a_snapshot_whose_command_was_killed_is_whole_or_not_there() {
    const TURNS: usize = 12;
    let cluster = Cluster::start(1);
    let fio = Fio::start(&cluster, "8M");
    cluster.csnap(&["volume", "create", "guest", "--size", "4M"]);
    let mut story = Story::of(&cluster, 1, "guest");
    story.fill();
    let (mut done, mut whole) = (0, 0);
    for turn in 0..TURNS {
        let time = Duration::from_millis(turn as u64);
        let mut made = false;
        story.snapshot_by(|cluster, name| {
            made = killed_after(cluster, time, &["snapshot", "create", name]);
            made
        });
        story.burst(false);
        if made {
            done += 1;
        } else {
            whole += usize::from(story.settle());
        }
        story.verify();
        story.forget_oldest();
    }
    let killed = TURNS - done;
    println!(
        "{killed} snapshot creates killed ({done} were done before): {whole} whole, {} absent",
        killed - whole
    );
    fio.verified();
}

/// Names of all volumes.
fn volumes(cluster: &Cluster) -> Vec<String> {
    let volumes = cluster.csnap(&["volume", "list", "--json"]);
    let volumes: serde_json::Value = serde_json::from_str(&volumes).expect("JSON");
    let names =
        volumes.as_array().into_iter().flatten().filter_map(|v| v["name"].as_str().map(str::to_owned));
    names.collect()
}

/// No byte of it is zero, and each block differs from its neighbours.
fn write_image(path: &Path, bytes: usize) -> Vec<u8> {
    let content: Vec<u8> = (0..bytes).map(|i| (i / 4096) as u8 ^ (i % 251) as u8 | 1).collect();
    std::fs::write(path, &content).expect("an image");
    content
}

#[test]
fn a_create_whose_command_was_killed_is_whole_or_not_there() {
    let cluster = Cluster::start(1);
    let fio = Fio::start(&cluster, "8M");
    let image = cluster.scratch().join("image");
    let content = write_image(&image, 32 << 20);
    let image = image.to_str().expect("text");
    let after_ms = [1, 5, 20, 60, 150, 400, 1000];
    let mut done = 0;
    for ms in after_ms {
        let time = Duration::from_millis(ms);
        let made = killed_after(&cluster, time, &["volume", "create", &format!("v{ms}"), "--from", image]);
        done += usize::from(made);
    }
    wait_until("every half made volume is gone", || {
        let heads = std::fs::read_dir(cluster.data().join("pool/head")).expect("heads").count();
        heads == volumes(&cluster).len()
    });
    let survivors: Vec<String> = volumes(&cluster).into_iter().filter(|name| name != "demo").collect();
    for name in &survivors {
        let mut disk = Nbd::must_open(&cluster.socket(1), name);
        assert_eq!(disk.size_bytes, content.len() as u64, "{name} has its full size");
        assert!(disk.read(0, content.len()).expect("a read") == content, "{name} has all of its content");
    }
    assert!(survivors.len() >= done, "those that were told to be made are there: {survivors:?}");
    let (killed, whole) = (after_ms.len() - done, survivors.len() - done);
    println!(
        "{killed} volume creates killed ({done} were done before): {whole} whole, {} absent",
        killed - whole
    );
    cluster.csnap(&["volume", "create", "whole", "--from", image]);
    fio.verified();
}

#[test]
fn a_pool_of_another_version_is_left_alone() {
    let mut cluster = Cluster::start(1);
    let socket = cluster.socket(1);
    let mut disk = Nbd::must_open(&socket, "demo");
    assert_eq!((disk.write(0, &[7; 4096]), disk.flush()), (0, 0));
    drop(disk);
    cluster.down();
    let (pool, toml) = (cluster.data().join("pool"), cluster.data().join("pool/pool.toml"));
    let ours = std::fs::read_to_string(&toml).expect("what the pool is");
    let format = ours.lines().find(|line| line.starts_with("format = ")).expect("its version");
    let other = changed(&ours, format, "format = 7");
    std::fs::write(&toml, &other).expect("it is ours");

    let pool = pool.to_str().expect("temporary directories are text");
    for arguments in [&["up", "--nbd", "127.0.0.1:0"][..], &["check", "--pool", pool]] {
        let line = cluster.refused(1, arguments);
        println!("{}: {line}", arguments[0]);
        assert!(line.contains("format 7") && line.contains("upgrade"), "what, and what to do: {line}");
        assert_eq!(std::fs::read_to_string(&toml).expect("still there"), other, "nothing was changed");
        assert!(cluster.processes().is_empty(), "nothing runs on it");
    }

    std::fs::write(&toml, ours).expect("it is ours");
    cluster.up();
    let mut disk = Nbd::must_open(&socket, "demo");
    assert_eq!(disk.read(0, 4096), Ok(vec![7; 4096]), "nothing was lost");
}
