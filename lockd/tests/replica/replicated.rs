//! Three lockds with their replicas, with disks and a network that only take their turn: what a change of leaders means for
//! sessions.

use std::collections::VecDeque;

use csnap_lockd::canary::Broken;
use csnap_lockd::core::ConnectionId;
use csnap_lockd::replica::{
    Base, ClusterId, Member, Members, PeerMessage, ReplicaConfig, ReplicaId, Saved, Timing, Write,
};
use csnap_lockd::replicated::{Input, Output, Replicated};
use csnap_proto::message::lock::{FromLockd, ToLockd};
use csnap_proto::{Caller, EventNumber, Frame, Name, RequestId, Secret, SessionId, Term, Time};

const SESSION: SessionId = SessionId([1; 16]);
const SECRET: Secret = Secret([2; 16]);
const LEASE_MS: u64 = 1000;

pub(super) struct Trio {
    now: u64,
    pub(super) lockds: Vec<Option<Replicated>>,
    messages: VecDeque<(usize, PeerMessage)>,
    /// What was said to clients, by which lockd.
    pub(super) said: Vec<(usize, FromLockd)>,
    pub(super) closed: Vec<(usize, Option<String>)>,
}

impl Trio {
    fn new(timing: Timing, seed: u64) -> Self {
        let member = |n: u64| (ReplicaId(n), Member { address: format!("lockd{n}"), voter: true });
        let members: Members = (1..=3).map(member).collect();
        let lockd = |n: u64| {
            let base = Base::founding(ClusterId([9; 16]), members.clone(), Replicated::first_state());
            let config = ReplicaConfig { timing, seed, broken: Broken::NONE };
            let (node, saved) =
                (Name::new(format!("n{n}")).expect("a name"), Saved { id: ReplicaId(n), base });
            Some(Replicated::new(Time(1), config, node, 1, saved).expect("its own table"))
        };
        let lockds = (1..=3).map(lockd).collect();
        Self { now: 1, lockds, messages: VecDeque::new(), said: Vec::new(), closed: Vec::new() }
    }

    /// One step, and all that follows from it at once.
    pub(super) fn step(&mut self, n: usize, input: Input) {
        let mut inputs = VecDeque::from([(n, input)]);
        while let Some((n, input)) = inputs.pop_front().or_else(|| self.next_message()) {
            let Some(Some(lockd)) = self.lockds.get_mut(n) else { continue };
            let mut out = Vec::new();
            lockd.step(Time(self.now), input, &mut out).expect("commands of this version");
            for output in out {
                match output {
                    Output::Write(write) => {
                        inputs.extend(write.number().map(|number| (n, Input::Durable { number })));
                    }
                    Output::Peer(message) => {
                        let to = usize::try_from(message.to.0).expect("small") - 1;
                        self.messages.push_back((to, message));
                    }
                    Output::Send(_, frame) => self.said.push((n, frame.message)),
                    Output::Close(_, why) => self.closed.push((n, why)),
                    _ => {}
                }
            }
        }
    }

    fn next_message(&mut self) -> Option<(usize, Input)> {
        self.messages.pop_front().map(|(to, message)| (to, Input::Peer(message)))
    }

    /// Lets time pass until something is so; panics where that takes more than ten seconds.
    pub(super) fn until(&mut self, done: impl Fn(&Self) -> bool) {
        let most = self.now + 10_000_000;
        while !done(self) {
            assert!(self.now < most, "it never comes to that");
            self.now += 1_000;
            for n in 0..self.lockds.len() {
                let due = |lockd: &Replicated| lockd.next_deadline().is_some_and(|at| at.0 <= self.now);
                if self.lockds[n].as_ref().is_some_and(due) {
                    self.step(n, Input::Tick);
                }
            }
        }
    }

    /// One more, with an empty disk; it knows of no group.
    pub(super) fn start_empty(&mut self) -> usize {
        let n = self.lockds.len();
        let id = ReplicaId(n as u64 + 1);
        let config = ReplicaConfig { timing: Timing::DEFAULT, seed: 7, broken: Broken::NONE };
        let (node, saved) =
            (Name::new(format!("n{}", n + 1)).expect("a name"), Saved { id, base: Base::empty() });
        self.lockds.push(Some(Replicated::new(Time(self.now), config, node, 1, saved).expect("nothing yet")));
        n
    }

    pub(super) fn leader(&self) -> Option<usize> {
        (0..self.lockds.len()).find(|n| self.lockds[*n].as_ref().is_some_and(|lockd| lockd.lockd().leads()))
    }

    /// A client opens or resumes, through a new connection.
    pub(super) fn ask(&mut self, n: usize, connection: u64, message: ToLockd) {
        let id = ConnectionId(connection);
        self.step(n, Input::Opened(id, Caller::local()));
        self.step(n, Input::Received(id, Frame { id: RequestId(1), term: Term(0), message }));
    }

    pub(super) fn knows_session(&self, n: usize) -> bool {
        let lockd = self.lockds[n].as_ref().expect("it runs");
        !lockd.lockd().table().members().is_empty()
    }
}

pub(super) fn open() -> ToLockd {
    let node = Name::new("n1").expect("a name");
    ToLockd::Open { session: SESSION, secret: SECRET, node, lease_ms: LEASE_MS, info: vec![] }
}

/// A group whose leader opened a session.
pub(super) fn with_session() -> (Trio, usize) {
    let mut trio = Trio::new(Timing::DEFAULT, 5);
    trio.until(|trio| trio.leader().is_some());
    let leader = trio.leader().expect("there is one");
    trio.ask(leader, 1, open());
    trio.until(|trio| (0..3).all(|n| trio.knows_session(n)));
    assert!(matches!(trio.said.last(), Some((n, FromLockd::Opened { .. })) if *n == leader));
    (trio, leader)
}

