//! What can be attached by name, and the attachments: `VOL` is a volume's head, `VOL@SNAP` a snapshot; the empty name is
//! the only volume, else `demo`.
//!
//! Names are the server's: it is asked at every opening what a name means now. An attachment stays with the volume or
//! snapshot that it was made of, whatever that is called later.
//!
//! All connections to one volume or snapshot share one attachment, made with the first and given back with the last.
//! Invariant: making and giving back the attachment of one of them never overlap: its `Slot` is locked meanwhile. Nothing
//! of it stays when nobody uses it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use csnap_client::{ClientConfig, Operator, OperatorError, RequestError, Volume};
use csnap_proto::message::local::ClientReport;
use csnap_proto::message::operate::{
    OperatorReply, OperatorRequest, Refusal, RefusalKind, SnapshotInfo, VolumeInfo,
};
use csnap_proto::message::volume::Geometry;
use csnap_proto::{Epoch, Name, Target, Term, VolumeId};
use tokio::sync::Notify;
use tracing::{info, warn};

use super::volume::VolumeExport;
use crate::export::{ExportInfo, Exports, Listed, OpenError};

/// Most names in a list; a client that wants others asks for them by name.
const LISTED_MAX: usize = 10_000;

/// The volume that the empty name means when there are several.
const DEFAULT_NAME: &str = "demo";

/// How often a name is looked up for one opening, if it means something else each time.
const LOOKUPS_MAX: u32 = 4;

/// What a name means at one moment. Never used again for anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Identity {
    volume: VolumeId,
    /// Absent for the head.
    snapshot: Option<Epoch>,
}

impl From<&Geometry> for Identity {
    fn from(geometry: &Geometry) -> Self {
        Self { volume: geometry.volume, snapshot: geometry.snapshot }
    }
}

/// See the module.
pub struct Volumes {
    client: ClientConfig,
    operator: tokio::sync::Mutex<Operator>,
    slots: Mutex<BTreeMap<Identity, Arc<tokio::sync::Mutex<Slot>>>>,
    /// What is attached, for reports; entries come and go with the slots'.
    attached: Mutex<BTreeMap<Identity, Reported>>,
    changed: Notify,
}

struct Reported {
    /// By the name that it was opened by last.
    target: Target,
    export: Arc<VolumeExport>,
    connections: u32,
}

