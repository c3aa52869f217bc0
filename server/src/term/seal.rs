//! The Seal: the first record of a term's journal, by which it says whose state it goes on from.
//!
//! It names the base exactly: position, hash of the last frame below it, and the checkpoint that the state starts from.
//! Whatever the base's server writes later is beyond that position and read by nobody.
//!
//! **The carried batch.** Of the base's frames all but the last were durable before the last was written. The last may be
//! readable only because it sits in a cache; if its sync failed, no later sync tells (the kernel marks the pages clean).
//! So a term does not rely on it: it carries the batch over in its Seal, which is durable as a whole or not there.
//! For the same reason a base whose last frame is its Seal is not named: what *its* Seal says is said again.
//!
//! Every later segment begins with the same record again (kind Segment, nothing carried), naming the newest checkpoint.
//!
//! ```text
//!        0        1        2        3        4        5        6        7
//!   0  | flags u32: 1 base, 2 checkpoint, 4 carried | carried length u32       |
//!   8  | base term u64                                                         |
//!  16  | base position u64                                                     |
//!  24  | hash of the base's frame before that position (32 bytes)              |
//!  56  | checkpoint term u64                                                   |
//!  64  | checkpoint number u64                                                 |
//!  72  | checkpoint position: frames of its term that it includes u64          |
//!  80  | hash of the checkpoint's footer (32 bytes)                            |
//! 112  | hash of the carried frame (32 bytes)                                  |
//! 144  | the carried batch                                                     |
//! ```
//! What a flag says is absent is zero.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use csnap_proto::Term;

use super::frame::{self, BATCH_BYTES_MAX, BODY_BYTES_MAX, Hash, Kind, Place};
use super::{Corrupt, Position};

/// Bytes of the record without a carried batch.
pub const SEAL_BYTES: usize = 144;

const _: () = assert!(SEAL_BYTES + BATCH_BYTES_MAX == BODY_BYTES_MAX);

const HAS_BASE: u32 = 1;
const HAS_CHECKPOINT: u32 = 2;
const HAS_CARRIED: u32 = 4;

/// Whose state a term goes on from. Without a base it is that of a new pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seal {
    /// Where the state ends.
    pub base: Option<Base>,
    /// Where it starts; without one, at a new pool.
    pub checkpoint: Option<CheckpointName>,
    /// The batch at the base's position, which belongs to the state too.
    pub carried: Option<Carried>,
}

/// A position in the journal of an earlier term.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// That term.
    pub term: Term,
    /// Frames of it that count.
    pub position: Position,
    /// Hash of the last of them.
    pub hash: Hash,
}

/// A checkpoint, and what it contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointName {
    /// The term that wrote it.
    pub term: Term,
    /// Its number in that term.
    pub number: u64,
    /// It is the state of its term at this position.
    pub position: Position,
    /// Hash of its footer, which covers all of it.
    pub hash: Hash,
}

/// The last batch of the base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Carried {
    /// Hash of the frame that it was.
    pub hash: Hash,
    /// The batch.
    pub body: Bytes,
}

