//! Frames: how a message travels on a byte stream.
//!
//! ```text
//! offset  size  field
//!      0     4  magic "CSNP"
//!      4     1  version of the framing and of every message in it
//!      5     1  family: which conversation and direction, see [`crate::message::Family`]
//!      6     2  zero
//!      8     4  length of the body, bytes
//!     12     4  CRC-32C of the frame with this field zero
//!     16     8  request id: an answer carries its request's; 0 where nothing is answered
//!     24     8  term of the sending server, 0 from anyone else
//!     32     …  body: the message of that family in postcard
//! ```
//!
//! Numbers are little endian. Invariants: a decoder holds at most one frame of unparsed bytes per stream; a length is
//! checked before anything is allocated for it; after an error the stream cannot be used further.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::ids::{RequestId, Term};
use crate::limits::{FRAME_BYTES_MAX, INTRODUCTION_BYTES_MAX};
use crate::message::Family;

const MAGIC: [u8; 4] = *b"CSNP";

/// Version of the framing and the messages.
///
/// 1: the first. 2: lists in pages, Reaped names heads, Fence takes nodes. 3: flags, persistent locks and keys of lockd.
/// 4: volumes and snapshots with their identities. 5: lockds as a group, lockspaces.
pub const VERSION: u8 = 5;

/// Bytes of the header.
pub const HEADER_BYTES: usize = 32;

/// Largest body.
pub const BODY_BYTES_MAX: usize = FRAME_BYTES_MAX - HEADER_BYTES;

/// One message with what travels beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame<M> {
    /// Which request this is or answers; 0 for neither.
    pub id: RequestId,
    /// Term of the sending server; 0 from anyone else.
    pub term: Term,
    /// What is said.
    pub message: M,
}

/// Why bytes are not a frame. The connection they came on is of no more use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not our protocol at all.
    #[error("does not start with the magic of a frame")]
    Magic,
    /// A version that this build does not speak.
    #[error("version {0}, this build speaks {VERSION}")]
    Version(u8),
    /// Another conversation than the one that this socket is for.
    #[error("family {0} on a connection for another one")]
    Family(u8),
    /// Reserved bytes set.
    #[error("reserved bytes are not zero")]
    Reserved,
    /// A body beyond what is taken: [`BODY_BYTES_MAX`], or less from strangers.
    #[error("body of {bytes} bytes, at most {most} are allowed")]
    TooLong {
        /// Its own.
        bytes: u64,
        /// Of bodies at that time.
        most: usize,
    },
    /// Checksum mismatch.
    #[error("checksum does not match")]
    Checksum,
    /// The body is not a message of its family, or has bytes left over, or breaks a limit of its fields.
    #[error("body is not a valid message: {0}")]
    Body(&'static str),
}

/// A message that can be framed: it knows its family and checks its own limits after decoding.
pub trait Message: Serialize + DeserializeOwned {
    /// The conversation and direction that this message belongs to.
    const FAMILY: Family;

    /// Checks what the types alone do not: numbers of ranges, lengths of texts. The answer names the broken limit.
    fn check(&self) -> Result<(), &'static str> {
        Ok(())
    }
}

/// Appends the frame to `out`. A message that does not fit a frame is a bug of the sender: senders split first.
pub fn encode<M: Message>(frame: &Frame<M>, out: &mut BytesMut) {
    debug_assert_eq!(frame.message.check(), Ok(()));
    let start = out.len();
    out.put_slice(&MAGIC);
    out.put_u8(VERSION);
    out.put_u8(M::FAMILY as u8);
    out.put_bytes(0, 10);
    out.put_u64_le(frame.id.0);
    out.put_u64_le(frame.term.0);
    postcard::to_io(&frame.message, out.writer()).expect("writing to memory does not fail");
    let body_len = out.len() - start - HEADER_BYTES;
    assert!(body_len <= BODY_BYTES_MAX, "a message of {body_len} bytes was not split");
    let body_len = u32::try_from(body_len).expect("checked above");
    out[start + 8..start + 12].copy_from_slice(&body_len.to_le_bytes());
    let crc = crc32c::crc32c(&out[start..]);
    out[start + 12..start + 16].copy_from_slice(&crc.to_le_bytes());
}

