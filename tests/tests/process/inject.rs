//! The Nth write or sync of a server fails, or is its last.
//!
//! strace makes the trouble from outside: attached to the binary that ships, it lets a chosen system call fail with EIO or
//! ENOSPC, or kills the process there. It does not see io_uring, so the nodes are configured to make plain system calls;
//! it counts calls of each thread apart, so "the Nth" is the Nth of whichever storage thread gets there first. Half of the
//! points meet a server that serves, half one that takes over.
//!
//! What must hold: the guest sees ENOSPC when space is refused, and no other error; nothing that was acknowledged is lost;
//! snapshots keep what they had; the pool that remains is undamaged. A campaign: `CSNAP_POINTS=500`. The other daemons' turn is in
//! [`super::inject_others`].

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::cluster::{Cluster, Server, changed, number, signal, wait_until};
use super::guest::Story;
use super::strace::{PLAIN_CALLS, Strace};

/// Points between two looks at everything.
const VERIFY_EVERY: u32 = 25;

/// The deepest call of a thread that is hit.
const DEPTH: u32 = 12;

/// No point takes so long, unless strace hangs.
const TRACED_WITHIN: Duration = Duration::from_secs(10);

/// Size of the pool's journal segments: a few dozen records.
const SEGMENT_BYTES: u32 = 256 << 10;

/// Calls that change what is durable.
const CALLS: [&str; 4] = ["pwrite64", "fdatasync", "fsync", "fallocate"];

/// What happens at the call, as strace names it.
const FAULTS: [&str; 3] = ["signal=SIGKILL", "error=EIO", "error=ENOSPC"];

/// One place to fail at.
#[derive(Clone, Copy, Debug)]
struct Point {
    call: &'static str,
    fault: &'static str,
    nth: u32,
    /// The server is hit while it takes over, not while it serves.
    takeover: bool,
}

impl Point {
    /// Walks through all combinations: what changes fastest comes first.
    fn at(index: u32) -> Self {
        let pick = |of: u32, every: u32| (index / every) % of;
        Self {
            fault: FAULTS[pick(3, 1) as usize],
            takeover: pick(2, 3) == 1,
            call: CALLS[pick(4, 6) as usize],
            nth: 1 + pick(DEPTH, 24),
        }
    }
}

/// A cluster whose servers make system calls that strace sees, on a pool with small journal segments: terms end after a
/// few records here, each leaves segments behind, and checkpoints and changes of segments are to be hit too.
fn start() -> Cluster {
    let mut cluster = Cluster::start(2);
    cluster.down();
    let data = cluster.data();
    let pool = std::fs::read_to_string(data.join("pool/pool.toml")).expect("what a pool is");
    for made in ["pool", "lockd1", "n1/state", "n2/state"] {
        std::fs::remove_dir_all(data.join(made)).expect("a directory of `up`");
    }
    std::fs::remove_file(data.join("up.toml")).expect("a file of `up`");
    // A pool that was begun is completed as what it was begun as.
    std::fs::create_dir(data.join("pool")).expect("a directory");
    let begun =
        changed(pool.trim_end(), "segment_bytes = 16777216", &format!("segment_bytes = {SEGMENT_BYTES}"));
    std::fs::write(data.join("pool/pool.creating"), format!("{begun:\n<4096}"))
        .expect("a pool that was begun");
    cluster.configure(&[PLAIN_CALLS]);
    cluster.up();
    cluster
}

/// Who is to be hit: the server that serves, or the one that is next.
fn victim(cluster: &Cluster, server: &Server, takeover: bool) -> u32 {
    if !takeover {
        return server.pid;
    }
    let next = if server.node == "n1" { "n2" } else { "n1" };
    wait_until("a standby is ready", || cluster.node(next)["standby_ready"] == true);
    cluster.pid(next, "server_pid")
}

/// Brings one fault about; whether it struck.
fn strike(cluster: &Cluster, story: &mut Story<'_>, point: Point) -> bool {
    let server = cluster.server();
    let (call, fault, nth) = (point.call, point.fault, point.nth);
    let arguments = ["-e", &format!("trace={call}"), "-e", &format!("inject={call}:{fault}:when={nth}")];
    let (log, victim) = (cluster.scratch().join("strace.log"), victim(cluster, &server, point.takeover));
    let Some(tracer) = Strace::attach(log, &[victim], TRACED_WITHIN, &arguments) else {
        return false;
    };
    if point.takeover {
        signal(server.pid, "KILL");
    }
    let space_refused = point.fault == "error=ENOSPC";
    for _ in 0..=point.nth / 4 {
        story.provoke(space_refused);
        if tracer.ended() {
            break;
        }
    }
    tracer.struck()
}

#[test]
fn no_failing_write_or_sync_of_a_server_loses_anything() {
    let cluster = start();
    let mut story = Story::new(&cluster, 1);
    let began = Instant::now();
    let wanted = number("CSNAP_POINTS", 100);
    let mut struck: BTreeMap<(&str, &str), u32> = BTreeMap::new();
    let (mut total, mut tried) = (0, 0);
    while total < wanted {
        assert!(tried < 10 * wanted + 100, "only {total} of {tried} points were reached");
        let point = Point::at(tried);
        tried += 1;
        if strike(&cluster, &mut story, point) {
            total += 1;
            *struck.entry((point.fault, point.call)).or_default() += 1;
            if total % VERIFY_EVERY == 0 {
                story.verify();
            }
        }
    }
    story.burst(false);
    story.verify();
    let (writes, refused) = (story.stamp, story.refused);
    drop(story);
    let term = cluster.server().term;
    let data = cluster.data();
    let mut cluster = cluster;
    cluster.down();
    let pool = data.join("pool");
    let report = cluster.csnap(&["check", "--pool", pool.to_str().expect("temporary directories are text")]);
    let count =
        |fault: &str| struck.iter().filter(|(at, _)| at.0 == fault).map(|(_, count)| count).sum::<u32>();
    println!(
        "{total} points: {} kills, {} EIO, {} ENOSPC; no acknowledged write lost ({writes} writes, {refused} refused for \
         space, {term} terms, {tried} tries, {:.0} s)\n{struck:?}\n{report}",
        count(FAULTS[0]),
        count(FAULTS[1]),
        count(FAULTS[2]),
        began.elapsed().as_secs_f64(),
    );
}
