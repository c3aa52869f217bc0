//! A replica alone on its disk: every operation of its log is a point of death.

use std::cell::Cell;
use std::collections::BTreeSet;

use bytes::Bytes;
use csnap_lockd::canary::Broken;
use csnap_lockd::replica::{
    Base, ClusterId, Input, Output, Replica, ReplicaConfig, ReplicaLog, Saved, Timing, Write,
};
use csnap_lockd::store::{Result, StoreError};
use csnap_proto::Time;
use csnap_storage::StorageError;
use csnap_storage::sim::executor::{Task, run};
use csnap_storage::sim::{Fault, FaultError, OperationKind, SimDisk, SimStorage};

use crate::node::{NODE, options};

const CLUSTER: ClusterId = ClusterId([3; 16]);

/// Who keeps a list of what was committed, as its state.
pub(crate) struct Alone {
    log: ReplicaLog<SimStorage>,
    replica: Replica,
    pub(crate) list: Vec<Vec<u8>>,
    writes: Vec<Write>,
    established: bool,
}

fn encode(list: &[Vec<u8>]) -> Vec<u8> {
    list.iter().flat_map(|command| [&command.len().to_le_bytes()[..], command].concat()).collect()
}

fn decode(mut state: &[u8]) -> Vec<Vec<u8>> {
    let mut list = Vec::new();
    while let Some((len, rest)) = state.split_first_chunk() {
        let (command, rest) = rest.split_at(usize::from_le_bytes(*len));
        list.push(command.to_vec());
        state = rest;
    }
    list
}

/// The `n`th command of every history; sizes differ, so that batches take one sector or many.
pub(crate) fn command(n: usize) -> Bytes {
    let len = [9, 300, 3000, 20][n % 4];
    (0..len).map(|at| u8::try_from((n + at) % 251).expect("small")).collect()
}

impl Alone {
    pub(crate) async fn open(storage: SimStorage) -> Result<Self> {
        let first = |id| Base::alone(CLUSTER, id, "here".into(), encode(&[]));
        let (log, saved) = ReplicaLog::open(storage, options([7; 16], Broken::NONE), first).await?;
        let mut alone = Self::on(log, saved);
        while !alone.established {
            alone.step(Input::Tick).await?;
        }
        Ok(alone)
    }

    fn on(log: ReplicaLog<SimStorage>, saved: Saved) -> Self {
        let list = decode(&saved.base.image.state);
        let config = ReplicaConfig { timing: Timing::DEFAULT, seed: 1, broken: Broken::NONE };
        let replica = Replica::new(Time(1), config, saved);
        Self { log, replica, list, writes: Vec::new(), established: false }
    }

    /// Until nothing waits for the disk.
    async fn step(&mut self, input: Input) -> Result<()> {
        let mut inputs = vec![input];
        loop {
            for input in inputs.drain(..) {
                let mut out = Vec::new();
                self.replica.step(Time(1), input, &mut out);
                out.into_iter().for_each(|output| self.carry_out(output));
            }
            if self.writes.is_empty() {
                return Ok(());
            }
            let based = self.writes.iter().any(|write| matches!(write, Write::Roll { .. }));
            if !based && self.log.wants_base(&self.writes) {
                inputs.push(Input::Compact { state: encode(&self.list).into() });
                continue;
            }
            let wrote = self.log.write(std::mem::take(&mut self.writes)).await?;
            inputs.extend(wrote.number.map(|number| Input::Durable { number }));
        }
    }

    fn carry_out(&mut self, output: Output) {
        match output {
            Output::Write(write) => self.writes.push(write),
            Output::Committed { command, .. } => self.list.push(command.to_vec()),
            Output::Established { .. } => self.established = true,
            Output::Leader { .. } => {}
            other => panic!("a replica alone has nothing to do with {other:?}"),
        }
    }

    /// A few commands at once, as one batch.
    pub(crate) async fn propose(&mut self, commands: &[Bytes]) -> Result<()> {
        let mut out = Vec::new();
        for command in commands {
            self.replica.step(Time(1), Input::Propose(command.clone()), &mut out);
        }
        out.into_iter().for_each(|output| self.carry_out(output));
        self.step(Input::Tick).await
    }

    pub(crate) async fn roll(&mut self) -> Result<()> {
        self.step(Input::Compact { state: encode(&self.list).into() }).await
    }
}

/// Opens, then commits commands in batches of growing size until there are `count`, with a new base now and then.
async fn history(
    storage: SimStorage,
    count: usize,
    roll_at: usize,
    acknowledged: &Cell<usize>,
) -> Result<()> {
    let mut alone = Alone::open(storage).await?;
    acknowledged.set(alone.list.len());
    let mut size = 1;
    while alone.list.len() < count {
        let done = alone.list.len();
        if done.is_multiple_of(roll_at) && done > 0 {
            alone.roll().await?;
        }
        let batch: Vec<Bytes> = (done..count.min(done + size)).map(command).collect();
        alone.propose(&batch).await?;
        acknowledged.set(alone.list.len());
        size += 1;
    }
    Ok(())
}

