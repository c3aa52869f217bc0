//! The whole story of a snapshot: filled, taken during writes, overwritten, read again and again, deleted.

use std::time::{Duration, Instant};

use super::clients::{must, path};
use super::cluster::{Cluster, wait_until};
use super::failover::Fio;
use super::nbd::Nbd;
use super::writer::Writer;

const BLOCKS: u64 = 8192;

/// How often a snapshot is read again.
const READS: u32 = 5;

fn used(cluster: &Cluster) -> u64 {
    cluster.status()["pool"]["used_bytes"].as_u64().expect("used bytes")
}

/// Space that the store takes on disk, KiB.
fn store_on_disk(cluster: &Cluster) -> u64 {
    let text = must("du", &["-sk", path(&cluster.data().join("pool/store"))]);
    text.split_whitespace().next().and_then(|kib| kib.parse().ok()).expect("du prints a number")
}

/// What a snapshot took of the pool: looked at before, during and after its life.
struct Space {
    used: u64,
    store_kib: u64,
    during: (u64, u64),
}

impl Space {
    /// Before the snapshot is made.
    fn look(cluster: &Cluster) -> Self {
        Self { used: used(cluster), store_kib: store_on_disk(cluster), during: (0, 0) }
    }

    /// While the snapshot lives, and what was overwritten is kept.
    fn look_during(&mut self, cluster: &Cluster) {
        self.during = (used(cluster), store_on_disk(cluster));
        assert!(self.during.0 > self.used && self.during.1 > self.store_kib, "what was overwritten is kept");
    }

    /// The snapshot was just deleted: its space comes back, in `status` and on disk.
    fn must_come_back(&self, cluster: &Cluster) {
        let deleted = Instant::now();
        wait_until("the space is back", || used(cluster).abs_diff(self.used) * 100 <= self.used);
        let after = used(cluster);
        wait_until("the file system has it back", || store_on_disk(cluster) <= self.store_kib + 64);
        let followed = deleted.elapsed();
        println!(
            "used bytes {} before, {} during, {after} after: {:.3} % off; du of the store {} KiB before, {} during, {} after, \
             {:.2} s after the delete",
            self.used,
            self.during.0,
            after.abs_diff(self.used) as f64 * 100.0 / self.used as f64,
            self.store_kib,
            self.during.1,
            store_on_disk(cluster),
            followed.as_secs_f64(),
        );
        assert!(followed < Duration::from_secs(60), "du follows within a minute");
    }
}

#[test]
fn a_snapshot_never_changes_and_its_space_comes_back() {
    let cluster = Cluster::start(1);
    let socket = cluster.socket(1);
    let mut disk = Nbd::must_open(&socket, "demo");
    for block in 0..BLOCKS / 64 {
        assert_eq!(disk.write(block * 64 * 4096, &vec![5; 64 * 4096]), 0);
    }
    assert_eq!(disk.flush(), 0);
    drop(disk);
    let mut space = Space::look(&cluster);

    let guest = Writer::start(&socket, "demo", BLOCKS);
    guest.wait_for(500);
    cluster.csnap(&["snapshot", "create", "demo@a"]);
    let mut snapshot = Nbd::must_open(&socket, "demo@a");
    let first = snapshot.read(0, BLOCKS as usize * 4096).expect("a read of the whole snapshot");
    for _ in 0..READS {
        guest.wait_for(1000);
        let again = snapshot.read(0, BLOCKS as usize * 4096).expect("a read of the whole snapshot");
        assert!(again == first, "the snapshot changed");
    }
    println!("{READS} reads of the whole snapshot, {} writes meanwhile: no difference", guest.writes());
    space.look_during(&cluster);
    let refused = cluster.refused(1, &["snapshot", "delete", "demo@a"]);
    assert!(refused.contains("n1"), "names its reader: {refused}");
    drop(snapshot);
    wait_until("its reader is gone", || cluster.run(&["snapshot", "delete", "demo@a"]).status.success());
    space.must_come_back(&cluster);
    guest.stop_and_verify();
}

/// Bytes that a file takes on disk.
fn data_bytes(file: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(file).expect("it is there").blocks() * 512
}

