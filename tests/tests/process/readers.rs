//! A snapshot reader that stops anywhere in a read delays nobody, and returns the snapshot's bytes when it goes on.
//!
//! A read of a chunk that is still on the origin takes four messages; between the second and the third the reader reads the
//! head. strace stops the reading exporter when it has received the second, and when it has read the head.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::cluster::{Cluster, is_stopped, signal, wait_until};
use super::nbd::{Nbd, READ};
use super::strace::{ESTABLISHED, Strace, tcp_sockets};
use super::writer::{Writer, ms};

/// Blocks of the volume that are written and read: 1 MiB, so that the guest soon overwrites all of it.
const BLOCKS: u64 = 256;
const BYTES: usize = BLOCKS as usize * 4096;

/// No case takes so long, unless strace hangs.
const TRACED_WITHIN: Duration = Duration::from_secs(60);

/// How often a reader is frozen at any moment.
const FREEZES: u32 = 5;

/// Two nodes: the guest writes at the first, the snapshot is read at the second. What the snapshot holds.
fn start() -> (Cluster, Vec<u8>) {
    let cluster = Cluster::start(2);
    let mut disk = Nbd::must_open(&cluster.socket(1), "demo");
    let content: Vec<u8> = (0..BYTES).map(|i| (i / 4096) as u8 ^ (i % 251) as u8 | 1).collect();
    assert_eq!(disk.write(0, &content), 0);
    drop(disk);
    wait_until("the volume is free", || Nbd::open(&cluster.socket(1), "demo").is_ok());
    cluster.csnap(&["snapshot", "create", "demo@a"]);
    (cluster, content)
}

/// Kills the server and waits for the next one.
fn replace_server(cluster: &Cluster) {
    let server = cluster.server();
    signal(server.pid, "KILL");
    wait_until("another server serves", || cluster.server().term > server.term);
}

/// Lets something happen, and this many writes of the guest be done, none of which waits for the reader: it is frozen all
/// the time. The guest's longest stall.
fn write_beside(guest: &Writer, frozen: u32, writes: u64, happens: impl FnOnce()) -> Duration {
    guest.take_stall();
    happens();
    guest.wait_for(writes);
    assert!(is_stopped(frozen), "the writes were done while the reader was frozen");
    guest.take_stall()
}

/// Stops the reading exporter in the first of these calls to one of these files, in the middle of a read of the whole
/// snapshot; lets the guest overwrite all of it, over a failover if so wished; lets the reader go on, which has to ask
/// again.
fn freeze_in_a_read(
    case: &str,
    calls: &str,
    failover: bool,
    files: impl FnOnce(&Cluster, u32) -> Vec<String>,
) {
    let (cluster, content) = start();
    let mut reader = Nbd::must_open(&cluster.socket(2), "demo@a");
    let exporter = cluster.pid("n2", "export_pid");
    let (trace, inject) = (format!("trace={calls}"), format!("inject={calls}:signal=SIGSTOP:when=1"));
    let files = files(&cluster, exporter);
    let mut arguments = vec!["-e", &trace, "-e", &inject];
    arguments.extend(files.iter().flat_map(|file| ["-P", file]));
    let log = cluster.scratch().join("reader.log");
    let trap = Strace::attach(log, &[exporter], TRACED_WITHIN, &arguments).expect("it lives");
    reader.send(READ, 0, u32::try_from(BYTES).expect("a megabyte"), &[]);
    wait_until("the reader is stopped", || trap.has_stopped());
    trap.detach();
    assert!(is_stopped(exporter), "it stays frozen");

    // Its mark is on every block that the guest now writes.
    let guest = Writer::start(&cluster.socket(1), "demo", BLOCKS);
    let mut stall = write_beside(&guest, exporter, 2 * BLOCKS, || {});
    let mut figures = String::new();
    if failover {
        let stall = write_beside(&guest, exporter, 2 * BLOCKS, || replace_server(&cluster));
        figures = format!(", over the failover {}", ms(stall));
    }
    let snapshot = || drop(cluster.csnap(&["snapshot", "create", "demo@b"]));
    stall = stall.max(write_beside(&guest, exporter, 2 * BLOCKS, snapshot));
    let beside = guest.writes();

    signal(exporter, "CONT");
    assert_eq!(reader.reply().1, 0, "the read succeeds");
    assert!(reader.data(BYTES) == content, "thawed, it returns the snapshot's bytes");
    guest.stop_and_verify();
    // Status may have the counts of a moment ago.
    let asked = || cluster.messages("n2", "demo@a").get("QuerySnapshotRead").copied().unwrap_or(0);
    wait_until("it has asked again: what it had read of the origin is of no use", || asked() > 1);
    println!(
        "{case}: {beside} writes done while it was frozen, longest stall {}{figures}; {} queries asked again",
        ms(stall),
        asked() - 1,
    );
}

