//! Empty segments: files of zeros, fully written and synced ahead, so that an append changes neither size nor allocation
//! and cannot run out of space.
//!
//! Each term keeps two set aside for the terms after it in the chain: `next-0` is its direct successor's, `next-1` that
//! one's. The chain is one line, so nobody else ever takes them; the term itself never writes them after their name
//! appears. That is the space which failing over needs, and the time it does not.

use bytes::Bytes;
use csnap_proto::Term;
use csnap_storage::{Access, BLOCK_BYTES, Result, Storage, StorageError};

use super::names;

/// Segments set aside for later terms: design of the pool, "space for the next two terms".
pub const SET_ASIDE: u64 = 2;

/// Zeros written at once, bytes.
const ZEROS_BYTES: usize = 256 << 10;
static ZEROS: [u8; ZEROS_BYTES] = [0; ZEROS_BYTES];

const _: () = assert!(ZEROS_BYTES.is_multiple_of(BLOCK_BYTES));

/// Writes and syncs `bytes` of zeros as a new file at `path`, whose directory is not synced. What a failed attempt of ours left
/// at that path is removed first; the caller knows that nobody else writes there.
pub async fn write_zeros<S: Storage>(storage: &S, path: &str, bytes: u64) -> Result<S::File> {
    let file = match storage.create(path).await {
        Err(StorageError::Exists { .. }) => {
            storage.unlink(path).await?;
            storage.create(path).await?
        }
        file => file?,
    };
    let mut offset = 0;
    while offset < bytes {
        let step = usize::try_from(bytes - offset).unwrap_or(ZEROS_BYTES).min(ZEROS_BYTES);
        storage.write(&file, offset, Bytes::from_static(&ZEROS[..step])).await?;
        offset += step as u64;
    }
    storage.sync(&file).await?;
    Ok(file)
}

/// Sets empty segments aside for the next terms, as far as they are missing. Called by `term` alone.
pub async fn set_aside<S: Storage>(storage: &S, term: Term, bytes: u64) -> Result<()> {
    for index in 0..SET_ASIDE {
        let path = names::set_aside(term, index);
        if exists(storage, &path).await? {
            continue;
        }
        let unnamed = format!("{path}.tmp");
        write_zeros(storage, &unnamed, bytes).await?;
        storage.link(&unnamed, &path).await?;
        storage.sync_dir(&names::term_dir(term)).await?;
        storage.unlink(&unnamed).await?;
    }
    Ok(())
}

/// Gives what `predecessor`, the term right before `term` in the chain, set aside for the places after `term` a name in the
/// directory of `term`, which the caller syncs: a walk begins at the newest term that is sealed and sees no earlier ones, and
/// in a full pool `term` may never make any of its own.
pub async fn inherit<S: Storage>(storage: &S, predecessor: Term, term: Term) -> Result<()> {
    for index in 1..SET_ASIDE {
        match storage.link(&names::set_aside(predecessor, index), &names::set_aside(term, index - 1)).await {
            Ok(()) | Err(StorageError::NotFound { .. } | StorageError::Exists { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The first segment of `term`: the one that a term before it set aside for this place in the chain, or a new one.
/// `line` is the chain up to `term`, exclusive, oldest first.
pub async fn first_of<S: Storage>(storage: &S, line: &[Term], term: Term, bytes: u64) -> Result<S::File> {
    let path = names::journal(term, 0);
    for (index, earlier) in (0..SET_ASIDE).zip(line.iter().rev()) {
        match storage.link(&names::set_aside(*earlier, index), &path).await {
            Ok(()) => return storage.open(&path, Access::ReadWrite).await,
            Err(StorageError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    write_zeros(storage, &path, bytes).await
}

/// Whether there is such a file.
pub async fn exists<S: Storage>(storage: &S, path: &str) -> Result<bool> {
    match storage.stat(path).await {
        Ok(_) => Ok(true),
        Err(StorageError::NotFound { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}