#[test]
fn a_new_leader_gives_every_session_its_full_lease() {
    let (mut trio, first) = with_session();
    let opened_at = trio.now;
    // The lease is almost over when its leader dies.
    trio.until(|trio| trio.now > opened_at + 900_000);
    trio.lockds[first] = None;
    trio.until(|trio| trio.leader().is_some());
    let (second, leads_at) = (trio.leader().expect("there is one"), trio.now);
    assert!(trio.knows_session(second));
    trio.until(|trio| !trio.knows_session(second));
    let lived = trio.now - leads_at;
    assert!(lived >= LEASE_MS * 1000, "{lived} microseconds under the new leader");
    assert!(lived < 2 * LEASE_MS * 1000, "and not for ever: {lived}");
}

#[test]
fn a_session_goes_on_with_the_next_leader() {
    let (mut trio, first) = with_session();
    trio.lockds[first] = None;
    trio.until(|trio| trio.leader().is_some());
    let second = trio.leader().expect("there is one");
    trio.ask(second, 7, ToLockd::Resume { session: SESSION, secret: SECRET, last_event: EventNumber(0) });
    assert!(matches!(trio.said.last(), Some((n, FromLockd::Opened { .. })) if *n == second));
}

#[test]
fn requests_that_come_together_become_one_write_and_are_answered_only_after_it() {
    let (mut trio, leader) = with_session();
    let (now, mut out) = (Time(trio.now), Vec::new());
    let lockd = trio.lockds[leader].as_mut().expect("it runs");
    for n in 20..23 {
        let (id, node) = (ConnectionId(n.into()), Name::new("n1").expect("a name"));
        let (session, secret) = (SessionId([n; 16]), SECRET);
        let message = ToLockd::Open { session, secret, node, lease_ms: LEASE_MS, info: vec![] };
        let frame = Frame { id: RequestId(1), term: Term(0), message };
        for input in [Input::Opened(id, Caller::local()), Input::Received(id, frame)] {
            lockd.take_in(now, input, &mut out).expect("commands of this version");
        }
    }
    assert_eq!(out, [], "nothing before it is settled");
    lockd.settle(now, &mut out).expect("commands of this version");
    let of = |wanted: fn(&Output) -> bool| out.iter().filter(|output| wanted(output)).count();
    // Beside the three stands what the replica promised.
    let one =
        |output: &Output| matches!(output, Output::Write(Write::Append { items, .. }) if items.len() == 4);
    assert_eq!((of(|output| matches!(output, Output::Write(_))), of(one)), (1, 1), "{out:?}");
    assert_eq!(of(|output| matches!(output, Output::Peer(_))), 2, "a message to each other replica: {out:?}");
    assert_eq!(out.len(), 3, "and no answer: {out:?}");
}

#[test]
fn a_lockd_that_follows_serves_nobody_and_says_who_leads() {
    let (mut trio, leader) = with_session();
    let follower = (leader + 1) % 3;
    trio.ask(follower, 9, open());
    let (n, why) = trio.closed.last().expect("it was turned away");
    let says = why.as_deref().unwrap_or_default();
    assert!(*n == follower && says.contains(&format!("lockd{}", leader + 1)), "{says}");
}

#[test]
fn without_a_majority_nobody_leads_and_no_session_ends() {
    let (mut trio, leader) = with_session();
    let last = (leader + 1) % 3;
    trio.lockds[(leader + 2) % 3] = None;
    trio.lockds[leader] = None;
    let stopped_at = trio.now;
    trio.until(|trio| trio.now > stopped_at + 5_000_000);
    assert!(trio.leader().is_none() && trio.knows_session(last));
}

#[test]
fn a_leader_without_its_majority_stops_leading() {
    let (mut trio, leader) = with_session();
    trio.lockds[(leader + 1) % 3] = None;
    trio.lockds[(leader + 2) % 3] = None;
    trio.until(|trio| trio.leader().is_none());
    // Whoever asks waits for the next leader, for a while.
    trio.ask(leader, 11, open());
    let sent_away = |trio: &Trio| {
        let why = |(n, why): &(usize, Option<String>)| {
            *n == leader && why.as_deref() == Some("no lockd leads at present")
        };
        trio.closed.iter().any(why)
    };
    assert!(!sent_away(&trio));
    trio.until(sent_away);
    assert!(trio.said.contains(&(leader, FromLockd::NotLeader { leader: vec![] })));
}

/// In virtual time, where messages and disks take none: what the waits alone cost.
#[test]
fn a_dead_leader_is_replaced_within_a_few_waits() {
    for (name, timing) in [("default", Timing::DEFAULT), ("fast", Timing::FAST)] {
        let mut took: Vec<u64> = Vec::new();
        for seed in 0..200 {
            let mut trio = Trio::new(timing, seed);
            trio.until(|trio| trio.leader().is_some());
            // Dies anywhere between two heartbeats.
            let dies_at = trio.now + 100_000 + seed * 997 % 50_000;
            trio.until(|trio| trio.now > dies_at);
            let leader = trio.leader().expect("nothing happened to it");
            trio.lockds[leader] = None;
            trio.until(|trio| trio.leader().is_some());
            took.push(trio.now - dies_at);
        }
        took.sort_unstable();
        let (middle, late, last) = (took[100], took[197], took[199]);
        println!(
            "{name}: a dead leader is replaced after {middle} (p50), {late} (p99), {last} (max) microseconds"
        );
        let longest = timing.tick * u32::try_from(timing.election_ticks_max).expect("small");
        assert!(u128::from(last) < 4 * longest.as_micros(), "{last}");
    }
}
