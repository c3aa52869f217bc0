//! The Nth write or sync of a server fails, or is its last.
//!
//! strace makes the trouble from outside: attached to the binary that ships, it lets a chosen system call fail with EIO or
//! ENOSPC, or kills the process there. It does not see io_uring, so the nodes are configured to make plain system calls;
//! it counts calls of each thread apart, so "the Nth" is the Nth of whichever storage thread gets there first. Half of the
//! points meet a server that serves, half one that takes over.
//!
//! What must hold: the guest sees ENOSPC when space is refused, and no other error; nothing that was acknowledged is lost;
//! snapshots keep what they had; the pool that remains is undamaged. A campaign: `CSNAP_POINTS=500`.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::cluster::{Cluster, Server, is_alive, number, signal, wait_until};
use super::nbd::{Nbd, WRITE};
use super::writer::stamped;

/// Blocks that the guest writes: few, so that each is superseded by most snapshots.
const BLOCKS: u64 = 256;
const BLOCK_BYTES: u64 = 4096;

/// Writes in flight together.
const BURST: u64 = 16;

/// Snapshots that live at once; older ones are deleted.
const SNAPSHOTS: usize = 4;

/// Points between two looks at everything.
const VERIFY_EVERY: u32 = 25;

/// The deepest call of a thread that is hit.
const DEPTH: u32 = 12;

/// A process that dies is gone well within this time.
const DYING_WITHIN: Duration = Duration::from_millis(300);

/// No point takes so long, unless strace hangs.
const TRACED_WITHIN: Duration = Duration::from_secs(10);

/// Size of the pool's journal segments: a few dozen records.
const SEGMENT_BYTES: u32 = 256 << 10;

/// NBD's error for a lack of space.
const ENOSPC: u32 = 28;

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

/// strace on a process, until one of them ends.
struct Tracer {
    pid: u32,
    log: PathBuf,
    let_go: Arc<AtomicBool>,
    watcher: JoinHandle<()>,
}

impl Tracer {
    /// Attaches; when this returns, no call passes unseen. `None` if the process has just gone.
    fn attach(cluster: &Cluster, pid: u32, point: Point) -> Option<Self> {
        let log = cluster.scratch().join("strace.log");
        let (call, fault, nth) = (point.call, point.fault, point.nth);
        let mut strace = Command::new("strace")
            .args(["-f", "-p", &pid.to_string(), "-o"])
            .arg(&log)
            .args(["-e", &format!("trace={call}"), "-e", &format!("inject={call}:{fault}:when={nth}")])
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("strace is installed by ./test");
        let mut lines = BufReader::new(strace.stderr.take().expect("piped")).lines().map_while(Result::ok);
        let attached = lines.any(|line| line.contains("attached"));
        // Further lines name further threads; they fit into the pipe, which must stay open.
        std::thread::spawn(move || lines.for_each(drop));
        if !attached {
            strace.wait().expect("it ends");
            return None;
        }
        let let_go = Arc::<AtomicBool>::default();
        let watched = (let_go.clone(), log.clone());
        let watcher = std::thread::spawn(move || watch(&mut strace, pid, &watched.1, &watched.0));
        Some(Self { pid, log, let_go, watcher })
    }

    fn ended(&self) -> bool {
        self.watcher.is_finished()
    }

    /// Lets go of the process, if it lives; whether the fault struck.
    fn detach(self) -> bool {
        self.let_go.store(true, Ordering::Relaxed);
        self.watcher.join().expect("the watcher does not fail");
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        log.contains("(INJECTED)") || is_dying(&log) && !is_alive(self.pid)
    }
}

