//! A volume or a snapshot, attached.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use csnap_proto::message::volume::{Attach, Geometry};
use csnap_proto::{InstanceId, Name, Secret, SessionId, Target, Term};

use super::driver;
use super::link::ServerSource;
use super::shared::Shared;
use crate::core::{
    Canaries, ClientCore, CoreConfig, Input, Op, RequestError, UNIQUE_CACHE_BYTES, WRITEBACK_BYTES,
};
use crate::head::{Arenas, BlockRun, DataConfig, HeadFile};

/// Pause between attempts at the lock of a head that another process still holds.
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// How volumes are attached; one for all of a process.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Where connected server sockets come from.
    pub source: ServerSource,
    /// The pool's directory on this node.
    pub pool: PathBuf,
    /// Several hosts use the pool: direct I/O.
    pub shared: bool,
    /// Node of this process, for people.
    pub node: Name,
    /// This run of this process.
    pub instance: InstanceId,
    /// Bound of the cache of known-unique chunks of one volume, bytes.
    pub unique_cache_bytes: usize,
    /// Fewest written bytes after which writeback is started; 0 for never.
    pub writeback_bytes: u64,
    /// Deliberate breaks, for tests of the tests.
    pub canaries: Canaries,
}

impl ClientConfig {
    /// With defaults for everything that has one.
    #[must_use]
    pub fn new(source: ServerSource, pool: PathBuf, node: Name, instance: InstanceId) -> Self {
        Self {
            source,
            pool,
            shared: false,
            node,
            instance,
            unique_cache_bytes: UNIQUE_CACHE_BYTES,
            writeback_bytes: WRITEBACK_BYTES,
            canaries: Canaries::default(),
        }
    }
}

/// Outcome of an operation that must not wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Attempt {
    /// Done, all of it.
    Done,
    /// It would wait: ask again through the asynchronous operation. Nothing is known of what was done so far.
    WouldBlock,
}

impl From<bool> for Attempt {
    fn from(done: bool) -> Self {
        if done { Self::Done } else { Self::WouldBlock }
    }
}

/// An attached volume (its one writer) or snapshot (read-only).
///
/// Requests wait for a server as long as it takes; they fail only with what [`RequestError`] names. A future that is
/// dropped gives up waiting, not the request: what it did stays, what it still does goes on.
#[derive(Debug)]
pub struct Volume {
    shared: Arc<Shared>,
    geometry: Geometry,
}

/// Gives the session back if nobody else does. Its last sync must not wait for a head that nobody opens any more.
struct Unreleased(Option<Arc<Shared>>);

impl Drop for Unreleased {
    fn drop(&mut self) {
        if let Some(shared) = self.0.take() {
            shared.set_no_head(RequestError::Lost("the attach was given up".to_owned()));
            start_release(&shared);
        }
    }
}

impl Volume {
    /// Attaches `target`: a volume for writing, or a snapshot. Waits for a server and, for a volume, until no other process
    /// of this host has I/O in flight to its head. Dropping the future gives the session back.
    ///
    /// Runs on a tokio runtime with time and I/O; disk I/O takes its blocking threads.
    ///
    /// # Errors
    /// Refused by the server (busy, not found, …), or the head cannot be opened.
    pub async fn open(config: ClientConfig, target: Target) -> Result<Arc<Self>, RequestError> {
        let writes = target.snapshot.is_none();
        let data = DataConfig { pool: config.pool.clone(), shared: config.shared };
        let core = ClientCore::new(core_config(&config, &target)?);
        let shared = Arc::new(Shared::new(core, target, Arenas::new(&data)));
        let mut unreleased = Unreleased(Some(shared.clone()));
        tokio::spawn(driver::run(shared.clone(), config.source));
        let geometry = attached(&shared).await?;
        shared.set_head(open_head(&shared, data, geometry.clone(), writes).await?);
        unreleased.0 = None;
        Ok(Arc::new(Self { shared, geometry }))
    }

