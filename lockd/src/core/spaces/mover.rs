//! Who drives a move: the leader of the group that a lockspace moves away from. It calls the destination where clients
//! would, sends the frozen table in pieces, has Forward committed, tells the destination, has that committed. Pure.
//!
//! It keeps nothing that matters: what is to be done next follows from the lockspace's state in the log, and from what the
//! destination says that it has. A leader that follows it, or comes after a restart, goes on in the same way.
//!
//! Invariants:
//! - Activate is said only of a lockspace that is forwarded, durably, here; Discard only of one that is served here again;
//! - a lockspace is not frozen for longer than [`FROZEN_MAX`] without progress: then the move is given up by itself, and at
//!   once if every address of the destination refused this lockd;
//! - at most [`WINDOW`] pieces are unanswered.

use ::core::net::SocketAddr;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use csnap_proto::limits::{IMPORT_BYTES_MAX, LOCKSPACE_BYTES_MAX};
use csnap_proto::message::lock::{FromLockd, Manifest, SpaceReply, SpaceRequest, ToLockd, Way};
use csnap_proto::{Frame, Name, RequestId, Term, Time};

use super::canary::{Broken, Canary};
use super::{Command, Space, SpaceId, Spaces, State};
use crate::core::table::Table;

/// Pieces on their way: 128 KiB, a few batches of the destination's log.
const WINDOW: usize = 8;

/// An attempt, or the answer to a request, is waited for as long; then another address is tried.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);

/// Between two attempts.
const AGAIN: Duration = Duration::from_millis(50);

/// Before a destination is asked again that says that it has nothing to activate: only an operator can help it.
const REFUSED_AGAIN: Duration = Duration::from_secs(1);

/// How long a move may make no progress before it is given up, so that a destination that is away does not keep everybody
/// from their locks.
pub const FROZEN_MAX: Duration = Duration::from_secs(15);

/// How long the destination is looked for to tell it that a move was given up.
const TAKE_BACK_MAX: Duration = Duration::from_secs(5);

/// A connection to another group; numbers are not reused in the life of a leader's process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct CallId(pub u64);

/// Why a connection is not there, in one line for people.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Lost {
    /// Nobody answered, or it broke: another attempt may do.
    #[error("{0}")]
    Away(String),
    /// Somebody answered, and one of the two does not speak with the other.
    #[error("{0}")]
    Refused(String),
}

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// Time passed, or the lockspaces changed.
    Tick,
    /// The connection is there.
    Reached(CallId),
    /// It could not be made, or broke.
    Lost(CallId, Lost),
    /// The other group said something.
    Heard(CallId, Frame<FromLockd>),
}

/// What is to be done, in order.
#[derive(Debug, PartialEq, Eq)]
pub enum Output {
    /// Connect to this lockd.
    Call(CallId, SocketAddr),
    /// Send this.
    Say(CallId, Frame<ToLockd>),
    /// Drop the connection, or stop trying to make it.
    HangUp(CallId),
    /// Have this committed.
    Decide(Command),
}

/// What is to be done about a lockspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Send it.
    Ship,
    /// Tell the destination that it is forwarded.
    Tell,
    /// Tell the destination that the move was given up, until then.
    TakeBack { until: Time },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Down { retry_at: Time },
    Calling { call: CallId, give_up_at: Time },
    Up { call: CallId },
}

/// A frozen lockspace as it travels.
#[derive(Debug)]
struct Freight {
    bytes: Bytes,
    manifest: Manifest,
}

impl Freight {
    fn pack(table: &Table) -> Self {
        let bytes: Bytes = postcard::to_stdvec(table).expect("writing to memory does not fail").into();
        let manifest = Manifest { bytes: bytes.len() as u64, hash: *blake3::hash(&bytes).as_bytes() };
        Self { bytes, manifest }
    }
}

#[derive(Debug)]
struct Move {
    name: Name,
    way: Way,
    stage: Stage,
    freight: Option<Freight>,
    link: Link,
    attempts: usize,
    /// Why nothing was taken lately.
    trouble: Option<String>,
    /// Addresses that refused this lockd when they were called last.
    refused: BTreeSet<SocketAddr>,
    /// The destination has so much, as far as it said.
    have: u64,
    /// The next piece begins there.
    sent: u64,
    /// Requests that are not answered, and until when one is waited for.
    unanswered: usize,
    answer_by: Time,
    progress_at: Time,
    /// What comes next is on its way to the log.
    decided: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Mover {
    moves: BTreeMap<SpaceId, Move>,
    last_call: u64,
    broken: Broken,
}

impl Mover {
    /// One that breaks a rule.
    #[cfg(feature = "canary")]
    #[must_use]
    pub fn breaking(rule: Canary) -> Self {
        Self { broken: Broken::rule(rule), ..Self::default() }
    }

