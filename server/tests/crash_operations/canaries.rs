//! Each ordering of operations, broken on purpose: the exploration must notice.

use csnap_server::core::canary::{Broken as BrokenCore, Canary};
use csnap_server::term::canary::{Canaries, Canary as TermCanary};

use crate::explore::{Options, Seen, explore};
use crate::frozen::freeze_after;
use crate::server::Broken;

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
    let broken = Broken { core: BrokenCore::rule(rule), ..Broken::default() };
    let options = Options { broken, states: 8, interrupted: u64::MAX };
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

#[test]
fn a_frozen_server_that_breaks_a_rule_is_noticed() {
    for rule in [TermCanary::ActWithoutGate, TermCanary::GateBeforeSync] {
        let broken = Broken { term: Canaries::breaking([rule]), ..Broken::default() };
        let noticed = (0..).find_map(|operations| match freeze_after(operations, &broken) {
            Ok(true) => None,
            Ok(false) => Some(None),
            Err(violation) => Some(Some((operations, violation))),
        });
        let (operations, violation) = noticed.flatten().unwrap_or_else(|| panic!("{rule:?} was not noticed"));
        println!("{rule:?}: after {operations} operations: {violation}");
    }
}
