//! Failures that are put in wait for operations.

use super::SimNode;
use super::operation::{Operation, OperationKind};
use super::state::failed;
use crate::StorageError;

const EIO: i32 = 5;

/// What a failing operation reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultError {
    /// EIO: the medium failed.
    Io,
    /// ENOSPC: the file system, or a quota behind it, is full.
    NoSpace,
}

/// A failure in wait.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Operations of this kind.
    pub kind: OperationKind,
    /// Of this node only.
    pub node: Option<SimNode>,
    /// On paths only that begin so, from the disk's root; empty for all.
    pub path_prefix: String,
    /// The how many-th such operation from now fails; 1 is the next.
    pub nth: u64,
    /// All later ones fail too.
    pub persistent: bool,
    /// What is reported.
    pub error: FaultError,
}

impl Fault {
    /// The `nth` operation of `kind` from now fails once, whoever asks and wherever.
    #[must_use]
    pub fn once(kind: OperationKind, nth: u64, error: FaultError) -> Self {
        Self { kind, node: None, path_prefix: String::new(), nth, persistent: false, error }
    }

    fn matches(&self, node: SimNode, operation: &Operation) -> bool {
        self.kind == operation.kind()
            && self.node.is_none_or(|only| only == node)
            && operation.path().trim_start_matches('/').starts_with(&self.path_prefix)
    }
}

/// The failures in wait, and how many have struck.
#[derive(Debug, Default)]
pub(super) struct Faults {
    waiting: Vec<Fault>,
    pub(super) struck: u64,
}

impl Faults {
    pub(super) fn add(&mut self, fault: Fault) {
        assert!(fault.nth > 0, "the next operation is number 1");
        self.waiting.push(fault);
    }

    pub(super) fn clear(&mut self) {
        self.waiting.clear();
    }

    /// The error that `operation` has to report, if one was in wait for it.
    pub(super) fn strike(&mut self, node: SimNode, operation: &Operation) -> Option<StorageError> {
        let mut error = None;
        for fault in self.waiting.iter_mut().filter(|fault| fault.matches(node, operation)) {
            fault.nth = fault.nth.saturating_sub(1);
            if fault.nth == 0 {
                error = Some(fault.error);
            }
        }
        self.waiting.retain(|fault| fault.nth > 0 || fault.persistent);
        let path = operation.path();
        let error = match error? {
            FaultError::Io => failed(path, "simulated operation", EIO, "Input/output error"),
            FaultError::NoSpace => StorageError::NoSpace { path: path.to_owned() },
        };
        self.struck += 1;
        Some(error)
    }
}
