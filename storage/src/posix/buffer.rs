//! Memory that direct I/O accepts: it starts at a multiple of [`BLOCK_BYTES`].

use bytes::Bytes;

use crate::BLOCK_BYTES;

/// Zeroed bytes at an aligned address. Data built in one is written to a shared pool without a copy.
pub struct AlignedBuffer {
    /// Longer than asked for by up to a block, so that an aligned start lies in it.
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// `len` zero bytes.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let memory = vec![0; len + BLOCK_BYTES];
        let start = memory.as_ptr().align_offset(BLOCK_BYTES);
        assert!(start < BLOCK_BYTES, "a byte pointer can be aligned within a block");
        Self { memory, start, len }
    }

    /// `len` zero bytes at any address: for the page cache, which does not care.
    pub(super) fn unaligned(len: usize) -> Self {
        Self { memory: vec![0; len], start: 0, len }
    }

    /// Its bytes.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }

    /// Its bytes, to be shared. They stay where they are.
    #[must_use]
    pub fn freeze(self) -> Bytes {
        Bytes::from(self.memory).slice(self.start..self.start + self.len)
    }
}

/// `data` itself if it lies aligned, else a copy that does.
pub(super) fn aligned(data: Bytes) -> Bytes {
    if data.as_ptr().align_offset(BLOCK_BYTES) == 0 {
        return data;
    }
    let mut buffer = AlignedBuffer::new(data.len());
    buffer.as_mut_slice().copy_from_slice(&data);
    buffer.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frozen_bytes_stay_aligned() {
        for len in [1, 511, 4096, 100_000] {
            let mut buffer = AlignedBuffer::new(len);
            buffer.as_mut_slice().fill(7);
            let bytes = buffer.freeze();
            assert_eq!(bytes.as_ptr().align_offset(BLOCK_BYTES), 0);
            assert_eq!(bytes, vec![7; len]);
            let copied = aligned(bytes.slice(1..));
            assert_eq!(copied.as_ptr().align_offset(BLOCK_BYTES), 0);
            assert_eq!(copied, bytes.slice(1..));
        }
    }
}
