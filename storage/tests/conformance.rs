//! What every storage promises, asked of every storage: both POSIX backends, buffered and direct, and the simulated
//! disk.

#![allow(missing_docs, reason = "test functions are named for what they show")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::future::Future;

use bytes::Bytes;
use csnap_storage::posix::{Backend, PosixOptions, PosixStorage};
use csnap_storage::sim::{SimDisk, SimNode, SimStorage, executor};
use csnap_storage::{Access, BLOCK_BYTES, Result, Storage, StorageError};

const BLOCK: u64 = BLOCK_BYTES as u64;

fn blocks(byte: u8, count: usize) -> Bytes {
    vec![byte; count * BLOCK_BYTES].into()
}

async fn create_is_exclusive(storage: impl Storage) -> Result<()> {
    storage.create("f").await?;
    assert!(matches!(storage.create("f").await, Err(StorageError::Exists { .. })));
    storage.create_dir("d").await?;
    assert!(matches!(storage.create_dir("d").await, Err(StorageError::Exists { .. })));
    assert!(matches!(storage.open("g", Access::Read).await, Err(StorageError::NotFound { .. })));
    assert!(matches!(storage.create("nowhere/f").await, Err(StorageError::NotFound { .. })));
    Ok(())
}

async fn what_was_written_is_read(storage: impl Storage) -> Result<()> {
    let file = storage.create("f").await?;
    storage.write(&file, BLOCK, blocks(2, 3)).await?;
    storage.write(&file, 2 * BLOCK, blocks(3, 1)).await?;
    let all = storage.read(&file, 0, 4 * BLOCK_BYTES).await?;
    assert_eq!(all, [blocks(0, 1), blocks(2, 1), blocks(3, 1), blocks(2, 1)].concat());
    let reopened = storage.open("f", Access::Read).await?;
    assert_eq!(storage.read(&reopened, 0, all.len()).await?, all);
    storage.sync(&file).await
}

async fn reads_need_no_alignment(storage: impl Storage) -> Result<()> {
    let file = storage.create("f").await?;
    let content: Bytes = (0..3 * BLOCK_BYTES).map(|at| at.to_le_bytes()[0] ^ at.to_le_bytes()[1]).collect();
    storage.write(&file, 0, content.clone()).await?;
    for (offset, len) in [(0, 1), (1, 4096), (511, 2), (4095, 2), (4096, 8192), (5000, 7000), (12_287, 1)] {
        let read = storage.read(&file, offset as u64, len).await?;
        assert_eq!(read, content.slice(offset..offset + len), "{len} bytes at {offset}");
    }
    Ok(())
}

async fn reads_end_at_the_end_of_the_file(storage: impl Storage) -> Result<()> {
    let file = storage.create("f").await?;
    assert!(storage.read(&file, 0, 100).await?.is_empty());
    storage.write(&file, 0, blocks(1, 2)).await?;
    storage.set_len(&file, 5000).await?;
    assert_eq!(storage.read(&file, 0, 100_000).await?.len(), 5000);
    assert_eq!(storage.read(&file, 4990, 100).await?, vec![1; 10]);
    assert!(storage.read(&file, 5000, 10).await?.is_empty());
    assert!(storage.read(&file, 1 << 40, 10).await?.is_empty());
    assert!(storage.read(&file, 0, 0).await?.is_empty());
    Ok(())
}

async fn sizes_are_sparse(storage: impl Storage) -> Result<()> {
    let file = storage.create("f").await?;
    storage.set_len(&file, 1 << 40).await?;
    storage.write(&file, 1 << 39, blocks(1, 1)).await?;
    let stat = storage.stat("f").await?;
    assert_eq!(stat.size_bytes, 1 << 40);
    assert!(stat.allocated_bytes < 1 << 20, "{} bytes allocated", stat.allocated_bytes);
    assert!(!stat.is_dir);
    assert_eq!(storage.stat_file(&file).await?, stat);
    assert_eq!(storage.read(&file, 1 << 38, 10).await?, vec![0; 10]);
    Ok(())
}

