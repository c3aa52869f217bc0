//! Leader election, written on a lock, its value block and a watch: nothing of it is known to lockd.
//!
//! Whoever holds the lock in PW leads, under the term of the grant. The value block holds what the leader says of itself
//! and how far it is ([`Eligibility`]); that stays when the leader goes. A candidate that is granted the lock and is not as
//! far lets it go again: what the leader promised to others it could not keep. The others see all of it by a watch.
//!
//! A term decides what is true, not this library: whoever acts on a leader's behalf checks its term, as with any lock. A
//! new leader reconciles with its followers before it proclaims itself, and more so if the one before it went without a
//! word (`clean` is false).
//!
//! [`Election`] is pure, as [`LockClient`](super::LockClient) is: its owner asks for [`Election::next_op`] whenever
//! something happened, carries it out in a session, and hands in the answers and events of that session.

#[cfg(test)]
mod tests;

use csnap_proto::limits::VALUE_BLOCK_BYTES_MAX;
use csnap_proto::message::lock::{
    Flags, LockEvent, LockOp, LockReply, LockView, Mode, QueuedView, ValueBlock, ValueChange, Watched,
};
use csnap_proto::{LockId, Term};
use serde::{Deserialize, Serialize};

/// Most bytes that a leader says of itself: what the value block leaves.
pub const LEADER_DATA_BYTES_MAX: usize = VALUE_BLOCK_BYTES_MAX - 32;

/// How far a candidate is, most important first: for one that replicates a log, the term of its last entry and its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Eligibility(pub u64, pub u64);

impl Eligibility {
    /// May lead whatever was promised: for an operator who gives up those that are further.
    pub const WHATEVER: Self = Self(u64::MAX, u64::MAX);
}

/// Content of the value block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// Who leads next is at least as far.
    floor: Eligibility,
    /// What the leader says; empty of one that resigned.
    data: Vec<u8>,
}

/// A leader as the others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    /// Term of its reign.
    pub term: Term,
    /// What it says of itself.
    pub data: Vec<u8>,
}

