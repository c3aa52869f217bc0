//! Allocation state of a file by SEEK_DATA and SEEK_HOLE. The seek position is used for nothing else: all I/O is
//! positioned.

use std::fs::File;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::export::BlockExtent;

/// Extents from `offset` on, at most `extents_max`, up to `offset + len`.
pub(super) fn extents(
    file: &File,
    size_bytes: u64,
    offset: u64,
    len: u64,
    extents_max: usize,
) -> Result<Vec<BlockExtent>, Errno> {
    let end = offset + len;
    let mut extents = Vec::new();
    let mut at = offset;
    while at < end && extents.len() < extents_max {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(size_bytes),
            // No data up to the end of the file.
            Err(Errno::NXIO) => size_bytes,
            // Neither a file nor a device that knows: all of it counts as data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(error) => return Err(error),
        };
        let (next, hole) = if data > at {
            (data, true)
        } else {
            (seek(file, SeekFrom::Hole(at)).map_or(size_bytes, |hole| hole.min(size_bytes)), false)
        };
        if next <= at {
            break;
        }
        extents.push(BlockExtent { len: next - at, hole, zero: hole });
        at = next;
    }
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn holes_and_data_are_told_apart() {
        const MIB: u64 = 1 << 20;
        let file = tempfile::tempfile().expect("a file");
        file.set_len(4 * MIB).expect("grows");
        file.write_all_at(&[1; 1 << 20], MIB).expect("writes");
        let hole = |len| BlockExtent { len, hole: true, zero: true };
        let data = BlockExtent { len: MIB, hole: false, zero: false };
        assert_eq!(extents(&file, 4 * MIB, 0, 4 * MIB, 99), Ok(vec![hole(MIB), data, hole(2 * MIB)]));
        assert_eq!(extents(&file, 4 * MIB, 0, 4 * MIB, 1), Ok(vec![hole(MIB)]));
        assert_eq!(extents(&file, 4 * MIB, 3 * MIB, 1, 99), Ok(vec![hole(MIB)]));
    }
}
