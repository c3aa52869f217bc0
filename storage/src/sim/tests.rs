//! The fault model, held to its word.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::executor::{Task, run};
use super::*;
use crate::{Access, BLOCK_BYTES, Storage};

const NODE: SimNode = SimNode(1);

fn block(byte: u8) -> Bytes {
    vec![byte; BLOCK_BYTES].into()
}

/// A disk with a durable file `f` of one block of `byte`.
fn disk_with_file(byte: u8) -> SimDisk {
    let disk = SimDisk::new(1);
    disk.put_file("f", &block(byte)).unwrap();
    disk
}

fn write(disk: &SimDisk, path: &str, offset: u64, data: Bytes) {
    let storage = disk.storage(NODE);
    run(async {
        let file = storage.open(path, Access::ReadWrite).await?;
        storage.write(&file, offset, data).await
    })
    .unwrap();
}

fn sync(disk: &SimDisk, path: &str) -> crate::Result<()> {
    let storage = disk.storage(NODE);
    run(async {
        let file = storage.open(path, Access::ReadWrite).await?;
        storage.sync(&file).await
    })
}

/// The first byte of each sector of each state that a power loss may leave.
fn sector_patterns(disk: &SimDisk, path: &str) -> BTreeSet<Vec<u8>> {
    disk.crash_states(ENUMERATE_MAX, 1)
        .map(|state| {
            state.peek(path).unwrap().chunks(SECTOR_BYTES).map(|sector| sector[0]).collect::<Vec<u8>>()
        })
        .collect()
}

#[test]
fn unsynced_sectors_survive_in_every_subset() {
    let disk = disk_with_file(1);
    write(&disk, "f", 0, block(2));
    let patterns = sector_patterns(&disk, "f");
    assert_eq!(patterns.len(), 1 << (BLOCK_BYTES / SECTOR_BYTES));
    assert!(patterns.iter().flatten().all(|byte| [1, 2].contains(byte)));
}

#[test]
fn synced_content_survives_every_power_loss() {
    let disk = disk_with_file(1);
    write(&disk, "f", 0, block(2));
    sync(&disk, "f").unwrap();
    let states: Vec<_> = disk.crash_states(100, 1).collect();
    assert_eq!(states.len(), 1);
    assert_eq!(states[0].peek("f").unwrap(), block(2));
    for seed in 0..50 {
        let disk = disk.fork();
        disk.power_loss(seed);
        assert_eq!(disk.peek("f").unwrap(), block(2));
    }
}

#[test]
fn of_several_unsynced_contents_any_may_survive() {
    let disk = disk_with_file(1);
    write(&disk, "f", 0, block(2));
    write(&disk, "f", 0, block(3));
    let seen: BTreeSet<u8> = disk.crash_states(500, 9).map(|state| state.peek("f").unwrap()[0]).collect();
    assert_eq!(seen, BTreeSet::from([1, 2, 3]));
}

#[test]
fn writing_what_is_there_adds_no_states() {
    let disk = disk_with_file(0);
    write(&disk, "f", 0, block(0));
    assert_eq!(disk.crash_states(100, 1).count(), 1);
}

#[test]
fn a_name_needs_its_own_sync() {
    let disk = SimDisk::new(1);
    let storage = disk.storage(NODE);
    run(async {
        let file = storage.create("f").await?;
        storage.write(&file, 0, block(1)).await?;
        storage.sync(&file).await
    })
    .unwrap();
    let found: BTreeSet<Option<Bytes>> = disk.crash_states(100, 1).map(|state| state.peek("f")).collect();
    assert_eq!(found, BTreeSet::from([None, Some(block(1))]));

    run(storage.sync_dir("")).unwrap();
    assert_eq!(disk.crash_states(100, 1).map(|state| state.peek("f")).collect::<Vec<_>>(), [Some(block(1))]);
}

#[test]
fn a_synced_name_may_stand_for_an_empty_file() {
    let disk = SimDisk::new(1);
    let storage = disk.storage(NODE);
    run(async {
        let file = storage.create("f").await?;
        storage.write(&file, 0, block(1)).await?;
        storage.sync_dir("").await
    })
    .unwrap();
    let sizes: BTreeSet<usize> =
        disk.crash_states(2000, 1).map(|state| state.peek("f").unwrap().len()).collect();
    assert_eq!(sizes, BTreeSet::from([0, BLOCK_BYTES]));
}

