//! What the POSIX storage promises beyond the trait: its futures may move between threads and be dropped, its queues
//! are bounded, and it ends cleanly with its runtime.

#![allow(missing_docs, reason = "test functions are named for what they show")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::future::Future;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use csnap_storage::posix::{AlignedBuffer, Backend, OPERATIONS_MAX, PosixOptions, PosixStorage};
use csnap_storage::{Access, BLOCK_BYTES, Storage, StorageError};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

const BACKENDS: [Backend; 2] = [Backend::Threads, Backend::Uring];

fn directory() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn multi_thread() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn open(root: &Path, backend: Backend) -> PosixStorage {
    PosixStorage::open(root, PosixOptions { shared: false, backend }).unwrap()
}

fn block(byte: u8) -> Bytes {
    vec![byte; BLOCK_BYTES].into()
}

#[test]
fn many_tasks_on_many_threads_each_get_their_own_answer() {
    for backend in BACKENDS {
        let directory = directory();
        multi_thread().block_on(async {
            let storage = open(directory.path(), backend);
            assert_eq!(storage.backend(), backend);
            let file = storage.create("f").await.unwrap();
            let write_and_read = |index: u64| {
                let (storage, file) = (storage.clone(), file.clone());
                async move {
                    let (at, byte) = (index * BLOCK_BYTES as u64, index.to_le_bytes()[0]);
                    storage.write(&file, at, block(byte)).await?;
                    if index.is_multiple_of(64) {
                        storage.sync(&file).await?;
                    }
                    let read = storage.read(&file, at, BLOCK_BYTES).await?;
                    Ok::<bool, StorageError>(read == block(byte))
                }
            };
            // More at once than the queue takes.
            let tasks: Vec<_> =
                (0..4 * OPERATIONS_MAX as u64).map(|index| tokio::spawn(write_and_read(index))).collect();
            for task in tasks {
                assert!(task.await.unwrap().unwrap());
            }
        });
    }
}

#[test]
fn an_operation_whose_future_was_dropped_completes() {
    for backend in BACKENDS {
        let directory = directory();
        multi_thread().block_on(async {
            let storage = open(directory.path(), backend);
            let file = storage.create("f").await.unwrap();
            for index in 0..64u8 {
                let at = u64::from(index) * BLOCK_BYTES as u64;
                let mut write = Box::pin(storage.write(&file, at, block(index)));
                let mut read = Box::pin(storage.read(&file, 0, 1 << 20));
                let mut context = Context::from_waker(Waker::noop());
                let _: Poll<_> = write.as_mut().poll(&mut context);
                let _: Poll<_> = read.as_mut().poll(&mut context);
                // A task that never yields is refused by tokio's budget, and nothing would be submitted any more.
                tokio::task::yield_now().await;
            }
            // What was submitted before is not always done before; each write is seen in the end.
            for index in 0..64u8 {
                let at = u64::from(index) * BLOCK_BYTES as u64;
                while storage.read(&file, at, BLOCK_BYTES).await.unwrap() != block(index) {
                    tokio::task::yield_now().await;
                }
            }
        });
    }
}

#[test]
fn a_runtime_may_end_with_operations_in_flight() {
    for backend in BACKENDS {
        let directory = directory();
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let (storage, file) = runtime.block_on(async {
            let storage = open(directory.path(), backend);
            let file = storage.create("f").await.unwrap();
            for index in 0..32u8 {
                let (storage, file) = (storage.clone(), file.clone());
                tokio::spawn(async move {
                    storage.write(&file, u64::from(index) << 20, vec![index; 1 << 20].into()).await.unwrap();
                    storage.sync(&file).await.unwrap();
                });
            }
            tokio::task::yield_now().await;
            (storage, file)
        });
        drop(runtime);
        drop((storage, file));
        // Whatever became of the writes, each is whole or was never begun: nothing was freed under the kernel.
        let content = std::fs::read(directory.path().join("f")).unwrap();
        for (index, piece) in content.chunks(1 << 20).enumerate() {
            assert!(piece.iter().all(|byte| usize::from(*byte) == index || *byte == 0));
        }
    }
}

#[test]
fn a_lock_is_free_when_its_last_handle_is_gone() {
    for backend in BACKENDS {
        let directory = directory();
        multi_thread().block_on(async {
            let storage = open(directory.path(), backend);
            storage.create("f").await.unwrap();
            for _ in 0..100 {
                let file = storage.open("f", Access::ReadWrite).await.unwrap();
                assert!(storage.try_lock(&file).await.unwrap());
            }
        });
    }
}

