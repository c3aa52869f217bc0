//! Table tests of the lock rules, each named for the property that it proves.

mod circles;
mod flags;
mod keys;
mod model;
mod orphans;
mod rules;
mod sessions;
mod values;

use csnap_proto::message::lock::{
    Flags, LockEvent, LockOp, LockReply, LockView, Mode, Told, ValueBlock, ValueChange, Watched,
};
use csnap_proto::{LockId, Name, Secret, Sequence, SessionId, Term};

use super::{Command, Effect, Table};

const A: SessionId = SessionId([0xa; 16]);
const B: SessionId = SessionId([0xb; 16]);
const C: SessionId = SessionId([0xc; 16]);

fn secret(session: SessionId) -> Secret {
    Secret(session.0)
}

fn open(session: SessionId) -> Command {
    let node = Name::new("node").expect("a name");
    Command::Open { session, secret: secret(session), node, lease_ms: 1000, info: vec![session.0[0]] }
}

/// A table with a few sessions, and what came out of it.
struct Bench {
    table: Table,
    events: Vec<(SessionId, LockEvent)>,
}

impl Bench {
    fn new() -> Self {
        let mut bench = Self { table: Table::default(), events: Vec::new() };
        for session in [A, B, C] {
            bench.apply(open(session));
        }
        bench
    }

    fn apply(&mut self, command: Command) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.table.apply(command, &mut effects);
        assert_eq!(self.table.check(), Ok(()));
        let events = effects.iter().filter_map(|effect| match effect {
            Effect::Event { session, event, .. } => Some((*session, event.clone())),
            _ => None,
        });
        self.events.extend(events);
        effects
    }

    /// The next operation of a session and its answer; events gather for [`Self::events`].
    fn op(&mut self, session: SessionId, op: LockOp) -> LockReply {
        let sequence = self.table.sessions[&session].last_sequence.next();
        let command = Command::Operate { session, sequence, lowest_unanswered: sequence, op };
        // Only a demotion lets others through before the answer.
        let effects = self.apply(command);
        let answer = effects.iter().find(|effect| matches!(effect, Effect::Answer { .. }));
        match answer {
            Some(Effect::Answer { session: to, sequence: of, reply }) => {
                assert_eq!((*to, *of), (session, sequence));
                reply.clone()
            }
            _ => panic!("every operation is answered, not with {effects:?}"),
        }
    }

    fn events(&mut self) -> Vec<(SessionId, LockEvent)> {
        std::mem::take(&mut self.events)
    }

    fn lock(&mut self, session: SessionId, mode: Mode) -> LockReply {
        self.op(session, LockOp::lock("r", mode, Flags::NONE))
    }

    fn locked(&mut self, session: SessionId, mode: Mode) -> LockId {
        granted(&self.lock(session, mode)).0.lock
    }

    fn queued(&mut self, session: SessionId, mode: Mode) -> LockId {
        match self.lock(session, mode) {
            LockReply::Queued { lock, .. } => lock,
            other => panic!("{other:?}"),
        }
    }

    fn convert(&mut self, session: SessionId, lock: LockId, mode: Mode) -> LockReply {
        self.op(session, LockOp::convert(lock, mode, Flags::NONE))
    }

    fn write(&mut self, session: SessionId, lock: LockId, mode: Mode, value: &[u8]) -> LockReply {
        self.op(session, LockOp::write(lock, mode, value))
    }

    fn unlock(&mut self, session: SessionId, lock: LockId, value: ValueChange) {
        assert_eq!(self.op(session, LockOp::unlock(lock, value)), LockReply::Done);
    }

    fn value(&self) -> ValueBlock {
        self.table.resources["r"].value.clone()
    }
}

/// A conversion or lock that waits, with nothing to tell.
fn waits(lock: LockId) -> LockReply {
    LockReply::Queued { lock, told: Told::default() }
}

fn granted(reply: &LockReply) -> (&LockView, Option<&ValueBlock>) {
    match reply {
        LockReply::Granted { lock, value, .. } => (lock, value.as_ref()),
        other => panic!("not granted: {other:?}"),
    }
}

fn is_invalid(reply: &LockReply) -> bool {
    matches!(reply, LockReply::Invalid(_))
}

/// The granted events among `events`, as owner, lock and mode.
fn grants(events: &[(SessionId, LockEvent)]) -> Vec<(SessionId, LockId, Mode)> {
    let grants = events.iter().filter_map(|(session, event)| match event {
        LockEvent::Granted { lock, .. } => Some((*session, lock.lock, lock.mode)),
        _ => None,
    });
    grants.collect()
}
