//! Stopping for a snapshot create. The server says Advice; the client makes its writes durable, first while they go on,
//! then stopped, forgets which chunks are unique, and answers. From the answer to the Resume nothing may change the head.
//!
//! Invariants: whoever knows a chunk to be unique has not answered since; every Advice is drained anew, because after a
//! failover the same create may ask again and writes may have gone on in between.

use csnap_proto::message::volume::ToServer;
use csnap_proto::{Epoch, RequestId, RequestToken};

use super::syncs::SyncFor;
use super::{Canary, ClientCore, IoFor, IoId, IoOp, Output};

/// One asking to drain. The id tells it from another for the same create: a late answer to the first is none to the second.
#[derive(Clone, Copy, Debug)]
pub(super) struct Advice {
    pub(super) token: RequestToken,
    pub(super) id: RequestId,
}

/// Whether writes are issued, and how far a drain is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stop {
    /// Nothing is attached yet.
    NotAttached,
    /// Writes are issued, grants are taken.
    Open,
    /// A first sync, so that the last is short: writes to chunks known unique go on, grants are thrown away.
    PreSync { advice: Advice, io: IoId },
    /// Nothing is issued; what is in flight returns.
    Draining { advice: Advice },
    /// Nothing is in flight; the last sync.
    FinalSync { advice: Advice, io: IoId },
    /// Answered, or told at identification that an Advice will come: nothing is issued until the Resume.
    Stopped { answered: Option<RequestToken> },
}

impl Stop {
    pub(super) fn issues(self) -> bool {
        matches!(self, Self::Open | Self::PreSync { .. })
    }

    fn token(self) -> Option<RequestToken> {
        match self {
            Self::NotAttached | Self::Open => None,
            Self::PreSync { advice, .. } | Self::Draining { advice } | Self::FinalSync { advice, .. } => {
                Some(advice.token)
            }
            Self::Stopped { answered } => answered,
        }
    }

    pub(super) fn waiting(self) -> Option<&'static str> {
        match self {
            Self::NotAttached | Self::Open => None,
            Self::PreSync { .. } | Self::Draining { .. } | Self::FinalSync { .. } => {
                Some("a snapshot is being made: writing out what was written before it")
            }
            Self::Stopped { .. } => {
                Some("a snapshot is being made: waiting for the server to let writes go on")
            }
        }
    }
}

impl ClientCore {
    /// Whether grants count now.
    pub(super) fn may_take_grants(&self) -> bool {
        matches!(self.stop, Stop::Open)
    }

    pub(super) fn on_advice(&mut self, advice: Advice, out: &mut Vec<Output>) {
        if !self.is_writer() || self.end.is_some() {
            return;
        }
        self.ask_writes_again();
        if self.answers_at_once(advice.token) {
            return self.answer(advice, out);
        }
        self.stop = match self.stop {
            Stop::Open if self.config.canaries.has(Canary::DrainWithoutSync) => Stop::Draining { advice },
            Stop::Open => {
                let io = self.start_io(IoFor::Sync(SyncFor::PreSync), IoOp::HeadSync, out);
                self.writeback.on_sync_begun();
                Stop::PreSync { advice, io }
            }
            Stop::PreSync { io, .. } => Stop::PreSync { advice, io },
            _ => Stop::Draining { advice },
        };
    }

    /// Never, but for the tests of the tests.
    #[cfg(feature = "canary")]
    fn answers_at_once(&self, token: RequestToken) -> bool {
        let known = self.config.canaries.has(Canary::AdviceNotAnew) && self.answered == Some(token);
        known || self.config.canaries.has(Canary::AdviceWithoutDrain)
    }

    #[cfg(not(feature = "canary"))]
    #[expect(clippy::unused_self, reason = "same call with and without the feature")]
    fn answers_at_once(&self, _: RequestToken) -> bool {
        false
    }

    /// The first sync is done: stop.
    pub(super) fn on_pre_sync(&mut self, io: IoId) {
        if let Stop::PreSync { advice, io: mine } = self.stop
            && io == mine
        {
            self.stop = Stop::Draining { advice };
        }
    }

    pub(super) fn go_on_draining(&mut self, out: &mut Vec<Output>) {
        let Stop::Draining { advice } = self.stop else { return };
        if !self.nothing_in_flight() || self.end.is_some() {
            return;
        }
        if self.config.canaries.has(Canary::DrainWithoutSync) {
            return self.answer(advice, out);
        }
        let io = self.start_io(IoFor::Sync(SyncFor::FinalSync), IoOp::HeadSync, out);
        self.stop = Stop::FinalSync { advice, io };
    }

    pub(super) fn on_final_sync(&mut self, io: IoId, out: &mut Vec<Output>) {
        if let Stop::FinalSync { advice, io: mine } = self.stop
            && io == mine
        {
            self.answer(advice, out);
        }
    }

    /// Everything issued before is durable: forget what is writable, then say so, on the connection of the Advice (a
    /// broken one ends the drain, see [`Self::on_drain_broken`]).
    fn answer(&mut self, advice: Advice, out: &mut Vec<Output>) {
        let Advice { token, id } = advice;
        self.stop = Stop::Stopped { answered: Some(token) };
        self.forget_unique();
        #[cfg(feature = "canary")]
        {
            self.answered = Some(token);
        }
        self.send_as(id, ToServer::SnapshotAdviceOk { advice: token }, out);
    }

    pub(super) fn forget_unique(&mut self) {
        if !self.config.canaries.has(Canary::KeepUniqueOverAdvice) {
            self.unique.clear();
            self.all_unique = false;
        }
    }

    /// The create is over, either way. One that is not the last Advice's came too late and changes nothing.
    pub(super) fn on_resume(&mut self, advice: RequestToken, epoch: Epoch, all_unique: bool) {
        if self.is_writer() && self.stop.token().is_none_or(|mine| mine == advice) {
            self.enter_epoch(epoch, all_unique);
            self.open_writes();
        }
    }

    /// An Advice will come on this new connection.
    pub(super) fn await_advice(&mut self) {
        self.stop = Stop::Stopped { answered: None };
    }

    pub(super) fn open_writes(&mut self) {
        self.stop = Stop::Open;
        self.ask_writes_again();
    }

    /// The Advice will not be answered, its connection is gone; the next identification says how to go on. Writes that
    /// were not stopped yet go on meanwhile.
    pub(super) fn on_drain_broken(&mut self) {
        self.stop = match self.stop {
            Stop::PreSync { .. } => Stop::Open,
            Stop::Draining { .. } | Stop::FinalSync { .. } => Stop::Stopped { answered: None },
            unchanged => unchanged,
        };
    }
}
