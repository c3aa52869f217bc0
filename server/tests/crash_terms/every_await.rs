//! One life, ended at every await in turn, with every disk (or a sample of them) that a power cut may leave there.

use std::collections::BTreeSet;

use csnap_proto::Term;
use csnap_storage::sim::executor::Task;
use csnap_storage::sim::{Fault, FaultError, OperationKind, Rng, SimNode};

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

/// A life in which the `nth` operation of a kind fails; `false` when there are not so many. What it leaves must recover.
fn life_with_failure(kind: OperationKind, error: FaultError, nth: u64, states: &mut BTreeSet<u64>) -> bool {
    let disk = new_pool(1);
    let shared = Shared { faults: true, ..Shared::default() };
    disk.set_stepped(true);
    let mut first = Task::new(live(disk.storage(SimNode(1)), shared.clone(), full_life()));
    assert!(first.run_operations(&disk, u64::MAX), "nothing is in its way");
    disk.fail(Fault { node: Some(SimNode(2)), ..Fault::once(kind, nth, error) });
    let mut second = Task::new(live(disk.storage(SimNode(2)), shared.clone(), full_life()));
    // It may end, or wait for space for ever.
    second.run_operations(&disk, u64::MAX);
    let ledger = shared.ledger.borrow();
    let what = format!("{kind:?} number {nth} fails with {error:?}");
    assert_eq!(ledger.violation, None, "{what}");
    for left in std::iter::once(disk.fork()).chain(disk.crash_states(8, nth)) {
        if states.insert(left.digest()) {
            recover(&left, &ledger, &shared.canaries, Term(10), 0, &mut Rng::new(nth))
                .unwrap_or_else(|violation| panic!("{what}: {violation}"));
        }
    }
    disk.faults_struck() > 0
}

#[test]
fn whichever_operation_fails_nothing_that_was_acknowledged_is_lost() {
    let kinds = [
        OperationKind::Open,
        OperationKind::Create,
        OperationKind::CreateDir,
        OperationKind::List,
        OperationKind::Link,
        OperationKind::Unlink,
        OperationKind::Read,
        OperationKind::Write,
        OperationKind::Sync,
        OperationKind::SyncDir,
    ];
    let (mut states, mut failures) = (BTreeSet::new(), 0);
    for kind in kinds {
        for error in [FaultError::Io, FaultError::NoSpace] {
            failures += (1..).take_while(|nth| life_with_failure(kind, error, *nth, &mut states)).count();
        }
    }
    println!("{failures} failing operations of one life, {} distinct states recovered", states.len());
    assert!(failures > 200, "{failures}");
}
