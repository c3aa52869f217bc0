//! What callers may not ask for, and that it costs them nothing else.

use csnap_proto::message::lock::{LockReply, Watched};
use csnap_proto::{LockId, Role};

use super::*;

fn caller(role: Role, name: &str) -> Caller {
    Caller { role, name: Name::new(name).expect("a name") }
}

/// A world with one lock, held by an operator's session, and a client's session of this role.
fn with(role: Role) -> (World, usize) {
    let mut world = World::with_peers(1);
    world.lock(0, Mode::Ex);
    world.caller = caller(role, "n1");
    let peer = world.add(LockClient::new(config(), identity(9), Vec::new()));
    world.events(peer);
    (world, peer)
}

fn answers(world: &mut World, peer: usize) -> Vec<LockReply> {
    let events = world.events(peer).into_iter();
    let answers = events.filter_map(|event| match event {
        ClientEvent::Answer { reply, .. } => Some(reply),
        _ => None,
    });
    answers.collect()
}

fn denied(request: &str) -> LockReply {
    LockReply::Invalid(format!("denied: client n1 may not {request}"))
}

#[test]
fn what_is_denied_takes_its_place_and_changes_nothing() {
    let (mut world, peer) = with(Role::Client);
    let before = world.table().term();
    for op in [
        LockOp::Break { lock: LockId(1) },
        LockOp::watch(Watched::Value("r".into())),
        LockOp::lock("csnap/server", Mode::Ex, Flags::NONE),
        LockOp::lock("mine", Mode::Ex, Flags::NONE),
    ] {
        world.operate(peer, op);
    }
    let answers = answers(&mut world, peer);
    assert_eq!(answers[0], denied("break a lock"));
    assert!(matches!(&answers[1], LockReply::Value { vacant: false, .. }), "the lock is held: {answers:?}");
    assert_eq!(answers[2], denied("lock what begins with csnap/"));
    assert!(matches!(&answers[3], LockReply::Granted { lock, .. } if lock.term == before.next()));
    assert_eq!(
        world.denied,
        ["denied: client n1 may not break a lock", "denied: client n1 may not lock what begins with csnap/"]
    );
    assert_eq!(world.replayed(), Spaces::from(world.table().clone()), "the log says the same");
}

#[test]
fn what_was_denied_is_denied_again_to_who_asks_again() {
    let (mut world, peer) = with(Role::Client);
    world.syncing = false;
    world.operate(peer, LockOp::Break { lock: LockId(1) });
    assert_eq!(answers(&mut world, peer), [], "nobody learns what is not durable");
    world.make_durable();
    world.drop_connection(peer);
    world.syncing = true;
    world.run(Duration::from_millis(LEASE_MS / 2));
    assert_eq!(answers(&mut world, peer), [denied("break a lock")]);
}

#[test]
fn a_node_opens_no_session_under_another_name() {
    let mut world = World::new();
    world.caller = caller(Role::Node, "n2");
    let peer = world.add(LockClient::new(config(), identity(9), vec![1]));
    let reason = "denied: node n2 may not open a session under another name".to_owned();
    assert_eq!(world.events(peer), [ClientEvent::SessionLost { reason }]);
    assert_eq!(world.table(), &Table::default(), "nothing came of it");
    world.caller = caller(Role::Node, "n1");
    let peer = world.add(LockClient::new(config(), identity(10), vec![1]));
    assert!(world.peers[peer].client.is_open());
}

#[test]
fn a_client_publishes_nothing_that_agents_would_read() {
    let mut world = World::new();
    world.caller = caller(Role::Client, "n1");
    let peer = world.add(LockClient::new(config(), identity(9), vec![1]));
    assert!(matches!(&world.events(peer)[..], [ClientEvent::SessionLost { .. }]));
    let peer = world.add(LockClient::new(config(), identity(10), Vec::new()));
    world.events(peer);
    world.operate(peer, LockOp::SetInfo { info: vec![1] });
    assert_eq!(answers(&mut world, peer), [denied("publish a description")]);
}

#[test]
fn a_replica_is_no_client() {
    let mut world = World::new();
    world.caller = caller(Role::Lockd, "l1");
    let id = world.accept();
    let out = world.lockd_input(Input::Received(id, from_stranger(ToLockd::Status)));
    let Some(FromLockd::Refused { reason }) = sent(&out).first() else { panic!("{out:?}") };
    assert_eq!(reason, "denied: lockd l1 may not ask for the status");
    assert!(matches!(out.last(), Some(Output::Close(..))));
}

#[cfg(feature = "canary")]
#[test]
fn a_lockd_that_denies_nothing_is_noticed() {
    use crate::core::permission::Canary;
    let (mut world, peer) = with(Role::Client);
    world.lockd.as_mut().expect("runs").break_permission(Canary::AllowByDefault);
    world.operate(peer, LockOp::Break { lock: LockId(1) });
    assert!(matches!(answers(&mut world, peer)[..], [LockReply::Broken(_)]));
}
