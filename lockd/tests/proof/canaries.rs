//! Breaks of the table's rules: the proof must turn red for each. Only with the cargo feature `canary`.

use csnap_lockd::core::canary::Canary;
use csnap_lockd::core::table::Table;
use csnap_proto::message::lock::Flags;

use super::random;
use super::search::search;

/// Random operations within which the model notices each.
const OPERATIONS: u64 = 60_000;

#[test]
fn every_broken_rule_is_noticed_by_the_model() {
    for (canary, name) in Canary::ALL {
        let caught = std::panic::catch_unwind(|| random::run(OPERATIONS, 1, || Table::breaking(canary)));
        assert!(caught.is_err(), "{name} was not noticed in {OPERATIONS} operations");
        println!("{name}: noticed by the model");
    }
}

#[test]
fn broken_rules_of_granting_are_noticed_by_the_search() {
    let grants = [
        (Canary::PassTheConvertQueue, None),
        (Canary::NoWakeupAfterCancel, Some("could be granted")),
        (Canary::KeepValidityAtDeath, Some("should be valid")),
        (Canary::ReuseTermAfterDelete, Some("term")),
    ];
    for (canary, says) in grants {
        let found = search(|| Table::breaking(canary), &[Flags::NONE], 4);
        match (found, says) {
            (Err(what), Some(says)) => {
                assert!(what.contains(says), "{canary:?}: {what}");
                println!("{canary:?}: {what}");
            }
            // Nobody is granted beside another, only before: a matter of order, which the model keeps.
            (Ok(_), None) => {}
            (found, _) => {
                panic!("{canary:?}: {}", found.map_or_else(|what| what, |found| found.states.to_string()))
            }
        }
    }
}
