//! One session: its proof, its answers (so that a resend takes effect once) and its events (so that none is missed).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use csnap_proto::limits::EVENTS_PER_SESSION_MAX;
use csnap_proto::message::lock::{LockEvent, LockOp, LockReply, Member, ValueBlock, Watched};
use csnap_proto::{EventNumber, LockId, Name, Secret, Sequence, SessionId};
use serde::{Deserialize, Serialize};

/// Bytes of events that are kept for a session, so that long descriptions of members do not add up.
const EVENT_BYTES_PER_SESSION_MAX: usize = 256 << 10;

/// What an event takes in memory beside its texts, roughly, bytes.
const EVENT_OVERHEAD_BYTES: usize = 64;

/// See the module. Invariants: events are numbered without gaps up to `last_event`, and those up to `forgotten` are
/// no longer kept; answers are those of the operations from the lowest unanswered to `last_sequence`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Session {
    pub(super) secret: Secret,
    pub(super) node: Name,
    pub(super) lease_ms: u64,
    pub(super) info: Vec<u8>,
    pub(super) locks: BTreeSet<LockId>,
    /// Those of them that wait, for a first mode or another.
    pub(super) waits: BTreeSet<LockId>,
    pub(super) watches: BTreeSet<Watched>,
    /// Keys that go with it.
    pub(super) ephemerals: BTreeSet<String>,
    pub(super) last_sequence: Sequence,
    pub(super) answers: BTreeMap<Sequence, StoredAnswer>,
    events: VecDeque<LockEvent>,
    event_bytes: usize,
    pub(super) last_event: EventNumber,
    pub(super) forgotten: EventNumber,
}

/// An answer that its owner may still ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredAnswer {
    /// The last event before it.
    pub(super) after: EventNumber,
    pub(super) reply: StoredReply,
}

/// The reply, but for those that only tell what is and may be long: they are looked up again for a resend. What is newer
/// than asked for does as well, since events bring every reader to the same end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum StoredReply {
    Reply(LockReply),
    Again(LockOp),
}

impl Session {
    pub(super) fn new(secret: Secret, node: Name, lease_ms: u64, info: Vec<u8>) -> Self {
        Self {
            secret,
            node,
            lease_ms,
            info,
            locks: BTreeSet::new(),
            waits: BTreeSet::new(),
            watches: BTreeSet::new(),
            ephemerals: BTreeSet::new(),
            last_sequence: Sequence(0),
            answers: BTreeMap::new(),
            events: VecDeque::new(),
            event_bytes: 0,
            last_event: EventNumber(0),
            forgotten: EventNumber(0),
        }
    }

    pub(super) fn member(&self, session: SessionId) -> Member {
        Member { session, node: self.node.clone(), info: self.info.clone() }
    }

    /// Queues an event; the oldest ones go when there are too many.
    pub(super) fn push_event(&mut self, event: LockEvent) -> EventNumber {
        self.event_bytes += event_bytes(&event);
        self.events.push_back(event);
        self.last_event = self.last_event.next();
        while self.events.len() > EVENTS_PER_SESSION_MAX || self.event_bytes > EVENT_BYTES_PER_SESSION_MAX {
            self.pop_event();
        }
        self.last_event
    }

    /// Forgets events up to `last`.
    pub(super) fn forget_events(&mut self, last: EventNumber) {
        while self.forgotten < last && !self.events.is_empty() {
            self.pop_event();
        }
    }

    fn pop_event(&mut self) {
        let event = self.events.pop_front().expect("the callers see that there is one");
        self.event_bytes -= event_bytes(&event);
        self.forgotten = self.forgotten.next();
    }

    /// Events after `last`; an [`LockEvent::Overrun`] in place of those that are no longer kept.
    pub(super) fn events_after(&self, last: EventNumber) -> impl Iterator<Item = (EventNumber, LockEvent)> {
        let overrun = (last < self.forgotten).then_some((self.forgotten, LockEvent::Overrun));
        let kept = (self.forgotten.0 + 1..).map(EventNumber).zip(self.events.iter().cloned());
        overrun.into_iter().chain(kept.skip_while(move |(number, _)| *number <= last))
    }

    pub(super) fn event_count(&self) -> usize {
        self.events.len()
    }

