//! When the next message that asks for chunks may go.
//!
//! Copying out thirty chunks takes the server hardly longer than one: both cost a sync of its disk. So what comes while
//! a message is unanswered gathers for the next; only a message that is full, or late, does not hold the next one up.
//! And after an answer the writes that it let go are about to return to a guest that keeps its queue full: if they are
//! more than already wait, the next message waits for as many to come again, but no longer than [`HOLD`]. A guest that
//! does not bring as many is not waited for again for a while, so that one with a changing depth loses next to nothing.

use std::time::Duration;

use csnap_proto::Time;

use super::QUERIES_IN_FLIGHT_MAX;

/// An answer that takes longer is late: ten times what a copy-out takes on a disk that is not slow.
pub(super) const LATE: Duration = Duration::from_millis(10);

/// A message waits no longer for writes to gather after an answer: twice what it takes, and hardly more than that on a
/// busy machine.
const HOLD: Duration = Duration::from_millis(2);

/// Answers without holding, after a hold that was in vain.
const ANSWERS_AFTER_A_VAIN_HOLD: u32 = 32;

#[derive(Debug, Default)]
pub(super) struct Gathering {
    /// When the youngest message was sent, and whether anything more fitted it.
    asked_at: Time,
    filled: bool,
    /// When the last answer came, and how many writes are expected to gather after it.
    answered_at: Time,
    expected: usize,
    /// Answers that no message is held after.
    unheld: u32,
}

impl Gathering {
    /// From when on a message may go for `waiting` writes beside `unanswered` others; `None` if those are too many.
    pub(super) fn may_ask_at(&self, unanswered: usize, waiting: usize) -> Option<Time> {
        match unanswered {
            0 if waiting < self.expected => Some(self.answered_at.after(HOLD)),
            0 => Some(Time(0)),
            QUERIES_IN_FLIGHT_MAX.. => None,
            _ if self.filled => Some(Time(0)),
            _ => Some(self.asked_at.after(LATE)),
        }
    }

    /// A message goes for `waiting` writes; nothing more fitted it if `filled`.
    pub(super) fn on_asked(&mut self, now: Time, waiting: usize, filled: bool) {
        if waiting < self.expected {
            self.unheld = ANSWERS_AFTER_A_VAIN_HOLD;
        }
        (self.asked_at, self.filled, self.expected) = (now, filled, 0);
    }

    /// An answer let `released` writes go while `waiting` others wait to be asked for.
    pub(super) fn on_answered(&mut self, now: Time, released: usize, waiting: usize) {
        let is_held = self.unheld == 0 && !self.filled && released >= waiting;
        self.unheld = self.unheld.saturating_sub(1);
        (self.answered_at, self.expected) = (now, if is_held { released + waiting } else { 0 });
    }

    /// What was asked for is asked for anew: nothing is expected to gather.
    pub(super) fn start_over(&mut self) {
        self.expected = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn us(us: u64) -> Time {
        Time(us)
    }

    #[test]
    fn a_guest_that_keeps_its_queue_full_is_asked_for_in_one_message() {
        let mut gathering = Gathering::default();
        assert_eq!(gathering.may_ask_at(0, 1), Some(us(0)));
        gathering.on_asked(us(0), 1, false);
        assert_eq!(gathering.may_ask_at(1, 31), Some(us(10_000)));
        gathering.on_answered(us(900), 1, 31);
        assert_eq!(gathering.may_ask_at(0, 31), Some(us(0)), "most wait already");
        gathering.on_asked(us(900), 31, false);
        gathering.on_answered(us(1_900), 31, 1);
        assert_eq!(gathering.may_ask_at(0, 31), Some(us(3_900)));
        assert_eq!(gathering.may_ask_at(0, 32), Some(us(0)));
    }

    #[test]
    fn a_guest_that_does_not_come_back_is_waited_for_once() {
        let mut gathering = Gathering::default();
        gathering.on_asked(us(0), 8, false);
        gathering.on_answered(us(900), 8, 0);
        assert_eq!(gathering.may_ask_at(0, 3), Some(us(2_900)));
        gathering.on_asked(us(2_900), 3, false);
        for answer in 0..ANSWERS_AFTER_A_VAIN_HOLD {
            gathering.on_answered(us(2_000), 3, 0);
            assert_eq!(gathering.may_ask_at(0, 1), Some(us(0)), "answer {answer}");
            gathering.on_asked(us(2_000), 1, false);
        }
        gathering.on_answered(us(3_000), 1, 1);
        assert_eq!(gathering.may_ask_at(0, 1), Some(us(5_000)));
    }

    #[test]
    fn after_a_full_message_nothing_is_held() {
        let mut gathering = Gathering::default();
        gathering.on_asked(us(0), 2000, true);
        assert_eq!(gathering.may_ask_at(1, 500), Some(us(0)));
        gathering.on_answered(us(900), 1500, 500);
        assert_eq!(gathering.may_ask_at(0, 500), Some(us(0)));
        assert_eq!(gathering.may_ask_at(QUERIES_IN_FLIGHT_MAX, 500), None);
    }
}
