//! The pool: what makes a directory one, making it, and opening it.
//!
//! A pool is made in an order that a crash, or a second maker, cannot harm: first one file, linked into place whole, decides
//! what the pool *is* (`pool.creating`); then everything that follows from it is made, each file privately and linked
//! into place whole; last the same decision is linked as `pool.toml`. Whoever finds a half-made pool completes that one.
//! A directory that holds anything else is refused: nothing is ever formatted over data.

use bytes::Bytes;
use csnap_proto::limits::{CHUNK_BYTES_MAX, CHUNK_BYTES_MIN};
use csnap_proto::{ChunkSize, PoolId, Term};
use csnap_storage::{Access, BLOCK_BYTES, Storage, StorageError};
use serde::{Deserialize, Serialize};

use super::canary::Canaries;
use super::frame::{BATCH_BYTES_MAX, FRAME_BYTES_MAX, File, Place};
use super::seal::Seal;
use super::{names, segment};

/// The version of everything below the pool's root that this program reads and writes. Version 1: the first.
pub const FORMAT: u32 = 2;

/// Size of a journal segment unless the pool says otherwise, bytes: tens of thousands of grants, and written as zeros
/// in a fraction of a second.
pub const SEGMENT_BYTES: u64 = 16 << 20;

/// Smallest segment, bytes: its first record and a few batches.
pub const SEGMENT_BYTES_MIN: u64 = 4 * BLOCK_BYTES as u64;

/// Largest segment, bytes: what a takeover may have to look through for records behind its end.
pub const SEGMENT_BYTES_MAX: u64 = 256 << 20;

/// `pool.toml` with room for comments of an operator, bytes.
const TOML_BYTES_MAX: usize = 16 << 10;

/// What is decided once, when a pool is made. Written as `pool.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolToml {
    /// Version of the on-disk formats.
    pub format: u32,
    /// Identity, in every record.
    #[serde(with = "hex_id")]
    pub id: PoolId,
    /// Several hosts see it: I/O must bypass their caches.
    pub shared: bool,
    /// Chunk size of volumes that do not say, bytes.
    pub chunk_bytes: u64,
    /// Size of journal segments, bytes.
    pub segment_bytes: u64,
}

/// Why a pool cannot be made or opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// The medium refused.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Made by another version of csnap.
    #[error(
        "the pool has format {found}, this csnap reads format {FORMAT}: use the csnap that made it, or upgrade"
    )]
    Format {
        /// What `pool.toml` says.
        found: i64,
    },
    /// Nothing there.
    #[error(
        "not a pool: there is no pool.toml: check the path, or make a pool there with `csnap up` or `csnap pool create`"
    )]
    NotAPool,
    /// Somebody began to make it and did not finish.
    #[error(
        "a pool was begun here and never finished: run `csnap up` or `csnap pool create` on it again to finish it"
    )]
    HalfMade,
    /// There is one.
    #[error("there is a pool already")]
    Exists,
    /// Something else is there.
    #[error(
        "`{0}` is in the way: a pool is made in an empty directory only; restore a lost pool.toml from a backup"
    )]
    NotEmpty(String),
    /// Cannot be read.
    #[error("pool.toml is damaged: {0}: restore it from a backup")]
    Damaged(String),
}

/// An open pool: what every procedure of terms works on. Clones are the same pool.
#[derive(Clone)]
pub struct Pool<S: Storage> {
    /// Where its bytes are.
    pub storage: S,
    /// What it is.
    pub toml: PoolToml,
    /// Rules that this process breaks, in tests.
    pub canaries: Canaries,
}

impl PoolToml {
    /// A pool with the usual defaults.
    #[must_use]
    pub fn new(id: PoolId, shared: bool) -> Self {
        Self { format: FORMAT, id, shared, chunk_bytes: CHUNK_BYTES_MIN, segment_bytes: SEGMENT_BYTES }
    }

    /// The text of the file, padded with empty lines to whole blocks.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text =
            String::from("# What this csnap pool is. Written once; changing it destroys the pool.\n");
        text.push_str(&toml::to_string(self).expect("plain fields have a text"));
        let length = text.len().next_multiple_of(BLOCK_BYTES);
        text.extend(std::iter::repeat_n('\n', length - text.len()));
        text
    }

    /// Reads the text of the file. The version is looked at before anything else.
    pub fn from_text(text: &[u8]) -> Result<Self, PoolError> {
        let damaged = |error: &dyn std::fmt::Display| {
            PoolError::Damaged(error.to_string().lines().next().unwrap_or_default().to_owned())
        };
        let text = std::str::from_utf8(text).map_err(|error| damaged(&error))?;
        let table: toml::Table = text.parse().map_err(|error| damaged(&error))?;
        match table.get("format").and_then(toml::Value::as_integer) {
            Some(found) if found == i64::from(FORMAT) => {}
            Some(found) => return Err(PoolError::Format { found }),
            None => return Err(damaged(&"it has no `format`")),
        }
        let toml: Self = table.try_into().map_err(|error| damaged(&error))?;
        toml.check().map_err(|what| damaged(&what))?;
        Ok(toml)
    }

    fn check(&self) -> Result<(), &'static str> {
        if ChunkSize::from_bytes(self.chunk_bytes).is_none() || self.chunk_bytes > CHUNK_BYTES_MAX {
            return Err("`chunk_bytes` is not a chunk size");
        }
        if !(SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&self.segment_bytes)
            || !self.segment_bytes.is_multiple_of(BLOCK_BYTES as u64)
        {
            return Err("`segment_bytes` is out of range or not in whole blocks");
        }
        Ok(())
    }
}

