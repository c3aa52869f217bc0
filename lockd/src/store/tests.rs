//! The store on the simulated disk: every crash point, every damage.

use std::collections::BTreeSet;

use csnap_proto::message::lock::{Flags, LockOp, Mode, ValueChange};
use csnap_proto::{LockId, Name, Secret, Sequence, SessionId};
use csnap_storage::sim::executor::{Task, run};
use csnap_storage::sim::{Fault, FaultError, OperationKind, SimDisk, SimNode, SimStorage};

use bytes::Bytes;
use csnap_storage::{BLOCK_BYTES, Storage};

use super::record::{self, BATCH_BYTES_MAX, LogPlace, encode_batch};
use super::table::Store;
use super::*;
use crate::canary::Broken;
use crate::core::table::{Command, Table};

const NODE: SimNode = SimNode(1);
const OPTIONS: StoreOptions =
    StoreOptions { fresh_id: [7; 16], log_bytes: LOG_BYTES_MIN, broken: Broken::NONE };

const SESSION: SessionId = SessionId([1; 16]);

fn encoded(command: &Command) -> Bytes {
    postcard::to_stdvec(command).expect("encodes").into()
}

/// The `n`th command of a history: a session, then locks granted and given up in turn, so that each makes a difference,
/// and descriptions that take several sectors, so that batches can tear.
fn command(n: u64) -> Command {
    if n == 1 {
        let node = Name::new("n1").expect("a name");
        return Command::Open {
            session: SESSION,
            secret: Secret([2; 16]),
            node,
            lease_ms: 1000,
            info: vec![],
        };
    }
    let round = n / 3 + 1;
    let op = match n % 3 {
        2 => LockOp::lock("r", Mode::Ex, Flags::NOQUEUE),
        0 => LockOp::unlock(LockId(round - 1), ValueChange::Write(n.to_le_bytes().to_vec())),
        _ => LockOp::SetInfo { info: n.to_le_bytes().repeat(250) },
    };
    let sequence = Sequence(n - 1);
    Command::Operate { session: SESSION, sequence, lowest_unanswered: sequence, op }
}

/// The table after the first `n` commands.
fn table_after(n: u64) -> Table {
    let mut table = Table::default();
    for n in 1..=n {
        table.apply(command(n), &mut Vec::new());
    }
    table
}

fn open(disk: &SimDisk) -> Result<(Store<SimStorage>, Table)> {
    run(Store::open(disk.storage(NODE), OPTIONS))
}

/// Opens, then appends commands in batches of growing size until there are `count`; rolls before each `roll_at`th
/// command, and goes on in the old log where space is short. `acknowledged` follows what is durable.
async fn history(
    storage: SimStorage,
    count: u64,
    roll_at: u64,
    acknowledged: &std::cell::Cell<u64>,
) -> Result<()> {
    let (mut store, mut table) = Store::open(storage, OPTIONS).await?;
    let mut done = store.log.place.sequence - 1;
    acknowledged.set(done);
    let mut size = 1;
    while done < count {
        let batch: Vec<Command> = (done + 1..=count.min(done + size)).map(command).collect();
        let bytes: Vec<Bytes> = batch.iter().map(encoded).collect();
        if done.is_multiple_of(roll_at) && done > 0 {
            match store.roll(&table).await {
                Err(StoreError::Storage(StorageError::NoSpace { .. })) => {}
                rolled => rolled?,
            }
        }
        store.append(&bytes).await?;
        done += batch.len() as u64;
        acknowledged.set(done);
        for command in batch {
            table.apply(command, &mut Vec::new());
        }
        size += 1;
    }
    Ok(())
}

/// The table that is there, which must be one after at least `acknowledged` and at most `written` commands.
fn check_survivor(disk: &SimDisk, acknowledged: u64, written: u64) -> u64 {
    let (store, table) = open(disk).expect("what a crash leaves can be opened");
    let count = store.log.place.sequence - 1;
    assert!((acknowledged..=written).contains(&count), "{acknowledged} <= {count} <= {written}");
    assert_eq!(table, table_after(count));
    assert_eq!(table.check(), Ok(()));
    count
}

