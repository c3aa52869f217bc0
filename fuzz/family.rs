//! What every family of messages must stand.

use bytes::BytesMut;
use csnap_proto::frame::{self, Message};
use csnap_proto::{Frame, RequestId, Term};

/// Decodes `data` as it is, and as a body; checks that decode → encode → decode is the identity.
pub fn check<M: Message + PartialEq + std::fmt::Debug>(data: &[u8]) {
    let mut raw = BytesMut::from(data);
    while let Ok(Some(frame)) = frame::decode::<M>(&mut raw) {
        comes_back(&frame);
    }
    let mut framed = BytesMut::new();
    frame_around::<M>(data, &mut framed);
    if let Ok(Some(frame)) = frame::decode::<M>(&mut framed) {
        comes_back(&frame);
    }
}

fn comes_back<M: Message + PartialEq + std::fmt::Debug>(first: &Frame<M>) {
    let mut bytes = BytesMut::new();
    frame::encode(first, &mut bytes);
    let second = frame::decode::<M>(&mut bytes).expect("our own frame decodes").expect("it is complete");
    assert_eq!(*first, second);
    assert!(bytes.is_empty());
}

/// A frame with a right header and checksum around any body.
fn frame_around<M: Message>(body: &[u8], out: &mut BytesMut) {
    out.extend_from_slice(b"CSNP");
    out.extend_from_slice(&[frame::VERSION, M::FAMILY as u8, 0, 0]);
    out.extend_from_slice(&u32::try_from(body.len()).expect("short").to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&RequestId(7).0.to_le_bytes());
    out.extend_from_slice(&Term(3).0.to_le_bytes());
    out.extend_from_slice(body);
    let crc = crc32c::crc32c(out);
    out[12..16].copy_from_slice(&crc.to_le_bytes());
}
