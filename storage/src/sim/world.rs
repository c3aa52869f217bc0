//! The running side of the simulated disk: nodes, open handles, locks, operations in flight, and the faults that wait
//! for them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::task::Waker;

use super::dir::Inode;
use super::faults::Faults;
use super::operation::{Answer, Operation};
use super::rng::Rng;
use super::state::State;
use super::storage::SimFile;
use super::{OperationId, SimNode};
use crate::{Access, Result, StorageError};

/// Which life of a node: a killed node's handles and operations belong to an earlier one.
pub(super) type Incarnation = u64;
/// An open file description.
pub(super) type HandleId = u64;

/// Where the answer of an operation in flight is put.
#[derive(Default)]
pub(super) struct Slot {
    pub(super) answer: Option<Result<Answer>>,
    pub(super) waker: Option<Waker>,
}

/// An operation that was submitted and not completed.
pub(super) struct InFlight {
    pub(super) node: SimNode,
    pub(super) operation: Operation,
    /// A sync covers the changes that were complete when it was asked for.
    submitted_at: u64,
    slot: Rc<RefCell<Slot>>,
}

impl InFlight {
    /// Wakes who waits for the answer.
    pub(super) fn wake(&self) {
        let waker = self.slot.borrow_mut().waker.take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

struct Handle {
    node: SimNode,
    inode: Inode,
}

pub(super) struct World {
    pub(super) me: Weak<RefCell<World>>,
    pub(super) state: State,
    pub(super) faults: Faults,
    pub(super) stepped: bool,
    pub(super) in_flight: BTreeMap<OperationId, InFlight>,
    /// Operations submitted since the disk was made.
    pub(super) submitted: u64,
    pub(super) rng: Rng,
    nodes: BTreeMap<SimNode, Incarnation>,
    handles: BTreeMap<HandleId, Handle>,
    locks: BTreeMap<Inode, HandleId>,
    next_handle: HandleId,
}

impl World {
    pub(super) fn new(state: State, rng: Rng) -> Rc<RefCell<Self>> {
        Rc::new_cyclic(|me| {
            RefCell::new(Self {
                me: me.clone(),
                state,
                faults: Faults::default(),
                stepped: false,
                in_flight: BTreeMap::new(),
                submitted: 0,
                rng,
                nodes: BTreeMap::new(),
                handles: BTreeMap::new(),
                locks: BTreeMap::new(),
                next_handle: 0,
            })
        })
    }

    /// The present life of a node.
    pub(super) fn incarnation(&self, node: SimNode) -> Incarnation {
        self.nodes.get(&node).copied().unwrap_or(0)
    }

    /// Takes an operation in; it is done when the harness completes it.
    pub(super) fn submit(&mut self, node: SimNode, operation: Operation) -> Rc<RefCell<Slot>> {
        let slot = Rc::new(RefCell::new(Slot::default()));
        let id = OperationId(self.submitted);
        self.submitted += 1;
        let submitted_at = self.state.seq();
        self.in_flight.insert(id, InFlight { node, operation, submitted_at, slot: Rc::clone(&slot) });
        slot
    }

    /// Does an operation at once.
    pub(super) fn perform_now(&mut self, node: SimNode, operation: &Operation) -> Result<Answer> {
        self.submitted += 1;
        self.perform(node, operation, self.state.seq())
    }

    /// Completes an operation in flight. It is handed back, to be dropped when the world is not borrowed: the last
    /// handle of a file may go with it.
    pub(super) fn complete(&mut self, id: OperationId) -> Option<InFlight> {
        let done = self.in_flight.remove(&id)?;
        let answer = self.perform(done.node, &done.operation, done.submitted_at);
        done.slot.borrow_mut().answer = Some(answer);
        Some(done)
    }

    /// Ends a node's life: what it had in flight happens in part, its locks are free, its handles are dead. What it
    /// had in flight is handed back, as by [`Self::complete`].
    pub(super) fn kill(&mut self, node: SimNode) -> Vec<InFlight> {
        let ids: Vec<_> =
            self.in_flight.iter().filter(|(_, op)| op.node == node).map(|(id, _)| *id).collect();
        let stopped: Vec<_> = ids.iter().filter_map(|id| self.in_flight.remove(id)).collect();
        for in_flight in &stopped {
            self.perform_in_part(&in_flight.operation);
        }
        *self.nodes.entry(node).or_default() += 1;
        let Self { handles, locks, .. } = self;
        handles.retain(|_, handle| handle.node != node);
        locks.retain(|_, holder| handles.contains_key(holder));
        stopped
    }

    /// Ends every node's life, as by [`Self::kill`], but for what is in flight: its effects are left to the power
    /// loss.
    pub(super) fn kill_all(&mut self) -> Vec<InFlight> {
        self.handles.clear();
        self.locks.clear();
        self.nodes.values_mut().for_each(|incarnation| *incarnation += 1);
        std::mem::take(&mut self.in_flight).into_values().collect()
    }

    /// Remembers that a node exists, so that a power loss ends its life.
    pub(super) fn join(&mut self, node: SimNode) -> Incarnation {
        *self.nodes.entry(node).or_default()
    }

    pub(super) fn open_files(&self) -> usize {
        self.handles.len()
    }

    pub(super) fn close(&mut self, handle: HandleId) {
        if let Some(Handle { inode, .. }) = self.handles.remove(&handle)
            && self.locks.get(&inode) == Some(&handle)
        {
            self.locks.remove(&inode);
        }
    }

    /// The state with everything in flight done but unsynced: a power loss may leave any part of it.
    pub(super) fn state_with_in_flight(&self) -> State {
        let mut state = self.state.clone();
        for in_flight in self.in_flight.values() {
            // One that would be refused leaves nothing.
            let _ = in_flight.operation.change(&mut state, || true);
        }
        state
    }

    fn perform(&mut self, node: SimNode, operation: &Operation, submitted_at: u64) -> Result<Answer> {
        operation.check(&self.state).or_else(|error| self.retry_with_space(operation, error))?;
        if let Some(error) = self.faults.strike(node, operation) {
            self.fail(operation, submitted_at, &error);
            return Err(error);
        }
        match operation {
            Operation::Open { path, access } => {
                let inode = self.state.lookup_file(path)?;
                Ok(Answer::File(self.open(node, inode, path, *access)))
            }
            Operation::Create { path } => {
                operation.change(&mut self.state, || true)?;
                let inode = self.state.lookup_file(path)?;
                Ok(Answer::File(self.open(node, inode, path, Access::ReadWrite)))
            }
            Operation::List { path } => self.state.list(path).map(Answer::Names),
            Operation::Stat { path } => {
                let inode = self.state.lookup(path)?;
                Ok(Answer::Stat(self.state.stat(inode)))
            }
            Operation::StatFile { file } => Ok(Answer::Stat(self.state.stat(file.inode()))),
            Operation::SyncDir { path } => {
                let dir = self.state.lookup_dir(path)?;
                self.state.dir_mut(dir).sync(submitted_at);
                self.forget_unreachable();
                Ok(Answer::Unit)
            }
            Operation::Read { file, offset, len } => {
                Ok(Answer::Bytes(self.state.file(file.inode()).read(*offset, *len)))
            }
            Operation::Sync { file } => {
                self.state.file_mut(file.inode()).sync(submitted_at);
                Ok(Answer::Unit)
            }
            Operation::TryLock { file } => {
                let holder = *self.locks.entry(file.inode()).or_insert(file.handle());
                Ok(Answer::Flag(holder == file.handle()))
            }
            Operation::Unlock { file } => {
                if self.locks.get(&file.inode()) == Some(&file.handle()) {
                    self.locks.remove(&file.inode());
                }
                Ok(Answer::Unit)
            }
            Operation::FreeBytes => Ok(Answer::Count(self.state.free_bytes())),
            _ => operation.change(&mut self.state, || true).map(|()| Answer::Unit),
        }
    }

    /// What an operation leaves behind when its node is killed under it.
    fn perform_in_part(&mut self, operation: &Operation) {
        let happens = matches!(operation, Operation::Write { .. }) || self.rng.chance(0.5);
        if happens {
            let rng = &mut self.rng;
            // One that would be refused leaves nothing.
            let _ = operation.change(&mut self.state, || rng.chance(0.5));
        }
    }

    /// What a failed operation leaves behind.
    fn fail(&mut self, operation: &Operation, submitted_at: u64, error: &StorageError) {
        let rng = &mut self.rng;
        match operation {
            Operation::Write { file, offset, data } => {
                let seq = self.state.next_seq();
                // Out of space shows in the middle of a write; a medium error may show anywhere.
                let full = matches!(error, StorageError::NoSpace { .. });
                let mut ended = false;
                let survives = || {
                    let hit = rng.chance(0.5);
                    ended |= full && hit;
                    !ended && (full || hit)
                };
                self.state.file_mut(file.inode()).write(seq, *offset, data, survives);
            }
            Operation::Sync { file } => self.state.file_mut(file.inode()).sync_failed(submitted_at, rng),
            Operation::SyncDir { path } => {
                if let Ok(dir) = self.state.lookup_dir(path) {
                    self.state.dir_mut(dir).sync_failed(submitted_at);
                }
            }
            _ => {}
        }
    }

    /// A file system frees what was unlinked before it says that it is full.
    fn retry_with_space(&mut self, operation: &Operation, error: StorageError) -> Result<()> {
        if !matches!(error, StorageError::NoSpace { .. }) {
            return Err(error);
        }
        self.forget_unreachable();
        operation.check(&self.state)
    }

    fn forget_unreachable(&mut self) {
        self.state.forget_unreachable(self.handles.values().map(|handle| handle.inode));
    }

    fn open(&mut self, node: SimNode, inode: Inode, path: &str, access: Access) -> SimFile {
        let handle = self.next_handle;
        self.next_handle += 1;
        self.handles.insert(handle, Handle { node, inode });
        SimFile::new(self.me.clone(), handle, inode, path, access)
    }
}
