//! A lockspace that comes in pieces. Bytes from outside: bounded before they are stored, and nothing of them is a table
//! before all of them are there, are what was announced, and agree with each other.

use csnap_proto::MigrationId;
use csnap_proto::limits::LOCKSPACE_BYTES_MAX;
use csnap_proto::message::lock::{Manifest, Way};
use serde::{Deserialize, Serialize};

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
    pub(super) fn moved_to(&self) -> Option<&[::core::net::SocketAddr]> {
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
    #[serde(with = "crate::blob")]
    bytes: Vec<u8>,
}

impl Import {
    pub(super) fn new(migration: MigrationId, manifest: Manifest, before: Before) -> Self {
        Self { migration, manifest, before, bytes: Vec::new() }
    }

    /// How much is there, bytes from the start.
    pub(super) fn have(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Takes a piece that begins where what is there ends. Any other is one that was sent again, or one after a piece that
    /// was lost: its sender learns what is there.
    pub(super) fn take(&mut self, offset: u64, bytes: &[u8]) {
        let most = self.manifest.bytes.min(LOCKSPACE_BYTES_MAX as u64);
        if offset == self.have() && bytes.len() as u64 <= most.saturating_sub(offset) {
            self.bytes.extend_from_slice(bytes);
        }
    }

    /// The table that all of the bytes make.
    pub(super) fn finish(&self) -> Result<Table, &'static str> {
        if *blake3::hash(&self.bytes).as_bytes() != self.manifest.hash {
            return Err("its hash is another one than announced");
        }
        let (table, rest): (Table, _) =
            postcard::take_from_bytes(&self.bytes).map_err(|_| "it does not decode")?;
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
