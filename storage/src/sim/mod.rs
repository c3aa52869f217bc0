//! The simulated disk. This page is its fault model: what it does to its users, and what it never does.
//!
//! One [`SimDisk`] is a storage that several nodes share: each opens a [`SimStorage`]. Reads are coherent: whoever
//! reads sees every completed write of everybody, as on one host, or with direct I/O on a shared file system. The
//! disk is single-threaded and deterministic: the same seed and the same calls give the same bytes, faults and
//! [`SimDisk::digest`].
//!
//! **Durable** is the content and size of a file up to its last good [`sync`](crate::Storage::sync), and the names of
//! a directory up to its last good [`sync_dir`](crate::Storage::sync_dir). A sync covers the changes that were
//! complete when it was *asked for*, not those that completed meanwhile. Neither kind of sync does the other's work:
//! a synced file whose name was never synced may be gone, with all its content; a synced name may stand for an empty
//! file.
//!
//! **Power loss** ([`SimDisk::power_loss`], [`SimDisk::crash_states`]) ends every node's life. Of what was not
//! durable, each of these survives or not, free of the others:
//! - every sector of [`SECTOR_BYTES`]: it holds its synced content or any one of the contents written since (torn,
//!   reordered and lost writes; zeroing, punching and truncating are writes too, so old content comes back);
//! - every size: the synced one or any one since; a size without its data reads as zeros, data beyond the size is
//!   gone;
//! - every create, link and unlink of a name; a rename within one directory is whole or not at all, one across
//!   directories may leave both names, either or none;
//! - operations in flight count as done and unsynced.
//!
//! Reservations that no sync covered are lost. Space of an unlinked file returns when its directory was synced and
//! its last handle is gone.
//!
//! **A killed node** ([`SimDisk::crash_node`]) stops: of each of its writes in flight any subset of sectors is
//! applied, other changes in flight happen or not, its locks are free, and its futures never complete. What it had
//! completed stays readable and unsynced. A future that is only dropped does not stop its operation.
//!
//! **Failing operations** ([`SimDisk::fail`]) report EIO or ENOSPC at the Nth operation of a kind, once or from then
//! on:
//! - a failed write leaves any subset of its sectors, or a prefix if the disk is full;
//! - a failed sync loses the unsynced content at once, or leaves it readable while no later sync ever writes it:
//!   later syncs succeed and make durable only what was written after the failure;
//! - a failed sync of a directory leaves its changes visible and never durable;
//! - anything else that fails changes nothing.
//!
//! **Capacity** ([`SimDisk::set_capacity`]): what would not fit is refused with `NoSpace` and changes nothing.
//!
//! **Time** is the harness's. In immediate mode an operation is done when it is first polled. In stepped mode it is
//! in flight until the harness completes it, in any order: [`SimDisk::pending`], [`SimDisk::complete`],
//! [`SimDisk::complete_next`].
//!
//! Never: content that was not written, a lost or changed durable byte ([`SimDisk::poke`] does that on purpose), a
//! sync that lies without an error before it, two holders of a lock, two winners of an exclusive create.

mod crash;
mod dir;
pub mod executor;
mod faults;
mod file;
mod operation;
mod ranges;
mod rng;
mod sectors;
mod state;
mod storage;
#[cfg(test)]
mod tests;
mod world;

use std::cell::RefCell;
use std::rc::Rc;

use bytes::Bytes;

pub use self::crash::ENUMERATE_MAX;
use self::crash::{Outcomes, PowerLoss};
use self::dir::DirData;
pub use self::faults::{Fault, FaultError};
use self::file::FileData;
pub use self::operation::OperationKind;
pub use self::rng::Rng;
use self::state::{Node, State};
pub use self::storage::{SimFile, SimStorage};
use self::world::World;
use crate::{Result, StorageError};

/// The unit that a power loss keeps or loses whole, bytes: what a medium promises to write at once.
pub const SECTOR_BYTES: usize = 512;

