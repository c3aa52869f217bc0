//! What an honest client can rely on.

use csnap_proto::message::lock::{Expect, KeyOp, LockEvent, LockReply, Owner, Watched};
use csnap_proto::{LockId, OwnerId, RequestId, Term};

use super::*;

fn replies(events: Vec<ClientEvent>) -> Vec<LockReply> {
    let replies = events.into_iter().filter_map(|event| match event {
        ClientEvent::Answer { reply, .. } => Some(reply),
        _ => None,
    });
    replies.collect()
}

fn is_granted(events: &[ClientEvent]) -> bool {
    events.iter().any(|event| {
        matches!(
            event,
            ClientEvent::Answer { reply: LockReply::Granted { .. }, .. }
                | ClientEvent::Event(LockEvent::Granted { .. })
        )
    })
}

#[test]
fn nothing_is_answered_before_it_is_durable() {
    let mut world = World::with_peers(2);
    world.syncing = false;
    world.events(0);
    world.lock(0, Mode::Ex);
    world.lock(1, Mode::Ex);
    assert_eq!(world.unsynced.len(), 2);
    assert!(replies(world.events(0)).is_empty());
    world.sync();
    assert!(is_granted(&world.events(0)));
    assert!(matches!(replies(world.events(1))[..], [LockReply::Queued { .. }]));
}

#[test]
fn an_answer_that_was_lost_comes_with_the_next_connection_and_the_operation_takes_effect_once() {
    let mut world = World::with_peers(1);
    world.syncing = false;
    world.lock(0, Mode::Ex);
    world.peers[0].cut = true;
    world.drop_connection(0);
    world.sync();
    world.events(0);
    world.peers[0].cut = false;
    world.syncing = true;
    world.run(Duration::from_millis(300));
    let events = world.events(0);
    assert_eq!(events.iter().filter(|e| matches!(e, ClientEvent::Answer { .. })).count(), 1, "{events:?}");
    assert_eq!(world.table().view(identity(0).session).expect("open").locks.len(), 1);
}

#[test]
fn an_operation_that_was_lost_is_sent_again() {
    let mut world = World::with_peers(1);
    world.syncing = false;
    world.lock(0, Mode::Ex);
    world.restart_lockd();
    assert!(world.log.len() == 1, "only the session was durable");
    world.syncing = true;
    world.run(Duration::from_millis(300));
    assert!(is_granted(&world.events(0)));
    assert_eq!(world.table().view(identity(0).session).expect("open").locks.len(), 1);
}

#[test]
fn an_owner_resumes_after_what_it_asked_for_earlier_is_done() {
    let mut world = World::with_peers(1);
    world.lock(0, Mode::Ex);
    world.syncing = false;
    world.operate(0, LockOp::unlock(LockId(1), ValueChange::Keep));
    world.drop_connection(0);
    world.run(Duration::from_millis(1));
    assert_eq!(world.unsynced.len(), 1, "nothing was sent again");
    assert!(!world.peers[0].client.is_open());
    world.events(0);
    world.sync();
    // An owner without memory must not be told that it holds what it is about to lose.
    let events = world.events(0);
    assert!(
        matches!(
            &events[..],
            [ClientEvent::Opened { locks, .. }, ClientEvent::Answer { reply: LockReply::Done, .. }]
            if locks.is_empty()
        ),
        "{events:?}"
    );
}

#[test]
fn a_session_outlives_its_connections_and_lockd() {
    let mut world = World::with_peers(2);
    world.lock(0, Mode::Ex);
    world.lock(1, Mode::Ex);
    for _ in 0..5 {
        world.run(Duration::from_secs(1));
        world.drop_connection(0);
        world.run(Duration::from_secs(1));
        world.restart_lockd();
    }
    world.run(Duration::from_secs(10));
    assert_eq!(world.table().view(identity(0).session).expect("open").locks[0].term, Term(1));
    assert!(!is_granted(&world.events(1)));
    let lost = |event: &ClientEvent| matches!(event, ClientEvent::SessionLost { .. } | ClientEvent::Jeopardy);
    assert!(!world.events(0).iter().any(lost));
}

