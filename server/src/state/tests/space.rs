//! Space: what is given out, what is held, what goes back to the file system.

use csnap_proto::ids::Term;
use csnap_proto::units::StoreExtent;

use super::world::{World, range};
use crate::state::{Attached, Record};

/// Bytes that the arenas take on disk.
fn backed_bytes(world: &World) -> u64 {
    world.state.space.arenas.values().map(|a| u64::from(a.taken() + a.idle()) * 4096).sum()
}

#[test]
fn places_are_whole_chunks_aligned_and_apart() {
    let mut world = World::new();
    let mut all: Vec<StoreExtent> = Vec::new();
    for (chunks, blocks) in [(3, 1), (5, 16), (1, 1024), (4096, 1), (9, 4), (2, 1024)] {
        for place in world.reserve(chunks, blocks) {
            assert_eq!((place.at.block % blocks, place.blocks % blocks), (0, 0));
            all.push(place);
        }
    }
    all.sort();
    assert!(
        all.windows(2).all(|w| w[0].at.arena < w[1].at.arena || w[0].at.block + w[0].blocks <= w[1].at.block)
    );
}

#[test]
fn one_run_is_preferred_to_many_holes() {
    let mut world = World::new();
    let first = world.reserve(64, 1);
    for hole in (0..64).step_by(2) {
        world.state.unreserve(StoreExtent { at: first[0].at.plus(hole), blocks: 1 });
    }
    assert_eq!(world.reserve(32, 1).len(), 1);
    assert_eq!(world.reserve(1, 1)[0].at.block, 0);
}

#[test]
fn a_second_arena_begins_when_the_first_is_full() {
    let mut world = World::new();
    for _ in 0..64 {
        world.reserve(4096, 1);
    }
    assert_eq!(world.state.space.arenas.len(), 1);
    assert_eq!(world.reserve(1, 1)[0].at.arena, 1);
}

#[test]
fn nothing_is_given_out_or_punched_in_an_older_arena_until_its_server_is_dead() {
    let mut world = World::with_volume(600, 4096);
    world.write(0, range(0, 600), 1);
    let epoch = world.snapshot(0);
    world.write(0, range(0, 600), 2);
    world.next_term();
    world.delete(0, epoch);
    while world.reap(100) {}
    world.release_batches();
    assert!(world.state.next_punch(10).is_none());
    assert_eq!(world.reserve(1, 1)[0].at.term, Term(2));
    let held = world.state.held();
    assert_eq!(held.bytes, 16 << 20);
    assert!(held.because[0].contains("server of term 1"), "{held:?}");
    world.record(Record::TermDead { term: Term(1) });
    assert_eq!(world.state.held().bytes, 0);
    assert_eq!(world.reserve(1, 1)[0].at.term, Term(1));
    assert!(world.state.is_term_dead(Term(1)) && !world.state.is_term_dead(Term(2)));
}

#[test]
fn space_waits_for_readers_that_may_know_it_and_for_nobody_else() {
    let mut world = World::with_volume(600, 4096);
    let other = world.create_volume(10, 4096);
    world.write(0, range(0, 600), 1);
    let (old, young) = (world.snapshot(0), world.snapshot(0));
    let elsewhere = world.snapshot(other);
    world.write(0, range(0, 600), 2);
    let (reader, second) = (world.open_reader(0, young), world.open_reader(0, old));
    let stranger = world.open_reader(other, elsewhere);
    let writer = super::world::session_id(999);
    world.open(writer, Attached::Writer(world.models[0].id));
    world.delete(0, old);
    world.delete(0, young);
    while world.reap(100) {}
    assert_eq!(world.state.confirmed_batches().count(), 0);
    assert_eq!(world.state.unconfirmed_frees(stranger).count(), 0);
    assert_eq!(world.state.unconfirmed_frees(writer).count(), 0);
    let batches: Vec<_> =
        world.state.unconfirmed_frees(reader).map(|(id, extents)| (id, extents.len())).collect();
    assert_eq!(batches.iter().map(|(_, extents)| extents).sum::<usize>(), 1, "neighbours are merged");
    let held = world.state.held();
    assert_eq!(held.bytes, 600 * 4096);
    assert!(held.because[0].contains("node n1 (pid 9)"), "{held:?}");
    world.confirm(reader);
    assert_eq!(world.state.confirmed_batches().count(), 0, "the other reader did not");
    let early = Record::BatchReusable { batch: batches[0].0 };
    assert!(world.state.clone().apply(&early).is_err());
    assert_eq!(world.state.unconfirmed_frees(reader).count(), 0);
    world.confirm(second);
    assert_eq!(world.state.confirmed_batches().count(), batches.len());
    world.release_batches();
    assert_eq!((world.state.held().bytes, world.state.used_bytes()), (0, 0));
}

