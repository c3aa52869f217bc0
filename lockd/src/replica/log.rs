//! The disk of a replica: a [`Log`] whose content is a [`Base`] and whose items follow it. A procedure over any storage.

use bytes::Bytes;
use csnap_storage::{Storage, StorageError};

use super::ReplicaId;
use super::disk::{Base, Saved};
use super::step::Write;
use crate::store::record::batch_count;
use crate::store::{Log, Result, StoreError, StoreOptions};

/// See the module.
pub struct ReplicaLog<S: Storage> {
    log: Log<S>,
}

/// What became of writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrote {
    /// Durable up to this number; `None` if none of them had one.
    pub number: Option<u64>,
    /// There was no space for a new base; the old log went on.
    pub no_space: Option<StorageError>,
}

impl<S: Storage> ReplicaLog<S> {
    /// Opens the directory. If it is empty, it becomes a replica that begins with what `first` makes of its id:
    /// [`Base::alone`], or [`Base::empty`] where others may have a group already.
    ///
    /// # Errors
    /// As [`Log::open`], and if what is there is no replica's.
    pub async fn open(
        storage: S,
        options: StoreOptions,
        first: impl FnOnce(ReplicaId) -> Base,
    ) -> Result<(Self, Saved)> {
        let first = |disk| first(ReplicaId::of_disk(disk)).encode();
        let (log, recovered) = Log::open(storage, options, first).await?;
        let saved = Saved::replay(ReplicaId::of_disk(recovered.id), &recovered)?;
        Ok((Self { log }, saved))
    }

    /// Makes the group that `base` founds ([`Base::founding`]), of which this replica is a member. Only on an empty one,
    /// and by one replica of the group: the others learn of it from that one.
    ///
    /// # Errors
    /// Any is final.
    pub async fn found(&mut self, saved: &Saved, base: Base) -> Result<Saved> {
        assert!(
            saved.is_empty() && base.image.members.contains_key(&saved.id),
            "a founder is new and a member"
        );
        self.log.roll(&base.encode()).await?;
        Ok(Saved { id: saved.id, base })
    }

    /// Whether a new base is due before, or together with, these writes: ask the state machine for its state.
    #[must_use]
    pub fn wants_base(&self, writes: &[Write]) -> bool {
        self.log.is_nearly_full() || !self.fits(writes)
    }

    /// Carries writes out, in order; they are durable when it returns. What comes before a base need not be written.
    ///
    /// # Errors
    /// Any is final.
    pub async fn write(&mut self, writes: Vec<Write>) -> Result<Wrote> {
        let number = writes.iter().filter_map(Write::number).max();
        let mut no_space = None;
        let mut rest: &[Write] = &writes;
        let last_base = writes.iter().rposition(|write| !matches!(write, Write::Append { .. }));
        if let Some(at) = last_base {
            match (self.log.roll(writes[at].base().expect("a base")).await, &writes[at]) {
                (Ok(()), _) => rest = &writes[at + 1..],
                // All before it are appends that have their room, or the log says that it is full.
                (Err(StoreError::Storage(error @ StorageError::NoSpace { .. })), Write::Roll { .. })
                    if self.fits(&writes) =>
                {
                    no_space = Some(error);
                }
                (Err(error), _) => return Err(error),
            }
        }
        let items: Vec<Bytes> = rest.iter().flat_map(Write::items).cloned().collect();
        self.append(&items).await?;
        Ok(Wrote { number, no_space })
    }

    async fn append(&mut self, mut items: &[Bytes]) -> Result<()> {
        while !items.is_empty() {
            let (batch, rest) = items.split_at(batch_count(items.iter().map(Bytes::len)));
            if !self.log.fits(batch) {
                let what = "its log is full, and nothing made room in it";
                return Err(StoreError::Full(what));
            }
            self.log.append(batch).await?;
            items = rest;
        }
        Ok(())
    }

    /// Whether what these append has room in the log as it is.
    fn fits(&self, writes: &[Write]) -> bool {
        let sizes = writes.iter().flat_map(Write::items).map(Bytes::len);
        self.log.fits_batches(sizes) && !writes.iter().any(|write| matches!(write, Write::Begin { .. }))
    }
}

impl Write {
    /// Its number, if it has one.
    #[must_use]
    pub fn number(&self) -> Option<u64> {
        match self {
            Self::Append { number, .. } | Self::Begin { number, .. } => Some(*number),
            Self::Roll { .. } => None,
        }
    }

    fn items(&self) -> &[Bytes] {
        match self {
            Self::Append { items, .. } => items,
            Self::Begin { .. } | Self::Roll { .. } => &[],
        }
    }

    fn base(&self) -> Option<&Bytes> {
        match self {
            Self::Append { .. } => None,
            Self::Begin { base, .. } | Self::Roll { base } => Some(base),
        }
    }
}
