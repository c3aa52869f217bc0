//! A guest and its operator, who know what must be there: on the volume, and in each of its snapshots.

use std::collections::BTreeMap;

use super::cluster::Cluster;
use super::nbd::{Nbd, WRITE};
use super::writer::stamped;

/// Blocks that the guest writes: few, so that each is superseded by most snapshots.
const BLOCKS: u64 = 256;
const BLOCK_BYTES: u64 = 4096;

/// Writes in flight together.
const BURST: u64 = 16;

/// Snapshots that live at once; older ones are deleted.
const SNAPSHOTS: usize = 4;

/// NBD's error for a lack of space.
const ENOSPC: u32 = 28;

/// What a snapshot must hold: the stamp of each block, 0 for never written.
pub(crate) struct Kept {
    name: String,
    content: BTreeMap<u64, u64>,
    /// A create or delete of it failed: it is there or not, but what is there is whole.
    uncertain: bool,
}

/// A guest and its operator, who know what must be there.
pub(crate) struct Story<'a> {
    cluster: &'a Cluster,
    volume: &'static str,
    disk: Nbd,
    content: BTreeMap<u64, u64>,
    snapshots: Vec<Kept>,
    pub(crate) stamp: u64,
    pub(crate) refused: u32,
    node: u32,
    named: u32,
}

/// Writes without an answer yet: block and stamp, by cookie.
pub(crate) type Flying = BTreeMap<u64, (u64, u64)>;

impl<'a> Story<'a> {
    pub(crate) fn new(cluster: &'a Cluster, node: u32) -> Self {
        Self::of(cluster, node, "demo")
    }

    /// On a volume of its own.
    pub(crate) fn of(cluster: &'a Cluster, node: u32, volume: &'static str) -> Self {
        let disk = Nbd::must_open(&cluster.socket(node), volume);
        Self {
            cluster,
            volume,
            disk,
            content: BTreeMap::new(),
            snapshots: Vec::new(),
            stamp: 0,
            refused: 0,
            node,
            named: 0,
        }
    }

    /// A snapshot, first writes into it, and an old snapshot's end.
    pub(crate) fn provoke(&mut self, space_refused: bool) {
        self.snapshot();
        self.burst(space_refused);
        self.forget_oldest();
    }

    /// A snapshot. The guest rests while the operator works, so that what it must hold is known exactly.
    pub(crate) fn snapshot(&mut self) {
        self.snapshot_by(|cluster, name| cluster.run(&["snapshot", "create", name]).status.success());
    }

    /// A snapshot by somebody who says whether it was made; if not, it may be there all the same.
    pub(crate) fn snapshot_by(&mut self, make: impl FnOnce(&Cluster, &str) -> bool) {
        self.named += 1;
        let name = format!("{}@s{}", self.volume, self.named);
        let made = make(self.cluster, &name);
        self.snapshots.push(Kept { name, content: self.content.clone(), uncertain: !made });
    }

    /// What became of the youngest snapshot, whose maker was killed: whether it is there. What was asked for may have been
    /// done only when the guest wrote again, so it has each block as it was then or as it is now; from now on it must never
    /// change.
    pub(crate) fn settle(&mut self) -> bool {
        let kept = self.snapshots.last_mut().expect("there is one");
        let Ok(mut disk) = Nbd::open(&self.cluster.socket(self.node), &kept.name) else {
            self.snapshots.pop();
            return false;
        };
        for (block, found) in read_blocks(&mut disk, &kept.name) {
            let possible = [&kept.content, &self.content].map(|content| content.get(&block).copied());
            let stamp = possible.into_iter().find(|stamp| found == block_of(block, *stamp));
            match stamp.unwrap_or_else(|| panic!("{}: block {block} is neither old nor new", kept.name)) {
                Some(stamp) => drop(kept.content.insert(block, stamp)),
                None => drop(kept.content.remove(&block)),
            }
        }
        kept.uncertain = false;
        true
    }

    /// Name of the youngest snapshot, without its volume's.
    pub(crate) fn newest(&self) -> &str {
        let kept = self.snapshots.last().expect("there is one");
        kept.name.split_once('@').expect("all are named so").1
    }

    /// Deletes the oldest snapshot, if there are many.
    pub(crate) fn forget_oldest(&mut self) {
        if self.snapshots.len() <= SNAPSHOTS {
            return;
        }
        let oldest = &mut self.snapshots[0];
        if self.cluster.run(&["snapshot", "delete", "--force", &oldest.name]).status.success()
            || oldest.uncertain
        {
            self.snapshots.remove(0);
        } else {
            oldest.uncertain = true;
        }
    }

    /// Writes every block once.
    pub(crate) fn fill(&mut self) {
        (0..BLOCKS / BURST).for_each(|_| self.burst(false));
    }

    /// Writes to distinct blocks at once. A write that is refused for space has changed nothing; it comes again later.
    pub(crate) fn burst(&mut self, space_refused: bool) {
        let flying = self.begin_burst();
        self.end_burst(flying, space_refused);
    }

    /// Sends the writes of a burst; none is waited for.
    pub(crate) fn begin_burst(&mut self) -> Flying {
        let mut flying = Flying::new();
        for _ in 0..BURST {
            self.stamp += 1;
            let block = self.stamp.wrapping_mul(0x9E37_79B1) % BLOCKS;
            let data = stamped(block, self.stamp);
            let length = u32::try_from(data.len()).expect("a block");
            flying.insert(self.disk.send(WRITE, block * BLOCK_BYTES, length, &data), (block, self.stamp));
        }
        flying
    }

    /// Waits for the writes of a burst.
    pub(crate) fn end_burst(&mut self, mut flying: Flying, space_refused: bool) {
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
    pub(crate) fn verify(&mut self) {
        assert_eq!(self.disk.flush(), 0, "a flush failed");
        check(&mut self.disk, &self.content, self.volume);
        let socket = self.cluster.socket(self.node);
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
    for (block, found) in read_blocks(disk, name) {
        assert!(
            found == block_of(block, content.get(&block).copied()),
            "{name}: block {block} is not what was acknowledged; it begins {:x?}",
            &found[..16]
        );
    }
}

/// All that the guest may have written, with the number of each block.
fn read_blocks(disk: &mut Nbd, name: &str) -> impl Iterator<Item = (u64, Vec<u8>)> + use<> {
    let length = usize::try_from(BLOCKS * BLOCK_BYTES).expect("it fits into memory");
    let found = disk.read(0, length).unwrap_or_else(|error| panic!("{name}: a read failed with {error}"));
    (0..).zip(found.chunks(4096).map(<[u8]>::to_vec).collect::<Vec<_>>())
}

/// A block with this stamp, or one that was never written.
fn block_of(block: u64, stamp: Option<u64>) -> Vec<u8> {
    stamp.map_or_else(|| vec![0; 4096], |stamp| stamped(block, stamp))
}
