//! Candidates on one table, without connections: those are the client's and have tests of their own.

use std::collections::{BTreeMap, VecDeque};

use csnap_proto::{Name, Secret, Sequence, SessionId};

use super::*;
use crate::core::table::{Command, Effect, Table};

struct Candidate {
    election: Election,
    sequence: Sequence,
    news: Vec<ElectionEvent>,
}

/// Candidates by number, each with a session.
struct Polls {
    table: Table,
    candidates: BTreeMap<u8, Candidate>,
}

fn session(n: u8) -> SessionId {
    SessionId([n; 16])
}

impl Polls {
    fn new(count: u8) -> Self {
        let mut polls = Self { table: Table::default(), candidates: BTreeMap::new() };
        for n in 0..count {
            polls.join(n);
        }
        polls.run();
        polls
    }

    fn join(&mut self, n: u8) {
        let node = Name::new("n").expect("a name");
        let (session, secret) = (session(n), Secret([0; 16]));
        self.table
            .apply(Command::Open { session, secret, node, lease_ms: 1000, info: vec![] }, &mut Vec::new());
        let election = Election::new("leader");
        self.candidates.insert(n, Candidate { election, sequence: Sequence(0), news: Vec::new() });
    }

    fn campaign(&mut self, n: u8, eligibility: Eligibility) {
        self.act(n, |election| election.campaign(eligibility));
    }

    fn proclaim(&mut self, n: u8, floor: Eligibility) {
        self.act(n, |election| election.proclaim(vec![n], floor));
    }

    fn act(&mut self, n: u8, act: impl FnOnce(&mut Election)) {
        act(&mut self.candidates.get_mut(&n).expect("it lives").election);
        self.run();
    }

    fn die(&mut self, n: u8) {
        self.candidates.remove(&n);
        self.apply(Command::Expire { session: session(n) });
        self.run();
    }

    fn apply(&mut self, command: Command) {
        let asked = match &command {
            Command::Operate { op, .. } => Some(op.clone()),
            _ => None,
        };
        let mut effects = Vec::new();
        self.table.apply(command, &mut effects);
        for effect in effects {
            let (to, news) = match effect {
                Effect::Answer { session, reply, .. } => {
                    let op = asked.as_ref().expect("only operations are answered");
                    (session, self.of(session).election.on_answer(op, &reply))
                }
                Effect::Event { session, event, .. } => (session, self.of(session).election.on_event(&event)),
                _ => continue,
            };
            self.of(to).news.extend(news);
        }
    }

    fn of(&mut self, session: SessionId) -> &mut Candidate {
        self.candidates.get_mut(&session.0[0]).expect("it lives")
    }

    /// Until nobody has anything to ask.
    fn run(&mut self) {
        let mut waiting: VecDeque<u8> = self.candidates.keys().copied().collect();
        while let Some(n) = waiting.pop_front() {
            let candidate = self.candidates.get_mut(&n).expect("it lives");
            if let Some(op) = candidate.election.next_op() {
                let sequence = candidate.sequence.next();
                candidate.sequence = sequence;
                self.apply(Command::Operate {
                    session: session(n),
                    sequence,
                    lowest_unanswered: sequence,
                    op,
                });
                waiting = self.candidates.keys().copied().collect();
            }
        }
    }

    fn news(&mut self, n: u8) -> Vec<ElectionEvent> {
        std::mem::take(&mut self.candidates.get_mut(&n).expect("it lives").news)
    }

    fn observed(&self, n: u8) -> Option<(u64, u8)> {
        self.candidates[&n].election.leader().map(|leader| (leader.term.0, leader.data[0]))
    }
}

fn elected(term: u64, clean: bool) -> ElectionEvent {
    ElectionEvent::Elected { term: Term(term), clean }
}

const FAR: Eligibility = Eligibility(1, 9);

