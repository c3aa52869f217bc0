//! The matrix: {client disconnects, source crashes, destination crashes, leader changes} × {before freeze, frozen, imported,
//! forwarded, activated} × {idle, queued waiter, converting, unlock in flight}, every cell in each way that it may go.

use crate::cell::{Cell, Fault, PHASES, ROWS, SITUATIONS};

/// A row: twenty cells.
fn row(at: usize) {
    let (name, faults) = ROWS[at];
    let (mut cells, mut ways, mut longest, mut shared, mut failed) = (0, 0, 0, 0, Vec::new());
    for (p, phase) in PHASES.into_iter().enumerate() {
        for (s, situation) in SITUATIONS.into_iter().enumerate() {
            cells += 1;
            for fault in faults {
                ways += 1;
                // The lockspace that every group has moves where nothing was ever in the other's.
                let space = if (p + s) % 2 == 0 { "default" } else { "work" };
                match Cell::run(space, *fault, phase, situation, None) {
                    Ok(passed) => {
                        longest = passed.frozen_micros.max(longest);
                        shared += passed.shared_writes;
                    }
                    Err(what) => failed.push(format!("{fault:?} × {phase:?} × {situation:?}: {what}")),
                }
            }
        }
    }
    println!(
        "{name}: {cells} cells in {ways} ways, served nowhere for {} ms at most; {shared} writes of several requests",
        longest / 1000
    );
    assert!(failed.is_empty(), "{} of {ways} failed:\n{}", failed.len(), failed.join("\n"));
    assert!(shared > 0, "several requests never became one write");
}

#[test]
fn a_client_that_disconnects_finds_everything_at_the_destination() {
    row(0);
}

#[test]
fn a_source_that_crashes_goes_on_with_the_move() {
    row(1);
}

#[test]
fn a_destination_that_crashes_is_waited_for() {
    row(2);
}

#[test]
fn a_new_leader_on_either_side_goes_on_with_the_move() {
    row(3);
}

#[test]
fn a_move_that_nothing_disturbs_takes_milliseconds() {
    let passed = Cell::run("default", Fault::ClientDisconnects, PHASES[4], SITUATIONS[0], None);
    let passed = passed.expect("it moves");
    println!("served nowhere for {} microseconds", passed.frozen_micros);
    assert!(passed.frozen_micros < 50_000, "{}", passed.frozen_micros);
}