impl<S: Storage> Pool<S> {
    /// Its identity.
    #[must_use]
    pub fn id(&self) -> PoolId {
        self.toml.id
    }

    /// Size of its journal segments, bytes.
    #[must_use]
    pub fn segment_bytes(&self) -> u64 {
        self.toml.segment_bytes
    }

    /// Size of a first segment that was not set aside and has to be made during a takeover, bytes.
    #[must_use]
    pub fn hasty_segment_bytes(&self) -> u64 {
        self.toml.segment_bytes.min(2 * FRAME_BYTES_MAX as u64)
    }

    /// Largest batch of this pool's journals, bytes: it fits into a segment behind the first record, and into a Seal.
    #[must_use]
    pub fn batch_bytes_max(&self) -> usize {
        let fits = usize::try_from(self.hasty_segment_bytes()).unwrap_or(usize::MAX) - 3 * BLOCK_BYTES;
        fits.min(BATCH_BYTES_MAX)
    }
}

/// Opens the pool at the root of `storage`.
pub async fn open_pool<S: Storage>(storage: &S) -> Result<Pool<S>, PoolError> {
    if let Some(toml) = read_toml(storage, names::POOL_TOML).await? {
        return Ok(Pool { storage: storage.clone(), toml, canaries: Canaries::default() });
    }
    let begun = segment::exists(storage, names::POOL_CREATING).await?;
    Err(if begun { PoolError::HalfMade } else { PoolError::NotAPool })
}

/// Makes a pool, or completes one that was begun here; returns what it is, which is `wanted` only if nobody had begun. The id of
/// `wanted` must be drawn at random for this call: it also keeps two makers out of each other's way.
///
/// # Errors
/// [`PoolError::Exists`] and [`PoolError::NotEmpty`]: nothing was touched.
pub async fn create_pool<S: Storage>(storage: &S, wanted: &PoolToml) -> Result<Pool<S>, PoolError> {
    loop {
        let made = make(storage, wanted).await;
        let crossed =
            matches!(made, Err(PoolError::Storage(StorageError::NotFound { .. }) | PoolError::NotEmpty(_)));
        // Another maker may have crossed our way: then there is its pool now, or its decision, which stays.
        if crossed && segment::exists(storage, names::POOL_TOML).await? {
            return Err(PoolError::Exists);
        }
        if !crossed || !segment::exists(storage, names::POOL_CREATING).await? {
            return made;
        }
    }
}

