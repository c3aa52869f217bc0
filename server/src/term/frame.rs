//! The frame: what every record of a journal and every piece of a checkpoint is wrapped in.
//!
//! A frame says where it belongs (pool, term, file, place in the file), where it stands in its file's line (sequence, hash
//! of the frame before it), and hashes all of that together with its body. So a torn frame, a stale one, one that the disk
//! put elsewhere, and one copied from another pool are all simply not valid *here*. Frames start at multiples of
//! [`BLOCK_BYTES`] and are padded with zeros to one.
//!
//! A frame is written only after every frame before it in its file's line was synced: its sequence is therefore also the
//! position that was known durable when it was begun, and a valid frame is proof that all before it were durable.
//!
//! ```text
//!        0        1        2        3        4        5        6        7
//!   0  | magic "csnapfrm"                                                      |
//!   8  | version u16     | kind u8| 0      | body length u32                   |
//!  16  | pool id                                                               |
//!  24  |                                                                       |
//!  32  | term u64                                                              |
//!  40  | number of the segment or checkpoint u64                               |
//!  48  | offset of this frame in the file, bytes u64                           |
//!  56  | sequence u64                                                          |
//!  64  | hash of the frame before (32 bytes, zero for the first)               |
//!  96  | hash of this one: blake3 of bytes 0..96 and the body (32 bytes)       |
//! 128  | body, then zeros to the next multiple of 4096                         |
//! ```
//! Integers are little-endian.

use std::fmt;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use csnap_proto::{PoolId, Term};
use csnap_storage::BLOCK_BYTES;

/// Bytes before the body.
pub const HEADER_BYTES: usize = 128;
/// Largest batch, bytes: thousands of grants; and what a term may have to carry over from the one before it.
pub const BATCH_BYTES_MAX: usize = 1 << 20;
/// Largest body, bytes: a Seal that carries the largest batch. The Seal's own part is checked beside its layout.
pub const BODY_BYTES_MAX: usize = BATCH_BYTES_MAX + 144;
/// Largest frame with its padding, bytes.
pub const FRAME_BYTES_MAX: usize = padded(BODY_BYTES_MAX);

const MAGIC: [u8; 8] = *b"csnapfrm";
/// Version 1: the first.
const VERSION: u16 = 1;
const HASHED_BYTES: usize = 96;

const _: () = assert!(HEADER_BYTES == HASHED_BYTES + 32 && HEADER_BYTES < BLOCK_BYTES);
const _: () = assert!(FRAME_BYTES_MAX.is_multiple_of(BLOCK_BYTES));

/// Length on the medium of a frame with `body` bytes of body.
#[must_use]
pub const fn padded(body: usize) -> usize {
    (HEADER_BYTES + body).next_multiple_of(BLOCK_BYTES)
}

/// A blake3 hash.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Hash(pub [u8; 32]);

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// First frame of a term's journal: whose state it goes on from.
    Seal = 1,
    /// First frame of every later segment: the Seal again, and the newest checkpoint.
    Segment = 2,
    /// One batch of the journal.
    Batch = 3,
    /// One piece of a checkpoint.
    Piece = 4,
    /// End of a checkpoint: what makes it complete.
    Footer = 5,
}

/// Which sort of file a frame lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum File {
    /// `journal-<n>`.
    Journal,
    /// `checkpoint-<n>`.
    Checkpoint,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Seal, Self::Segment, Self::Batch, Self::Piece, Self::Footer]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }

    /// Where such frames are found.
    #[must_use]
    pub fn file(self) -> File {
        match self {
            Self::Seal | Self::Segment | Self::Batch => File::Journal,
            Self::Piece | Self::Footer => File::Checkpoint,
        }
    }
}

/// Where a frame belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The pool.
    pub pool: PoolId,
    /// The term that writes it.
    pub term: Term,
    /// Sort of file.
    pub file: File,
    /// Number of the segment or checkpoint.
    pub number: u64,
    /// Offset in that file, bytes.
    pub offset: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = match self.file {
            File::Journal => super::names::journal(self.term, self.number),
            File::Checkpoint => super::names::checkpoint(self.term, self.number),
        };
        write!(f, "{path} at byte {}", self.offset)
    }
}

/// A frame that was found valid at its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// Where it lies.
    pub place: Place,
    /// Number of frames before it in the line of its file (for journals: of its term).
    pub sequence: u64,
    /// Hash of the frame before it.
    pub previous: Hash,
    /// Its own.
    pub hash: Hash,
    /// What it carries.
    pub body: Bytes,
}

impl Frame {
    /// Length on the medium, bytes.
    #[must_use]
    pub fn padded_bytes(&self) -> u64 {
        padded(self.body.len()) as u64
    }
}

/// Why there is no valid frame at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// No frame starts here: the magic is missing, as in a segment's zeros.
    Blank,
    /// One was begun here, and is not (or no longer) whole, or belongs elsewhere.
    Broken(&'static str),
}

