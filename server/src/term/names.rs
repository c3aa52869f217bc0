//! Where the files of a pool lie, relative to its root. One function a file, so that no path is spelled twice.

use csnap_proto::Term;
use csnap_storage::{Storage, StorageError};

/// The root of the pool.
pub const ROOT: &str = "";
/// What the pool is; its presence is what makes a directory a pool.
pub const POOL_TOML: &str = "pool.toml";
/// The same text while the pool is being made.
pub const POOL_CREATING: &str = "pool.creating";
/// Heads of in-place volumes.
pub const HEADS: &str = "head";
/// Arenas of chunks.
pub const STORE: &str = "store";
/// Directories of terms.
pub const TERMS: &str = "term";

/// The directory of a term.
#[must_use]
pub fn term_dir(term: Term) -> String {
    format!("{TERMS}/{term}")
}

/// Its gate.
#[must_use]
pub fn gate(term: Term) -> String {
    format!("{TERMS}/{term}/gate")
}

/// The link that names the next term.
#[must_use]
pub fn successor(term: Term) -> String {
    format!("{TERMS}/{term}/successor")
}

/// What `term` links in as the successor of `end`.
#[must_use]
pub fn claim(term: Term, end: Term) -> String {
    format!("{TERMS}/{term}/claim-{end}")
}

/// A journal segment.
#[must_use]
pub fn journal(term: Term, segment: u64) -> String {
    format!("{TERMS}/{term}/journal-{segment}")
}

/// A checkpoint.
#[must_use]
pub fn checkpoint(term: Term, number: u64) -> String {
    format!("{TERMS}/{term}/checkpoint-{number}")
}

/// The empty segment that `term` set aside for the term `index + 1` places after it in the chain.
#[must_use]
pub fn set_aside(term: Term, index: u64) -> String {
    format!("{TERMS}/{term}/next-{index}")
}

/// A room that no term has moved into.
#[must_use]
pub fn room(index: u64) -> String {
    format!("{TERMS}/room-{index}")
}

/// The same while `maker` makes it.
#[must_use]
pub fn room_being_made(index: u64, maker: Term) -> String {
    format!("{TERMS}/room-{index}.{maker}.tmp")
}

/// Who makes the room that has this name in [`TERMS`], if it is one that is being made.
#[must_use]
pub fn maker_of_room(name: &str) -> Option<Term> {
    let (_, maker) = name.strip_prefix("room-")?.strip_suffix(".tmp")?.split_once('.')?;
    parse_number(maker).map(Term)
}

/// The gate in a room.
#[must_use]
pub fn gate_in(room: &str) -> String {
    format!("{room}/gate")
}

/// The block for a claim in a room, or in the directory of the term that moved in.
#[must_use]
pub fn claim_in(room: &str) -> String {
    format!("{room}/claim")
}

/// Reads a number as we write it, in decimal without leading zeros; anything else is not ours.
#[must_use]
pub fn parse_number(text: &str) -> Option<u64> {
    text.parse().ok().filter(|number: &u64| number.to_string() == text)
}

/// Numbers of the files `<prefix><number>` in the directory of `term`, ascending; none if there is no such directory.
pub async fn numbered<S: Storage>(storage: &S, term: Term, prefix: &str) -> Result<Vec<u64>, StorageError> {
    let names = match storage.list(&term_dir(term)).await {
        Err(StorageError::NotFound { .. }) => return Ok(Vec::new()),
        names => names?,
    };
    let mut numbers: Vec<u64> =
        names.iter().filter_map(|name| parse_number(name.strip_prefix(prefix)?)).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// The first segment of the run that ends with the last one: what lies before a gap was deleted once, and came back with
/// a power cut.
#[must_use]
pub fn first_of_last_run(segments: &[u64]) -> Option<u64> {
    let mut first = *segments.last()?;
    for number in segments.iter().rev().skip(1) {
        if number + 1 != first {
            break;
        }
        first = *number;
    }
    Some(first)
}

/// Every term that has a directory, ascending.
pub async fn terms<S: Storage>(storage: &S) -> Result<Vec<Term>, StorageError> {
    let mut terms: Vec<Term> =
        storage.list(TERMS).await?.iter().filter_map(|name| parse_number(name).map(Term)).collect();
    terms.sort_unstable();
    Ok(terms)
}
