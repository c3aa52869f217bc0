//! How a term begins. One function a step, in the order in which they must happen.
//!
//! 1. [`create_term`]: our directory and our open gate, durable before anybody can know of us.
//! 2. [`claim_end`]: from the highest sealed term along the chain to its end, and become the end's successor.
//! 3. [`close_back`]: back from there, closing each gate and *then* looking for the Seal; the first sealed one is the base.
//! 4. [`Follower::read_exactly`]: the base's state, exactly.
//! 5. [`seal`]: the first record of our journal says what we go on from; durable.
//! 6. our own gate is still open: serve.
//!
//! Why it is safe: a record that the base acted upon was durable before its gate was seen open, hence before we closed
//! it, hence before we looked. A term without a Seal never served, and never will: its gate is closed before we look, and it
//! looks at its gate after its Seal is durable. Two takers claim different ends, so the chain is one line.

use csnap_proto::{Term, Time};
use csnap_storage::{Storage, StorageError};

use super::canary::Canary;
use super::follow::Follower;
use super::gate::{self, Gate};
use super::journal::Journal;
use super::pool::Pool;
use super::seal::Seal;
use super::state::{highest_sealed, is_sealed};
use super::successor::{self, Claim};
use super::{Corrupt, Replay, TermError, names, room, segment};

/// A step of a takeover, for reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Our directory and gate are there.
    Created,
    /// We are the successor of the chain's end.
    Claimed,
    /// Every gate back to the base is closed.
    Closed,
    /// The base's state is loaded.
    Read,
    /// Our Seal is durable.
    Sealed,
    /// Our gate was open after that.
    Open,
}

/// A term that may serve.
pub struct TakenOver<S: Storage, R: Replay> {
    /// The state to go on from.
    pub replay: R,
    /// The journal to go on in.
    pub journal: Journal<S>,
    /// The term whose state it is.
    pub base: Term,
    /// When each step was done, by the caller's clock.
    pub steps: Vec<(Step, Time)>,
}

/// Begins `term`, a number that lockd has given to nobody else. `follower` may have most of the state already. `clock` only
/// dates the steps in the result.
///
/// # Errors
/// [`TermError::Deposed`]: a later term has begun, this process has no business any more. [`TermError::Corrupt`]: the
/// pool is damaged, and an operator must look before anybody serves it. [`TermError::Used`]: not a fresh number.
/// [`TermError::Storage`]: the medium failed. In every case the term is over; a new attempt needs a new number.
pub async fn take_over<S: Storage, R: Replay>(
    pool: &Pool<S>,
    term: Term,
    follower: Follower<S, R>,
    clock: impl Fn() -> Time,
) -> Result<TakenOver<S, R>, TermError> {
    let own = create_term(pool, term).await?;
    let mut steps = vec![(Step::Created, clock())];
    let taken = go_on(pool, term, own.clone(), follower, &clock, &mut steps).await;
    match taken {
        // A later term may have deleted what we were reading: then what we see is not damage.
        Err(TermError::Corrupt(_) | TermError::Storage(StorageError::NotFound { .. }))
            if !own.is_open().await? =>
        {
            Err(TermError::Deposed(term))
        }
        Err(error) => Err(error),
        Ok((replay, journal, base)) => Ok(TakenOver { replay, journal, base, steps }),
    }
}

async fn go_on<S: Storage, R: Replay>(
    pool: &Pool<S>,
    term: Term,
    own: Gate<S>,
    mut follower: Follower<S, R>,
    clock: &impl Fn() -> Time,
    steps: &mut Vec<(Step, Time)>,
) -> Result<(R, Journal<S>, Term), TermError> {
    let start = start_of_walk(pool, term).await?;
    let line = claim_end(pool, start, term).await?;
    steps.push((Step::Claimed, clock()));
    let base = close_back(pool, &line).await?;
    steps.push((Step::Closed, clock()));
    let state = follower.read_exactly(base).await?;
    steps.push((Step::Read, clock()));
    let journal = seal(pool, &line, term, own, state).await?;
    steps.push((Step::Sealed, clock()));
    if !journal.gate_open().await? {
        return Err(TermError::Deposed(term));
    }
    steps.push((Step::Open, clock()));
    Ok((follower.into_replay(), journal, base))
}