/// The attachment of one volume or snapshot, with the connections that use it.
#[derive(Default)]
struct Slot {
    export: Option<Arc<VolumeExport>>,
    connections: u32,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What it guards is whole between any two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Volumes {
    /// Nothing attached yet. `operator` asks the server what there is.
    pub fn new(client: ClientConfig, operator: Operator) -> Self {
        Self {
            client,
            operator: tokio::sync::Mutex::new(operator),
            slots: Mutex::default(),
            attached: Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// What is attached, for `status`.
    pub fn report(&self) -> Vec<ClientReport> {
        let attached = locked(&self.attached);
        let report = |reported: &Reported| ClientReport {
            target: reported.target.clone(),
            messages: reported.export.volume().messages(),
            connections: reported.connections,
            waiting: reported.export.volume().waiting(),
        };
        ClientReport::first_that_fit(attached.values().map(report))
    }

    /// A server serves under `term`: nobody waits for an older one any more.
    pub fn server_serves(&self, term: Term) {
        for reported in locked(&self.attached).values() {
            reported.export.volume().server_serves(term);
        }
    }

    /// Waits until something was attached or given back, or a connection came or went.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    async fn ask(&self, request: OperatorRequest) -> Result<OperatorReply, OpenError> {
        self.operator.lock().await.request(request).await.map_err(|error| match error {
            OperatorError::Refused(refusal) => refused(&refusal),
            OperatorError::Local(error) => OpenError::Refused(error.to_string()),
        })
    }

    async fn volumes(&self) -> Result<Vec<VolumeInfo>, OpenError> {
        let mut all: Vec<VolumeInfo> = Vec::new();
        loop {
            let after = all.last().map(|last| last.name.clone());
            match self.ask(OperatorRequest::VolumeList { after }).await? {
                OperatorReply::Volumes { rows, more } => {
                    let ended = !more || rows.is_empty();
                    all.extend(rows);
                    if ended {
                        return Ok(all);
                    }
                }
                other => return Err(unexpected(&other)),
            }
        }
    }

    async fn snapshots(&self, rows_max: usize) -> Result<Vec<SnapshotInfo>, OpenError> {
        let mut all: Vec<SnapshotInfo> = Vec::new();
        while all.len() < rows_max {
            let after = all.last().map(|last| (last.target.volume.clone(), last.epoch));
            match self.ask(OperatorRequest::SnapshotList { volume: None, after }).await? {
                OperatorReply::Snapshots { rows, more } => {
                    let ended = !more || rows.is_empty();
                    all.extend(rows);
                    if ended {
                        break;
                    }
                }
                other => return Err(unexpected(&other)),
            }
        }
        all.truncate(rows_max);
        Ok(all)
    }

    /// What an export name means.
    async fn resolve(&self, name: &str) -> Result<Target, OpenError> {
        if !name.is_empty() {
            return name
                .parse()
                .map_err(|error| OpenError::NotFound(format!("{name:?} is no export: {error}")));
        }
        let mut names = self.volumes().await?.into_iter().map(|volume| volume.name);
        let default: Option<Name> = match (names.next(), names.next()) {
            (None, _) => return Err(OpenError::NotFound("there is no volume yet".to_owned())),
            (Some(only), None) => Some(only),
            (Some(first), Some(second)) => [first, second].into_iter().chain(names).find(is_default),
        };
        let volume = default.ok_or_else(|| {
            OpenError::NotFound(format!(
                "there are several volumes, and none is called {DEFAULT_NAME}: name one"
            ))
        })?;
        Ok(Target { volume, snapshot: None })
    }

    /// What the server knows by this name, and its size in bytes.
    async fn look_up(&self, target: &Target) -> Result<(Identity, u64), OpenError> {
        let request = match &target.snapshot {
            None => OperatorRequest::VolumeShow { name: target.volume.clone() },
            Some(_) => OperatorRequest::SnapshotShow { target: target.clone() },
        };
        match self.ask(request).await? {
            OperatorReply::Volume(volume) => {
                Ok((Identity { volume: volume.id, snapshot: None }, volume.size_bytes))
            }
            OperatorReply::Snapshot(snapshot) => {
                let identity = Identity { volume: snapshot.volume, snapshot: Some(snapshot.epoch) };
                Ok((identity, snapshot.size_bytes))
            }
            other => Err(unexpected(&other)),
        }
    }

    /// The slot of a volume or snapshot, made if need be; to be given back with [`Self::leave`].
    fn enter(&self, identity: Identity) -> Arc<tokio::sync::Mutex<Slot>> {
        Arc::clone(locked(&self.slots).entry(identity).or_default())
    }

    /// Forgets a slot that nobody uses. `slot` is the caller's.
    fn leave(&self, identity: Identity, slot: Arc<tokio::sync::Mutex<Slot>>) {
        let mut slots = locked(&self.slots);
        let unused = slot.try_lock().is_ok_and(|slot| slot.export.is_none());
        // The map's and the caller's: whoever else enters has to get past the map's lock.
        if unused && Arc::strong_count(&slot) == 2 {
            slots.remove(&identity);
        }
        // Before the map is unlocked: of two that leave at once, the second must see that it is the last.
        drop(slot);
    }

    /// The slot's attachment, made under this name if need be; none if the name means something else by now.
    async fn attach(
        &self,
        identity: Identity,
        target: &Target,
        slot: &tokio::sync::Mutex<Slot>,
    ) -> Result<Option<Arc<VolumeExport>>, OpenError> {
        let mut slot = slot.lock().await;
        let export = match &slot.export {
            Some(export) => Arc::clone(export),
            None => {
                let volume =
                    Volume::open(self.client.clone(), target.clone()).await.map_err(|error| match error {
                        RequestError::Refused(refusal) => refused(&refusal),
                        error => OpenError::Refused(error.to_string()),
                    })?;
                if Identity::from(volume.geometry()) != identity {
                    let _ = volume.release().await; // Nothing was written through it.
                    return Ok(None);
                }
                info!(%target, "attached");
                Arc::new(VolumeExport::new(volume))
            }
        };
        slot.export = Some(Arc::clone(&export));
        slot.connections += 1;
        let reported =
            Reported { target: target.clone(), export: Arc::clone(&export), connections: slot.connections };
        locked(&self.attached).insert(identity, reported);
        Ok(Some(export))
    }

    async fn detach(&self, identity: Identity, slot: &tokio::sync::Mutex<Slot>) {
        let mut slot = slot.lock().await;
        slot.connections -= 1;
        if let Some(reported) = locked(&self.attached).get_mut(&identity) {
            reported.connections = slot.connections;
        }
        if slot.connections > 0 {
            return;
        }
        if let Some(export) = slot.export.take() {
            let target = export.volume().target();
            match export.volume().release().await {
                Ok(()) => info!(%target, "given back"),
                Err(error) => warn!(%target, "given back, but what was not flushed may be lost: {error}"),
            }
        }
        locked(&self.attached).remove(&identity);
    }
}

impl Exports for Volumes {
    type Export = VolumeExport;

    async fn list(&self) -> Result<Vec<Listed>, OpenError> {
        let volumes = self.volumes().await?;
        let mut targets: Vec<Target> =
            volumes.into_iter().map(|volume| Target { volume: volume.name, snapshot: None }).collect();
        targets.truncate(LISTED_MAX);
        let snapshots = self.snapshots(LISTED_MAX - targets.len()).await?;
        targets.extend(snapshots.into_iter().map(|snapshot| snapshot.target));
        targets.sort();
        let listed = |target: &Target| Listed { name: target.to_string(), description: description(target) };
        Ok(targets.iter().map(listed).collect())
    }

    async fn info(&self, name: &str) -> Result<ExportInfo, OpenError> {
        let target = self.resolve(name).await?;
        let (_, size_bytes) = self.look_up(&target).await?;
        Ok(describe(&target, size_bytes))
    }

    async fn open(&self, name: &str) -> Result<(ExportInfo, Arc<VolumeExport>), OpenError> {
        for _ in 0..LOOKUPS_MAX {
            let target = self.resolve(name).await?;
            let (identity, _) = self.look_up(&target).await?;
            let entered = Entered::new(self, identity);
            let attached = self.attach(identity, &target, entered.slot()).await?;
            drop(entered);
            if let Some(export) = attached {
                self.changed.notify_one();
                return Ok((describe(&target, export.volume().geometry().size_bytes), export));
            }
        }
        Err(OpenError::Busy(format!("{name} means something else again and again; try again")))
    }

    async fn release(&self, export: Arc<VolumeExport>) {
        let identity = Identity::from(export.volume().geometry());
        drop(export);
        let entered = Entered::new(self, identity);
        self.detach(identity, entered.slot()).await;
        drop(entered);
        self.changed.notify_one();
    }
}

/// Leaves a slot also when the future that entered it is dropped halfway.
struct Entered<'a> {
    volumes: &'a Volumes,
    identity: Identity,
    slot: Option<Arc<tokio::sync::Mutex<Slot>>>,
}

impl<'a> Entered<'a> {
    fn new(volumes: &'a Volumes, identity: Identity) -> Self {
        Self { volumes, identity, slot: Some(volumes.enter(identity)) }
    }

