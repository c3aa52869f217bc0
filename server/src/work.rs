//! What a core's outputs do to storage, as procedures: the same ones in the daemon and in the simulated world.
//!
//! A [`Workbench`] has the journal and the open files of one serving term. [`Workbench::carry_out`] does what one
//! output asks for and says what came of it as the core's next input. Outputs may be carried out side by side; the
//! journal keeps its appends in the order in which they were begun.

use csnap_proto::limits::{ARENA_BYTES, CHUNK_BYTES_MIN};
use csnap_proto::message::operate::{Refusal, RefusalKind};
use csnap_proto::{StoreExtent, Term, VolumeId};
use csnap_storage::{Storage, StorageError};

use crate::check::lock_gate;
use crate::copy::{self, Failure, Files, arena_path, copy_out, head_path};
use crate::core::canary::{Broken, Canary};
use crate::core::{Input, Output, Task, TaskDone};
use crate::state::{Origin, State};
use crate::term::checkpoint::Written;
use crate::term::{Fatal, Journal, Pool, Position};

/// What Linux says of a length beyond what the file system takes.
const EFBIG: i32 = 27;

/// What came of an output.
pub struct Done {
    /// For the core.
    pub input: Input,
    /// The state as of a position of the journal, if the output carried one: to be written with
    /// [`Workbench::checkpoint`].
    pub checkpoint: Option<(Position, Box<State>)>,
}

/// Everything of a serving term that touches storage. Clones share it.
#[derive(Clone)]
pub struct Workbench<S: Storage> {
    storage: S,
    pool: Pool<S>,
    journal: Journal<S>,
    files: Files<S>,
    broken: Broken,
}

impl<S: Storage> Workbench<S> {
    /// Nothing open yet but the journal.
    pub fn new(pool: &Pool<S>, journal: Journal<S>) -> Self {
        let storage = pool.storage.clone();
        Self {
            files: Files::new(storage.clone()),
            storage,
            pool: pool.clone(),
            journal,
            broken: Broken::default(),
        }
    }

    /// The same, with fewer heads and arenas kept open than [`copy::FILES_KEPT_OPEN_MAX`] of each.
    #[must_use]
    pub fn keeping_open(self, most: usize) -> Self {
        Self { files: self.files.keeping_open(most), ..self }
    }

    /// The same, with the rule that a test breaks.
    #[must_use]
    pub fn breaking(self, broken: Broken) -> Self {
        Self { files: self.files.breaking(broken), broken, ..self }
    }

    /// The journal.
    pub fn journal(&self) -> &Journal<S> {
        &self.journal
    }

    /// Does what `output` asks for. `None` for outputs that do not concern storage.
    ///
    /// # Errors
    /// When the journal or the store cannot be trusted any more: the process must end.
    pub async fn carry_out(&self, output: Output) -> Result<Option<Done>, Fatal> {
        let mut checkpointed = None;
        let input = match output {
            Output::Append { batch, body, checkpoint } => {
                let position = self.journal.append(body).await?;
                checkpointed = checkpoint.map(|state| (position, state));
                Input::Appended { batch }
            }
            Output::ReadGate { batch } => Input::Gate { batch, open: self.journal.gate_open().await? },
            Output::CopyOut { copy, job } => {
                let result = match copy_out(&self.files, &job).await {
                    Ok(zeros) => Ok(zeros),
                    Err(Failure::Refused(error)) => Err(error),
                    Err(Failure::Fatal(error)) => return Err(error.into()),
                };
                Input::CopiedOut { copy, result }
            }
            Output::GrowArena { extent, create } => {
                let grown = self.grow_arena(extent, create).await?;
                Input::ArenaGrown { extent, grown }
            }
            Output::Start { task, what } => Input::TaskEnded { task, done: self.perform(what).await },
            Output::Punch { extents } => {
                self.punch(&extents).await?;
                Input::Punched { extents }
            }
            Output::RemoveHead { volume } => {
                self.remove_head(volume).await?;
                Input::HeadRemoved { volume }
            }
            Output::Send { .. } | Output::Close { .. } | Output::Exit { .. } => return Ok(None),
        };
        Ok(Some(Done { input, checkpoint: checkpointed }))
    }

