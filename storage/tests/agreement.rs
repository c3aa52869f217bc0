//! The simulated disk against a real file system: the same random operations must have the same results. What the
//! simulation proves holds for the product only as far as the two agree.

#![allow(missing_docs, reason = "test functions are named for what they show")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::mem::discriminant;

use bytes::Bytes;
use csnap_storage::posix::{Backend, PosixOptions, PosixStorage};
use csnap_storage::sim::{Rng, SimDisk, SimNode, executor};
use csnap_storage::{Access, BLOCK_BYTES, Result, Storage, StorageError};

const BLOCK: u64 = BLOCK_BYTES as u64;
/// Few names, so that operations meet each other's files.
const PATHS: [&str; 8] = ["a", "b", "c", "d", "d/a", "d/b", "d/e", "nowhere/a"];
/// Files are kept to so many blocks.
const BLOCKS_MAX: u64 = 6;

#[derive(Clone, Debug)]
enum Step {
    Create(&'static str),
    CreateDir(&'static str),
    Open(&'static str),
    Close(&'static str),
    Unlink(&'static str),
    RemoveDir(&'static str),
    Link(&'static str, &'static str),
    Rename(&'static str, &'static str),
    List(&'static str),
    Stat(&'static str),
    SyncDir(&'static str),
    Write(&'static str, u64, Bytes),
    Read(&'static str, u64, usize),
    Sync(&'static str),
    SetLen(&'static str, u64),
    Reserve(&'static str, u64, u64),
    Punch(&'static str, u64, u64),
    Lock(&'static str),
    Unlock(&'static str),
}

/// What can be seen of a result. Inode numbers and allocation differ between file systems; the rest must not.
#[derive(Debug, PartialEq)]
enum Seen {
    Nothing,
    Names(Vec<String>),
    Size(u64, bool),
    Bytes(Bytes),
    Flag(bool),
    NotOpen,
}

fn draw(rng: &mut Rng) -> Step {
    let path = PATHS[rng.index(PATHS.len())];
    let other = PATHS[rng.index(PATHS.len())];
    let bytes_max = BLOCKS_MAX * BLOCK;
    let (offset, len) = (rng.below(bytes_max), rng.below(bytes_max));
    let blocks = 1 + rng.index(3);
    match rng.below(24) {
        0 | 1 => Step::Create(path),
        2 => Step::CreateDir(path),
        3 | 4 => Step::Open(path),
        5 => Step::Close(path),
        6 => Step::Unlink(path),
        7 => Step::RemoveDir(path),
        8 => Step::Link(path, other),
        9 => Step::Rename(path, other),
        10 => Step::List(path),
        11 => Step::Stat(path),
        12 => Step::SyncDir(path),
        13..=15 => {
            let content = vec![rng.next_u64().to_le_bytes()[0]; blocks * BLOCK_BYTES];
            Step::Write(path, offset / BLOCK * BLOCK, content.into())
        }
        16..=18 => Step::Read(path, offset, usize::try_from(len).unwrap()),
        19 => Step::Sync(path),
        20 => Step::SetLen(path, offset),
        21 => Step::Reserve(path, offset, len),
        22 => Step::Punch(path, offset, len),
        _ => [Step::Lock(path), Step::Unlock(path)][rng.index(2)].clone(),
    }
}

/// Does a step. Open files are kept by the path that they were opened by, whatever became of it.
async fn act<S: Storage>(
    storage: &S,
    open: &mut BTreeMap<&'static str, S::File>,
    step: Step,
) -> Result<Seen> {
    let file_of = |path| open.get(path).cloned();
    let nothing = |()| Seen::Nothing;
    match step {
        Step::Create(path) => {
            open.insert(path, storage.create(path).await?);
            Ok(Seen::Nothing)
        }
        Step::Open(path) => {
            open.insert(path, storage.open(path, Access::ReadWrite).await?);
            Ok(Seen::Nothing)
        }
        Step::Close(path) => {
            open.remove(path);
            Ok(Seen::Nothing)
        }
        Step::CreateDir(path) => storage.create_dir(path).await.map(nothing),
        Step::Unlink(path) => storage.unlink(path).await.map(nothing),
        Step::RemoveDir(path) => storage.remove_dir(path).await.map(nothing),
        Step::Link(from, to) => storage.link(from, to).await.map(nothing),
        Step::Rename(from, to) => storage.rename(from, to).await.map(nothing),
        Step::List(path) => storage.list(path).await.map(Seen::Names),
        Step::Stat(path) => storage.stat(path).await.map(|stat| match stat.is_dir {
            true => Seen::Size(0, true),
            false => Seen::Size(stat.size_bytes, false),
        }),
        Step::SyncDir(path) => storage.sync_dir(path).await.map(nothing),
        Step::Write(path, offset, data) => match file_of(path) {
            Some(file) => storage.write(&file, offset, data).await.map(nothing),
            None => Ok(Seen::NotOpen),
        },
        Step::Read(path, offset, len) => match file_of(path) {
            Some(file) => storage.read(&file, offset, len).await.map(Seen::Bytes),
            None => Ok(Seen::NotOpen),
        },
        Step::Sync(path) => match file_of(path) {
            Some(file) => storage.sync(&file).await.map(nothing),
            None => Ok(Seen::NotOpen),
        },
        Step::SetLen(path, len) => match file_of(path) {
            Some(file) => storage.set_len(&file, len).await.map(nothing),
            None => Ok(Seen::NotOpen),
        },
        Step::Reserve(path, offset, len) => match file_of(path) {
            Some(file) => storage.reserve(&file, offset, len).await.map(nothing),
            None => Ok(Seen::NotOpen),
        },
        Step::Punch(path, offset, len) => match file_of(path) {
            Some(file) => storage.punch(&file, offset, len).await.map(nothing),
            None => Ok(Seen::NotOpen),
        },
        Step::Lock(path) => match file_of(path) {
            Some(file) => storage.try_lock(&file).await.map(Seen::Flag),
            None => Ok(Seen::NotOpen),
        },
        Step::Unlock(path) => match file_of(path) {
            Some(file) => storage.unlock(&file).await.map(nothing),
            None => Ok(Seen::NotOpen),
        },
    }
}

/// Callers branch on the kind of error, and never on which `Io` it is.
fn agree(real: &Result<Seen>, simulated: &Result<Seen>) -> bool {
    match (real, simulated) {
        (Ok(real), Ok(simulated)) => real == simulated,
        (Err(real), Err(simulated)) => discriminant::<StorageError>(real) == discriminant(simulated),
        _ => false,
    }
}

#[test]
fn the_simulated_disk_behaves_like_a_file_system() {
    const SEEDS: u64 = 150;
    const STEPS: usize = 150;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for seed in 0..SEEDS {
        let backend = if seed.is_multiple_of(2) { Backend::Threads } else { Backend::Uring };
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let options = PosixOptions { shared: seed % 4 >= 2, backend };
        let real = runtime.block_on(async { PosixStorage::open(directory.path(), options) }).unwrap();
        let disk = SimDisk::new(seed);
        let simulated = disk.storage(SimNode(1));
        let (mut real_files, mut simulated_files) = (BTreeMap::new(), BTreeMap::new());
        let mut rng = Rng::new(seed);
        for count in 0..STEPS {
            let step = draw(&mut rng);
            let real = runtime.block_on(act(&real, &mut real_files, step.clone()));
            let simulated = executor::run(act(&simulated, &mut simulated_files, step.clone()));
            assert!(
                agree(&real, &simulated),
                "seed {seed}, step {count}: {step:?}\nreal:      {real:?}\nsimulated: {simulated:?}"
            );
        }
        // A crash that loses nothing is no difference either.
        let kept = disk.crash_states(4, seed).count();
        assert!(kept > 0);
    }
}
