//! Replies, written into the connection's output window. Once structured replies are negotiated, those with data are: a
//! READ must be answered so, and so is an error, which can then bring its text. What has nothing to tell stays a simple
//! reply, as the protocol allows: clients take it in with one read of their socket instead of two.
//!
//! The caller has made sure of room ([`super::limits::REPLY_ROOM_BYTES`] beside data).

use super::errno::Errno;
use super::limits::MESSAGE_BYTES_MAX;
use super::status::Descriptor;
use super::window::Window;
use super::wire::{CHUNK_HEADER_BYTES, CHUNK_MAGIC, SIMPLE_REPLY_BYTES, SIMPLE_REPLY_MAGIC, chunk};

/// Id of `base:allocation` on the wire.
pub const BASE_ALLOCATION_ID: u32 = 1;

fn put_simple(out: &mut Window, errno: u32, cookie: u64) {
    let mut bytes = [0; SIMPLE_REPLY_BYTES];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&errno.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    out.put(&bytes);
}

fn put_chunk(out: &mut Window, flags: u16, kind: u16, cookie: u64, len: usize) {
    let len = u32::try_from(len).expect("chunks are far below 4 GiB");
    let mut bytes = [0; CHUNK_HEADER_BYTES];
    bytes[..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&len.to_be_bytes());
    out.put(&bytes);
}

/// Done, nothing to tell. Not for a READ.
pub fn done(out: &mut Window, cookie: u64) {
    put_simple(out, 0, cookie);
}

/// The whole answer to a READ of nothing.
pub fn no_data(out: &mut Window, structured: bool, cookie: u64) {
    if structured {
        put_chunk(out, chunk::DONE, chunk::NONE, cookie, 0);
    } else {
        put_simple(out, 0, cookie);
    }
}

/// Not done. Ends the reply, also after chunks of data.
pub fn error(out: &mut Window, structured: bool, cookie: u64, errno: Errno, message: &str) {
    if !structured {
        return put_simple(out, errno.0, cookie);
    }
    let cut = (0..=MESSAGE_BYTES_MAX.min(message.len()))
        .rev()
        .find(|&at| message.is_char_boundary(at))
        .unwrap_or(0);
    let message = &message.as_bytes()[..cut];
    put_chunk(out, chunk::DONE, chunk::ERROR, cookie, 6 + message.len());
    out.put(&errno.0.to_be_bytes());
    out.put(&u16::try_from(message.len()).expect("cut to 4 KiB").to_be_bytes());
    out.put(message);
}

/// Bytes of what [`data_header`] writes.
#[must_use]
pub fn data_header_bytes(structured: bool) -> usize {
    if structured { CHUNK_HEADER_BYTES + 8 } else { SIMPLE_REPLY_BYTES }
}

/// Announces `len` bytes of data from `offset`, which follow; `last` if no more of this reply does. A simple reply has
/// all its data at once.
pub fn data_header(out: &mut Window, structured: bool, cookie: u64, offset: u64, len: usize, last: bool) {
    if structured {
        let flags = if last { chunk::DONE } else { 0 };
        put_chunk(out, flags, chunk::OFFSET_DATA, cookie, 8 + len);
        out.put(&offset.to_be_bytes());
    } else {
        assert!(last, "a simple reply cannot be cut");
        put_simple(out, 0, cookie);
    }
}

/// The answer to BLOCK_STATUS. `extents` is not empty. Only ever asked with structured replies negotiated.
pub fn block_status(out: &mut Window, cookie: u64, extents: &[Descriptor]) {
    put_chunk(out, chunk::DONE, chunk::BLOCK_STATUS, cookie, 4 + 8 * extents.len());
    out.put(&BASE_ALLOCATION_ID.to_be_bytes());
    for extent in extents {
        out.put(&extent.len.to_be_bytes());
        out.put(&extent.flags.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(write: impl FnOnce(&mut Window)) -> Vec<u8> {
        let mut out = Window::new(16384);
        write(&mut out);
        out.filled().to_vec()
    }

    #[test]
    fn simple_replies_have_no_text() {
        let bytes = written(|out| error(out, false, 0x0102, Errno::EIO, "the disk is gone"));
        assert_eq!(bytes, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(written(|out| data_header(out, false, 1, 0, 512, true)), written(|out| done(out, 1)));
    }

    #[test]
    fn a_read_of_nothing_is_answered_in_the_negotiated_way() {
        assert_eq!(written(|out| no_data(out, false, 7)), written(|out| done(out, 7)));
        let chunk = [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0];
        assert_eq!(written(|out| no_data(out, true, 7)), chunk);
    }

    #[test]
    fn structured_errors_bring_their_text() {
        let bytes = written(|out| error(out, true, 9, Errno::EINVAL, "why"));
        let mut expected = vec![0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 9];
        expected.extend_from_slice(&[0, 0, 0, 22, 0, 3, b'w', b'h', b'y']);
        assert_eq!(bytes, expected);
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let bytes = written(|out| error(out, true, 9, Errno::EIO, &"ä".repeat(4000)));
        assert_eq!(bytes.len(), CHUNK_HEADER_BYTES + 6 + MESSAGE_BYTES_MAX);
        let odd = format!("x{}", "ä".repeat(4000));
        let bytes = written(|out| error(out, true, 9, Errno::EIO, &odd));
        assert_eq!(bytes.len(), CHUNK_HEADER_BYTES + 6 + MESSAGE_BYTES_MAX - 1);
    }

    #[test]
    fn data_may_come_in_chunks() {
        let bytes = written(|out| data_header(out, true, 3, 65536, 512, false));
        assert_eq!(bytes.len(), data_header_bytes(true));
        assert_eq!(bytes[4..8], [0, 0, 0, 1]);
        assert_eq!(bytes[16..], [0, 0, 2, 8, 0, 0, 0, 0, 0, 1, 0, 0]);
    }

    #[test]
    fn block_status_lists_extents_of_one_context() {
        let bytes = written(|out| block_status(out, 3, &[Descriptor { len: 4096, flags: 3 }]));
        assert_eq!(bytes[4..8], [0, 1, 0, 5]);
        assert_eq!(bytes[16..], [0, 0, 0, 12, 0, 0, 0, 1, 0, 0, 0x10, 0, 0, 0, 0, 3]);
    }
}
