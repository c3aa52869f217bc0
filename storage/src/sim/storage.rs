//! A node's view of the simulated disk: [`SimStorage`] implements [`Storage`].

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll};

use bytes::Bytes;

use super::SimNode;
use super::dir::Inode;
use super::operation::{Answer, Operation};
use super::world::{HandleId, Incarnation, Slot, World};
use crate::{Access, Result, Stat, Storage};

/// One node's storage, in one life of that node. After the node was killed, or the power was lost, its operations
/// never complete: whoever waits for them is dead.
#[derive(Clone)]
pub struct SimStorage {
    world: Rc<RefCell<World>>,
    node: SimNode,
    incarnation: Incarnation,
    /// Empty, or a directory with a `/` at its end.
    root: String,
}

/// An open file of a [`SimStorage`].
#[derive(Clone)]
pub struct SimFile(Rc<OpenFile>);

struct OpenFile {
    world: Weak<RefCell<World>>,
    handle: HandleId,
    inode: Inode,
    path: String,
    access: Access,
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        if let Some(world) = self.world.upgrade() {
            world.borrow_mut().close(self.handle);
        }
    }
}

impl SimFile {
    pub(super) fn new(
        world: Weak<RefCell<World>>,
        handle: HandleId,
        inode: Inode,
        path: &str,
        access: Access,
    ) -> Self {
        Self(Rc::new(OpenFile { world, handle, inode, path: path.to_owned(), access }))
    }

    pub(super) fn handle(&self) -> HandleId {
        self.0.handle
    }

    pub(super) fn inode(&self) -> Inode {
        self.0.inode
    }

    pub(super) fn access(&self) -> Access {
        self.0.access
    }

    pub(super) fn path(&self) -> &str {
        &self.0.path
    }
}

impl SimStorage {
    pub(super) fn new(world: Rc<RefCell<World>>, node: SimNode, root: &str) -> Self {
        let incarnation = world.borrow_mut().join(node);
        let root = root.trim_matches('/');
        let root = if root.is_empty() { String::new() } else { format!("{root}/") };
        Self { world, node, incarnation, root }
    }

    fn path(&self, path: &str) -> String {
        format!("{}{path}", self.root)
    }

    fn submit(&self, operation: Operation) -> Submission<'_> {
        Submission { storage: self, step: Step::New(operation) }
    }

    async fn unit(&self, operation: Operation) -> Result<()> {
        match self.submit(operation).await? {
            Answer::Unit => Ok(()),
            _ => unreachable!("the operation answers nothing"),
        }
    }

    async fn file(&self, operation: Operation) -> Result<SimFile> {
        match self.submit(operation).await? {
            Answer::File(file) => Ok(file),
            _ => unreachable!("opening answers a file"),
        }
    }

    async fn stat_of(&self, operation: Operation) -> Result<Stat> {
        match self.submit(operation).await? {
            Answer::Stat(stat) => Ok(stat),
            _ => unreachable!("stat answers a stat"),
        }
    }
}

/// An operation on its way. It is submitted by the first poll; dropped after that, it completes nevertheless, as on a
/// real kernel.
struct Submission<'a> {
    storage: &'a SimStorage,
    step: Step,
}

enum Step {
    New(Operation),
    InFlight(Rc<RefCell<Slot>>),
    Dead,
}

impl Future for Submission<'_> {
    type Output = Result<Answer>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let storage = self.storage;
        let slot = match std::mem::replace(&mut self.step, Step::Dead) {
            Step::New(operation) => {
                let mut world = storage.world.borrow_mut();
                if world.incarnation(storage.node) != storage.incarnation {
                    return Poll::Pending;
                }
                if !world.stepped {
                    let answer = world.perform_now(storage.node, &operation);
                    // The operation may hold the last handle of its file, which asks for the world when it goes.
                    drop(world);
                    return Poll::Ready(answer);
                }
                world.submit(storage.node, operation)
            }
            Step::InFlight(slot) => slot,
            Step::Dead => return Poll::Pending,
        };
        if let Some(answer) = slot.borrow_mut().answer.take() {
            return Poll::Ready(answer);
        }
        slot.borrow_mut().waker = Some(context.waker().clone());
        self.step = Step::InFlight(slot);
        Poll::Pending
    }
}