/// What happened in an election.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ElectionEvent {
    /// We lead. Nobody sees it before [`Election::proclaim`].
    Elected {
        /// Under this term.
        term: Term,
        /// The leader before went by its own word, or there was none: its last proclamation is true.
        clean: bool,
    },
    /// The lock was ours, but others were promised more than we have. We are no candidate any more.
    Ineligible {
        /// How far one has to be.
        needed: Eligibility,
    },
    /// We do not lead any more, nor wait to: the lock was taken from us, or the session ended.
    Deposed,
    /// We gave it up, as asked.
    Resigned,
    /// Two thirds of the lease passed without a renewal: we lead still, and soon may not.
    Jeopardy,
    /// There is another leader, or it says something else, or there is none.
    Observed(Option<Leader>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stand {
    Looking,
    Asked,
    Queued { lock: LockId },
    Leading { lock: LockId },
    Leaving { lock: LockId },
}

/// See the module.
#[derive(Debug)]
pub struct Election {
    name: String,
    stand: Stand,
    watching: bool,
    /// Candidate, and how far.
    candidate: Option<Eligibility>,
    /// Highest that was promised by whoever led.
    floor: Eligibility,
    /// To be published.
    proclamation: Option<Record>,
    /// Of an earlier life of the owner, to be given up.
    leftovers: Vec<LockId>,
    observed: Option<Leader>,
}

impl Election {
    /// An election on the lock of this name; whoever takes part uses the same, and nobody else does.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            stand: Stand::Looking,
            watching: false,
            candidate: None,
            floor: Eligibility::default(),
            proclamation: None,
            leftovers: Vec::new(),
            observed: None,
        }
    }

    /// The session was resumed by an owner without memory: what it holds of this election goes, for who led by it is
    /// gone.
    pub fn begin(&mut self, locks: &[LockView], queued: &[QueuedView]) {
        let held = locks.iter().map(|view| (view.lock, &view.resource));
        let waits = queued.iter().map(|view| (view.lock, &view.resource));
        let ours = held.chain(waits).filter(|(_, resource)| **resource == self.name);
        self.leftovers = ours.map(|(lock, _)| lock).collect();
        self.leftovers.dedup();
    }

    /// Stands for election; while it waits or leads, only says how far it is now.
    pub fn campaign(&mut self, eligibility: Eligibility) {
        self.candidate = Some(eligibility);
    }

    /// As leader: says this of itself to everybody (at most [`LEADER_DATA_BYTES_MAX`] bytes, not empty), and that who
    /// follows must be as far. Also later, as often as it likes; before its followers rely on being that far.
    pub fn proclaim(&mut self, data: Vec<u8>, floor: Eligibility) {
        assert!(!data.is_empty() && data.len() <= LEADER_DATA_BYTES_MAX, "leaders say little, but something");
        if let Stand::Leading { .. } = self.stand {
            self.floor = self.floor.max(floor);
            self.proclamation = Some(Record { floor: self.floor, data });
        }
    }

    /// Leads no more and stands no more. [`ElectionEvent::Resigned`] follows if there was anything to give up.
    pub fn resign(&mut self) {
        self.candidate = None;
        self.proclamation = None;
    }

    /// The leader as last seen.
    #[must_use]
    pub fn leader(&self) -> Option<&Leader> {
        self.observed.as_ref()
    }

    /// The next operation to ask for; call again until there is none.
    pub fn next_op(&mut self) -> Option<LockOp> {
        if let Some(lock) = self.leftovers.pop() {
            return Some(LockOp::unlock(lock, ValueChange::Invalidate));
        }
        if !std::mem::replace(&mut self.watching, true) {
            return Some(LockOp::watch(Watched::Value(self.name.clone())));
        }
        match self.stand {
            Stand::Looking if self.candidate.is_some() => {
                self.stand = Stand::Asked;
                // Candidates wait for years: that is no deadlock.
                Some(LockOp::lock(self.name.clone(), Mode::Pw, Flags::NODLCKWT))
            }
            Stand::Queued { lock } | Stand::Leading { lock } if self.candidate.is_none() => {
                self.stand = Stand::Leaving { lock };
                let farewell = Record { floor: self.floor, data: Vec::new() };
                Some(LockOp::unlock(lock, ValueChange::Write(encode(&farewell))))
            }
            Stand::Leading { lock } => {
                let record = self.proclamation.take()?;
                Some(LockOp::write(lock, Mode::Pw, encode(&record)))
            }
            _ => None,
        }
    }

    /// An operation was answered. Those of others do no harm.
    pub fn on_answer(&mut self, op: &LockOp, reply: &LockReply) -> Option<ElectionEvent> {
        match (op, reply) {
            (LockOp::Watch { what, .. }, LockReply::Value { value, vacant }) if self.is_watch(what) => {
                self.on_value(value, *vacant)
            }
            (LockOp::Lock { resource, .. }, reply) if *resource == self.name => match reply {
                LockReply::Granted { lock, value, .. } => self.on_grant(lock, value.as_ref()),
                LockReply::Queued { lock, .. } if self.stand == Stand::Asked => {
                    self.stand = Stand::Queued { lock: *lock };
                    None
                }
                // At a limit of lockd: to stand again is the owner's decision.
                _ => self.depose(),
            },
            (LockOp::Unlock { lock, .. }, _) if self.stand == (Stand::Leaving { lock: *lock }) => {
                self.stand = Stand::Looking;
                self.candidate.is_none().then_some(ElectionEvent::Resigned)
            }
            _ => None,
        }
    }

    /// Something happened in the session.
    pub fn on_event(&mut self, event: &LockEvent) -> Option<ElectionEvent> {
        match event {
            LockEvent::Granted { lock, value, .. } if lock.resource == self.name => {
                self.on_grant(lock, value.as_ref())
            }
            LockEvent::Lost { lock, .. } if lock.resource == self.name => self.depose(),
            LockEvent::Changed { resource, value, vacant } if *resource == self.name => {
                self.on_value(value, *vacant)
            }
            LockEvent::Overrun => {
                self.watching = false;
                None
            }
            _ => None,
        }
    }

    /// The session's lease runs out.
    pub fn on_jeopardy(&self) -> Option<ElectionEvent> {
        matches!(self.stand, Stand::Leading { .. }).then_some(ElectionEvent::Jeopardy)
    }

    /// The session is over: nothing of it is held, and the next session begins anew.
    pub fn on_session_lost(&mut self) -> Option<ElectionEvent> {
        self.watching = false;
        self.leftovers.clear();
        self.depose()
    }

    fn is_watch(&self, what: &Watched) -> bool {
        matches!(what, Watched::Value(name) if *name == self.name)
    }

    fn on_grant(&mut self, lock: &LockView, value: Option<&ValueBlock>) -> Option<ElectionEvent> {
        let waits = self.stand == Stand::Asked || self.stand == (Stand::Queued { lock: lock.lock });
        if !waits {
            return None;
        }
        self.stand = Stand::Leading { lock: lock.lock };
        let known = value.filter(|value| !value.bytes.is_empty());
        self.floor = known.and_then(decode).map_or(self.floor, |record| record.floor);
        let own = self.candidate?;
        if own < self.floor {
            self.candidate = None;
            return Some(ElectionEvent::Ineligible { needed: self.floor });
        }
        Some(ElectionEvent::Elected { term: lock.term, clean: known.is_none_or(|value| value.valid) })
    }

    fn depose(&mut self) -> Option<ElectionEvent> {
        let stood = !matches!(self.stand, Stand::Looking);
        (self.stand, self.candidate, self.proclamation) = (Stand::Looking, None, None);
        stood.then_some(ElectionEvent::Deposed)
    }

    fn on_value(&mut self, value: &ValueBlock, vacant: bool) -> Option<ElectionEvent> {
        let record = decode(value);
        self.floor = record.as_ref().map_or(self.floor, |record| record.floor);
        let record = record.filter(|record| value.valid && !vacant && !record.data.is_empty());
        let leader = record.map(|record| Leader { term: value.term, data: record.data });
        if leader == self.observed {
            return None;
        }
        self.observed.clone_from(&leader);
        Some(ElectionEvent::Observed(leader))
    }
}

fn encode(record: &Record) -> Vec<u8> {
    postcard::to_stdvec(record).expect("a record encodes")
}

/// What others wrote there is nothing.
fn decode(value: &ValueBlock) -> Option<Record> {
    postcard::from_bytes(&value.bytes).ok()
}