    /// Size, chunk size, identity.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// What was asked for when it was attached.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.shared.target
    }

    /// A snapshot.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.shared.target.snapshot.is_some()
    }

    /// Messages sent and received since the attachment, by name.
    #[must_use]
    pub fn messages(&self) -> BTreeMap<String, u64> {
        self.shared
            .lock()
            .core()
            .messages()
            .iter()
            .map(|(name, count)| ((*name).to_owned(), *count))
            .collect()
    }

    /// Why requests wait or fail, if they do, for people.
    #[must_use]
    pub fn waiting(&self) -> Option<String> {
        self.shared.lock().core().waiting()
    }

    /// The agent heard that a server serves under `term`: a connection to an older one is given up at once.
    pub fn server_serves(&self, term: Term) {
        self.shared.drive(Input::ServerServes { term });
    }

    /// Fills `out` from `offset` if that needs no waiting; void after anything but [`Attempt::Done`].
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn try_read(&self, offset: u64, out: &mut [u8]) -> Result<Attempt, RequestError> {
        self.check(offset, out.len() as u64)?;
        match self.shared.live_head() {
            Some(head) if !self.is_read_only() => Ok(head.try_read(offset, out)?.into()),
            _ => Ok(Attempt::WouldBlock),
        }
    }

    /// Writes `data` at `offset` if that needs no message and no waiting. Done means visible, not durable.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn try_write(&self, offset: u64, data: &[u8]) -> Result<Attempt, RequestError> {
        self.check(offset, data.len() as u64)?;
        match self.shared.live_head() {
            Some(head) if !self.is_read_only() => Ok(self.shared.write_fast(&head, offset, data)?.into()),
            _ => Ok(Attempt::WouldBlock),
        }
    }

    /// Exactly `len` bytes at `offset`.
    ///
    /// # Errors
    /// The range is beyond the end, the medium failed, or the attachment is over.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Bytes, RequestError> {
        self.check(offset, len as u64)?;
        let parts = self.shared.request(Op::Read, offset, len as u64, Bytes::new()).await?;
        Ok(assemble(parts, len))
    }

    /// All of `data` at `offset`: visible; durable too if `fua`.
    ///
    /// # Errors
    /// No space, read-only, the range is beyond the end, the medium failed, or the attachment is over.
    pub async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), RequestError> {
        let len = data.len() as u64;
        self.shared.request(Op::Write { fua }, offset, len, data).await.map(drop)
    }

    /// The content of the range is not needed any more.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<(), RequestError> {
        self.shared.request(Op::Trim { fua }, offset, len, Bytes::new()).await.map(drop)
    }

    /// The range reads as zeros afterwards; its space is given back only if `may_punch`.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        fua: bool,
        may_punch: bool,
    ) -> Result<(), RequestError> {
        self.shared.request(Op::WriteZeroes { fua, may_punch }, offset, len, Bytes::new()).await.map(drop)
    }

    /// Everything that completed before is durable when this completes.
    ///
    /// # Errors
    /// The medium failed (then, and always from then on), or the attachment is over.
    pub async fn flush(&self) -> Result<(), RequestError> {
        self.shared.request(Op::Flush, 0, 0, Bytes::new()).await.map(drop)
    }

    /// What of the range takes space. Of a snapshot all counts as data: where it lies may change while one looks.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn block_status(&self, offset: u64, len: u64) -> Result<Vec<BlockRun>, RequestError> {
        self.check(offset, len)?;
        if let Some(error) = self.shared.lock().ended.clone() {
            return Err(error);
        }
        let Some(head) = self.shared.live_head().filter(|_| !self.is_read_only()) else {
            return Ok(vec![BlockRun { len, hole: false, zero: false }]);
        };
        let runs = tokio::task::spawn_blocking(move || head.runs(offset, len)).await;
        Ok(runs.expect("looking for holes does not panic")?)
    }

    /// Drains, syncs and gives the volume back: when this returns another may have it. Requests that come after it fail.
    /// Dropping the last handle does the same without waiting.
    ///
    /// # Errors
    /// The last sync failed; the volume is given back all the same.
    pub async fn release(&self) -> Result<(), RequestError> {
        let before = self.shared.lock().ended.clone();
        start_release(&self.shared);
        let ended = self.shared.wait_for(|state| state.released.then(|| state.ended.clone())).await;
        match ended {
            Some(error) if before.is_none() => Err(error),
            _ => Ok(()),
        }
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), RequestError> {
        match offset.checked_add(len) {
            Some(end) if len > 0 && end <= self.geometry.size_bytes => Ok(()),
            _ => Err(RequestError::Invalid("an empty range, or one beyond the end of the volume")),
        }
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        start_release(&self.shared);
    }
}

