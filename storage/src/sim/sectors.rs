//! The synced content of a file: sectors by number, in segments that clones share until one changes them, so that a
//! state after a power loss costs what the power loss changed.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;

use super::SECTOR_BYTES;
use super::rng::Digest;

/// Sectors of a segment: 32 KiB. Small enough to copy for one sector, large enough that the table of segments is
/// short.
const SEGMENT_SECTORS: u64 = 64;
static ZERO: [u8; SECTOR_BYTES] = [0; SECTOR_BYTES];

/// Sectors that are not all zero.
#[derive(Clone, Debug, Default)]
pub(super) struct Sectors(BTreeMap<u64, Rc<Segment>>);

#[derive(Clone, Debug, Default)]
struct Segment {
    sectors: BTreeMap<u64, Bytes>,
    /// Once asked for, until the next change.
    digest: Cell<Option<u64>>,
}

impl Sectors {
    pub(super) fn get(&self, sector: u64) -> &[u8] {
        let segment = self.0.get(&(sector / SEGMENT_SECTORS));
        segment.and_then(|segment| segment.sectors.get(&sector)).map_or(&ZERO[..], |content| &content[..])
    }

    pub(super) fn set(&mut self, sector: u64, content: Bytes) {
        assert_eq!(content.len(), SECTOR_BYTES, "a sector is set whole");
        let index = sector / SEGMENT_SECTORS;
        let zero = content[..] == ZERO;
        if zero && !self.0.contains_key(&index) {
            return;
        }
        let segment = Rc::make_mut(self.0.entry(index).or_default());
        segment.digest.set(None);
        if !zero {
            segment.sectors.insert(sector, content);
            return;
        }
        segment.sectors.remove(&sector);
        if segment.sectors.is_empty() {
            self.0.remove(&index);
        }
    }

    /// Zeros the sectors from `end` on.
    pub(super) fn truncate(&mut self, end: u64) {
        let cut = end / SEGMENT_SECTORS;
        drop(self.0.split_off(&(cut + 1)));
        for sector in self.within(end..(cut + 1) * SEGMENT_SECTORS) {
            self.set(sector, Bytes::from_static(&ZERO));
        }
    }

    /// Sectors of the range that are not all zero, in order.
    pub(super) fn within(&self, range: std::ops::Range<u64>) -> Vec<u64> {
        let segments = range.start / SEGMENT_SECTORS..range.end.div_ceil(SEGMENT_SECTORS);
        if segments.is_empty() {
            return Vec::new();
        }
        let sectors = self.0.range(segments).flat_map(|(_, segment)| segment.sectors.range(range.clone()));
        sectors.map(|(sector, _)| *sector).collect()
    }

    pub(super) fn digest(&self, digest: &mut Digest) {
        for (index, segment) in &self.0 {
            digest.number(*index);
            digest.number(segment.digest());
        }
    }
}

impl Segment {
    fn digest(&self) -> u64 {
        let known = self.digest.get().unwrap_or_else(|| {
            let mut digest = Digest::new();
            for (sector, content) in &self.sectors {
                digest.number(*sector);
                digest.bytes(content);
            }
            digest.finish()
        });
        self.digest.set(Some(known));
        known
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::sim::Rng;

    #[test]
    fn agrees_with_a_plain_map() {
        let mut rng = Rng::new(1);
        let (mut sectors, mut plain) = (Sectors::default(), BTreeMap::new());
        for _ in 0..3000 {
            let sector = rng.below(300);
            if rng.chance(0.02) {
                sectors.truncate(sector);
                plain.split_off(&sector);
            } else if rng.chance(0.3) {
                sectors.set(sector, Bytes::from_static(&ZERO));
                plain.remove(&sector);
            } else {
                let byte = 1 + rng.next_u64().to_le_bytes()[0] % 255;
                sectors.set(sector, vec![byte; SECTOR_BYTES].into());
                plain.insert(sector, byte);
            }
            let (start, len) = (rng.below(300), rng.below(200));
            let within: Vec<u64> = plain.range(start..start + len).map(|(sector, _)| *sector).collect();
            assert_eq!(sectors.within(start..start + len), within);
            assert_eq!(sectors.get(start)[0], plain.get(&start).copied().unwrap_or(0));
        }
    }
}
