//! BLOCK_STATUS: an export's extents made fit for the wire.

use super::limits::STATUS_EXTENTS_MAX;
use super::wire::allocation;
use crate::export::BlockExtent;

/// One extent as the protocol carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Bytes; not zero.
    pub len: u32,
    /// See [`allocation`].
    pub flags: u32,
}

/// The answer to a request of `len` bytes: neighbours of equal state merged, nothing beyond the request, one extent if
/// `one`, at most [`STATUS_EXTENTS_MAX`]. Empty only if `extents` tell nothing of the range (a bug of the export).
#[must_use]
pub fn describe(extents: &[BlockExtent], len: u32, one: bool) -> Vec<Descriptor> {
    let mut answer: Vec<Descriptor> = Vec::new();
    let mut left = len;
    for extent in extents {
        let len = u32::try_from(extent.len).unwrap_or(u32::MAX).min(left);
        if len == 0 {
            continue;
        }
        let flags =
            if extent.hole { allocation::HOLE } else { 0 } | if extent.zero { allocation::ZERO } else { 0 };
        let full = answer.len() == if one { 1 } else { STATUS_EXTENTS_MAX };
        match answer.last_mut() {
            Some(last) if last.flags == flags => last.len += len,
            _ if full => break,
            _ => answer.push(Descriptor { len, flags }),
        }
        left -= len;
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: BlockExtent = BlockExtent { len: 4096, hole: false, zero: false };
    const HOLE: BlockExtent = BlockExtent { len: 8192, hole: true, zero: true };

    #[test]
    fn equal_neighbours_are_one_extent_and_nothing_reaches_beyond_the_request() {
        let got = describe(&[DATA, DATA, HOLE, HOLE, DATA], 20480, false);
        assert_eq!(got, [Descriptor { len: 8192, flags: 0 }, Descriptor { len: 12288, flags: 3 }]);
    }

    #[test]
    fn one_means_one() {
        assert_eq!(describe(&[HOLE, HOLE, DATA], 1 << 20, true), [Descriptor { len: 16384, flags: 3 }]);
        let endless = BlockExtent { len: u64::MAX, ..HOLE };
        assert_eq!(describe(&[endless], 100, true), [Descriptor { len: 100, flags: 3 }]);
        assert_eq!(describe(&[endless], u32::MAX, false), [Descriptor { len: u32::MAX, flags: 3 }]);
    }

    #[test]
    fn answers_are_bounded() {
        let checkered: Vec<_> = [DATA, HOLE].repeat(STATUS_EXTENTS_MAX);
        assert_eq!(describe(&checkered, u32::MAX, false).len(), STATUS_EXTENTS_MAX);
    }

    #[test]
    fn empty_extents_tell_nothing() {
        assert_eq!(describe(&[BlockExtent { len: 0, ..DATA }], 10, false), []);
    }
}
