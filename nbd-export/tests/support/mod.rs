//! What the tests of the server share: an export in memory that can be made slow, failing or held, a server around it on
//! a unix socket, and a raw client that sends whatever it is told.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

pub mod client;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use csnap_nbd_export::shell::{Listener, serve};
use csnap_nbd_export::{
    Attempt, BlockExtent, ErrorKind, Export, ExportError, ExportInfo, Exports, Listed, OpenError, Zeroing,
};
use tokio::sync::{Semaphore, oneshot};

/// An export in memory.
pub struct Memory {
    pub bytes: Mutex<Vec<u8>>,
    /// The fast attempts answer WouldBlock.
    pub slow: AtomicBool,
    /// Slow operations wait for a permit each while this is on.
    pub held: AtomicBool,
    pub permits: Semaphore,
    /// Slow operations that have begun.
    pub begun: AtomicU64,
    pub flushes: AtomicU64,
    /// Writes fail for want of space.
    pub full: AtomicBool,
    /// Everything fails.
    pub broken: AtomicBool,
    /// Trims and zeroings that were asked for: offset, length, and how.
    pub changes: Mutex<Vec<(u64, u64, Option<Zeroing>)>>,
}

impl Memory {
    pub fn new(size: usize) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(vec![0; size]),
            slow: AtomicBool::new(false),
            held: AtomicBool::new(false),
            permits: Semaphore::new(0),
            begun: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            full: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            changes: Mutex::new(Vec::new()),
        })
    }

    pub fn content(&self, offset: usize, len: usize) -> Vec<u8> {
        self.bytes.lock().expect("no panic")[offset..offset + len].to_vec()
    }

    async fn wait(&self) -> Result<(), ExportError> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        if self.held.load(Ordering::SeqCst) {
            self.permits.acquire().await.expect("never closed").forget();
        }
        self.check(false)
    }

    fn check(&self, write: bool) -> Result<(), ExportError> {
        if self.broken.load(Ordering::SeqCst) {
            return Err(ExportError::new(ErrorKind::Io, "the medium is broken"));
        }
        if write && self.full.load(Ordering::SeqCst) {
            return Err(ExportError::new(ErrorKind::NoSpace, "the pool is full"));
        }
        Ok(())
    }

    fn range(offset: u64, len: usize) -> std::ops::Range<usize> {
        let offset = usize::try_from(offset).expect("small");
        offset..offset + len
    }

    fn put(&self, offset: u64, data: &[u8]) {
        self.bytes.lock().expect("no panic")[Self::range(offset, data.len())].copy_from_slice(data);
    }
}

