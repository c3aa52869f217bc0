//! A client of the fenced register: takes the lock, reads once, writes some entries, gives the lock up, and begins again. It does
//! not look at its lease: whoever was stopped in between goes on writing as if nothing had happened, and it is for the
//! register to refuse that.

use bytes::Bytes;
use csnap_lockd::client::{ClientEvent, Ticket};
use csnap_proto::message::lock::{Flags, LockEvent, LockOp, LockReply, LockView, Mode, ValueChange};
use csnap_proto::{LockId, Term, Time};

use super::register::ADDRESS;
use super::session::Session;
use crate::model::mutex::{Answer, MESSAGE_BYTES, Question};
use crate::net::{NetConn, Payload};
use crate::sim::{Event, HostId, ProcId, Sim};

/// What is locked.
const RESOURCE: &str = "register";

/// Tag of connects to the register; those to lockds are counted from 1.
const REGISTER: u64 = 0;

/// Lease of a holder, milliseconds.
pub const LEASE_MS: u64 = 300;

/// Entries under one grant, at most.
const ENTRIES_MAX: u64 = 12;

/// Between two things that a holder does, microseconds, at most.
const THINK: u64 = 25_000;

/// Where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Has nothing, and asks soon.
    Idle,
    /// Asked, or waits in the queue.
    Asked,
    /// Has the lock, or had it in a session that is lost; asked the register, or is about to.
    Holds { lock: Option<LockId>, term: Term, length: Option<u64>, left: u64 },
    /// Asked to give it up.
    Unlocking,
}

/// See the module.
pub struct HolderProc {
    id: ProcId,
    host: HostId,
    session: Session,
    stage: Stage,
    ticket: Option<Ticket>,
    register: Option<NetConn>,
    entries: u64,
    /// Entries that were acknowledged.
    pub acknowledged: u64,
    /// Timers of an earlier stage say nothing.
    timer: u64,
}

impl HolderProc {
    pub(super) fn start(sim: &mut Sim, id: ProcId, host: HostId) -> Self {
        let session = Session::new(sim, id, host, LEASE_MS);
        let (ticket, register) = (None, None);
        Self {
            id,
            host,
            session,
            stage: Stage::Idle,
            ticket,
            register,
            entries: 0,
            acknowledged: 0,
            timer: 0,
        }
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        self.session.deadline()
    }

    /// Whether it believes that it has the lock.
    #[must_use]
    pub fn holds(&self) -> bool {
        matches!(self.stage, Stage::Holds { .. })
    }

    pub(super) fn on_event(&mut self, sim: &mut Sim, event: Event) {
        let begins = matches!(event, Event::Start);
        if self.session.on_event(sim, &event) {
            if begins {
                sim.connect(self.id, self.host, ADDRESS, REGISTER);
                self.go_on_soon(sim);
            }
            return self.on_session(sim);
        }
        match event {
            Event::Connected { tag: REGISTER, conn: Some(conn) } => self.register = Some(conn),
            Event::Connected { tag: REGISTER, conn: None } => {
                sim.connect(self.id, self.host, ADDRESS, REGISTER)
            }
            // Its attempt was given up.
            Event::Connected { conn: Some(conn), .. } => sim.close(self.id, conn),
            Event::Closed { conn } if self.register == Some(conn) => {
                // What is under way may still arrive: only another term fences that.
                self.register = None;
                sim.connect(self.id, self.host, ADDRESS, REGISTER);
                self.let_go(sim);
            }
            Event::Received { conn, payload } if self.register == Some(conn) => {
                for answer in payload.bytes.chunks_exact(MESSAGE_BYTES).map(Answer::decode) {
                    self.on_answer(sim, answer);
                }
            }
            Event::Timer(timer) if timer == self.timer => self.go_on(sim),
            _ => {}
        }
        self.on_session(sim);
    }

    fn on_session(&mut self, sim: &mut Sim) {
        for event in self.session.take_events() {
            match event {
                ClientEvent::Answer { ticket, reply, .. } if self.ticket == Some(ticket) => {
                    self.ticket = None;
                    match reply {
                        LockReply::Granted { lock, .. } => self.on_granted(sim, &lock),
                        LockReply::Queued { .. } => {}
                        LockReply::Done => self.rest(sim),
                        other => sim.violation(format!("a holder was told {other:?}")),
                    }
                }
                ClientEvent::Event(LockEvent::Granted { lock, .. }) => self.on_granted(sim, &lock),
                ClientEvent::SessionLost { .. } => {
                    sim.tally.did("sessions of holders lost", 1);
                    self.session.restart(sim);
                    match &mut self.stage {
                        // It does not look at that, and writes on.
                        Stage::Holds { lock, .. } => *lock = None,
                        _ => self.rest(sim),
                    }
                }
                _ => {}
            }
        }
    }

    fn on_granted(&mut self, sim: &mut Sim, lock: &LockView) {
        if self.stage != Stage::Asked {
            return;
        }
        let verdict = sim.mutex.on_granted(lock.term, self.id.0);
        sim.judge(verdict);
        let left = 1 + sim.rng.below(ENTRIES_MAX);
        self.stage = Stage::Holds { lock: Some(lock.lock), term: lock.term, length: None, left };
        self.go_on_soon(sim);
    }

    fn go_on(&mut self, sim: &mut Sim) {
        match self.stage {
            Stage::Idle => {
                self.stage = Stage::Asked;
                self.ticket = Some(self.session.operate(sim, LockOp::lock(RESOURCE, Mode::Ex, Flags::NONE)));
            }
            Stage::Holds { term, length: None, .. } => self.ask(sim, Question::Read(term)),
            Stage::Holds { term, length: Some(length), left, .. } if left > 0 => {
                self.entries += 1;
                self.ask(sim, Question::Write(term, length, u64::from(self.id.0) << 32 | self.entries));
            }
            Stage::Holds { .. } => self.let_go(sim),
            Stage::Asked | Stage::Unlocking => {}
        }
    }

    fn ask(&mut self, sim: &mut Sim, question: Question) {
        let Some(conn) = self.register else { return self.let_go(sim) };
        let bytes = Bytes::copy_from_slice(&question.encode());
        sim.net.send(conn, self.id, Payload { bytes, socket: None }, &mut sim.queue);
    }

    fn on_answer(&mut self, sim: &mut Sim, answer: Answer) {
        if let Answer::Written(term, entry) = answer {
            sim.mutex.on_acknowledged(term, entry);
            self.acknowledged += 1;
        }
        let Stage::Holds { lock, term, length, left } = self.stage else { return };
        self.stage = match (answer, length) {
            (Answer::Length(length), None) => Stage::Holds { lock, term, length: Some(length), left },
            (Answer::Written(..), Some(length)) => {
                Stage::Holds { lock, term, length: Some(length + 1), left: left - 1 }
            }
            _ => return self.let_go(sim),
        };
        self.go_on_soon(sim);
    }

    fn let_go(&mut self, sim: &mut Sim) {
        let Stage::Holds { lock, .. } = self.stage else { return };
        let Some(lock) = lock else { return self.rest(sim) };
        self.stage = Stage::Unlocking;
        self.ticket = Some(self.session.operate(sim, LockOp::unlock(lock, ValueChange::Keep)));
    }

    fn rest(&mut self, sim: &mut Sim) {
        self.stage = Stage::Idle;
        self.ticket = None;
        self.go_on_soon(sim);
    }

    fn go_on_soon(&mut self, sim: &mut Sim) {
        self.timer += 1;
        let wait = sim.rng.below(THINK);
        sim.tell(wait, self.id, Event::Timer(self.timer));
    }
}
