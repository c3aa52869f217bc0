//! The server dies; nobody notices more than a pause.

use std::fs::File;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::cluster::{Cluster, number, signal, wait_until};
use super::writer::{Writer, summary};

/// Blocks that the guest writes: 16 MiB.
const BLOCKS: u64 = 4096;

fn kill_repeatedly(nodes: u32, kills: u32) {
    let cluster = Cluster::start(nodes);
    let fio = Fio::start(&cluster, "16M");
    cluster.csnap(&["volume", "create", "guest", "--size", "64M"]);
    let guest = Writer::start(&cluster.socket(1), "guest", BLOCKS);
    let mut stalls: Vec<Duration> = Vec::new();
    for kill in 0..kills {
        if kill % 5 == 0 {
            // So that writes need grants, and failover meets them in every state.
            cluster.csnap(&["snapshot", "create", &format!("guest@s{kill}"), &format!("demo@s{kill}")]);
        }
        guest.wait_for(200);
        let server = cluster.server();
        guest.take_stall();
        signal(server.pid, "KILL");
        let next = {
            let mut next = cluster.server();
            wait_until("another server serves", || {
                next = cluster.server();
                next.pid != server.pid
            });
            next
        };
        assert!(next.term > server.term, "terms only grow: {server:?} then {next:?}");
        guest.wait_for(200);
        stalls.push(guest.take_stall());
    }
    println!("{nodes} nodes, server killed: {}", summary(&mut stalls));
    let writes = guest.stop_and_verify();
    println!("{writes} acknowledged writes, none lost");
    fio.verified();
}

/// fio with verification on node 1's exporter, round after round until [`Self::verified`]: there is one as long as trouble
/// lasts, and one that ends after it.
pub(crate) struct Fio {
    stop: Arc<AtomicBool>,
    rounds: JoinHandle<u32>,
}

impl Fio {
    /// Each round writes the first `size` of the volume `demo` once, 2000 blocks a second at most, and reads it again.
    pub(crate) fn start(cluster: &Cluster, size: &str) -> Self {
        Self::start_at(cluster, &cluster.uri(1, "demo"), size)
    }

    /// As [`Self::start`], by another way to the volume.
    pub(crate) fn start_at(cluster: &Cluster, uri: &str, size: &str) -> Self {
        let log = File::create(cluster.scratch().join("fio.log")).expect("a log");
        let mut command = Command::new("fio");
        command
            .current_dir(cluster.scratch())
            .args(["--name=verify", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=16"])
            .args(["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--fsync=64"])
            .args(["--rate_iops=2000", "--verify_state_save=0", "--randrepeat=0"])
            .args([format!("--size={size}"), format!("--uri={uri}")])
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let rounds = std::thread::spawn(move || {
            let mut rounds = 0;
            while !stopped.load(Ordering::Relaxed) {
                let status = command.status().expect("fio is installed by ./test");
                assert!(status.success(), "fio with verification saw an error, in round {rounds}");
                rounds += 1;
            }
            rounds
        });
        Self { stop, rounds }
    }

    /// Lets the round end that is on its way: every round found everything that it wrote.
    pub(crate) fn verified(self) {
        assert!(!self.rounds.is_finished(), "fio goes on until it is stopped");
        self.stop.store(true, Ordering::Relaxed);
        let rounds = self.rounds.join().expect("fio with verification saw no error");
        println!("fio verified all that it wrote, {rounds} times");
    }
}

#[test]
fn a_killed_server_is_a_pause_with_three_nodes() {
    kill_repeatedly(3, number("CSNAP_KILLS", 20));
}

#[test]
fn a_killed_server_is_a_pause_with_one_node() {
    kill_repeatedly(1, number("CSNAP_KILLS", 20) / 4);
}
