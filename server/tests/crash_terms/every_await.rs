//! One life, ended at every await in turn, with every disk (or a sample of them) that a power cut may leave there.

use std::collections::BTreeSet;

use csnap_proto::Term;
use csnap_storage::sim::executor::Task;
use csnap_storage::sim::{Rng, SimNode};

use crate::life::{Plan, Shared, live};
use crate::world::{new_pool, recover};

/// A life that does everything once: batches that end segments, a checkpoint, another after it.
fn full_life() -> Plan {
    Plan { follows: 2, batches: vec![100, 9000, 9000, 9000, 9000, 9000, 50], checkpoints: vec![2, 5] }
}

#[test]
fn a_life_ended_at_any_await_leaves_a_pool_that_recovers_to_what_was_acknowledged() {
    let mut states = BTreeSet::new();
    let mut awaits = 0;
    for operations in 0.. {
        let disk = new_pool(1);
        disk.set_stepped(true);
        let shared = Shared::default();
        // A first term leaves something to take over; the second is ended.
        let mut first = Task::new(live(disk.storage(SimNode(1)), shared.clone(), full_life()));
        assert!(first.run_operations(&disk, u64::MAX), "nothing is in its way");
        let mut second = Task::new(live(disk.storage(SimNode(2)), shared.clone(), full_life()));
        let done = second.run_operations(&disk, operations);
        let ledger = shared.ledger.borrow();
        assert_eq!(ledger.violation, None);
        let mut rng = Rng::new(operations);
        for (index, left) in disk.crash_states(24, operations).enumerate() {
            if states.insert(left.digest()) {
                let again = if index % 8 == 0 { 5 } else { 0 };
                let recovered = recover(&left, &ledger, &shared.canaries, Term(10), again, &mut rng);
                recovered.unwrap_or_else(|violation| panic!("after {operations} operations: {violation}"));
            }
        }
        if done {
            awaits = operations;
            break;
        }
    }
    println!("{} distinct crash states at {awaits} awaits of one life recovered", states.len());
    assert!(awaits > 100 && states.len() > 1000, "{awaits} awaits, {} states", states.len());
}
