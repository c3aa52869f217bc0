//! Formats of the log and the snapshot. Pure.
//!
//! A batch is what one sync makes durable. It begins at a multiple of [`BLOCK_BYTES`] and is padded with zeros to one:
//!
//! ```text
//! offset  size  field (little endian)
//!      0     8  magic "CSNLKLOG"
//!      8     4  version
//!     12     4  length of the items, bytes
//!     16     8  generation of the log
//!     24     8  place of the batch in the file, bytes
//!     32     8  sequence of the first item; items are numbered from 1, over all generations
//!     40     8  durable: everything in the file before this place was durable when the batch began
//!     48     4  number of items
//!     52     4  CRC-32C of the directory's id, then of the batch with this field zero and without padding
//!     56     8  zero
//!     64     …  items: each a length (4 bytes) and its bytes, which mean nothing here
//! ```
//!
//! The snapshot is one such block, then its content, padded:
//!
//! ```text
//!      0     8  magic "CSNLKSNP"
//!      8     4  version
//!     12     4  CRC-32C of the snapshot with this field zero, without padding
//!     16    16  id of the directory
//!     32     8  generation that begins with it
//!     40     8  sequence of the first item after it
//!     48     8  length of the content, bytes
//!     56     8  zero
//!     64     …  the content
//! ```
//!
//! Assumed of the medium: a sector holds what was last written to it or, before a sync, something written earlier; a
//! checksum of 32 bits that covers its place is enough to tell.

use bytes::{BufMut, Bytes, BytesMut};
use csnap_storage::BLOCK_BYTES;

use super::StoreError;

/// Version of both formats.
///
/// 1: the first. 2: items and content are a replica's, not a table's. 3: its state is lockspaces, not one table.
pub const VERSION: u32 = 3;

/// Most bytes of items in one batch: many of the largest commands, and small beside a log.
pub const BATCH_BYTES_MAX: usize = 64 << 10;

const LOG_MAGIC: [u8; 8] = *b"CSNLKLOG";
const SNAPSHOT_MAGIC: [u8; 8] = *b"CSNLKSNP";
const HEADER_BYTES: usize = 64;
const LENGTH_BYTES: usize = 4;

/// Where the next batch goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogPlace {
    /// The directory.
    pub id: [u8; 16],
    /// The log.
    pub generation: u64,
    /// The place in it.
    pub offset: u64,
    /// The next item.
    pub sequence: u64,
}

impl LogPlace {
    /// The start of a log.
    #[must_use]
    pub fn start(id: [u8; 16], generation: u64, sequence: u64) -> Self {
        Self { id, generation, offset: 0, sequence }
    }
}

/// A batch as it was read.
#[derive(Debug, PartialEq, Eq)]
pub struct Batch<'a> {
    /// What it takes in the file, bytes.
    pub len: u64,
    /// Its items.
    pub items: Vec<&'a [u8]>,
}

/// A snapshot as it was read.
#[derive(Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Start of the log that follows it.
    pub place: LogPlace,
    /// What it keeps.
    pub content: Bytes,
}

/// What the batch takes in the file, bytes.
#[must_use]
pub fn batch_len(items: &[Bytes]) -> u64 {
    let body: usize = items.iter().map(|item| LENGTH_BYTES + item.len()).sum();
    (HEADER_BYTES + body).next_multiple_of(BLOCK_BYTES) as u64
}

/// How many of `items`, from the first, make one batch.
#[must_use]
pub fn batch_count(items: impl IntoIterator<Item = usize>) -> usize {
    let mut left = BATCH_BYTES_MAX;
    let fits = |len: &usize| match left.checked_sub(LENGTH_BYTES + len) {
        Some(rest) => {
            left = rest;
            true
        }
        None => false,
    };
    items.into_iter().take_while(fits).count()
}

/// The bytes of a batch at `place`.
#[must_use]
pub fn encode_batch(place: LogPlace, items: &[Bytes]) -> Bytes {
    let mut out = BytesMut::with_capacity(usize::try_from(batch_len(items)).expect("fits a log"));
    let body: usize = items.iter().map(|item| LENGTH_BYTES + item.len()).sum();
    assert!(body <= BATCH_BYTES_MAX, "a batch of {body} bytes was not split");
    out.put_slice(&LOG_MAGIC);
    out.put_u32_le(VERSION);
    out.put_u32_le(u32::try_from(body).expect("checked above"));
    out.put_u64_le(place.generation);
    out.put_u64_le(place.offset);
    out.put_u64_le(place.sequence);
    out.put_u64_le(place.offset);
    out.put_u32_le(u32::try_from(items.len()).expect("fewer than bytes"));
    out.put_bytes(0, 12);
    for item in items {
        out.put_u32_le(u32::try_from(item.len()).expect("checked above"));
        out.put_slice(item);
    }
    let crc = checksum(&place.id, &out, 52);
    out[52..56].copy_from_slice(&crc.to_le_bytes());
    out.put_bytes(0, out.len().next_multiple_of(BLOCK_BYTES) - out.len());
    out.freeze()
}

