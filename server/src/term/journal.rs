//! A term's journal while the term writes it: batches, one at a time, each durable before the next is begun.
//!
//! Tasks of one thread share it: appends, [`Journal::prepare_segment`] in the background, a checkpoint now and then. An
//! append waits while no segment is ready and fails only when the medium does; then the journal is finished, whoever asks.
//!
//! *Invariant*: nothing here reads what other terms wrote, and nothing but the gate is ever written by another.

use std::cell::RefCell;
use std::rc::Rc;

use csnap_proto::Term;
use csnap_storage::{Storage, StorageError};

use super::canary::Canary;
use super::frame::{self, File, Hash, Kind, Place, padded};
use super::gate::Gate;
use super::pool::Pool;
use super::seal::{CheckpointName, Seal};
use super::segment;
use super::wait::{Signal, Turns};
use super::{Fatal, Position, names, reclaim, room};

/// How making a segment ahead went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prepared {
    /// The next segment is ready.
    Ready,
    /// The pool is full: try again when space may have come back.
    NoSpace,
}

/// However large a checkpoint is, what was written since the last one stays below so many segments: a new server reads it.
const UNCHECKPOINTED_SEGMENTS_MAX: u64 = 4;

/// The journal of the term that this process is. Clones are the same journal.
pub struct Journal<S: Storage> {
    pub(super) inner: Rc<Inner<S>>,
}

impl<S: Storage> Clone for Journal<S> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

pub(super) struct Inner<S: Storage> {
    pub(super) pool: Pool<S>,
    pub(super) term: Term,
    gate: Gate<S>,
    seal: Seal,
    turns: Turns,
    /// Raised when the next segment becomes ready, is taken, or the journal fails.
    segments: Signal,
    pub(super) state: RefCell<State<S>>,
}

pub(super) struct State<S: Storage> {
    segment: Segment<S>,
    /// The segment that is ready, and its size, bytes.
    next: Option<(S::File, u64)>,
    preparing: bool,
    end: Position,
    hash: Hash,
    pub(super) checkpoint: Option<CheckpointName>,
    /// Number and first position of every segment that was not deleted.
    pub(super) kept: Vec<(u64, Position)>,
    pub(super) checkpointing: bool,
    pub(super) checkpoints_begun: u64,
    /// The last checkpoint found no space: what comes back is its, for it gives back more.
    pub(super) checkpoint_starved: bool,
    /// Bytes written in all, and when the last complete checkpoint was begun.
    pub(super) written_bytes: u64,
    pub(super) checkpointed_at_bytes: u64,
    /// Length of that checkpoint, bytes.
    pub(super) checkpoint_bytes: u64,
    /// What earlier terms left is deleted; they write nothing more that anybody needs.
    pub(super) earlier_reclaimed: bool,
    failed: Option<Fatal>,
    /// What the gate said before the append, where that rule is broken.
    looked_early: Option<bool>,
}

struct Segment<S: Storage> {
    number: u64,
    file: S::File,
    bytes: u64,
    offset: u64,
}

impl<S: Storage> Journal<S> {
    /// Begins the journal of `term` in `file`, an empty first segment, with its Seal; durable on return.
    pub(super) async fn begin(
        pool: Pool<S>,
        term: Term,
        gate: Gate<S>,
        seal: Seal,
        file: S::File,
    ) -> Result<Self, Fatal> {
        let bytes = pool.storage.stat_file(&file).await?.size_bytes;
        let state = State {
            segment: Segment { number: 0, file, bytes, offset: 0 },
            next: None,
            preparing: false,
            end: Position(0),
            hash: Hash::default(),
            checkpoint: seal.checkpoint,
            kept: vec![(0, Position(0))],
            checkpointing: false,
            checkpoints_begun: 0,
            checkpoint_starved: false,
            written_bytes: 0,
            checkpointed_at_bytes: 0,
            checkpoint_bytes: 0,
            earlier_reclaimed: false,
            failed: None,
            looked_early: None,
        };
        let body = seal.encode();
        let inner = Inner {
            pool,
            term,
            gate,
            seal,
            turns: Turns::default(),
            segments: Signal::default(),
            state: RefCell::new(state),
        };
        let journal = Self { inner: Rc::new(inner) };
        journal.write(Kind::Seal, &body).await?;
        Ok(journal)
    }

    /// The term that writes it.
    #[must_use]
    pub fn term(&self) -> Term {
        self.inner.term
    }

    /// The position behind the last durable record.
    #[must_use]
    pub fn position(&self) -> Position {
        self.inner.state.borrow().end
    }

    /// How many numbers of terms ago the newest checkpoint was written: whoever has no predecessor beside it reads the
    /// journals of at most so many.
    #[must_use]
    pub fn terms_since_checkpoint(&self) -> u64 {
        let newest = self.inner.state.borrow().checkpoint.map_or(0, |name| name.term.0);
        self.inner.term.0 - newest
    }