/// Takes the next frame off the front of `input`: `None` when it is not complete yet.
pub fn decode<M: Message>(input: &mut BytesMut) -> Result<Option<Frame<M>>, FrameError> {
    decode_within(input, BODY_BYTES_MAX)
}

fn decode_within<M: Message>(
    input: &mut BytesMut,
    body_bytes_max: usize,
) -> Result<Option<Frame<M>>, FrameError> {
    let Some(body_len) = peek::<M>(input, body_bytes_max)? else { return Ok(None) };
    let frame_len = HEADER_BYTES + body_len;
    if input.len() < frame_len {
        input.reserve(frame_len - input.len());
        return Ok(None);
    }
    let frame = input.split_to(frame_len).freeze();
    parse(frame).map(Some)
}

/// Checks as much of the header as is there; the body's length once all of it is.
fn peek<M: Message>(input: &[u8], body_bytes_max: usize) -> Result<Option<usize>, FrameError> {
    let seen = input.len().min(4);
    if input[..seen] != MAGIC[..seen] {
        return Err(FrameError::Magic);
    }
    if let Some(&version) = input.get(4).filter(|&&v| v != VERSION) {
        return Err(FrameError::Version(version));
    }
    if let Some(&family) = input.get(5).filter(|&&f| f != M::FAMILY as u8) {
        return Err(FrameError::Family(family));
    }
    let Some(header) = input.get(..HEADER_BYTES) else { return Ok(None) };
    if header[6..8] != [0, 0] {
        return Err(FrameError::Reserved);
    }
    let body_len = u32::from_le_bytes(header[8..12].try_into().expect("four bytes")) as usize;
    if body_len > body_bytes_max {
        return Err(FrameError::TooLong { bytes: body_len as u64, most: body_bytes_max });
    }
    Ok(Some(body_len))
}

fn parse<M: Message>(frame: Bytes) -> Result<Frame<M>, FrameError> {
    let claimed = u32::from_le_bytes(frame[12..16].try_into().expect("four bytes"));
    let crc = crc32c::crc32c_append(crc32c::crc32c(&frame[..12]), &[0; 4]);
    if crc32c::crc32c_append(crc, &frame[16..]) != claimed {
        return Err(FrameError::Checksum);
    }
    let mut rest = frame.slice(16..);
    let id = RequestId(rest.get_u64_le());
    let term = Term(rest.get_u64_le());
    let (message, left) =
        postcard::take_from_bytes::<M>(&rest).map_err(|_| FrameError::Body("does not decode"))?;
    if !left.is_empty() {
        return Err(FrameError::Body("bytes after the message"));
    }
    message.check().map_err(FrameError::Body)?;
    Ok(Frame { id, term, message })
}

/// The receiving half of a stream: bytes in, frames out. Holds at most one incomplete frame.
#[derive(Debug)]
pub struct FrameDecoder {
    buffer: BytesMut,
    /// Of the next frame.
    body_bytes_max: usize,
}

impl Default for FrameDecoder {
    /// Of a peer that may say whatever a frame takes.
    fn default() -> Self {
        Self { buffer: BytesMut::new(), body_bytes_max: BODY_BYTES_MAX }
    }
}

impl FrameDecoder {
    /// Of a peer that has yet to say who it is: its first frame has [`INTRODUCTION_BYTES_MAX`] at most.
    #[must_use]
    pub fn of_a_stranger() -> Self {
        Self { buffer: BytesMut::new(), body_bytes_max: INTRODUCTION_BYTES_MAX - HEADER_BYTES }
    }