#[test]
fn one_leads_and_everybody_sees_what_it_says() {
    let mut polls = Polls::new(3);
    polls.campaign(0, FAR);
    polls.campaign(1, FAR);
    assert_eq!(polls.news(0), [elected(1, true)]);
    assert_eq!(polls.observed(2), None, "not before it says so");
    polls.proclaim(0, FAR);
    for n in 0..3 {
        assert_eq!(polls.observed(n), Some((1, 0)));
    }
    assert!(!polls.news(1).iter().any(|event| matches!(event, ElectionEvent::Elected { .. })));
}

#[test]
fn who_waits_follows_a_leader_that_dies_and_is_told_that_it_died() {
    let mut polls = Polls::new(3);
    polls.campaign(0, FAR);
    polls.campaign(1, FAR);
    polls.proclaim(0, FAR);
    polls.die(0);
    assert_eq!(polls.observed(2), None);
    assert!(polls.news(1).contains(&elected(2, false)));
    polls.proclaim(1, FAR);
    assert_eq!(polls.observed(2), Some((2, 1)));
}

#[test]
fn who_resigns_leaves_a_clean_house_and_may_stand_again() {
    let mut polls = Polls::new(2);
    polls.campaign(0, FAR);
    polls.proclaim(0, FAR);
    polls.campaign(1, FAR);
    polls.news(1);
    polls.act(0, Election::resign);
    assert!(polls.news(0).contains(&ElectionEvent::Resigned));
    assert_eq!(polls.news(1), [elected(2, true), ElectionEvent::Observed(None)]);
    polls.act(1, Election::resign);
    polls.campaign(0, FAR);
    assert!(polls.news(0).contains(&elected(3, true)));
}

#[test]
fn who_is_behind_what_was_promised_lets_the_next_lead() {
    let mut polls = Polls::new(3);
    polls.campaign(0, FAR);
    polls.proclaim(0, Eligibility(2, 5));
    polls.campaign(1, Eligibility(2, 4));
    polls.campaign(2, Eligibility(2, 5));
    polls.die(0);
    assert!(polls.news(1).contains(&ElectionEvent::Ineligible { needed: Eligibility(2, 5) }));
    assert!(matches!(polls.news(2).last(), Some(ElectionEvent::Elected { .. })));
    // One that is alone and behind does not lead either, until it is told to.
    polls.die(2);
    polls.campaign(1, Eligibility(2, 4));
    assert!(polls.news(1).contains(&ElectionEvent::Ineligible { needed: Eligibility(2, 5) }));
    polls.campaign(1, Eligibility::WHATEVER);
    assert!(matches!(polls.news(1).last(), Some(ElectionEvent::Elected { .. })));
}

#[test]
fn a_leader_whose_lock_is_broken_is_deposed_and_so_is_one_without_a_session() {
    let mut polls = Polls::new(2);
    polls.campaign(0, FAR);
    polls.proclaim(0, FAR);
    let lock = polls.table.resource("leader").expect("held").granted[0].lock;
    let sequence = polls.candidates[&1].sequence.next();
    polls.of(session(1)).sequence = sequence;
    let op = LockOp::Break { lock };
    polls.apply(Command::Operate { session: session(1), sequence, lowest_unanswered: sequence, op });
    assert!(polls.news(0).contains(&ElectionEvent::Deposed));
    polls.campaign(0, FAR);
    let lost = polls.candidates.get_mut(&0).expect("lives").election.on_session_lost();
    assert_eq!(lost, Some(ElectionEvent::Deposed));
}

#[test]
fn what_an_earlier_life_held_is_given_up_first() {
    let mut polls = Polls::new(2);
    polls.campaign(0, FAR);
    polls.proclaim(0, FAR);
    polls.campaign(1, FAR);
    let view = polls.table.view(session(0)).expect("open");
    polls.of(session(0)).election = Election::new("leader");
    polls.act(0, |election| election.begin(&view.locks, &view.queued));
    assert!(polls.news(1).contains(&elected(2, false)));
}