/// The calls in which a message of the server's arrives at an exporter.
const RECEIVE: &str = "recvfrom,recvmsg,read,readv";

fn connections_to_the_server(_: &Cluster, exporter: u32) -> Vec<String> {
    let established = tcp_sockets(exporter, ESTABLISHED).into_iter();
    established.map(|(_, inode)| format!("socket:[{inode}]")).collect()
}

#[test]
fn a_reader_frozen_with_message_2_in_hand_delays_no_writer_and_returns_the_snapshot() {
    // When it goes on, it reads an origin on which nothing of the snapshot is left, and its server is gone.
    freeze_in_a_read("message 2 in hand, failover", RECEIVE, true, connections_to_the_server);
}

#[test]
fn a_reader_whose_marks_were_broken_while_it_was_frozen_reads_again() {
    freeze_in_a_read("message 2 in hand", RECEIVE, false, connections_to_the_server);
}

#[test]
fn a_reader_frozen_before_message_3_delays_no_writer_and_returns_the_snapshot() {
    let calls = "pread64,preadv,preadv2";
    freeze_in_a_read("before message 3, failover", calls, true, |cluster, _| {
        let head = cluster.data().join("pool/head/00000001-00000000");
        vec![head.to_str().expect("temporary directories are text").to_owned()]
    });
}

#[test]
fn a_reader_frozen_at_any_moment_under_load_returns_the_snapshot() {
    let (cluster, content) = start();
    let mut reader = Nbd::must_open(&cluster.socket(2), "demo@a");
    let exporter = cluster.pid("n2", "export_pid");
    let guest = Writer::start(&cluster.socket(1), "demo", BLOCKS);
    let over = Arc::<AtomicBool>::default();
    let told = over.clone();
    let reading = std::thread::spawn(move || {
        let mut reads = 0;
        while !told.load(Ordering::Relaxed) {
            let read = reader.read(0, BYTES).expect("a read of the whole snapshot");
            assert!(read == content, "the snapshot changed");
            reads += 1;
        }
        reads
    });
    let (mut stall, mut failover_stall, mut beside) = (Duration::ZERO, Duration::ZERO, 0);
    for turn in 0..FREEZES {
        // What is on the origin and what is in the store of younger snapshots changes all the time.
        cluster.csnap(&["snapshot", "create", &format!("demo@r{turn}")]);
        guest.wait_for(u64::from(turn * 37));
        signal(exporter, "STOP");
        let before = guest.writes();
        stall = stall.max(write_beside(&guest, exporter, BLOCKS, || {}));
        let failover = || replace_server(&cluster);
        failover_stall = failover_stall.max(write_beside(&guest, exporter, BLOCKS, failover));
        beside += guest.writes() - before;
        signal(exporter, "CONT");
    }
    over.store(true, Ordering::Relaxed);
    let reads = reading.join().expect("every read was of the snapshot");
    println!(
        "any moment: {reads} reads of the snapshot, {FREEZES} freezes with a failover each; {beside} writes done while it \
         was frozen, longest stall {}, over a failover {}",
        ms(stall),
        ms(failover_stall)
    );
    guest.stop_and_verify();
}