#[test]
fn who_stops_renewing_is_warned_then_loses_everything_to_the_next() {
    let mut world = World::with_peers(2);
    world.lock(0, Mode::Ex);
    world.lock(1, Mode::Ex);
    world.set_renewing(0, false);
    world.run(Duration::from_millis(LEASE_MS * 2 / 3 + 1));
    assert!(world.events(0).contains(&ClientEvent::Jeopardy));
    assert!(!is_granted(&world.events(1)));
    world.run(Duration::from_millis(LEASE_MS / 2));
    assert!(matches!(world.events(0)[..], [.., ClientEvent::SessionLost { .. }]));
    assert!(is_granted(&world.events(1)));
    assert_eq!(world.peers[0].client.next_deadline(), None);
}

#[test]
fn operations_do_not_renew_and_neither_do_reconnects() {
    let mut world = World::with_peers(1);
    world.set_renewing(0, false);
    for _ in 0..4 {
        world.run(Duration::from_millis(LEASE_MS / 4));
        world.lock(0, Mode::Cr);
        world.drop_connection(0);
    }
    world.run(Duration::from_millis(LEASE_MS / 10));
    assert!(world.peers[0].client.is_over());
}

#[test]
fn a_lost_session_can_be_followed_by_another() {
    let mut world = World::with_peers(1);
    world.lock(0, Mode::Ex);
    world.set_renewing(0, false);
    world.run(Duration::from_millis(LEASE_MS * 2));
    world.events(0);
    let mut out = Vec::new();
    world.peers[0].client.set_renewing(world.now, true, &mut out);
    world.peers[0].client.restart(world.now, identity(9), vec![], &mut out);
    world.carry_out(0, out);
    let lock = world.lock(0, Mode::Ex);
    let events = world.events(0);
    assert!(matches!(events[0], ClientEvent::Opened { resumed: false, .. }), "{events:?}");
    assert!(is_granted(&events));
    assert!(matches!(&events[1], ClientEvent::Answer { ticket, .. } if *ticket == lock));
}

#[test]
fn a_client_that_lockd_refuses_to_know_asks_now_and_then() {
    let (mut now, mut asked) = (Time(0), 0u8);
    let mut client = LockClient::new(config(), identity(0), Vec::new());
    let mut out = Vec::new();
    while now < Time(1_000_000) {
        if out.is_empty() {
            now = now.max(client.next_deadline().expect("it goes on trying"));
            client.step(now, ClientInput::Tick, &mut out);
        }
        if let Some(ClientOutput::Connect { attempt }) = out.pop() {
            asked += 1;
            client.step(now, ClientInput::Connected { attempt }, &mut out);
            let refused = Frame { id: RequestId(1), term: Term(0), message: refused("full") };
            client.step(now, ClientInput::Received { attempt, frame: refused }, &mut out);
            assert!(client.is_over());
            client.restart(now, identity(asked), Vec::new(), &mut out);
            out.retain(|output| matches!(output, ClientOutput::Connect { .. }));
        }
        assert!(asked < 20, "it spins");
    }
    assert!(asked > 3, "{asked}");
}

fn refused(reason: &str) -> FromLockd {
    FromLockd::Refused { reason: reason.to_owned() }
}