#[test]
fn what_was_appended_is_there_again() {
    let disk = SimDisk::new(1);
    let acknowledged = std::cell::Cell::new(0);
    run(history(disk.storage(NODE), 40, 15, &acknowledged)).expect("nothing fails");
    assert_eq!(acknowledged.get(), 40);
    disk.crash_node(NODE);
    assert_eq!(check_survivor(&disk, 40, 40), 40);
}

/// Every operation of opening, appending and rolling is a point of death; at each one the power goes as well, with many
/// outcomes; and each outcome is opened, goes on, and is killed once more.
#[test]
fn no_crash_forgets_what_was_acknowledged() {
    let count = 12;
    let mut states = BTreeSet::new();
    let mut at = 0;
    loop {
        let disk = SimDisk::new(at);
        disk.set_stepped(true);
        let acknowledged = std::cell::Cell::new(0);
        let mut task = Task::new(history(disk.storage(NODE), count, 3, &acknowledged));
        let finished = task.run_operations(&disk, at);
        let killed = disk.fork();
        check_survivor(&killed, acknowledged.get(), count);
        for state in disk.crash_states(100, at) {
            if states.insert(state.digest()) {
                let survived = check_survivor(&state.fork(), acknowledged.get(), count);
                second_crash(&state, survived, count);
            }
        }
        drop(task);
        if finished {
            break;
        }
        at += 1;
    }
    println!("{} distinct states over {at} crash points", states.len());
    assert!(states.len() > 100, "{}", states.len());
}

/// Recovery, and the work after it, are interrupted too.
fn second_crash(disk: &SimDisk, survived: u64, count: u64) {
    for at in [1, 3, 5, 7, 9, 12, 16] {
        let disk = disk.fork();
        disk.set_stepped(true);
        let acknowledged = std::cell::Cell::new(0);
        let mut task = Task::new(history(disk.storage(NODE), count + 4, 4, &acknowledged));
        task.run_operations(&disk, at);
        for state in disk.crash_states(2, at) {
            check_survivor(&state, survived.max(acknowledged.get()), count + 4);
        }
    }
}

#[test]
fn two_lockds_never_have_one_directory() {
    let disk = SimDisk::new(1);
    let first = open(&disk).expect("it is free");
    let second = run(Store::open(disk.storage(SimNode(2)), OPTIONS));
    assert_eq!(second.err(), Some(StoreError::Busy));
    drop(first);
    open(&disk).expect("it is free again");
}

/// A disk with five batches of one command in its first generation.
fn five_batches() -> SimDisk {
    let disk = SimDisk::new(1);
    let (mut store, _) = open(&disk).expect("empty");
    for n in 1..=5 {
        run(store.append(&[encoded(&command(n))])).expect("writes");
    }
    disk
}

#[test]
fn damage_before_the_last_batch_is_refused_and_named() {
    for batch in 0..4u64 {
        let disk = five_batches();
        disk.poke("log-1", batch * BLOCK_BYTES as u64 + 70, &[0xff; 3]).expect("exists");
        let error = open(&disk).err().expect("refused");
        assert!(
            matches!(&error, StoreError::Corrupt { file, at, .. } if file == "log-1" && *at == batch * BLOCK_BYTES as u64),
            "{error}"
        );
    }
}

#[test]
fn a_damaged_last_batch_is_a_torn_one() {
    let disk = five_batches();
    disk.poke("log-1", 4 * BLOCK_BYTES as u64 + 70, &[0xff; 3]).expect("exists");
    let (mut store, table) = open(&disk).expect("a crash may have torn it");
    assert_eq!(table, table_after(4));
    run(store.append(&[encoded(&command(5))])).expect("its place is used again");
    drop(store);
    assert_eq!(check_survivor(&disk, 5, 5), 5);
}

