//! Random histories against the model.

use csnap_proto::ids::{Epoch, Term};
use csnap_proto::units::Chunk;
use proptest::prelude::*;

use super::world::{World, range};
use crate::state::Record;

/// Chunks of the test volumes: more than one page of bits.
const CHUNKS: u64 = 700;

#[derive(Clone, Debug)]
enum Step {
    Write { volume: usize, first: u64, count: u64, zeros: bool },
    Snapshot { volume: usize },
    Delete { volume: usize, nth: usize },
    Reap { budget: usize },
    Open { volume: usize, nth: usize },
    Learn { nth: usize },
    Confirm { nth: usize },
    End { nth: usize },
    Release,
    Punch { budget: usize },
    NextTerm,
    TermDead,
    LosePromises { chunks: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let volume = 0..2usize;
    let write = (volume.clone(), 0..CHUNKS, 1..60u64, prop::bool::weighted(0.2)).prop_map(
        |(volume, first, count, zeros)| Step::Write {
            volume,
            first,
            count: count.min(CHUNKS - first),
            zeros,
        },
    );
    // Most of the time the same few chunks, so that they get many versions.
    let hot = (volume.clone(), 500..520u64, 1..4u64).prop_map(|(volume, first, count)| Step::Write {
        volume,
        first,
        count,
        zeros: false,
    });
    prop_oneof![
        6 => write,
        8 => hot,
        6 => volume.clone().prop_map(|volume| Step::Snapshot { volume }),
        5 => (volume.clone(), 0..20usize).prop_map(|(volume, nth)| Step::Delete { volume, nth }),
        8 => (1..40usize).prop_map(|budget| Step::Reap { budget }),
        2 => (volume, 0..20usize).prop_map(|(volume, nth)| Step::Open { volume, nth }),
        3 => (0..8usize).prop_map(|nth| Step::Learn { nth }),
        3 => (0..8usize).prop_map(|nth| Step::Confirm { nth }),
        1 => (0..8usize).prop_map(|nth| Step::End { nth }),
        3 => Just(Step::Release),
        2 => (1..20usize).prop_map(|budget| Step::Punch { budget }),
        1 => Just(Step::NextTerm),
        1 => Just(Step::TermDead),
        1 => (1..50u64).prop_map(|chunks| Step::LosePromises { chunks }),
    ]
}

fn run(world: &mut World, step: &Step) {
    let reader = |world: &World, nth: usize| world.readers().get(nth).copied();
    match *step {
        Step::Write { volume, first, count, zeros } => {
            let content = if zeros { 0 } else { world.next() };
            world.write(volume, range(first, count), content);
        }
        Step::Snapshot { volume } => {
            world.snapshot(volume);
        }
        Step::Delete { volume, nth } => {
            if let Some(epoch) = world.nth(volume, nth) {
                world.delete(volume, epoch);
            }
        }
        Step::Reap { budget } => {
            world.reap(budget);
        }
        Step::Open { volume, nth } => {
            if let Some(epoch) = world.nth(volume, nth) {
                world.open_reader(volume, epoch);
            }
        }
        Step::Learn { nth } => reader(world, nth).into_iter().for_each(|session| world.learn(session)),
        Step::Confirm { nth } => reader(world, nth).into_iter().for_each(|session| world.confirm(session)),
        Step::End { nth } => reader(world, nth).into_iter().for_each(|session| world.end(session)),
        Step::Release => world.release_batches(),
        Step::Punch { budget } => {
            world.punch(budget);
        }
        Step::NextTerm => world.next_term(),
        Step::TermDead => {
            let oldest = (1..world.state.term().0).map(Term).find(|term| !world.state.is_term_dead(*term));
            oldest.into_iter().for_each(|term| world.record(Record::TermDead { term }));
        }
        // Places that nobody supersedes into: a failed copy-out whose server dies.
        Step::LosePromises { chunks } => drop(world.reserve(chunks, 1)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_snapshot_stays_what_it_was_and_nothing_leaks(steps in prop::collection::vec(step(), 1..160)) {
        let mut world = World::with_volume(CHUNKS, 4096);
        world.create_volume(CHUNKS, 16384);
        for (i, step) in steps.iter().enumerate() {
            run(&mut world, step);
            if i % 8 == 0 {
                world.check();
            }
        }
        world.check();
        world.check_recovery();
        world.next_term();
        world.wind_up();
        world.check_recovery();
    }

    #[test]
    fn deletes_in_any_order_and_number_lose_no_version(
        order in Just((0..12usize).collect::<Vec<_>>()).prop_shuffle(),
        slices in prop::collection::vec(0..4usize, 12),
        writes in prop::collection::vec(prop::collection::vec(0..6u64, 0..5), 12),
    ) {
        let mut world = World::with_volume(6, 4096);
        world.write(0, range(0, 6), 1000);
        let mut epochs: Vec<Epoch> = Vec::new();
        for chunks in &writes {
            epochs.push(world.snapshot(0));
            for &chunk in chunks {
                let content = world.next();
                world.write(0, range(chunk, 1), content);
            }
        }
        for (&nth, &slices) in order.iter().zip(&slices) {
            world.delete(0, epochs[nth]);
            for _ in 0..slices {
                world.reap(1);
            }
            world.check();
        }
        world.wind_up();
    }
}

#[test]
fn a_version_that_waits_to_be_reaped_is_never_found() {
    let mut world = World::with_volume(4, 4096);
    world.write(0, range(0, 4), 1);
    let first = world.snapshot(0);
    world.write(0, range(0, 1), 2);
    let second = world.snapshot(0);
    world.delete(0, first);
    // The head was born before `second`, yet the old version of `first` is still in the map.
    assert_eq!(world.state.volume(world.models[0].id).expect("lives").map.head_birth(Chunk(0)), second);
    world.check();
    while world.reap(1) {
        world.check();
    }
    assert_eq!(
        world.state.volume(world.models[0].id).expect("lives").map.head_birth(Chunk(0)),
        Epoch::BEFORE_ALL
    );
}
