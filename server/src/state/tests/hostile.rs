//! Damaged bytes are refused or survived, never a panic.

use proptest::prelude::*;

use super::world::{World, name, range};
use crate::state::{Loader, Record, State};

/// A world with something of everything in it.
fn rich() -> World {
    let mut world = World::with_volume(700, 4096);
    world.create_volume(100, 65536);
    world.write(0, range(0, 700), 1);
    world.write(1, range(0, 100), 1);
    for i in 0..6 {
        let epoch = world.snapshot(0);
        world.snapshot(1);
        let session = world.open_reader(0, epoch);
        world.write(0, range(i * 90, 120), i + 2);
        world.write(1, range(i * 10, 20), i + 2);
        world.learn(session);
    }
    for nth in [4, 1] {
        let epoch = world.nth(0, nth).expect("lives");
        world.delete(0, epoch);
        for _ in 0..4 {
            world.reap(50);
        }
    }
    world.next_term();
    world.write(1, range(40, 30), 99);
    world
}

/// Uses a state in every way; whatever comes, it must not panic.
fn exercise(mut state: State) {
    let _ = state.check();
    let volumes: Vec<_> = state.volumes.keys().copied().collect();
    for volume in volumes {
        let epochs: Vec<_> = state.snapshots(volume).map(|s| s.epoch).collect();
        for epoch in epochs {
            let _ = (state.locate(volume, epoch, range(0, 800)), state.own_bytes(volume, epoch));
        }
        let _ = (state.head_runs(volume, range(0, 800)), state.unique_page(volume, 0));
    }
    let _ = (state.held(), state.used_bytes(), state.digest(), state.reserve(10, 4));
    for _ in 0..20 {
        let Some(record) = state.next_reap(100) else { break };
        if state.apply(&record).is_err() {
            return;
        }
    }
    let _ = state.next_punch(10);
}

fn load(pieces: &[Vec<u8>]) -> Option<State> {
    let mut loader = Loader::new();
    for piece in pieces {
        loader.push(piece).ok()?;
    }
    loader.finish().ok()
}

/// A checkpoint's rows in one piece, changed by `change`, with a digest that fits.
fn forge(pieces: &[Vec<u8>], change: impl FnOnce(&mut Vec<u8>)) -> Vec<Vec<u8>> {
    let mut rows = pieces.concat();
    let end = rows.split_off(rows.len() - 33);
    change(&mut rows);
    let digest = blake3::hash(&rows);
    rows.push(end[0]);
    rows.extend_from_slice(digest.as_bytes());
    vec![rows]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_forged_checkpoint_never_panics(at in any::<prop::sample::Index>(), bytes in prop::collection::vec(any::<u8>(), 1..6)) {
        thread_local!(static PIECES: Vec<Vec<u8>> = rich().state.checkpoint().collect());
        let forged = PIECES.with(|pieces| forge(pieces, |rows| {
            for (i, byte) in bytes.iter().enumerate() {
                let at = (at.index(rows.len()) + i) % rows.len();
                rows[at] = *byte;
            }
        }));
        if let Some(state) = load(&forged) {
            exercise(state);
        }
    }

    #[test]
    fn a_damaged_batch_never_panics(
        nth in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        bytes in prop::collection::vec(any::<u8>(), 1..4),
    ) {
        thread_local!(static WORLD: World = rich());
        WORLD.with(|world| {
            let nth = nth.index(world.journal.len());
            let mut batch = world.journal[nth].encode_onto(Vec::new());
            for (i, byte) in bytes.iter().enumerate() {
                let at = (at.index(batch.len()) + i) % batch.len();
                batch[at] = *byte;
            }
            let Ok(records) = Record::decode_batch(&batch) else { return };
            // Once where it belongs, or nearly, and once at the end.
            let mut early = State::new(super::world::POOL);
            world.journal[..nth].iter().for_each(|record| early.apply(record).expect("applied before"));
            for mut state in [early, world.state.clone()] {
                if records.iter().all(|record| state.apply(record).is_ok()) {
                    exercise(state);
                }
            }
        });
    }

    #[test]
    fn noise_is_no_checkpoint_and_no_batch(noise in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(load(std::slice::from_ref(&noise)).is_none());
        if let Ok(records) = Record::decode_batch(&noise) {
            let mut state = State::new(super::world::POOL);
            let _ = records.iter().try_for_each(|record| state.apply(record));
        }
    }
}

#[test]
fn a_changed_byte_of_a_checkpoint_is_noticed() {
    let pieces: Vec<Vec<u8>> = rich().state.checkpoint().collect();
    for at in (0..pieces[0].len()).step_by(97) {
        let mut changed = pieces.clone();
        changed[0][at] ^= 0x10;
        assert!(load(&changed).is_none(), "byte {at}");
    }
    assert!(load(&pieces[..0]).is_none() && load(&pieces).is_some());
}

#[test]
fn a_checkpoint_that_was_cut_off_is_noticed() {
    let pieces: Vec<Vec<u8>> = rich().state.checkpoint().collect();
    let whole = pieces.concat();
    for len in (0..whole.len()).step_by(101) {
        assert!(load(&[whole[..len].to_vec()]).is_none(), "{len} bytes");
    }
}

#[test]
fn records_that_do_not_fit_are_refused() {
    use csnap_proto::ids::{Epoch, FreeBatchId, Term, VolumeId};
    let world = rich();
    let volume = world.models[0].id;
    let live = world.nth(0, 0).expect("lives");
    let next = crate::state::ReapCursor { epoch: live.next(), page: 0 };
    let dead = vec![crate::state::DeadRun { range: range(0, 1), birth: Epoch(0) }];
    let run = crate::state::SupersededRun {
        range: range(699, 2),
        old_birth: Epoch(0),
        place: crate::state::Kept::Zero,
    };
    let bad = [
        Record::TermBegin { term: Term(1), node: name("n1") },
        Record::TermDead { term: Term(2) },
        Record::VolumePublish { volume },
        Record::VolumeDelete { volume },
        Record::HeadRemoved { volume },
        Record::SnapshotDelete { volume, epoch: Epoch(999) },
        Record::Superseded { volume, birth: Epoch(1), runs: vec![run] },
        Record::Superseded { volume, birth: Epoch(7), runs: vec![run] },
        Record::Superseded { volume: VolumeId(3), birth: Epoch(7), runs: vec![run] },
        Record::Reaped { volume, snapshot: live, dead, next, batch: FreeBatchId(1) },
        Record::SnapshotReaped { volume, snapshot: live },
        Record::FreeBatchSealed { batch: FreeBatchId(77) },
        Record::BatchReusable { batch: FreeBatchId(77) },
    ];
    for record in bad {
        assert!(world.state.clone().apply(&record).is_err(), "{record:?}");
    }
}