impl Export for Memory {
    fn try_read(&self, offset: u64, out: &mut [u8]) -> Attempt {
        if self.slow.load(Ordering::SeqCst) {
            return Attempt::WouldBlock;
        }
        if let Err(error) = self.check(false) {
            return Attempt::Failed(error);
        }
        let range = Self::range(offset, out.len());
        out.copy_from_slice(&self.bytes.lock().expect("no panic")[range]);
        Attempt::Done
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Attempt {
        if self.slow.load(Ordering::SeqCst) {
            return Attempt::WouldBlock;
        }
        if let Err(error) = self.check(true) {
            return Attempt::Failed(error);
        }
        self.put(offset, data);
        Attempt::Done
    }

    async fn read(&self, offset: u64, len: usize) -> Result<Bytes, ExportError> {
        self.wait().await?;
        Ok(self.bytes.lock().expect("no panic")[Self::range(offset, len)].to_vec().into())
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), ExportError> {
        self.wait().await?;
        self.check(true)?;
        self.put(offset, &data);
        Ok(())
    }

    async fn flush(&self) -> Result<(), ExportError> {
        self.wait().await?;
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    async fn trim(&self, offset: u64, len: u64) -> Result<(), ExportError> {
        self.wait().await?;
        self.changes.lock().expect("no panic").push((offset, len, None));
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, len: u64, how: Zeroing) -> Result<(), ExportError> {
        self.wait().await?;
        self.changes.lock().expect("no panic").push((offset, len, Some(how)));
        if how.fast_only {
            return Err(ExportError::new(ErrorKind::NotSupported, "zeroing is slow here"));
        }
        Ok(())
    }

    async fn cache(&self, _: u64, _: u64) -> Result<(), ExportError> {
        self.wait().await
    }

    async fn block_status(
        &self,
        _: u64,
        _: u64,
        extents_max: usize,
    ) -> Result<Vec<BlockExtent>, ExportError> {
        self.wait().await?;
        let extent = |index: usize| BlockExtent { len: 4096, hole: index % 2 == 1, zero: index % 2 == 1 };
        Ok((0..extents_max).map(extent).collect())
    }
}

/// `mem` (also the default), `ro` (the same, read-only), `huge` (the same, said to be large), `busy` (held by another).
pub struct MemoryExports {
    pub memory: Arc<Memory>,
    pub opened: AtomicU64,
    pub released: AtomicU64,
    /// Opening never ends.
    pub stuck: AtomicBool,
}

impl MemoryExports {
    pub fn new(size: usize) -> Arc<Self> {
        Arc::new(Self {
            memory: Memory::new(size),
            opened: AtomicU64::new(0),
            released: AtomicU64::new(0),
            stuck: AtomicBool::new(false),
        })
    }

    /// Waits until every attachment is released.
    pub fn wait_released(&self) {
        wait_until("every attachment is released", || {
            self.opened.load(Ordering::SeqCst) == self.released.load(Ordering::SeqCst)
        });
    }

    fn find(&self, name: &str) -> Result<ExportInfo, OpenError> {
        let size = self.memory.bytes.lock().expect("no panic").len() as u64;
        let (name, size_bytes, read_only) = match name {
            "" | "mem" => ("mem", size, false),
            "ro" => ("ro", size, true),
            "huge" => ("huge", 1 << 50, false),
            "busy" => ("busy", size, false),
            _ => return Err(OpenError::NotFound(format!("there is no export {name:?}"))),
        };
        Ok(ExportInfo {
            name: name.to_owned(),
            description: "memory".to_owned(),
            size_bytes,
            read_only,
            block_preferred: 4096,
            multi_conn: true,
            fast_zero: true,
        })
    }
}

impl Exports for MemoryExports {
    type Export = Memory;

    async fn list(&self) -> Result<Vec<Listed>, OpenError> {
        let listed = |name: &str| Listed { name: name.to_owned(), description: "memory".to_owned() };
        Ok(["mem", "ro", "huge", "busy"].map(listed).to_vec())
    }

    async fn info(&self, name: &str) -> Result<ExportInfo, OpenError> {
        self.find(name)
    }

    async fn open(&self, name: &str) -> Result<(ExportInfo, Arc<Memory>), OpenError> {
        if self.stuck.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        if name == "busy" {
            return Err(OpenError::Busy(
                "busy is held by node n2 (pid 77); detach it there first".to_owned(),
            ));
        }
        let info = self.find(name)?;
        self.opened.fetch_add(1, Ordering::SeqCst);
        Ok((info, Arc::clone(&self.memory)))
    }

    async fn release(&self, _: Arc<Memory>) {
        self.released.fetch_add(1, Ordering::SeqCst);
    }
}

/// A server on a unix socket of its own, on a thread of its own; ends in order when dropped.
pub struct Server {
    pub socket: PathBuf,
    pub uri: String,
    pub tcp: std::net::SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Server {
    pub fn start<X: Exports>(exports: Arc<X>) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("nbd.sock");
        let (stop, stopped) = oneshot::channel();
        let (ready, started) = std::sync::mpsc::channel();
        let path = socket.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .max_blocking_threads(4)
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async {
                let unix = Listener::unix(&path).expect("binds");
                let tcp = Listener::tcp("127.0.0.1:0".parse().expect("an address")).expect("binds");
                let address = match &tcp {
                    Listener::Tcp(listener) => listener.local_addr().expect("has one"),
                    Listener::Unix(..) => unreachable!("it is TCP"),
                };
                ready.send((unix.uri().expect("has one"), address)).expect("the test waits");
                serve(vec![unix, tcp], exports, async {
                    let _ = stopped.await;
                })
                .await;
            });
        });
        let (uri, tcp) = started.recv().expect("the server starts");
        Self { socket, uri, tcp, stop: Some(stop), thread: Some(thread), _dir: dir }
    }

    /// Tells it to end, without waiting.
    pub fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
        let ended = self.thread.take().expect("joined once").join();
        assert!(ended.is_ok() || std::thread::panicking(), "the server panicked");
    }
}

/// Polls a condition that another thread makes true; fails after ten seconds.
pub fn wait_until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..10_000 {
        if condition() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    panic!("waited in vain until {what}");
}

/// Memory of this process that is in use, bytes.
pub fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("readable");
    let pages: usize = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("a number");
    pages * 4096
}
