//! The anointing loop on the server lock: who may serve, as the value block and the lock say.
//!
//! ```text
//! Away ─session opened─> Looking ─CR granted─> Reader ─vacant, our turn─> Trying ─granted─> Reign
//!                           ^                    ^  └────────would block──────┘               │
//!                           └─────released─── Releasing <──child gone, or drained for a move──┘
//! ```
//!
//! The watch is set before the first look, so nothing that happens after it is missed. What it is not: the supervisor of
//! the child; [`Anointing::pursue`] is told how the child is and says which lock operation follows. Invariants: at
//! most one operation that changes the lock's mode is unanswered; the term of a reign is the one that came with its
//! grant, whatever later answers say; a reign without its child is given up in the same step.

use std::time::Duration;

use csnap_proto::message::local::{ServerAddress, ServerState};
use csnap_proto::message::lock::{
    Flags, LockEvent, LockOp, LockReply, LockView, Mode, ValueBlock, ValueChange, Watched,
};
use csnap_proto::{LockId, Name, Term, Time};

use super::lock::Look;

/// The lock whose holder's server serves; its value block is a [`ServerAddress`] in postcard.
pub const SERVER_LOCK: &str = "csnap/server";

/// Wait after a refused conversion that no news explains (someone holds the lock in a mode that csnap never asks for).
const REFUSED_WAIT: Duration = Duration::from_millis(100);

/// At a cold start a node waits this long for others to show up, if another one served last, or none ever: nodes that
/// start together are seen by then, and nobody minds it once in the life of a cluster.
const SHOW_UP_WITHIN: Duration = Duration::from_millis(200);

/// At a cold start a node waits this long for a better one that is up: starting a server takes well below it, and guests
/// have waited longer already.
const COLD_START_WITHIN: Duration = Duration::from_secs(2);

/// How the node stands, for [`Anointing::pursue`].
#[derive(Debug)]
pub(super) struct Situation<'a> {
    pub(super) node: &'a Name,
    /// Our rank among the live nodes that could serve; none: we cannot, or must not.
    pub(super) place: Option<u32>,
    /// Wait a rank.
    pub(super) place_step: Duration,
    /// A node of higher priority is up, ready or not.
    pub(super) outranked: bool,
    /// Term of the child that lives, and whether it serves.
    pub(super) child: Option<(Term, bool)>,
    /// Where the child listens.
    pub(super) tcp: &'a str,
    /// The child drained, or will never.
    pub(super) drained: bool,
}

/// Where the server goes when the present one has drained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Succession {
    /// Whoever steps forward: this agent stops.
    Open,
    /// This node first.
    To { node: Name, pinned: bool },
}

/// The lock is ours.
#[derive(Debug)]
pub(super) struct Reign {
    lock: LockId,
    pub(super) term: Term,
    /// Last state that we asked to be published.
    asked: Option<ServerState>,
    pub(super) succession: Option<Succession>,
}

#[derive(Debug)]
enum Stand {
    Away,
    Looking { asked: bool },
    Reader { lock: LockId },
    Trying { lock: LockId },
    Reign(Reign),
    Releasing,
}

/// A grant of the lock, to be followed by the anointing of the child.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Anointed {
    pub(super) term: Term,
    /// An operator chose this node.
    pub(super) pinned: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Anointing {
    stand: Stand,
    /// At the value block and the vacancy.
    look: Look,
    /// Held from an earlier life of the agent, to be given back.
    leftovers: Vec<LockId>,
    value: ValueBlock,
    vacant_since: Option<Time>,
    not_before: Time,
    /// There was a server since this agent started, its own or another's: whoever follows it does so without a wait. Until
    /// then a vacancy is that of a cold start.
    warm: bool,
}

impl Anointing {
    pub(super) fn new() -> Self {
        Self {
            stand: Stand::Away,
            look: Look::Idle,
            leftovers: Vec::new(),
            value: ValueBlock::default(),
            vacant_since: None,
            not_before: Time(0),
            warm: false,
        }
    }

    /// A session is open that holds nothing of ours. What it holds from an earlier life of the agent goes: the server
    /// that it stood for died with that agent.
    pub(super) fn begin(&mut self, leftovers: &[LockView]) {
        let ours = leftovers.iter().filter(|lock| lock.resource == SERVER_LOCK);
        let served = ours.clone().any(|lock| lock.mode == Mode::Pw);
        *self = Self {
            warm: self.warm || served,
            stand: Stand::Looking { asked: false },
            look: Look::Due,
            leftovers: ours.map(|lock| lock.lock).collect(),
            ..Self::new()
        };
    }

    /// News was lost.
    pub(super) fn look_again(&mut self) {
        self.look.again();
    }

    /// The session is gone, and the lock with it.
    pub(super) fn lose(&mut self) {
        *self = Self { warm: self.warm, ..Self::new() };
    }