    pub(super) fn event_bytes_fit(&self) -> bool {
        self.event_bytes <= EVENT_BYTES_PER_SESSION_MAX
    }

    /// Whether the counters agree with each other; a table that was read back is checked with it.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        if self.forgotten.0.checked_add(self.events.len() as u64) != Some(self.last_event.0) {
            return Err("numbers of a session's events");
        }
        if self.events.iter().map(event_bytes).sum::<usize>() != self.event_bytes {
            return Err("size of a session's events");
        }
        if self.answers.keys().next_back().is_some_and(|last| *last > self.last_sequence) {
            return Err("an answer to an operation that was not taken in");
        }
        Ok(())
    }
}

fn event_bytes(event: &LockEvent) -> usize {
    let value_bytes = |value: &ValueBlock| value.bytes.len();
    EVENT_OVERHEAD_BYTES
        + match event {
            LockEvent::Granted { lock, value, .. } => {
                lock.resource.len() + value.as_ref().map_or(0, value_bytes)
            }
            LockEvent::Changed { resource, value, .. } => resource.len() + value_bytes(value),
            LockEvent::Held { resource, .. } => resource.len(),
            LockEvent::Lost { lock, .. } => 2 * lock.resource.len(),
            LockEvent::Key { key, entry, .. } => {
                2 * key.len() + entry.as_ref().map_or(0, |entry| entry.value.len())
            }
            LockEvent::MemberUp(member) => member.node.as_str().len() + member.info.len(),
            LockEvent::MemberDown { node, .. } => node.as_str().len(),
            LockEvent::Cancelled { .. }
            | LockEvent::Demoted { .. }
            | LockEvent::Deadlock { .. }
            | LockEvent::Blocking { .. }
            | LockEvent::Jeopardy
            | LockEvent::Overrun => 0,
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session() -> Session {
        let node = Name::new("n1").expect("a name");
        Session::new(Secret([0; 16]), node, 1000, Vec::new())
    }

    fn numbers(session: &Session, after: u64) -> Vec<(u64, bool)> {
        let events = session.events_after(EventNumber(after));
        events.map(|(number, event)| (number.0, event == LockEvent::Overrun)).collect()
    }

    #[test]
    fn events_are_replayed_from_the_one_after_the_last_seen() {
        let mut session = session();
        for _ in 0..3 {
            session.push_event(LockEvent::Jeopardy);
        }
        assert_eq!(numbers(&session, 0), [(1, false), (2, false), (3, false)]);
        assert_eq!(numbers(&session, 2), [(3, false)]);
        assert_eq!(numbers(&session, 3), []);
        assert_eq!(numbers(&session, 9), []);
    }

    #[test]
    fn who_fell_behind_is_told_to_look_anew() {
        let mut session = session();
        for _ in 0..EVENTS_PER_SESSION_MAX + 5 {
            session.push_event(LockEvent::Jeopardy);
        }
        let seen = numbers(&session, 3);
        assert_eq!(seen[0], (5, true));
        assert_eq!(seen[1], (6, false));
        assert_eq!(seen.len(), EVENTS_PER_SESSION_MAX + 1);
        assert_eq!(numbers(&session, 5)[0], (6, false));
        assert_eq!(session.check(), Ok(()));
    }

    #[test]
    fn long_events_count_by_their_size() {
        let mut session = session();
        let member = Member { info: vec![0; 2048], ..session.member(SessionId([0; 16])) };
        for _ in 0..EVENTS_PER_SESSION_MAX {
            session.push_event(LockEvent::MemberUp(member.clone()));
        }
        assert!(session.event_bytes <= EVENT_BYTES_PER_SESSION_MAX);
        assert!(session.forgotten > EventNumber(0));
    }

    #[test]
    fn seen_events_are_forgotten_and_not_more() {
        let mut session = session();
        for _ in 0..4 {
            session.push_event(LockEvent::Jeopardy);
        }
        session.forget_events(EventNumber(2));
        assert_eq!(numbers(&session, 2), [(3, false), (4, false)]);
        session.forget_events(EventNumber(100));
        assert_eq!((session.forgotten, session.last_event), (EventNumber(4), EventNumber(4)));
        assert_eq!(session.check(), Ok(()));
    }
}
