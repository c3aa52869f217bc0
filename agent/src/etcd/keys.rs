//! Names and contents of the keys below the prefix.
//!
//! Contents are a version and postcard. What does not decode was not written by this version of csnap: a member is
//! passed over, anything else ends the session with a line that names the key.

use csnap_proto::limits::{MEMBER_INFO_BYTES_MAX, NAME_BYTES_MAX, VALUE_BLOCK_BYTES_MAX};
use csnap_proto::{Name, SessionId, Term};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// First byte of every content. 1: the only one so far.
const VERSION: u8 = 1;

/// Longest content that csnap writes, with room for what stands around it.
const CONTENT_BYTES_MAX: usize = MEMBER_INFO_BYTES_MAX + NAME_BYTES_MAX + VALUE_BLOCK_BYTES_MAX + 64;

/// Highest term that is believed: beyond it no room would be left to grow.
pub(super) const TERM_MAX: Term = Term(u64::MAX / 2);

const MEMBERS: &str = "members/";

/// A key, without the prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// A live session.
    Member(SessionId),
    /// Who holds the server lock.
    Lock,
    /// The highest term.
    Term,
    /// The value block.
    Value,
}

impl Key {
    /// As etcd has it.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::Member(session) => format!("{MEMBERS}{session}"),
            Self::Lock => "lock".to_owned(),
            Self::Term => "term".to_owned(),
            Self::Value => "value".to_owned(),
        }
    }

    /// The key of that name; none if it is not one of ours.
    pub(super) fn parse(name: &[u8]) -> Option<Self> {
        match name {
            b"lock" => return Some(Self::Lock),
            b"term" => return Some(Self::Term),
            b"value" => return Some(Self::Value),
            _ => {}
        }
        let digits = std::str::from_utf8(name.strip_prefix(MEMBERS.as_bytes())?).ok()?;
        let mut id = [0; 16];
        if digits.len() != 2 * id.len() || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        for (i, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).ok()?;
        }
        Some(Self::Member(SessionId(id)))
    }
}

/// A live session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    /// Its node.
    pub node: Name,
    /// What it published.
    pub info: Vec<u8>,
}

/// Who holds the lock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockRecord {
    /// The session.
    pub session: SessionId,
    /// Its term.
    pub term: Term,
    /// Term of the holder before it: what that one left is the value until this one writes.
    pub after: Term,
}

/// The value block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ValueRecord {
    /// Session of the writer.
    pub session: SessionId,
    /// Term under which it was written.
    pub term: Term,
    /// Its writer's last word, written in the transaction in which it let the lock go.
    pub last: bool,
    /// Content; empty for none.
    pub bytes: Vec<u8>,
}

/// The content of a key.
pub(super) fn encode(record: &impl Serialize) -> Vec<u8> {
    let bytes = postcard::to_stdvec(record).expect("a record encodes");
    [&[VERSION], bytes.as_slice()].concat()
}

fn decode<T: DeserializeOwned>(content: &[u8]) -> Option<T> {
    let body = content.strip_prefix(&[VERSION]).filter(|body| body.len() <= CONTENT_BYTES_MAX)?;
    postcard::from_bytes(body).ok()
}

pub(super) fn decode_member(content: &[u8]) -> Option<MemberRecord> {
    decode(content).filter(|record: &MemberRecord| record.info.len() <= MEMBER_INFO_BYTES_MAX)
}

pub(super) fn decode_lock(content: &[u8]) -> Option<LockRecord> {
    decode(content).filter(|record: &LockRecord| record.after < record.term && record.term <= TERM_MAX)
}

pub(super) fn decode_term(content: &[u8]) -> Option<Term> {
    decode(content).filter(|term| *term <= TERM_MAX)
}

pub(super) fn decode_value(content: &[u8]) -> Option<ValueRecord> {
    decode(content).filter(|record: &ValueRecord| record.bytes.len() <= VALUE_BLOCK_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_found_by_its_name_and_no_other_name_is_a_key() {
        for key in [Key::Lock, Key::Term, Key::Value, Key::Member(SessionId([0xa7; 16]))] {
            assert_eq!(Key::parse(key.name().as_bytes()), Some(key));
        }
        let almost = ["", "members/", "members/a7", "locks", &format!("members/{}", "+1".repeat(16))];
        for name in almost {
            assert_eq!(Key::parse(name.as_bytes()), None, "{name}");
        }
    }

    #[test]
    fn no_content_panics_and_only_what_was_written_decodes() {
        let record = LockRecord { session: SessionId([1; 16]), term: Term(7), after: Term(3) };
        let content = encode(&record);
        assert_eq!(decode_lock(&content), Some(record.clone()));
        for end in 0..content.len() {
            assert_eq!(decode_lock(&content[..end]), None);
        }
        assert_eq!(decode_lock(&encode(&LockRecord { after: Term(7), ..record })), None);
        assert_eq!(decode_term(&encode(&Term(u64::MAX))), None);
        assert_eq!(decode_value(&[0xff; 5000]), None);
    }
}