#[test]
fn an_ended_session_is_not_waited_for() {
    let mut world = World::with_volume(10, 4096);
    world.write(0, range(0, 10), 1);
    let epoch = world.snapshot(0);
    world.write(0, range(0, 10), 2);
    let reader = world.open_reader(0, epoch);
    world.delete(0, epoch);
    while world.reap(100) {}
    assert_eq!(world.state.confirmed_batches().count(), 0);
    world.end(reader);
    assert_eq!(world.state.confirmed_batches().count(), 1);
}

#[test]
fn freed_space_goes_back_to_the_file_system_and_is_reserved_anew_before_it_is_used() {
    let mut world = World::with_volume(5000, 4096);
    world.write(0, range(0, 4096), 1);
    let epoch = world.snapshot(0);
    world.write(0, range(0, 4096), 2);
    let kept = world.snapshot(0);
    world.write(0, range(0, 16), 3);
    assert_eq!(backed_bytes(&world), 32 << 20);
    world.delete(0, epoch);
    while world.reap(1000) {}
    world.release_batches();
    while world.punch(7) {}
    assert_eq!(
        backed_bytes(&world),
        16 << 20,
        "the group that the youngest snapshot uses stays, reserved ahead"
    );
    let places = world.reserve(4096, 1);
    assert!(places.iter().all(|p| world.state.space.arenas[&(p.at.term, p.at.arena)].all(
        crate::state::arena::Mark::Backed,
        p.at.block,
        p.blocks,
        true
    )));
    places.into_iter().for_each(|place| world.state.unreserve(place));
    world.delete(0, kept);
    while world.reap(1000) {}
    world.release_batches();
    while world.punch(7) {}
    assert_eq!(backed_bytes(&world), 0, "an empty arena takes nothing");
}

#[test]
fn space_that_is_used_again_is_not_punched_while_it_is_filled() {
    let mut world = World::with_volume(5000, 4096);
    world.write(0, range(0, 4096), 1);
    let epoch = world.snapshot(0);
    world.write(0, range(0, 4096), 2);
    world.snapshot(0);
    world.write(0, range(0, 16), 3);
    world.delete(0, epoch);
    while world.reap(1000) {}
    world.release_batches();
    while world.punch(1000) {}
    world.write(0, range(16, 4080), 4);
    assert_eq!(backed_bytes(&world), 16 << 20, "what was reserved is used up");
    for first in (4096..4928).step_by(64) {
        world.write(0, range(first, 64), 5);
        assert_eq!(backed_bytes(&world), 32 << 20);
        assert!(!world.punch(1000), "after chunk {first}");
    }
}

#[test]
fn space_under_way_to_be_punched_is_not_given_out() {
    let mut world = World::with_volume(4096, 4096);
    world.write(0, range(0, 4096), 1);
    let epoch = world.snapshot(0);
    world.write(0, range(0, 4096), 2);
    world.delete(0, epoch);
    while world.reap(1000) {}
    world.release_batches();
    let punching = world.state.next_punch(10).expect("something to punch");
    assert!(world.state.next_punch(10).is_none());
    assert_ne!(world.reserve(1, 1)[0].at, punching[0].at);
}
