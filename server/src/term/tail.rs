//! Torn or corrupt: what the end of a journal is.
//!
//! A frame is begun only after all before it were synced. So if any valid frame lies behind a damaged one, the damaged one
//! was durable once, somebody may have been promised what it says, and cutting it off would break the promise: that is
//! corruption, and is refused. If nothing valid lies behind, the damaged one is the write that never finished.
//!
//! The segment in which the line ends is looked through to its end. A later one begins with a record of its own: where even the
//! block of that is zero, the segment was only made ahead, and it is enough to look as far as two of the largest records
//! reach, so that a takeover does not read segments of zeros. What that misses is a loss of megabytes in one piece.

use csnap_proto::Term;
use csnap_storage::{Access, BLOCK_BYTES, Storage, StorageError};

use super::canary::Canary;
use super::frame::{self, FRAME_BYTES_MAX};
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
    let first = pool.storage.read(&file, 0, BLOCK_BYTES).await?;
    let made_ahead = from == 0 && first.iter().all(|byte| *byte == 0);
    let end = if made_ahead { 2 * FRAME_BYTES_MAX as u64 } else { u64::MAX };
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
        offset += bytes.len() as u64;
        if bytes.len() < SCAN_BYTES || offset >= end {
            return Ok(None);
        }
    }
}