#[test]
fn a_rename_in_a_directory_is_whole_or_not_at_all() {
    let disk = SimDisk::new(1);
    disk.put_file("old", &block(1)).unwrap();
    disk.put_file("new", &block(2)).unwrap();
    run(disk.storage(NODE).rename("new", "old")).unwrap();
    let found: BTreeSet<_> =
        disk.crash_states(100, 1).map(|state| (state.peek("old"), state.peek("new"))).collect();
    assert_eq!(found, BTreeSet::from([(Some(block(1)), Some(block(2))), (Some(block(2)), None)]));
}

#[test]
fn unlinked_names_come_back_until_the_directory_is_synced() {
    let disk = disk_with_file(1);
    let storage = disk.storage(NODE);
    run(storage.unlink("f")).unwrap();
    let found: BTreeSet<_> = disk.crash_states(100, 1).map(|state| state.peek("f")).collect();
    assert_eq!(found, BTreeSet::from([None, Some(block(1))]));
    run(storage.sync_dir("")).unwrap();
    assert!(disk.crash_states(100, 1).all(|state| state.peek("f").is_none()));
}

#[test]
fn punched_content_may_come_back() {
    let disk = disk_with_file(1);
    let storage = disk.storage(NODE);
    run(async {
        let file = storage.open("f", Access::ReadWrite).await?;
        storage.punch(&file, 0, BLOCK_BYTES as u64).await
    })
    .unwrap();
    assert_eq!(disk.peek("f").unwrap(), block(0));
    assert!(sector_patterns(&disk, "f").contains(&vec![1; 8]));
}

#[test]
fn a_sync_covers_only_what_was_complete_when_asked_for() {
    let disk = disk_with_file(1);
    let storage = disk.storage(NODE);
    let file = run(storage.open("f", Access::ReadWrite)).unwrap();
    disk.set_stepped(true);
    let mut sync = Task::new(storage.sync(&file));
    let mut write = Task::new(storage.write(&file, 0, block(2)));
    assert!(!sync.poll() && !write.poll());
    let [sync_id, write_id] = [0, 1].map(|index| disk.pending()[index].id);
    assert!(disk.complete(write_id) && disk.complete(sync_id));
    assert!(sync.poll() && write.poll());
    assert!(sector_patterns(&disk, "f").contains(&vec![1; 8]));
}

#[test]
fn a_killed_node_leaves_any_part_of_its_write_and_frees_its_lock() {
    let mut patterns = BTreeSet::new();
    for seed in 0..200 {
        let disk = SimDisk::new(seed);
        disk.put_file("f", &block(1)).unwrap();
        let storage = disk.storage(NODE);
        let file = run(storage.open("f", Access::ReadWrite)).unwrap();
        assert!(run(storage.try_lock(&file)).unwrap());
        disk.set_stepped(true);
        let mut task = Task::new(storage.write(&file, 0, block(2)));
        assert!(!task.poll());
        disk.crash_node(NODE);
        assert!(disk.pending().is_empty());
        assert!(!task.poll(), "a dead node's future completed");
        disk.set_stepped(false);
        let other = disk.storage(SimNode(2));
        let again = run(other.open("f", Access::ReadWrite)).unwrap();
        assert!(run(other.try_lock(&again)).unwrap());
        patterns.insert(disk.peek("f").unwrap().chunks(SECTOR_BYTES).map(|s| s[0]).collect::<Vec<u8>>());
        drop(task);
    }
    assert!(patterns.len() > 100, "{} patterns", patterns.len());
}

#[test]
fn a_dropped_future_does_not_stop_its_operation() {
    let disk = disk_with_file(1);
    let storage = disk.storage(NODE);
    let file = run(storage.open("f", Access::ReadWrite)).unwrap();
    disk.set_stepped(true);
    let mut task = Task::new(storage.write(&file, 0, block(2)));
    task.poll();
    drop(task);
    assert!(disk.complete_oldest().is_some());
    assert_eq!(disk.peek("f").unwrap(), block(2));
}

#[test]
fn a_failed_sync_is_never_made_good_by_a_later_one() {
    let mut kept = BTreeSet::new();
    for seed in 0..20 {
        let disk = SimDisk::new(seed);
        disk.put_file("f", &block(1)).unwrap();
        write(&disk, "f", 0, block(2));
        disk.fail(Fault::once(OperationKind::Sync, 1, FaultError::Io));
        assert!(matches!(sync(&disk, "f"), Err(StorageError::Io { errno: 5, .. })));
        kept.insert(disk.peek("f").unwrap()[0]);
        sync(&disk, "f").unwrap();
        assert!(sector_patterns(&disk, "f").contains(&vec![1; 8]));
        // Written anew, it is saved.
        write(&disk, "f", 0, block(2));
        sync(&disk, "f").unwrap();
        assert_eq!(sector_patterns(&disk, "f"), BTreeSet::from([vec![2; 8]]));
    }
    assert_eq!(kept, BTreeSet::from([1, 2]), "both kinds of failed sync occur");
}

