//! A file system without a free block under everything that `csnap up` writes: pool, lockd, agents' states, logs.
//!
//! What cannot be taken is refused, and nothing else fails: what was acknowledged is there, snapshots keep their bytes, a
//! server that dies has a successor, deleting gives space back, and the guest writes again.
//!
//! Needs root: the file system is ext4 in a file.

use std::collections::BTreeMap;

use super::cluster::{Cluster, Server, is_alive, signal, wait_until};
use super::disk::Disk;
use super::guest::Story;
use super::nbd::Nbd;

/// Four segments of the journal and lockd's log take half of it.
const DISK_BYTES: u64 = 192 << 20;

/// What the second guest writes at once.
const PIECE_BYTES: u64 = 256 << 10;

/// Its pieces below this one are older than its snapshot: 40 MiB. That is more than the segments of the journal that are to be
/// made anew when space comes back.
const KEPT: u64 = 160;

/// More than there is room for.
const PIECES: u64 = 1024;

/// Killed one after another while nothing is free: as many as there are segments set aside for.
const KILLS: u32 = 2;

/// Bursts of the first guest that write all its blocks, 1 MiB; so often after a snapshot the store is full for certain.
const BURSTS: u32 = 16;
const ROUNDS_MAX: u32 = 16;

const ENOSPC: u32 = 28;

/// A second guest, who fills the disk: a byte for every piece that was acknowledged.
struct Filler {
    disk: Nbd,
    content: BTreeMap<u64, u8>,
}

impl Filler {
    fn start(cluster: &Cluster) -> Self {
        cluster.csnap(&["volume", "create", "filler", "--size", "256M"]);
        let mut disk = Nbd::must_open(&cluster.socket(2), "filler");
        for piece in 0..KEPT {
            assert_eq!(disk.write(piece * PIECE_BYTES, &[1; PIECE_BYTES as usize]), 0);
        }
        cluster.csnap(&["snapshot", "create", "filler@old"]);
        Self { disk, content: (0..KEPT).map(|piece| (piece, 1)).collect() }
    }

    /// Overwrites what the snapshot has, then goes on until there is no more space; whether it is refused.
    fn fill(&mut self) -> bool {
        (0..PIECES).map(|piece| self.write(piece, 2)).any(|error| error == ENOSPC)
    }

    fn write(&mut self, piece: u64, byte: u8) -> u32 {
        let error = self.disk.write(piece * PIECE_BYTES, &[byte; PIECE_BYTES as usize]);
        match error {
            0 => drop(self.content.insert(piece, byte)),
            // Part of it may be written: nothing is promised of it.
            ENOSPC => drop(self.content.remove(&piece)),
            error => panic!("a write failed with {error}"),
        }
        error
    }

    /// What was acknowledged is there, and what the snapshot had.
    fn verify(&mut self, cluster: &Cluster, snapshot_too: bool) {
        assert_eq!(self.disk.flush(), 0, "a flush failed");
        for (&piece, &byte) in &self.content {
            let found = self.disk.read(piece * PIECE_BYTES, PIECE_BYTES as usize).expect("a read");
            assert!(found.iter().all(|&found| found == byte), "piece {piece} is not what was acknowledged");
        }
        if snapshot_too {
            let mut snapshot = Nbd::must_open(&cluster.socket(1), "filler@old");
            for piece in 0..KEPT {
                let found = snapshot.read(piece * PIECE_BYTES, PIECE_BYTES as usize).expect("a read");
                assert!(found.iter().all(|&byte| byte == 1), "the snapshot changed in piece {piece}");
            }
        }
    }
}

fn successor(cluster: &Cluster, of: &Server) -> Server {
    let mut next = of.clone();
    wait_until("another server serves", || {
        next = cluster.server();
        next.pid != of.pid
    });
    assert!(next.term > of.term, "terms only grow: {of:?} then {next:?}");
    next
}

/// Space comes back, and with it the guest's writes.
fn writes_again(story: &mut Story<'_>) {
    wait_until("the guest can write again", || {
        let before = story.refused;
        story.burst(true);
        story.refused == before
    });
}

#[test]
fn a_full_file_system_refuses_writes_and_nothing_else() {
    let cluster = Cluster::start_on_disk(2, DISK_BYTES);
    let disk: &Disk = cluster.disk();
    let mut story = Story::new(&cluster, 1);
    story.fill();
    story.snapshot();
    let mut filler = Filler::start(&cluster);
    wait_until("what failing over needs is set aside", || {
        let pool = cluster.data().join("pool/term/1");
        pool.join("next-1").exists() && pool.join("../room-3").exists()
    });
    wait_until("a standby is ready", || {
        ["n1", "n2"].iter().any(|node| cluster.node(node)["standby_ready"] == true)
    });
    assert!(filler.fill(), "the disk is full");
    disk.take_all("ballast");
    let stays = [cluster.lockd(), cluster.pid("n1", "agent_pid"), cluster.pid("n2", "agent_pid")];
    // The first write of each block after a snapshot needs space in the store, where some is left over at first. What is
    // refused changes nothing; a snapshot is a record, for which there is room.
    for _ in 0..ROUNDS_MAX {
        story.snapshot();
        (0..BURSTS).for_each(|_| story.burst(true));
        if story.refused > 0 {
            break;
        }
    }
    assert!(story.refused > 0, "the store took more than there is");
    story.verify();
    filler.verify(&cluster, true);

    let image = cluster.scratch().join("new");
    std::fs::write(&image, vec![7; 8 << 20]).expect("an image");
    for create in [
        &["volume", "create", "new", "--from", image.to_str().expect("text")][..],
        &["volume", "create", "new", "--size", "9000000T"],
    ] {
        println!("{create:?}: {}", cluster.refused(1, create).trim_end());
    }
    wait_until("nothing is left of it", || !cluster.csnap(&["volume", "list"]).contains("new"));

    for kill in 1..=KILLS {
        let server = cluster.server();
        signal(server.pid, "KILL");
        let next = successor(&cluster, &server);
        story.burst(true);
        story.verify();
        filler.verify(&cluster, true);
        println!("kill {kill} while nothing is free: term {} follows {}", next.term, server.term);
    }
    let (written, refused) = (story.stamp, story.refused);

    cluster.csnap(&["snapshot", "delete", "filler@old"]);
    writes_again(&mut story);
    story.snapshot();
    writes_again(&mut story);
    story.verify();
    filler.verify(&cluster, false);
    let server = cluster.server();
    signal(server.pid, "KILL");
    successor(&cluster, &server);
    writes_again(&mut story);
    story.verify();
    let still = [cluster.lockd(), cluster.pid("n1", "agent_pid"), cluster.pid("n2", "agent_pid")];
    assert_eq!(still, stays, "neither lockd nor an agent ended");
    assert!(stays.iter().all(|pid| is_alive(*pid)));

    disk.give_back("ballast");
    for log in ["lockd1/log", "n1/log", "n2/log"] {
        assert!(std::fs::read_to_string(cluster.data().join(log)).is_ok_and(|log| !log.is_empty()), "{log}");
    }
    println!("{written} writes before space came back, {refused} of them refused; nothing else failed");
    drop((story, filler));
    let mut cluster = cluster;
    cluster.down();
    let pool = cluster.data().join("pool");
    println!("{}", cluster.csnap(&["check", "--pool", pool.to_str().expect("text")]));
}