    /// Whether so much was written since the last checkpoint that a new one should shorten what a new server has to read: a
    /// fair part of a segment, and for a large state as much as the checkpoint itself takes, so that checkpoints are at most
    /// half of all that is written; but no more than some segments.
    #[must_use]
    pub fn wants_checkpoint(&self) -> bool {
        let state = self.inner.state.borrow();
        let segment = self.inner.pool.segment_bytes();
        let enough = state.checkpoint_bytes.clamp(segment / 2, UNCHECKPOINTED_SEGMENTS_MAX * segment);
        state.written_bytes - state.checkpointed_at_bytes > enough
    }

    /// Appends one batch; durable on return, which gives the position behind it. Batches land in the order of the calls.
    ///
    /// # Errors
    /// Only when the medium fails; never for want of space, for which it waits.
    /// # Panics
    /// When the batch is longer than [`Pool::batch_bytes_max`].
    pub async fn append(&self, body: Vec<u8>) -> Result<Position, Fatal> {
        assert!(body.len() <= self.inner.pool.batch_bytes_max(), "a batch of {} bytes", body.len());
        let _turn = self.inner.turns.take().await;
        self.check()?;
        if self.inner.pool.canaries.breaks(Canary::GateBeforeSync) {
            let open = self.inner.gate.is_open().await?;
            self.inner.state.borrow_mut().looked_early = Some(open);
        }
        if !self.has_room(body.len()) {
            let checkpoint = self.inner.state.borrow().checkpoint;
            self.next_segment(checkpoint).await?;
        }
        self.write(Kind::Batch, &body).await?;
        Ok(self.position())
    }

    /// Reads our gate: what was durable before and finds it open may be acted upon, now or in an hour.
    pub async fn gate_open(&self) -> Result<bool, Fatal> {
        if self.inner.pool.canaries.breaks(Canary::ActWithoutGate) {
            return Ok(true);
        }
        if let Some(open) = self.inner.state.borrow_mut().looked_early.take() {
            return Ok(open);
        }
        match self.inner.gate.is_open().await {
            Ok(open) => Ok(open),
            Err(error) => Err(self.fail(error.into())),
        }
    }

    /// Durable, then gate open: appends and looks. `true` is leave to act on the batch and everything before it; after
    /// `false` the process exits, unanswered.
    pub async fn commit(&self, body: Vec<u8>) -> Result<bool, Fatal> {
        self.append(body).await?;
        self.gate_open().await
    }

    /// Makes the next segment if it is not there. For one background task, whenever [`Journal::segment_taken`] returns.
    pub async fn prepare_segment(&self) -> Result<Prepared, Fatal> {
        self.check()?;
        let (storage, term) = (&self.inner.pool.storage, self.inner.term);
        let number = {
            let mut state = self.inner.state.borrow_mut();
            if state.next.is_some() || state.preparing {
                return Ok(Prepared::Ready);
            }
            state.preparing = true;
            state.segment.number + 1
        };
        let _preparing = Preparing(&self.inner);
        let path = names::journal(term, number);
        let made = match self.make_segment(&path).await {
            Err(StorageError::NoSpace { .. }) => return Ok(Prepared::NoSpace),
            made => made.map_err(|error| self.fail(error.into()))?,
        };
        storage.sync_dir(&names::term_dir(term)).await.map_err(|error| self.fail(error.into()))?;
        self.inner.state.borrow_mut().next = Some(made);
        self.inner.segments.raise();
        Ok(Prepared::Ready)
    }

    /// A new segment, and its size. In a full pool a small one, where earlier terms made some ready and never used them: a
    /// checkpoint can be named only in a next segment, and takes space itself; without one nothing is ever given back.
    async fn make_segment(&self, path: &str) -> Result<(S::File, u64), StorageError> {
        let (storage, pool) = (&self.inner.pool.storage, &self.inner.pool);
        let make = async |bytes| match segment::write_zeros(storage, path, bytes).await {
            Ok(file) => Ok((file, bytes)),
            Err(error) => {
                // What it took goes back to whoever needs it more; the next attempt starts anew.
                let _ = storage.unlink(path).await;
                Err(error)
            }
        };
        match make(pool.segment_bytes()).await {
            Err(StorageError::NoSpace { .. }) => {
                reclaim::release_unused(storage, self.inner.term).await?;
                make(pool.hasty_segment_bytes()).await
            }
            made => made,
        }
    }