#[test]
fn faults_strike_the_operation_that_they_name() {
    let disk = disk_with_file(1);
    let storage = disk.storage(NODE);
    let file = run(storage.open("f", Access::ReadWrite)).unwrap();
    disk.fail(Fault::once(OperationKind::Write, 3, FaultError::NoSpace));
    let write = |at: u64| run(storage.write(&file, at * BLOCK_BYTES as u64, block(2)));
    let results: Vec<bool> = (0..4).map(|at| write(at).is_ok()).collect();
    assert_eq!(results, [true, true, false, true]);
    disk.fail(Fault { persistent: true, ..Fault::once(OperationKind::Read, 2, FaultError::Io) });
    let results: Vec<bool> = (0..4).map(|_| run(storage.read(&file, 0, 1)).is_ok()).collect();
    assert_eq!(results, [true, false, false, false]);
    assert_eq!(disk.faults_struck(), 4);
}

#[test]
fn a_full_disk_refuses_and_unlinking_makes_room() {
    let disk = SimDisk::new(1);
    disk.set_capacity(Some(4 * BLOCK_BYTES as u64));
    let storage = disk.storage(NODE);
    run(async {
        let file = storage.create("f").await?;
        storage.reserve(&file, 0, 3 * BLOCK_BYTES as u64).await?;
        let other = storage.create("g").await?;
        storage.write(&other, 0, block(1)).await?;
        let full = storage.write(&other, BLOCK_BYTES as u64, block(1)).await;
        assert!(matches!(full, Err(StorageError::NoSpace { .. })));
        // Reserved space takes writes on a full disk.
        storage.write(&file, 0, block(1)).await?;
        assert_eq!(storage.free_bytes().await?, 0);
        drop(file);
        storage.unlink("f").await?;
        storage.sync_dir("").await?;
        storage.write(&other, BLOCK_BYTES as u64, block(1)).await
    })
    .unwrap();
}

#[test]
fn crash_states_are_distinct_and_repeatable() {
    let disk = disk_with_file(1);
    let storage = disk.storage(NODE);
    write(&disk, "f", 0, vec![2; 64 * BLOCK_BYTES].into());
    drop(run(storage.create("g")).unwrap());
    let digests = |seed| disk.crash_states(1000, seed).map(|state| state.digest()).collect::<Vec<_>>();
    let first = digests(5);
    assert_eq!(first.len(), 1000);
    assert_eq!(first.iter().collect::<BTreeSet<_>>().len(), 1000);
    assert_eq!(first, digests(5));
    assert_ne!(first, digests(6));
}

#[test]
fn same_seed_same_digest() {
    let world = |seed| {
        let disk = SimDisk::new(seed);
        let mut rng = Rng::new(seed);
        let storages = [disk.storage(SimNode(1)), disk.storage(SimNode(2))];
        disk.set_stepped(true);
        for round in 0..20u8 {
            let mut tasks: Vec<_> = storages
                .iter()
                .enumerate()
                .map(|(index, storage)| {
                    let path = format!("f{index}-{round}");
                    Task::new(async move {
                        let file = storage.create(&path).await?;
                        storage.write(&file, 0, block(round + 1)).await?;
                        storage.sync(&file).await
                    })
                })
                .collect();
            while tasks.iter_mut().filter_map(|task| (!task.poll()).then_some(())).count() > 0 {
                disk.complete_next(&mut rng);
            }
        }
        disk.power_loss(rng.next_u64());
        disk.digest()
    };
    assert_eq!(world(3), world(3));
    assert_ne!(world(3), world(4));
}

#[test]
fn every_stop_of_a_procedure_can_be_tried() {
    let stops = 0..;
    let mut finished_after = None;
    for operations in stops {
        let disk = SimDisk::new(1);
        disk.set_stepped(true);
        let storage = disk.storage(NODE);
        let mut task = Task::new(async {
            let file = storage.create("f").await?;
            storage.write(&file, 0, block(1)).await?;
            storage.sync(&file).await?;
            storage.sync_dir("").await
        });
        if task.run_operations(&disk, operations) {
            finished_after = Some(operations);
            assert!(disk.crash_states(1000, 1).all(|state| state.peek("f") == Some(block(1))));
            break;
        }
        assert!(disk.crash_states(1000, 1).any(|state| state.peek("f").is_none()));
    }
    assert_eq!(finished_after, Some(4));
}
