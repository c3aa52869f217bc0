//! What a node can ask of the simulated disk, as data, and what each operation changes.

use bytes::Bytes;

use super::dir::DirData;
use super::file::{FileData, assert_aligned};
use super::state::{Node, State, failed};
use super::storage::SimFile;
use crate::{Access, Result, Stat};

const EBADF: i32 = 9;

/// An operation, with what it owns until it is done.
pub(super) enum Operation {
    Open { path: String, access: Access },
    Create { path: String },
    CreateDir { path: String },
    List { path: String },
    Stat { path: String },
    StatFile { file: SimFile },
    Unlink { path: String },
    RemoveDir { path: String },
    Link { from: String, to: String },
    Rename { from: String, to: String },
    SyncDir { path: String },
    Read { file: SimFile, offset: u64, len: usize },
    Write { file: SimFile, offset: u64, data: Bytes },
    Sync { file: SimFile },
    SetLen { file: SimFile, len: u64 },
    Reserve { file: SimFile, offset: u64, len: u64 },
    Punch { file: SimFile, offset: u64, len: u64 },
    TryLock { file: SimFile },
    Unlock { file: SimFile },
    FreeBytes,
}

/// What an operation answers.
pub(super) enum Answer {
    Unit,
    File(SimFile),
    Names(Vec<String>),
    Stat(Stat),
    Bytes(Bytes),
    Flag(bool),
    Count(u64),
}

/// The kinds of operations, to choose faults and completions by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "each is named after the method of `Storage` that it stands for")]
pub enum OperationKind {
    Open,
    Create,
    CreateDir,
    List,
    Stat,
    Unlink,
    RemoveDir,
    Link,
    Rename,
    SyncDir,
    Read,
    Write,
    Sync,
    SetLen,
    Reserve,
    Punch,
    TryLock,
    Unlock,
    FreeBytes,
}

impl Operation {
    pub(super) fn kind(&self) -> OperationKind {
        match self {
            Self::Open { .. } => OperationKind::Open,
            Self::Create { .. } => OperationKind::Create,
            Self::CreateDir { .. } => OperationKind::CreateDir,
            Self::List { .. } => OperationKind::List,
            Self::Stat { .. } | Self::StatFile { .. } => OperationKind::Stat,
            Self::Unlink { .. } => OperationKind::Unlink,
            Self::RemoveDir { .. } => OperationKind::RemoveDir,
            Self::Link { .. } => OperationKind::Link,
            Self::Rename { .. } => OperationKind::Rename,
            Self::SyncDir { .. } => OperationKind::SyncDir,
            Self::Read { .. } => OperationKind::Read,
            Self::Write { .. } => OperationKind::Write,
            Self::Sync { .. } => OperationKind::Sync,
            Self::SetLen { .. } => OperationKind::SetLen,
            Self::Reserve { .. } => OperationKind::Reserve,
            Self::Punch { .. } => OperationKind::Punch,
            Self::TryLock { .. } => OperationKind::TryLock,
            Self::Unlock { .. } => OperationKind::Unlock,
            Self::FreeBytes => OperationKind::FreeBytes,
        }
    }

    /// The path that it is about, from the disk's root; of a link or rename, the new name.
    pub(super) fn path(&self) -> &str {
        match self {
            Self::Open { path, .. }
            | Self::Create { path }
            | Self::CreateDir { path }
            | Self::List { path }
            | Self::Stat { path }
            | Self::Unlink { path }
            | Self::RemoveDir { path }
            | Self::SyncDir { path } => path,
            Self::Link { to, .. } | Self::Rename { to, .. } => to,
            Self::StatFile { file }
            | Self::Read { file, .. }
            | Self::Write { file, .. }
            | Self::Sync { file }
            | Self::SetLen { file, .. }
            | Self::Reserve { file, .. }
            | Self::Punch { file, .. }
            | Self::TryLock { file }
            | Self::Unlock { file } => file.path(),
            Self::FreeBytes => "",
        }
    }

    /// Blocks that it would take.
    fn blocks_needed(&self, state: &State) -> u64 {
        match self {
            Self::Write { file, offset, data } => {
                state.file(file.inode()).missing_blocks(*offset, data.len() as u64)
            }
            Self::Reserve { file, offset, len } => state.file(file.inode()).missing_blocks(*offset, *len),
            _ => 0,
        }
    }

    /// Refuses what cannot be done, before anything is changed.
    pub(super) fn check(&self, state: &State) -> Result<()> {
        if let Self::Write { file, offset, data } = self {
            assert_aligned(*offset, data.len());
            file.check_writable("write")?;
        }
        if let Self::SetLen { file, .. } | Self::Reserve { file, .. } | Self::Punch { file, .. } = self {
            file.check_writable("change")?;
        }
        state.check_space(self.path(), self.blocks_needed(state))
    }

    /// Makes the change, unsynced. A write puts only the sectors that `survives` says. What changes nothing is
    /// nothing here; opening and locking are the running world's.
    pub(super) fn change(&self, state: &mut State, survives: impl FnMut() -> bool) -> Result<()> {
        self.check(state)?;
        match self {
            Self::Create { path } => state.make(path, Node::File(FileData::default())).map(drop),
            Self::CreateDir { path } => state.make(path, Node::Dir(DirData::default())).map(drop),
            Self::Unlink { path } => state.unlink(path),
            Self::RemoveDir { path } => state.remove_dir(path),
            Self::Link { from, to } => state.link(from, to),
            Self::Rename { from, to } => state.rename(from, to),
            Self::Write { file, offset, data } => {
                let seq = state.next_seq();
                state.file_mut(file.inode()).write(seq, *offset, data, survives);
                Ok(())
            }
            Self::SetLen { file, len } => {
                let seq = state.next_seq();
                state.file_mut(file.inode()).set_len(seq, *len);
                Ok(())
            }
            Self::Reserve { file, offset, len } => {
                state.file_mut(file.inode()).reserve(*offset, *len);
                Ok(())
            }
            Self::Punch { file, offset, len } => {
                let seq = state.next_seq();
                state.file_mut(file.inode()).punch(seq, *offset, *len);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl SimFile {
    fn check_writable(&self, what: &'static str) -> Result<()> {
        match self.access() {
            Access::ReadWrite => Ok(()),
            Access::Read | Access::ReadScattered => {
                Err(failed(self.path(), what, EBADF, "Bad file descriptor"))
            }
        }
    }
}
