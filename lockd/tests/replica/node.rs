//! One seat: a disk, and the process that may run on it.

use std::collections::VecDeque;

use bytes::Bytes;
use csnap_lockd::canary::Broken;
use csnap_lockd::replica::{
    Base, Input, Output, Replica, ReplicaConfig, ReplicaId, ReplicaLog, Saved, Write, Wrote,
};
use csnap_lockd::store::{LOG_BYTES_MIN, Result as StoreResult, StoreOptions};
use csnap_proto::Time;
use csnap_storage::sim::executor::Task;
use csnap_storage::sim::{SimDisk, SimNode, SimStorage};

use crate::judge::Machine;

pub(crate) const NODE: SimNode = SimNode(1);

type Log = ReplicaLog<SimStorage>;

pub(crate) fn options(fresh_id: [u8; 16], broken: Broken) -> StoreOptions {
    StoreOptions { fresh_id, log_bytes: LOG_BYTES_MIN, broken }
}

/// What a process does.
pub(crate) enum Process {
    Down,
    Opening(Box<Task<'static, StoreResult<(Log, Saved)>>>),
    Up(Box<Running>),
}

pub(crate) struct Running {
    pub(crate) replica: Replica,
    pub(crate) machine: Machine,
    /// At rest.
    log: Option<Log>,
    writing: Option<Task<'static, (Log, StoreResult<Wrote>)>>,
    waiting: Vec<Write>,
    /// What came and waits for the next step.
    gathered: Vec<Input>,
    /// Proposed and not committed, since it leads.
    pub(crate) proposed: VecDeque<Bytes>,
    pub(crate) rolls: u64,
}

impl Running {
    fn new(now: Time, config: ReplicaConfig, log: Log, saved: Saved) -> Self {
        let state = &saved.base.image.state;
        let machine = if state.is_empty() { Machine::default() } else { Machine::decode(state) };
        let replica = Replica::new(now, config, saved);
        let (waiting, gathered, proposed) = (Vec::new(), Vec::new(), VecDeque::new());
        Self { replica, machine, log: Some(log), writing: None, waiting, gathered, proposed, rolls: 0 }
    }

    /// Keeps a write until the disk is at rest.
    pub(crate) fn keep(&mut self, write: Write) {
        self.waiting.push(write);
    }

    /// Whether the log wants a base before it takes what waits.
    pub(crate) fn wants_base(&self) -> bool {
        let based = self.waiting.iter().any(|write| !matches!(write, Write::Append { .. }));
        !self.waiting.is_empty()
            && !based
            && self.log.as_ref().is_some_and(|log| log.wants_base(&self.waiting))
    }

    /// Gives the disk what waits, if it is at rest.
    pub(crate) fn begin_write(&mut self) {
        let Some(mut log) = self.log.take_if(|_| !self.waiting.is_empty()) else { return };
        let writes = std::mem::take(&mut self.waiting);
        self.rolls += writes.iter().filter(|write| matches!(write, Write::Roll { .. })).count() as u64;
        self.writing = Some(Task::new(async move {
            let wrote = log.write(writes).await;
            (log, wrote)
        }));
    }

    /// What a write that is done came to.
    pub(crate) fn poll(&mut self) -> Option<StoreResult<Wrote>> {
        if !self.writing.as_mut()?.poll() {
            return None;
        }
        let (log, wrote) = self.writing.take()?.into_output().expect("it is done");
        self.log = Some(log);
        Some(wrote)
    }
}

pub(crate) struct Node {
    pub(crate) disk: SimDisk,
    /// Of the disk, once it was opened.
    pub(crate) id: Option<ReplicaId>,
    pub(crate) process: Process,
    /// Which life of the process.
    pub(crate) life: u64,
    pub(crate) timer: Option<Time>,
    pub(crate) frozen_until: u64,
    pub(crate) disk_busy: bool,
    /// The disk refuses new files.
    pub(crate) full: bool,
}

impl Node {
    pub(crate) fn new(seed: u64) -> Self {
        let disk = SimDisk::new(seed);
        disk.set_stepped(true);
        let process = Process::Down;
        Self { disk, id: None, process, life: 0, timer: None, frozen_until: 0, disk_busy: false, full: false }
    }

    pub(crate) fn running(&mut self) -> Option<&mut Running> {
        match &mut self.process {
            Process::Up(running) => Some(running),
            _ => None,
        }
    }

    pub(crate) fn replica(&self) -> Option<&Replica> {
        match &self.process {
            Process::Up(running) => Some(&running.replica),
            _ => None,
        }
    }

    pub(crate) fn start(&mut self, fresh_id: [u8; 16], broken: Broken) {
        let storage = self.disk.storage(NODE);
        let open = ReplicaLog::open(storage, options(fresh_id, broken), |_| Base::empty());
        self.process = Process::Opening(Box::new(Task::new(open)));
        self.life += 1;
    }

    /// Lets a process that is opening its log go on.
    pub(crate) fn poll_opening(&mut self, now: Time, config: ReplicaConfig) -> StoreResult<bool> {
        let Process::Opening(task) = &mut self.process else { return Ok(false) };
        if !task.poll() {
            return Ok(false);
        }
        let Process::Opening(task) = std::mem::replace(&mut self.process, Process::Down) else {
            unreachable!("looked at above")
        };
        let (log, saved) = task.into_output().expect("it is done")?;
        self.id = Some(saved.id);
        self.process = Process::Up(Box::new(Running::new(now, config, log, saved)));
        Ok(true)
    }

    /// What was gathered, and this: settled together.
    pub(crate) fn step(&mut self, now: Time, input: Input) -> Vec<Output> {
        let mut out = Vec::new();
        if let Some(running) = self.running() {
            for input in running.gathered.drain(..).chain([input]) {
                running.replica.take_in(now, input, &mut out);
            }
            running.replica.settle(&mut out);
        }
        out
    }

    /// Leaves an input to the next step.
    pub(crate) fn gather(&mut self, input: Input) {
        if let Some(running) = self.running() {
            running.gathered.push(input);
        }
    }

    pub(crate) fn stop(&mut self) {
        self.process = Process::Down;
        self.life += 1;
        self.timer = None;
        self.frozen_until = 0;
    }
}