    /// Sets aside what the next terms need to take over: rooms, and segments for two of them. For the same background task,
    /// once serving.
    pub async fn set_aside(&self) -> Result<Prepared, Fatal> {
        self.check()?;
        let (storage, term) = (&self.inner.pool.storage, self.inner.term);
        let made = async {
            room::set_aside(storage, term).await?;
            if self.inner.state.borrow().checkpoint_starved {
                return Err(StorageError::NoSpace { path: names::term_dir(term) });
            }
            segment::set_aside(storage, term, self.inner.pool.segment_bytes()).await
        };
        match made.await {
            Ok(()) => Ok(Prepared::Ready),
            Err(StorageError::NoSpace { .. }) => Ok(Prepared::NoSpace),
            Err(error) => Err(self.fail(error.into())),
        }
    }

    /// Waits until the prepared segment is taken, or the journal failed.
    pub async fn segment_taken(&self) {
        let look = || {
            let state = self.inner.state.borrow();
            (state.next.is_none() || state.failed.is_some()).then_some(())
        };
        self.inner.segments.until(look).await;
    }

    /// Goes on in the next segment, naming `checkpoint` as the newest; durable on return. The caller has the turn.
    async fn next_segment(&self, checkpoint: Option<CheckpointName>) -> Result<(), Fatal> {
        let look = || {
            let mut state = self.inner.state.borrow_mut();
            match &state.failed {
                Some(fatal) => Some(Err(fatal.clone())),
                None => state.next.take().map(Ok),
            }
        };
        let (file, bytes) = self.inner.segments.until(look).await?;
        // No await until the number is its own: the next one is prepared under the number after it.
        {
            let state = &mut *self.inner.state.borrow_mut();
            let number = state.segment.number + 1;
            state.segment = Segment { number, file, bytes, offset: 0 };
            state.kept.push((number, state.end));
        }
        self.inner.segments.raise();
        self.write(Kind::Segment, &self.inner.seal.again(checkpoint).encode()).await?;
        self.inner.state.borrow_mut().checkpoint = checkpoint;
        Ok(())
    }

    /// Names a complete and durable checkpoint in the journal: from now on the state starts from it.
    pub(super) async fn name_checkpoint(&self, checkpoint: CheckpointName) -> Result<(), Fatal> {
        let _turn = self.inner.turns.take().await;
        self.check()?;
        assert!(checkpoint.position <= self.position(), "a checkpoint holds only what is durable");
        self.next_segment(Some(checkpoint)).await
    }

    fn has_room(&self, body: usize) -> bool {
        let segment = &self.inner.state.borrow().segment;
        segment.offset + padded(body) as u64 <= segment.bytes
    }

    /// Writes one frame at the end and syncs it. The caller has the turn, so nothing else moves the end.
    async fn write(&self, kind: Kind, body: &[u8]) -> Result<(), Fatal> {
        let (storage, canaries) = (&self.inner.pool.storage, &self.inner.pool.canaries);
        let (file, bytes, hash) = {
            let state = self.inner.state.borrow();
            let place = Place {
                pool: self.inner.pool.id(),
                term: self.inner.term,
                file: File::Journal,
                number: state.segment.number,
                offset: state.segment.offset,
            };
            let (bytes, hash) = frame::encode(&place, kind, state.end.0, state.hash, body);
            (state.segment.file.clone(), bytes, hash)
        };
        let written = bytes.len() as u64;
        let whole = Whole { journal: self, done: false };
        let offset = self.inner.state.borrow().segment.offset;
        storage.write(&file, offset, bytes).await.map_err(|error| self.fail(error.into()))?;
        if !(canaries.breaks(Canary::AcknowledgeBeforeSync) && kind == Kind::Batch) {
            storage.sync(&file).await.map_err(|error| self.fail(error.into()))?;
        }
        whole.done();
        let state = &mut *self.inner.state.borrow_mut();
        state.segment.offset += written;
        state.written_bytes += written;
        state.end = Position(state.end.0 + 1);
        state.hash = hash;
        Ok(())
    }

    pub(super) fn check(&self) -> Result<(), Fatal> {
        self.inner.state.borrow().failed.clone().map_or(Ok(()), Err)
    }

    /// Finishes the journal: the first reason stays.
    pub(super) fn fail(&self, fatal: Fatal) -> Fatal {
        let first = self.inner.state.borrow_mut().failed.get_or_insert(fatal).clone();
        self.inner.segments.raise();
        first
    }
}

/// A write under way. Given up half done, it leaves the end of the journal unknown, so the journal is finished.
struct Whole<'a, S: Storage> {
    journal: &'a Journal<S>,
    done: bool,
}

impl<S: Storage> Whole<'_, S> {
    fn done(mut self) {
        self.done = true;
    }
}

impl<S: Storage> Drop for Whole<'_, S> {
    fn drop(&mut self) {
        if !self.done {
            self.journal.fail(Fatal::Abandoned);
        }
    }
}

/// Gives the right to prepare back, however the attempt ends.
struct Preparing<'a, S: Storage>(&'a Inner<S>);

impl<S: Storage> Drop for Preparing<'_, S> {
    fn drop(&mut self) {
        self.0.state.borrow_mut().preparing = false;
    }
}
