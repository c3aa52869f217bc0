//! One session's conversation, as lockd would hold it, on etcd.
//!
//! Connections come and go, the session stays: it is its lease and its `members/` key, found by the session's id. A
//! connection begins with a read of every key, and what differs from what was known is told; from there on a watch tells
//! every revision. A watch whose revisions were compacted away begins with such a read again.
//!
//! Here what comes in and how operations are brought on; `opening`: how a session begins and goes on; `news`: what changed.

mod news;
mod opening;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use csnap_proto::limits::OPERATIONS_PER_SESSION_MAX;
use csnap_proto::message::lock::{FromLockd, LockEvent, LockOp, LockReply, LockdStatus, ToLockd};
use csnap_proto::{EventNumber, Frame, Name, RequestId, Sequence, SessionId, Term, Time};

use super::call::{Answer, Call, Entry, LeaseId, Revision};
use super::canary::Broken;
use super::goal::{Next, Scene, Standing, Writer};
use super::keys::TERM_MAX;
use super::mirror::Mirror;

/// Shortest lease, seconds: what etcd grants with its default election timeout of one second.
pub const LEASE_S_MIN: u32 = 2;

/// Renewals under way; lockd's client has one.
const RENEWALS_MAX: usize = 8;

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// There is a connection to etcd.
    Connected,
    /// It is gone; what was asked on it may have taken effect or not.
    Disconnected,
    /// The agent's lockd client says something.
    Frame(Frame<ToLockd>),
    /// To the oldest call that is not answered.
    Answer(Answer),
    /// By itself.
    News(News),
    /// The pool has seen this term: only higher ones are of use.
    Floor(Term),
    /// Time passed.
    Tick,
}

/// What etcd tells beside its answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// The lease was renewed, for so many seconds if that was told.
    Kept(Option<u32>),
    /// There is no such lease.
    Gone,
    /// Keys changed, in the order of their revisions; those of one revision come together.
    Changes(Vec<Entry>),
    /// The watch's revisions are not there any more, and it has ended.
    Compacted,
}

