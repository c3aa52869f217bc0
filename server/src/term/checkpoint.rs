//! Checkpoints: the state at one position, in pieces, so that nobody has to read the journal from its beginning.
//!
//! Order of a checkpoint: pieces, footer, sync, sync of the directory; *then* a record in the journal names it, at the
//! start of the next segment; *then* the gate is seen open; *then* files that it made superfluous go. Appends go on all
//! the while. The pieces are [`frame`]s, chained; the footer holds their number and the position.
//!
//! ```text
//! footer body:
//!        0        1        2        3        4        5        6        7
//!   0  | number of pieces u64                                                  |
//!   8  | position in the term's journal u64                                    |
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};
use csnap_storage::{Access, Storage, StorageError};

use super::frame::{self, BATCH_BYTES_MAX, File, Hash, Kind, Place};
use super::journal::Journal;
use super::pool::Pool;
use super::reader::read_frame;
use super::seal::CheckpointName;
use super::{Corrupt, Fatal, Position, Replay, TermError, names, reclaim};

const FOOTER_BYTES: usize = 16;

/// Largest piece, bytes.
pub const PIECE_BYTES_MAX: usize = BATCH_BYTES_MAX;

/// How a step of a checkpoint went that did not break the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// It is done.
    Done,
    /// The pool is full: drop the writer, and begin anew some other time.
    NoSpace,
}

/// A checkpoint being written. Dropping it abandons it; the next one begins anew. One that ran out of space once stays
/// incomplete, whatever else it is given, and is never named.
pub struct CheckpointWriter<S: Storage> {
    journal: Journal<S>,
    file: S::File,
    number: u64,
    position: Position,
    /// What the journal had written when this began.
    begun_at_bytes: u64,
    offset: u64,
    pieces: u64,
    hash: Hash,
    /// Something did not fit: it will never be complete.
    full: bool,
}

impl<S: Storage> Journal<S> {
    /// Begins a checkpoint of the state at `position`: the caller's pieces hold exactly what the batches before it made.
    /// `None` when the pool is full.
    ///
    /// # Panics
    /// When one is being written: one at a time.
    pub async fn begin_checkpoint(&self, position: Position) -> Result<Option<CheckpointWriter<S>>, Fatal> {
        self.check()?;
        let (number, begun_at_bytes) = {
            let state = &mut *self.inner.state.borrow_mut();
            assert!(!state.checkpointing, "one checkpoint at a time");
            let before = state.checkpoint.filter(|name| name.term == self.term());
            assert!(before.is_none_or(|name| name.position <= position), "checkpoints go forward");
            state.checkpointing = true;
            state.checkpoints_begun += 1;
            (state.checkpoints_begun - 1, state.written_bytes)
        };
        match self.inner.pool.storage.create(&names::checkpoint(self.term(), number)).await {
            Ok(file) => Ok(Some(CheckpointWriter {
                journal: self.clone(),
                file,
                number,
                position,
                begun_at_bytes,
                offset: 0,
                pieces: 0,
                hash: Hash::default(),
                full: false,
            })),
            Err(error) => {
                let mut state = self.inner.state.borrow_mut();
                state.checkpointing = false;
                state.checkpoint_starved = matches!(error, StorageError::NoSpace { .. });
                drop(state);
                match error {
                    StorageError::NoSpace { .. } => Ok(None),
                    error => Err(self.fail(error.into())),
                }
            }
        }
    }
}

impl<S: Storage> CheckpointWriter<S> {
    /// Adds a piece of at most [`PIECE_BYTES_MAX`].
    pub async fn piece(&mut self, bytes: &[u8]) -> Result<Written, Fatal> {
        assert!(bytes.len() <= PIECE_BYTES_MAX, "a piece of {} bytes", bytes.len());
        let written = self.write(Kind::Piece, bytes).await?;
        self.pieces += 1;
        Ok(written)
    }

