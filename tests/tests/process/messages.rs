//! What each request costs in messages, as `status` counts them.
//!
//! Status may show the counts of a moment ago. So counts are waited for, by name and exactly, and every silence is followed
//! by something that costs a known number of messages: a message too many in between would be in that sum.

use std::collections::BTreeMap;

use super::cluster::{Cluster, wait_until};
use super::nbd::Nbd;

const CHUNK: u64 = 4096;

/// What belongs to the session, to time and to snapshots, and to no request.
const APART: [&str; 7] =
    ["Identify", "IdentifyOk", "Renew", "Renewed", "SnapshotAdvice", "SnapshotAdviceOk", "Resume"];

/// Messages of one client, and what they must have come to.
struct Counter<'a> {
    cluster: &'a Cluster,
    client: &'static str,
    expected: BTreeMap<&'static str, u64>,
}

impl<'a> Counter<'a> {
    fn new(cluster: &'a Cluster, client: &'static str) -> Self {
        Self { cluster, client, expected: BTreeMap::new() }
    }

    /// All of them, as status has them now.
    fn all(&self) -> BTreeMap<String, u64> {
        self.cluster.messages("n1", self.client)
    }

    /// Something was asked that costs these messages, and no other.
    fn costs(&mut self, asked: &str, messages: &[&'static str]) {
        println!("{:<52} {} messages {messages:?}", format!("{}: {asked}", self.client), messages.len());
        for name in messages {
            *self.expected.entry(name).or_default() += 1;
        }
        wait_until(&format!("{asked}: {:?} and no more", self.expected), || {
            let mut now = self.all();
            now.retain(|name, _| !APART.contains(&name.as_str()));
            for (name, count) in &now {
                let expected = self.expected.get(name.as_str()).copied().unwrap_or(0);
                assert!(*count <= expected, "{asked}: {count} {name} instead of {expected}");
            }
            now.iter().map(|(name, count)| (name.as_str(), *count)).eq(self.expected.clone())
        });
    }

    /// Waits until a message of those apart was counted so often.
    fn wait_for(&self, name: &str, count: u64) {
        wait_until(&format!("{count} {name}"), || self.all().get(name).is_some_and(|now| *now >= count));
    }

    fn print(&self) {
        let (apart, rest): (Vec<_>, Vec<_>) =
            self.all().into_iter().partition(|(name, _)| APART.contains(&name.as_str()));
        println!("{}: of requests {rest:?}; apart {apart:?}", self.client);
    }
}

/// A first write and its answer.
const FIRST_WRITE: [&str; 2] = ["QueryWrite", "WriteOk"];

#[test]
fn steady_states_are_silent_and_the_rest_costs_what_the_design_says() {
    let cluster = Cluster::start(1);
    let socket = cluster.socket(1);
    let mut disk = Nbd::must_open(&socket, "demo");
    let mut count = Counter::new(&cluster, "demo");
    count.wait_for("IdentifyOk", 1);

    for chunk in 0..64 {
        assert_eq!(disk.write(chunk * CHUNK, &[1; 4096]), 0);
    }
    disk.read(0, 1 << 16).expect("a read");
    cluster.csnap(&["snapshot", "create", "demo@a"]);
    // Counted after all that was asked before the snapshot.
    count.wait_for("SnapshotAdviceOk", 1);
    count.costs("64 writes and a read, no snapshot", &[]);

    let mut write = |first: u64, chunks: usize| {
        assert_eq!(disk.write(first * CHUNK, &vec![2; chunks * 4096]), 0);
    };
    write(3, 1);
    count.costs("a first write after a snapshot", &FIRST_WRITE);
    write(3, 1);
    count.costs("a rewrite", &[]);
    write(8, 8);
    count.costs("a first write of a range of 8 chunks", &FIRST_WRITE);
    // 3 and 8 to 15 are unique: three ranges are not.
    write(0, 20);
    count.costs("a first write of three ranges around unique ones", &FIRST_WRITE);
    write(0, 20);
    count.costs("a rewrite of them", &[]);
    disk.read(0, 1 << 18).expect("a read");
    count.costs("a read of the head, rewritten and not", &[]);
    assert_eq!(disk.write(63 * CHUNK, &[2; 4096]), 0);
    count.costs("a first write, which counts the silence before it", &FIRST_WRITE);

    let mut snapshot = Nbd::must_open(&socket, "demo@a");
    let mut reader = Counter::new(&cluster, "demo@a");
    reader.wait_for("IdentifyOk", 1);
    assert_eq!(snapshot.read(3 * CHUNK, 4096).expect("a read"), vec![1; 4096]);
    reader.costs("a read of a snapshot, in the store", &["QuerySnapshotRead", "SnapshotReadOk"]);
    assert_eq!(snapshot.read(40 * CHUNK, 4096).expect("a read"), vec![1; 4096]);
    reader.costs(
        "a read of a snapshot, on the origin",
        &["QuerySnapshotRead", "SnapshotReadOriginOk", "FinishSnapshotRead", "FinishSnapshotReadOk"],
    );

    for name in ["Renew", "Renewed"] {
        count.wait_for(name, 1);
        reader.wait_for(name, 1);
    }
    count.costs("renewing alone", &[]);
    let all = count.all();
    assert_eq!((all.get("SnapshotAdvice"), all.get("SnapshotAdviceOk")), (Some(&1), Some(&1)), "{all:?}");
    count.print();
    reader.print();
}
