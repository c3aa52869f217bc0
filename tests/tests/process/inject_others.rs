//! The Nth write or sync of a lockd, an agent or an exporter fails, or is its last: what [`super::inject`] does to servers.
//!
//! The kernel refuses io_uring to everything that is started here (lockd's configuration is `up`'s own), so that strace sees
//! all that a daemon does to its files.
//!
//! What is owed differs. A lockd whose log fails ends and comes back, an agent that cannot save its state goes on, one that is
//! killed comes back: guests see a pause, no more. An exporter's guest gets EIO or ENOSPC when the exporter's own file fails, and
//! loses its connection when the exporter is killed, and has what it flushed; guests of other exporters see nothing. Each role
//! gets a fifth of `CSNAP_POINTS`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::cluster::{Cluster, number, signal, wait_until};
use super::guest::Story;
use super::nbd::{FLUSH, Nbd, WRITE};
use super::strace::Strace;
use super::writer::{Writer, stamped};

/// No point takes so long, unless strace hangs.
const TRACED_WITHIN: Duration = Duration::from_secs(10);

/// What happens at the call, as strace names it.
const FAULTS: [&str; 3] = [KILL, "error=EIO", "error=ENOSPC"];
const KILL: &str = "signal=SIGKILL";

/// Points between two looks at everything.
const VERIFY_EVERY: u32 = 10;

const EIO: u32 = 5;
const ENOSPC: u32 = 28;

/// One place to fail at.
#[derive(Clone, Copy, Debug)]
struct Point {
    call: &'static str,
    fault: &'static str,
    nth: u32,
}

