//! A client by itself: where it goes, and when it gives up.

use ::core::net::SocketAddr;

use csnap_proto::message::lock::{FromLockd, ToLockd};
use csnap_proto::{EventNumber, Frame, Name, RequestId, Secret, Sequence, SessionId, Term, Time};

use super::*;

const LEASE_MS: u64 = 900;

fn client() -> LockClient {
    let config = ClientConfig { node: Name::new("n1").expect("a name"), lease_ms: LEASE_MS, renew_ms: 100 };
    LockClient::new(config, Identity { session: SessionId([1; 16]), secret: Secret([2; 16]) }, vec![])
}

fn step(client: &mut LockClient, now_ms: u64, input: ClientInput) -> Vec<ClientOutput> {
    let mut out = Vec::new();
    client.step(Time(now_ms * 1000), input, &mut out);
    out
}

fn says(attempt: u64, id: RequestId, message: FromLockd) -> ClientInput {
    ClientInput::Received { attempt, frame: Frame { id, term: Term(0), message } }
}

fn leader() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7001))
}

/// Connected, and told that another one leads.
fn turned_away(client: &mut LockClient, attempt: u64, leader: Vec<SocketAddr>) -> Vec<ClientOutput> {
    step(client, 1, ClientInput::Connected { attempt });
    step(client, 1, says(attempt, RequestId(0), FromLockd::NotLeader { leader }))
}

#[test]
fn a_hint_is_followed_at_once_but_only_a_few_in_a_row() {
    let mut client = client();
    assert_eq!(step(&mut client, 1, ClientInput::Tick), [ClientOutput::Connect { attempt: 1 }]);
    // A first round without luck, so that the next wait is none of nothing.
    step(&mut client, 1, ClientInput::Disconnected { attempt: 1 });
    for attempt in 2..5 {
        let out = turned_away(&mut client, attempt, vec![leader()]);
        let next = attempt + 1;
        assert_eq!(out, [ClientOutput::Disconnect { attempt }, ClientOutput::Connect { attempt: next }]);
        assert_eq!(client.hint(), Some(leader()));
    }
    assert_eq!(turned_away(&mut client, 5, vec![leader()]), [ClientOutput::Disconnect { attempt: 5 }]);
    assert_eq!(client.hint(), None, "its own addresses are tried again");
    assert!(client.next_deadline() > Some(Time(1000)), "after a wait");
}

#[test]
fn a_hint_that_leads_nowhere_is_not_followed_again() {
    let mut client = client();
    step(&mut client, 1, ClientInput::Tick);
    turned_away(&mut client, 1, vec![leader()]);
    step(&mut client, 1, ClientInput::Disconnected { attempt: 2 });
    assert_eq!(client.hint(), None);
}

#[test]
fn without_a_hint_all_are_tried_after_waits_that_grow() {
    let mut client = client();
    step(&mut client, 1, ClientInput::Tick);
    turned_away(&mut client, 1, vec![]);
    assert_eq!(client.hint(), None);
    assert_eq!(turned_away(&mut client, 2, vec![]), [ClientOutput::Disconnect { attempt: 2 }]);
    assert!(client.next_deadline() > Some(Time(1000)));
}

/// Open since 1 ms, its first renewal confirmed.
fn opened(client: &mut LockClient) {
    step(client, 1, ClientInput::Tick);
    step(client, 1, ClientInput::Connected { attempt: 1 });
    let opened = FromLockd::Opened {
        locks: vec![],
        queued: vec![],
        last_event: EventNumber(0),
        last_sequence: Sequence(0),
    };
    let out = step(client, 1, says(1, RequestId(1), opened));
    let renewal = out.iter().find_map(|output| match output {
        ClientOutput::Send { frame, .. } if matches!(frame.message, ToLockd::Renew { .. }) => Some(frame.id),
        _ => None,
    });
    step(client, 2, says(1, renewal.expect("it renews first"), FromLockd::Renewed));
}

/// What it says while lockd is silent, with the time of each, milliseconds.
fn told_by_silence(client: &mut LockClient) -> Vec<(u64, ClientEvent)> {
    let mut told = Vec::new();
    for now in 2..3 * LEASE_MS {
        for output in step(client, now, ClientInput::Tick) {
            match output {
                ClientOutput::Event(ClientEvent::Disconnected) => {}
                ClientOutput::Event(event) => told.push((now, event)),
                _ => {}
            }
        }
    }
    told
}

#[test]
fn a_client_bound_by_its_lease_is_told_of_jeopardy_and_then_that_it_lost_its_session() {
    let mut bound = client().bound_by_lease();
    opened(&mut bound);
    let told = told_by_silence(&mut bound);
    let [(jeopardy, ClientEvent::Jeopardy), (lost, ClientEvent::SessionLost { .. })] = &told[..] else {
        panic!("{told:?}")
    };
    assert_eq!((*jeopardy, *lost), (1 + LEASE_MS * 2 / 3, 1 + LEASE_MS), "from when the renewal was sent");
    assert!(bound.is_over());
}

#[test]
fn a_client_that_is_fenced_otherwise_goes_on_trying() {
    let mut unbound = client();
    opened(&mut unbound);
    let told = told_by_silence(&mut unbound);
    assert!(matches!(told[..], [(_, ClientEvent::Jeopardy)]), "{told:?}");
    assert!(!unbound.is_over());
}
