//! A client that uses keys and locks as [`crate::history::client`] says, and tells of each call and answer. Now and then it stands
//! in a queue for a lock, which must come to it in the end.

use csnap_lockd::client::{ClientEvent, Ticket};
use csnap_proto::message::lock::{Flags, LockEvent, LockOp, LockReply, Mode, ValueChange};
use csnap_proto::{LockId, Time};

use super::session::Session;
use crate::history::client::{Client, Pending};
use crate::sim::{Event, HostId, ProcId, Sim};

/// What they queue for.
const TURN: &str = "turn";

/// An operation that is not answered by then is given up, and its session with it, microseconds; and the session's lease,
/// milliseconds. Who is impatient goes to another lockd and changes something there, while others stay with one that is
/// silent or alone and go on reading: they must not be told what is over.
const PATIENCES: [(u64, u64); 2] = [(700_000, 1_500), (3_000_000, 6_000)];

/// Timer for the next operation; the others are numbers of operations.
const NEXT: u64 = 0;

/// What it waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waits {
    Nothing,
    Answer(Pending),
    /// For a lock in its turn, since then.
    Turn(u64),
    /// To be rid of that one.
    TurnOver,
}

/// See the module.
pub struct ContenderProc {
    id: ProcId,
    /// Microseconds.
    patience: u64,
    session: Session,
    client: Client,
    waits: Waits,
    ticket: Option<Ticket>,
    asked: u64,
    calm: bool,
}

impl ContenderProc {
    pub(super) fn start(sim: &mut Sim, id: ProcId, host: HostId) -> Self {
        let (patience, lease_ms) = PATIENCES[host.0 % PATIENCES.len()];
        let session = Session::new(sim, id, host, lease_ms);
        let client = Client::new(id.0, host.0 % PATIENCES.len() == 1, &mut sim.history);
        Self { id, patience, session, client, waits: Waits::Nothing, ticket: None, asked: 0, calm: false }
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        self.session.deadline()
    }

    /// It is no more, and its session ends when its lease does.
    pub fn on_killed(&mut self, sim: &mut Sim) {
        sim.history.abandon(self.client.session());
    }

    /// Begins nothing new.
    pub fn calm_down(&mut self) {
        self.calm = true;
    }

    /// Everything that it asked for was answered, and every lock came to it.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.waits == Waits::Nothing
    }

    pub(super) fn on_event(&mut self, sim: &mut Sim, event: Event) {
        let begins = matches!(event, Event::Start);
        if self.session.on_event(sim, &event) {
            if begins {
                self.go_on_soon(sim);
            }
        } else {
            match event {
                Event::Timer(NEXT) if self.is_idle() && !self.calm => self.begin(sim),
                // Its attempt was given up.
                Event::Connected { conn: Some(conn), .. } => sim.close(self.id, conn),
                Event::Timer(asked) if asked == self.asked && !self.is_idle() => self.lose_patience(sim),
                _ => {}
            }
        }
        for event in self.session.take_events() {
            self.on_session(sim, event);
        }
    }

    fn on_session(&mut self, sim: &mut Sim, event: ClientEvent) {
        match event {
            ClientEvent::Answer { ticket, reply, .. } if self.ticket == Some(ticket) => {
                self.ticket = None;
                self.on_answer(sim, reply);
            }
            ClientEvent::Event(LockEvent::Granted { lock, .. }) => self.on_turn(sim, lock.lock),
            ClientEvent::SessionLost { .. } => {
                sim.tally.did("sessions of lock clients lost", 1);
                self.begin_anew(sim, true);
            }
            _ => {}
        }
    }

    fn begin(&mut self, sim: &mut Sim) {
        self.asked += 1;
        let op = if !self.client.is_reader() && sim.rng.chance(0.15) {
            // Who stands in a queue waits for others, however long.
            self.waits = Waits::Turn(sim.now());
            LockOp::lock(TURN, Mode::Ex, Flags::NONE)
        } else {
            let (pending, op) = self.client.ask(&mut sim.history, &mut sim.rng);
            self.waits = Waits::Answer(pending);
            sim.tell(self.patience, self.id, Event::Timer(self.asked));
            op
        };
        self.ticket = Some(self.session.operate(sim, op));
    }

    fn on_answer(&mut self, sim: &mut Sim, reply: LockReply) {
        match (self.waits, reply) {
            (Waits::Answer(pending), reply) => {
                let verdict = self.client.hear(&mut sim.history, pending, reply);
                sim.judge(verdict);
            }
            (Waits::Turn(_), LockReply::Granted { lock, .. }) => return self.on_turn(sim, lock.lock),
            (Waits::Turn(_), LockReply::Queued { .. }) => return sim.tally.did("locks waited for", 1),
            (Waits::TurnOver, LockReply::Done) => {}
            (waits, reply) => sim.violation(format!("a client that waits for {waits:?} was told {reply:?}")),
        }
        self.rest(sim);
    }

    fn on_turn(&mut self, sim: &mut Sim, lock: LockId) {
        let Waits::Turn(since) = self.waits else { return };
        sim.group.longest_turn = sim.group.longest_turn.max(sim.now() - since);
        self.waits = Waits::TurnOver;
        self.ticket = Some(self.session.operate(sim, LockOp::unlock(lock, ValueChange::Keep)));
    }

    fn lose_patience(&mut self, sim: &mut Sim) {
        sim.tally.reached("a client gave up an operation that may have happened");
        self.begin_anew(sim, false);
    }

    fn begin_anew(&mut self, sim: &mut Sim, told: bool) {
        self.session.restart(sim);
        self.client.begin_anew(&mut sim.history, told);
        self.ticket = None;
        self.rest(sim);
    }

    fn rest(&mut self, sim: &mut Sim) {
        self.waits = Waits::Nothing;
        self.asked += 1;
        self.go_on_soon(sim);
    }

    fn go_on_soon(&mut self, sim: &mut Sim) {
        let every = sim.plan.contenders.1;
        let wait = every / 4 + sim.rng.below(every * 3 / 2);
        sim.tell(wait, self.id, Event::Timer(NEXT));
    }
}