    /// Where the next bytes from the stream go; call [`Self::next`] until it gives `None` after each read.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The next complete frame.
    #[expect(clippy::should_implement_trait, reason = "the caller says which messages it expects")]
    pub fn next<M: Message>(&mut self) -> Result<Option<Frame<M>>, FrameError> {
        let frame = decode_within(&mut self.buffer, self.body_bytes_max)?;
        if frame.is_some() {
            self.body_bytes_max = BODY_BYTES_MAX;
        }
        Ok(frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::lock::ToLockd;
    use crate::message::volume::ToServer;
    use crate::units::{Chunk, ChunkRange};

    fn sample() -> Frame<ToServer> {
        let ranges = vec![ChunkRange { first: Chunk(7), count: 3 }];
        Frame { id: RequestId(9), term: Term(0), message: ToServer::QueryWrite { ranges } }
    }

    fn encoded() -> BytesMut {
        let mut bytes = BytesMut::new();
        encode(&sample(), &mut bytes);
        bytes
    }

    #[test]
    fn a_frame_comes_back_however_it_is_cut() {
        let whole = encoded();
        for cut in 0..whole.len() {
            let mut decoder = FrameDecoder::default();
            decoder.buffer().extend_from_slice(&whole[..cut]);
            assert_eq!(decoder.next::<ToServer>(), Ok(None), "cut at {cut}");
            decoder.buffer().extend_from_slice(&whole[cut..]);
            assert_eq!(decoder.next(), Ok(Some(sample())));
            assert_eq!(decoder.next::<ToServer>(), Ok(None));
        }
    }

    #[test]
    fn a_stranger_introduces_itself_in_a_short_frame_and_then_says_what_it_likes() {
        let long = |body: usize| {
            let mut bytes = encoded();
            bytes.truncate(HEADER_BYTES);
            bytes[8..12].copy_from_slice(&u32::try_from(body).expect("short").to_le_bytes());
            bytes
        };
        let most = INTRODUCTION_BYTES_MAX - HEADER_BYTES;
        let mut decoder = FrameDecoder::of_a_stranger();
        decoder.buffer().extend_from_slice(&long(most + 1));
        let too_long = FrameError::TooLong { bytes: most as u64 + 1, most };
        assert_eq!(decoder.next::<ToServer>(), Err(too_long));
        let mut decoder = FrameDecoder::of_a_stranger();
        decoder.buffer().extend_from_slice(&encoded());
        assert_eq!(decoder.next(), Ok(Some(sample())));
        decoder.buffer().extend_from_slice(&long(BODY_BYTES_MAX));
        assert_eq!(decoder.next::<ToServer>(), Ok(None));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let whole = encoded();
        for bit in 0..whole.len() * 8 {
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let longer_length = matches!(decode::<ToServer>(&mut damaged.clone()), Ok(None));
            assert!(longer_length || decode::<ToServer>(&mut damaged).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn lengths_are_checked_before_anything_is_allocated() {
        let mut bytes = encoded();
        bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        let too_long = FrameError::TooLong { bytes: u64::from(u32::MAX), most: BODY_BYTES_MAX };
        assert_eq!(decode::<ToServer>(&mut bytes), Err(too_long));
        assert!(bytes.capacity() < 4096);
    }

    #[test]
    fn another_conversation_is_refused() {
        assert_eq!(decode::<ToLockd>(&mut encoded()), Err(FrameError::Family(1)));
    }

    #[test]
    fn limits_of_fields_hold_after_decoding() {
        let ranges = vec![ChunkRange { first: Chunk(u64::MAX), count: 2 }];
        let body = postcard::to_stdvec(&ToServer::QueryWrite { ranges }).expect("encodes");
        let mut bytes = encoded();
        bytes.truncate(HEADER_BYTES);
        bytes.extend_from_slice(&body);
        let len = u32::try_from(body.len()).expect("short");
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..16].copy_from_slice(&[0; 4]);
        let crc = crc32c::crc32c(&bytes);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(decode::<ToServer>(&mut bytes), Err(FrameError::Body("an empty or overflowing range")));
    }
}
