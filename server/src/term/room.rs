//! Rooms: directories that are set aside for terms to come, for the day when the file system takes no further block. A term
//! that finds no space for its directory, its gate or its claim moves into one: renaming it and writing over what it holds
//! takes no space.
//!
//! ```text
//! term/room-<i>/gate     an open gate
//! term/room-<i>/claim    one block, for the claim of whoever moves in, or has no space for a claim alone
//! ```
//!
//! Rooms are alike and nobody's. Each is made privately by a term that serves, durable as a whole before it gets its name; the
//! rename that moves in happens once, so no two terms get the same room. A taker that dies takes its room along: there are
//! more of them than of the segments that are set aside.

use bytes::Bytes;
use csnap_proto::Term;
use csnap_storage::{BLOCK_BYTES, Result, Storage, StorageError};

use super::gate::Gate;
use super::{TermError, names, segment};

/// Rooms that are kept ready, three blocks each: for the two terms for which segments are set aside, and as many that die
/// early.
pub const ROOMS: u64 = 4;

/// Makes the rooms that are missing. Called by `term` alone, while it serves.
pub async fn set_aside<S: Storage>(storage: &S, term: Term) -> Result<()> {
    for index in 0..ROOMS {
        if segment::exists(storage, &names::room(index)).await? {
            continue;
        }
        let private = names::room_being_made(index, term);
        match furnish(storage, &private).await {
            Ok(()) => {}
            Err(error) => {
                // What it took goes back to whoever needs it more.
                let _ = clear(storage, &private).await;
                return Err(error);
            }
        }
        match storage.rename(&private, &names::room(index)).await {
            Ok(()) => {}
            // An earlier term that does not know of its end was faster: its room is as good.
            Err(_) if segment::exists(storage, &names::room(index)).await? => {
                clear(storage, &private).await?
            }
            Err(error) => return Err(error),
        }
        storage.sync_dir(names::TERMS).await?;
    }
    Ok(())
}

async fn furnish<S: Storage>(storage: &S, room: &str) -> Result<()> {
    clear(storage, room).await?;
    storage.create_dir(room).await?;
    for path in [names::gate_in(room), names::claim_in(room)] {
        let file = storage.create(&path).await?;
        storage.write(&file, 0, Bytes::from_static(&[0; BLOCK_BYTES])).await?;
        storage.sync(&file).await?;
    }
    storage.sync_dir(room).await
}

/// Removes a room that somebody began, if it is there.
async fn clear<S: Storage>(storage: &S, room: &str) -> Result<()> {
    for path in [names::gate_in(room), names::claim_in(room)] {
        gone(storage.unlink(&path).await)?;
    }
    gone(storage.remove_dir(room).await)
}

fn gone(removed: Result<()>) -> Result<()> {
    match removed {
        Err(StorageError::NotFound { .. }) => Ok(()),
        removed => removed,
    }
}

/// Removes what terms before `term` began to make and did not end.
pub(super) async fn clear_earlier<S: Storage>(storage: &S, term: Term) -> Result<()> {
    for name in storage.list(names::TERMS).await? {
        if names::maker_of_room(&name).is_some_and(|maker| maker < term) {
            clear(storage, &format!("{}/{name}", names::TERMS)).await?;
        }
    }
    Ok(())
}

/// Moves `term` into a room, durably; its gate, which is open. `full` is what it got when it tried to make its own, and gets
/// again when there is no room either.
pub(super) async fn move_in<S: Storage>(
    storage: &S,
    term: Term,
    full: StorageError,
) -> std::result::Result<Gate<S>, TermError> {
    let directory = names::term_dir(term);
    for index in 0..ROOMS {
        match storage.rename(&names::room(index), &directory).await {
            Ok(()) => {
                storage.sync_dir(names::TERMS).await?;
                return Ok(Gate::open(storage, term).await?);
            }
            Err(StorageError::NotFound { .. }) => {}
            Err(_) if segment::exists(storage, &directory).await? => return Err(TermError::Used(term)),
            Err(error) => return Err(error.into()),
        }
    }
    Err(full.into())
}
