//! What operators ask of a group, and where its clients are sent, in virtual time.

use std::net::SocketAddr;

use csnap_lockd::core::ConnectionId;
use csnap_lockd::replica::ReplicaId;
use csnap_lockd::replicated::{Input, Presence};
use csnap_proto::Name;
use csnap_proto::message::lock::{FromLockd, GroupReply, GroupRequest, GroupView, ReplicaNumber, ToLockd};

use super::replicated::{Trio, open, with_session};

const OPERATOR: u64 = 77;

fn id(n: usize) -> ReplicaId {
    ReplicaId(n as u64 + 1)
}

fn number(n: usize) -> ReplicaNumber {
    ReplicaNumber(id(n).0)
}

fn clients(n: usize) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7000 + u16::try_from(n).expect("small")))
}

fn presence(n: usize) -> Presence {
    let node = Name::new(format!("n{}", n + 1)).expect("a name");
    Presence { node, pid: 1, peer: None, clients: vec![clients(n)] }
}

/// A group with a session, whose owner is away; its replicas know that they reach each other. And who leads.
fn acquainted() -> (Trio, usize) {
    let (mut trio, leader) = with_session();
    trio.step(leader, Input::Closed(ConnectionId(1)));
    for n in 0..3 {
        trio.lockds[n].as_mut().expect("it runs").set_addresses(vec![clients(n)], None);
        for other in (0..3).filter(|other| *other != n) {
            trio.step(n, Input::Reached(id(other), presence(other)));
        }
    }
    (trio, leader)
}

/// The answers to an operator, from the oldest.
fn answers(trio: &Trio) -> Vec<&FromLockd> {
    let to_operator = |(_, said): &&(usize, FromLockd)| {
        matches!(said, FromLockd::Group(_)) || matches!(said, FromLockd::NotLeader { .. })
    };
    trio.said.iter().filter(to_operator).map(|(_, said)| said).collect()
}

/// Asks, and waits for the answer.
fn ask(trio: &mut Trio, n: usize, request: GroupRequest) -> FromLockd {
    trio.said.clear();
    trio.ask(n, OPERATOR, ToLockd::Group(request));
    trio.until(|trio| !answers(trio).is_empty());
    answers(trio)[0].clone()
}

fn refusal(answer: FromLockd) -> String {
    let FromLockd::Group(GroupReply::Refused { reason }) = answer else { panic!("{answer:?}") };
    assert_eq!(reason.lines().count(), 1, "{reason}");
    reason
}

fn done(answer: FromLockd) -> String {
    let FromLockd::Group(GroupReply::Done { what }) = answer else { panic!("{answer:?}") };
    what
}

fn shown(trio: &mut Trio, n: usize) -> GroupView {
    let FromLockd::Group(GroupReply::Group(view)) = ask(trio, n, GroupRequest::Show) else {
        panic!("no view")
    };
    view
}

/// A replica is reached by nobody any more, or dead.
fn cut(trio: &mut Trio, n: usize) {
    trio.lockds[n] = None;
    for other in (0..3).filter(|other| *other != n) {
        trio.step(other, Input::Unreachable(id(n)));
    }
}

#[test]
fn a_follower_sends_clients_to_the_leader() {
    let (mut trio, leader) = acquainted();
    trio.said.clear();
    trio.ask((leader + 1) % 3, 9, open());
    let hint = FromLockd::NotLeader { leader: vec![clients(leader)] };
    assert_eq!(trio.said, [((leader + 1) % 3, hint)]);
}

#[test]
fn who_asks_while_the_leader_is_gone_is_sent_to_the_next_one() {
    let (mut trio, leader) = acquainted();
    cut(&mut trio, leader);
    trio.said.clear();
    for n in (0..3).filter(|n| *n != leader) {
        trio.ask(n, 9, open());
    }
    assert!(trio.said.is_empty(), "nobody is sent to the dead: {:?}", trio.said);
    trio.until(|trio| trio.said.len() == 2);
    let next = trio.leader().expect("somebody is told of");
    let hint = FromLockd::NotLeader { leader: vec![clients(next)] };
    assert!(trio.said.iter().all(|(_, said)| *said == hint), "{:?}", trio.said);
}

#[test]
fn another_replica_leads_when_an_operator_says_so_and_saying_it_again_changes_nothing() {
    let (mut trio, leader) = acquainted();
    let to = (leader + 1) % 3;
    let request = GroupRequest::Move { to: number(to) };
    assert!(done(ask(&mut trio, leader, request.clone())).contains("leads"));
    trio.until(|trio| trio.leader() == Some(to));
    assert!(done(ask(&mut trio, to, request.clone())).contains("leads"));
    assert_eq!(trio.leader(), Some(to));
    // Another one would have to be asked, and says so.
    let other = GroupRequest::Move { to: number(leader) };
    let sent_on = ask(&mut trio, leader, other);
    assert_eq!(sent_on, FromLockd::NotLeader { leader: vec![clients(to)] });
}