/// What is to be done, in order.
#[derive(Debug, PartialEq)]
pub enum Output {
    /// For the agent's lockd client.
    Frame(Frame<FromLockd>),
    /// For etcd.
    Call(Call),
    /// Drop the connection: one side talks nonsense.
    Drop(&'static str),
    /// No renewal was confirmed for nearly the lease's length, counted from when it was sent: from now on etcd may have
    /// given the lock to another. With the term of the lock, if it is ours.
    Doubt(Option<Term>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Link {
    Down,
    /// Nothing asked yet.
    Idle,
    /// Open was said.
    Opening,
    /// Resume was said, with this last event.
    Resuming(EventNumber),
    Open,
    /// The session is over, and why.
    Over(String),
}

/// What an outstanding call is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Lease,
    Member,
    Look,
    Goal,
    Refresh,
    Close,
    /// Nobody waits for it.
    Farewell,
}

#[derive(Debug)]
enum Goal {
    Asked(Sequence, LockOp),
    /// Give back a lock that nobody waits for any more.
    Release(Revision),
}

/// See the module.
#[derive(Debug)]
pub struct Session {
    resource: String,
    broken: Broken,
    floor: Term,
    link: Link,
    session: Option<SessionId>,
    /// As Open said: node, lease, first description.
    opening: Option<(Name, u32, Vec<u8>)>,
    ttl_s: u32,
    mirror: Mirror,
    standing: Standing,
    expected: VecDeque<(Purpose, Time)>,
    renewals: VecDeque<(RequestId, Time)>,
    goals: VecDeque<Goal>,
    /// Answers that the client may not have.
    answers: BTreeMap<Sequence, LockReply>,
    answered: Sequence,
    events: EventNumber,
    doubt_at: Option<Time>,
    /// The watch ended, and begins anew where the next read ends.
    rewatch: bool,
}

impl Purpose {
    /// The next operation waits for it.
    fn holds_goals(self) -> bool {
        matches!(self, Self::Goal | Self::Refresh | Self::Close)
    }
}

impl Session {
    /// Nothing yet. The one lock is called `resource`.
    #[must_use]
    pub fn new(resource: &str) -> Self {
        Self::breaking(resource, Broken::NONE)
    }

    /// As [`Self::new`], with a rule broken.
    #[must_use]
    pub fn breaking(resource: &str, broken: Broken) -> Self {
        Self {
            resource: resource.to_owned(),
            broken,
            floor: Term(0),
            link: Link::Down,
            session: None,
            opening: None,
            ttl_s: LEASE_S_MIN,
            mirror: Mirror::default(),
            standing: Standing::default(),
            expected: VecDeque::new(),
            renewals: VecDeque::new(),
            goals: VecDeque::new(),
            answers: BTreeMap::new(),
            answered: Sequence(0),
            events: EventNumber(0),
            doubt_at: None,
            rewatch: false,
        }
    }

    /// Takes in what happened. Outputs are to be carried out in order.
    pub fn step(&mut self, now: Time, input: Input, out: &mut Vec<Output>) {
        match input {
            Input::Connected => self.on_link(Link::Idle),
            Input::Disconnected => self.on_link(Link::Down),
            Input::Frame(frame) => self.on_frame(now, frame, out),
            Input::Answer(answer) => self.on_answer(now, answer, out),
            Input::News(news) => self.on_news(now, news, out),
            Input::Floor(term) => self.floor = self.floor.max(term.min(TERM_MAX)),
            Input::Tick => {}
        }
        if self.doubt_at.take_if(|at| *at <= now).is_some() {
            out.push(Output::Doubt(self.standing.writer.map(|writer| writer.term)));
        }
        self.settle(now, out);
    }

    /// When to step again at the latest, if nothing else happens.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        self.doubt_at
    }

    /// What was asked and not answered is asked again by the client; a session that is over stays so.
    fn on_link(&mut self, link: Link) {
        if !matches!(self.link, Link::Over(_)) {
            self.link = link;
        }
        self.expected.clear();
        self.renewals.clear();
        self.goals.clear();
        self.rewatch = false;
    }

    fn on_frame(&mut self, now: Time, frame: Frame<ToLockd>, out: &mut Vec<Output>) {
        match frame.message {
            ToLockd::Open { session, node, lease_ms, info, .. } => {
                let seconds = lease_ms.div_ceil(1000).max(u64::from(LEASE_S_MIN));
                let lease_s = u32::try_from(seconds).unwrap_or(u32::MAX);
                self.open(now, session, (node, lease_s, info), out);
            }
            ToLockd::Resume { session, last_event, .. } => self.resume(now, session, last_event, out),
            ToLockd::Renew { .. } => self.renew(now, frame.id, out),
            ToLockd::Close if self.link == Link::Open => {
                self.call_for(now, Purpose::Close, Call::Revoke, out);
            }
            ToLockd::Operate { sequence, lowest_unanswered, op } if self.link == Link::Open => {
                self.answers = self.answers.split_off(&lowest_unanswered);
                if self.goals.len() >= OPERATIONS_PER_SESSION_MAX {
                    out.push(Output::Drop("too many operations at once"));
                } else if sequence > self.answered {
                    self.goals.push_back(Goal::Asked(sequence, op));
                }
            }
            ToLockd::Status if self.link == Link::Open => {
                let node = Name::new("etcd").expect("letters are a name");
                let (members, term) = (self.mirror.members(), self.mirror.term());
                self.say(FromLockd::Status(LockdStatus { node, pid: 0, members, term }), out);
            }
            // Not answered, as by a lockd: the only one is entered already.
            ToLockd::Enter { space } if space.as_str() == csnap_lockd::core::spaces::DEFAULT => {}
            ToLockd::Enter { .. } => out.push(Output::Drop("etcd has the lockspace default only")),
            ToLockd::Space(_) => out.push(Output::Drop("there are no lockspaces here")),
            ToLockd::Group(_) => out.push(Output::Drop("there is no group of lockds here")),
            ToLockd::Operate { .. } | ToLockd::Status | ToLockd::Close => self.repeat_the_end(out),
        }
    }

    fn renew(&mut self, now: Time, id: RequestId, out: &mut Vec<Output>) {
        let Some(session) = self.session.filter(|_| !matches!(self.link, Link::Over(_))) else {
            return self.repeat_the_end(out);
        };
        if self.renewals.len() >= RENEWALS_MAX {
            return out.push(Output::Drop("renewals are not answered"));
        }
        self.renewals.push_back((id, now));
        out.push(Output::Call(Call::KeepAlive(LeaseId::of(session))));
    }

    fn repeat_the_end(&mut self, out: &mut Vec<Output>) {
        if let Link::Over(reason) = &self.link {
            let reason = reason.clone();
            self.say(FromLockd::Refused { reason }, out);
        }
    }

    fn on_answer(&mut self, now: Time, answer: Answer, out: &mut Vec<Output>) {
        let Some((purpose, asked_at)) = self.expected.pop_front() else {
            return out.push(Output::Drop("an answer to nothing"));
        };
        match (purpose, answer) {
            (Purpose::Farewell, _) => {}
            (_, Answer::LeaseGone) => self.end(now, "its lease ended".to_owned(), out),
            (Purpose::Lease, Answer::Leased(ttl_s)) => {
                self.ttl_s = ttl_s.max(1);
                self.doubt_after(asked_at);
                self.join(now, out);
            }
            (Purpose::Member, Answer::Txn(..)) => self.ask(now, Purpose::Look, Call::Read, out),
            (Purpose::Look, Answer::Entries(revision, entries)) => {
                self.on_look(now, revision, &entries, out);
            }
            (Purpose::Goal, Answer::Txn(true, revision)) if revision <= self.mirror.revision => {}
            (Purpose::Goal, Answer::Txn(..)) => self.ask(now, Purpose::Refresh, Call::Read, out),
            (Purpose::Refresh, Answer::Entries(revision, entries)) => {
                // The watch may have told more meanwhile.
                if revision >= self.mirror.revision {
                    self.catch_up(now, revision, &entries, out);
                }
                if std::mem::take(&mut self.rewatch) && self.link == Link::Open {
                    out.push(Output::Call(Call::Watch(self.mirror.revision + 1)));
                }
            }
            (Purpose::Close, Answer::Revoked) => self.say(FromLockd::Closed, out),
            _ => out.push(Output::Drop("an answer to something else")),
        }
    }

    /// Brings the first operation on, and those after it once it is answered.
    fn settle(&mut self, now: Time, out: &mut Vec<Output>) {
        while self.link == Link::Open && self.expected.iter().all(|(purpose, _)| !purpose.holds_goals()) {
            let Some(goal) = self.goals.pop_front() else { return };
            let (next, sequence) = match &goal {
                Goal::Release(created) if self.mirror.is_held(*created) => {
                    (Next::Txn(Writer::release(*created)), None)
                }
                Goal::Release(_) => continue,
                Goal::Asked(sequence, op) => {
                    let mut standing = std::mem::take(&mut self.standing);
                    let next = standing.next(op, &self.scene());
                    self.standing = standing;
                    (next, Some(*sequence))
                }
            };
            match next {
                Next::Answer(reply) => {
                    let sequence = sequence.expect("only what was asked is answered");
                    self.answered = sequence;
                    self.answers.insert(sequence, reply.clone());
                    self.say(FromLockd::Answer { sequence, reply }, out);
                }
                Next::Txn(txn) => {
                    self.goals.push_front(goal);
                    self.call_for(now, Purpose::Goal, |lease| Call::Txn(lease, txn), out);
                }
                Next::Over(why) => self.end(now, why.to_owned(), out),
            }
        }
    }

    fn scene(&self) -> Scene<'_> {
        Scene {
            session: self.session.expect("a session is open"),
            resource: &self.resource,
            floor: self.floor,
            mirror: &self.mirror,
            broken: self.broken,
        }
    }