#[test]
fn the_first_five_minutes_of_a_user() {
    let cluster = Cluster::start(1);
    let uri = |export: &str| format!("nbd://{}/{export}", cluster.tcp());
    let file = |name: &str| cluster.scratch().join(name);
    let (image, back, first, again) = (file("image"), file("back"), file("first"), file("again"));

    let info: serde_json::Value =
        serde_json::from_str(&must("nbdinfo", &["--json", &uri("demo")])).expect("JSON");
    assert_eq!(info["exports"][0]["export-size"], 1 << 30);
    must("truncate", &["-s", "1G", path(&image)]);
    must("mkfs.ext4", &["-q", "-F", "-d", "/usr/share/doc", path(&image)]);
    must("nbdcopy", &[path(&image), &uri("demo")]);
    must("nbdcopy", &[&uri("demo"), path(&back)]);
    must("cmp", &[path(&image), path(&back)]);
    let copied = std::fs::metadata(&back).expect("it is there").len();
    println!(
        "an ext4 image of {copied} bytes ({} of data) copied in and out: no difference",
        data_bytes(&image)
    );
    let script = ["-c", "write -P 0x5a 0 64M", "-c", "flush", "-c", "read -P 0x5a 0 64M"];
    let output = must("qemu-io", &[&["-f", "raw"][..], &script, &[&uri("demo")]].concat());
    assert!(!output.contains("verification failed"), "{output}");

    let mut space = Space::look(&cluster);
    let fio = Fio::start_at(&cluster, &uri("demo"), "64M");
    wait_until("fio writes", || {
        let clients = cluster.status()["clients"].take();
        clients.as_array().into_iter().flatten().any(|client| client["volume"] == "demo")
    });
    cluster.csnap(&["snapshot", "create", "demo@a"]);
    must("nbdcopy", &[&uri("demo@a"), path(&first)]);
    let mut store = store_on_disk(&cluster);
    for _ in 0..READS {
        // More of the head is overwritten each time, until nothing of it is the snapshot's any more.
        wait_until("fio overwrites the head", || store_on_disk(&cluster) > store || store > 48 << 10);
        store = store_on_disk(&cluster);
        must("nbdcopy", &[&uri("demo@a"), path(&again)]);
        must("cmp", &[path(&first), path(&again)]);
    }
    println!(
        "{READS} more copies of the snapshot, {copied} bytes each, while fio overwrote the head: no difference"
    );
    space.look_during(&cluster);
    wait_until("its reader is gone", || cluster.run(&["snapshot", "delete", "demo@a"]).status.success());
    space.must_come_back(&cluster);
    fio.verified();
}

#[test]
fn a_forced_delete_gives_its_readers_errors_and_nobody_else() {
    let cluster = Cluster::start(1);
    let socket = cluster.socket(1);
    let mut disk = Nbd::must_open(&socket, "demo");
    assert_eq!(disk.write(0, &[1; 4096]), 0);
    cluster.csnap(&["snapshot", "create", "demo@a", "demo@b"]);
    let (mut a, mut b) = (Nbd::must_open(&socket, "demo@a"), Nbd::must_open(&socket, "demo@b"));
    assert_eq!(disk.write(0, &[2; 4096]), 0);
    cluster.csnap(&["snapshot", "delete", "--force", "demo@a"]);
    wait_until("its reader gets errors", || a.read(0, 4096) == Err(5));
    assert_eq!(b.read(0, 4096), Ok(vec![1; 4096]));
    assert_eq!(disk.read(0, 4096), Ok(vec![2; 4096]));
}

#[test]
fn an_adopted_image_is_used_where_it_lies_and_left_alone() {
    let cluster = Cluster::start(1);
    let image = cluster.scratch().join("image");
    std::fs::write(&image, vec![3; 1 << 20]).expect("an image");
    let path = image.to_str().expect("text");
    cluster.csnap(&["volume", "create", "old", "--origin", path]);
    cluster.refused(1, &["volume", "create", "again", "--origin", path]);
    let mut disk = Nbd::must_open(&cluster.socket(1), "old");
    assert_eq!(disk.size_bytes, 1 << 20);
    assert_eq!(disk.write(4096, &[4; 4096]), 0);
    assert_eq!(disk.flush(), 0);
    drop(disk);
    wait_until("it can be deleted", || cluster.run(&["volume", "delete", "old"]).status.success());
    let content = std::fs::read(&image).expect("it is still there");
    assert!(content.len() == 1 << 20 && content[4096] == 4 && content[0] == 3);
}

#[test]
fn an_import_is_byte_identical() {
    let cluster = Cluster::start(1);
    let image = cluster.scratch().join("image");
    let content: Vec<u8> =
        (0..(5 << 20) + 1000u32).map(|i| if i % 70_000 < 9000 { (i >> 3) as u8 } else { 0 }).collect();
    std::fs::write(&image, &content).expect("an image");
    cluster.csnap(&["volume", "create", "copy", "--from", image.to_str().expect("text")]);
    let mut disk = Nbd::must_open(&cluster.socket(1), "copy");
    assert!(disk.size_bytes >= content.len() as u64);
    let read = disk.read(0, content.len()).expect("a read");
    assert!(read == content);
}
