//! Following: a standby keeps the state loaded while the serving term's journal grows, so that taking over costs the tail.
//!
//! A follower reads what is not yet certain: frames that a seal will leave out, or that a power cut takes back. It
//! remembers exactly where it stands (term, position, hash), and when a later term's Seal does not name a place
//! that it passed, it loads anew. Nothing is served from it before [`take_over`](super::take_over) made it exact.

use csnap_proto::Term;
use csnap_storage::{Storage, StorageError};

use super::canary::Canary;
use super::frame::{Frame, Hash, Kind};
use super::pool::Pool;
use super::reader::{Cursor, Reader};
use super::seal::{Base, Carried, CheckpointName, Seal};
use super::state::{self, End, Plan, Span};
use super::tail::evidence_behind;
use super::{Corrupt, Position, Replay, TermError, checkpoint, names};

/// Attempts at reading a state whose files are deleted meanwhile by a term that goes on.
const LOADS_MAX: usize = 8;

/// How far a follower is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Followed {
    /// Whose journal it reads.
    pub term: Term,
    /// Frames of it that are in the state.
    pub position: Position,
}

/// State that is kept up to date by reading.
pub struct Follower<S: Storage, R: Replay> {
    pool: Pool<S>,
    replay: R,
    at: Option<Reached<S>>,
    loads: u64,
}

/// Where the loaded state stands.
struct Reached<S: Storage> {
    reader: Reader<S>,
    /// Batches of the reader's term before this position are in the checkpoint.
    from: Position,
    checkpoint: Option<CheckpointName>,
    /// The last frame that was read of this term, and the cursor before it.
    last: Option<(Cursor, Frame)>,
    /// The last batch that was applied, of this term or carried from an earlier one.
    applied: Option<Hash>,
}

impl<S: Storage, R: Replay> Follower<S, R> {
    /// A follower that has loaded nothing yet.
    pub fn new(pool: &Pool<S>, replay: R) -> Self {
        Self { pool: pool.clone(), replay, at: None, loads: 0 }
    }

    /// The state as far as it was read; not to be served.
    pub fn replay(&self) -> &R {
        &self.replay
    }

    /// How often the state was loaded from a checkpoint instead of being read on.
    pub fn loads(&self) -> u64 {
        self.loads
    }

    /// How far it is; `None` before anything was loaded.
    pub fn followed(&self) -> Option<Followed> {
        let at = self.at.as_ref()?;
        Some(Followed { term: at.reader.term(), position: at.reader.cursor().position })
    }

    /// The state, for whoever took over.
    pub(super) fn into_replay(self) -> R {
        self.replay
    }

    /// Reads what is new, over to later terms, and loads anew where it must.
    ///
    /// # Errors
    /// Corruption of what must be whole. Damage at the end is none: the end may be being written.
    pub async fn advance(&mut self) -> Result<Followed, TermError> {
        let mut tried = None;
        loop {
            let newest = state::highest_sealed(&self.pool).await?;
            match self.follow(newest).await {
                // What was missing or damaged may have been deleted: then there is a later term to follow.
                Err(TermError::Corrupt(_) | TermError::Storage(StorageError::NotFound { .. }))
                    if tried != Some(newest) =>
                {
                    self.at = None;
                    tried = Some(newest);
                }
                done => return done,
            }
        }
    }

    /// Reads to the end of what `newest`, the newest sealed term, has written.
    async fn follow(&mut self, newest: Term) -> Result<Followed, TermError> {
        self.reach(newest).await?;
        self.read_on(None).await?;
        let segment = self.reached().reader.cursor().segment;
        if !state::line_goes_on(&self.pool, newest, segment).await? {
            // A checkpoint made our segment superfluous before we read to its end: load that checkpoint.
            self.at = None;
            self.reach(newest).await?;
        }
        Ok(self.followed().expect("it was reached"))
    }

    /// Step 4 of a takeover: makes the state exactly that of `base`, whose gate is closed: its valid prefix, checked to
    /// end in nothing worse than a torn write. Returns what the new term's Seal says.
    pub(super) async fn read_exactly(&mut self, base: Term) -> Result<Seal, TermError> {
        self.reach(base).await?;
        if let Err(TermError::Corrupt(_)) = self.read_to_end(base).await {
            // What a follower read may have been lost with the power, or deleted with a checkpoint: only what a fresh look at
            // the pool finds damaged is damaged.
            self.at = None;
            self.reach(base).await?;
            self.read_to_end(base).await?;
        }
        let trust = self.pool.canaries.breaks(Canary::TrustTheCache);
        self.reached().seal_for_next(trust)
    }