    /// Nothing of the session is held any more, or will be in a moment.
    fn end(&mut self, now: Time, reason: String, out: &mut Vec<Output>) {
        if matches!(self.link, Link::Over(_)) {
            return;
        }
        self.call_for(now, Purpose::Farewell, Call::Revoke, out);
        self.link = Link::Over(reason);
        self.floor = self.known_term();
        self.goals.clear();
        self.standing = Standing::default();
        self.mirror = Mirror::default();
        self.doubt_at = None;
        self.repeat_the_end(out);
    }

    /// The highest term that was seen: no grant has it or a lower one again, whatever becomes of etcd.
    fn known_term(&self) -> Term {
        self.floor.max(self.mirror.term())
    }

    /// A lease counts from when its renewal was sent, less what a clock may be wrong by.
    fn doubt_after(&mut self, sent_at: Time) {
        self.doubt_at = Some(sent_at.after(Duration::from_secs(u64::from(self.ttl_s)) * 49 / 50));
    }

    fn call_for(
        &mut self,
        now: Time,
        purpose: Purpose,
        call: impl FnOnce(LeaseId) -> Call,
        out: &mut Vec<Output>,
    ) {
        if let Some(session) = self.session.filter(|_| self.link != Link::Down) {
            self.ask(now, purpose, call(LeaseId::of(session)), out);
        }
    }

    fn ask(&mut self, now: Time, purpose: Purpose, call: Call, out: &mut Vec<Output>) {
        self.expected.push_back((purpose, now));
        out.push(Output::Call(call));
    }

    fn tell(&mut self, event: LockEvent, out: &mut Vec<Output>) {
        self.events = self.events.next();
        self.say(FromLockd::Event { number: self.events, event }, out);
    }

    fn say(&self, message: FromLockd, out: &mut Vec<Output>) {
        self.send(RequestId(0), message, out);
    }

    #[allow(clippy::unused_self, reason = "beside the other ways to speak")]
    fn send(&self, id: RequestId, message: FromLockd, out: &mut Vec<Output>) {
        out.push(Output::Frame(Frame { id, term: Term(0), message }));
    }
}
