//! Costs stay flat, counted in work rather than time; `measured` prints times for docs.

use csnap_proto::ids::Epoch;
use csnap_proto::units::Chunk;

use super::world::{World, range};
use crate::state::Record;

/// Slices that reaping takes from here, each of at most `budget` versions.
fn slices(world: &mut World, budget: usize) -> usize {
    let mut slices = 0;
    while let Some(record) = world.state.next_reap(budget) {
        if let Record::Reaped { dead, .. } = &record {
            assert!(
                dead.iter().map(|run| run.range.count).sum::<u64>() <= budget as u64,
                "a slice keeps its budget"
            );
        }
        world.record(record);
        slices += 1;
    }
    slices
}

#[test]
fn deleting_costs_what_changed_not_how_much_there_is() {
    let mut world = World::with_volume(60_000, 4096);
    world.write(0, range(0, 60_000), 1);
    for batch in 0..15 {
        if batch == 0 {
            world.snapshot(0);
        }
        world.write(0, range(batch * 4000, 4000), 2);
    }
    let quiet = world.snapshot(0);
    world.write(0, range(7, 1), 3);
    let after = world.snapshot(0);
    world.delete(0, quiet);
    // One chunk changed between the two: one slice takes it, one says that it was the last, one closes the batch.
    assert_eq!(slices(&mut world, 64), 3);
    world.delete(0, after);
    assert_eq!(slices(&mut world, 64), 1);
}

#[test]
fn a_slice_that_finds_nothing_ends_too_and_the_next_goes_on_where_it_stopped() {
    const PAGES: u64 = 600;
    let mut world = World::with_volume(PAGES * 512, 4096);
    let id = world.models[0].id;
    for _ in 0..2 {
        world.snapshot(0);
    }
    for page in 0..PAGES {
        world.write(0, range(page * 512, 1), 1);
    }
    // The older snapshot keeps everything that the younger one had.
    world.delete(0, Epoch(2));
    for _ in 0..2 {
        let Some(Record::Reaped { dead, .. }) = world.state.next_reap(10) else { panic!("a slice") };
        assert!(dead.is_empty());
        world.reap(10);
    }
    assert_eq!(world.state.next_reap(10), Some(Record::SnapshotReaped { volume: id, snapshot: Epoch(2) }));
    world.delete(0, Epoch(1));
    world.wind_up();
}

#[test]
fn ten_thousand_snapshots_deleted_together_are_looked_at_once_each() {
    let mut world = World::with_volume(64, 4096);
    world.write(0, range(0, 64), 1);
    let epochs: Vec<Epoch> = (0..10_000)
        .map(|i| {
            let epoch = world.snapshot(0);
            world.write(0, range(i % 64, 1), i + 2);
            epoch
        })
        .collect();
    world.models[0].snapshots.clear();
    for &epoch in epochs.iter().rev() {
        let volume = world.models[0].id;
        world.record(Record::SnapshotDelete { volume, epoch });
    }
    let slices = slices(&mut world, 1000);
    assert!(slices <= 20_000 + 10, "{slices} slices");
    assert_eq!(world.state.used_bytes(), 0);
    world.state.check().expect("good");
}

#[test]
fn a_clone_is_not_changed_by_what_follows() {
    let mut world = World::with_volume(2000, 4096);
    world.write(0, range(0, 2000), 1);
    world.snapshot(0);
    world.write(0, range(0, 1000), 2);
    let (clone, before) = (world.state.clone(), world.state.digest());
    world.snapshot(0);
    world.write(0, range(500, 1500), 3);
    while world.reap(100) {}
    assert_eq!(clone.digest(), before);
    clone.check().expect("good");
}

/// `cargo test --release -p csnap-server measured -- --ignored --nocapture`
#[test]
#[ignore = "prints times, proves nothing"]
#[allow(clippy::disallowed_methods, reason = "it measures real time")]
fn measured() {
    use std::time::Instant;
    for snapshots in [0u64, 100, 5_000, 10_000] {
        let mut world = World::with_volume(262_144, 4096);
        for at in (0..262_144).step_by(4096) {
            world.write(0, range(at, 4096), 1);
        }
        for i in 0..snapshots {
            world.snapshot(0);
            world.models[0].snapshots.clear();
            world.write(0, range(i * 131 % 262_000, 16), i + 2);
        }
        let per = |what: &str, count: u32, run: &mut dyn FnMut(u32)| {
            let start = Instant::now();
            (0..count).for_each(&mut *run);
            println!(
                "{snapshots:>6} snapshots: {what:<28} {:>9} ns",
                start.elapsed().as_nanos() / u128::from(count)
            );
        };
        let id = world.models[0].id;
        let state = &mut world.state;
        per("head_runs of 1", 100_000, &mut |i| {
            drop(state.head_runs(id, range(u64::from(i) * 37 % 262_144, 1)))
        });
        per("unique_page", 100_000, &mut |i| drop(state.unique_page(id, u64::from(i) % 512)));
        per("locate 1 in the youngest", 100_000, &mut |i| {
            drop(state.locate(id, Epoch(snapshots.max(1)), range(u64::from(i) * 37 % 262_144, 1)));
        });
        per("locate 1 in the oldest", 100_000, &mut |i| {
            drop(state.locate(id, Epoch(1), range(u64::from(i) * 37 % 262_144, 1)));
        });
        per("clone", 100, &mut |_| drop(state.clone()));
        per("snapshot", 10, &mut |_| {
            world.snapshot(0);
            world.models[0].snapshots.clear();
        });
        per("first write of 1", 10_000, &mut |i| world.write(0, range(u64::from(i) * 26, 1), 9));
        let kept = world.state.clone();
        per("first write after a clone", 1_000, &mut |i| world.write(0, range(u64::from(i) * 26 + 1, 1), 9));
        per("checkpoint", 1, &mut |_| kept.checkpoint().for_each(drop));
        per("head birth", 100_000, &mut |i| {
            let volume = world.state.volume(id).expect("lives");
            std::hint::black_box(volume.map.head_birth(Chunk(u64::from(i))));
        });
    }
}