    /// Takes in what happened, and how the lockspaces stand now. Outputs are to be carried out in order.
    pub fn step(&mut self, now: Time, input: Input, spaces: &Spaces, leads: bool, out: &mut Vec<Output>) {
        self.look(now, spaces, leads, out);
        match input {
            Input::Tick => {}
            Input::Reached(call) => self.on_reached(call, out),
            Input::Lost(call, lost) => {
                let found = self.moves.iter_mut().find(|(_, it)| it.call() == Some(call));
                if let Some((id, it)) = found {
                    it.on_lost(now, *id, lost, out);
                }
            }
            Input::Heard(call, frame) => self.on_heard(now, call, frame.message, out),
        }
        let broken = self.broken;
        for (id, it) in &mut self.moves {
            it.act(now, *id, &mut self.last_call, broken, out);
        }
        let over = |it: &Move| matches!(it.stage, Stage::TakeBack { until } if now >= until);
        let over: Vec<SpaceId> = self.moves.iter().filter(|(_, it)| over(it)).map(|(id, _)| *id).collect();
        over.into_iter().for_each(|id| self.end(id, out));
    }

    /// When to step again at the latest, if nothing else happens.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        self.moves.values().filter_map(Move::next_deadline).min()
    }

    /// Begins, goes on with and ends moves as the lockspaces say.
    fn look(&mut self, now: Time, spaces: &Spaces, leads: bool, out: &mut Vec<Output>) {
        let gone = |id: &SpaceId| !leads || spaces.get(*id).is_none();
        let gone: Vec<SpaceId> = self.moves.keys().filter(|id| gone(id)).copied().collect();
        gone.into_iter().for_each(|id| self.end(id, out));
        for (id, space) in spaces.iter().filter(|_| leads) {
            match space.state() {
                State::Frozen { way, .. } => self.pursue(now, id, space, way, Stage::Ship, out),
                State::Forwarded { way, activated: false } => {
                    self.pursue(now, id, space, way, Stage::Tell, out);
                }
                _ => self.let_go(now, id, space, out),
            }
        }
    }

    fn pursue(
        &mut self,
        now: Time,
        id: SpaceId,
        space: &Space,
        way: &Way,
        stage: Stage,
        out: &mut Vec<Output>,
    ) {
        let known = self.moves.get(&id).map(|it| (it.way.migration == way.migration, it.stage));
        match known {
            Some((true, known)) if known == stage => {}
            Some((true, _)) => {
                let it = self.moves.get_mut(&id).expect("found above");
                (it.stage, it.decided, it.freight, it.unanswered) = (stage, false, None, 0);
            }
            Some((false, _)) | None => {
                self.end(id, out);
                self.moves.insert(id, Move::new(now, space, way.clone(), stage));
            }
        }
    }

    /// The lockspace is not on its way. If it was, and is served here again, the destination is told.
    fn let_go(&mut self, now: Time, id: SpaceId, space: &Space, out: &mut Vec<Output>) {
        let Some(it) = self.moves.get_mut(&id) else { return };
        if matches!(it.stage, Stage::TakeBack { .. }) && space.is_active() {
            return;
        }
        if space.is_active() && space.gave_up(it.way.migration) {
            let stage = Stage::TakeBack { until: now.after(TAKE_BACK_MAX) };
            (it.stage, it.decided, it.freight, it.unanswered) = (stage, false, None, 0);
        } else {
            self.end(id, out);
        }
    }

    fn end(&mut self, id: SpaceId, out: &mut Vec<Output>) {
        if let Some(it) = self.moves.remove(&id) {
            out.extend(it.call().map(Output::HangUp));
        }
    }

    fn by_call(&mut self, call: CallId) -> Option<&mut Move> {
        self.moves.values_mut().find(|it| it.call() == Some(call))
    }

    fn on_reached(&mut self, call: CallId, out: &mut Vec<Output>) {
        match self.by_call(call) {
            Some(it) => {
                it.link = Link::Up { call };
                it.refused.remove(&it.called());
                // What it has it will say; to begin at the start costs a window, and saves asking.
                (it.have, it.sent, it.unanswered) = (0, 0, 0);
            }
            None => out.push(Output::HangUp(call)),
        }
    }

