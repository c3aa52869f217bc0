//! Worlds with one trouble each, named for what must hold in it.

use csnap_client::core::{Op, RequestError};
use csnap_proto::Name;
use csnap_proto::message::operate::{OperatorReply, OperatorRequest, RefusalKind};
use csnap_storage::sim::OperationKind;
use csnap_tests::plan::{Plan, Spot};
use csnap_tests::process::exporter::Stage;
use csnap_tests::sim::HostId;
use csnap_tests::tally::Tally;
use csnap_tests::world::{Deed, Guest, Trap, World};

const CHUNK: u64 = 4096;
const VOLUME: u64 = 64 * CHUNK;
const WRITE: Op = Op::Write { fua: false };
const SECOND: u64 = 1_000_000;

/// A guest that goes on writing the volume from this host.
fn writer(world: &mut World, host: usize) {
    let guest = world.add_guest(Guest::new(0, false, HostId(host)));
    world.wait("the guest writes", |world| world.attached(guest).is_some());
    world.pass(SECOND);
}

#[test]
fn frozen_reader_delays_nobody_and_returns_the_snapshot() {
    let mut world = World::calm(1);
    writer(&mut world, 0);
    let snapshot = world.snapshot(0);
    let reader = world.attach(1, 0, Some(snapshot));
    // Between message 2, which says that the chunks are on the origin, and message 3.
    world.stop_at(reader.exporter, OperationKind::Read, "head/");
    world.begin_io(reader, Op::Read, 0, VOLUME);
    world.wait("the reader reads the origin", |world| world.sim.is_paused(reader.exporter));
    let server = world.serving().expect("a server serves");
    world.kill_now(server);
    world.sim.longest_wait = 0;
    let before = world.sim.tally.count("requests");
    world.pass(5 * SECOND);
    let served = world.sim.tally.count("requests") - before;
    assert!(served > 500, "only {served} requests of the writer while the reader is frozen");
    assert!(world.sim.longest_wait < SECOND, "the writer waited {} us", world.sim.longest_wait);
    world.thaw_now(reader.exporter);
    world.wait("the reader has the snapshot", |world| world.held(reader).is_some_and(|a| a.depth() == 0));
    assert!(world.messages(reader, "QuerySnapshotRead") > 1, "it must have read again");
    world.finish();
}

#[test]
fn frozen_exporter_keeps_its_volume_until_it_is_reaped() {
    let mut world = World::calm(2);
    let first = world.attach(0, 0, None);
    world.io(first, WRITE, 0, VOLUME);
    world.stop_at(first.exporter, OperationKind::Write, "head/");
    world.begin_io(first, WRITE, 0, CHUNK);
    world.wait("a write is in hand", |world| world.sim.is_paused(first.exporter));
    // Far beyond its session's lease.
    world.pass(30 * SECOND);
    let second = world.begin_attach(1, 0, None);
    world.wait("the other is refused", |world| world.stage(second) == Some(Stage::Failed));
    let Some(RequestError::Refused(refusal)) = world.error(second) else {
        panic!("{:?}", world.error(second))
    };
    assert_eq!(refusal.kind, RefusalKind::Busy);
    assert!(refusal.reason.contains("n1"), "it names the holder: {}", refusal.reason);
    let name = Name::new("v0").expect("a name");
    let Ok(OperatorReply::Volume(shown)) = world.ask(2, OperatorRequest::VolumeShow { name }) else {
        panic!("the volume is shown");
    };
    assert!(matches!(&shown.attached[..], [holder] if !holder.present && holder.node.as_str() == "n1"));
    world.kill_now(first.exporter);
    world.wait("the dead is declared", |world| {
        world.sim.tally.states.contains_key("an exporter was declared dead")
    });
    world.pass(SECOND);
    let third = world.attach(1, 0, None);
    world.io(third, Op::Read, 0, VOLUME);
    world.io(third, Op::Release, 0, 0);
    world.finish();
}

