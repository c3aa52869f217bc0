//! Each ordering of operations, broken on purpose: the exploration must notice.

use csnap_server::core::canary::{Broken, Canary};

use crate::explore::{Options, Seen, explore};

/// Histories within which a broken rule must show.
const SEEDS: u64 = 8;

/// The rules that power loss alone can show; the simulated world sees to the others.
const RULES: [Canary; 8] = [
    Canary::FreeBeforeRecord,
    Canary::RemoveBeforeRecord,
    Canary::LeaveHeadUnsynced,
    Canary::LeaveHeadUnnamed,
    Canary::LeaveRemovalUnsynced,
    Canary::LeaveArenaUnnamed,
    Canary::LeaveCopyUnsynced,
    Canary::SkipHeadSync,
];

fn first_violation(rule: Canary) -> Option<(u64, String)> {
    let options = Options { broken: Broken::rule(rule), states: 8, interrupted: u64::MAX };
    (0..SEEDS).find_map(|seed| {
        explore(seed, &options, &mut Seen::default()).err().map(|violation| (seed, violation))
    })
}

#[test]
fn every_broken_order_is_noticed() {
    let mut missed = Vec::new();
    for rule in RULES {
        match first_violation(rule) {
            Some((seed, violation)) => println!("{rule:?}: seed {seed}: {violation}"),
            None => missed.push(rule),
        }
    }
    assert!(missed.is_empty(), "not noticed within {SEEDS} histories: {missed:?}");
}