    fn on_heard(&mut self, now: Time, call: CallId, message: FromLockd, out: &mut Vec<Output>) {
        let Some((id, it)) = self.moves.iter_mut().find(|(_, it)| it.call() == Some(call)) else { return };
        let id = *id;
        it.answer_by = now.after(ANSWER_WITHIN);
        match (it.stage, message) {
            (Stage::Ship, FromLockd::Space(SpaceReply::Imported { have })) => it.on_imported(now, have),
            // Answers to pieces that were sent before it was forwarded, or given up.
            (_, FromLockd::Space(SpaceReply::Imported { .. })) => {}
            // It does not take the lockspace, or nothing at all from this lockd.
            (
                Stage::Ship,
                FromLockd::Space(SpaceReply::Refused { reason }) | FromLockd::Refused { reason },
            ) => it.give_up(id, reason, out),
            (Stage::Tell, FromLockd::Space(SpaceReply::Done)) => {
                if !std::mem::replace(&mut it.decided, true) {
                    out.push(Output::Decide(Command::Settle { space: id, migration: it.way.migration }));
                }
            }
            (Stage::TakeBack { .. }, FromLockd::Space(SpaceReply::Done | SpaceReply::Refused { .. })) => {
                self.end(id, out);
            }
            (Stage::Tell, FromLockd::Space(SpaceReply::Refused { .. })) => {
                it.link = Link::Down { retry_at: now.after(REFUSED_AGAIN) };
                out.push(Output::HangUp(call));
            }
            // It follows, or speaks of something else: another one of its group may know.
            _ => {
                it.note("it does not lead its group");
                it.link = Link::Down { retry_at: now.after(AGAIN) };
                out.push(Output::HangUp(call));
            }
        }
    }
}

impl Move {
    fn new(now: Time, space: &Space, way: Way, stage: Stage) -> Self {
        let freight = space.table().filter(|_| stage == Stage::Ship).map(Freight::pack);
        let (name, link) = (space.name().clone(), Link::Down { retry_at: now });
        let (have, sent, unanswered, answer_by, attempts) = (0, 0, 0, now, 0);
        let (progress_at, decided) = (now, false);
        Self {
            name,
            way,
            stage,
            freight,
            link,
            attempts,
            trouble: None,
            refused: BTreeSet::new(),
            have,
            sent,
            unanswered,
            answer_by,
            progress_at,
            decided,
        }
    }

    fn call(&self) -> Option<CallId> {
        match self.link {
            Link::Down { .. } => None,
            Link::Calling { call, .. } | Link::Up { call } => Some(call),
        }
    }

    /// Where the last attempt went.
    fn called(&self) -> SocketAddr {
        self.way.to[self.attempts.saturating_sub(1) % self.way.to.len()]
    }

    /// Why nothing was taken there.
    fn note(&mut self, why: &str) {
        self.trouble = Some(format!("lockd at {}: {why}", self.called()));
    }

    fn on_lost(&mut self, now: Time, id: SpaceId, lost: Lost, out: &mut Vec<Output>) {
        self.link = Link::Down { retry_at: now.after(AGAIN) };
        self.note(&lost.to_string());
        match lost {
            Lost::Away(_) => self.refused.remove(&self.called()),
            Lost::Refused(_) => self.refused.insert(self.called()),
        };
        // Nothing of theirs gets better by waiting, and meanwhile nobody is served.
        if self.is_shipping() && self.way.to.iter().all(|to| self.refused.contains(to)) {
            let why = self.trouble.clone().expect("just noted");
            self.give_up(id, why, out);
        }
    }

    fn is_shipping(&self) -> bool {
        self.stage == Stage::Ship && !self.decided
    }

    fn next_deadline(&self) -> Option<Time> {
        let link = match self.link {
            Link::Down { retry_at } => Some(retry_at),
            Link::Calling { give_up_at, .. } => Some(give_up_at),
            Link::Up { .. } => (self.unanswered > 0).then_some(self.answer_by),
        };
        let stage = match self.stage {
            Stage::Ship => self.is_shipping().then(|| self.progress_at.after(FROZEN_MAX)),
            Stage::TakeBack { until } => Some(until),
            Stage::Tell => None,
        };
        link.into_iter().chain(stage).min()
    }

    fn on_imported(&mut self, now: Time, have: u64) {
        self.unanswered = self.unanswered.saturating_sub(1);
        if have > self.have {
            (self.progress_at, self.trouble) = (now, None);
        }
        self.have = have;
        // It had more than we knew; or a piece was lost on the way, and those behind it were of no use.
        if self.sent < have || self.unanswered == 0 {
            self.sent = have;
        }
    }

