//! What a term deletes: files that its newest checkpoint made superfluous, its own and every earlier term's.
//!
//! Only after the record that names the checkpoint was durable and the gate was *then* seen open: whoever takes over
//! closes the gate first and looks afterwards, so it finds that record and needs none of these files. A `successor` and a
//! `gate` are never deleted: they are the chain, and the fence. In a full pool, what holds nothing goes before that
//! ([`release_unused`]).

use csnap_proto::Term;
use csnap_storage::{Access, BLOCK_BYTES, Storage, StorageError};

use super::journal::Journal;
use super::{Fatal, Position, names, room};

/// Looks at the gate and deletes. Interrupted anywhere it leaves superfluous files, which the next checkpoint takes along.
pub(super) async fn reclaim<S: Storage>(journal: &Journal<S>) -> Result<(), Fatal> {
    let term = journal.term();
    let Some(newest) = journal.inner.state.borrow().checkpoint.filter(|name| name.term == term) else {
        return Ok(());
    };
    if !journal.gate_open().await? {
        return Err(journal.fail(Fatal::Deposed(term)));
    }
    let gone = own_files(journal, newest.position, newest.number).await;
    gone.map_err(|error| journal.fail(error.into()))?;
    if !journal.inner.state.borrow().earlier_reclaimed {
        earlier_terms(journal).await.map_err(|error| journal.fail(error.into()))?;
        journal.inner.state.borrow_mut().earlier_reclaimed = true;
    }
    Ok(())
}

async fn own_files<S: Storage>(
    journal: &Journal<S>,
    position: Position,
    newest: u64,
) -> Result<(), StorageError> {
    let (storage, term) = (&journal.inner.pool.storage, journal.term());
    let first_kept = {
        let state = &mut *journal.inner.state.borrow_mut();
        let kept = &state.kept;
        // The segment in which the position lies, and everything after it, is read again.
        let index = kept
            .iter()
            .rposition(|(_, first)| *first <= position)
            .expect("segment 0 starts at 0, and a later first is kept");
        state.kept.drain(..index);
        state.kept[0].0
    };
    for segment in names::numbered(storage, term, "journal-").await? {
        if segment < first_kept {
            unlink(storage, &names::journal(term, segment)).await?;
        }
    }
    for number in names::numbered(storage, term, "checkpoint-").await? {
        if number < newest {
            unlink(storage, &names::checkpoint(term, number)).await?;
        }
    }
    for end in names::numbered(storage, term, "claim-").await? {
        unlink(storage, &names::claim(term, Term(end))).await?;
    }
    Ok(())
}

async fn earlier_terms<S: Storage>(journal: &Journal<S>) -> Result<(), StorageError> {
    let storage = &journal.inner.pool.storage;
    room::clear_earlier(storage, journal.term()).await?;
    for term in names::terms(storage).await?.into_iter().take_while(|term| *term < journal.term()) {
        let directory = names::term_dir(term);
        for name in storage.list(&directory).await? {
            if name != "successor" && name != "gate" {
                unlink(storage, &format!("{directory}/{name}")).await?;
            }
        }
    }
    Ok(())
}

/// Deletes the segments that terms before `term` made ready and never began, for want of space. Without a frame at its start
/// a segment holds nothing of its term's journal, and what a deposed server still writes there counts for nobody: the Seal
/// of `term`, which serves, says where that journal ends.
pub(super) async fn release_unused<S: Storage>(storage: &S, term: Term) -> Result<(), StorageError> {
    for earlier in names::terms(storage).await?.into_iter().take_while(|earlier| *earlier < term) {
        for segment in names::numbered(storage, earlier, "journal-").await?.into_iter().rev() {
            let path = names::journal(earlier, segment);
            let first = match storage.open(&path, Access::Read).await {
                Err(StorageError::NotFound { .. }) => continue,
                file => storage.read(&file?, 0, BLOCK_BYTES).await?,
            };
            if first.iter().any(|byte| *byte != 0) {
                break;
            }
            unlink(storage, &path).await?;
            // Space is free for certain once the name is gone for good.
            storage.sync_dir(&names::term_dir(earlier)).await?;
        }
    }
    Ok(())
}

async fn unlink<S: Storage>(storage: &S, path: &str) -> Result<(), StorageError> {
    match storage.unlink(path).await {
        Err(StorageError::NotFound { .. }) => Ok(()),
        done => done,
    }
}