#[test]
fn closed_files_give_their_descriptors_back() {
    for backend in BACKENDS {
        let directory = directory();
        multi_thread().block_on(async {
            let storage = open(directory.path(), backend);
            storage.create("f").await.unwrap();
            let mut highest = 0;
            for _ in 0..5000 {
                let file = storage.open("f", Access::Read).await.unwrap();
                highest = highest.max(file.fd().as_raw_fd());
            }
            // Closes are asynchronous, but bounded like everything in flight.
            assert!(highest < 1000, "descriptor {highest}");
        });
    }
}

#[test]
fn absolute_paths_open_origins_and_nothing_else() {
    for backend in BACKENDS {
        let directory = directory();
        multi_thread().block_on(async {
            let storage = open(directory.path(), backend);
            let origin = directory.path().join("origin");
            std::fs::write(&origin, [7; 100]).unwrap();
            let file = storage.open_absolute(&origin, Access::ReadWrite).await.unwrap();
            assert_eq!(storage.read(&file, 0, 200).await.unwrap(), vec![7; 100]);
            assert_eq!(storage.stat_file(&file).await.unwrap(), storage.stat("origin").await.unwrap());
            let origin = origin.to_str().unwrap();
            storage.open_origin(origin).await.unwrap();
            assert!(matches!(storage.open_origin("origin").await, Err(StorageError::Io { errno: 22, .. })));
            for outside in [origin, "../origin", "d/../origin", "a\0b"] {
                let opened = storage.open(outside, Access::Read).await;
                assert!(matches!(opened, Err(StorageError::Io { errno: 22, .. })), "{outside}");
            }
        });
    }
}

#[test]
fn a_shared_pool_takes_aligned_buffers_and_any_other() {
    for backend in BACKENDS {
        let directory = directory();
        multi_thread().block_on(async {
            let storage =
                PosixStorage::open(directory.path(), PosixOptions { shared: true, backend }).unwrap();
            let file = storage.create("f").await.unwrap();
            assert!(file.is_direct());
            let mut buffer = AlignedBuffer::new(BLOCK_BYTES);
            buffer.as_mut_slice().fill(1);
            storage.write(&file, 0, buffer.freeze()).await.unwrap();
            let odd = Bytes::from(vec![2; BLOCK_BYTES + 1]).slice(1..);
            storage.write(&file, BLOCK_BYTES as u64, odd).await.unwrap();
            let read = storage.read(&file, 4000, 200).await.unwrap();
            assert_eq!(read, [vec![1; 96], vec![2; 104]].concat());
        });
    }
}

#[test]
#[should_panic(expected = "not aligned")]
fn a_shared_pool_refuses_unaligned_writes() {
    let directory = directory();
    multi_thread().block_on(async {
        let options = PosixOptions { shared: true, backend: Backend::Threads };
        let storage = PosixStorage::open(directory.path(), options).unwrap();
        let file = storage.create("f").await.unwrap();
        let _ = storage.write(&file, 512, block(1)).await;
    });
}

#[test]
fn threads_need_no_runtime_and_auto_falls_back_without_one() {
    let directory = directory();
    let storage = open(directory.path(), Backend::Auto);
    assert_eq!(storage.backend(), Backend::Threads);
    assert!(PosixStorage::open(&directory.path().join("nothing"), PosixOptions::default()).is_err());
}

#[test]
fn an_origin_is_a_file_or_a_block_device_and_nothing_that_waits_for_a_peer() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};

    for backend in BACKENDS {
        let directory = directory();
        let at = |name: &str| directory.path().join(name);
        mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        std::fs::create_dir(at("directory")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        std::fs::write(at("file"), b"content").unwrap();
        multi_thread().block_on(async {
            let storage = open(directory.path(), backend);
            let others = [at("fifo"), at("directory"), at("socket"), "/dev/null".into()];
            for path in others {
                for access in [Access::Read, Access::ReadWrite] {
                    let refused = storage.open_absolute(&path, access).await.map(drop);
                    assert!(matches!(refused, Err(StorageError::Io { .. })), "{path:?}: {refused:?}");
                }
            }
            let file = storage.open_absolute(&at("file"), Access::Read).await.unwrap();
            assert_eq!(storage.read(&file, 0, 7).await.unwrap(), "content");
            let flags = rustix::fs::fcntl_getfl(file.fd()).unwrap();
            assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK), "its reads may wait");
        });
    }
}