    async fn read_to_end(&mut self, base: Term) -> Result<(), TermError> {
        let corrupt = |what: String, cursor: &Cursor| {
            let at = format!("{} at byte {}", names::journal(base, cursor.segment), cursor.offset);
            TermError::from(Corrupt::at(what, at))
        };
        if !self.last_is_still_there().await? {
            return Err(corrupt(
                "the last record that was read is gone".into(),
                &self.reached().reader.cursor(),
            ));
        }
        loop {
            self.read_on(None).await?;
            let cursor = self.reached().reader.cursor();
            let Some(evidence) = evidence_behind(&self.pool, base, &cursor).await? else { return Ok(()) };
            // The base's server may be writing still, though nobody will hear of it: only what stays damaged is damaged.
            let Some(frame) = self.reached().reader.next().await? else {
                return Err(corrupt(
                    format!("record {} is damaged, but {evidence}", cursor.position.0),
                    &cursor,
                ));
            };
            self.apply(cursor, frame)?;
        }
    }

    fn reached(&mut self) -> &mut Reached<S> {
        self.at.as_mut().expect("callers reach a term first")
    }

    /// Brings the state into the journal of `term`: by reading on if that leads there, else by loading.
    async fn reach(&mut self, term: Term) -> Result<(), TermError> {
        if self.at.as_ref().is_some_and(|at| at.reader.term() == term) {
            return Ok(());
        }
        if let Some(spans) = self.spans_to(term).await?
            && self.run(spans).await.is_ok()
        {
            return Ok(());
        }
        self.at = None;
        let mut before = None;
        for _ in 0..LOADS_MAX {
            let plan = state::plan(&self.pool, term).await;
            let loaded = match &plan {
                Ok(plan) => self.load(plan).await,
                Err(error) => Err(error.clone()),
            };
            match loaded {
                Ok(()) => return Ok(()),
                // The term may go on meanwhile and delete what the plan was made of: then there is another plan.
                Err(TermError::Corrupt(_) | TermError::Storage(StorageError::NotFound { .. }))
                    if before.as_ref() != Some(&plan) =>
                {
                    self.at = None;
                    before = Some(plan);
                }
                Err(error) => {
                    self.at = None;
                    return Err(error);
                }
            }
        }
        Err(Corrupt::at("the state changes faster than it can be read", names::term_dir(term)).into())
    }

    async fn load(&mut self, plan: &Plan) -> Result<(), TermError> {
        self.loads += 1;
        match &plan.checkpoint {
            Some(name) => checkpoint::load(&self.pool, name, &mut self.replay).await?,
            None => {
                self.replay.begin_checkpoint();
                self.replay.end_checkpoint()?;
            }
        }
        self.run(plan.spans.clone()).await
    }

    /// The way from where we stand to `term`, if its Seal and those before it lead back to us.
    async fn spans_to(&self, term: Term) -> Result<Option<Vec<Span>>, TermError> {
        let Some(at) = &self.at else { return Ok(None) };
        let mut spans = vec![Span { term, start: Cursor::START, from: Position(0), to: None }];
        let mut of = term;
        while let Some(seal) = state::seal_of(&self.pool, of).await? {
            if at.only_sealed_as(&seal) {
                break;
            }
            let Some(end) = End::of(&seal).filter(|end| end.base.term >= at.reader.term()) else {
                return Ok(None);
            };
            of = end.base.term;
            spans.push(Span { term: of, start: Cursor::START, from: Position(0), to: Some(end) });
            if of == at.reader.term() {
                break;
            }
        }
        spans.reverse();
        Ok(Some(spans))
    }

    /// Reads the spans in order into the state.
    async fn run(&mut self, spans: Vec<Span>) -> Result<(), TermError> {
        for span in spans {
            if self.at.as_ref().is_none_or(|at| at.reader.term() != span.term) {
                self.at = Some(Reached {
                    reader: Reader::new(&self.pool, span.term, span.start),
                    from: span.from,
                    checkpoint: None,
                    last: None,
                    applied: self.at.as_ref().and_then(|at| at.applied),
                });
            }
            self.read_on(span.to.map(|end| end.base.position)).await?;
            if let Some(end) = span.to {
                self.reached().check_end(&end)?;
            }
        }
        Ok(())
    }

