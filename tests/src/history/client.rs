//! A client that uses keys and locks one operation at a time: what it asks next, and what it remembers of what it was told.

use csnap_proto::message::lock::{Expect, Flags, KeyOp, KeyReply, LockOp, LockReply, Mode, ValueChange};
use csnap_proto::{LockId, Revision};
use csnap_storage::sim::Rng;

use super::{CallNumber, LockAnswer, LockCall, Recorder, SessionNumber};

/// Keys, and locks, of all clients: so few that they meet.
const OBJECTS: usize = 2;

/// An operation under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    call: CallNumber,
    on: On,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum On {
    Key(usize),
    Lock(usize, LockCall),
}

/// See the module.
#[derive(Debug)]
pub struct Client {
    name: u32,
    /// It only reads: nothing of its own keeps it waiting at a lockd that is alone.
    reader: bool,
    session: SessionNumber,
    /// Versions that it saw last, by key, each with its value.
    seen: [Option<Revision>; OBJECTS],
    held: [Option<LockId>; OBJECTS],
    values: u32,
}

impl Client {
    /// In a session that begins. Names are given once.
    pub fn new(name: u32, reader: bool, recorder: &mut Recorder) -> Self {
        let session = recorder.open();
        Self { name, reader, session, seen: [None; OBJECTS], held: [None; OBJECTS], values: 0 }
    }

    /// Its session.
    #[must_use]
    pub fn session(&self) -> SessionNumber {
        self.session
    }

    /// Whether it only reads.
    #[must_use]
    pub fn is_reader(&self) -> bool {
        self.reader
    }

    /// What it asks next.
    pub fn ask(&mut self, recorder: &mut Recorder, rng: &mut Rng) -> (Pending, LockOp) {
        let which = rng.index(OBJECTS);
        if self.reader || rng.chance(0.6) {
            let op = self.choose_key_op(which, rng);
            let call = recorder.call_key(self.session, &format!("key{which}"), op.clone());
            return (Pending { call, on: On::Key(which) }, LockOp::Key(op));
        }
        let resource = format!("lock{which}");
        let (call, op) = match self.held[which] {
            Some(lock) => (LockCall::Unlock, LockOp::unlock(lock, ValueChange::Keep)),
            None => (LockCall::Try, LockOp::lock(&resource, Mode::Ex, Flags::NOQUEUE)),
        };
        let number = recorder.call_lock(self.session, &resource, call);
        (Pending { call: number, on: On::Lock(which, call) }, op)
    }

    fn choose_key_op(&mut self, which: usize, rng: &mut Rng) -> KeyOp {
        let key = format!("key{which}");
        let expect = match (rng.below(3), self.seen[which]) {
            (0, _) => Expect::Any,
            (_, Some(version)) => Expect::Version(version),
            (_, None) => Expect::Absent,
        };
        match rng.below(8) {
            _ if self.reader => KeyOp::Get { key },
            0..3 => KeyOp::Get { key },
            3 if expect != Expect::Absent => KeyOp::Delete { key, expect },
            _ => {
                self.values += 1;
                let value = [self.name, self.values].map(u32::to_le_bytes).concat();
                KeyOp::Put { key, value, expect, ephemeral: false }
            }
        }
    }

    /// It is told.
    ///
    /// # Errors
    /// If that answers something else.
    pub fn hear(
        &mut self,
        recorder: &mut Recorder,
        pending: Pending,
        reply: LockReply,
    ) -> Result<(), String> {
        let Pending { call, on } = pending;
        match (on, reply) {
            (On::Key(which), LockReply::Key(reply)) => {
                self.seen[which] = match &reply {
                    KeyReply::Done { version } => Some(*version),
                    KeyReply::Found(view) => view.as_ref().map(|view| view.version),
                    // A version without its value.
                    _ => None,
                };
                recorder.answer_key(call, reply);
            }
            (On::Lock(which, LockCall::Try), LockReply::Granted { lock, .. }) => {
                self.held[which] = Some(lock.lock);
                recorder.answer_lock(call, LockAnswer::Granted(lock.term));
            }
            (On::Lock(_, LockCall::Try), LockReply::WouldBlock) => {
                recorder.answer_lock(call, LockAnswer::Refused);
            }
            (On::Lock(which, LockCall::Unlock), LockReply::Done) => {
                self.held[which] = None;
                recorder.answer_lock(call, LockAnswer::Done);
            }
            (on, reply) => return Err(format!("a client that asked for {on:?} was told {reply:?}")),
        }
        Ok(())
    }

    /// Its session is gone, as it was told or because it goes on without it; it begins another.
    pub fn begin_anew(&mut self, recorder: &mut Recorder, told: bool) {
        if told {
            recorder.told_lost(self.session);
        } else {
            recorder.abandon(self.session);
        }
        self.session = recorder.open();
        self.held = [None; OBJECTS];
    }
}
