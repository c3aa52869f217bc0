//! What time it is, and what is going to happen: in order of time; at the same time, in the order in which it was foreseen.
//!
//! Times are microseconds. They never go backwards.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// A queue of happenings.
#[derive(Debug)]
pub struct Queue<T> {
    now: u64,
    heap: BinaryHeap<Entry<T>>,
    foreseen: u64,
}

#[derive(Debug)]
struct Entry<T> {
    at: u64,
    order: u64,
    what: T,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { now: 0, heap: BinaryHeap::new(), foreseen: 0 }
    }
}

impl<T> Queue<T> {
    /// The present.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.now
    }

    /// Nothing happens until `at`, which is not past.
    pub fn pass(&mut self, at: u64) {
        assert!(at >= self.now, "time goes on");
        self.now = at;
    }

    /// `what` happens at `at`.
    pub fn push(&mut self, at: u64, what: T) {
        self.foreseen += 1;
        self.heap.push(Entry { at, order: self.foreseen, what });
    }

    /// `what` happens in `wait`.
    pub fn push_in(&mut self, wait: u64, what: T) {
        self.push(self.now + wait, what);
    }

    /// The next one; the present is its time then. What was due before now happens now.
    pub fn pop(&mut self) -> Option<T> {
        let entry = self.heap.pop()?;
        self.now = self.now.max(entry.at);
        Some(entry.what)
    }

    /// When the next one happens.
    #[must_use]
    pub fn next_at(&self) -> Option<u64> {
        self.heap.peek().map(|entry| entry.at)
    }
}

impl<T> PartialEq for Entry<T> {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl<T> Eq for Entry<T> {}

impl<T> PartialOrd for Entry<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Entry<T> {
    /// The heap gives its greatest: the earliest.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earliest_comes_first_and_equals_keep_their_order() {
        let mut queue = Queue::default();
        for (at, what) in [(5, 'c'), (1, 'a'), (5, 'd'), (2, 'b')] {
            queue.push(at, what);
        }
        let all: String = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(all, "abcd");
    }

    #[test]
    fn the_present_is_the_time_of_what_happened_last_and_never_goes_back() {
        let mut queue = Queue::default();
        queue.push(3, 'a');
        queue.push_in(5, 'b');
        let times: Vec<_> = std::iter::from_fn(|| queue.pop().map(|_| queue.now())).collect();
        assert_eq!(times, [3, 5]);
        queue.pass(9);
        queue.push(7, 'c');
        assert_eq!((queue.pop(), queue.now()), (Some('c'), 9));
    }
}
