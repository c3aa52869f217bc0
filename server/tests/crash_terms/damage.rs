//! Bytes that are not what was written: torn ends are cut off, everything else is refused.

use bytes::Bytes;
use csnap_proto::{Term, Time};
use csnap_server::term::canary::Canaries;
use csnap_server::term::names;
use csnap_server::term::verify::verify;
use csnap_server::term::{Follower, Journal, TermError, take_over};
use csnap_storage::sim::executor::run;
use csnap_storage::sim::{SimDisk, SimNode, SimStorage};
use csnap_storage::{Access, BLOCK_BYTES, Storage};

use crate::ledger::{Log, batch};
use crate::life::open;
use crate::world::new_pool;

const TERM: Term = Term(1);

fn begin(disk: &SimDisk, term: Term, canaries: &Canaries) -> Result<(Log, Journal<SimStorage>), TermError> {
    let storage = disk.storage(SimNode(term.0));
    run(async {
        let pool = open(&storage, canaries).await;
        let taken = take_over(&pool, term, Follower::new(&pool, Log::default()), || Time(0)).await?;
        Ok((taken.replay, taken.journal))
    })
}

/// A pool whose term 1 wrote batches 0, 1, 2 of these lengths, and where their frames lie.
fn pool_with_batches(lengths: [usize; 3]) -> (SimDisk, Vec<(u64, usize)>) {
    let disk = new_pool(1);
    let (_, journal) = begin(&disk, TERM, &Canaries::default()).expect("a new pool");
    let mut places = vec![(0, BLOCK_BYTES)];
    for (id, bytes) in lengths.into_iter().enumerate() {
        run(journal.append(batch(id as u64, bytes))).expect("the disk is well");
        let (offset, length) = places[id];
        places.push((offset + length as u64, (128 + bytes).next_multiple_of(BLOCK_BYTES)));
    }
    (disk, places)
}

fn state_of(disk: &SimDisk) -> Result<Vec<u64>, TermError> {
    begin(disk, Term(2), &Canaries::default()).map(|(log, _)| log.ids)
}

fn flip(disk: &SimDisk, path: &str, bit: u64) {
    let byte = disk.peek(path).expect("it is there")[(bit / 8) as usize] ^ (1 << (bit % 8));
    disk.poke(path, bit / 8, &[byte]).expect("it is there");
}

#[test]
fn a_journal_torn_at_any_byte_loses_the_unfinished_batch_and_nothing_else() {
    let (disk, places) = pool_with_batches([100, 200, 4500]);
    let (start, length) = places[3];
    let path = names::journal(TERM, 0);
    for cut in 0..length {
        let torn = disk.fork();
        torn.poke(&path, start + cut as u64, &vec![0; length - cut]).expect("it is there");
        let ids = state_of(&torn).unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
        // Behind the last byte that is not zero, nothing was torn off.
        let whole = torn.peek(&path) == disk.peek(&path);
        assert!(if whole { ids == [0, 1, 2] } else { ids == [0, 1] }, "cut at {cut}: {ids:?}");
    }
}

#[test]
fn a_flipped_bit_below_what_was_durable_is_refused_and_named() {
    let (disk, places) = pool_with_batches([100, 200, 300]);
    let path = names::journal(TERM, 0);
    for (record, (start, length)) in places.iter().enumerate().take(3) {
        // Every byte that says something, and some of the padding.
        let bytes = (0..512).chain((512..*length as u64).step_by(61));
        for byte in bytes {
            let rotten = disk.fork();
            flip(&rotten, &path, (start + byte) * 8 + byte % 8);
            match state_of(&rotten) {
                Err(TermError::Corrupt(corrupt)) => assert!(corrupt.at.starts_with(&path), "{corrupt}"),
                other => panic!("byte {byte} of record {record}: {other:?}"),
            }
        }
    }
}

/// Whether a damaged record below others is refused under these broken rules.
#[cfg(feature = "canary")]
pub(crate) fn refuses_what_is_rotten(canaries: &Canaries) -> Result<(), String> {
    let (disk, places) = pool_with_batches([100, 200, 300]);
    flip(&disk, &names::journal(TERM, 0), (places[2].0 + 130) * 8);
    match begin(&disk, Term(2), canaries) {
        Err(_) => Ok(()),
        Ok((log, _)) => Err(format!("served {:?} after record 2 rotted", log.ids)),
    }
}

#[test]
fn a_later_seal_makes_what_it_names_durable_too() {
    let (disk, places) = pool_with_batches([100, 200, 300]);
    // Term 2 carries batch 2, and names everything below it.
    begin(&disk, Term(2), &Canaries::default()).expect("nothing is wrong");
    let path = names::journal(TERM, 0);
    let carried = disk.fork();
    flip(&carried, &path, (places[3].0 + 130) * 8);
    let (log, _) = begin(&carried, Term(3), &Canaries::default()).expect("the Seal of term 2 has the batch");
    assert_eq!(log.ids, [0, 1, 2]);
    let below = disk.fork();
    below.poke(&path, places[2].0, &vec![0; places[2].1 + places[3].1]).expect("it is there");
    let refused = begin(&below, Term(3), &Canaries::default());
    assert!(matches!(refused, Err(TermError::Corrupt(_))), "{:?}", refused.map(|(log, _)| log.ids));
}