#[test]
fn a_restarted_owner_gets_back_what_it_holds_and_waits_for() {
    let mut world = World::with_peers(2);
    world.lock(1, Mode::Pw);
    world.lock(0, Mode::Cr);
    world.lock(0, Mode::Ex);
    world.lock(0, Mode::Pr);
    let last_event = world.peers[0].client.last_event();
    world.drop_connection(0);
    world.peers.remove(0);
    let again = world.add(LockClient::resume(config(), identity(0), last_event));
    let events = world.events(again);
    let ClientEvent::Opened { locks, queued, resumed: true } = &events[0] else { panic!("{events:?}") };
    assert_eq!((locks.len(), queued.len()), (1, 2));
    let lock = queued[1].lock;
    // Its operations are numbered on from those of the life before.
    world.operate(again, LockOp::Cancel { lock });
    let events = world.events(again);
    assert!(
        matches!(
            events[..],
            [
                ClientEvent::Answer { reply: LockReply::Done, .. },
                ClientEvent::Event(LockEvent::Cancelled { .. })
            ]
        ),
        "{events:?}"
    );
}

#[test]
fn a_closed_session_lets_go_at_once() {
    let mut world = World::with_peers(2);
    world.lock(0, Mode::Ex);
    world.lock(1, Mode::Ex);
    world.input(0, ClientInput::Close);
    assert!(matches!(world.events(0)[..], [.., ClientEvent::Closed]));
    assert!(is_granted(&world.events(1)));
}