#[test]
fn batches_of_another_place_generation_or_directory_are_none() {
    let place = LogPlace::start([7; 16], 3, 11);
    let commands = [encoded(&command(1)), encoded(&command(2))];
    let batch = encode_batch(place, &commands);
    let read = record::decode_batch(&batch, place).expect("whole");
    assert_eq!((read.len, read.items.len()), (batch.len() as u64, 2));
    for other in [
        LogPlace { id: [8; 16], ..place },
        LogPlace { generation: 4, ..place },
        LogPlace { sequence: 12, ..place },
    ] {
        assert_eq!(record::decode_batch(&batch, other), None);
    }
    let moved = [vec![0; BLOCK_BYTES], batch.to_vec()].concat();
    assert_eq!(record::decode_batch(&moved, LogPlace { offset: BLOCK_BYTES as u64, ..place }), None);
    let end = 64 + commands.iter().map(|command| 4 + command.len()).sum::<usize>();
    for bit in 0..end * 8 {
        let mut damaged = batch.to_vec();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(record::decode_batch(&damaged, place), None, "bit {bit}");
    }
}

#[test]
fn another_version_and_a_damaged_snapshot_are_refused() {
    let disk = five_batches();
    let found = record::VERSION + 1;
    disk.poke("snapshot", 8, &found.to_le_bytes()).expect("exists");
    assert_eq!(open(&disk).err(), Some(StoreError::Version { file: "snapshot".into(), found }));
    for at in [0, 13, 33, 50, 64] {
        let disk = five_batches();
        disk.poke("snapshot", at, &[0xaa]).expect("exists");
        assert!(matches!(open(&disk).err(), Some(StoreError::Corrupt { .. })), "byte {at}");
    }
    let disk = five_batches();
    run(disk.storage(NODE).unlink("log-1")).expect("exists");
    assert!(matches!(open(&disk).err(), Some(StoreError::Corrupt { .. })));
    let disk = five_batches();
    run(disk.storage(NODE).unlink("snapshot")).expect("exists");
    assert!(matches!(open(&disk).err(), Some(StoreError::Corrupt { .. })));
}

#[test]
fn after_a_failed_sync_nothing_is_accepted_and_nothing_acknowledged_is_lost() {
    for kind in [OperationKind::Sync, OperationKind::Write] {
        let disk = five_batches();
        let (mut store, _) = open(&disk).expect("whole");
        disk.fail(Fault::once(kind, 1, FaultError::Io));
        assert!(matches!(run(store.append(&[encoded(&command(6))])), Err(StoreError::Storage(_))));
        assert_eq!(run(store.append(&[encoded(&command(6))])), Err(StoreError::Failed));
        drop(store);
        disk.crash_node(NODE);
        for state in disk.crash_states(100, 1) {
            check_survivor(&state, 5, 6);
        }
    }
}

/// A failed sync may leave what it was about readable, and no later sync writes it: whoever opens the store next must not
/// take what it reads for durable, and whoever goes on because only space is short must not rely on it.
#[test]
fn what_was_read_after_a_failed_sync_outlives_the_power() {
    let mut failures = 0;
    for kind in [OperationKind::Sync, OperationKind::SyncDir, OperationKind::Write] {
        for error in [FaultError::Io, FaultError::NoSpace] {
            for seed in 0..4 {
                failures += (1..).take_while(|nth| survives(Fault::once(kind, *nth, error), seed)).count();
            }
        }
    }
    assert!(failures > 100, "{failures}");
}

