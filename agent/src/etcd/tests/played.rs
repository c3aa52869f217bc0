//! A session with its client's side, on a connection to a played etcd on which nothing takes time.

use std::collections::VecDeque;
use std::time::Duration;

use csnap_proto::message::lock::{Flags, FromLockd, LockEvent, LockOp, LockReply, Mode, ToLockd, Watched};
use csnap_proto::{EventNumber, Frame, LockId, Name, RequestId, Secret, Sequence, SessionId, Term, Time};

use super::model::{Done, Etcd};
use crate::etcd::{Broken, Call, Input, LeaseId, News, Output, Revision, Session, Txn};

pub(super) const RESOURCE: &str = "the lock";
pub(super) const LEASE: Duration = Duration::from_secs(2);

/// See the module.
pub(super) struct Played {
    pub(super) n: u8,
    pub(super) session: Session,
    pub(super) sequence: u64,
    pub(super) watch: Option<Revision>,
    pub(super) heard: Vec<FromLockd>,
    /// Transactions that were asked for.
    pub(super) txns: Vec<(LeaseId, Txn)>,
    pub(super) doubts: Vec<Option<Term>>,
    pub(super) dropped: bool,
}

impl Played {
    pub(super) fn new(n: u8) -> Self {
        Self::breaking(n, Broken::NONE)
    }

    pub(super) fn breaking(n: u8, broken: Broken) -> Self {
        let session = Session::breaking(RESOURCE, broken);
        let (heard, txns, doubts) = (Vec::new(), Vec::new(), Vec::new());
        Self { n, session, sequence: 0, watch: None, heard, txns, doubts, dropped: false }
    }

    /// A session that is open, and watches everything.
    pub(super) fn open(n: u8, now: Time, etcd: &mut Etcd) -> Self {
        Self::open_breaking(n, now, etcd, Broken::NONE)
    }

    pub(super) fn open_breaking(n: u8, now: Time, etcd: &mut Etcd, broken: Broken) -> Self {
        let mut played = Self::breaking(n, broken);
        played.connect(now, etcd);
        let (node, info) = (Name::new(format!("n{n}")).expect("a name"), vec![n]);
        let secret = Secret([n; 16]);
        played.say(now, etcd, ToLockd::Open { session: played.id(), secret, node, lease_ms: 1500, info });
        assert!(matches!(played.heard.pop(), Some(FromLockd::Opened { .. })), "{:?}", played.heard);
        for what in [Watched::Members, Watched::Value(RESOURCE.to_owned())] {
            played.ask(now, etcd, LockOp::watch(what));
        }
        played
    }

    pub(super) fn id(&self) -> SessionId {
        SessionId([self.n; 16])
    }

    pub(super) fn connect(&mut self, now: Time, etcd: &mut Etcd) {
        self.watch = None;
        self.step(now, etcd, Input::Disconnected);
        self.step(now, etcd, Input::Connected);
    }

    pub(super) fn resume(&mut self, now: Time, etcd: &mut Etcd, last_event: EventNumber) {
        self.connect(now, etcd);
        let (session, secret) = (self.id(), Secret([self.n; 16]));
        self.say(now, etcd, ToLockd::Resume { session, secret, last_event });
    }

    pub(super) fn say(&mut self, now: Time, etcd: &mut Etcd, message: ToLockd) {
        self.step(now, etcd, Input::Frame(Frame { id: RequestId(9), term: Term(0), message }));
    }

    /// Asks, and gives the answer if there is one.
    pub(super) fn ask(&mut self, now: Time, etcd: &mut Etcd, op: LockOp) -> Option<LockReply> {
        self.sequence += 1;
        let (sequence, lowest_unanswered) = (Sequence(self.sequence), Sequence(self.sequence));
        self.say(now, etcd, ToLockd::Operate { sequence, lowest_unanswered, op });
        self.heard.iter().rev().find_map(|message| match message {
            FromLockd::Answer { sequence: answered, reply } if *answered == sequence => Some(reply.clone()),
            _ => None,
        })
    }

    pub(super) fn step(&mut self, now: Time, etcd: &mut Etcd, input: Input) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            let mut out = Vec::new();
            self.session.step(now, input, &mut out);
            for output in out {
                match output {
                    Output::Frame(frame) => self.heard.push(frame.message),
                    Output::Call(call) => inputs.extend(self.call(now, etcd, call)),
                    Output::Drop(_) => self.dropped = true,
                    Output::Doubt(term) => self.doubts.push(term),
                }
            }
        }
    }

    pub(super) fn call(&mut self, now: Time, etcd: &mut Etcd, call: Call) -> Option<Input> {
        if let Call::Txn(lease, txn) = &call {
            self.txns.push((*lease, txn.clone()));
        }
        match etcd.call(now, call) {
            Done::Answer(answer) => Some(Input::Answer(answer)),
            Done::News(news) => Some(Input::News(news)),
            Done::WatchFrom(from) => {
                self.watch = Some(from);
                None
            }
        }
    }

    /// Hears what the watch tells by now; the events.
    pub(super) fn hear(&mut self, now: Time, etcd: &mut Etcd) -> Vec<LockEvent> {
        self.heard.clear();
        if let Some(from) = self.watch.take() {
            let news = etcd.watch(from);
            if let News::Changes(entries) = &news {
                self.watch = Some(entries.last().map_or(from, |entry| entry.written + 1));
            }
            self.step(now, etcd, Input::News(news));
        }
        self.events()
    }

    pub(super) fn events(&self) -> Vec<LockEvent> {
        let event = |message: &FromLockd| match message {
            FromLockd::Event { event, .. } => Some(event.clone()),
            _ => None,
        };
        self.heard.iter().filter_map(event).collect()
    }

    /// Takes the lock, which must be free; its id and term.
    pub(super) fn take(&mut self, now: Time, etcd: &mut Etcd) -> (LockId, Term) {
        let lock = self.read(now, etcd);
        match self.convert(now, etcd, lock) {
            Some(LockReply::Granted { lock, .. }) => (lock.lock, lock.term),
            reply => panic!("it is free: {reply:?}"),
        }
    }

    pub(super) fn read(&mut self, now: Time, etcd: &mut Etcd) -> LockId {
        match self.ask(now, etcd, LockOp::lock(RESOURCE, Mode::Cr, Flags::NONE)) {
            Some(LockReply::Granted { lock, .. }) => lock.lock,
            reply => panic!("readers are always let in: {reply:?}"),
        }
    }

    pub(super) fn convert(&mut self, now: Time, etcd: &mut Etcd, lock: LockId) -> Option<LockReply> {
        self.hear(now, etcd);
        self.ask(now, etcd, LockOp::convert(lock, Mode::Pw, Flags::NOQUEUE))
    }

    pub(super) fn publish(
        &mut self,
        now: Time,
        etcd: &mut Etcd,
        lock: LockId,
        bytes: &[u8],
    ) -> Option<LockReply> {
        self.ask(now, etcd, LockOp::write(lock, Mode::Pw, bytes))
    }

    pub(super) fn refusal(&self) -> Option<&str> {
        self.heard.iter().rev().find_map(|message| match message {
            FromLockd::Refused { reason } => Some(reason.as_str()),
            _ => None,
        })
    }
}
