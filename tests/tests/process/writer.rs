//! A guest that writes stamped blocks all the time, measures how long it stalls, and knows what must be there.
//!
//! Stall: the longest time between two completions while requests were outstanding.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::nbd::{Nbd, WRITE};

const BLOCK: usize = 4096;
const DEPTH: usize = 8;

/// A writer in its own thread, over blocks `0..blocks` of an export.
pub(crate) struct Writer {
    stop: Arc<AtomicBool>,
    stall_us: Arc<AtomicU64>,
    completed: Arc<AtomicU64>,
    thread: JoinHandle<BTreeMap<u64, u64>>,
    socket: PathBuf,
    export: String,
}

impl Writer {
    pub(crate) fn start(socket: &Path, export: &str, blocks: u64) -> Self {
        let mut nbd = Nbd::must_open(socket, export);
        let (stop, stall_us, completed) = (Arc::<AtomicBool>::default(), Arc::default(), Arc::default());
        let shared = (stop.clone(), Arc::<AtomicU64>::clone(&stall_us), Arc::<AtomicU64>::clone(&completed));
        let thread =
            std::thread::spawn(move || write_until(&mut nbd, blocks, &shared.0, &shared.1, &shared.2));
        Self { stop, stall_us, completed, thread, socket: socket.to_owned(), export: export.to_owned() }
    }

    /// The longest stall since this was asked last.
    pub(crate) fn take_stall(&self) -> Duration {
        Duration::from_micros(self.stall_us.swap(0, Ordering::Relaxed))
    }

    /// Writes that were acknowledged so far.
    pub(crate) fn writes(&self) -> u64 {
        self.completed.load(Ordering::Relaxed)
    }

    /// Waits until so many more writes were acknowledged.
    pub(crate) fn wait_for(&self, writes: u64) {
        let goal = self.completed.load(Ordering::Relaxed) + writes;
        super::cluster::wait_until("the guest's writes go on", || {
            assert!(!self.thread.is_finished(), "the guest's disk broke");
            self.completed.load(Ordering::Relaxed) >= goal
        });
    }

    /// Stops, flushes, and checks that every block holds what was acknowledged last.
    pub(crate) fn stop_and_verify(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let written = self.thread.join().expect("no request failed");
        let mut nbd = Nbd::must_open(&self.socket, &self.export);
        for (&block, &stamp) in &written {
            let content = nbd.read(block * BLOCK as u64, BLOCK).expect("a read");
            assert_eq!(content, stamped(block, stamp), "block {block} lost an acknowledged write");
        }
        self.completed.load(Ordering::Relaxed)
    }
}

/// Keeps [`DEPTH`] writes to distinct blocks outstanding; what was acknowledged last, by block.
fn write_until(
    nbd: &mut Nbd,
    blocks: u64,
    stop: &AtomicBool,
    stall_us: &AtomicU64,
    completed: &AtomicU64,
) -> BTreeMap<u64, u64> {
    let (mut written, mut flying) = (BTreeMap::new(), BTreeMap::new());
    let mut stamp = 0u64;
    let mut last = Instant::now();
    loop {
        while flying.len() < DEPTH && !stop.load(Ordering::Relaxed) {
            stamp += 1;
            // A step that is odd and large against a power of two visits every block in a scattered order.
            let block = stamp.wrapping_mul(0x9E37_79B1) % blocks;
            if flying.values().any(|&(busy, _)| busy == block) {
                continue;
            }
            let cookie = nbd.send(WRITE, block * BLOCK as u64, BLOCK as u32, &stamped(block, stamp));
            flying.insert(cookie, (block, stamp));
        }
        if flying.is_empty() {
            assert_eq!(nbd.flush(), 0, "a flush failed");
            return written;
        }
        let (cookie, error) = nbd.reply();
        assert_eq!(error, 0, "a write failed");
        let (block, stamp) = flying.remove(&cookie).expect("our cookie");
        written.insert(block, stamp);
        let gap = last.elapsed();
        stall_us.fetch_max(u64::try_from(gap.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
        last = Instant::now();
        completed.fetch_add(1, Ordering::Relaxed);
    }
}

/// A block that says where it belongs and when it was written.
pub(crate) fn stamped(block: u64, stamp: u64) -> Vec<u8> {
    let words = [block, stamp].map(u64::to_le_bytes).concat();
    words.iter().copied().cycle().take(BLOCK).collect()
}

/// As a number of milliseconds.
pub(crate) fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}

/// p50, p99 and the longest of some stalls, in milliseconds, as one line.
pub(crate) fn summary(stalls: &mut [Duration]) -> String {
    stalls.sort();
    let at =
        |percent: usize| stalls[(stalls.len() * percent / 100).min(stalls.len() - 1)].as_secs_f64() * 1000.0;
    format!("stall p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms over {}", at(50), at(99), at(100), stalls.len())
}