#[test]
fn events_that_were_missed_come_once_and_in_order() {
    let mut world = World::with_peers(2);
    world.operate(0, LockOp::watch(Watched::Value("r".into())));
    world.lock(1, Mode::Pw);
    world.events(0);
    world.peers[0].cut = true;
    world.drop_connection(0);
    let lock = LockId(1);
    for n in 0..5u8 {
        let op = LockOp::write(lock, Mode::Pw, [n]);
        world.operate(1, op);
    }
    world.peers[0].cut = false;
    world.run(Duration::from_millis(300));
    world.drop_connection(0);
    world.run(Duration::from_millis(300));
    let written = world.events(0).into_iter().filter_map(|event| match event {
        ClientEvent::Event(LockEvent::Changed { value, .. }) => Some(value.bytes[0]),
        _ => None,
    });
    assert_eq!(written.collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
}

#[test]
fn seen_events_are_forgotten_by_renewals() {
    let mut world = World::with_peers(2);
    world.operate(0, LockOp::watch(Watched::Value("r".into())));
    world.lock(1, Mode::Pw);
    for n in 0..100u8 {
        let op = LockOp::write(LockId(1), Mode::Pw, [n]);
        world.operate(1, op);
    }
    world.run(Duration::from_secs(1));
    assert!(world.table().forgotten(identity(0).session).expect("open") >= EventNumber(100));
}

#[test]
fn more_operations_than_may_be_unanswered_take_turns() {
    let mut world = World::with_peers(1);
    world.syncing = false;
    let tickets: Vec<Ticket> = (0..300).map(|_| world.lock(0, Mode::Nl)).collect();
    assert!(world.unsynced.len() <= 64);
    world.drop_connection(0);
    world.syncing = true;
    world.sync();
    world.run(Duration::from_millis(1));
    let answered = world.events(0).into_iter().filter_map(|event| match event {
        ClientEvent::Answer { ticket, .. } => Some(ticket),
        _ => None,
    });
    assert_eq!(answered.collect::<Vec<_>>(), tickets);
}

#[test]
fn a_silent_lockd_is_left_for_another_connection_within_the_lease() {
    let mut world = World::with_peers(1);
    // Frozen: it takes connections in its backlog and says nothing.
    let frozen = world.lockd.take();
    world.run(Duration::from_millis(LEASE_MS));
    let events = world.events(0);
    assert!(events.contains(&ClientEvent::Disconnected), "{events:?}");
    assert!(events.contains(&ClientEvent::Jeopardy), "{events:?}");
    world.lockd = frozen;
    world.run(Duration::from_millis(LEASE_MS));
    assert!(world.peers[0].client.is_open());
    assert!(!world.events(0).iter().any(|event| matches!(event, ClientEvent::SessionLost { .. })));
}

#[test]
fn after_a_restart_terms_grow_on_and_every_lease_is_full() {
    let mut world = World::with_peers(2);
    world.lock(0, Mode::Ex);
    world.run(Duration::from_secs(1));
    world.set_renewing(0, false);
    world.run(Duration::from_millis(LEASE_MS / 2));
    world.restart_lockd();
    world.run(Duration::from_millis(LEASE_MS - 100));
    assert!(!world.peers[0].client.is_over());
    world.run(Duration::from_millis(200));
    assert!(world.peers[0].client.is_over());
    world.restart_lockd();
    world.run(Duration::from_millis(100));
    world.lock(1, Mode::Ex);
    assert!(is_granted(&world.events(1)));
    assert_eq!(world.table().term(), Term(2));
}

#[test]
fn giving_up_sets_the_value_as_told() {
    let mut world = World::with_peers(1);
    world.lock(0, Mode::Pw);
    let value = ValueChange::Write(b"gone".to_vec());
    world.operate(0, LockOp::unlock(LockId(1), value));
    world.operate(0, LockOp::watch(Watched::Value("r".into())));
    let events = world.events(0);
    let Some(ClientEvent::Answer { reply: LockReply::Value { value, vacant }, .. }) = events.last() else {
        panic!("{events:?}")
    };
    assert_eq!((value.bytes.as_slice(), value.valid, *vacant), (b"gone".as_slice(), true, true));
}

#[test]
fn every_change_of_watched_keys_is_told_once_and_in_order_over_any_number_of_connections() {
    let mut world = World::with_peers(2);
    world.operate(0, LockOp::watch(Watched::Prefix("k/".into())));
    world.operate(0, LockOp::Watch { what: Watched::Key("k/0".into()), once: true });
    for n in 0..40u8 {
        let (key, expect) = (format!("k/{}", n % 3), Expect::Any);
        world.operate(1, LockOp::Key(KeyOp::Put { key, value: vec![n], expect, ephemeral: n % 2 == 0 }));
        match n % 5 {
            0 => world.drop_connection(0),
            2 => world.run(Duration::from_millis(300)),
            4 => world.restart_lockd(),
            _ => {}
        }
    }
    world.input(1, ClientInput::Close);
    world.run(Duration::from_secs(1));
    let told = world.events(0).into_iter().filter_map(|event| match event {
        ClientEvent::Event(LockEvent::Key { revision, entry, .. }) => Some((revision.0, entry.is_some())),
        _ => None,
    });
    // Forty writes, then the ephemeral ones of the three go.
    let gone = 43 - [39u8, 38, 37].iter().filter(|n| *n % 2 == 1).count() as u64;
    let expected: Vec<_> =
        (1..=40).map(|revision| (revision, true)).chain((41..=gone).map(|r| (r, false))).collect();
    assert_eq!(told.collect::<Vec<_>>(), expected);
}

#[test]
fn a_persistent_lock_outlives_its_session_and_the_next_life_fences_the_last() {
    let mut world = World::with_peers(3);
    let owner = Owner { id: OwnerId([5; 16]), secret: Secret([6; 16]) };
    let (resource, mode, flags) = ("r".to_owned(), Mode::Pw, Flags::NONE);
    world.operate(0, LockOp::Lock { resource, mode, flags, owner: Some(owner) });
    world.lock(1, Mode::Pw);
    world.set_renewing(0, false);
    world.run(Duration::from_millis(LEASE_MS * 2));
    world.restart_lockd();
    world.run(Duration::from_secs(1));
    assert!(!is_granted(&world.events(1)), "nobody else is granted what is only orphaned");
    world.events(2);
    world.operate(2, LockOp::Adopt { lock: LockId(1), owner });
    let replies = replies(world.events(2));
    assert!(matches!(&replies[..], [LockReply::Granted { lock, .. }] if lock.term == Term(2)), "{replies:?}");
    world.operate(1, LockOp::Break { lock: LockId(1) });
    assert!(is_granted(&world.events(1)));
    let lost = |event: &ClientEvent| matches!(event, ClientEvent::Event(LockEvent::Lost { .. }));
    assert!(world.events(2).iter().any(lost));
}
