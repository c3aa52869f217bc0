//! Names and numbers of things. A newtype for each, so that a term is never passed for an epoch.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::limits::NAME_BYTES_MAX;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        pub struct $name(pub $inner);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl $name {
            /// The number after this one. Running out of 64 bits is a bug, not an input.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.checked_add(1).expect("counters of 64 bits do not run out"))
            }
        }
    };
}

macro_rules! token {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:02x}{:02x}{:02x}{:02x}…)"),
                    self.0[0], self.0[1], self.0[2], self.0[3])
            }
        }
    };
}

number! {
    /// The number of a server's reign: given by lockd with every writer-mode grant of the server lock; it only
    /// grows. A server *is* its term.
    Term(u64)
}
number! {
    /// A stretch of a volume's life between two snapshots. A snapshot *is* the epoch that it ended. The first epoch
    /// of a volume is 1; 0 as a birth means "before every live snapshot".
    Epoch(u64)
}
number! {
    /// Identity of a volume, never reused: the creating term in the upper 32 bits, a counter of that term below, so
    /// that two servers that each believe to reign cannot give the same id.
    VolumeId(u64)
}
number! {
    /// Matches an answer to its request on one connection. Chosen by the requester; never reused on a connection.
    RequestId(u64)
}
number! {
    /// Position of a mutating request in its session: a resend carries the same one and gets the stored result.
    Sequence(u64)
}
number! {
    /// A snapshot read in flight, chosen by the reader, unique on its connection.
    ReadId(u64)
}
number! {
    /// A numbered batch of freed store locations, to be forgotten by clients before it is reused.
    FreeBatchId(u64)
}
number! {
    /// A lock of lockd, never reused.
    LockId(u64)
}
number! {
    /// Number of a change of lockd's keys; it only grows, over all keys, so that a key's version never comes back.
    Revision(u64)
}
number! {
    /// Position of an event in the stream of events of a lockd session; starts at 1.
    EventNumber(u64)
}

impl VolumeId {
    /// The `counter`th volume that `term` creates. Fails when either does not fit its 32 bits.
    #[must_use]
    pub fn new(term: Term, counter: u32) -> Option<Self> {
        u32::try_from(term.0).ok().map(|term| Self(u64::from(term) << 32 | u64::from(counter)))
    }

    /// Name of the volume's head in `POOL/head/`.
    #[must_use]
    pub fn file_name(self) -> String {
        format!("{:08x}-{:08x}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

impl Epoch {
    /// Birth of what is older than every live snapshot.
    pub const BEFORE_ALL: Self = Self(0);
    /// The epoch in which a volume starts.
    pub const FIRST: Self = Self(1);
}

token! {
    /// Identity of a client session (an attachment of a volume or snapshot, or an operator), or of a lockd session.
    /// Drawn at random by its owner; outlives connections.
    SessionId
}
token! {
    /// Identity of the owner of persistent locks of lockd, drawn at random by it; outlives sessions.
    OwnerId
}
token! {
    /// Proof of ownership of a session, shown at each resume, or of a persistent lock, shown at each adoption. Whoever
    /// lacks it cannot take either over.
    Secret
}
token! {
    /// Identity of one move of a lockspace between two groups of lockds, drawn by who asks for it.
    MigrationId
}
token! {
    /// One run of one process: tells a restarted exporter from the one before it.
    InstanceId
}
token! {
    /// Identity of one snapshot create or other operator request, kept by the requester over resends.
    RequestToken
}
token! {
    /// Identity of a pool, drawn when it is made.
    PoolId
}
token! {
    /// One group of lockd's replicas, drawn when it is formed: neither replicas nor clients of two groups ever mix.
    ClusterId
}

impl std::str::FromStr for ClusterId {
    type Err = ClusterIdError;

    /// Reads what its `Display` writes: 32 hexadecimal digits.
    fn from_str(text: &str) -> Result<Self, ClusterIdError> {
        let all_digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = u128::from_str_radix(text, 16).ok().filter(|_| all_digits);
        number.map(|number| Self(number.to_be_bytes())).ok_or(ClusterIdError)
    }
}

/// A text that is no id of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the id of a cluster has 32 hexadecimal digits")]
pub struct ClusterIdError;

/// Why a text is not a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing there.
    #[error("a name cannot be empty")]
    Empty,
    /// Longer than [`NAME_BYTES_MAX`].
    #[error("a name has at most {NAME_BYTES_MAX} characters, this one has {0}")]
    TooLong(usize),
    /// A character outside the allowed ones.
    #[error("a name starts with a letter or digit and goes on with letters, digits, '.', '_' or '-'")]
    Character,
}

/// Name of a volume, snapshot or node: `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`. Checked when made, also when decoded.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// Checks `text` against the rule of names.
    pub fn new(text: impl Into<String>) -> Result<Self, NameError> {
        let text = text.into();
        let mut bytes = text.bytes();
        match bytes.next() {
            None => return Err(NameError::Empty),
            Some(first) if !first.is_ascii_alphanumeric() => return Err(NameError::Character),
            Some(_) => {}
        }
        if text.len() > NAME_BYTES_MAX {
            return Err(NameError::TooLong(text.len()));
        }
        if !bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-')) {
            return Err(NameError::Character);
        }
        Ok(Self(text))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        Self::new(text)
    }
}
impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}
impl std::str::FromStr for Name {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::new(text)
    }
}
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// A volume, or one of its snapshots: `VOL` or `VOL@SNAP`. Also the export names over NBD.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Target {
    /// The volume.
    pub volume: Name,
    /// The snapshot of it, or the head when absent.
    pub snapshot: Option<Name>,
}

impl std::str::FromStr for Target {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        match text.split_once('@') {
            None => Ok(Self { volume: Name::new(text)?, snapshot: None }),
            Some((volume, snapshot)) => {
                Ok(Self { volume: Name::new(volume)?, snapshot: Some(Name::new(snapshot)?) })
            }
        }
    }
}
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.snapshot {
            None => self.volume.fmt(f),
            Some(snapshot) => write!(f, "{}@{snapshot}", self.volume),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_at_every_way_in() {
        assert!(Name::new("a").is_ok() && Name::new("vm-1.root_2").is_ok());
        assert_eq!(Name::new(""), Err(NameError::Empty));
        for bad in [".a", "-a", "a/b", "a@b", "ä", "a b"] {
            assert_eq!(Name::new(bad), Err(NameError::Character), "{bad}");
        }
        assert_eq!(Name::new("a".repeat(129)), Err(NameError::TooLong(129)));
        let bytes = postcard::to_stdvec("../etc").expect("a string encodes");
        assert!(postcard::from_bytes::<Name>(&bytes).is_err());
    }

    #[test]
    fn the_id_of_a_cluster_is_read_as_it_is_written() {
        let id = ClusterId([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 0xee, 0xff]);
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in ["", "+00102030405060708090a0b0c0d0eef", "0001", &"0".repeat(33), &"g".repeat(32)] {
            assert_eq!(bad.parse::<ClusterId>(), Err(ClusterIdError), "{bad}");
        }
    }

    #[test]
    fn volume_ids_of_two_terms_never_meet() {
        let a = VolumeId::new(Term(1), u32::MAX).expect("fits");
        let b = VolumeId::new(Term(2), 0).expect("fits");
        assert_ne!(a, b);
        assert_eq!(b.file_name(), "00000002-00000000");
        assert_eq!(VolumeId::new(Term(1 << 32), 0), None);
    }
}