async fn cut_off_content_does_not_come_back(storage: impl Storage) -> Result<()> {
    let file = storage.create("f").await?;
    storage.write(&file, 0, blocks(1, 2)).await?;
    storage.set_len(&file, 100).await?;
    storage.set_len(&file, 2 * BLOCK).await?;
    let read = storage.read(&file, 0, 2 * BLOCK_BYTES).await?;
    assert!(read[..100].iter().all(|byte| *byte == 1) && read[100..].iter().all(|byte| *byte == 0));
    Ok(())
}

async fn reserving_takes_space_and_punching_gives_it_back(storage: impl Storage) -> Result<()> {
    let file = storage.create("f").await?;
    storage.set_len(&file, 1 << 20).await?;
    storage.reserve(&file, 0, 1 << 19).await?;
    let stat = storage.stat_file(&file).await?;
    assert_eq!(stat.size_bytes, 1 << 20);
    assert!(stat.allocated_bytes >= 1 << 19);
    assert_eq!(storage.read(&file, 0, 1 << 19).await?, vec![0; 1 << 19]);
    storage.write(&file, 0, blocks(1, 4)).await?;
    storage.punch(&file, BLOCK, 2 * BLOCK).await?;
    let read = storage.read(&file, 0, 4 * BLOCK_BYTES).await?;
    assert_eq!(read, [blocks(1, 1), blocks(0, 2), blocks(1, 1)].concat());
    storage.punch(&file, 0, 1 << 20).await?;
    let stat = storage.stat_file(&file).await?;
    assert_eq!(stat.size_bytes, 1 << 20);
    assert!(stat.allocated_bytes < 1 << 19);
    Ok(())
}

async fn reserving_does_not_grow_the_file(storage: impl Storage) -> Result<()> {
    let file = storage.create("f").await?;
    storage.reserve(&file, 0, 1 << 20).await?;
    assert_eq!(storage.stat_file(&file).await?.size_bytes, 0);
    Ok(())
}

async fn links_are_exclusive_and_share_content(storage: impl Storage) -> Result<()> {
    let file = storage.create("f").await?;
    storage.link("f", "g").await?;
    assert!(matches!(storage.link("f", "g").await, Err(StorageError::Exists { .. })));
    assert!(matches!(storage.link("nothing", "h").await, Err(StorageError::NotFound { .. })));
    storage.write(&file, 0, blocks(1, 1)).await?;
    storage.unlink("f").await?;
    let linked = storage.open("g", Access::Read).await?;
    assert_eq!(storage.read(&linked, 0, BLOCK_BYTES).await?, blocks(1, 1));
    Ok(())
}

async fn rename_replaces(storage: impl Storage) -> Result<()> {
    for (path, byte) in [("old", 1), ("new", 2)] {
        let file = storage.create(path).await?;
        storage.write(&file, 0, blocks(byte, 1)).await?;
    }
    storage.rename("new", "old").await?;
    assert_eq!(storage.list("").await?, ["old"]);
    let file = storage.open("old", Access::Read).await?;
    assert_eq!(storage.read(&file, 0, 1).await?, vec![2]);
    assert!(matches!(storage.rename("new", "old").await, Err(StorageError::NotFound { .. })));
    Ok(())
}

async fn directories_list_their_names_in_order(storage: impl Storage) -> Result<()> {
    storage.create_dir("d").await?;
    assert!(storage.stat("d").await?.is_dir);
    for name in ["b", "c", "a"] {
        storage.create(&format!("d/{name}")).await?;
    }
    storage.create_dir("d/e").await?;
    assert_eq!(storage.list("d").await?, ["a", "b", "c", "e"]);
    assert_eq!(storage.list("").await?, ["d"]);
    assert!(matches!(storage.remove_dir("d").await, Err(StorageError::Io { errno: 39, .. })));
    storage.remove_dir("d/e").await?;
    for name in ["a", "b", "c"] {
        storage.unlink(&format!("d/{name}")).await?;
    }
    storage.sync_dir("d").await?;
    storage.remove_dir("d").await?;
    storage.sync_dir("").await?;
    assert!(storage.list("").await?.is_empty());
    assert!(matches!(storage.list("d").await, Err(StorageError::NotFound { .. })));
    Ok(())
}

async fn an_unlinked_file_lives_while_it_is_open(storage: impl Storage) -> Result<()> {
    let file = storage.create("f").await?;
    storage.write(&file, 0, blocks(1, 1)).await?;
    storage.unlink("f").await?;
    storage.sync_dir("").await?;
    assert_eq!(storage.read(&file, 0, 1).await?, vec![1]);
    storage.write(&file, 0, blocks(2, 1)).await
}