impl Seal {
    /// The record's body.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let carried = self.carried.as_ref().map_or(&[][..], |carried| &carried.body);
        assert!(carried.len() <= BATCH_BYTES_MAX, "batches were checked when they were appended");
        let flag = |present: bool, bit: u32| if present { bit } else { 0 };
        let mut out = BytesMut::with_capacity(SEAL_BYTES + carried.len());
        out.put_u32_le(
            flag(self.base.is_some(), HAS_BASE)
                | flag(self.checkpoint.is_some(), HAS_CHECKPOINT)
                | flag(self.carried.is_some(), HAS_CARRIED),
        );
        out.put_u32_le(u32::try_from(carried.len()).expect("far below 4 GiB"));
        let base = self.base.unwrap_or(Base { term: Term(0), position: Position(0), hash: Hash::default() });
        out.put_u64_le(base.term.0);
        out.put_u64_le(base.position.0);
        out.put_slice(&base.hash.0);
        let nothing =
            CheckpointName { term: Term(0), number: 0, position: Position(0), hash: Hash::default() };
        let checkpoint = self.checkpoint.unwrap_or(nothing);
        out.put_u64_le(checkpoint.term.0);
        out.put_u64_le(checkpoint.number);
        out.put_u64_le(checkpoint.position.0);
        out.put_slice(&checkpoint.hash.0);
        out.put_slice(&self.carried.as_ref().map_or(Hash::default(), |carried| carried.hash).0);
        out.put_slice(carried);
        out.freeze()
    }

    /// The first frame of a journal, at its `place`, with its padding.
    pub(super) fn first_frame(&self, place: &Place) -> Bytes {
        frame::encode(place, Kind::Seal, 0, Hash::default(), &self.encode()).0
    }

    /// Takes apart the body of a Seal or Segment frame of `term`. The frame was valid, so a refusal means another version or
    /// a bug; it is checked all the same.
    pub fn decode(term: Term, body: &Bytes) -> Result<Self, Corrupt> {
        if body.len() < SEAL_BYTES {
            return Err(Corrupt::new("a Seal that is too short"));
        }
        let mut fields = body.slice(..SEAL_BYTES);
        let flags = fields.get_u32_le();
        let carried_bytes = fields.get_u32_le() as usize;
        if flags & !(HAS_BASE | HAS_CHECKPOINT | HAS_CARRIED) != 0 {
            return Err(Corrupt::new("a Seal with unknown flags"));
        }
        let base = Base {
            term: Term(fields.get_u64_le()),
            position: Position(fields.get_u64_le()),
            hash: take_hash(&mut fields),
        };
        let checkpoint = CheckpointName {
            term: Term(fields.get_u64_le()),
            number: fields.get_u64_le(),
            position: Position(fields.get_u64_le()),
            hash: take_hash(&mut fields),
        };
        let carried = Carried { hash: take_hash(&mut fields), body: body.slice(SEAL_BYTES..) };
        if carried.body.len() != carried_bytes || (flags & HAS_CARRIED == 0 && carried_bytes > 0) {
            return Err(Corrupt::new("a Seal of the wrong length"));
        }
        let seal = Self {
            base: (flags & HAS_BASE != 0).then_some(base),
            checkpoint: (flags & HAS_CHECKPOINT != 0).then_some(checkpoint),
            carried: (flags & HAS_CARRIED != 0).then_some(carried),
        };
        seal.check(term)?;
        Ok(seal)
    }

    /// Bases lie below, so that following them ends; a checkpoint is the base's, an older term's, or our own.
    fn check(&self, term: Term) -> Result<(), Corrupt> {
        if self.base.is_some_and(|base| base.term >= term) {
            return Err(Corrupt::new("a Seal whose base is not an earlier term"));
        }
        let own_or_reached =
            |name: &CheckpointName| name.term == term || self.base.is_some_and(|base| name.term <= base.term);
        if !self.checkpoint.as_ref().is_none_or(own_or_reached) {
            return Err(Corrupt::new("a Seal whose checkpoint is beyond its base"));
        }
        if self.carried.is_some() && self.base.is_none() {
            return Err(Corrupt::new("a Seal that carries a batch of no base"));
        }
        Ok(())
    }

    /// The record that begins a later segment of the same term.
    #[must_use]
    pub fn again(&self, checkpoint: Option<CheckpointName>) -> Self {
        // A carried batch needs its base; a segment record only tells the verifier where the term came from.
        Self { base: self.base, checkpoint, carried: None }
    }
}

fn take_hash(fields: &mut Bytes) -> Hash {
    let mut hash = Hash::default();
    fields.copy_to_slice(&mut hash.0);
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Seal {
        Seal {
            base: Some(Base { term: Term(4), position: Position(9), hash: Hash([1; 32]) }),
            checkpoint: Some(CheckpointName {
                term: Term(2),
                number: 3,
                position: Position(5),
                hash: Hash([2; 32]),
            }),
            carried: Some(Carried { hash: Hash([3; 32]), body: Bytes::from_static(b"batch") }),
        }
    }

    #[test]
    fn a_seal_reads_back_as_written() {
        for seal in [full(), Seal::default(), full().again(None), Seal { carried: None, ..full() }] {
            let bytes = seal.encode();
            assert_eq!(Seal::decode(Term(5), &bytes), Ok(seal));
        }
    }

    #[test]
    fn a_seal_that_leads_nowhere_is_refused() {
        let bytes = full().encode();
        assert!(Seal::decode(Term(4), &bytes).is_err(), "its base is itself");
        for end in 0..bytes.len() {
            assert!(Seal::decode(Term(5), &bytes.slice(..end)).is_err(), "cut at {end}");
        }
        let mut flags = bytes.to_vec();
        flags[0] |= 8;
        assert!(Seal::decode(Term(5), &flags.into()).is_err());
    }
}
