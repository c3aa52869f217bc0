//! A byte buffer of fixed size that is filled at one end and consumed at the other. Its memory is initialised once (and,
//! from the system, lazily), so that a read can be aimed at its free part again and again without clearing it.
//!
//! Invariant: `start <= end <= bytes.len()`; an empty window starts at 0, so that the same few pages stay in the cache.

/// The buffer. See the module.
#[derive(Debug)]
pub struct Window {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Window {
    /// An empty window that can hold `capacity` bytes.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { bytes: vec![0; capacity], start: 0, end: 0 }
    }

    /// What is in it.
    #[must_use]
    pub fn filled(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Bytes in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Bytes that can be put in, after moving what is there.
    #[must_use]
    pub fn room(&self) -> usize {
        self.bytes.len() - self.len()
    }

    /// Drops `count` bytes at the front. More than there are is a bug.
    pub fn consume(&mut self, count: usize) {
        assert!(count <= self.len(), "consumed beyond the end");
        self.start += count;
        if self.is_empty() {
            self.start = 0;
            self.end = 0;
        }
    }

    /// The free part, at least `wanted` bytes of it (moves what is there if need be). No such room is a bug.
    pub fn free(&mut self, wanted: usize) -> &mut [u8] {
        if self.bytes.len() - self.end < wanted {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        assert!(self.bytes.len() - self.end >= wanted, "no room for {wanted} bytes");
        &mut self.bytes[self.end..]
    }

    /// The first `count` bytes of the free part now belong to the content.
    pub fn commit(&mut self, count: usize) {
        assert!(count <= self.bytes.len() - self.end, "committed beyond the capacity");
        self.end += count;
    }

    /// Appends `data`. No room for it is a bug.
    pub fn put(&mut self, data: &[u8]) {
        self.free(data.len())[..data.len()].copy_from_slice(data);
        self.commit(data.len());
    }

    /// Takes back the last `count` bytes that were put in.
    pub fn retract(&mut self, count: usize) {
        assert!(count <= self.len(), "retracted before the start");
        self.end -= count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_survives_being_moved() {
        let mut window = Window::new(8);
        window.put(b"abcdef");
        window.consume(4);
        window.put(b"ghij");
        assert_eq!(window.filled(), b"efghij");
        assert_eq!(window.room(), 2);
        window.retract(2);
        window.consume(4);
        assert_eq!(window.free(8).len(), 8, "an empty window starts over");
    }
}
