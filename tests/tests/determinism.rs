//! One seed is one world: run twice it gives the same digest and the same counts; another seed gives another world.

use csnap_tests::plan::Plan;
use csnap_tests::world::{Outcome, World};

fn world(seed: u64) -> Outcome {
    World::run(Plan { trace: true, ..Plan::of(seed) })
}

#[test]
fn the_same_seed_gives_the_same_world() {
    for seed in [3, 1001, 77_777] {
        let (first, second) = (world(seed), world(seed));
        let differs = first.trace.iter().zip(&second.trace).find(|(a, b)| a != b);
        assert_eq!(differs, None, "seed {seed}");
        assert_eq!(first.tally, second.tally, "seed {seed}");
        assert_eq!(first.digest, second.digest, "seed {seed}");
    }
}

#[test]
fn another_seed_gives_another_world() {
    assert_ne!(world(5).digest, world(6).digest);
}