/// Step 1. A directory that exists means that the number was used: a term is one process, never two. In a full pool the
/// directory and the gate are those of a room.
async fn create_term<S: Storage>(pool: &Pool<S>, term: Term) -> Result<Gate<S>, TermError> {
    let (storage, directory) = (&pool.storage, names::term_dir(term));
    match storage.create_dir(&directory).await {
        Err(StorageError::Exists { .. }) => return Err(TermError::Used(term)),
        Err(full @ StorageError::NoSpace { .. }) => return room::move_in(storage, term, full).await,
        created => created?,
    }
    storage.sync_dir(names::TERMS).await?;
    match Gate::create(storage, term).await {
        Ok(gate) => {
            storage.sync_dir(&directory).await?;
            Ok(gate)
        }
        Err(full @ StorageError::NoSpace { .. }) => {
            // Nobody heard of it yet; an empty directory makes way.
            storage.unlink(&names::gate(term)).await?;
            room::move_in(storage, term, full).await
        }
        Err(error) => Err(error.into()),
    }
}

async fn start_of_walk<S: Storage>(pool: &Pool<S>, term: Term) -> Result<Term, TermError> {
    if pool.canaries.breaks(Canary::StartAnywhere) {
        let below = names::terms(&pool.storage).await?.into_iter().rfind(|earlier| *earlier < term);
        return Ok(below.expect("term 0 is made with the pool"));
    }
    let start = highest_sealed(pool).await?;
    if start > term && !pool.canaries.breaks(Canary::PassHigherTerm) {
        return Err(TermError::Deposed(term));
    }
    Ok(start)
}

/// Step 2: walks the chain from `start` to its end and makes `term` the end's successor. Everything that is walked over is
/// made durable. Returns the terms walked over, the end last.
async fn claim_end<S: Storage>(pool: &Pool<S>, start: Term, term: Term) -> Result<Vec<Term>, TermError> {
    let mut line = vec![start];
    loop {
        let end = *line.last().expect("it begins with the start");
        match successor::read_durably(pool, end).await? {
            Some(next) if next >= term && !pool.canaries.breaks(Canary::PassHigherTerm) => {
                return Err(TermError::Deposed(term));
            }
            Some(next) => line.push(next),
            None => match successor::claim(pool, end, term).await? {
                Claim::Ours => return Ok(line),
                // Somebody was faster: read whom it names, durably, and walk on.
                Claim::Theirs(_) => {}
            },
        }
    }
}

/// Step 3: back from the end: close the gate, *then* look for the Seal. The first sealed term is the base; one without never
/// served, and now never will.
async fn close_back<S: Storage>(pool: &Pool<S>, line: &[Term]) -> Result<Term, TermError> {
    for term in line.iter().rev().copied() {
        if pool.canaries.breaks(Canary::SealBeforeGate) {
            let sealed = is_sealed(pool, term).await?;
            gate::close(&pool.storage, term).await?;
            if sealed {
                return Ok(term);
            }
            continue;
        }
        gate::close(&pool.storage, term).await?;
        if is_sealed(pool, term).await? {
            return Ok(term);
        }
    }
    Err(Corrupt::at("the Seal that the walk began at is gone", names::term_dir(line[0])).into())
}

/// Step 5: our journal, and its first record.
async fn seal<S: Storage>(
    pool: &Pool<S>,
    line: &[Term],
    term: Term,
    own: Gate<S>,
    state: Seal,
) -> Result<Journal<S>, TermError> {
    let file = segment::first_of(&pool.storage, line, term, pool.hasty_segment_bytes()).await?;
    let predecessor = *line.last().expect("it begins with the start");
    segment::inherit(&pool.storage, predecessor, term).await?;
    pool.storage.sync_dir(&names::term_dir(term)).await?;
    Ok(Journal::begin(pool.clone(), term, own, state, file).await?)
}
