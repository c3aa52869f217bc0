//! Torn or corrupt: what the end of a journal is.
//!
//! A frame is begun only after all before it were synced. So if any valid frame lies behind a damaged one, the damaged one
//! was durable once, somebody may have been promised what it says, and cutting it off would break the promise: that is
//! corruption, and is refused. If nothing valid lies behind, the damaged one is the write that never finished.

use csnap_proto::Term;
use csnap_storage::{Access, BLOCK_BYTES, Storage, StorageError};

use super::canary::Canary;
use super::frame;
use super::pool::Pool;
use super::reader::{Cursor, place};
use super::{TermError, names};

/// Read at once, bytes.
const SCAN_BYTES: usize = 1 << 20;

/// Looks through all that lies behind `cursor`, where no valid frame was found, for a valid one; describes the first.
/// The term may be writing on meanwhile: the caller looks at `cursor` once more before it believes in corruption.
pub async fn evidence_behind<S: Storage>(
    pool: &Pool<S>,
    term: Term,
    cursor: &Cursor,
) -> Result<Option<String>, TermError> {
    if pool.canaries.breaks(Canary::CorruptAsTorn) {
        return Ok(None);
    }
    for segment in names::numbered(&pool.storage, term, "journal-").await? {
        if segment >= cursor.segment {
            let from = if segment == cursor.segment { cursor.offset } else { 0 };
            if let Some(found) = scan(pool, term, segment, from).await? {
                return Ok(Some(found));
            }
        }
    }
    Ok(None)
}

async fn scan<S: Storage>(
    pool: &Pool<S>,
    term: Term,
    segment: u64,
    from: u64,
) -> Result<Option<String>, TermError> {
    let file = match pool.storage.open(&names::journal(term, segment), Access::Read).await {
        Err(StorageError::NotFound { .. }) => return Ok(None),
        file => file?,
    };
    let mut offset = from;
    loop {
        let bytes = pool.storage.read(&file, offset, SCAN_BYTES).await?;
        for start in (0..bytes.len()).step_by(BLOCK_BYTES) {
            let Ok(length) = frame::peek(&bytes[start..]) else { continue };
            let place = place(pool, term, segment, offset + start as u64);
            let whole = if start + length <= bytes.len() {
                bytes.slice(start..)
            } else {
                pool.storage.read(&file, place.offset, length).await?
            };
            if let Ok(found) = frame::decode(&place, &whole) {
                return Ok(Some(format!("record {} of the journal is whole at {place}", found.sequence)));
            }
        }
        if bytes.len() < SCAN_BYTES {
            return Ok(None);
        }
        offset += bytes.len() as u64;
    }
}
