//! What each request costs in messages, as `status` counts them.

use std::collections::BTreeMap;

use super::cluster::{Cluster, wait_until};
use super::nbd::Nbd;

const CHUNK: u64 = 4096;

/// Messages of one client since the last look, without those that are counted apart.
struct Counter<'a> {
    cluster: &'a Cluster,
    client: &'static str,
    seen: BTreeMap<String, u64>,
}

impl<'a> Counter<'a> {
    fn new(cluster: &'a Cluster, client: &'static str) -> Self {
        let mut counter = Self { cluster, client, seen: BTreeMap::new() };
        counter.take();
        counter
    }

    fn take(&mut self) -> u64 {
        let apart =
            ["Identify", "IdentifyOk", "Renew", "Renewed", "SnapshotAdvice", "SnapshotAdviceOk", "Resume"];
        let mut now = self.cluster.messages("n1", self.client);
        now.retain(|name, _| !apart.contains(&name.as_str()));
        let sum = |messages: &BTreeMap<String, u64>| messages.values().sum::<u64>();
        let new = sum(&now) - sum(&self.seen);
        self.seen = now;
        new
    }
}

#[test]
fn steady_states_are_silent_and_the_rest_costs_what_the_design_says() {
    let cluster = Cluster::start(1);
    let socket = cluster.socket(1);
    let mut disk = Nbd::must_open(&socket, "demo");
    wait_until("the client is counted", || !cluster.messages("n1", "demo").is_empty());
    let mut count = Counter::new(&cluster, "demo");

    for chunk in 0..64 {
        assert_eq!(disk.write(chunk * CHUNK, &[1; 4096]), 0);
    }
    disk.read(0, 1 << 16).expect("a read");
    assert_eq!(count.take(), 0, "without a snapshot nothing is asked");

    cluster.csnap(&["snapshot", "create", "demo@a"]);
    count.take();
    disk.read(0, 1 << 16).expect("a read");
    assert_eq!(count.take(), 0, "head reads are silent");
    assert_eq!(disk.write(3 * CHUNK, &[2; 4096]), 0);
    assert_eq!(count.take(), 2, "a first write after a snapshot");
    assert_eq!(disk.write(3 * CHUNK, &[3; 4096]), 0);
    assert_eq!(count.take(), 0, "a rewrite");
    assert_eq!(disk.write(8 * CHUNK, &[2; 8 * 4096]), 0);
    assert_eq!(count.take(), 2, "a range counts once");

    let mut snapshot = Nbd::must_open(&socket, "demo@a");
    wait_until("the reader is counted", || !cluster.messages("n1", "demo@a").is_empty());
    let mut count = Counter::new(&cluster, "demo@a");
    assert_eq!(snapshot.read(3 * CHUNK, 4096).expect("a read"), vec![1; 4096]);
    assert_eq!(count.take(), 2, "in the store");
    assert_eq!(snapshot.read(40 * CHUNK, 4096).expect("a read"), vec![1; 4096]);
    assert_eq!(count.take(), 4, "on the origin");
}
