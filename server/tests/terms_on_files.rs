//! Terms on a real file system, with both ways of I/O: that the procedures work outside of the simulation, and what a
//! takeover costs there, step by step.
#![cfg(feature = "shell")]

use std::path::Path;

use csnap_proto::{PoolId, Term, Time};
use csnap_server::term::{
    Corrupt, Follower, Journal, Pool, PoolToml, Prepared, Replay, TakenOver, create_pool, open_pool,
    take_over,
};
use csnap_storage::posix::{PosixOptions, PosixStorage};

#[derive(Default)]
struct Sum {
    batches: u64,
    sum: u64,
}

impl Replay for Sum {
    fn begin_checkpoint(&mut self) {
        *self = Self::default();
    }
    fn piece(&mut self, bytes: &[u8]) -> Result<(), Corrupt> {
        let (batches, sum) = bytes.split_at(8);
        self.batches = u64::from_le_bytes(batches.try_into().map_err(|_| Corrupt::new("a short piece"))?);
        self.sum = u64::from_le_bytes(sum.try_into().map_err(|_| Corrupt::new("a short piece"))?);
        Ok(())
    }
    fn end_checkpoint(&mut self) -> Result<(), Corrupt> {
        Ok(())
    }
    fn batch(&mut self, body: &[u8]) -> Result<(), Corrupt> {
        self.batches += 1;
        self.sum += body.iter().map(|byte| u64::from(*byte)).sum::<u64>();
        Ok(())
    }
}

impl Sum {
    fn piece_bytes(&self) -> Vec<u8> {
        [self.batches.to_le_bytes(), self.sum.to_le_bytes()].concat()
    }
}

fn storage(directory: &Path, shared: bool) -> PosixStorage {
    PosixStorage::open(directory, PosixOptions { shared, ..PosixOptions::default() }).expect("a directory")
}

fn now() -> Time {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Time(u64::try_from(time.tv_sec * 1_000_000 + time.tv_nsec / 1000).expect("after the boot"))
}

async fn append(journal: &Journal<PosixStorage>, state: &mut Sum, count: u64) {
    for number in 0..count {
        let body = vec![u8::try_from(number % 251).expect("below a byte"); 500];
        state.batch(&body).expect("it counts");
        assert!(journal.commit(body).await.expect("the disk is well"));
    }
}

async fn begin(
    pool: &Pool<PosixStorage>,
    term: u64,
    follower: Follower<PosixStorage, Sum>,
    how: &str,
) -> TakenOver<PosixStorage, Sum> {
    let start = now();
    let taken = take_over(pool, Term(term), follower, now).await.unwrap_or_else(|error| panic!("{error}"));
    let at: Vec<String> = taken
        .steps
        .iter()
        .map(|(step, time)| format!("{step:?} {}", time.since(start).as_micros()))
        .collect();
    println!("shared = {}, {how}: takeover, microseconds: {}", pool.toml.shared, at.join(", "));
    taken
}

async fn three_terms(directory: &Path, shared: bool) {
    let toml = PoolToml::new(PoolId([5; 16]), shared);
    let pool =
        create_pool(&storage(directory, shared), &toml).await.unwrap_or_else(|error| panic!("{error}"));
    let mut first = begin(&pool, 1, Follower::new(&pool, Sum::default()), "a new pool").await;
    assert_eq!(first.journal.prepare_segment().await, Ok(Prepared::Ready));
    append(&first.journal, &mut first.replay, 200).await;

    let mut writer =
        first.journal.begin_checkpoint(first.journal.position()).await.expect("the disk is well");
    let writer = writer.as_mut().expect("there is room");
    writer.piece(&first.replay.piece_bytes()).await.expect("the disk is well");

    let other = open_pool(&storage(directory, shared)).await.unwrap_or_else(|error| panic!("{error}"));
    let mut standby = Follower::new(&other, Sum::default());
    standby.advance().await.unwrap_or_else(|error| panic!("{error}"));
    append(&first.journal, &mut first.replay, 200).await;
    standby.advance().await.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(standby.replay().batches, 400);
    append(&first.journal, &mut first.replay, 3).await;

    let second = begin(&other, 2, standby, "followed").await;
    assert_eq!((second.replay.batches, second.replay.sum), (403, first.replay.sum));
    assert!(!first.journal.gate_open().await.expect("the disk is well"), "the first term is over");
    assert_eq!(first.journal.commit(vec![1]).await, Ok(false));

    let third = begin(&other, 3, Follower::new(&other, Sum::default()), "from nothing").await;
    assert_eq!((third.replay.batches, third.replay.sum), (403, first.replay.sum));
}

#[test]
fn terms_follow_each_other_on_files_cached_and_not() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let local = tokio::task::LocalSet::new();
    for shared in [false, true] {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        local.block_on(&runtime, three_terms(directory.path(), shared));
    }
}

/// Appends while a checkpoint is written keep the segment that it began in: that segment is not a reason for another.
async fn one_checkpoint(directory: &Path) {
    let toml = PoolToml { segment_bytes: 64 << 10, ..PoolToml::new(PoolId([5; 16]), false) };
    let pool = create_pool(&storage(directory, false), &toml).await.unwrap_or_else(|error| panic!("{error}"));
    let mut term = begin(&pool, 1, Follower::new(&pool, Sum::default()), "a new pool").await;
    assert_eq!(term.journal.prepare_segment().await, Ok(Prepared::Ready));
    while !term.journal.wants_checkpoint() {
        append(&term.journal, &mut term.replay, 1).await;
    }
    let begun = term.journal.begin_checkpoint(term.journal.position()).await.expect("the disk is well");
    let mut writer = begun.expect("there is room");
    append(&term.journal, &mut term.replay, 1).await;
    writer.piece(&term.replay.piece_bytes()).await.expect("the disk is well");
    writer.finish().await.expect("the disk is well");
    assert!(!term.journal.wants_checkpoint(), "one was just written");
}

#[test]
fn a_checkpoint_under_load_does_not_call_for_the_next() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let local = tokio::task::LocalSet::new();
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    local.block_on(&runtime, one_checkpoint(directory.path()));
}