    pub(super) fn is_away(&self) -> bool {
        matches!(self.stand, Stand::Away)
    }

    /// An operation was answered.
    pub(super) fn on_answer(
        &mut self,
        now: Time,
        node: &Name,
        op: &LockOp,
        reply: LockReply,
    ) -> Option<Anointed> {
        match (op, reply) {
            (LockOp::Watch { .. }, LockReply::Value { value, vacant }) => {
                self.look = Look::Done;
                self.on_value(now, value, vacant);
                None
            }
            (LockOp::Watch { .. }, _) => {
                self.look = Look::Due;
                self.not_before = now.after(REFUSED_WAIT);
                None
            }
            (LockOp::Lock { .. } | LockOp::Convert { .. }, LockReply::Granted { lock, value, .. }) => {
                self.on_grant(node, lock, value)
            }
            (LockOp::Convert { .. }, _) => {
                if let Stand::Trying { lock } = self.stand {
                    self.stand = Stand::Reader { lock };
                    self.not_before = now.after(REFUSED_WAIT);
                }
                None
            }
            (LockOp::Lock { .. }, _) => {
                if let Stand::Looking { asked } = &mut self.stand {
                    *asked = false;
                    self.not_before = now.after(REFUSED_WAIT);
                }
                None
            }
            (LockOp::Unlock { .. }, _) => {
                if matches!(self.stand, Stand::Releasing) {
                    self.stand = Stand::Looking { asked: false };
                }
                None
            }
            _ => None,
        }
    }

    /// Something happened to the lock.
    pub(super) fn on_event(&mut self, now: Time, node: &Name, event: LockEvent) -> Option<Anointed> {
        match event {
            LockEvent::Changed { resource, value, vacant } if resource == SERVER_LOCK => {
                self.on_value(now, value, vacant);
                None
            }
            LockEvent::Granted { lock, value, .. } => self.on_grant(node, lock, value),
            _ => None,
        }
    }

    fn on_value(&mut self, now: Time, value: ValueBlock, vacant: bool) {
        self.value = value;
        if !vacant {
            self.warm = true;
            self.vacant_since = None;
        } else {
            self.vacant_since.get_or_insert(now);
        }
    }

    fn on_grant(&mut self, node: &Name, view: LockView, value: Option<ValueBlock>) -> Option<Anointed> {
        match self.stand {
            Stand::Looking { asked: true } if view.resource == SERVER_LOCK => {
                self.stand = Stand::Reader { lock: view.lock };
                None
            }
            Stand::Trying { lock } if lock == view.lock && view.mode == Mode::Pw => {
                let handed_to_us = value.as_ref().and_then(decode).filter(|address| address.node == *node);
                let pinned = handed_to_us
                    .is_some_and(|address| address.state == ServerState::Handover { pinned: true });
                self.stand = Stand::Reign(Reign { lock, term: view.term, asked: None, succession: None });
                Some(Anointed { term: view.term, pinned })
            }
            _ => None,
        }
    }

    /// The next lock operation that the situation asks for; call again until there is none.
    pub(super) fn pursue(&mut self, now: Time, situation: &Situation<'_>) -> Option<LockOp> {
        if let Some(lock) = self.leftovers.pop() {
            return Some(LockOp::unlock(lock, ValueChange::Invalidate));
        }
        if self.not_before <= now && self.look.take_on() {
            return Some(LockOp::watch(Watched::Value(SERVER_LOCK.to_owned())));
        }
        match &mut self.stand {
            Stand::Looking { asked: asked @ false } if self.not_before <= now => {
                *asked = true;
                Some(LockOp::lock(SERVER_LOCK, Mode::Cr, Flags::NONE))
            }
            Stand::Reader { lock } => {
                let lock = *lock;
                let due = self.turn(situation).is_some_and(|turn| turn <= now);
                due.then(|| {
                    self.stand = Stand::Trying { lock };
                    LockOp::convert(lock, Mode::Pw, Flags::NOQUEUE)
                })
            }
            Stand::Reign(reign) => {
                let op = reign.pursue(situation)?;
                if matches!(op, LockOp::Unlock { .. }) {
                    self.stand = Stand::Releasing;
                }
                Some(op)
            }
            _ => None,
        }
    }

    /// When it is our turn to try, if the lock is vacant and we may.
    fn turn(&self, situation: &Situation<'_>) -> Option<Time> {
        let since = self.vacant_since.filter(|_| self.has_looked())?;
        let place = situation.place?;
        let steps = match self.handover() {
            Some(next) if next == *situation.node => 0,
            Some(_) => place.saturating_add(1),
            None => place,
        };
        let ranks = situation.place_step.saturating_mul(steps);
        Some(since.after(ranks + self.cold_wait(situation)).max(self.not_before))
    }

