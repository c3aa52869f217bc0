//! Each rule of terms, broken on purpose: the exploration must notice.

use csnap_server::term::canary::{Canaries, Canary};

use crate::damage::refuses_what_is_rotten;
use crate::world::{Options, explore};

/// Worlds within which a broken rule must show.
const SEEDS: u64 = 200;

fn first_violation(canary: Canary) -> Option<(u64, String)> {
    let canaries = Canaries::breaking([canary]);
    if canary == Canary::CorruptAsTorn {
        return refuses_what_is_rotten(&canaries).err().map(|violation| (0, violation));
    }
    let faults = canary == Canary::TrustTheCache;
    // Most of them show in what the living do; many worlds tell more than many power cuts.
    let options = Options { canaries, faults, power_cuts: 0.02 };
    (0..SEEDS).find_map(|seed| explore(seed, &options).err().map(|violation| (seed, violation)))
}

#[test]
fn every_broken_rule_is_noticed() {
    let mut missed = Vec::new();
    for (canary, name) in Canary::ALL {
        match first_violation(canary) {
            Some((seed, violation)) => println!("{name}: seed {seed}: {violation}"),
            None => missed.push(name),
        }
    }
    assert!(missed.is_empty(), "not noticed within {SEEDS} worlds: {missed:?}");
}
