//! Replicas in a simulated network, on simulated disks: what is committed stays, in one order, whatever dies.
//!
//! `CSNAP_REPLICA_SEEDS` worlds from `CSNAP_REPLICA_SEED_FIRST` on; a world that fails prints its seed.

mod alone;
mod canaries;
mod disk;
mod hostile;
mod judge;
mod net;
mod node;
mod operators;
mod plan;
mod replicated;
mod storm;
mod world;

use csnap_lockd::canary::Broken;
use plan::Plan;
use world::World;

/// Worlds of the test without a campaign: some seconds.
const SEEDS: u64 = 60;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number"))
}

#[test]
fn what_is_committed_stays_in_one_order_and_the_healed_group_goes_on() {
    let (count, first) = (number("CSNAP_REPLICA_SEEDS", SEEDS), number("CSNAP_REPLICA_SEED_FIRST", 1));
    let mut total = judge::Tally::default();
    for seed in first..first + count {
        match World::run(&Plan::draw(seed, Broken::NONE)) {
            Ok(tally) => total.add(&tally),
            Err(what) => panic!("seed {seed}: {what}"),
        }
    }
    println!("{count} worlds: {total}");
    if count >= SEEDS {
        total.check_rich();
    }
}

#[test]
fn a_seed_is_a_world() {
    for seed in [3, 4] {
        let run = || World::run(&Plan::draw(seed, Broken::NONE)).map(|tally| tally.to_string());
        assert_eq!(run(), run(), "seed {seed}");
    }
}