async fn a_lock_belongs_to_the_open_file(storage: impl Storage) -> Result<()> {
    let first = storage.create("f").await?;
    let second = storage.open("f", Access::ReadWrite).await?;
    assert!(storage.try_lock(&first).await?);
    assert!(storage.try_lock(&first).await?, "the holder has it already");
    assert!(!storage.try_lock(&second).await?);
    let clone = first.clone();
    drop(first);
    assert!(!storage.try_lock(&second).await?);
    drop(clone);
    assert!(storage.try_lock(&second).await?);
    storage.unlock(&second).await?;
    let third = storage.open("f", Access::ReadWrite).await?;
    assert!(storage.try_lock(&third).await?);
    Ok(())
}

async fn a_file_opened_for_reading_is_not_written(storage: impl Storage) -> Result<()> {
    storage.create("f").await?;
    let file = storage.open("f", Access::Read).await?;
    assert!(matches!(storage.write(&file, 0, blocks(1, 1)).await, Err(StorageError::Io { .. })));
    Ok(())
}

async fn free_space_is_known(storage: impl Storage) -> Result<()> {
    assert!(storage.free_bytes().await? > 0);
    Ok(())
}

async fn large_transfers_are_whole(storage: impl Storage) -> Result<()> {
    let file = storage.create("f").await?;
    let content: Bytes = (0..8 << 20).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    storage.write(&file, 0, content.clone()).await?;
    storage.sync(&file).await?;
    assert_eq!(storage.read(&file, 0, content.len()).await?, content);
    Ok(())
}

/// Ways to ask a promise of a kind of storage.
mod on {
    use super::*;

    /// A directory of its own, on the disk that the build is on.
    fn posix<F: Future<Output = Result<()>>>(options: PosixOptions, promise: impl FnOnce(PosixStorage) -> F) {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            promise(PosixStorage::open(directory.path(), options).unwrap()).await.unwrap();
        });
    }

    pub(super) fn threads<F: Future<Output = Result<()>>>(promise: impl FnOnce(PosixStorage) -> F) {
        posix(PosixOptions { shared: false, backend: Backend::Threads }, promise);
    }

    pub(super) fn threads_shared<F: Future<Output = Result<()>>>(promise: impl FnOnce(PosixStorage) -> F) {
        posix(PosixOptions { shared: true, backend: Backend::Threads }, promise);
    }

    pub(super) fn uring<F: Future<Output = Result<()>>>(promise: impl FnOnce(PosixStorage) -> F) {
        posix(PosixOptions { shared: false, backend: Backend::Uring }, promise);
    }

    pub(super) fn uring_shared<F: Future<Output = Result<()>>>(promise: impl FnOnce(PosixStorage) -> F) {
        posix(PosixOptions { shared: true, backend: Backend::Uring }, promise);
    }

    pub(super) fn simulated<F: Future<Output = Result<()>>>(promise: impl FnOnce(SimStorage) -> F) {
        executor::run(promise(SimDisk::new(1).storage(SimNode(1)))).unwrap();
    }
}

/// One module of tests for a kind of storage, with a test for each promise.
macro_rules! conformance {
    ($kind:ident; $($promise:ident)*) => {
        mod $kind {
            $(#[test]
            fn $promise() {
                super::on::$kind(|storage| super::$promise(storage));
            })*
        }
    };
    ($kind:ident) => {
        conformance! { $kind;
            create_is_exclusive what_was_written_is_read reads_need_no_alignment reads_end_at_the_end_of_the_file
            sizes_are_sparse cut_off_content_does_not_come_back reserving_takes_space_and_punching_gives_it_back
            reserving_does_not_grow_the_file links_are_exclusive_and_share_content rename_replaces
            directories_list_their_names_in_order an_unlinked_file_lives_while_it_is_open
            a_lock_belongs_to_the_open_file a_file_opened_for_reading_is_not_written free_space_is_known
            large_transfers_are_whole
        }
    };
}

conformance!(threads);
conformance!(threads_shared);
conformance!(uring);
conformance!(uring_shared);
conformance!(simulated);