    /// Takes the lock on our own gate, which says to everybody on this host that we live. The kernel gives it up when
    /// the last I/O of this process is gone.
    pub async fn show_life(&self) -> Result<Option<S::File>, StorageError> {
        lock_gate(&self.pool, self.journal.term()).await
    }

    /// Which of these older terms' servers are dead for certain: their lock can be had. Only on a pool that one host
    /// uses; elsewhere a lock that is gone may mean a host that is out of reach.
    pub async fn find_dead(&self, terms: Vec<Term>) -> Result<Vec<Term>, StorageError> {
        let mut dead = Vec::new();
        if self.pool.toml.shared {
            return Ok(dead);
        }
        for term in terms {
            if let Some(file) = lock_gate(&self.pool, term).await? {
                self.storage.unlock(&file).await?;
                dead.push(term);
            }
        }
        Ok(dead)
    }

    /// Writes a checkpoint beside the journal; appends go on meanwhile. `false` when there was no space for it.
    pub async fn checkpoint(&self, position: Position, state: &State) -> Result<bool, Fatal> {
        let Some(mut writer) = self.journal.begin_checkpoint(position).await? else { return Ok(false) };
        for piece in state.checkpoint() {
            if writer.piece(&piece).await? == Written::NoSpace {
                return Ok(false);
            }
        }
        Ok(writer.finish().await? == Written::Done)
    }

    /// Reserves room in the store; false when the pool is full.
    async fn grow_arena(&self, extent: StoreExtent, create: bool) -> Result<bool, Fatal> {
        let (term, arena) = (extent.at.term, extent.at.arena);
        let reserved = async {
            if create {
                self.create_arena(term, arena).await?;
            }
            let file = self.files.arena(term, arena).await?;
            self.storage.reserve(&file, extent.at.offset(), bytes_of(extent)).await?;
            Ok(file)
        };
        let file = match reserved.await {
            Ok(file) => file,
            Err(StorageError::NoSpace { .. }) => return Ok(false),
            Err(error) => return Err(Fatal::from(error)),
        };
        // Whatever this sync says may be about copied-out data: no failure of it is a mere lack of space.
        self.storage.sync(&file).await?;
        Ok(true)
    }

    async fn create_arena(&self, term: Term, arena: u32) -> Result<(), StorageError> {
        let directory = format!("store/{}", term.0);
        match self.storage.create_dir(&directory).await {
            Ok(()) => self.storage.sync_dir("store").await?,
            Err(StorageError::Exists { .. }) => {}
            Err(error) => return Err(error),
        }
        let file = match self.storage.create(&arena_path(term, arena)).await {
            // Only this term makes files here: one that is there was left by a growth that found no space.
            Err(StorageError::Exists { .. }) => self.files.arena(term, arena).await?,
            file => file?,
        };
        // Its size never changes after its first sync: what a later term writes where a sync of this one failed would
        // otherwise be durable, and beyond an end that is not.
        self.storage.set_len(&file, ARENA_BYTES).await?;
        if self.broken.breaks(Canary::LeaveArenaUnnamed) {
            return Ok(());
        }
        self.storage.sync_dir(&directory).await
    }

    async fn punch(&self, extents: &[StoreExtent]) -> Result<(), Fatal> {
        for extent in extents {
            let file = self.files.arena(extent.at.term, extent.at.arena).await?;
            self.storage.punch(&file, extent.at.offset(), bytes_of(*extent)).await?;
        }
        Ok(())
    }

    async fn remove_head(&self, volume: VolumeId) -> Result<(), Fatal> {
        self.files.close_head(volume);
        match self.storage.unlink(&head_path(volume)).await {
            Ok(()) if self.broken.breaks(Canary::LeaveRemovalUnsynced) => Ok(()),
            Ok(()) | Err(StorageError::NotFound { .. }) => Ok(self.storage.sync_dir("head").await?),
            Err(error) => Err(error.into()),
        }
    }

    async fn perform(&self, task: Task) -> TaskDone {
        let done = match task {
            Task::CreateHead { volume, size_bytes } => self.create_head(volume, size_bytes).await,
            Task::InspectOrigin { path } => self.inspect_origin(path).await,
            Task::SyncHead { volume, origin } => self.sync_head(volume, &origin).await,
            Task::Measure { heads } => self.measure(&heads).await,
        };
        done.unwrap_or_else(|error| TaskDone::Failed(refusal(&error)))
    }

