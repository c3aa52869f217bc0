//! Breaks of the rules by which lockspaces move: the matrix must notice each. Only with the cargo feature `canary`.

use csnap_lockd::core::spaces::canary::Canary;

use crate::cell::{Cell, PHASES, ROWS, SITUATIONS};

#[test]
fn every_broken_rule_is_noticed_by_the_matrix() {
    for (canary, name) in Canary::ALL {
        let noticed = first_failure(canary);
        let what = noticed.unwrap_or_else(|| panic!("{name} was not noticed in any cell"));
        println!("{name}: {what}");
    }
}

fn first_failure(canary: Canary) -> Option<String> {
    for (_, faults) in ROWS {
        for phase in PHASES {
            for situation in SITUATIONS {
                for fault in faults {
                    if let Err(what) = Cell::run("default", *fault, phase, situation, Some(canary)) {
                        return Some(format!("{fault:?} × {phase:?} × {situation:?}: {what}"));
                    }
                }
            }
        }
    }
    None
}