    /// Completes it, names it in the journal, and deletes what it made superfluous, if our gate is open then.
    pub async fn finish(mut self) -> Result<Written, Fatal> {
        let mut footer = BytesMut::with_capacity(FOOTER_BYTES);
        footer.put_u64_le(self.pieces);
        footer.put_u64_le(self.position.0);
        if self.write(Kind::Footer, &footer).await? == Written::NoSpace {
            return Ok(Written::NoSpace);
        }
        let (journal, storage) = (&self.journal, &self.journal.inner.pool.storage);
        storage.sync(&self.file).await.map_err(|error| journal.fail(error.into()))?;
        let directory = names::term_dir(journal.term());
        storage.sync_dir(&directory).await.map_err(|error| journal.fail(error.into()))?;
        let name = CheckpointName {
            term: journal.term(),
            number: self.number,
            position: self.position,
            hash: self.hash,
        };
        journal.name_checkpoint(name).await?;
        {
            let state = &mut *journal.inner.state.borrow_mut();
            state.checkpointed_at_bytes = self.begun_at_bytes;
            state.checkpoint_bytes = self.offset;
            state.checkpoint_starved = false;
        }
        reclaim::reclaim(journal).await?;
        Ok(Written::Done)
    }

    async fn write(&mut self, kind: Kind, body: &[u8]) -> Result<Written, Fatal> {
        if self.full {
            return Ok(Written::NoSpace);
        }
        let (pool, term) = (&self.journal.inner.pool, self.journal.term());
        let place =
            Place { pool: pool.id(), term, file: File::Checkpoint, number: self.number, offset: self.offset };
        let (bytes, hash) = frame::encode(&place, kind, self.pieces, self.hash, body);
        let length = bytes.len() as u64;
        match pool.storage.write(&self.file, self.offset, bytes).await {
            Ok(()) => {}
            Err(StorageError::NoSpace { .. }) => {
                self.full = true;
                self.journal.inner.state.borrow_mut().checkpoint_starved = true;
                // What it took goes back at once to whoever needs it more.
                let _ = pool.storage.unlink(&names::checkpoint(term, self.number)).await;
                return Ok(Written::NoSpace);
            }
            Err(error) => return Err(self.journal.fail(error.into())),
        }
        self.offset += length;
        self.hash = hash;
        Ok(Written::Done)
    }
}

impl<S: Storage> Drop for CheckpointWriter<S> {
    fn drop(&mut self) {
        self.journal.inner.state.borrow_mut().checkpointing = false;
    }
}

/// Reads the checkpoint `name` into `replay`, which is emptied first.
pub async fn load<S: Storage, R: Replay>(
    pool: &Pool<S>,
    name: &CheckpointName,
    replay: &mut R,
) -> Result<(), TermError> {
    let file = pool.storage.open(&names::checkpoint(name.term, name.number), Access::Read).await?;
    let mut place =
        Place { pool: pool.id(), term: name.term, file: File::Checkpoint, number: name.number, offset: 0 };
    let (mut pieces, mut previous) = (0, Hash::default());
    replay.begin_checkpoint();
    loop {
        let broken = |what: &str| TermError::from(Corrupt::at(what, place.to_string()));
        let frame = read_frame(&pool.storage, &file, &place)
            .await?
            .map_err(|_| broken("a checkpoint that the journal names is damaged here"))?;
        if frame.sequence != pieces || frame.previous != previous {
            return Err(broken("a piece out of its line"));
        }
        match frame.kind {
            Kind::Piece => {
                replay.piece(&frame.body).map_err(|corrupt| corrupt.or_at(|| place.to_string()))?
            }
            _ => {
                check_footer(&frame.body, pieces, name).map_err(broken)?;
                if frame.hash != name.hash {
                    return Err(broken("not the checkpoint that the journal names"));
                }
                break;
            }
        }
        pieces += 1;
        previous = frame.hash;
        place.offset += frame.padded_bytes();
    }
    replay.end_checkpoint().map_err(|corrupt| corrupt.or_at(|| place.to_string()))?;
    Ok(())
}

fn check_footer(body: &Bytes, pieces: u64, name: &CheckpointName) -> Result<(), &'static str> {
    let mut body = body.clone();
    if body.len() != FOOTER_BYTES {
        return Err("a footer of the wrong length");
    }
    if body.get_u64_le() != pieces || Position(body.get_u64_le()) != name.position {
        return Err("a footer that does not fit what it ends");
    }
    Ok(())
}