    async fn create_head(&self, volume: VolumeId, size_bytes: u64) -> Result<TaskDone, StorageError> {
        let path = head_path(volume);
        let file = self.storage.create(&path).await?;
        let made = async {
            self.storage.set_len(&file, size_bytes).await?;
            if !self.broken.breaks(Canary::LeaveHeadUnsynced) {
                self.storage.sync(&file).await?;
            }
            if self.broken.breaks(Canary::LeaveHeadUnnamed) {
                return Ok(());
            }
            self.storage.sync_dir("head").await
        };
        if let Err(error) = made.await {
            // Nobody refers to it; a failure to tidy up leaves an empty file that `csnap check` names.
            let _ = self.storage.unlink(&path).await;
            return too_large(&error, size_bytes).map_or(Err(error), |refusal| Ok(TaskDone::Failed(refusal)));
        }
        Ok(TaskDone::Done)
    }

    async fn sync_head(&self, volume: VolumeId, origin: &Origin) -> Result<TaskDone, StorageError> {
        let file = self.files.head(volume, origin).await?;
        if self.broken.breaks(Canary::SkipHeadSync) {
            return Ok(TaskDone::Done);
        }
        // What could not be opened was not synced, and may be another time; a sync that failed is final.
        let synced = self.storage.sync(&file).await;
        Ok(synced
            .map_or_else(|error| TaskDone::SyncFailed { reason: error.to_string() }, |()| TaskDone::Done))
    }

    async fn inspect_origin(&self, path: String) -> Result<TaskDone, StorageError> {
        let file = self.storage.open_origin(&path).await?;
        let stat = self.storage.stat_file(&file).await?;
        let in_pool = self.is_in_pool(stat.device, stat.inode).await?;
        let (size_bytes, device, inode) = (stat.size_bytes, stat.device, stat.inode);
        Ok(TaskDone::Inspected { path, size_bytes, device, inode, in_pool })
    }

    /// Whether a file is one of the pool's own, by whatever path it was reached.
    async fn is_in_pool(&self, device: u64, inode: u64) -> Result<bool, StorageError> {
        let mut directories = vec!["head".to_owned(), "store".to_owned(), "term".to_owned()];
        while let Some(directory) = directories.pop() {
            for name in self.storage.list(&directory).await? {
                let path = format!("{directory}/{name}");
                let stat = match self.storage.stat(&path).await {
                    Err(StorageError::NotFound { .. }) => continue,
                    stat => stat?,
                };
                if (stat.device, stat.inode) == (device, inode) {
                    return Ok(true);
                }
                if stat.is_dir {
                    directories.push(path);
                }
            }
        }
        Ok(false)
    }

    async fn measure(&self, heads: &[VolumeId]) -> Result<TaskDone, StorageError> {
        let mut heads_bytes = 0;
        for &volume in heads {
            match self.storage.stat(&copy::head_path(volume)).await {
                Ok(stat) => heads_bytes += stat.allocated_bytes,
                Err(StorageError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(TaskDone::Measured { free_bytes: self.storage.free_bytes().await?, heads_bytes })
    }
}

fn bytes_of(extent: StoreExtent) -> u64 {
    u64::from(extent.blocks) * CHUNK_BYTES_MIN
}

/// A head that the file system has no room for in one file, whatever is free.
fn too_large(error: &StorageError, size_bytes: u64) -> Option<Refusal> {
    let is_size = matches!(error, StorageError::Io { errno: EFBIG, .. });
    let reason = format!(
        "the pool's file system takes no file of {size_bytes} bytes; choose a smaller size, or a pool on another file system"
    );
    is_size.then(|| Refusal::new(RefusalKind::Invalid, reason))
}

fn refusal(error: &StorageError) -> Refusal {
    let kind = match error {
        StorageError::NotFound { .. } => RefusalKind::NotFound,
        StorageError::Exists { .. } => RefusalKind::Exists,
        StorageError::NoSpace { .. } => RefusalKind::NoSpace,
        StorageError::Io { .. } => RefusalKind::Media,
    };
    Refusal::new(kind, error.to_string())
}