/// What is there again, which must be all that was acknowledged, and nothing that was not asked for.
fn check_survivor(disk: &SimDisk, acknowledged: usize, asked: usize) -> usize {
    let alone = run(Alone::open(disk.storage(NODE))).expect("what a crash leaves can be opened");
    let count = alone.list.len();
    assert!((acknowledged..=asked).contains(&count), "{acknowledged} <= {count} <= {asked}");
    assert!(alone.list.iter().enumerate().all(|(n, known)| *known == command(n)), "in their order");
    count
}

#[test]
fn no_crash_forgets_a_command_that_came_out() {
    let (count, mut states) = (10, BTreeSet::new());
    let mut points = 0;
    for at in 0.. {
        points = at;
        let disk = SimDisk::new(at);
        disk.set_stepped(true);
        let acknowledged = Cell::new(0);
        let mut task = Task::new(history(disk.storage(NODE), count, 3, &acknowledged));
        let finished = task.run_operations(&disk, at);
        check_survivor(&disk.fork(), acknowledged.get(), count);
        for state in disk.crash_states(60, at) {
            if states.insert(state.digest()) {
                let survived = check_survivor(&state.fork(), acknowledged.get(), count);
                second_crash(&state, survived, count);
            }
        }
        drop(task);
        if finished {
            break;
        }
    }
    println!("a replica alone: {} distinct disks over {points} points of death", states.len());
    assert!(states.len() > 100, "{}", states.len());
}

/// Recovery, and the work after it, are interrupted too.
fn second_crash(disk: &SimDisk, survived: usize, count: usize) {
    for at in [1, 4, 8, 13] {
        let disk = disk.fork();
        disk.set_stepped(true);
        let acknowledged = Cell::new(0);
        let mut task = Task::new(history(disk.storage(NODE), count + 3, 4, &acknowledged));
        task.run_operations(&disk, at);
        for state in disk.crash_states(2, at) {
            check_survivor(&state, survived.max(acknowledged.get()), count + 3);
        }
    }
}

#[test]
fn after_a_failed_sync_or_write_the_log_ends_and_nothing_that_came_out_is_lost() {
    let mut failures = 0;
    for kind in [OperationKind::Sync, OperationKind::SyncDir, OperationKind::Write] {
        for error in [FaultError::Io, FaultError::NoSpace] {
            failures += (1..).take_while(|nth| survives(Fault::once(kind, *nth, error))).count();
        }
    }
    println!("{failures} failing operations survived");
    assert!(failures > 40, "{failures}");
}

/// A history, the failure, and a replica after it, with power losses. False if the failure never struck.
fn survives(fault: Fault) -> bool {
    let (count, nth) = (10, fault.nth);
    let disk = SimDisk::new(nth);
    disk.fail(fault);
    let acknowledged = Cell::new(0);
    let ended = run(history(disk.storage(NODE), count, 3, &acknowledged));
    if disk.faults_struck() == 0 {
        ended.expect("nothing failed");
        return false;
    }
    disk.crash_node(NODE);
    for state in disk.crash_states(20, nth) {
        check_survivor(&state, acknowledged.get(), count);
    }
    let served = check_survivor(&disk, acknowledged.get(), count);
    disk.crash_node(NODE);
    for state in disk.crash_states(20, nth) {
        check_survivor(&state, served, count);
    }
    true
}

#[test]
fn a_log_that_failed_once_takes_nothing_more() {
    let disk = SimDisk::new(1);
    let mut alone = run(Alone::open(disk.storage(NODE))).expect("empty");
    disk.fail(Fault::once(OperationKind::Sync, 1, FaultError::Io));
    assert!(matches!(run(alone.propose(&[command(0)])), Err(StoreError::Storage(_))));
    assert_eq!(run(alone.propose(&[command(0)])).err(), Some(StoreError::Failed));
    assert!(alone.list.is_empty(), "nothing came out");
}

#[test]
fn a_full_disk_stops_new_bases_and_in_the_end_the_log_but_loses_nothing() {
    let disk = SimDisk::new(1);
    let mut alone = run(Alone::open(disk.storage(NODE))).expect("empty");
    run(alone.propose(&[command(0)])).expect("there is room");
    disk.set_capacity(Some(0));
    run(alone.roll()).expect("the old log goes on");
    drop(alone);
    let mut alone = run(Alone::open(disk.storage(NODE))).expect("a full disk keeps nobody from starting");
    let mut n = 1;
    let error = loop {
        match run(alone.propose(&[command(n)])) {
            Ok(()) => n += 1,
            Err(error) => break error,
        }
        assert!(n < 1000, "a log has an end");
    };
    let full = matches!(error, StoreError::Full(_) | StoreError::Storage(StorageError::NoSpace { .. }));
    assert!(full && n > 20, "{n}: {error}");
    drop(alone);
    let refused = run(Alone::open(disk.storage(NODE))).err();
    let full = |error: &StoreError| matches!(error, StoreError::Storage(StorageError::NoSpace { .. }));
    assert!(refused.as_ref().is_none_or(full), "not even room to elect itself: {refused:?}");
    disk.set_capacity(None);
    check_survivor(&disk, n, n + 1);
}
