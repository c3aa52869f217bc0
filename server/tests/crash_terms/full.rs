//! A pool without a free block: terms begin in it all the same, on what a term before them set aside.

use std::collections::BTreeSet;

use csnap_proto::{Term, Time};
use csnap_server::term::checkpoint::Written;
use csnap_server::term::{Follower, Prepared, TermError, room, take_over};
use csnap_storage::sim::executor::{Task, run};
use csnap_storage::sim::{Rng, SimDisk, SimNode};
use csnap_storage::{Storage as _, StorageError};

use crate::ledger::{Log, batch};
use crate::life::{Shared, open};
use crate::world::{new_pool, recover};

/// More than any of these pools takes, bytes.
const ROOMY: u64 = 1 << 30;

/// `term` takes over and acknowledges one batch; with `aside` it also provides for its successors.
async fn serve_once(disk: &SimDisk, shared: &Shared, term: Term, aside: bool) -> Result<(), TermError> {
    let pool = open(&disk.storage(SimNode(term.0)), &shared.canaries).await;
    let taken = take_over(&pool, term, Follower::new(&pool, Log::default()), || Time(0)).await?;
    shared.ledger.borrow_mut().serve(term, &taken.replay.ids);
    let id = term.0 << 32;
    if taken.journal.commit(batch(id, 100)).await? {
        shared.ledger.borrow_mut().acknowledge(term, id);
    }
    if aside {
        assert_eq!(taken.journal.prepare_segment().await?, Prepared::Ready);
        assert_eq!(taken.journal.set_aside().await?, Prepared::Ready);
    }
    Ok(())
}

/// From now on the disk takes what it has, and no block more.
fn leave_nothing(disk: &SimDisk) {
    disk.set_capacity(Some(ROOMY));
    let free = run(disk.storage(SimNode(0)).free_bytes()).expect("the disk is well");
    disk.set_capacity(Some(ROOMY - free));
}

/// A pool in which term 1 served, and which takes nothing more.
fn full_pool(shared: &Shared) -> SimDisk {
    let disk = new_pool(1);
    run(serve_once(&disk, shared, Term(1), true)).expect("there is space");
    leave_nothing(&disk);
    disk
}

#[test]
fn two_terms_begin_one_after_another_where_nothing_is_free() {
    let shared = Shared::default();
    let disk = full_pool(&shared);
    for term in [Term(2), Term(3)] {
        run(serve_once(&disk, &shared, term, false)).unwrap_or_else(|error| panic!("term {term}: {error}"));
    }
    let third = run(serve_once(&disk, &shared, Term(4), false));
    assert!(matches!(third, Err(TermError::Storage(StorageError::NoSpace { .. }))), "{third:?}");
    assert_eq!(shared.ledger.borrow().violation, None);
    // Once there is space, everything goes on.
    disk.set_capacity(None);
    run(serve_once(&disk, &shared, Term(5), true)).expect("there is space");
    for index in 0..room::ROOMS {
        assert!(disk.peek(&format!("term/room-{index}/claim")).is_some(), "room {index} is there again");
    }
}

#[test]
fn a_number_that_was_used_is_refused_where_nothing_is_free() {
    let shared = Shared::default();
    let disk = full_pool(&shared);
    run(serve_once(&disk, &shared, Term(2), false)).expect("there is a room");
    let again = run(serve_once(&disk, &shared, Term(2), false));
    assert_eq!(again, Err(TermError::Used(Term(2))));
}

#[test]
fn a_term_that_dies_at_any_await_in_a_full_pool_has_a_successor_there() {
    let mut states = BTreeSet::new();
    for operations in 0.. {
        let shared = Shared::default();
        let disk = full_pool(&shared);
        disk.set_stepped(true);
        let mut taker = Task::new(serve_once(&disk, &shared, Term(2), false));
        let done = taker.run_operations(&disk, operations);
        let ledger = shared.ledger.borrow();
        assert_eq!(ledger.violation, None);
        for left in disk.crash_states(24, operations) {
            if states.insert(left.digest()) {
                recover(&left, &ledger, &shared.canaries, Term(10), 0, &mut Rng::new(operations))
                    .unwrap_or_else(|violation| panic!("after {operations} operations: {violation}"));
            }
        }
        if done {
            break;
        }
    }
    println!("{} distinct crash states of a term that began in a full pool recovered there", states.len());
    assert!(states.len() > 50, "{}", states.len());
}

#[test]
fn what_is_set_aside_survives_the_checkpoint_that_deletes_its_makers_files() {
    let shared = Shared::default();
    let disk = new_pool(1);
    run(serve_once(&disk, &shared, Term(1), true)).expect("there is space");
    let pool_of = |term: u64| disk.storage(SimNode(term));
    run(async {
        let pool = open(&pool_of(2), &shared.canaries).await;
        let taken = take_over(&pool, Term(2), Follower::new(&pool, Log::default()), || Time(0)).await?;
        assert_eq!(taken.journal.prepare_segment().await?, Prepared::Ready);
        // Term 2 has no space for segments of its own, but for a checkpoint.
        let position = taken.journal.position();
        let mut writer = taken.journal.begin_checkpoint(position).await?.expect("none is under way");
        for piece in taken.replay.pieces() {
            writer.piece(&piece).await?;
        }
        writer.finish().await?;
        Ok::<_, TermError>(())
    })
    .expect("there is space");
    assert!(disk.peek("term/1/next-1").is_none(), "the checkpoint made term 1's files superfluous");
    leave_nothing(&disk);
    run(serve_once(&disk, &shared, Term(3), false))
        .expect("term 2 kept what term 1 had set aside for term 3");
}

#[test]
fn a_segment_that_was_made_ready_for_a_term_that_is_over_makes_room_for_its_successors() {
    let shared = Shared::default();
    let disk = full_pool(&shared);
    assert!(disk.peek("term/1/journal-1").is_some(), "term 1 made it ready");
    let prepared = run(async {
        let pool = open(&disk.storage(SimNode(2)), &shared.canaries).await;
        let taken = take_over(&pool, Term(2), Follower::new(&pool, Log::default()), || Time(0)).await?;
        Ok::<_, TermError>(taken.journal.prepare_segment().await?)
    });
    assert_eq!(prepared, Ok(Prepared::Ready));
    assert!(disk.peek("term/1/journal-1").is_none() && disk.peek("term/2/journal-1").is_some());
    assert!(disk.peek("term/1/journal-0").is_some(), "what holds records stays");
}

#[test]
fn space_that_comes_back_is_first_the_checkpoints_that_found_none() {
    let shared = Shared::default();
    let disk = full_pool(&shared);
    let served = run(async {
        let pool = open(&disk.storage(SimNode(2)), &shared.canaries).await;
        let taken = take_over(&pool, Term(2), Follower::new(&pool, Log::default()), || Time(0)).await?;
        let journal = &taken.journal;
        for expected in [Written::NoSpace, Written::Done] {
            let writer = journal.begin_checkpoint(journal.position()).await?;
            let mut writer = writer.expect("a name takes no space here");
            for piece in taken.replay.pieces() {
                writer.piece(&piece).await?;
            }
            assert_eq!(journal.prepare_segment().await?, Prepared::Ready);
            assert_eq!(writer.finish().await?, expected);
            disk.set_capacity(None);
            let aside = if expected == Written::Done { Prepared::Ready } else { Prepared::NoSpace };
            assert_eq!(journal.set_aside().await?, aside);
        }
        Ok::<_, TermError>(())
    });
    served.expect("the disk is well");
    assert!(disk.peek("term/1/journal-0").is_none(), "what term 1 left is given back");
}
