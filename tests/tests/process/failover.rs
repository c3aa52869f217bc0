//! The server dies; nobody notices more than a pause.

use std::process::Command;
use std::time::Duration;

use super::cluster::{Cluster, number, signal, wait_until};
use super::writer::{Writer, summary};

/// Blocks that the guest writes: 16 MiB.
const BLOCKS: u64 = 4096;

fn kill_repeatedly(nodes: u32, kills: u32) {
    let cluster = Cluster::start(nodes);
    let fio = fio_verify(&cluster, "64M");
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
    verified(fio);
}

/// fio has ended, and found everything that it wrote.
pub(crate) fn verified(mut fio: std::process::Child) {
    let done = fio.wait().expect("fio ends");
    assert!(done.success(), "fio with verification saw an error");
}

/// fio with verification on node 1's exporter, on the first `size` of the volume `demo`: three rounds of 2000 writes a second
/// at most, so that it is still there when the trouble is over.
pub(crate) fn fio_verify(cluster: &Cluster, size: &str) -> std::process::Child {
    let uri = cluster.uri(1, "demo");
    let log = std::fs::File::create(cluster.scratch().join("fio.log")).expect("a log");
    Command::new("fio")
        .current_dir(cluster.scratch())
        .args(["--name=verify", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=16"])
        .args(["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--loops=3", "--fsync=64"])
        .args(["--rate_iops=2000", "--verify_state_save=0"])
        .args([format!("--size={size}"), format!("--uri={uri}")])
        .stdout(log.try_clone().expect("a second handle"))
        .stderr(log)
        .spawn()
        .expect("fio is installed by ./test")
}

#[test]
fn a_killed_server_is_a_pause_with_three_nodes() {
    kill_repeatedly(3, number("CSNAP_KILLS", 20));
}

#[test]
fn a_killed_server_is_a_pause_with_one_node() {
    kill_repeatedly(1, number("CSNAP_KILLS", 20) / 4);
}