    fn act(&mut self, now: Time, id: SpaceId, last_call: &mut u64, broken: Broken, out: &mut Vec<Output>) {
        let too_large = self.freight.as_ref().filter(|freight| freight.bytes.len() > LOCKSPACE_BYTES_MAX);
        if let Some(freight) = too_large {
            let (is, most) = (freight.bytes.len(), LOCKSPACE_BYTES_MAX);
            self.give_up(id, format!("it has {is} bytes, and {most} is the most that moves"), out);
        }
        if self.is_shipping() && now >= self.progress_at.after(FROZEN_MAX) {
            let why = self.trouble.as_ref().map_or(String::new(), |why| format!(": {why}"));
            let why = format!("the destination took nothing for {} s{why}", FROZEN_MAX.as_secs());
            self.give_up(id, why, out);
        }
        let silent = self.unanswered > 0 && now >= self.answer_by;
        match self.link {
            Link::Down { retry_at } if now >= retry_at => {
                *last_call += 1;
                let (call, to) = (CallId(*last_call), self.way.to[self.attempts % self.way.to.len()]);
                self.attempts += 1;
                self.link = Link::Calling { call, give_up_at: now.after(ANSWER_WITHIN) };
                out.push(Output::Call(call, to));
            }
            Link::Calling { call, give_up_at } if now >= give_up_at => self.hang_up(now, call, out),
            Link::Up { call } if silent => self.hang_up(now, call, out),
            Link::Up { call } => self.say(now, id, call, broken, out),
            Link::Down { .. } | Link::Calling { .. } => {}
        }
    }

    fn hang_up(&mut self, now: Time, call: CallId, out: &mut Vec<Output>) {
        self.note("it does not answer in time");
        self.refused.remove(&self.called());
        (self.link, self.unanswered) = (Link::Down { retry_at: now.after(AGAIN) }, 0);
        out.push(Output::HangUp(call));
    }

    fn say(&mut self, now: Time, id: SpaceId, call: CallId, broken: Broken, out: &mut Vec<Output>) {
        let (name, migration) = (self.name.clone(), self.way.migration);
        match self.stage {
            Stage::Ship => self.ship(now, id, call, broken, out),
            Stage::Tell if self.unanswered == 0 && !self.decided => {
                self.ask(now, call, SpaceRequest::Activate { name, migration }, out);
            }
            Stage::TakeBack { .. } if self.unanswered == 0 => {
                self.ask(now, call, SpaceRequest::Discard { name, migration }, out);
            }
            Stage::Tell | Stage::TakeBack { .. } => {}
        }
    }

    fn ship(&mut self, now: Time, id: SpaceId, call: CallId, broken: Broken, out: &mut Vec<Output>) {
        let Some(Freight { bytes, manifest }) = &self.freight else { return };
        let (bytes, manifest) = (bytes.clone(), *manifest);
        let (name, migration) = (self.name.clone(), self.way.migration);
        if self.have == manifest.bytes && !self.decided {
            self.decided = true;
            if broken.breaks(Canary::ActivateBeforeForward) {
                self.ask(now, call, SpaceRequest::Activate { name, migration }, out);
            }
            return out.push(Output::Decide(Command::Forward { space: id, migration }));
        }
        while self.is_shipping() && self.unanswered < WINDOW && self.sent < manifest.bytes {
            let start = usize::try_from(self.sent).expect("it is in memory");
            let end = (start + IMPORT_BYTES_MAX).min(bytes.len());
            let (name, offset, bytes) = (name.clone(), self.sent, bytes[start..end].to_vec());
            self.ask(now, call, SpaceRequest::Import { name, migration, manifest, offset, bytes }, out);
            self.sent = end as u64;
        }
    }

    fn ask(&mut self, now: Time, call: CallId, request: SpaceRequest, out: &mut Vec<Output>) {
        if self.unanswered == 0 {
            self.answer_by = now.after(ANSWER_WITHIN);
        }
        self.unanswered += 1;
        let frame = Frame { id: RequestId(0), term: Term(0), message: ToLockd::Space(request) };
        out.push(Output::Say(call, frame));
    }

    fn give_up(&mut self, id: SpaceId, why: String, out: &mut Vec<Output>) {
        if !std::mem::replace(&mut self.decided, true) {
            let migration = self.way.migration;
            out.push(Output::Decide(Command::Thaw { space: id, migration, why }));
        }
    }
}