/// A node that has the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SimNode(pub u64);

/// An operation in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OperationId(u64);

/// What the harness sees of an operation in flight.
#[derive(Clone, Debug)]
pub struct PendingOperation {
    /// To complete it by.
    pub id: OperationId,
    /// Who asked.
    pub node: SimNode,
    /// For what.
    pub kind: OperationKind,
    /// Where, from the disk's root.
    pub path: String,
}

/// The disk, as the harness holds it. Clones are the same disk; [`SimDisk::fork`] makes another.
#[derive(Clone)]
pub struct SimDisk(Rc<RefCell<World>>);

impl SimDisk {
    /// An empty disk in immediate mode. The seed decides what is left to chance outside of [`Self::power_loss`].
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(World::new(State::new(), Rng::new(seed)))
    }

    /// The storage of a node, in its present life.
    #[must_use]
    pub fn storage(&self, node: SimNode) -> SimStorage {
        self.storage_at(node, "")
    }

    /// As [`Self::storage`], rooted at a directory.
    #[must_use]
    pub fn storage_at(&self, node: SimNode, root: &str) -> SimStorage {
        SimStorage::new(Rc::clone(&self.0), node, root)
    }

    /// From now on operations stay in flight until the harness completes them, or no longer do. Those in flight stay
    /// so.
    pub fn set_stepped(&self, stepped: bool) {
        self.0.borrow_mut().stepped = stepped;
    }

    /// Limits the space of all files, bytes; `None` for no limit.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.0.borrow_mut().state.capacity_bytes = bytes;
    }

    /// Puts a failure in wait.
    pub fn fail(&self, fault: Fault) {
        self.0.borrow_mut().faults.add(fault);
    }

    /// Takes back every failure in wait.
    pub fn heal(&self) {
        self.0.borrow_mut().faults.clear();
    }

    /// Failures that have struck.
    #[must_use]
    pub fn faults_struck(&self) -> u64 {
        self.0.borrow().faults.struck
    }

    /// Operations submitted since the disk was made.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.0.borrow().submitted
    }

    /// Files that nodes have open.
    #[must_use]
    pub fn open_files(&self) -> usize {
        self.0.borrow().open_files()
    }

    /// Operations in flight, oldest first.
    #[must_use]
    pub fn pending(&self) -> Vec<PendingOperation> {
        self.pending_since(0)
    }

    /// Operations in flight, oldest first, of those submitted after the first `submitted` (see [`Self::operations`]).
    #[must_use]
    pub fn pending_since(&self, submitted: u64) -> Vec<PendingOperation> {
        let world = self.0.borrow();
        world.in_flight.range(OperationId(submitted)..).map(describe).collect()
    }

    /// Completes an operation: its effect and answer happen now. `false` if it is not in flight (any more).
    pub fn complete(&self, id: OperationId) -> bool {
        // What it owned is dropped after the borrow: the last handle of a file asks for the disk when it goes.
        let done = self.0.borrow_mut().complete(id);
        done.is_some_and(|done| {
            done.wake();
            true
        })
    }

    /// Completes one operation, drawn from those in flight.
    pub fn complete_next(&self, rng: &mut Rng) -> Option<OperationId> {
        let id = {
            let world = self.0.borrow();
            let count = world.in_flight.len();
            if count == 0 {
                return None;
            }
            *world.in_flight.keys().nth(rng.index(count))?
        };
        self.complete(id).then_some(id)
    }

    /// Completes the operation that has been in flight for longest.
    pub fn complete_oldest(&self) -> Option<OperationId> {
        let id = *self.0.borrow().in_flight.keys().next()?;
        self.complete(id).then_some(id)
    }

    /// Kills a node; the disk lives on. A [`Self::storage`] made afterwards belongs to its next life.
    pub fn crash_node(&self, node: SimNode) {
        let stopped = self.0.borrow_mut().kill(node);
        drop(stopped);
    }

    /// Loses the power of the disk and of every node; `seed` decides what survives. The disk is usable at once, in
    /// the same mode.
    pub fn power_loss(&self, seed: u64) {
        let loss = PowerLoss::of(self.0.borrow().state_with_in_flight());
        let (state, _) = loss.settle(&loss.draw(&mut Rng::new(seed)));
        let stopped = {
            let mut world = self.0.borrow_mut();
            world.state = state;
            world.kill_all()
        };
        drop(stopped);
    }

    /// Another disk with the same content, durable and not, that no node has open: handles, locks, faults and
    /// operations in flight stay behind. It is in immediate mode. Cheap: files are shared until one side changes
    /// them.
    #[must_use]
    pub fn fork(&self) -> Self {
        let world = self.0.borrow();
        Self(World::new(world.state.clone(), world.rng.clone()))
    }

    /// Disks that a power loss at this moment may leave, each once: all of them, if there are at most `max` and
    /// [`ENUMERATE_MAX`] combinations; else a sample of up to `max`, drawn by `seed`. This disk stays as it is.
    pub fn crash_states(&self, max: u64, seed: u64) -> impl Iterator<Item = Self> + use<> {
        let world = self.0.borrow();
        let mut rng = world.rng.clone();
        let outcomes = Outcomes::new(PowerLoss::of(world.state_with_in_flight()), max, seed);
        outcomes.map(move |state| Self(World::new(state, rng.fork())))
    }

    /// A number over everything that a node could read now or after a power loss.
    #[must_use]
    pub fn digest(&self) -> u64 {
        self.0.borrow().state.digest()
    }

    /// The content of a file as nodes see it, without an operation.
    #[must_use]
    pub fn peek(&self, path: &str) -> Option<Bytes> {
        let world = self.0.borrow();
        let file = world.state.file(world.state.lookup_file(path).ok()?);
        Some(file.read(0, usize::try_from(file.size()).ok()?))
    }

    /// Changes bytes behind everybody's back, durably: what a failing medium or a stray tool does.
    ///
    /// # Errors
    /// If there is no such file.
    ///
    /// # Panics
    /// If the range does not lie in the file.
    pub fn poke(&self, path: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut world = self.0.borrow_mut();
        let inode = world.state.lookup_file(path)?;
        world.state.file_mut(inode).poke(offset, bytes);
        Ok(())
    }

    /// Puts a durable file there, with its directories, in place of what had the name.
    ///
    /// # Errors
    /// If a name on the way is a file.
    pub fn put_file(&self, path: &str, content: &[u8]) -> Result<()> {
        let mut world = self.0.borrow_mut();
        let state = &mut world.state;
        let ends = path.char_indices().filter(|(_, c)| *c == '/').map(|(at, _)| at);
        let dirs: Vec<&str> = ends.map(|at| &path[..at]).filter(|dir| !dir.is_empty()).collect();
        for dir in &dirs {
            match state.make(dir, Node::Dir(DirData::default())) {
                Ok(_) | Err(StorageError::Exists { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let inode = match state.lookup_file(path) {
            Ok(inode) => inode,
            Err(_) => state.make(path, Node::File(FileData::default()))?,
        };
        let seq = state.next_seq();
        let file = state.file_mut(inode);
        file.set_len(seq, 0);
        file.set_len(seq, content.len() as u64);
        file.sync(seq);
        file.poke(0, content);
        for dir in dirs.into_iter().chain([""]) {
            let inode = state.lookup_dir(dir)?;
            state.dir_mut(inode).sync(seq);
        }
        Ok(())
    }
}

fn describe((id, op): (&OperationId, &world::InFlight)) -> PendingOperation {
    let (kind, path) = (op.operation.kind(), op.operation.path().to_owned());
    PendingOperation { id: *id, node: op.node, kind, path }
}