impl Point {
    /// Walks through all combinations: what changes fastest comes first.
    fn at(index: u32, calls: &[&'static str], depth: u32) -> Self {
        let calls_count = u32::try_from(calls.len()).expect("few");
        let call = calls[(index / 3 % calls_count) as usize];
        Self { call, fault: FAULTS[(index % 3) as usize], nth: 1 + index / 3 / calls_count % depth }
    }

    fn attach(&self, cluster: &Cluster, victim: u32, paths: &[&str]) -> Option<Strace> {
        let Self { call, fault, nth } = self;
        let (trace, inject) = (format!("trace={call}"), format!("inject={call}:{fault}:when={nth}"));
        let paths = paths.iter().flat_map(|path| ["-P", path]);
        let arguments: Vec<&str> = paths.chain(["-e", &trace, "-e", &inject]).collect();
        Strace::attach(cluster.scratch().join("strace.log"), &[victim], TRACED_WITHIN, &arguments)
    }
}

/// Points of one role, until there are enough that struck.
fn campaign(role: &str, calls: &[&'static str], depth: u32, mut strike: impl FnMut(Point, u32) -> bool) {
    let began = Instant::now();
    let wanted = number("CSNAP_POINTS", 100).div_ceil(5);
    let mut struck: BTreeMap<(&str, &str), u32> = BTreeMap::new();
    let (mut total, mut tried) = (0, 0);
    while total < wanted {
        assert!(tried < 10 * wanted + 100, "only {total} of {tried} points were reached");
        let point = Point::at(tried, calls, depth);
        tried += 1;
        if strike(point, total) {
            total += 1;
            *struck.entry((point.fault, point.call)).or_default() += 1;
        }
    }
    let count =
        |fault: &str| struck.iter().filter(|(at, _)| at.0 == fault).map(|(_, count)| count).sum::<u32>();
    println!(
        "{role}: {total} points: {} kills, {} EIO, {} ENOSPC ({tried} tries, {:.0} s)\n{struck:?}",
        count(FAULTS[0]),
        count(FAULTS[1]),
        count(FAULTS[2]),
        began.elapsed().as_secs_f64(),
    );
}

/// The pool that remains is undamaged.
fn check(mut cluster: Cluster) {
    cluster.down();
    let pool = cluster.data().join("pool");
    println!("{}", cluster.csnap(&["check", "--pool", pool.to_str().expect("text")]));
}

/// As the agents know it; absent while they cannot reach it.
fn lockd(cluster: &Cluster) -> Option<u32> {
    let pid = cluster.status()["lockd"]["members"][0]["pid"].as_u64()?;
    u32::try_from(pid).ok()
}

#[test]
fn no_failing_write_or_sync_of_lockd_is_more_than_a_pause() {
    let cluster = Cluster::start_without_uring(2);
    let mut story = Story::new(&cluster, 1);
    campaign("lockd", &["pwrite64", "fdatasync"], 3, |point, total| {
        let mut before = None;
        wait_until("the agents reach lockd", || {
            before = lockd(&cluster);
            before.is_some()
        });
        let (before, server) = (before.expect("just found"), cluster.server());
        let Some(tracer) = point.attach(&cluster, before, &[]) else { return false };
        // A lock is given up, and another one granted.
        signal(server.pid, "KILL");
        story.provoke(false);
        wait_until("another server serves", || cluster.server().pid != server.pid);
        let struck = tracer.struck();
        if struck {
            wait_until("the lockd whose log failed ended, and is back", || {
                lockd(&cluster).is_some_and(|pid| pid != before)
            });
        }
        if total % VERIFY_EVERY == 0 {
            story.verify();
        }
        struck
    });
    story.burst(false);
    story.verify();
    drop(story);
    check(cluster);
}

#[test]
fn no_failing_write_or_sync_of_an_agent_is_more_than_a_pause() {
    let cluster = Cluster::start_without_uring(2);
    let mut story = Story::new(&cluster, 1);
    let state = cluster.data().join("n1/state");
    let file = state.join("agent.new");
    let paths = [state.to_str().expect("text"), file.to_str().expect("text")];
    let exporter = cluster.pid("n1", "export_pid");
    let mut priority = 100;
    campaign("agent", &["write", "fsync"], 2, |point, total| {
        let before = cluster.pid("n1", "agent_pid");
        let Some(tracer) = point.attach(&cluster, before, &paths) else { return false };
        // What an agent remembers changes; the server goes from one node to the other.
        for _ in 0..=point.nth {
            priority = if priority == 100 { 101 } else { 100 };
            cluster.run(&["node", "priority", "n1", &priority.to_string()]);
            story.provoke(false);
            if tracer.ended() {
                break;
            }
        }
        let struck = tracer.struck();
        if struck && point.fault == KILL {
            wait_until("a killed agent is back", || {
                cluster.node("n1")["agent_pid"].as_u64().is_some_and(|pid| pid != u64::from(before))
            });
        } else {
            assert_eq!(
                cluster.pid("n1", "agent_pid"),
                before,
                "{point:?}: it goes on with what it cannot save"
            );
        }
        if total % VERIFY_EVERY == 0 {
            story.verify();
        }
        struck
    });
    story.burst(false);
    story.verify();
    assert_eq!(cluster.pid("n1", "export_pid"), exporter, "it outlived them all");
    drop(story);
    check(cluster);
}

/// A guest whose exporter may die and whose writes may fail. It flushes, and knows what must be there.
#[derive(Default)]
struct Exposed {
    /// Stamp of each block as of the last flush that was acknowledged.
    flushed: BTreeMap<u64, u64>,
    stamp: u64,
    flushes: u32,
    errors: BTreeMap<String, u32>,
}

impl Exposed {
    const BLOCKS: u64 = 256;
    const BURST: u64 = 16;

    /// Waits until it can be had: a dead exporter has a successor, and is reaped.
    fn open(cluster: &Cluster) -> Nbd {
        let mut disk = None;
        wait_until("the volume can be had again", || {
            disk = Nbd::try_open(&cluster.socket(1), "demo").ok().and_then(Result::ok);
            disk.is_some()
        });
        disk.expect("just opened")
    }

    /// Writes and flushes; what failed, if anything did.
    fn round(&mut self, disk: &mut Nbd) -> std::io::Result<Result<(), u32>> {
        let (mut flying, mut written, mut failed) = (BTreeMap::new(), BTreeMap::new(), None);
        for _ in 0..Self::BURST {
            self.stamp += 1;
            let block = self.stamp.wrapping_mul(0x9E37_79B1) % Self::BLOCKS;
            let cookie = disk.try_send(WRITE, block * 4096, 4096, &stamped(block, self.stamp))?;
            flying.insert(cookie, (block, self.stamp));
        }
        while !flying.is_empty() {
            let (cookie, error) = disk.try_reply()?;
            let (block, stamp) = flying.remove(&cookie).expect("our cookie");
            match error {
                0 => drop(written.insert(block, stamp)),
                error => failed = Some(error),
            }
        }
        disk.try_send(FLUSH, 0, 0, &[])?;
        match disk.try_reply()?.1 {
            0 => {
                self.flushes += 1;
                self.flushed.extend(written);
            }
            error => failed = Some(error),
        }
        Ok(failed.map_or(Ok(()), Err))
    }

    /// Every block holds what was flushed or a later write, whole.
    fn verify(&self, disk: &mut Nbd) {
        for (&block, &stamp) in &self.flushed {
            let found = disk.read(block * 4096, 4096).expect("a read");
            let read = u64::from_le_bytes(found[8..16].try_into().expect("eight bytes"));
            assert!(
                (stamp..=self.stamp).contains(&read),
                "block {block} lost a flushed write: {stamp}, now {read}"
            );
            assert_eq!(found, stamped(block, read), "block {block} is torn");
        }
    }
}

#[test]
fn a_failing_write_or_sync_of_an_exporter_is_its_own_guests_and_nobody_elses() {
    let cluster = Cluster::start_without_uring(2);
    cluster.csnap(&["volume", "create", "other", "--size", "4M"]);
    let elsewhere = Writer::start(&cluster.socket(2), "other", 1024);
    let mut guest = Exposed::default();
    let head = cluster.data().join("pool/head/00000001-00000000");
    let head = head.to_str().expect("text");
    let mut disk = Some(Exposed::open(&cluster));
    campaign("exporter", &["pwrite64", "fdatasync"], 6, |point, total| {
        let before = cluster.pid("n1", "export_pid");
        let Some(tracer) = point.attach(&cluster, before, &[head]) else { return false };
        let mut outcome = Ok(Ok(()));
        for _ in 0..=point.nth {
            outcome = guest.round(disk.as_mut().expect("it is open"));
            if !matches!(outcome, Ok(Ok(()))) {
                break;
            }
        }
        let struck = tracer.struck();
        let expected = match &outcome {
            Ok(Ok(())) => true,
            Ok(Err(EIO)) => point.fault != KILL,
            Ok(Err(ENOSPC)) => point.fault == "error=ENOSPC",
            Ok(Err(_)) => false,
            Err(_) => point.fault == KILL,
        };
        assert!(expected && (struck || matches!(outcome, Ok(Ok(())))), "{point:?}: {outcome:?}");
        let what = outcome.map_or_else(|_| "connection lost".to_owned(), |result| format!("{result:?}"));
        *guest.errors.entry(format!("{}: {what}", point.fault)).or_default() += 1;
        if struck {
            // Given back and attached anew, whatever was wrong is over.
            drop(disk.take());
            guest.verify(disk.insert(Exposed::open(&cluster)));
        }
        if total % VERIFY_EVERY == 0 {
            elsewhere.wait_for(50);
        }
        struck
    });
    let mut disk = disk.expect("it is open");
    assert!(matches!(guest.round(&mut disk), Ok(Ok(()))), "everything works");
    guest.verify(&mut disk);
    let writes = elsewhere.stop_and_verify();
    println!(
        "{} flushes, {} blocks, all there; another exporter's guest wrote {writes} times\n{:?}",
        guest.flushes,
        guest.flushed.len(),
        guest.errors
    );
    drop(disk);
    check(cluster);
}
