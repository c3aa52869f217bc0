//! The whole story of a snapshot: filled, taken during writes, overwritten, read again and again, deleted.

use std::time::Duration;

use super::cluster::{Cluster, wait_until};
use super::nbd::Nbd;
use super::writer::Writer;

const BLOCKS: u64 = 8192;

fn used(cluster: &Cluster) -> u64 {
    cluster.status()["pool"]["used_bytes"].as_u64().expect("used bytes")
}

/// Space that the store takes on disk.
fn store_on_disk(cluster: &Cluster) -> u64 {
    let store = cluster.data().join("pool/store");
    let output = std::process::Command::new("du").args(["-sk"]).arg(store).output().expect("du");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace().next().and_then(|kib| kib.parse().ok()).unwrap_or(0)
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
    let (before, on_disk_before) = (used(&cluster), store_on_disk(&cluster));

    let guest = Writer::start(&socket, "demo", BLOCKS);
    guest.wait_for(500);
    cluster.csnap(&["snapshot", "create", "demo@a"]);
    let mut snapshot = Nbd::must_open(&socket, "demo@a");
    let first = snapshot.read(0, BLOCKS as usize * 4096).expect("a read of the whole snapshot");
    for _ in 0..5 {
        guest.wait_for(1000);
        let again = snapshot.read(0, BLOCKS as usize * 4096).expect("a read of the whole snapshot");
        assert!(again == first, "the snapshot changed");
    }
    assert!(used(&cluster) > before, "what was overwritten is kept");
    let refused = cluster.refused(1, &["snapshot", "delete", "demo@a"]);
    assert!(refused.contains("n1"), "names its reader: {refused}");
    drop(snapshot);
    wait_until("its reader is gone", || cluster.run(&["snapshot", "delete", "demo@a"]).status.success());
    guest.stop_and_verify();
    wait_until("the space is back", || used(&cluster).abs_diff(before) * 100 <= before);
    let began = std::time::Instant::now();
    wait_until("the file system has it back", || store_on_disk(&cluster) <= on_disk_before + 64);
    assert!(began.elapsed() < Duration::from_secs(60));
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