/// Encodes a frame with its padding; returns its hash too.
///
/// # Panics
/// When the body is longer than [`BODY_BYTES_MAX`]: callers cut batches to size.
#[must_use]
pub fn encode(place: &Place, kind: Kind, sequence: u64, previous: Hash, body: &[u8]) -> (Bytes, Hash) {
    assert!(body.len() <= BODY_BYTES_MAX, "a body of {} bytes is no batch", body.len());
    assert!(kind.file() == place.file, "a {kind:?} does not belong in a {:?}", place.file);
    assert!(place.offset.is_multiple_of(BLOCK_BYTES as u64), "frames start at blocks");
    let mut out = BytesMut::with_capacity(padded(body.len()));
    out.put_slice(&MAGIC);
    out.put_u16_le(VERSION);
    out.put_u8(kind as u8);
    out.put_u8(0);
    out.put_u32_le(u32::try_from(body.len()).expect("checked against the limit above"));
    out.put_slice(&place.pool.0);
    out.put_u64_le(place.term.0);
    out.put_u64_le(place.number);
    out.put_u64_le(place.offset);
    out.put_u64_le(sequence);
    out.put_slice(&previous.0);
    let hash = hash_of(&out, body);
    out.put_slice(&hash.0);
    out.put_slice(body);
    out.put_bytes(0, padded(body.len()) - out.len());
    (out.freeze(), hash)
}

fn hash_of(header: &[u8], body: &[u8]) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&header[..HASHED_BYTES]).update(body);
    Hash(*hasher.finalize().as_bytes())
}

/// Length on the medium of the frame that `start`, the first bytes found at a place, seems to begin; at most
/// [`FRAME_BYTES_MAX`]. Nothing is checked beyond the length: [`decode`] does.
pub fn peek(start: &[u8]) -> Result<usize, Damage> {
    if start.len() < HEADER_BYTES || start[..8] != MAGIC {
        return Err(Damage::Blank);
    }
    let body = u32::from_le_bytes([start[12], start[13], start[14], start[15]]) as usize;
    if body > BODY_BYTES_MAX {
        return Err(Damage::Broken("its length is beyond the limit"));
    }
    Ok(padded(body))
}

/// Checks that `bytes` start with a whole frame that belongs at `place`, and takes it apart.
pub fn decode(place: &Place, bytes: &Bytes) -> Result<Frame, Damage> {
    let length = peek(bytes)?;
    if bytes.len() < length {
        return Err(Damage::Broken("it ends early"));
    }
    let mut header = &bytes[8..HEADER_BYTES];
    if header.get_u16_le() != VERSION {
        return Err(Damage::Broken("its version is unknown"));
    }
    let kind = Kind::from_byte(header.get_u8()).ok_or(Damage::Broken("its kind is unknown"))?;
    let reserved = header.get_u8();
    let body_bytes = header.get_u32_le() as usize;
    let mut pool = [0; 16];
    header.copy_to_slice(&mut pool);
    let found = Place {
        pool: PoolId(pool),
        term: Term(header.get_u64_le()),
        file: kind.file(),
        number: header.get_u64_le(),
        offset: header.get_u64_le(),
    };
    let sequence = header.get_u64_le();
    let mut previous = Hash::default();
    header.copy_to_slice(&mut previous.0);
    let mut hash = Hash::default();
    header.copy_to_slice(&mut hash.0);
    let body = bytes.slice(HEADER_BYTES..HEADER_BYTES + body_bytes);
    if hash_of(bytes, &body) != hash {
        return Err(Damage::Broken("its hash does not match"));
    }
    if found != *place || reserved != 0 {
        return Err(Damage::Broken("it belongs elsewhere"));
    }
    if bytes[HEADER_BYTES + body_bytes..length].iter().any(|byte| *byte != 0) {
        return Err(Damage::Broken("its padding is not zero"));
    }
    Ok(Frame { kind, place: found, sequence, previous, hash, body })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Place {
        Place { pool: PoolId([7; 16]), term: Term(3), file: File::Journal, number: 2, offset: 8192 }
    }

    #[test]
    fn a_frame_is_valid_only_where_it_was_written() {
        let (bytes, hash) = encode(&place(), Kind::Batch, 9, Hash([1; 32]), b"body");
        assert_eq!(bytes.len(), BLOCK_BYTES);
        let frame = decode(&place(), &bytes).expect("valid at its place");
        assert_eq!((frame.hash, frame.sequence, &frame.body[..]), (hash, 9, &b"body"[..]));
        let elsewhere = [
            Place { pool: PoolId([8; 16]), ..place() },
            Place { term: Term(4), ..place() },
            Place { number: 3, ..place() },
            Place { offset: 4096, ..place() },
            Place { file: File::Checkpoint, ..place() },
        ];
        for other in elsewhere {
            assert_eq!(decode(&other, &bytes), Err(Damage::Broken("it belongs elsewhere")), "{other:?}");
        }
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let (bytes, _) = encode(&place(), Kind::Batch, 9, Hash([1; 32]), &[5; 200]);
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&place(), &damaged.into()).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn every_cut_is_seen() {
        let (bytes, _) = encode(&place(), Kind::Batch, 9, Hash([1; 32]), &[5; 5000]);
        for end in 0..bytes.len() {
            assert!(decode(&place(), &bytes.slice(..end)).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn a_hostile_length_allocates_nothing() {
        let mut bytes = encode(&place(), Kind::Batch, 0, Hash::default(), b"").0.to_vec();
        bytes[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(peek(&bytes), Err(Damage::Broken("its length is beyond the limit")));
        assert_eq!(peek(&[]), Err(Damage::Blank));
        assert_eq!(peek(&[0; BLOCK_BYTES]), Err(Damage::Blank));
    }
}
