//! Where the state of a term is written down: a checkpoint, and spans of journals that go on from it.
//!
//! The state of term T is its own newest checkpoint and its batches after it; or, before it has one, the state of the base that
//! its Seal names, exactly to the position named there, what the Seal carries, and all its batches.

use csnap_proto::Term;
use csnap_storage::Storage;

use super::frame::Hash;
use super::pool::Pool;
use super::reader::{Cursor, first_frame};
use super::seal::{Base, CheckpointName, Seal};
use super::tail::evidence_behind;
use super::{Corrupt, Position, TermError, names};

/// How often a listing that changed under us is made anew: files go away only with a newer checkpoint, and a term does
/// not write that many while we look.
const LISTINGS_MAX: usize = 16;

/// A stretch of one term's journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// Whose.
    pub term: Term,
    /// Where reading starts: a segment's first frame.
    pub start: Cursor,
    /// The first position whose batch is not yet in the state.
    pub from: Position,
    /// Where it ends, exactly; at the end of what is valid if absent.
    pub to: Option<End>,
}

/// Where a later term's Seal says that a span ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    pub base: Base,
    /// Hash of the frame behind it that the Seal carries.
    pub carried: Option<Hash>,
}

impl End {
    pub(super) fn of(seal: &Seal) -> Option<Self> {
        let carried = seal.carried.as_ref().map(|carried| carried.hash);
        seal.base.map(|base| Self { base, carried })
    }
}

/// How to make the state of a term: `checkpoint` (or a new pool), then the spans in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub checkpoint: Option<CheckpointName>,
    pub spans: Vec<Span>,
}

/// Whether `term` has a valid Seal: it may have served. A Seal that is damaged, as records behind it prove, is corruption.
pub async fn is_sealed<S: Storage>(pool: &Pool<S>, term: Term) -> Result<bool, TermError> {
    for _ in 0..LISTINGS_MAX {
        let segments = names::numbered(&pool.storage, term, "journal-").await?;
        let Some(first) = names::first_of_last_run(&segments) else { return Ok(false) };
        // Every segment begins with the Seal, or with its repetition in terms that have deleted it.
        if first_frame(pool, term, first).await?.is_some() {
            return Ok(true);
        }
        let start = Cursor { segment: first, ..Cursor::START };
        match evidence_behind(pool, term, &start).await? {
            None if first == 0 => return Ok(false),
            None => {}
            Some(evidence) => {
                // It may have been written, or deleted, between the two looks.
                let still = first_frame(pool, term, first).await?.is_none();
                if still && names::numbered(&pool.storage, term, "journal-").await? == segments {
                    let what = format!("the first record is damaged, but {evidence}");
                    return Err(Corrupt::at(what, names::journal(term, first)).into());
                }
            }
        }
    }
    Err(Corrupt::at("a first segment without a valid first record", names::term_dir(term)).into())
}

/// The highest term with a valid Seal. A directory without one is never a start: it may be an orphan beside the chain.
pub async fn highest_sealed<S: Storage>(pool: &Pool<S>) -> Result<Term, TermError> {
    let mut listed = Vec::new();
    loop {
        let terms = names::terms(&pool.storage).await?;
        for term in terms.iter().rev() {
            if is_sealed(pool, *term).await? {
                return Ok(*term);
            }
        }
        if terms == listed {
            let what = "no term has a valid Seal, not even the one made with the pool";
            return Err(Corrupt::at(what, names::TERMS).into());
        }
        // A term that began after the listing may have deleted the journals of all that are on it.
        listed = terms;
    }
}

/// Whether whoever reads in `segment` of `term` can read on from there, now or later: neither it nor what follows it
/// was deleted.
pub(super) async fn line_goes_on<S: Storage>(
    pool: &Pool<S>,
    term: Term,
    segment: u64,
) -> Result<bool, TermError> {
    let segments = names::numbered(&pool.storage, term, "journal-").await?;
    Ok(names::first_of_last_run(&segments).is_some_and(|first| first <= segment))
}

/// The Seal of `term`, as long as its first segment exists.
pub async fn seal_of<S: Storage>(pool: &Pool<S>, term: Term) -> Result<Option<Seal>, TermError> {
    let Some(frame) = first_frame(pool, term, 0).await? else { return Ok(None) };
    let seal =
        Seal::decode(term, &frame.body).map_err(|corrupt| corrupt.or_at(|| frame.place.to_string()))?;
    Ok(Some(seal))
}

/// How to make the state of `term`, which is sealed.
pub(super) async fn plan<S: Storage>(pool: &Pool<S>, term: Term) -> Result<Plan, TermError> {
    if let Some(plan) = from_own_checkpoint(pool, term).await? {
        return Ok(plan);
    }
    let mut spans = vec![Span { term, start: Cursor::START, from: Position(0), to: None }];
    let mut of = term;
    let mut checkpoint = None;
    while let Some(seal) = seal_of(pool, of).await? {
        if of == term {
            checkpoint = seal.checkpoint;
        }
        let Some(end) = End::of(&seal) else {
            spans.reverse();
            return Ok(Plan { checkpoint, spans });
        };
        let base = end.base;
        let own = checkpoint.filter(|name| name.term == base.term);
        let (start, from) = match own {
            Some(name) => (segment_with(pool, base.term, name.position).await?, name.position),
            None => (Cursor::START, Position(0)),
        };
        spans.push(Span { term: base.term, start, from, to: Some(end) });
        if own.is_some() {
            spans.reverse();
            return Ok(Plan { checkpoint, spans });
        }
        of = base.term;
    }
    Err(Corrupt::at("the Seal that the state goes on from is missing", names::journal(of, 0)).into())
}

/// The plan that starts from the newest checkpoint of `term` itself, if it has one.
async fn from_own_checkpoint<S: Storage>(pool: &Pool<S>, term: Term) -> Result<Option<Plan>, TermError> {
    for segment in names::numbered(&pool.storage, term, "journal-").await?.into_iter().rev() {
        let Some(frame) = first_frame(pool, term, segment).await? else { continue };
        let seal =
            Seal::decode(term, &frame.body).map_err(|corrupt| corrupt.or_at(|| frame.place.to_string()))?;
        let Some(name) = seal.checkpoint.filter(|name| name.term == term) else { return Ok(None) };
        let start = segment_with(pool, term, name.position).await?;
        let span = Span { term, start, from: name.position, to: None };
        return Ok(Some(Plan { checkpoint: Some(name), spans: vec![span] }));
    }
    Ok(None)
}

/// The start of the segment in which `position` lies.
async fn segment_with<S: Storage>(
    pool: &Pool<S>,
    term: Term,
    position: Position,
) -> Result<Cursor, TermError> {
    for segment in names::numbered(&pool.storage, term, "journal-").await?.into_iter().rev() {
        match first_frame(pool, term, segment).await? {
            Some(frame) if frame.sequence <= position.0 => {
                return Ok(Cursor {
                    segment,
                    offset: 0,
                    position: Position(frame.sequence),
                    hash: frame.previous,
                });
            }
            _ => {}
        }
    }
    let what = format!("the segment with record {}, from which a checkpoint goes on, is missing", position.0);
    Err(Corrupt::at(what, names::term_dir(term)).into())
}