/// Stops the server, with its agent, at an operation of its own; it goes on once another one serves. At the end it must be
/// gone. False if the trap did not spring.
fn freeze(seed: u64, spot: Spot, taking_over: bool, sum: &mut Tally) -> bool {
    let mut world = World::begun(Plan { storm: 0, ..Plan::calm(seed) });
    writer(&mut world, 2);
    world.snapshot(0);
    let server = world.serving().expect("a server serves");
    world.lay_trap(Trap { spot, taking_over, deed: Deed::Freeze(4 * SECOND) });
    if taking_over {
        world.kill_now(server);
    }
    world.pass(8 * SECOND);
    let sprung = world.has_sprung();
    if let (true, Some(frozen)) = (sprung, world.trapped()) {
        assert!(!world.sim.is_alive(frozen), "the frozen server must notice and end: {spot:?}");
    }
    sum.add(&world.finish().tally);
    sprung
}

#[test]
fn server_frozen_at_each_operation_of_its_service_changes_nothing_once_deposed() {
    let mut tally = Tally::default();
    for nth in 1..=60 {
        assert!(freeze(nth, Spot::Nth(nth), false, &mut tally), "operation {nth}");
    }
    for tried in ["a deposed server attempted an append", "a deposed server attempted an answer"] {
        assert!(tally.states.contains_key(tried), "in 60 worlds never: {tried}");
    }
}

#[test]
fn server_frozen_at_each_operation_of_its_takeover_does_not_serve_beside_its_successor() {
    let mut tally = Tally::default();
    let steps = (1..).take_while(|nth| freeze(100 + nth, Spot::Nth(*nth), true, &mut tally)).count();
    println!("a takeover was stopped at each of its {steps} operations");
    assert!(steps >= 20, "a takeover has more than {steps} operations");
    let deposed = tally.states.get("a server began to take over and found itself deposed");
    assert!(deposed.is_some_and(|times| *times >= 10), "{deposed:?} of {steps} found themselves deposed");
}

#[test]
fn known_chunks_cost_no_message_and_others_what_the_protocol_says() {
    let mut world = World::calm(3);
    let head = world.attach(0, 0, None);
    for round in 0..4 {
        world.io(head, WRITE, round * CHUNK, VOLUME - round * CHUNK);
        world.io(head, Op::Read, 0, VOLUME);
    }
    assert_eq!(world.messages(head, "QueryWrite"), 0, "no snapshot, no message");
    let snapshot = world.snapshot(0);
    world.io(head, WRITE, 8 * CHUNK, CHUNK);
    let first = (world.messages(head, "QueryWrite"), world.messages(head, "WriteOk"));
    assert_eq!(first, (1, 1), "the first write after a snapshot costs two");
    for _ in 0..50 {
        world.io(head, WRITE, 8 * CHUNK, CHUNK);
        world.io(head, Op::Read, 8 * CHUNK, CHUNK);
    }
    assert_eq!(world.messages(head, "QueryWrite"), 1, "a rewrite costs nothing");
    // Another server serves: what the client knows it still knows.
    let server = world.serving().expect("a server serves");
    world.kill_now(server);
    world.wait("another server serves", |world| world.serving().is_some_and(|new| new != server));
    world.pass(5 * SECOND);
    world.io(head, WRITE, 8 * CHUNK, CHUNK);
    assert_eq!(world.messages(head, "QueryWrite"), 1, "a rewrite after a failover costs nothing");
    let reader = world.attach(1, 0, Some(snapshot));
    let sum =
        |world: &World, names: &[&str]| names.iter().map(|name| world.messages(reader, name)).sum::<u64>();
    let all = [
        "QuerySnapshotRead",
        "SnapshotReadOk",
        "SnapshotReadOriginOk",
        "FinishSnapshotRead",
        "FinishSnapshotReadOk",
        "Retry",
    ];
    world.io(reader, Op::Read, 8 * CHUNK, CHUNK);
    assert_eq!(sum(&world, &all), 2, "a snapshot read from the store costs two");
    world.io(reader, Op::Read, 20 * CHUNK, CHUNK);
    assert_eq!(sum(&world, &all), 2 + 4, "one from the origin costs four");
    world.io(reader, Op::Release, 0, 0);
    world.io(head, Op::Release, 0, 0);
    world.finish();
}