    /// What a cold start adds: the first that is ready is rarely the best, and a server that moves soon after is a pause
    /// for nothing.
    fn cold_wait(&self, situation: &Situation<'_>) -> Duration {
        let last: Option<ServerAddress> = postcard::from_bytes(&self.value.bytes).ok();
        if self.warm || self.handover().is_some() {
            Duration::ZERO
        } else if situation.outranked {
            COLD_START_WITHIN
        } else if last.is_some_and(|last| last.node == *situation.node) {
            Duration::ZERO
        } else {
            SHOW_UP_WITHIN
        }
    }

    /// When [`Self::pursue`] has something to do because time passed.
    pub(super) fn next_deadline(&self, situation: &Situation<'_>) -> Option<Time> {
        match self.stand {
            _ if self.look == Look::Due => Some(self.not_before),
            Stand::Looking { asked: false } => Some(self.not_before),
            Stand::Reader { .. } => self.turn(situation),
            _ => None,
        }
    }

    /// Whose turn it is first, if the last holder said so.
    fn handover(&self) -> Option<Name> {
        let address = decode(&self.value)?;
        matches!(address.state, ServerState::Handover { .. }).then_some(address.node)
    }

    /// What the holder published, while there is one.
    pub(super) fn published(&self) -> Option<ServerAddress> {
        if !self.has_looked() || self.vacant_since.is_some() { None } else { decode(&self.value) }
    }

    /// Whether lockd told what is so; before, nothing is known of the lock.
    pub(super) fn has_looked(&self) -> bool {
        self.look == Look::Done
    }

    pub(super) fn is_vacant(&self) -> bool {
        self.vacant_since.is_some()
    }

    pub(super) fn reign(&self) -> Option<&Reign> {
        if let Stand::Reign(reign) = &self.stand { Some(reign) } else { None }
    }

    pub(super) fn reign_mut(&mut self) -> Option<&mut Reign> {
        if let Stand::Reign(reign) = &mut self.stand { Some(reign) } else { None }
    }

    /// Nothing of the lock is ours or on its way to be, beyond reading.
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.stand, Stand::Away | Stand::Looking { .. } | Stand::Reader { .. })
    }
}

impl Reign {
    fn pursue(&mut self, situation: &Situation<'_>) -> Option<LockOp> {
        let lock = self.lock;
        let child = situation.child.filter(|(term, _)| *term == self.term);
        let Some((_, serving)) = child.filter(|_| self.succession.is_none() || !situation.drained) else {
            return Some(LockOp::unlock(lock, self.last_word()));
        };
        let state = if serving { ServerState::Ready } else { ServerState::Starting };
        if self.succession.is_some() || self.asked == Some(state) {
            return None;
        }
        self.asked = Some(state);
        let address = ServerAddress {
            node: situation.node.clone(),
            term: self.term,
            tcp: situation.tcp.to_owned(),
            state,
        };
        Some(LockOp::write(lock, Mode::Pw, encode(&address)))
    }

    /// What the value block says when the reign ends.
    fn last_word(&self) -> ValueChange {
        match &self.succession {
            Some(Succession::To { node, pinned }) => {
                let state = ServerState::Handover { pinned: *pinned };
                let address =
                    ServerAddress { node: node.clone(), term: self.term, tcp: String::new(), state };
                ValueChange::Write(encode(&address))
            }
            Some(Succession::Open) | None => ValueChange::Invalidate,
        }
    }
}

fn encode(address: &ServerAddress) -> Vec<u8> {
    postcard::to_stdvec(address).expect("an address encodes")
}

fn decode(value: &ValueBlock) -> Option<ServerAddress> {
    if value.valid { postcard::from_bytes(&value.bytes).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused_is_asked_for_again_a_while_later() {
        let me = Name::new("n1").expect("a name");
        let situation = Situation {
            node: &me,
            place: None,
            place_step: REFUSED_WAIT,
            outranked: false,
            child: None,
            tcp: "",
            drained: false,
        };
        let mut anointing = Anointing::new();
        anointing.begin(&[]);
        let watch = anointing.pursue(Time(0), &situation).expect("a look");
        let lock = anointing.pursue(Time(0), &situation).expect("a lock");
        assert_eq!(anointing.pursue(Time(0), &situation), None);
        for op in [&watch, &lock] {
            let full = LockReply::Invalid("full".to_owned());
            assert_eq!(anointing.on_answer(Time(0), &me, op, full), None);
        }
        assert_eq!(anointing.pursue(Time(0), &situation), None, "it does not spin");
        let again = anointing.next_deadline(&situation).expect("it tries again");
        assert_eq!(anointing.pursue(again, &situation), Some(watch));
        assert_eq!(anointing.pursue(again, &situation), Some(lock));
    }
}
