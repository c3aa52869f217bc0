//! What nobody can do, whatever they send.

use csnap_proto::Sequence;
use csnap_proto::limits::{HANDSHAKE_MS_MAX, OPERATIONS_PER_SESSION_MAX};

use super::*;

/// Connects and says these; gives what came back.
fn says(world: &mut World, messages: Vec<ToLockd>) -> (ConnectionId, Vec<Output>) {
    let id = world.accept();
    let mut out = Vec::new();
    for message in messages {
        out.extend(world.lockd_input(Input::Received(id, over_the_wire(&from_stranger(message)))));
    }
    (id, out)
}

fn is_closed(out: &[Output]) -> bool {
    matches!(out.last(), Some(Output::Close(_, Some(_))))
}

#[test]
fn a_session_is_not_resumed_without_its_secret() {
    let mut world = World::with_peers(1);
    for identity in [Identity { secret: Secret([0; 16]), ..identity(0) }, identity(77)] {
        let (_, out) = says(&mut world, vec![resume(identity)]);
        assert!(matches!(sent(&out)[..], [FromLockd::Refused { .. }]) && is_closed(&out), "{out:?}");
    }
    assert!(world.peers[0].client.is_open(), "the owner noticed nothing");
}

#[test]
fn a_session_is_not_opened_over_without_its_secret() {
    let mut world = World::with_peers(1);
    let session = identity(0).session;
    let open =
        ToLockd::Open { session, secret: Secret([0; 16]), node: node(), lease_ms: 1, info: Vec::new() };
    let (_, out) = says(&mut world, vec![open]);
    assert!(matches!(sent(&out)[..], [FromLockd::Refused { .. }]) && is_closed(&out), "{out:?}");
    assert!(world.peers[0].client.is_open());
}

#[test]
fn the_last_to_prove_the_secret_speaks() {
    let mut world = World::with_peers(1);
    world.peers[0].cut = true;
    let (id, out) = says(&mut world, vec![resume(identity(0))]);
    assert!(matches!(sent(&out)[..], [FromLockd::Opened { .. }]));
    assert!(!world.peers[0].client.is_open());
    assert_eq!(world.closed, ["the session went on through another connection"]);
    let renew = ToLockd::Renew { last_event: EventNumber(u64::MAX) };
    let out = world.lockd_input(Input::Received(id, from_stranger(renew)));
    assert!(matches!(sent(&out)[..], [FromLockd::Renewed]));
}

#[test]
fn strangers_are_closed_in_time_and_when_they_speak_out_of_turn() {
    let mut world = World::new();
    let (_, out) = says(&mut world, vec![ToLockd::Renew { last_event: EventNumber(0) }]);
    assert!(is_closed(&out));
    let (_, out) = says(&mut world, vec![ToLockd::Close]);
    assert!(is_closed(&out));
    let (id, out) = says(&mut world, vec![ToLockd::Status, ToLockd::Status]);
    assert!(matches!(sent(&out)[..], [FromLockd::Status(_), FromLockd::Status(_)]));
    world.now = world.now.after(Duration::from_millis(HANDSHAKE_MS_MAX));
    let out = world.lockd_input(Input::Tick);
    assert!(is_closed(&out));
    assert_eq!(world.lockd_input(Input::Received(id, from_stranger(ToLockd::Status))), []);
}

#[test]
fn who_breaks_the_order_of_operations_is_closed() {
    let operate = |sequence: u64, lowest: u64| ToLockd::Operate {
        sequence: Sequence(sequence),
        lowest_unanswered: Sequence(lowest),
        op: LockOp::watch(csnap_proto::message::lock::Watched::Members),
    };
    let max = OPERATIONS_PER_SESSION_MAX as u64;
    for bad in
        [operate(2, 2), operate(u64::MAX, u64::MAX), operate(1, 2), operate(max, 0), operate(u64::MAX, 0)]
    {
        let mut world = World::with_peers(1);
        world.peers[0].cut = true;
        let (_, out) = says(&mut world, vec![resume(identity(0)), bad]);
        assert!(is_closed(&out), "{out:?}");
    }
}

#[test]
fn who_says_who_it_is_twice_is_closed() {
    let mut world = World::with_peers(1);
    world.peers[0].cut = true;
    let (_, out) = says(&mut world, vec![resume(identity(0)), resume(identity(0))]);
    assert!(is_closed(&out));
}

#[test]
fn closing_again_and_again_is_one_command() {
    let mut world = World::with_peers(1);
    world.peers[0].cut = true;
    world.syncing = false;
    says(&mut world, vec![resume(identity(0)), ToLockd::Close, ToLockd::Close, ToLockd::Close]);
    assert_eq!(world.unsynced.len(), 1);
}