    fn slot(&self) -> &tokio::sync::Mutex<Slot> {
        self.slot.as_ref().expect("taken when it is dropped")
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            self.volumes.leave(self.identity, slot);
        }
    }
}

fn is_default(name: &Name) -> bool {
    name.as_str() == DEFAULT_NAME
}

fn description(target: &Target) -> String {
    if target.snapshot.is_some() { format!("snapshot of {}", target.volume) } else { "volume".to_owned() }
}

fn describe(target: &Target, size_bytes: u64) -> ExportInfo {
    ExportInfo {
        name: target.to_string(),
        description: description(target),
        size_bytes,
        read_only: target.snapshot.is_some(),
        block_preferred: 4096,
        // All connections share one attachment, and its flush covers whatever was written through it.
        multi_conn: true,
        fast_zero: false,
    }
}

fn refused(refusal: &Refusal) -> OpenError {
    match refusal.kind {
        RefusalKind::NotFound => OpenError::NotFound(refusal.reason.clone()),
        RefusalKind::Busy => OpenError::Busy(refusal.reason.clone()),
        _ => OpenError::Refused(refusal.reason.clone()),
    }
}

fn unexpected(reply: &OperatorReply) -> OpenError {
    OpenError::Refused(format!("the server answered something else: {reply:?}"))
}
