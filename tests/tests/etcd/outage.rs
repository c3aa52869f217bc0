//! etcd itself fails under a guest.

use std::time::Duration;

use super::cluster::{signal, wait_until};
use super::etcd::Etcd;
use super::nodes::Nodes;
use super::writer::Writer;

/// Longer than a lease.
const PAST_LEASES: Duration = Duration::from_secs(4);

#[test]
fn a_dead_etcd_leader_costs_a_guest_no_error_and_a_later_takeover_works() {
    let dir = tempfile::Builder::new().prefix("csnap-").tempdir().expect("a temporary directory");
    let mut etcd = Etcd::start(dir.path(), 3);
    let nodes = Nodes::start(dir.path(), 3, &etcd.endpoints());
    let mut fio = nodes.fio(1);
    let server = nodes.server("a server serves", |_| true);
    let killed = etcd.leader();
    etcd.kill(killed);
    let leader = etcd.leader();
    println!("etcd leader m{} killed, m{} leads", killed + 1, leader + 1);
    let still = nodes.server("a server serves", |_| true);
    println!("served by {still:?}, before by {server:?}");
    // Takes a lock and writes values on what is left.
    signal(still.pid, "KILL");
    let next = nodes.server("another server serves", |next| next.term > still.term);
    // The other way round: the leader freezes, and its clients with it.
    etcd.start_member(killed);
    let frozen = etcd.leader();
    signal(etcd.pid(frozen), "STOP");
    wait_until("etcd has another leader", || etcd.leader() != frozen);
    signal(next.pid, "KILL");
    nodes.server("another server serves", |last| last.term > next.term);
    signal(etcd.pid(frozen), "CONT");
    assert!(fio.wait().expect("fio ends").success(), "fio with verification saw an error");
}

#[test]
fn an_etcd_that_is_gone_for_longer_than_a_lease_is_not_noticed_by_a_guest() {
    let dir = tempfile::Builder::new().prefix("csnap-").tempdir().expect("a temporary directory");
    let mut etcd = Etcd::start(dir.path(), 1);
    let nodes = Nodes::start(dir.path(), 2, &etcd.endpoints());
    let guest = Writer::start(&nodes.socket(1), "demo", 1024);
    let server = nodes.server("a server serves", |_| true);
    nodes.csnap(&["snapshot", "create", "demo@a"]);
    guest.wait_for(100);
    etcd.kill(0);
    wait_until("status says that etcd does not answer", || nodes.status()["lockd"].is_null());
    // Time itself is what is tested: the lease must run out without anybody to say so.
    std::thread::sleep(PAST_LEASES);
    nodes.csnap(&["snapshot", "create", "demo@b"]);
    guest.wait_for(100);
    println!("etcd gone: longest stall {:?}", guest.take_stall());
    etcd.start_member(0);
    wait_until("etcd answers", || !nodes.status()["lockd"].is_null());
    let still = nodes.server("a server serves", |_| true);
    assert_eq!(still, server, "a new leader lets every lease run anew: nothing was lost");
    guest.stop_and_verify();
}
