//! A cold cache and a slow disk: requests that need the disk do not hold up the others of their connection.
//!
//! strace lets the exporter's calls to the head wait, as a slow disk would. Order is what is checked, not time: a request
//! that is sent after a slow one is answered before it. When strace lets go, the slow one ends at once.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use super::cluster::Cluster;
use super::nbd::{FLUSH, Nbd, READ, WRITE};
use super::strace::Strace;

/// Where the cold data lies: far from everything that is read ahead of it.
const FAR: u64 = 512 << 20;
const BLOCK: u32 = 4096;

/// A call that waits so long has not ended before the test let it.
const FOREVER: &str = "delay_enter=120s";

/// No case takes so long, unless strace hangs.
const TRACED_WITHIN: Duration = Duration::from_secs(60);

struct Slow {
    cluster: Cluster,
    disk: Nbd,
}

impl Slow {
    fn new() -> Self {
        let cluster = Cluster::start(1);
        let mut disk = Nbd::must_open(&cluster.socket(1), "demo");
        for offset in [0, FAR] {
            assert_eq!(disk.write(offset, &[3; 16 * BLOCK as usize]), 0);
        }
        assert_eq!(disk.flush(), 0);
        Self { cluster, disk }
    }

    fn head(&self) -> PathBuf {
        self.cluster.data().join("pool/head/00000001-00000000")
    }

    /// From now on these calls to the head take as long as `how` says.
    fn delay(&self, calls: &str, how: &str) -> Strace {
        let head = self.head();
        let (trace, inject) = (format!("trace={calls},preadv2"), format!("inject={calls}:{how}"));
        let head = head.to_str().expect("temporary directories are text");
        let arguments = ["-P", head, "-e", &trace, "-e", &inject];
        let exporter = self.cluster.pid("n1", "export_pid");
        let log = self.cluster.scratch().join("slow.log");
        Strace::attach(log, &[exporter], TRACED_WITHIN, &arguments).expect("it lives")
    }

    fn read(&mut self, offset: u64) -> u64 {
        self.disk.send(READ, offset, BLOCK, &[])
    }

    fn write(&mut self, offset: u64) -> u64 {
        self.disk.send(WRITE, offset, BLOCK, &[4; BLOCK as usize])
    }

    /// The next answer is to this request, and good.
    fn answered(&mut self, request: u64, what: &str) {
        assert_eq!(self.disk.reply(), (request, 0), "{what}");
    }

    fn answered_read(&mut self, request: u64, what: &str) {
        self.answered(request, what);
        assert_eq!(self.disk.data(BLOCK as usize).len(), BLOCK as usize);
    }
}

#[test]
fn a_read_that_waits_for_the_disk_holds_up_nothing_else() {
    let mut slow = Slow::new();
    let head = format!("of={}", slow.head().display());
    let dropped = ["oflag=nocache", "conv=notrunc,fdatasync", "count=0", "if=/dev/null"];
    assert!(Command::new("dd").arg(head).args(dropped).output().expect("dd").status.success());
    // Warm again where the other requests go.
    slow.disk.read(0, BLOCK as usize).expect("a read");
    let trace = slow.delay("pread64", FOREVER);
    let cold = slow.read(FAR);
    let (warm, written, flushed) = (slow.read(0), slow.write(BLOCK.into()), slow.disk.send(FLUSH, 0, 0, &[]));
    for _ in 0..3 {
        let (cookie, error) = slow.disk.reply();
        assert_eq!(error, 0);
        assert_ne!(cookie, cold, "the cold read is answered last");
        if cookie == warm {
            slow.disk.data(BLOCK as usize);
        } else {
            assert!(cookie == written || cookie == flushed);
        }
    }
    let log = trace.detach();
    assert!(log.contains("EAGAIN"), "the data was not cold: {log}");
    slow.answered_read(cold, "and then the cold read");
}

#[test]
fn a_flush_that_waits_for_the_disk_holds_up_nothing_else() {
    let mut slow = Slow::new();
    assert_eq!(slow.disk.write(0, &[5; BLOCK as usize]), 0);
    let trace = slow.delay("fdatasync", FOREVER);
    let flushed = slow.disk.send(FLUSH, 0, 0, &[]);
    let written = slow.write(BLOCK.into());
    slow.answered(written, "a write");
    let read = slow.read(0);
    slow.answered_read(read, "a read");
    trace.detach();
    slow.answered(flushed, "and then the flush");
}

#[test]
fn once_a_write_was_slow_the_next_ones_hold_up_nothing_else() {
    let mut slow = Slow::new();
    // Nobody can know beforehand that a write into the page cache will wait; the first one shows it. The slower it is, the
    // longer nothing is tried at once.
    let trace = slow.delay("pwrite64", "delay_enter=1s");
    let first = slow.write(0);
    slow.answered(first, "a write that shows how slow the disk is");
    for turn in 0..3 {
        let written = slow.write(u64::from(BLOCK) * turn);
        let read = slow.read(u64::from(BLOCK) * 8);
        slow.answered_read(read, "a read that was sent after a slow write");
        slow.answered(written, "and then the write");
    }
    trace.detach();
}