/// The batch at `place` of a log; `None` if there is none, or none that is whole.
#[must_use]
pub fn decode_batch(log: &[u8], place: LogPlace) -> Option<Batch<'_>> {
    let (batch, sequence) = parse_batch(log, place)?;
    (sequence == place.sequence).then_some(batch)
}

/// Whether a whole batch stands after `place`, where none is: then what was at `place` was durable once.
#[must_use]
pub fn has_batch_after(log: &[u8], place: LogPlace) -> bool {
    let after = (place.offset + BLOCK_BYTES as u64..log.len() as u64).step_by(BLOCK_BYTES);
    let mut whole = after.map(|offset| parse_batch(log, LogPlace { offset, ..place }));
    whole.any(|batch| batch.is_some_and(|(_, sequence)| sequence >= place.sequence))
}

fn parse_batch(log: &[u8], place: LogPlace) -> Option<(Batch<'_>, u64)> {
    let rest = log.get(usize::try_from(place.offset).ok()?..)?;
    let header: &[u8; HEADER_BYTES] = rest.first_chunk()?;
    let body_len = u32_at(header, 12) as usize;
    let known = header[..8] == LOG_MAGIC
        && u32_at(header, 8) == VERSION
        && u64_at(header, 16) == place.generation
        && u64_at(header, 24) == place.offset
        && u64_at(header, 40) == place.offset
        && body_len <= BATCH_BYTES_MAX;
    if !known {
        return None;
    }
    let record = rest.get(..HEADER_BYTES + body_len)?;
    if checksum(&place.id, record, 52) != u32_at(header, 52) {
        return None;
    }
    let mut body = &record[HEADER_BYTES..];
    let mut items = Vec::new();
    for _ in 0..u32_at(header, 48) {
        let (len, after) = body.split_first_chunk::<LENGTH_BYTES>()?;
        let (item, after) = after.split_at_checked(u32::from_le_bytes(*len) as usize)?;
        items.push(item);
        body = after;
    }
    let len = record.len().next_multiple_of(BLOCK_BYTES) as u64;
    (body.is_empty() && !items.is_empty()).then_some((Batch { len, items }, u64_at(header, 32)))
}

/// The bytes of a snapshot that begins the generation of `place`.
#[must_use]
pub fn encode_snapshot(place: LogPlace, content: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity((HEADER_BYTES + content.len()).next_multiple_of(BLOCK_BYTES));
    out.put_slice(&SNAPSHOT_MAGIC);
    out.put_u32_le(VERSION);
    out.put_u32_le(0);
    out.put_slice(&place.id);
    out.put_u64_le(place.generation);
    out.put_u64_le(place.sequence);
    out.put_u64_le(content.len() as u64);
    out.put_u64_le(0);
    out.put_slice(content);
    let crc = checksum(&[], &out, 12);
    out[12..16].copy_from_slice(&crc.to_le_bytes());
    out.put_bytes(0, out.len().next_multiple_of(BLOCK_BYTES) - out.len());
    out.freeze()
}

/// Reads a snapshot file.
pub fn decode_snapshot(file: &[u8]) -> Result<Snapshot, StoreError> {
    let corrupt = |at, what| StoreError::Corrupt { file: "snapshot".into(), at, what };
    let header: &[u8; HEADER_BYTES] = file.first_chunk().ok_or(corrupt(0, "it is cut"))?;
    if header[..8] != SNAPSHOT_MAGIC {
        return Err(corrupt(0, "it is no snapshot of a lockd"));
    }
    let found = u32_at(header, 8);
    if found != VERSION {
        return Err(StoreError::Version { file: "snapshot".into(), found });
    }
    let len = usize::try_from(u64_at(header, 48)).ok().and_then(|len| HEADER_BYTES.checked_add(len));
    let record =
        len.and_then(|len| file.get(..len)).ok_or(corrupt(48, "its length is not that of the file"))?;
    if checksum(&[], record, 12) != u32_at(header, 12) {
        return Err(corrupt(12, "its checksum does not match"));
    }
    let content = Bytes::copy_from_slice(&record[HEADER_BYTES..]);
    let id = header[16..32].try_into().expect("sixteen bytes");
    Ok(Snapshot { place: LogPlace::start(id, u64_at(header, 32), u64_at(header, 40)), content })
}

/// CRC-32C of `seed` and of `record` with four zeros at `hole`.
fn checksum(seed: &[u8], record: &[u8], hole: usize) -> u32 {
    let crc = crc32c::crc32c_append(crc32c::crc32c(seed), &record[..hole]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &record[hole + 4..])
}

fn u32_at(header: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(header: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"))
}