/// Sees strace to its end. A process that dies under strace with several threads is at times never let go, and then never
/// dead, so that everybody rightly waits for its end: strace is killed then, which frees it.
fn watch(strace: &mut Child, pid: u32, log: &Path, let_go: &AtomicBool) {
    let began = Instant::now();
    let (mut dying_since, mut asked) = (None, false);
    while strace.try_wait().expect("it is our child").is_none() {
        if !asked && let_go.load(Ordering::Relaxed) {
            asked = true;
            signal(strace.id(), "INT");
        }
        if dying_since.is_none()
            && (!is_alive(pid) || is_dying(&std::fs::read_to_string(log).unwrap_or_default()))
        {
            dying_since = Some(Instant::now());
        }
        if dying_since.is_some_and(|since| since.elapsed() > DYING_WITHIN) || began.elapsed() > TRACED_WITHIN
        {
            strace.kill().expect("it is our child");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether strace saw a call from which its thread does not return.
fn is_dying(log: &str) -> bool {
    log.contains("killed by SIGKILL") || log.contains("= ?")
}

/// What a snapshot must hold: the stamp of each block, 0 for never written.
struct Kept {
    name: String,
    content: BTreeMap<u64, u64>,
    /// A create or delete of it failed: it is there or not, but what is there is whole.
    uncertain: bool,
}

/// A guest and its operator, who know what must be there.
struct Story<'a> {
    cluster: &'a Cluster,
    disk: Nbd,
    content: BTreeMap<u64, u64>,
    snapshots: Vec<Kept>,
    stamp: u64,
    refused: u32,
}

impl<'a> Story<'a> {
    fn new(cluster: &'a Cluster) -> Self {
        let disk = Nbd::must_open(&cluster.socket(1), "demo");
        Self { cluster, disk, content: BTreeMap::new(), snapshots: Vec::new(), stamp: 0, refused: 0 }
    }

    /// A snapshot, first writes into it, and an old snapshot's end. The guest rests while the operator works, so that what
    /// each snapshot must hold is known exactly.
    fn provoke(&mut self, space_refused: bool) {
        let name = format!("demo@s{}", self.stamp);
        let made = self.cluster.run(&["snapshot", "create", &name]).status.success();
        self.snapshots.push(Kept { name, content: self.content.clone(), uncertain: !made });
        self.burst(space_refused);
        if self.snapshots.len() > SNAPSHOTS {
            let oldest = &mut self.snapshots[0];
            if self.cluster.run(&["snapshot", "delete", "--force", &oldest.name]).status.success()
                || oldest.uncertain
            {
                self.snapshots.remove(0);
            } else {
                oldest.uncertain = true;
            }
        }
    }

    /// Writes to distinct blocks at once. A write that is refused for space has changed nothing; it comes again later.
    fn burst(&mut self, space_refused: bool) {
        let mut flying = BTreeMap::new();
        for _ in 0..BURST {
            self.stamp += 1;
            let block = self.stamp.wrapping_mul(0x9E37_79B1) % BLOCKS;
            let data = stamped(block, self.stamp);
            let length = u32::try_from(data.len()).expect("a block");
            flying.insert(self.disk.send(WRITE, block * BLOCK_BYTES, length, &data), (block, self.stamp));
        }
        while !flying.is_empty() {
            let (cookie, error) = self.disk.reply();
            let (block, stamp) = flying.remove(&cookie).expect("our cookie");
            match error {
                0 => drop(self.content.insert(block, stamp)),
                ENOSPC if space_refused => self.refused += 1,
                error => panic!("a write failed with {error}"),
            }
        }
    }

    /// The guest's disk and every snapshot hold what they must, byte for byte.
    fn verify(&mut self) {
        assert_eq!(self.disk.flush(), 0, "a flush failed");
        check(&mut self.disk, &self.content, "demo");
        let socket = self.cluster.socket(1);
        self.snapshots.retain(|kept| match Nbd::open(&socket, &kept.name) {
            Ok(mut disk) => {
                check(&mut disk, &kept.content, &kept.name);
                true
            }
            Err(refused) => {
                assert!(kept.uncertain, "{} is lost: {refused:?}", kept.name);
                false
            }
        });
    }
}

fn check(disk: &mut Nbd, content: &BTreeMap<u64, u64>, name: &str) {
    let length = usize::try_from(BLOCKS * BLOCK_BYTES).expect("it fits into memory");
    let found = disk.read(0, length).unwrap_or_else(|error| panic!("{name}: a read failed with {error}"));
    for (block, found) in (0..).zip(found.chunks(4096)) {
        let expected = content.get(&block).map_or_else(|| vec![0; 4096], |&stamp| stamped(block, stamp));
        assert!(
            found == expected,
            "{name}: block {block} is not what was acknowledged; it begins {:x?}",
            &found[..16]
        );
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
    for node in ["n1", "n2"] {
        let path = data.join(node).join("agent.toml");
        let text = std::fs::read_to_string(&path).expect("a configuration");
        std::fs::write(&path, changed(&text, "io = \"auto\"", "io = \"threads\"")).expect("a configuration");
    }
    cluster.up();
    cluster
}

fn changed(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "no {from} in {text}");
    text.replace(from, to)
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
    let Some(tracer) = Tracer::attach(cluster, victim(cluster, &server, point.takeover), point) else {
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
    tracer.detach()
}

#[test]
fn no_failing_write_or_sync_of_a_server_loses_anything() {
    let cluster = start();
    let mut story = Story::new(&cluster);
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
