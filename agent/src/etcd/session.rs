//! One session's conversation, as lockd would hold it, on etcd.
//!
//! Connections come and go, the session stays: it is its lease and its `members/` key, found by the session's id. A
//! connection begins with a read of every key, and what differs from what was known is told; from there on a watch tells
//! every revision. A watch whose revisions were compacted away begins with such a read again.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use csnap_proto::limits::OPERATIONS_PER_SESSION_MAX;
use csnap_proto::message::lock::{FromLockd, LockEvent, LockOp, LockReply, LockdStatus, ToLockd};
use csnap_proto::{EventNumber, Frame, Name, RequestId, Sequence, SessionId, Term, Time};

use super::call::{Answer, Call, Entry, LeaseId, Put, Revision, Txn};
use super::canary::{Broken, Canary};
use super::goal::{Next, Scene, Standing, Writer};
use super::keys::{self, Key, MemberRecord, TERM_MAX};
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
            ToLockd::Operate { .. } | ToLockd::Status | ToLockd::Close => self.repeat_the_end(out),
            // An agent asks nothing of the group of lockds.
            ToLockd::Group(_) => {}
        }
    }

    fn open(&mut self, now: Time, session: SessionId, who: (Name, u32, Vec<u8>), out: &mut Vec<Output>) {
        if self.session != Some(session) {
            // What an earlier session holds, its owner does not know any more.
            self.call_for(now, Purpose::Farewell, Call::Revoke, out);
            self.begin(session);
        }
        self.link = Link::Opening;
        let lease_s = who.1;
        self.opening = Some(who);
        self.call_for(now, Purpose::Lease, |lease| Call::Grant(lease, lease_s), out);
    }

    /// Another session: of the one before only the term counts, and what is on its way on the connection.
    fn begin(&mut self, session: SessionId) {
        let expected = std::mem::take(&mut self.expected);
        let (session, floor) = (Some(session), self.known_term());
        *self = Self { session, floor, expected, ..Self::breaking(&self.resource, self.broken) };
    }

    fn resume(&mut self, now: Time, session: SessionId, last_event: EventNumber, out: &mut Vec<Output>) {
        if matches!(self.link, Link::Over(_)) && self.session == Some(session) {
            return self.repeat_the_end(out);
        }
        if self.session != Some(session) {
            self.begin(session);
        }
        self.link = Link::Resuming(last_event);
        self.ask(now, Purpose::Look, Call::Read, out);
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

    /// The lease is there: make its owner a member.
    fn join(&mut self, now: Time, out: &mut Vec<Output>) {
        let (Some(session), Some((node, _, info))) = (self.session, &self.opening) else { return };
        let record = MemberRecord { node: node.clone(), info: info.clone() };
        let put = Put { key: Key::Member(session), value: keys::encode(&record), leased: true };
        let txn = Txn { puts: vec![put], ..Txn::default() };
        self.call_for(now, Purpose::Member, |lease| Call::Txn(lease, txn), out);
    }

    /// The first look on a connection.
    fn on_look(&mut self, now: Time, revision: Revision, entries: &[Entry], out: &mut Vec<Output>) {
        if revision < self.mirror.revision && !self.broken.breaks(Canary::ResumeOverRestore) {
            let went_back = "etcd's revisions went back: it was restored from a backup";
            return self.end(now, went_back.to_owned(), out);
        }
        let first = self.mirror.revision == 0;
        let found = match Mirror::read(revision, entries) {
            Ok(found) => found,
            Err(foreign) => return self.end(now, foreign.to_string(), out),
        };
        if self.session.is_none_or(|session| found.member(session).is_none()) {
            return self.end(now, "its lease ended".to_owned(), out);
        }
        let before = std::mem::replace(&mut self.mirror, found);
        if first {
            let (mut standing, scene) = (Standing::default(), self.scene());
            standing.find_writer(&scene);
            self.standing = standing;
        }
        let seen = match std::mem::replace(&mut self.link, Link::Open) {
            Link::Resuming(last_event) => last_event,
            _ => EventNumber(0),
        };
        self.opened(seen, out);
        self.tell_what_changed(&before, out);
        out.push(Output::Call(Call::Watch(revision + 1)));
        self.check_standing(now, out);
    }

    /// Says Opened, with everything that the client may have missed.
    fn opened(&mut self, seen: EventNumber, out: &mut Vec<Output>) {
        self.events = self.events.max(seen);
        let locks = self.standing.locks(&self.resource);
        let (last_event, last_sequence) = (self.events, self.answered);
        self.say(FromLockd::Opened { locks, queued: Vec::new(), last_event, last_sequence }, out);
        for (sequence, reply) in self.answers.clone() {
            self.say(FromLockd::Answer { sequence, reply }, out);
        }
        if seen != self.events {
            self.tell(LockEvent::Overrun, out);
        }
    }

    fn on_news(&mut self, now: Time, news: News, out: &mut Vec<Output>) {
        match news {
            News::Kept(ttl_s) => {
                let Some((id, sent_at)) = self.renewals.pop_front() else { return };
                self.ttl_s = ttl_s.unwrap_or(self.ttl_s).max(1);
                self.doubt_after(sent_at);
                self.send(id, FromLockd::Renewed, out);
            }
            News::Gone => self.end(now, "its lease ended".to_owned(), out),
            News::Changes(entries) if self.link == Link::Open => self.on_changes(now, &entries, out),
            News::Compacted if self.link == Link::Open => {
                self.rewatch = true;
                self.ask(now, Purpose::Refresh, Call::Read, out);
            }
            News::Changes(_) | News::Compacted => {}
        }
    }

    /// The watch goes on: a revision at a time, those that a read told already left out.
    fn on_changes(&mut self, now: Time, entries: &[Entry], out: &mut Vec<Output>) {
        for changed in entries.chunk_by(|a, b| a.written == b.written) {
            let revision = changed[0].written;
            if revision <= self.mirror.revision {
                continue;
            }
            let before = self.mirror.clone();
            self.mirror.revision = revision;
            if let Err(foreign) = changed.iter().try_for_each(|entry| self.mirror.take_in(entry)) {
                return self.end(now, foreign.to_string(), out);
            }
            self.tell_what_changed(&before, out);
        }
        self.check_standing(now, out);
        self.release_stray();
    }

    fn catch_up(&mut self, now: Time, revision: Revision, entries: &[Entry], out: &mut Vec<Output>) {
        match Mirror::read(revision, entries) {
            Ok(found) => {
                let before = std::mem::replace(&mut self.mirror, found);
                self.tell_what_changed(&before, out);
                self.check_standing(now, out);
                self.release_stray();
            }
            Err(foreign) => self.end(now, foreign.to_string(), out),
        }
    }

    fn tell_what_changed(&mut self, before: &Mirror, out: &mut Vec<Output>) {
        if self.standing.watches_members {
            for event in self.mirror.member_news(before) {
                self.tell(event, out);
            }
        }
        if self.standing.watches_value
            && let Some(event) = self.mirror.value_news(before, &self.resource)
        {
            self.tell(event, out);
        }
    }

    /// Ends the session if what it stands on is gone.
    fn check_standing(&mut self, now: Time, out: &mut Vec<Output>) {
        let closing = self.expected.iter().any(|(purpose, _)| *purpose == Purpose::Close);
        let Some(session) = self.session.filter(|_| self.link == Link::Open && !closing) else { return };
        let is_unlock = |goal: &Goal| matches!(goal, Goal::Asked(_, LockOp::Unlock { .. }));
        let taken = self.standing.writer.is_some_and(|writer| !self.mirror.is_held(writer.created));
        if self.mirror.member(session).is_none() {
            self.end(now, "its lease ended".to_owned(), out);
        } else if taken && !self.goals.iter().any(is_unlock) {
            self.end(now, "the server lock was taken from it".to_owned(), out);
        }
    }

    /// Gives back a lock that is ours and that nobody waits for: an attempt to take it that arrived late.
    fn release_stray(&mut self) {
        let is_take = |goal: &Goal| matches!(goal, Goal::Asked(_, LockOp::Convert { .. }) | Goal::Release(_));
        let ours = self.mirror.lock.as_ref().filter(|lock| Some(lock.record.session) == self.session);
        if let Some(lock) = ours
            && self.link == Link::Open
            && self.standing.writer.is_none()
            && !self.goals.iter().any(is_take)
        {
            self.goals.push_front(Goal::Release(lock.created));
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
