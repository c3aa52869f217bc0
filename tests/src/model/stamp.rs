//! What writes leave on a medium, so that whoever reads it knows which write it was: each sector of 512 bytes says its
//! volume, its place and the number of the write, sixteen times over.

use csnap_storage::sim::SECTOR_BYTES;

/// Bytes that repeat in a sector.
const LINE: usize = 32;

/// A write, by its number in the world; the number is even if it puts zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp(u64);

impl Stamp {
    /// What a volume holds before anything is written.
    pub const NEW: Self = Self(0);

    /// The `number`th write of the world (from 1); of zeros or of content.
    #[must_use]
    pub fn new(number: u64, zeros: bool) -> Self {
        Self(number << 1 | u64::from(!zeros))
    }

    /// Reads as zeros.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self.0 & 1 == 0
    }
}

/// What was found in a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// All zeros.
    Zeros,
    /// A write's stamp, with the volume and sector that it was made for.
    Stamp {
        /// Of the volume.
        volume: u64,
        /// Index in the volume.
        sector: u64,
        /// Which write.
        stamp: Stamp,
    },
    /// Nothing that a write leaves.
    Garbage,
}

/// Fills sectors from `first` on with the content of one write.
#[must_use]
pub fn fill(volume: u64, first: u64, sectors: u64, stamp: Stamp) -> Vec<u8> {
    let len = usize::try_from(sectors).expect("requests are small") * SECTOR_BYTES;
    if stamp.is_zero() {
        return vec![0; len];
    }
    let mut bytes = Vec::with_capacity(len);
    for sector in first..first + sectors {
        for _ in 0..SECTOR_BYTES / LINE {
            for word in line(volume, sector, stamp) {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
        }
    }
    bytes
}

/// What a sector holds.
#[must_use]
pub fn look(bytes: &[u8]) -> Found {
    if bytes.iter().all(|byte| *byte == 0) {
        return Found::Zeros;
    }
    let word = |i: usize| u64::from_le_bytes(bytes[i * 8..i * 8 + 8].try_into().expect("eight bytes"));
    let (volume, sector, stamp) = (word(0), word(1), Stamp(word(2)));
    let whole = word(3) == line(volume, sector, stamp)[3] && bytes.chunks(LINE).all(|l| *l == bytes[..LINE]);
    if whole { Found::Stamp { volume, sector, stamp } } else { Found::Garbage }
}

fn line(volume: u64, sector: u64, stamp: Stamp) -> [u64; 4] {
    let sum = (volume ^ sector.rotate_left(20) ^ stamp.0.rotate_left(40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    [volume, sector, stamp.0, sum]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_says_which_write_it_is_and_a_torn_one_does_not_pass() {
        let stamp = Stamp::new(9, false);
        let bytes = fill(3, 7, 2, stamp);
        assert_eq!(look(&bytes[512..]), Found::Stamp { volume: 3, sector: 8, stamp });
        assert_eq!(look(&fill(3, 7, 1, Stamp::new(9, true))), Found::Zeros);
        let mut torn = bytes[..512].to_vec();
        torn[300] ^= 1;
        assert_eq!(look(&torn), Found::Garbage);
    }
}
