//! A guest that writes and flushes until its connection breaks, and knows what must be there then.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use super::cluster::wait_until;
use super::nbd::{FLUSH, Nbd, WRITE};
use super::writer::stamped;

const BLOCK: u32 = 4096;
const BLOCKS: u64 = 1024;

/// Writes between two flushes.
const BURST: u64 = 32;

/// The guest, in its own thread.
pub(crate) struct Flusher {
    flushes: Arc<AtomicU64>,
    thread: JoinHandle<Flushed>,
    export: String,
}

/// What it knows when its connection is gone.
#[derive(Default)]
pub(crate) struct Flushed {
    export: String,
    /// Stamp of each block as of the last flush that was acknowledged.
    content: BTreeMap<u64, u64>,
    /// The last stamp that was sent.
    last: u64,
}

impl Flusher {
    pub(crate) fn start(socket: &Path, export: &str) -> Self {
        let mut nbd = Nbd::must_open(socket, export);
        let flushes = Arc::<AtomicU64>::default();
        let counted = flushes.clone();
        let thread = std::thread::spawn(move || {
            let (mut flushed, mut written) = (Flushed::default(), BTreeMap::new());
            while write_and_flush(&mut nbd, &mut flushed.last, &mut written).is_ok() {
                flushed.content.clone_from(&written);
                counted.fetch_add(1, Ordering::Relaxed);
            }
            flushed
        });
        Self { flushes, thread, export: export.to_owned() }
    }

    /// Waits until so many more flushes were acknowledged.
    pub(crate) fn wait_for_flushes(&self, flushes: u64) {
        let goal = self.flushes.load(Ordering::Relaxed) + flushes;
        wait_until("the guest's flushes go on", || {
            assert!(!self.thread.is_finished(), "the guest's disk broke");
            self.flushes.load(Ordering::Relaxed) >= goal
        });
    }

    /// Waits until its connection is gone.
    pub(crate) fn broken(self) -> Flushed {
        let flushed = self.thread.join().expect("no request failed");
        Flushed { export: self.export, ..flushed }
    }
}

impl Flushed {
    /// Every block holds what was flushed, or a later write; how many were flushed.
    pub(crate) fn verify(&self, socket: &Path) -> usize {
        let mut nbd = Nbd::must_open(socket, &self.export);
        for (&block, &stamp) in &self.content {
            let found = nbd.read(block * u64::from(BLOCK), BLOCK as usize).expect("a read");
            let read = u64::from_le_bytes(found[8..16].try_into().expect("eight bytes"));
            assert!(
                (stamp..=self.last).contains(&read),
                "block {block} lost a flushed write: {stamp}, now {read}"
            );
            assert_eq!(found, stamped(block, read), "block {block} is torn");
        }
        self.content.len()
    }
}

fn write_and_flush(nbd: &mut Nbd, stamp: &mut u64, written: &mut BTreeMap<u64, u64>) -> io::Result<()> {
    let mut flying = BTreeMap::new();
    for _ in 0..BURST {
        *stamp += 1;
        let block = stamp.wrapping_mul(0x9E37_79B1) % BLOCKS;
        let cookie = nbd.try_send(WRITE, block * u64::from(BLOCK), BLOCK, &stamped(block, *stamp))?;
        flying.insert(cookie, (block, *stamp));
    }
    while !flying.is_empty() {
        let (cookie, error) = nbd.try_reply()?;
        assert_eq!(error, 0, "a write failed");
        let (block, stamp) = flying.remove(&cookie).expect("our cookie");
        written.insert(block, stamp);
    }
    nbd.try_send(FLUSH, 0, 0, &[])?;
    assert_eq!(nbd.try_reply()?.1, 0, "a flush failed");
    Ok(())
}
