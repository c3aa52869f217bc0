//! Open files: daemons ask for what they may have, and strangers' connections never take those of the pool.

use std::net::TcpStream;

use super::cluster::{Cluster, wait_until};
use super::writer::Writer;

/// Soft and hard limit of open files of a process.
fn limits(pid: u32) -> (String, String) {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).expect("it lives");
    let line = limits.lines().find(|line| line.starts_with("Max open files")).expect("a limit");
    let mut words = line.split_whitespace().skip(3).map(str::to_owned);
    (words.next().expect("soft"), words.next().expect("hard"))
}

fn open_files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it lives").count()
}

#[test]
fn every_daemon_raises_its_limit_as_far_as_it_may() {
    let cluster = Cluster::start_with_descriptors(1, 256, 2048);
    let pids = [
        cluster.server().pid,
        cluster.lockd(),
        cluster.pid("n1", "agent_pid"),
        cluster.pid("n1", "export_pid"),
    ];
    for pid in pids {
        assert_eq!(limits(pid), ("2048".to_owned(), "2048".to_owned()), "process {pid}");
    }
}

#[test]
fn strangers_take_no_descriptor_that_a_file_needs() {
    let cluster = Cluster::start_with_descriptors(1, 256, 256);
    let guest = Writer::start(&cluster.socket(1), "demo", 4096);
    guest.wait_for(100);
    let (server, address) = (cluster.server(), cluster.server_address());
    cluster.csnap(&["snapshot", "create", "demo@a"]);
    let strangers: Vec<TcpStream> =
        (0..300).map(|_| TcpStream::connect(&address).expect("it listens")).collect();
    let log = cluster.data().join("n1/log");
    wait_until("those that are too many are turned away", || {
        std::fs::read_to_string(&log).expect("a log").contains("connection closed: there are too many")
    });
    // Copying out what the snapshot shares opens files.
    guest.wait_for(1000);
    assert!(open_files(server.pid) < 256 * 3 / 4, "{} are open", open_files(server.pid));
    drop(strangers);
    wait_until("there is room again", || {
        cluster.run(&["volume", "create", "v", "--size", "1M"]).status.success()
    });
    cluster.csnap(&["snapshot", "create", "demo@b"]);
    assert_eq!(cluster.server(), server, "nobody died");
    guest.stop_and_verify();
}
