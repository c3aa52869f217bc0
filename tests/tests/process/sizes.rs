//! Sizes at the edge of what a file system takes: almost all of it works as any other size, and beyond it is one clear line.

use std::path::{Path, PathBuf};

use super::cluster::Cluster;
use super::nbd::Nbd;

const BLOCK: u64 = 4096;
const LARGE: u64 = 15 << 40;

/// Whether the file system of `directory` takes a sparse file of so many bytes.
fn takes(directory: &Path, bytes: u64) -> bool {
    let path = directory.join("probe");
    let file = std::fs::File::create(&path).expect("a file");
    let takes = file.set_len(bytes).is_ok();
    std::fs::remove_file(&path).expect("it is ours");
    takes
}

fn heads(cluster: &Cluster) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(cluster.data().join("pool/head")).expect("heads");
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    paths
}

#[test]
fn fifteen_tebibytes_are_a_volume_as_any_other() {
    let cluster = Cluster::start(1);
    assert!(
        takes(cluster.scratch(), LARGE),
        "the file system of {} takes no file of 15 TiB: let TMPDIR be on one that does, such as ext4 with blocks of 4 KiB",
        cluster.scratch().display()
    );
    cluster.csnap(&["volume", "create", "large", "--size", "15T"]);
    let socket = cluster.socket(1);
    let mut disk = Nbd::must_open(&socket, "large");
    let places = [0, LARGE / 2, LARGE - BLOCK];
    for (place, value) in places.iter().zip(1..) {
        assert_eq!(disk.write(*place, &[value; 4096]), 0);
    }
    cluster.csnap(&["snapshot", "create", "large@a", "large@b"]);
    for place in places {
        assert_eq!(disk.write(place, &[9; 4096]), 0);
    }
    assert_ne!(disk.write(LARGE, &[9; 4096]), 0, "beyond the end");
    let mut snapshot = Nbd::must_open(&socket, "large@a");
    for (place, value) in places.iter().zip(1..) {
        assert_eq!(snapshot.read(*place, 4096).expect("a read"), vec![value; 4096]);
        assert_eq!(disk.read(*place, 4096).expect("a read"), vec![9; 4096]);
    }
    assert_eq!(snapshot.read(LARGE / 4, 4096).expect("a read"), vec![0; 4096], "never written");
    drop((disk, snapshot));

    let status = cluster.status();
    let volumes = status["volumes"].as_array().expect("volumes");
    let large = volumes.iter().find(|volume| volume["name"] == "large").expect("it is there");
    assert_eq!((large["size_bytes"].as_u64(), large["snapshots"].as_u64()), (Some(LARGE), Some(2)));
    assert_eq!(status["server"]["snapshot_creates"]["count"], 2, "creates are timed");
    assert!(status["pool"]["used_bytes"].as_u64() < Some(1 << 30), "it is sparse");
}

#[test]
fn a_size_beyond_the_file_system_is_one_clear_line_and_leaves_nothing() {
    let probed = tempfile::Builder::new().prefix("csnap-").tempdir().expect("a temporary directory");
    let beyond = (40..63).map(|shift| 1 << shift).find(|bytes| !takes(probed.path(), *bytes));
    let (cluster, bytes) = beyond.map_or_else(
        || {
            println!(
                "this file system takes every size that a volume can have: a limit of the process refuses"
            );
            (Cluster::start_with_file_size(1, LARGE), 2 * LARGE)
        },
        |bytes| (Cluster::start(1), bytes),
    );
    let before = heads(&cluster);
    let line = cluster.refused(1, &["volume", "create", "huge", "--size", &bytes.to_string()]);
    println!("{line}");
    assert!(line.contains(&bytes.to_string()) && line.contains("smaller"), "what, and what to do: {line}");
    assert_eq!(heads(&cluster), before, "no head is left");
    cluster.refused(1, &["volume", "show", "huge"]);
    cluster.csnap(&["volume", "create", "huge", "--size", "1M"]);
}