/// A history, the failure, and two lockds after it, with power losses in between. False if the failure never struck.
fn survives(fault: Fault, seed: u64) -> bool {
    let count = 12;
    let disk = SimDisk::new(seed);
    let nth = fault.nth;
    disk.fail(fault);
    let acknowledged = std::cell::Cell::new(0);
    let ended = run(history(disk.storage(NODE), count, 3, &acknowledged));
    if disk.faults_struck() == 0 {
        ended.expect("nothing failed");
        return false;
    }
    disk.crash_node(NODE);
    for state in disk.crash_states(20, nth) {
        check_survivor(&state, acknowledged.get(), count);
    }
    // The next lockd reads what is there, and serves it; a third one goes on from there.
    let served = check_survivor(&disk, acknowledged.get(), count);
    disk.crash_node(NODE);
    for state in disk.crash_states(20, nth) {
        check_survivor(&state, served, count);
    }
    run(history(disk.storage(NODE), count + 4, 4, &acknowledged)).expect("nothing fails any more");
    disk.crash_node(NODE);
    for state in disk.crash_states(20, nth) {
        check_survivor(&state, count + 4, count + 4);
    }
    true
}

#[test]
fn a_roll_whose_names_may_not_be_durable_is_final() {
    for nth in [1, 2] {
        let disk = five_batches();
        let (mut store, table) = open(&disk).expect("whole");
        disk.fail(Fault::once(OperationKind::SyncDir, nth, FaultError::NoSpace));
        assert!(matches!(run(store.roll(&table)), Err(StoreError::Names(_))));
        assert_eq!(run(store.append(&[encoded(&command(6))])), Err(StoreError::Failed));
    }
}

/// A predecessor that was killed anywhere left names that no sync made durable. On a full disk the next one cannot
/// publish its snapshot anew, and must make them so before it removes or acknowledges anything.
#[test]
fn a_full_disk_keeps_no_lockd_from_starting_and_costs_nothing_acknowledged() {
    let (count, mut opened) = (12, 0);
    for at in 0.. {
        let disk = SimDisk::new(at);
        disk.set_stepped(true);
        let acknowledged = std::cell::Cell::new(0);
        let mut task = Task::new(history(disk.storage(NODE), count, 3, &acknowledged));
        let finished = task.run_operations(&disk, at);
        drop(task);
        disk.set_stepped(false);
        disk.crash_node(NODE);
        disk.set_capacity(Some(0));
        let made = disk.peek("snapshot").is_some();
        match open(&disk) {
            Ok((mut store, table)) => {
                opened += 1;
                let served = store.log.place.sequence - 1;
                assert_eq!(table, table_after(served));
                assert!(served >= acknowledged.get() && disk.peek("snapshot.tmp").is_none());
                run(store.append(&[encoded(&command(served + 1))])).expect("its space is there already");
                drop(store);
                disk.crash_node(NODE);
                for state in disk.crash_states(20, at) {
                    state.set_capacity(None);
                    check_survivor(&state, served + 1, served + 1);
                }
            }
            Err(error) => assert!(!made, "{error}"),
        }
        if finished {
            break;
        }
    }
    assert!(opened > 20, "{opened}");
}

#[test]
fn a_full_disk_stops_the_roll_and_not_the_log() {
    let disk = five_batches();
    let (mut store, table) = open(&disk).expect("whole");
    disk.set_capacity(Some(LOG_BYTES_MIN + 5 * BLOCK_BYTES as u64));
    let refused = run(store.roll(&table));
    assert!(matches!(refused, Err(StoreError::Storage(StorageError::NoSpace { .. }))), "{refused:?}");
    run(store.append(&[encoded(&command(6))])).expect("its space is there already");
    disk.set_capacity(None);
    run(store.roll(&table_after(6))).expect("there is space again");
    drop(store);
    assert_eq!(check_survivor(&disk, 6, 6), 6);
    assert!(disk.peek("log-1").is_none() && disk.peek("log-2").is_some());
}

#[test]
fn a_batch_takes_as_many_commands_as_fit() {
    assert_eq!(record::batch_count([]), 0);
    assert_eq!(record::batch_count([10, 20]), 2);
    assert_eq!(record::batch_count([BATCH_BYTES_MAX - 4, 1]), 1);
    assert_eq!(record::batch_count([BATCH_BYTES_MAX - 13, 5]), 2);
    assert_eq!(record::batch_count([BATCH_BYTES_MAX - 12, 5]), 1);
}
