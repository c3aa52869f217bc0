//! Reading everything, offline: every term, the chain, every frame. Reports all it finds instead of stopping at the first.
//!
//! Called by `csnap check` while nothing serves the pool; it changes nothing.

use csnap_proto::Term;
use csnap_storage::Storage;

use super::pool::Pool;
use super::reader::{Cursor, Reader, first_frame};
use super::seal::{CheckpointName, Seal};
use super::state::{End, is_sealed, seal_of};
use super::tail::evidence_behind;
use super::{Corrupt, Position, Replay, TermError, checkpoint, gate, names, successor};

/// What was found of one term.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TermReport {
    /// The term.
    pub term: Term,
    /// It is on the chain, not an orphan beside it.
    pub chained: bool,
    /// It has a valid Seal: it may have served.
    pub sealed: bool,
    /// Its gate reads open.
    pub gate_open: bool,
    /// Valid records of its journal that were read.
    pub records: u64,
    /// Where its valid journal ends, if any of it is there.
    pub end: Option<Position>,
    /// The newest checkpoint that its state starts from.
    pub checkpoint: Option<CheckpointName>,
}

/// What was found of all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Terms, ascending.
    pub terms: Vec<TermReport>,
    /// The chain from term 0 on.
    pub chain: Vec<Term>,
    /// The term whose state is the pool's.
    pub newest: Option<Term>,
    /// Everything that is wrong.
    pub damage: Vec<Corrupt>,
}

impl Report {
    /// Whether the newest state starts from a checkpoint of a later term. Then the files of `term` are nothing but
    /// leftovers, of which a power cut may have brought back any part.
    fn supersedes(&self, term: Term) -> bool {
        let newest = self.terms.iter().find(|found| Some(found.term) == self.newest);
        newest.and_then(|found| found.checkpoint).is_some_and(|name| term < name.term)
    }
}

/// Reads everything that terms left.
///
/// # Errors
/// Only what the medium refuses to read; damage is part of the report.
pub async fn verify<S: Storage>(pool: &Pool<S>) -> Result<Report, TermError> {
    let mut report = Report::default();
    report.chain = note(&mut report.damage, chain(pool).await)?.unwrap_or_default();
    for term in names::terms(&pool.storage).await?.into_iter().rev() {
        let chained = report.chain.contains(&term);
        let superseded = report.supersedes(term);
        let found = verify_term(pool, term, chained, superseded, &mut report.damage).await?;
        if found.sealed && !chained {
            report
                .damage
                .push(Corrupt::at("sealed, but not on the chain of successors", names::term_dir(term)));
        }
        if found.sealed && report.newest.is_none() {
            report.newest = Some(term);
        }
        report.terms.insert(0, found);
    }
    if report.newest.is_none() {
        report.damage.push(Corrupt::at("no term has a valid Seal", names::TERMS));
    }
    Ok(report)
}

/// The chain of successors from term 0 on.
pub async fn chain<S: Storage>(pool: &Pool<S>) -> Result<Vec<Term>, TermError> {
    let mut chain = vec![Term(0)];
    while let Some(next) = successor::read(pool, *chain.last().expect("it begins with term 0")).await? {
        chain.push(next);
    }
    Ok(chain)
}

async fn verify_term<S: Storage>(
    pool: &Pool<S>,
    term: Term,
    chained: bool,
    superseded: bool,
    damage: &mut Vec<Corrupt>,
) -> Result<TermReport, TermError> {
    let sealed = is_sealed(pool, term).await;
    let mut ignored = Vec::new();
    let mut report = TermReport {
        term,
        chained,
        sealed: note(if superseded { &mut ignored } else { damage }, sealed)?.unwrap_or(false),
        gate_open: gate::reads_open(&pool.storage, term).await?,
        records: 0,
        end: None,
        checkpoint: None,
    };
    if report.sealed && !superseded {
        note(damage, verify_journal(pool, &mut report).await)?;
        match report.checkpoint.filter(|name| name.term == term) {
            Some(name) => drop(note(damage, checkpoint::load(pool, &name, &mut Ignore).await)?),
            // Without a checkpoint of its own it needs its base's files; otherwise those are leftovers, as above.
            None => drop(note(damage, verify_base(pool, term).await)?),
        }
    }
    Ok(report)
}

/// Every record of the segments that are there, in line, and an end that is no worse than torn.
async fn verify_journal<S: Storage>(pool: &Pool<S>, report: &mut TermReport) -> Result<(), TermError> {
    let segments = names::numbered(&pool.storage, report.term, "journal-").await?;
    let Some(first) = names::first_of_last_run(&segments) else { return Ok(()) };
    let Some(frame) = first_frame(pool, report.term, first).await? else { return Ok(()) };
    let start =
        Cursor { segment: first, offset: 0, position: Position(frame.sequence), hash: frame.previous };
    let mut reader = Reader::new(pool, report.term, start);
    while let Some(frame) = reader.next().await? {
        report.records += 1;
        if frame.place.offset == 0 {
            report.checkpoint = Seal::decode(report.term, &frame.body)?.checkpoint;
        }
    }
    let cursor = reader.cursor();
    report.end = Some(cursor.position);
    match evidence_behind(pool, report.term, &cursor).await? {
        None => Ok(()),
        Some(evidence) => {
            let what = format!("record {} is damaged, but {evidence}", cursor.position.0);
            let at = format!("{} at byte {}", names::journal(report.term, cursor.segment), cursor.offset);
            Err(Corrupt::at(what, at).into())
        }
    }
}

/// The base that the Seal names reaches as far as it says, as long as its files are needed.
async fn verify_base<S: Storage>(pool: &Pool<S>, term: Term) -> Result<(), TermError> {
    let Some(end) = seal_of(pool, term).await?.as_ref().and_then(End::of) else { return Ok(()) };
    let needed = names::numbered(&pool.storage, end.base.term, "journal-").await?;
    let Some(first) = names::first_of_last_run(&needed) else { return Ok(()) };
    let Some(frame) = first_frame(pool, end.base.term, first).await? else { return Ok(()) };
    let start =
        Cursor { segment: first, offset: 0, position: Position(frame.sequence), hash: frame.previous };
    let mut reader = Reader::new(pool, end.base.term, start);
    while reader.cursor().position < end.base.position {
        if reader.next().await?.is_none() {
            break;
        }
    }
    let cursor = reader.cursor();
    if cursor.position == end.base.position && cursor.hash == end.base.hash {
        return Ok(());
    }
    let what =
        format!("the Seal of term {term} names its record {}, which is not there", end.base.position.0);
    Err(Corrupt::at(what, names::journal(end.base.term, cursor.segment)).into())
}

/// Collects damage; passes on what the medium refuses.
fn note<T>(damage: &mut Vec<Corrupt>, result: Result<T, TermError>) -> Result<Option<T>, TermError> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(TermError::Corrupt(corrupt)) => {
            damage.push(corrupt);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Reads without keeping.
struct Ignore;

impl Replay for Ignore {
    fn begin_checkpoint(&mut self) {}
    fn piece(&mut self, _: &[u8]) -> Result<(), Corrupt> {
        Ok(())
    }
    fn end_checkpoint(&mut self) -> Result<(), Corrupt> {
        Ok(())
    }
    fn batch(&mut self, _: &[u8]) -> Result<(), Corrupt> {
        Ok(())
    }
}
