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
        (Canary::NoWakeupAfterCancel, "could be granted"),
        (Canary::KeepValidityAtDeath, "should be valid"),
        (Canary::ReuseTermAfterDelete, "term"),
    ];
    for (canary, says) in grants {
        match search(|| Table::breaking(canary), &[Flags::NONE], 4) {
            Err(what) => {
                assert!(what.contains(says), "{canary:?}: {what}");
                println!("{canary:?}: {what}");
            }
            Ok(found) => panic!("{canary:?} was not noticed in {} states", found.states),
        }
    }
}