impl Storage for SimStorage {
    type File = SimFile;

    async fn open(&self, path: &str, access: Access) -> Result<SimFile> {
        self.file(Operation::Open { path: self.path(path), access }).await
    }

    /// Absolute paths lie in the same tree as all others, from the disk's root.
    async fn open_origin(&self, path: &str) -> Result<SimFile> {
        self.file(Operation::Open { path: path.to_owned(), access: Access::Read }).await
    }

    async fn create(&self, path: &str) -> Result<SimFile> {
        self.file(Operation::Create { path: self.path(path) }).await
    }

    async fn create_dir(&self, path: &str) -> Result<()> {
        self.unit(Operation::CreateDir { path: self.path(path) }).await
    }

    async fn list(&self, path: &str) -> Result<Vec<String>> {
        match self.submit(Operation::List { path: self.path(path) }).await? {
            Answer::Names(names) => Ok(names),
            _ => unreachable!("list answers names"),
        }
    }

    async fn stat(&self, path: &str) -> Result<Stat> {
        self.stat_of(Operation::Stat { path: self.path(path) }).await
    }

    async fn stat_file(&self, file: &SimFile) -> Result<Stat> {
        self.stat_of(Operation::StatFile { file: file.clone() }).await
    }

    async fn unlink(&self, path: &str) -> Result<()> {
        self.unit(Operation::Unlink { path: self.path(path) }).await
    }

    async fn remove_dir(&self, path: &str) -> Result<()> {
        self.unit(Operation::RemoveDir { path: self.path(path) }).await
    }

    async fn link(&self, from: &str, to: &str) -> Result<()> {
        self.unit(Operation::Link { from: self.path(from), to: self.path(to) }).await
    }

    async fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.unit(Operation::Rename { from: self.path(from), to: self.path(to) }).await
    }

    async fn sync_dir(&self, path: &str) -> Result<()> {
        self.unit(Operation::SyncDir { path: self.path(path) }).await
    }

    async fn read(&self, file: &SimFile, offset: u64, len: usize) -> Result<Bytes> {
        match self.submit(Operation::Read { file: file.clone(), offset, len }).await? {
            Answer::Bytes(bytes) => Ok(bytes),
            _ => unreachable!("read answers bytes"),
        }
    }

    async fn write(&self, file: &SimFile, offset: u64, data: Bytes) -> Result<()> {
        self.unit(Operation::Write { file: file.clone(), offset, data }).await
    }

    async fn sync(&self, file: &SimFile) -> Result<()> {
        self.unit(Operation::Sync { file: file.clone() }).await
    }

    async fn set_len(&self, file: &SimFile, len: u64) -> Result<()> {
        self.unit(Operation::SetLen { file: file.clone(), len }).await
    }

    async fn reserve(&self, file: &SimFile, offset: u64, len: u64) -> Result<()> {
        self.unit(Operation::Reserve { file: file.clone(), offset, len }).await
    }

    async fn punch(&self, file: &SimFile, offset: u64, len: u64) -> Result<()> {
        self.unit(Operation::Punch { file: file.clone(), offset, len }).await
    }

    async fn try_lock(&self, file: &SimFile) -> Result<bool> {
        match self.submit(Operation::TryLock { file: file.clone() }).await? {
            Answer::Flag(taken) => Ok(taken),
            _ => unreachable!("locking answers whether it took the lock"),
        }
    }

    async fn unlock(&self, file: &SimFile) -> Result<()> {
        self.unit(Operation::Unlock { file: file.clone() }).await
    }

    async fn free_bytes(&self) -> Result<u64> {
        match self.submit(Operation::FreeBytes).await? {
            Answer::Count(bytes) => Ok(bytes),
            _ => unreachable!("the question is answered with a count"),
        }
    }
}