async fn make<S: Storage>(storage: &S, wanted: &PoolToml) -> Result<Pool<S>, PoolError> {
    let maker = wanted.id;
    if read_toml(storage, names::POOL_TOML).await?.is_some() {
        return Err(PoolError::Exists);
    }
    let toml = match read_toml(storage, names::POOL_CREATING).await? {
        Some(begun) => begun,
        None => {
            check_empty(storage).await?;
            wanted.check().map_err(|what| PoolError::Damaged(what.to_owned()))?;
            publish(storage, maker, names::ROOT, names::POOL_CREATING, wanted.to_text().into()).await?;
            read_toml(storage, names::POOL_CREATING).await?.ok_or(PoolError::HalfMade)?
        }
    };
    for directory in [names::HEADS, names::STORE, names::TERMS, &names::term_dir(Term(0))] {
        match storage.create_dir(directory).await {
            Ok(()) | Err(StorageError::Exists { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    make_term_0(storage, maker, &toml).await?;
    storage.sync_dir(names::TERMS).await?;
    storage.sync_dir(names::ROOT).await?;
    publish(storage, maker, names::ROOT, names::POOL_TOML, toml.to_text().into()).await?;
    for name in storage.list(names::ROOT).await? {
        // The decision is in pool.toml now; what was tried on the way, by whomever, has no use any more.
        if name.starts_with(names::POOL_CREATING) || is_private(&name) {
            unlink_if_there(storage, &name).await?;
        }
    }
    Ok(Pool { storage: storage.clone(), toml, canaries: Canaries::default() })
}

/// Term 0: sealed with the state of a new pool, empty, and nobody's.
async fn make_term_0<S: Storage>(storage: &S, maker: PoolId, toml: &PoolToml) -> Result<(), PoolError> {
    let term = Term(0);
    let directory = names::term_dir(term);
    let gate = Bytes::from_static(&[0; BLOCK_BYTES]);
    publish(storage, maker, &directory, &names::gate(term), gate).await?;
    let place = Place { pool: toml.id, term, file: File::Journal, number: 0, offset: 0 };
    let first = Seal::default().first_frame(&place);
    publish(storage, maker, &directory, &names::journal(term, 0), first).await?;
    for index in 0..segment::SET_ASIDE {
        let path = names::set_aside(term, index);
        if !segment::exists(storage, &path).await? {
            let private = private_name(&path, maker);
            segment::write_zeros(storage, &private, toml.segment_bytes).await?;
            link_into_place(storage, &private, &path).await?;
        }
    }
    storage.sync_dir(&directory).await?;
    Ok(())
}

/// Makes a file that appears whole, or was there already. Its directory is synced.
async fn publish<S: Storage>(
    storage: &S,
    maker: PoolId,
    directory: &str,
    path: &str,
    content: Bytes,
) -> Result<(), PoolError> {
    if !segment::exists(storage, path).await? {
        let private = private_name(path, maker);
        unlink_if_there(storage, &private).await?;
        let file = storage.create(&private).await?;
        storage.write(&file, 0, content).await?;
        storage.sync(&file).await?;
        link_into_place(storage, &private, path).await?;
    }
    storage.sync_dir(directory).await?;
    Ok(())
}

async fn link_into_place<S: Storage>(storage: &S, private: &str, path: &str) -> Result<(), PoolError> {
    match storage.link(private, path).await {
        Ok(()) | Err(StorageError::Exists { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(unlink_if_there(storage, private).await?)
}

fn private_name(path: &str, maker: PoolId) -> String {
    format!("{path}.{maker}.tmp")
}

/// Whether a name in the root is a maker's.
fn is_private(name: &str) -> bool {
    [names::POOL_CREATING, names::POOL_TOML].iter().any(|ours| name.starts_with(ours))
        && name.ends_with(".tmp")
}

async fn unlink_if_there<S: Storage>(storage: &S, path: &str) -> Result<(), StorageError> {
    match storage.unlink(path).await {
        Ok(()) | Err(StorageError::NotFound { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// An empty directory, a new file system, or what makers tried who have not decided anything.
async fn check_empty<S: Storage>(storage: &S) -> Result<(), PoolError> {
    for name in storage.list(names::ROOT).await? {
        let harmless = name == "lost+found" || name.starts_with('.') || is_private(&name);
        if !harmless && name != names::POOL_CREATING {
            return Err(PoolError::NotEmpty(name));
        }
    }
    Ok(())
}

async fn read_toml<S: Storage>(storage: &S, path: &str) -> Result<Option<PoolToml>, PoolError> {
    let file = match storage.open(path, Access::Read).await {
        Err(StorageError::NotFound { .. }) => return Ok(None),
        file => file?,
    };
    let text = storage.read(&file, 0, TOML_BYTES_MAX + BLOCK_BYTES).await?;
    if text.len() > TOML_BYTES_MAX {
        return Err(PoolError::Damaged(format!("{path} has more than {TOML_BYTES_MAX} bytes")));
    }
    PoolToml::from_text(&text).map(Some)
}

/// Ids as text.
mod hex_id {
    use csnap_proto::PoolId;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<T: Serializer>(id: &PoolId, to: T) -> Result<T::Ok, T::Error> {
        to.collect_str(id)
    }

    pub(super) fn deserialize<'de, T: Deserializer<'de>>(from: T) -> Result<PoolId, T::Error> {
        let text = String::deserialize(from)?;
        let mut id = [0; 16];
        let digits = text.is_ascii() && text.len() == 32;
        let parsed = digits.then(|| {
            id.iter_mut().enumerate().try_for_each(|(i, byte)| {
                *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
                Some(())
            })
        });
        parsed.flatten().map(|()| PoolId(id)).ok_or_else(|| T::Error::custom("`id` is not 32 hex digits"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pool_toml_reads_back_and_another_version_is_refused_first() {
        let toml = PoolToml::new(PoolId([0xab; 16]), true);
        let text = toml.to_text();
        assert!(text.len().is_multiple_of(BLOCK_BYTES));
        assert_eq!(PoolToml::from_text(text.as_bytes()), Ok(toml));
        for found in [i64::from(FORMAT) - 1, i64::from(FORMAT) + 1] {
            let other = text.replace("format = 2", &format!("format = {found}\nunheard_of = true"));
            assert_eq!(PoolToml::from_text(other.as_bytes()), Err(PoolError::Format { found }));
        }
        for bad in ["", "format = 2", "\u{0}", "format = 2\nid = \"ääääääääääääääää\""] {
            assert!(matches!(PoolToml::from_text(bad.as_bytes()), Err(PoolError::Damaged(_))), "{bad}");
        }
        let segments = text.replace("segment_bytes = 16777216", "segment_bytes = 16777217");
        assert!(matches!(PoolToml::from_text(segments.as_bytes()), Err(PoolError::Damaged(_))));
    }
}