#[test]
fn stale_bytes_behind_a_valid_end_never_come_back() {
    let (disk, places) = pool_with_batches([100, 200, 300]);
    let path = names::journal(TERM, 0);
    let end = places[3].0 + places[3].1 as u64;
    let whole = disk.peek(&path).expect("it is there");
    // Frames of the same journal, misdirected; of another pool; of a term that the file was linked from.
    for (start, length) in &places {
        let misdirected = disk.fork();
        misdirected.poke(&path, end, &whole[*start as usize..*start as usize + length]).expect("it is there");
        assert_eq!(state_of(&misdirected).expect("garbage is no record"), [0, 1, 2]);
    }
    let (elsewhere, _) = pool_with_batches([100, 200, 300]);
    let (_, journal) = begin(&elsewhere, Term(7), &Canaries::default()).expect("nothing is wrong");
    for id in 10..13 {
        run(journal.append(batch(id, 100))).expect("the disk is well");
    }
    let theirs = elsewhere.peek(&names::journal(Term(7), 0)).expect("it is there");
    let from = end as usize;
    disk.poke(&path, end, &theirs[from..]).expect("both are of one size");
    assert_eq!(state_of(&disk).expect("garbage is no record"), [0, 1, 2]);
}

#[test]
fn a_torn_batch_is_overwritten_by_nobody_and_seen_by_nobody() {
    let (disk, places) = pool_with_batches([100, 200, 300]);
    let path = names::journal(TERM, 0);
    let whole = disk.peek(&path).expect("it is there");
    disk.poke(&path, places[3].0 + 64, &[0; 64]).expect("it is there");
    let (log, journal) = begin(&disk, Term(2), &Canaries::default()).expect("a torn end is no damage");
    assert_eq!(log.ids, [0, 1]);
    run(journal.append(batch(20, 10))).expect("the disk is well");
    // The old server's write arrives after all: it is beyond what term 2 named.
    disk.poke(&path, 0, &whole).expect("it is there");
    let (log, _) = begin(&disk, Term(3), &Canaries::default()).expect("nothing is wrong");
    assert_eq!(log.ids, [0, 1, 20]);
}

#[test]
fn the_verifier_passes_a_sound_pool_and_names_every_damage() {
    let (disk, places) = pool_with_batches([100, 200, 300]);
    begin(&disk, Term(2), &Canaries::default()).expect("nothing is wrong");
    let check = |disk: &SimDisk| {
        let storage = disk.storage(SimNode(99));
        run(async { verify(&open(&storage, &Canaries::default()).await).await }).expect("the disk is well")
    };
    let sound = check(&disk);
    assert_eq!(sound.damage, []);
    assert_eq!((sound.chain, sound.newest), (vec![Term(0), TERM, Term(2)], Some(Term(2))));
    assert_eq!(sound.terms[1].records, 4);
    let path = names::journal(TERM, 0);
    for (start, _) in &places[..3] {
        let rotten = disk.fork();
        flip(&rotten, &path, (start + 70) * 8);
        assert!(!check(&rotten).damage.is_empty());
    }
    let chain = disk.fork();
    flip(&chain, &names::successor(TERM), 100);
    assert!(!check(&chain).damage.is_empty());
}

#[test]
fn a_damaged_checkpoint_is_refused() {
    let disk = new_pool(1);
    let (_, journal) = begin(&disk, TERM, &Canaries::default()).expect("a new pool");
    run(async {
        journal.append(batch(0, 10)).await?;
        journal.prepare_segment().await?;
        let mut writer = journal.begin_checkpoint(journal.position()).await?.expect("there is room");
        writer.piece(&0u64.to_le_bytes()).await?;
        writer.finish().await
    })
    .expect("the disk is well");
    assert_eq!(state_of(&disk.fork()).expect("nothing is wrong"), [0]);
    let path = names::checkpoint(TERM, 0);
    let bits = disk.peek(&path).expect("it is there").len() as u64 * 8;
    for bit in (0..bits).step_by(97) {
        let rotten = disk.fork();
        flip(&rotten, &path, bit);
        assert!(matches!(state_of(&rotten), Err(TermError::Corrupt(_))), "bit {bit}");
    }
}

#[test]
fn a_gate_of_any_other_content_or_none_is_closed() {
    let (disk, _) = pool_with_batches([1, 2, 3]);
    let storage = disk.storage(SimNode(50));
    let pool = run(open(&storage, &Canaries::default()));
    let reads_open = || run(csnap_server::term::gate::reads_open(&pool.storage, TERM)).expect("readable");
    assert!(reads_open());
    for byte in [0, 1000, BLOCK_BYTES as u64 - 1] {
        disk.poke(&names::gate(TERM), byte, &[1]).expect("it is there");
        assert!(!reads_open(), "byte {byte}");
        disk.poke(&names::gate(TERM), byte, &[0]).expect("it is there");
    }
    run(async {
        let file = storage.open(&names::gate(TERM), Access::ReadWrite).await?;
        storage.set_len(&file, 0).await?;
        storage.write(&file, 0, Bytes::new()).await
    })
    .expect("the disk is well");
    assert!(!reads_open());
    run(storage.unlink(&names::gate(TERM))).expect("it is there");
    assert!(!reads_open());
}
