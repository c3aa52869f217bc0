//! A lockspace that comes in pieces. Bytes from outside: bounded before they are stored, and nothing of them is a table
//! before all of them are there, are what was announced, and agree with each other.

use std::fmt;

use csnap_proto::MigrationId;
use csnap_proto::limits::LOCKSPACE_BYTES_MAX;
use csnap_proto::message::lock::{Manifest, Way};
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::core::table::Table;

/// What was of the same name before a lockspace came; it is there again when that is discarded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Before {
    /// Nothing.
    Nothing,
    /// An empty one, in which nothing ever was.
    Empty,
    /// One that had moved away from here, and comes back; and by which move it had come before that.
    Elsewhere(Way, Option<MigrationId>),
}

impl Before {
    pub(super) fn moved_to(&self) -> Option<&[std::net::SocketAddr]> {
        match self {
            Self::Elsewhere(way, _) => Some(&way.to),
            Self::Nothing | Self::Empty => None,
        }
    }
}

/// See the module. Invariant: never more bytes than announced, nor than [`LOCKSPACE_BYTES_MAX`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Import {
    pub(super) migration: MigrationId,
    pub(super) manifest: Manifest,
    pub(super) before: Before,
    bytes: Blob,
}

impl Import {
    pub(super) fn new(migration: MigrationId, manifest: Manifest, before: Before) -> Self {
        Self { migration, manifest, before, bytes: Blob(Vec::new()) }
    }

    /// How much is there, bytes from the start.
    pub(super) fn have(&self) -> u64 {
        self.bytes.0.len() as u64
    }

    /// Takes a piece that begins where what is there ends. Any other is one that was sent again, or one after a piece that
    /// was lost: its sender learns what is there.
    pub(super) fn take(&mut self, offset: u64, bytes: &[u8]) {
        let most = self.manifest.bytes.min(LOCKSPACE_BYTES_MAX as u64);
        if offset == self.have() && bytes.len() as u64 <= most.saturating_sub(offset) {
            self.bytes.0.extend_from_slice(bytes);
        }
    }

    /// The table that all of the bytes make.
    pub(super) fn finish(&self) -> Result<Table, &'static str> {
        if *blake3::hash(&self.bytes.0).as_bytes() != self.manifest.hash {
            return Err("its hash is another one than announced");
        }
        let (table, rest): (Table, _) =
            postcard::take_from_bytes(&self.bytes.0).map_err(|_| "it does not decode")?;
        if !rest.is_empty() {
            return Err("it has bytes after its end");
        }
        table.check_foreign()?;
        Ok(table)
    }

    pub(super) fn check(&self) -> Result<(), &'static str> {
        if self.have() > self.manifest.bytes || self.manifest.bytes > LOCKSPACE_BYTES_MAX as u64 {
            return Err("more of a lockspace than there is");
        }
        Ok(())
    }
}

/// Bytes that are encoded in one go rather than one by one: they are in every snapshot while they come.
#[derive(Clone, PartialEq, Eq)]
struct Blob(Vec<u8>);

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Blob;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Blob, E> {
                Ok(Blob(bytes.to_vec()))
            }
        }
        deserializer.deserialize_bytes(Bytes)
    }
}