#[test]
fn what_an_operator_would_regret_is_refused() {
    let (mut trio, leader) = acquainted();
    let (away, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let itself = GroupRequest::Remove { replica: number(leader) };
    assert!(refusal(ask(&mut trio, leader, itself)).contains("leads"));
    let unknown = GroupRequest::Move { to: ReplicaNumber(99) };
    assert!(refusal(ask(&mut trio, leader, unknown)).contains("no replica"));
    cut(&mut trio, away);
    let to_the_dead = GroupRequest::Move { to: number(away) };
    assert!(refusal(ask(&mut trio, leader, to_the_dead)).contains("not reached"));
    let majority = GroupRequest::Remove { replica: number(other) };
    assert!(refusal(ask(&mut trio, leader, majority)).contains("majority"));
    assert_eq!(shown(&mut trio, leader).replicas.len(), 3);
}

/// One that is frozen stays connected; a group whose majority it is would stand still.
#[test]
fn a_replica_that_says_nothing_counts_for_nothing_though_it_is_connected() {
    let (mut trio, leader) = acquainted();
    let (frozen, other) = ((leader + 1) % 3, (leader + 2) % 3);
    trio.lockds[frozen] = None;
    let majority = GroupRequest::Remove { replica: number(other) };
    assert!(refusal(ask(&mut trio, leader, majority)).contains("majority"));
    let request = GroupRequest::Remove { replica: number(frozen) };
    assert!(done(ask(&mut trio, leader, request)).contains("2 vote"));
}

#[test]
fn a_dead_replica_is_removed_once_and_the_rest_goes_on() {
    let (mut trio, leader) = acquainted();
    let away = (leader + 1) % 3;
    cut(&mut trio, away);
    for _ in 0..2 {
        let request = GroupRequest::Remove { replica: number(away) };
        assert!(done(ask(&mut trio, leader, request)).contains("2 vote"));
        assert_eq!(shown(&mut trio, leader).replicas.len(), 2);
    }
}

#[test]
fn a_replica_that_is_not_there_is_added_only_as_one_that_learns() {
    let (mut trio, leader) = acquainted();
    let (node, address) = (Name::new("n9").expect("a name"), clients(9));
    let add = GroupRequest::Add { replica: ReplicaNumber(9), node, address };
    assert!(refusal(ask(&mut trio, leader, add)).contains("n9@127.0.0.1:7009 is not reached"));
    let view = shown(&mut trio, leader);
    let new = view.replicas.iter().find(|one| one.replica == ReplicaNumber(9)).expect("it learns");
    assert!(!new.voter && !new.reached && new.node.is_some());
}

#[test]
fn an_empty_replica_is_added_learns_everything_and_votes() {
    let (mut trio, leader) = acquainted();
    let new = trio.start_empty();
    for n in 0..3 {
        trio.step(n, Input::Reached(id(new), presence(new)));
        trio.step(new, Input::Reached(id(n), presence(n)));
    }
    let (node, address) = (Name::new("n4").expect("a name"), clients(new));
    let add = GroupRequest::Add { replica: number(new), node, address };
    for _ in 0..2 {
        assert!(done(ask(&mut trio, leader, add.clone())).contains("4 vote"));
    }
    assert!(trio.knows_session(new));
    let to = GroupRequest::Move { to: number(new) };
    assert_eq!(done(ask(&mut trio, leader, to)), "n4 leads");
}

#[test]
fn a_replica_at_the_address_of_a_lost_disk_takes_its_place() {
    let (mut trio, leader) = acquainted();
    let (lost, last) = ((leader + 1) % 3, (leader + 2) % 3);
    // Its address is known only of those that were added.
    let (node, address) = (Name::new("n9").expect("a name"), clients(9));
    let add = GroupRequest::Add { replica: ReplicaNumber(9), node: node.clone(), address };
    assert!(refusal(ask(&mut trio, leader, add)).contains("not reached"));
    let new = trio.start_empty();
    for n in [leader, lost, last] {
        trio.step(n, Input::Reached(id(new), presence(new)));
    }
    let add = GroupRequest::Add { replica: number(new), node, address };
    assert!(done(ask(&mut trio, leader, add)).contains("4 vote"));
    let view = shown(&mut trio, leader);
    let numbers: Vec<_> = view.replicas.iter().map(|one| one.replica).collect();
    assert_eq!(numbers, [number(0), number(1), number(2), number(new)]);
}

#[test]
fn one_request_is_under_way_at_a_time() {
    let (mut trio, leader) = acquainted();
    let (node, address) = (Name::new("n9").expect("a name"), clients(9));
    trio.ask(leader, 76, ToLockd::Group(GroupRequest::Add { replica: ReplicaNumber(9), node, address }));
    let request = GroupRequest::Move { to: number((leader + 1) % 3) };
    assert!(refusal(ask(&mut trio, leader, request)).contains("under way"));
}

#[test]
fn without_a_majority_the_group_is_shown_and_nothing_changes() {
    let (mut trio, leader) = acquainted();
    let last = (leader + 1) % 3;
    cut(&mut trio, leader);
    cut(&mut trio, (leader + 2) % 3);
    trio.until(|trio| trio.lockds[last].as_ref().expect("it runs").replica().leader().is_none());
    let view = shown(&mut trio, last);
    assert!(!view.leads && view.leader.is_none() && view.replicas.len() == 3);
    let request = GroupRequest::Remove { replica: number(leader) };
    assert_eq!(ask(&mut trio, last, request), FromLockd::NotLeader { leader: vec![] });
}
