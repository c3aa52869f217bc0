//! The successor: a file that appears once in a term's directory, exclusively and complete, and names the next term.
//! The chain of successors from term 0 on is the history of the pool, and it is one line.
//!
//! ```text
//!        0        1        2        3        4        5        6        7
//!   0  | magic "csnapnxt"                                                      |
//!   8  | version u16     | 0                                                   |
//!  16  | pool id                                                               |
//!  24  |                                                                       |
//!  32  | term in whose directory it lies u64                                   |
//!  40  | term that follows u64                                                 |
//!  48  | blake3 of bytes 0..48 (32 bytes)                                      |
//!  80  | zeros to 4096                                                         |
//! ```

use bytes::{BufMut, Bytes, BytesMut};
use csnap_proto::{PoolId, Term};
use csnap_storage::{Access, BLOCK_BYTES, Storage, StorageError};

use super::canary::Canary;
use super::pool::Pool;
use super::{Corrupt, TermError, names, room};

const MAGIC: [u8; 8] = *b"csnapnxt";
/// Version 1: the first.
const VERSION: u16 = 1;
const HASHED_BYTES: usize = 48;

/// How an attempt to become the successor of a term went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The link was made; it is durable.
    Ours,
    /// This term was faster.
    Theirs(Term),
}

/// Makes `term` the successor of `end`, unless there is one: temporary file in our own directory, sync, link, sync.
pub async fn claim<S: Storage>(pool: &Pool<S>, end: Term, term: Term) -> Result<Claim, TermError> {
    let storage = &pool.storage;
    let ours = names::claim(term, end);
    write_claim(storage, &ours, term, encode(pool.id(), end, term)).await?;
    if pool.canaries.breaks(Canary::TwoSuccessors) {
        storage.rename(&ours, &names::successor(end)).await?;
        storage.sync_dir(&names::term_dir(end)).await?;
        return Ok(Claim::Ours);
    }
    match storage.link(&ours, &names::successor(end)).await {
        Ok(()) => {}
        // A network file system may have made the link and lost the answer: who is named decides, not who was told.
        Err(StorageError::Exists { .. }) => match read(pool, end).await? {
            Some(named) if named != term => return Ok(Claim::Theirs(named)),
            _ => {}
        },
        // A later term tidied our directory: it is served already, and we are beside the chain.
        Err(StorageError::NotFound { .. }) => return Err(TermError::Deposed(term)),
        Err(error) => return Err(error.into()),
    }
    storage.sync_dir(&names::term_dir(end)).await?;
    Ok(Claim::Ours)
}

/// Writes and syncs what is to be linked in: a new file, or in a full pool the block of the room that `term` moved into,
/// or of another one if it found space for all but the claim.
async fn write_claim<S: Storage>(
    storage: &S,
    path: &str,
    term: Term,
    block: Bytes,
) -> Result<(), StorageError> {
    let full = match write_synced(storage, storage.create(path).await, &block).await {
        Err(full @ StorageError::NoSpace { .. }) => full,
        done => return done,
    };
    let rooms = (0..room::ROOMS).rev().map(names::room);
    for directory in std::iter::once(names::term_dir(term)).chain(rooms) {
        match storage.rename(&names::claim_in(&directory), path).await {
            Ok(()) => {
                // Nobody must find it under its old name and write over what will be a successor.
                storage.sync_dir(&directory).await?;
                return write_synced(storage, storage.open(path, Access::ReadWrite).await, &block).await;
            }
            Err(StorageError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Err(full)
}

async fn write_synced<S: Storage>(
    storage: &S,
    file: Result<S::File, StorageError>,
    block: &Bytes,
) -> Result<(), StorageError> {
    let file = file?;
    storage.write(&file, 0, block.clone()).await?;
    storage.sync(&file).await
}

/// Whom `term` names as its successor, if anybody. It may not be durable yet.
pub async fn read<S: Storage>(pool: &Pool<S>, term: Term) -> Result<Option<Term>, TermError> {
    let path = names::successor(term);
    let file = match pool.storage.open(&path, Access::Read).await {
        Err(StorageError::NotFound { .. }) => return Ok(None),
        file => file?,
    };
    let block = pool.storage.read(&file, 0, BLOCK_BYTES).await?;
    decode(pool.id(), term, &block).map(Some).map_err(|corrupt| corrupt.or_at(|| path).into())
}

/// As [`read`], and makes what it found durable: whoever goes on from it must not lose it.
pub async fn read_durably<S: Storage>(pool: &Pool<S>, term: Term) -> Result<Option<Term>, TermError> {
    let Some(next) = read(pool, term).await? else { return Ok(None) };
    let file = pool.storage.open(&names::successor(term), Access::Read).await?;
    pool.storage.sync(&file).await?;
    pool.storage.sync_dir(&names::term_dir(term)).await?;
    Ok(Some(next))
}

fn encode(pool: PoolId, term: Term, next: Term) -> Bytes {
    let mut out = BytesMut::with_capacity(BLOCK_BYTES);
    out.put_slice(&MAGIC);
    out.put_u16_le(VERSION);
    out.put_bytes(0, 6);
    out.put_slice(&pool.0);
    out.put_u64_le(term.0);
    out.put_u64_le(next.0);
    let hash = blake3::hash(&out[..HASHED_BYTES]);
    out.put_slice(hash.as_bytes());
    out.put_bytes(0, BLOCK_BYTES - out.len());
    out.freeze()
}

fn decode(pool: PoolId, term: Term, block: &[u8]) -> Result<Term, Corrupt> {
    if block.len() != BLOCK_BYTES {
        return Err(Corrupt::new("a successor that is not one block"));
    }
    let next = Term(u64::from_le_bytes(block[40..48].try_into().expect("eight bytes")));
    if block != encode(pool, term, next) {
        return Err(Corrupt::new("a successor that is damaged, or of another term or pool"));
    }
    if next <= term {
        return Err(Corrupt::new("a successor that is not a later term"));
    }
    Ok(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_successor_is_valid_only_where_it_was_linked() {
        let pool = PoolId([1; 16]);
        let block = encode(pool, Term(2), Term(5));
        assert_eq!(decode(pool, Term(2), &block), Ok(Term(5)));
        assert!(decode(pool, Term(3), &block).is_err());
        assert!(decode(PoolId([2; 16]), Term(2), &block).is_err());
        assert!(decode(pool, Term(5), &encode(pool, Term(5), Term(5))).is_err());
        for byte in 0..BLOCK_BYTES {
            let mut damaged = block.to_vec();
            damaged[byte] ^= 1;
            assert!(decode(pool, Term(2), &damaged).is_err(), "byte {byte}");
        }
    }
}
