//! The gate: one block that says whether a term may still act. Zero: open. Anything else, or nothing there: closed.
//!
//! Made open by its term before anybody can know of the term; closed by successors, and never opened again, never
//! removed. Closing is done anew by each of them even if the gate reads closed: what is read may be a cache whose sync
//! failed, what is written and synced is not.

use bytes::Bytes;
use csnap_proto::Term;
use csnap_storage::{Access, BLOCK_BYTES, Result, Storage, StorageError};

use super::names;

/// What a closed gate holds; any byte would do.
const CLOSED: u8 = 0xff;

/// A term's own gate, held open as a file for as long as the term lasts.
#[derive(Clone)]
pub struct Gate<S: Storage> {
    storage: S,
    file: S::File,
}

impl<S: Storage> Gate<S> {
    /// Makes the gate of a term whose directory was just made. Not durable before [`Storage::sync_dir`] of that directory.
    pub async fn create(storage: &S, term: Term) -> Result<Self> {
        let file = storage.create(&names::gate(term)).await?;
        storage.write(&file, 0, Bytes::from_static(&[0; BLOCK_BYTES])).await?;
        storage.sync(&file).await?;
        Ok(Self { storage: storage.clone(), file })
    }

    /// Our own gate, where it was there before us, open.
    pub(super) async fn open(storage: &S, term: Term) -> Result<Self> {
        let file = storage.open(&names::gate(term), Access::ReadWrite).await?;
        Ok(Self { storage: storage.clone(), file })
    }

    /// Reads it. What was durable before this call and finds it open is seen by every later term.
    pub async fn is_open(&self) -> Result<bool> {
        let block = self.storage.read(&self.file, 0, BLOCK_BYTES).await?;
        Ok(block.len() == BLOCK_BYTES && block.iter().all(|byte| *byte == 0))
    }
}

/// Closes the gate of `term` and makes that durable. A missing gate is closed: a term makes its gate before it is named
/// by anybody, so one that is missing will never be made.
pub async fn close<S: Storage>(storage: &S, term: Term) -> Result<()> {
    let file = match storage.open(&names::gate(term), Access::ReadWrite).await {
        Err(StorageError::NotFound { .. }) => return Ok(()),
        file => file?,
    };
    storage.write(&file, 0, Bytes::from_static(&[CLOSED; BLOCK_BYTES])).await?;
    storage.sync(&file).await
}

/// Whether the gate of another term reads open: for reports only, nothing may be decided by it.
pub async fn reads_open<S: Storage>(storage: &S, term: Term) -> Result<bool> {
    match storage.open(&names::gate(term), Access::Read).await {
        Err(StorageError::NotFound { .. }) => Ok(false),
        file => Gate { storage: storage.clone(), file: file? }.is_open().await,
    }
}