/// Begins the release unless it has begun. Nobody need wait for it: the driver and a task of its own see it through.
fn start_release(shared: &Arc<Shared>) {
    if std::mem::replace(&mut shared.lock().release_begun, true) {
        return;
    }
    let done = shared.begin(Op::Release, 0, 0, Bytes::new());
    let shared = shared.clone();
    let runtime = shared.runtime.clone();
    drop(runtime.spawn(async move {
        let _ = done.await;
        shared.on_released();
    }));
}

fn core_config(config: &ClientConfig, target: &Target) -> Result<CoreConfig, RequestError> {
    let attach = match &target.snapshot {
        None => Attach::Writer(target.volume.clone()),
        Some(_) => Attach::Snapshot(target.clone()),
    };
    Ok(CoreConfig {
        session: SessionId(draw()?),
        secret: Secret(draw()?),
        instance: config.instance,
        node: config.node.clone(),
        pid: std::process::id(),
        attach,
        unique_cache_bytes: config.unique_cache_bytes,
        writeback_bytes: config.writeback_bytes,
        canaries: config.canaries.clone(),
    })
}

pub(super) fn draw() -> Result<[u8; 16], RequestError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| RequestError::Media(format!("the kernel gives no random numbers: {error}")))?;
    Ok(bytes)
}

/// Waits for the first identification.
async fn attached(shared: &Arc<Shared>) -> Result<Geometry, RequestError> {
    shared
        .wait_for(|state| match (&state.ended, &state.attached) {
            (Some(error), _) => Some(Err(error.clone())),
            (None, Some(geometry)) => Some(Ok(geometry.clone())),
            (None, None) => None,
        })
        .await
}

/// Opens the head; a writer obtains its lock first.
async fn open_head(
    shared: &Arc<Shared>,
    data: DataConfig,
    geometry: Geometry,
    writes: bool,
) -> Result<HeadFile, RequestError> {
    let open = move || HeadFile::open(&data, &geometry, writes);
    let head = tokio::task::spawn_blocking(open).await.expect("opening does not panic")?;
    while writes && !head.try_lock()? {
        if let Some(error) = &shared.lock().ended {
            return Err(error.clone());
        }
        tracing::info!(target = %shared.target, head = %head.path().display(), "another process still holds the head");
        tokio::time::sleep(LOCK_PAUSE).await;
    }
    Ok(head)
}

/// Puts what was read into one piece.
fn assemble(mut parts: Vec<(u64, Bytes)>, len: usize) -> Bytes {
    if let [(0, whole)] = parts.as_slice() {
        assert_eq!(whole.len(), len, "a read brings what was asked for");
        return whole.clone();
    }
    parts.sort_unstable_by_key(|(at, _)| *at);
    let mut buffer = BytesMut::with_capacity(len);
    for (at, bytes) in parts {
        assert_eq!(at, buffer.len() as u64, "parts of a read join without gaps");
        buffer.extend_from_slice(&bytes);
    }
    assert_eq!(buffer.len(), len, "a read brings what was asked for");
    buffer.freeze()
}
