//! Operations of the shipped server under power loss: creating, adopting, renaming and deleting volumes and snapshots,
//! writing with copy-out, working off what deletes leave, checkpoints, takeovers, a full disk.
//!
//! One process of each sort (operator, writer, server) lives through a history on the simulated disk. After each of its
//! operations the power is lost, with subsets of the sectors, sizes and names that were not synced; from each disk that
//! this leaves, once, the next server takes over. Then
//! - every acknowledged write is there (law 1), every snapshot is what it was, sector by sector (law 3), and nothing but
//!   what the last servers promised (law 2);
//! - the request that was in hand is done, or not at all; sent again, it is done once;
//! - the offline verifier finds no damage, and no leftover but what was being made;
//! - with everything settled, the store's space is what live snapshots reach;
//! - recovery that is interrupted in its turn, anywhere, comes to the same.
//!
//! `CSNAP_CRASH_SEEDS=n` explores more histories; `CSNAP_CRASH_SEED=n` exactly one.

#[cfg(feature = "canary")]
mod canaries;
mod explore;
mod frozen;
mod history;
mod model;
#[path = "../seeds/mod.rs"]
mod seeds;
mod server;

use explore::{Options, Seen, explore};
use seeds::seeds;
use server::Broken;

/// States of creating and deleting volumes and snapshots that the default number of histories must come to.
const CREATE_AND_DELETE_MIN: u64 = 2000;

#[test]
fn no_crash_of_an_operation_breaks_a_promise() {
    let options = Options { broken: Broken::default(), states: 6, interrupted: 60 };
    let mut seen = Seen::default();
    let seeds = seeds(3);
    for seed in seeds.clone() {
        explore(seed, &options, &mut seen).unwrap_or_else(|violation| panic!("seed {seed}: {violation}"));
    }
    let histories = seeds.end - seeds.start;
    println!("{} distinct crash states of {histories} histories recovered: {:?}", seen.count(), seen.of_kind);
    let is_wanted = |kind: &str| ["volume", "snapshot", "reap"].iter().any(|word| kind.starts_with(word));
    let wanted: u64 = seen.of_kind.iter().filter(|(kind, _)| is_wanted(kind)).map(|(_, count)| count).sum();
    assert!(wanted >= CREATE_AND_DELETE_MIN || histories < 3, "only {wanted} of creates and deletes");
}

#[test]
fn the_same_seed_is_the_same_history() {
    let options = Options { broken: Broken::default(), states: 1, interrupted: u64::MAX };
    let states = |seed| {
        let mut seen = Seen::default();
        explore(seed, &options, &mut seen).unwrap_or_else(|violation| panic!("seed {seed}: {violation}"));
        seen
    };
    assert_eq!(states(1), states(1));
    assert_ne!(states(1), states(2));
}
