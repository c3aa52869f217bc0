//! Damage and loss: what a torn end, damage before it, another version and an empty disk each come to.

use csnap_lockd::canary::Broken;
use csnap_lockd::replica::{
    Base, Body, ClusterId, Input, Output, PeerMessage, Replica, ReplicaConfig, ReplicaId, ReplicaLog, Saved,
    Timing,
};
use csnap_lockd::store::StoreError;
use csnap_proto::Time;
use csnap_storage::BLOCK_BYTES;
use csnap_storage::sim::SimDisk;
use csnap_storage::sim::executor::run;

use crate::alone::{Alone, command};
use crate::node::{NODE, options};

const LOG: &str = "log-1";

/// A replica alone that committed four commands in four batches, after the one in which it elected itself.
fn five_batches() -> SimDisk {
    let disk = SimDisk::new(1);
    let mut alone = run(Alone::open(disk.storage(NODE))).expect("empty");
    for n in 0..4 {
        run(alone.propose(&[command(n)])).expect("writes");
    }
    disk
}

/// Where each batch begins, and how long it is without padding, bytes.
fn batches(disk: &SimDisk) -> Vec<(usize, usize)> {
    let log = disk.peek(LOG).expect("exists");
    let starts = (0..log.len()).step_by(BLOCK_BYTES).filter(|at| log[*at..].starts_with(b"CSNLKLOG"));
    let len = |at: usize| 64 + u32::from_le_bytes(log[at + 12..at + 16].try_into().expect("four")) as usize;
    starts.map(|at| (at, len(at))).collect()
}

fn reopened(disk: &SimDisk) -> Result<Vec<Vec<u8>>, StoreError> {
    run(Alone::open(disk.storage(NODE))).map(|alone| alone.list)
}

fn first_commands(count: usize) -> Vec<Vec<u8>> {
    (0..count).map(|n| command(n).to_vec()).collect()
}

#[test]
fn a_last_batch_torn_at_any_byte_is_as_if_it_had_not_been_written() {
    let whole = five_batches();
    let (start, len) = *batches(&whole).last().expect("five");
    let log = whole.peek(LOG).expect("exists");
    let mut torn = 0;
    for cut in 0..len {
        // Bytes that are zero anyway are not missed.
        if log[start + cut..start + len].iter().all(|byte| *byte == 0) {
            continue;
        }
        let disk = whole.fork();
        disk.poke(LOG, (start + cut) as u64, &vec![0; len - cut]).expect("exists");
        assert_eq!(reopened(&disk), Ok(first_commands(3)), "torn at byte {cut}");
        torn += 1;
    }
    println!("torn at {torn} of {len} bytes");
    assert!(torn > 64);
}

#[test]
fn damage_anywhere_before_the_last_batch_is_refused_and_named() {
    let whole = five_batches();
    let all = batches(&whole);
    let log = whole.peek(LOG).expect("exists");
    assert_eq!(all.len(), 5);
    let mut refused = 0;
    for (start, len) in &all[..4] {
        for at in *start..start + len {
            let disk = whole.fork();
            disk.poke(LOG, at as u64, &[log[at] ^ 0x40]).expect("exists");
            let error = reopened(&disk).expect_err("refused");
            assert!(
                matches!(&error, StoreError::Corrupt { file, at, .. } if file == LOG && *at == *start as u64),
                "byte {at}: {error}"
            );
            refused += 1;
        }
    }
    println!("{refused} damaged bytes refused");
}

#[test]
fn a_damaged_base_is_refused_at_any_byte() {
    let whole = five_batches();
    let snapshot = whole.peek("snapshot").expect("exists");
    let len = snapshot.iter().rposition(|byte| *byte != 0).expect("some") + 1;
    for at in 0..len {
        let disk = whole.fork();
        disk.poke("snapshot", at as u64, &[snapshot[at] ^ 0x40]).expect("exists");
        let error = reopened(&disk).expect_err("refused");
        assert!(
            matches!(error, StoreError::Corrupt { .. } | StoreError::Version { .. }),
            "byte {at}: {error}"
        );
    }
}

#[test]
fn a_lost_base_or_log_is_no_empty_disk() {
    for lost in ["snapshot", LOG] {
        let disk = five_batches();
        run(csnap_storage::Storage::unlink(&disk.storage(NODE), lost)).expect("exists");
        assert!(matches!(reopened(&disk), Err(StoreError::Corrupt { .. })), "{lost}");
    }
}

fn opened(disk: &SimDisk, fresh_id: [u8; 16]) -> Saved {
    let open = ReplicaLog::open(disk.storage(NODE), options(fresh_id, Broken::NONE), |_| Base::empty());
    run(open).expect("opens").1
}

fn ask(to: ReplicaId) -> PeerMessage {
    let body =
        Body::AskVote { before: false, index: 9, log_term: 4, commit: 0, commit_term: 0, transfer: false };
    PeerMessage { cluster: ClusterId([1; 16]), from: ReplicaId(77), to, term: 5, body }
}

/// What a replica says when it is asked for its vote under this id, once everything is durable.
fn answers(saved: &Saved, asked_as: ReplicaId) -> Vec<PeerMessage> {
    let config = ReplicaConfig { timing: Timing::DEFAULT, seed: 1, broken: Broken::NONE };
    let mut replica = Replica::new(Time(1), config, saved.clone());
    let (mut out, mut said) = (Vec::new(), Vec::new());
    replica.step(Time(1), Input::Tick, &mut out);
    replica.step(Time(1), Input::Received(ask(asked_as)), &mut out);
    replica.step(Time(1), Input::Durable { number: u64::MAX }, &mut out);
    said.extend(out.into_iter().filter_map(|output| match output {
        Output::Send(message) => Some(message),
        _ => None,
    }));
    said
}

#[test]
fn an_empty_disk_is_another_replica_and_does_not_vote_for_the_lost_one() {
    let before = opened(&SimDisk::new(1), [1; 16]);
    assert_eq!(answers(&before, before.id).len(), 1, "a new disk that was asked by its own id votes");
    let after = opened(&SimDisk::new(2), [2; 16]);
    assert!(after.is_empty() && after.id != before.id);
    assert!(answers(&after, before.id).is_empty(), "nobody answers for a disk that is gone");
}

#[test]
fn a_replica_without_a_group_never_campaigns() {
    let saved = opened(&SimDisk::new(1), [1; 16]);
    let config = ReplicaConfig { timing: Timing::DEFAULT, seed: 1, broken: Broken::NONE };
    let mut replica = Replica::new(Time(1), config, saved);
    let mut out = Vec::new();
    for second in 0..100 {
        replica.step(Time(1 + second * 1_000_000), Input::Tick, &mut out);
    }
    assert!(out.is_empty(), "{out:?}");
    assert_eq!(replica.next_deadline(), None);
}
