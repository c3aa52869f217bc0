//! Whatever a peer says, the process lives.

use csnap_lockd::canary::Broken;
use csnap_lockd::replica::{
    Base, Body, Change, ClusterId, Content, Hard, Image, Input, LogEntry, Member, Members, Output,
    PeerMessage, Replica, ReplicaConfig, ReplicaId, Saved, Timing,
};
use csnap_proto::Time;
use csnap_storage::sim::Rng;

const CLUSTER: ClusterId = ClusterId([1; 16]);
const SELF: ReplicaId = ReplicaId(1);

fn members() -> Members {
    (1..=3).map(|id| (ReplicaId(id), Member { address: String::new(), voter: true })).collect()
}

/// One of three, with five entries of which three are committed.
fn saved() -> Saved {
    let mut base = Base::founding(CLUSTER, members(), Vec::new());
    base.entries =
        (2..=6).map(|index| LogEntry { index, term: 2, content: Content::Command(vec![1]) }).collect();
    base.hard = Hard { term: 2, vote: 0, commit: 4 };
    Saved { id: SELF, base }
}

fn number(rng: &mut Rng) -> u64 {
    match rng.below(6) {
        0 => u64::MAX - rng.below(3),
        1 => 1 << rng.below(62),
        _ => rng.below(12),
    }
}

fn content(rng: &mut Rng) -> Content {
    let id = ReplicaId(number(rng));
    match rng.below(6) {
        0 => Content::Nothing,
        1 => Content::Change(Change::Add { id, address: "x".into() }),
        2 => Content::Change(Change::Promote { id }),
        3 => Content::Change(Change::Remove { id }),
        _ => Content::Command(vec![7; usize::try_from(rng.below(3)).expect("small")]),
    }
}

fn body(rng: &mut Rng) -> Body {
    let (index, log_term, commit, commit_term) = (number(rng), number(rng), number(rng), number(rng));
    let yes = rng.chance(0.5);
    match rng.below(8) {
        0 | 1 => {
            let (mut at, mut term) = (index, log_term.min(20));
            let entries = (0..rng.below(4)).map(|_| {
                (at, term) = (at.wrapping_add(1), term + rng.below(2));
                LogEntry { index: at, term, content: content(rng) }
            });
            let entries = entries.collect();
            Body::Append { index, log_term, commit, entries }
        }
        2 => Body::Appended { index, commit, refused: yes.then_some((log_term, commit_term)) },
        3 => Body::AskVote { before: yes, index, log_term, commit, commit_term, transfer: rng.chance(0.3) },
        4 => Body::Vote { before: yes, refused: rng.chance(0.3), commit, commit_term },
        5 => {
            let mut members = members();
            if yes {
                members.remove(&ReplicaId(1 + rng.below(3)));
            }
            Body::Install(Image { index, term: log_term, members, state: vec![1] })
        }
        6 if yes => Body::Heartbeat { commit },
        6 => Body::Heartbeaten { commit },
        _ => Body::TakeOver,
    }
}

#[test]
fn no_message_ends_the_process() {
    let (mut outputs, mut terms) = (0, std::collections::BTreeSet::new());
    for seed in 0..20_000 {
        let mut rng = Rng::new(seed);
        let config = ReplicaConfig { timing: Timing::FAST, seed, broken: Broken::NONE };
        let mut replica = Replica::new(Time(1), config, saved());
        let (mut now, mut out) = (1, Vec::new());
        for _ in 0..40 {
            now += rng.below(60_000);
            let from = ReplicaId(rng.below(5));
            let term = if rng.chance(0.8) { replica.term() + rng.below(2) } else { number(&mut rng) };
            let message = PeerMessage { cluster: CLUSTER, from, to: SELF, term, body: body(&mut rng) };
            let input = if rng.chance(0.2) { Input::Tick } else { Input::Received(message) };
            replica.step(Time(now), input, &mut out);
            let written = out.iter().rev().find_map(|output| match output {
                Output::Write(write) => Some(write),
                _ => None,
            });
            if let Some(number) = written.and_then(|write| write.number()).filter(|_| rng.chance(0.5)) {
                replica.step(Time(now), Input::Durable { number }, &mut out);
            }
        }
        outputs += out.len();
        terms.insert(replica.term());
    }
    println!("{outputs} outputs, {} terms", terms.len());
    assert!(outputs > 10_000 && terms.len() > 3, "the messages mattered: {outputs}, {terms:?}");
}

#[test]
fn bytes_that_are_no_message_are_refused() {
    let mut rng = Rng::new(1);
    let mut decoded = 0;
    for _ in 0..20_000 {
        let message =
            PeerMessage { cluster: CLUSTER, from: ReplicaId(2), to: SELF, term: 3, body: body(&mut rng) };
        let mut bytes = message.encode().to_vec();
        if message.check().is_ok() {
            assert_eq!(PeerMessage::decode(&bytes).as_ref(), Ok(&message));
        }
        let at = rng.index(bytes.len());
        bytes[at] ^= 1 << rng.below(8);
        bytes.truncate(1 + rng.index(bytes.len()));
        decoded += u32::from(PeerMessage::decode(&bytes).is_ok());
    }
    println!("{decoded} of 20000 damaged messages decode, to sound ones");
}