    /// Reads to `until`, or to the end of what is valid.
    async fn read_on(&mut self, until: Option<Position>) -> Result<(), TermError> {
        loop {
            let reader = &mut self.reached().reader;
            let cursor = reader.cursor();
            if until.is_some_and(|until| cursor.position >= until) {
                return Ok(());
            }
            let Some(frame) = reader.next().await? else { return Ok(()) };
            self.apply(cursor, frame)?;
        }
    }

    fn apply(&mut self, before: Cursor, frame: Frame) -> Result<(), Corrupt> {
        let at = self.at.as_mut().expect("callers reach a term first");
        let place = || frame.place.to_string();
        match frame.kind {
            Kind::Batch if frame.sequence >= at.from.0 => {
                self.replay.batch(&frame.body).map_err(|corrupt| corrupt.or_at(place))?;
                at.applied = Some(frame.hash);
            }
            Kind::Seal | Kind::Segment => {
                let seal =
                    Seal::decode(frame.place.term, &frame.body).map_err(|corrupt| corrupt.or_at(place))?;
                let is_new =
                    |carried: &Carried| frame.sequence >= at.from.0 && at.applied != Some(carried.hash);
                if let Some(carried) = seal.carried.filter(is_new) {
                    self.replay.batch(&carried.body).map_err(|corrupt| corrupt.or_at(place))?;
                    at.applied = Some(carried.hash);
                }
                at.checkpoint = seal.checkpoint;
            }
            _ => {}
        }
        at.last = Some((before, frame));
        Ok(())
    }

    /// Whether the last frame that was read can still be read: what a follower saw may have been lost with the power.
    async fn last_is_still_there(&mut self) -> Result<bool, TermError> {
        let pool = self.pool.clone();
        let at = self.reached();
        let Some((before, frame)) = &at.last else { return Ok(false) };
        let mut reader = Reader::new(&pool, at.reader.term(), *before);
        let there = reader.next().await?.is_some_and(|found| found.hash == frame.hash);
        at.reader = reader;
        Ok(there)
    }
}

impl<S: Storage> Reached<S> {
    /// Whether the state is what `seal` says because our own Seal said the same, and nothing came after it.
    fn only_sealed_as(&self, seal: &Seal) -> bool {
        let Some((_, frame)) = &self.last else { return false };
        frame.kind == Kind::Seal && Seal::decode(frame.place.term, &frame.body).as_ref() == Ok(seal)
    }

    /// Whether we stand where a span ends: there, or behind the very frame that the Seal carries, or one without content.
    fn check_end(&self, end: &End) -> Result<(), Corrupt> {
        let stands_at =
            |cursor: &Cursor| cursor.position == end.base.position && cursor.hash == end.base.hash;
        let cursor = self.reader.cursor();
        let behind = self.last.as_ref().is_some_and(|(before, frame)| {
            stands_at(before) && (frame.kind == Kind::Segment || end.carried == Some(frame.hash))
        });
        if stands_at(&cursor) || behind {
            return Ok(());
        }
        let what = if cursor.position < end.base.position {
            format!(
                "record {} is damaged, but a later Seal names record {}",
                cursor.position.0, end.base.position.0
            )
        } else {
            format!("a later Seal names another record {}", end.base.position.0)
        };
        Err(Corrupt::at(
            what,
            format!("{} at byte {}", names::journal(end.base.term, cursor.segment), cursor.offset),
        ))
    }

    /// What the term that goes on from here says in its Seal. The last frame may not be durable: see [`seal`](super::seal).
    fn seal_for_next(&self, trust_the_cache: bool) -> Result<Seal, TermError> {
        let term = self.reader.term();
        let Some((before, frame)) = &self.last else {
            return Err(Corrupt::at("nothing of it can be read", names::term_dir(term)).into());
        };
        let cursor = self.reader.cursor();
        if trust_the_cache {
            let base = Base { term, position: cursor.position, hash: cursor.hash };
            return Ok(Seal { base: Some(base), checkpoint: self.checkpoint, carried: None });
        }
        let base = Some(Base { term, position: before.position, hash: before.hash });
        match frame.kind {
            Kind::Seal => Ok(Seal::decode(term, &frame.body)?),
            Kind::Batch => {
                let carried = Some(Carried { hash: frame.hash, body: frame.body.clone() });
                Ok(Seal { base, checkpoint: self.checkpoint, carried })
            }
            _ => Ok(Seal { base, checkpoint: self.checkpoint, carried: None }),
        }
    }
}
