//! Counts fast writes in flight, and stops them: one word, so that its one order of changes is the whole argument.
//!
//! A writer adds one and looks at what was there: with the gate open it may write, and takes one off when it is done; with
//! the gate closed it takes it off at once. Closing clears a bit of the same word. Every change is a read-modify-write of
//! that word, so for each writer either its addition precedes the closing, and the closer sees it in the count, or it
//! follows, and the writer sees the gate closed and writes nothing. When the count is seen as zero after the closing, all
//! writers that were let in have left; leaving is a release and looking an acquire, hence their writes happened before.
//! A count above zero after the closing may be a writer that is about to turn round; it leaves too, and whoever
//! leaves a closed gate last says so.

use std::sync::atomic::{AtomicU64, Ordering};

const OPEN: u64 = 1 << 63;
const ALL_UNIQUE: u64 = 1 << 62;
const COUNT: u64 = ALL_UNIQUE - 1;

#[derive(Debug, Default)]
pub(super) struct Gate(AtomicU64);

/// What [`Gate::enter`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Entry {
    /// In; every chunk may be written. Leave when done.
    AllUnique,
    /// In; chunks must be known to be unique. Leave when done.
    LookUp,
    /// Not in. Leave all the same.
    Closed,
}

impl Gate {
    /// Lets writes in.
    pub(super) fn open(&self, all_unique: bool) {
        let bits = if all_unique { OPEN | ALL_UNIQUE } else { OPEN };
        self.0.fetch_and(COUNT | OPEN, Ordering::AcqRel);
        self.0.fetch_or(bits, Ordering::AcqRel);
    }

    /// Lets no more in; `true` if none is inside.
    pub(super) fn close(&self) -> bool {
        self.0.fetch_and(COUNT, Ordering::AcqRel) & COUNT == 0
    }

    /// Whether it is closed with nobody inside.
    pub(super) fn is_quiet(&self) -> bool {
        self.0.load(Ordering::Acquire) == 0
    }

    /// Counts the caller in, whatever the answer.
    pub(super) fn enter(&self) -> Entry {
        let before = self.0.fetch_add(1, Ordering::AcqRel);
        match (before & OPEN != 0, before & ALL_UNIQUE != 0) {
            (true, true) => Entry::AllUnique,
            (true, false) => Entry::LookUp,
            (false, _) => Entry::Closed,
        }
    }

    /// Counts the caller out; `true` if it was the last to leave a closed gate.
    pub(super) fn leave(&self) -> bool {
        self.0.fetch_sub(1, Ordering::AcqRel) == 1
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn whoever_leaves_a_closed_gate_last_says_so() {
        let gate = Gate::default();
        assert_eq!(gate.enter(), Entry::Closed);
        assert!(gate.leave());
        gate.open(false);
        assert_eq!(gate.enter(), Entry::LookUp);
        gate.open(true);
        assert_eq!(gate.enter(), Entry::AllUnique);
        assert!(!gate.close());
        assert_eq!(gate.enter(), Entry::Closed);
        assert!(!gate.leave());
        assert!(!gate.leave());
        assert!(gate.leave());
        assert!(gate.is_quiet());
    }

    #[test]
    fn opening_again_without_all_unique_takes_it_back() {
        let gate = Gate::default();
        gate.open(true);
        gate.open(false);
        assert_eq!(gate.enter(), Entry::LookUp);
    }

    #[test]
    fn nothing_is_written_once_the_gate_was_quiet() {
        let gate = Gate::default();
        let quiet = AtomicBool::new(false);
        let over = AtomicBool::new(false);
        gate.open(true);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        if gate.enter() != Entry::Closed {
                            assert!(!quiet.load(Ordering::Relaxed), "a write after the drain");
                        }
                        gate.leave();
                        std::thread::yield_now();
                    }
                });
            }
            for _ in 0..300 {
                if !gate.close() {
                    while !gate.is_quiet() {
                        std::thread::yield_now();
                    }
                }
                quiet.store(true, Ordering::Relaxed);
                std::hint::spin_loop();
                quiet.store(false, Ordering::Relaxed);
                gate.open(true);
            }
            over.store(true, Ordering::Relaxed);
        });
    }
}
