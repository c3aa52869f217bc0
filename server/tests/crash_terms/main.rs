//! Terms on the simulated disk: several of them racing, killed and frozen at any await, with the power cut at any moment and
//! any subset of what was not synced surviving.
//!
//! The law: what a term acknowledged (durable, then gate open) is in the state of every later term that serves, in the
//! order in which it was made; each term goes on from exactly what the one before it left; and whoever recovers can be
//! interrupted, again and again, and it still holds.
//!
//! `CSNAP_CRASH_SEEDS=n` explores more worlds; `CSNAP_CRASH_SEED=n` exactly one.
#![allow(clippy::cast_possible_truncation, reason = "small numbers of a test")]

#[cfg(feature = "canary")]
mod canaries;
mod damage;
mod every_await;
mod full;
mod ledger;
mod life;
mod pools;
#[path = "../seeds/mod.rs"]
mod seeds;
mod world;

use std::collections::{BTreeMap, BTreeSet};

use seeds::seeds;
use world::{Options, explore};

fn explore_all(options: &Options, default_seeds: u64) -> usize {
    let mut states = BTreeSet::new();
    let mut reached = BTreeMap::<&str, u64>::new();
    let seeds = seeds(default_seeds);
    for seed in seeds.clone() {
        let outcome = explore(seed, options).unwrap_or_else(|violation| panic!("seed {seed}: {violation}"));
        states.extend(outcome.states);
        for (what, times) in outcome.reached {
            *reached.entry(what).or_default() += times;
        }
    }
    println!(
        "{} distinct crash states of {} worlds recovered; reached: {reached:?}",
        states.len(),
        seeds.end - seeds.start
    );
    states.len()
}

#[test]
fn what_a_term_acknowledged_is_in_every_later_term() {
    let states = explore_all(&Options::default(), 16);
    assert!(states >= 10_000 || std::env::var_os("CSNAP_CRASH_SEED").is_some(), "only {states} states");
}

#[test]
fn failing_syncs_lose_nothing_that_was_acknowledged() {
    explore_all(&Options { faults: true, ..Options::default() }, 8);
}

#[test]
fn the_same_seed_is_the_same_world() {
    let digest = |seed| explore(seed, &Options::default()).expect("no violation").digest;
    assert_eq!(digest(3), digest(3));
    assert_ne!(digest(3), digest(4));
}
