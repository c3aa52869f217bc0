//! Operators' requests: what changes volumes and snapshots, answered once and replayed to whoever asks again.
//!
//! A mutating request is known by (session, sequence). Its result is recorded in the same batch as its change, so a
//! resend, also to another server, finds either both or neither. A resend of a request that is still in hand only
//! redirects its answer.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use csnap_proto::frame::BODY_BYTES_MAX;
use csnap_proto::limits::VOLUME_BYTES_MAX;
use csnap_proto::message::operate::{OperatorReply, OperatorRequest, Refusal, RefusalKind, Source};
use csnap_proto::message::volume::FromServer;
use csnap_proto::{ChunkSize, Name, RequestId, RequestToken, Sequence, SessionId, Target, VolumeId};

use super::canary::Canary;
use super::{ConnId, Out, Output, ServerCore, Task, TaskDone, TaskId};
use crate::state::{Attached, Origin, Record, Session};

/// Largest reply, bytes: what a frame holds, less the message around it.
pub(super) const REPLY_BYTES_MAX: usize = BODY_BYTES_MAX - 64;

/// File operations that are under way at once: each has a file open, and sessions may ask for many.
pub const TASKS_AT_ONCE: usize = 16;

/// Identity of an operator's request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RequestKey {
    pub(super) session: SessionId,
    pub(super) sequence: Sequence,
}

/// Where an answer goes; the last place that asked.
#[derive(Clone, Copy, Debug)]
struct Route {
    conn: ConnId,
    id: RequestId,
    mutating: bool,
    lowest_unanswered: Sequence,
}

/// What a task is for.
#[derive(Debug)]
pub(super) enum Purpose {
    SyncForCreate { volume: VolumeId, token: RequestToken },
    CreateVolume { key: RequestKey, volume: NewVolume },
    AdoptVolume { key: RequestKey, volume: NewVolume },
    Status { key: RequestKey },
}

#[derive(Debug)]
pub(super) struct NewVolume {
    id: VolumeId,
    name: Name,
    size_bytes: u64,
    chunk: ChunkSize,
    importer: Option<SessionId>,
}

/// Requests in hand and the file operations that they wait for.
#[derive(Debug, Default)]
pub(super) struct Operations {
    in_hand: BTreeMap<RequestKey, Route>,
    /// Asked for, under way or not.
    tasks: BTreeMap<TaskId, Purpose>,
    to_start: VecDeque<(TaskId, Task)>,
    last_task: u64,
    /// Volumes that this term made; ids carry the term, so this starts at 0.
    volumes_made: u32,
    /// Names that a create in hand will take.
    names: BTreeSet<Name>,
}

impl Operations {
    pub(super) fn is_idle(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Requests of a session whose results are yet to be stored.
    fn mutating_in_hand(&self, session: SessionId) -> usize {
        let of_session = RequestKey { session, sequence: Sequence(0) }..=RequestKey {
            session,
            sequence: Sequence(u64::MAX),
        };
        self.in_hand.range(of_session).filter(|(_, route)| route.mutating).count()
    }
}

impl ServerCore {
    pub(super) fn on_operate(
        &mut self,
        conn: ConnId,
        id: RequestId,
        sequence: Sequence,
        lowest_unanswered: Sequence,
        request: OperatorRequest,
        out: Out,
    ) {
        let Some(peer) = self.connections.peer(conn).cloned() else { return };
        if peer.attached != Attached::Operator {
            return self.refuse(conn, id, RefusalKind::Invalid, "only an operator's session may ask this");
        }
        let key = RequestKey { session: peer.session, sequence };
        let mutating = request.is_mutating();
        let route = Route { conn, id, mutating, lowest_unanswered };
        let again = self.config.broken.breaks(Canary::ApplyTwice);
        if let Some(stored) = self.state.result(key.session, sequence).cloned().filter(|_| !again) {
            return self.reply(route, stored);
        }
        if self.operations.in_hand.insert(key, route).is_some() && !again {
            return; // Still in hand; the answer goes to this route now.
        }
        if mutating {
            self.open_operator_session(&peer);
            let in_hand = self.operations.mutating_in_hand(key.session);
            let full = |session: &Session| !session.can_store(in_hand, lowest_unanswered);
            if self.state.session(key.session).is_some_and(full) {
                self.operations.in_hand.remove(&key);
                return self.refuse(
                    conn,
                    id,
                    RefusalKind::Invalid,
                    "too many unacknowledged results in this session",
                );
            }
        }
        self.dispatch(key, request);
        self.start_tasks(out);
    }

    fn dispatch(&mut self, key: RequestKey, request: OperatorRequest) {
        use OperatorRequest as R;
        let result = match request {
            R::VolumeCreate { name, size_bytes, chunk, source } => {
                return self.create_volume(key, name, size_bytes, chunk, source);
            }
            R::SnapshotCreate { target, token } => return self.on_snapshot_create(key, &target, token),
            R::Status => {
                let heads = self.state.volumes().filter(|v| v.origin == Origin::Pool).map(|v| v.id).collect();
                return self.start_task(Purpose::Status { key }, Task::Measure { heads });
            }
            R::VolumePublish { name } => self.publish_volume(&name),
            R::VolumeList { after } => Ok(self.list_volumes(after.as_ref())),
            R::VolumeShow { name } => {
                self.volume_id(&name).map(|id| OperatorReply::Volume(self.volume_info(id)))
            }
            R::VolumeRename { from, to } => self.rename_volume(&from, to),
            R::VolumeDelete { name } => self.delete_volume(&name),
            R::SnapshotList { volume, after } => self.list_snapshots(volume, after),
            R::SnapshotShow { target } => {
                self.snapshot_id(&target).map(|(v, e)| OperatorReply::Snapshot(self.snapshot_info(v, e)))
            }
            R::SnapshotRename { target, to } => self.rename_snapshot(&target, to),
            R::SnapshotDelete { target, force } => self.delete_snapshot(&target, force),
            R::Reaped { instance, looked_at } => self.on_reaped(instance, looked_at),
            R::ServerReaped { term } => self.on_server_reaped(term),
            R::Fence { whom } => self.fence(&whom),
        };
        self.answer(key, result);
    }

    /// Records the result of a mutating request and sends it to whoever asked last.
    pub(super) fn answer(&mut self, key: RequestKey, result: Result<OperatorReply, Refusal>) {
        let Some(route) = self.operations.in_hand.remove(&key) else { return };
        // A peer that moves its lowest unanswered position back and forth gets answers, but nothing stored.
        let can_store = |session: &Session| session.can_store(1, route.lowest_unanswered);
        if route.mutating && self.state.session(key.session).is_some_and(can_store) {
            self.record(Record::Result {
                session: key.session,
                sequence: key.sequence,
                lowest_unanswered: route.lowest_unanswered,
                result: result.clone(),
            });
        }
        self.reply(route, result);
    }

    fn reply(&mut self, route: Route, result: Result<OperatorReply, Refusal>) {
        let message = match result {
            Ok(reply) if postcard::to_stdvec(&reply).map_or(true, |bytes| bytes.len() >= REPLY_BYTES_MAX) => {
                let reason = "the answer does not fit a message: ask for one volume at a time";
                FromServer::Refused(Refusal::new(RefusalKind::Invalid, reason))
            }
            Ok(reply) => FromServer::Operated(reply),
            Err(refusal) => FromServer::Refused(refusal),
        };
        self.send(route.conn, route.id, message);
    }

    pub(super) fn start_task(&mut self, purpose: Purpose, what: Task) {
        self.operations.last_task += 1;
        let task = TaskId(self.operations.last_task);
        self.operations.tasks.insert(task, purpose);
        self.operations.to_start.push_back((task, what));
    }

    /// File operations are not effects of a batch: nothing refers to what they touch. What is beyond [`TASKS_AT_ONCE`]
    /// is started when others end.
    pub(super) fn start_tasks(&mut self, out: Out) {
        let Operations { tasks, to_start, .. } = &mut self.operations;
        let under_way = tasks.len() - to_start.len();
        let free = TASKS_AT_ONCE.saturating_sub(under_way).min(to_start.len());
        out.extend(to_start.drain(..free).map(|(task, what)| Output::Start { task, what }));
    }

    pub(super) fn on_task_ended(&mut self, task: TaskId, done: TaskDone, out: Out) {
        match self.operations.tasks.remove(&task) {
            None => {}
            Some(Purpose::SyncForCreate { volume, token }) => self.on_synced_for_create(volume, token, done),
            Some(Purpose::Status { key }) => self.answer_status(key, done),
            Some(Purpose::CreateVolume { key, volume }) => {
                let result = match done {
                    TaskDone::Failed(refusal) => Err(refusal),
                    _ => Ok(Origin::Pool),
                };
                self.finish_create(key, volume, result);
            }
            Some(Purpose::AdoptVolume { key, mut volume }) => {
                let result = self.adopt(&mut volume, done);
                self.finish_create(key, volume, result);
            }
        }
        self.start_tasks(out);
    }

    fn create_volume(
        &mut self,
        key: RequestKey,
        name: Name,
        size_bytes: u64,
        chunk: ChunkSize,
        source: Source,
    ) {
        let adopts = matches!(source, Source::Adopt { .. });
        if self.state.volume_by_name(&name).is_some() || self.operations.names.contains(&name) {
            let reason = format!("volume {name} exists; choose another name, or delete it first");
            return self.answer(key, Err(Refusal::new(RefusalKind::Exists, reason)));
        }
        if size_bytes > VOLUME_BYTES_MAX || (size_bytes == 0 && !adopts) {
            let reason = format!("a volume has between 1 and {VOLUME_BYTES_MAX} bytes, not {size_bytes}");
            return self.answer(key, Err(Refusal::new(RefusalKind::Invalid, reason)));
        }
        let Some(id) = VolumeId::new(self.term, self.operations.volumes_made) else {
            return self.answer(key, Err(Refusal::new(RefusalKind::Invalid, "this pool ran out of terms")));
        };
        self.operations.volumes_made += 1;
        self.operations.names.insert(name.clone());
        let importer = matches!(source, Source::Import).then_some(key.session);
        let volume = NewVolume { id, name, size_bytes, chunk, importer };
        match source {
            Source::Adopt { path } => {
                self.start_task(Purpose::AdoptVolume { key, volume }, Task::InspectOrigin { path });
            }
            Source::Empty | Source::Import => {
                self.start_task(
                    Purpose::CreateVolume { key, volume },
                    Task::CreateHead { volume: id, size_bytes },
                );
            }
        }
    }

    /// Checks an origin that was looked at: nobody else's, not the pool's, large enough.
    fn adopt(&self, volume: &mut NewVolume, done: TaskDone) -> Result<Origin, Refusal> {
        let (path, size_bytes, device, inode, in_pool) = match done {
            TaskDone::Inspected { path, size_bytes, device, inode, in_pool } => {
                (path, size_bytes, device, inode, in_pool)
            }
            TaskDone::Failed(refusal) => return Err(refusal),
            _ => return Err(Refusal::new(RefusalKind::Media, "the origin could not be inspected")),
        };
        let same = |o: &Origin| matches!(o, Origin::Adopted { device: d, inode: i, .. } if (*d, *i) == (device, inode));
        if let Some(user) = self.state.volumes().find(|v| same(&v.origin)) {
            let reason = format!("{path} is the origin of volume {} already", user.name);
            return Err(Refusal::new(RefusalKind::Busy, reason));
        }
        if in_pool {
            return Err(Refusal::new(
                RefusalKind::Invalid,
                format!("{path} lies in the pool; give a path outside"),
            ));
        }
        if volume.size_bytes == 0 {
            volume.size_bytes = size_bytes;
        }
        if volume.size_bytes != size_bytes || size_bytes == 0 || size_bytes > VOLUME_BYTES_MAX {
            let reason =
                format!("{path} has {size_bytes} bytes, not {}; leave --size out", volume.size_bytes);
            return Err(Refusal::new(RefusalKind::Invalid, reason));
        }
        Ok(Origin::Adopted { path, device, inode })
    }

    fn finish_create(&mut self, key: RequestKey, volume: NewVolume, origin: Result<Origin, Refusal>) {
        self.operations.names.remove(&volume.name);
        let importer_left = volume.importer.is_some_and(|session| self.state.session(session).is_none());
        let origin = match origin {
            Ok(_) if importer_left => {
                self.pipeline.then(Output::RemoveHead { volume: volume.id });
                let reason = format!("who imports {} is gone", volume.name);
                return self.answer(key, Err(Refusal::new(RefusalKind::Denied, reason)));
            }
            Ok(origin) => origin,
            Err(refusal) => return self.answer(key, Err(refusal)),
        };
        self.record(Record::VolumeCreate {
            id: volume.id,
            name: volume.name,
            size_bytes: volume.size_bytes,
            chunk: volume.chunk,
            origin,
            created: self.wall,
            importer: volume.importer,
        });
        let info = self.volume_info(volume.id);
        self.answer(key, Ok(OperatorReply::Volume(info)));
    }

    fn publish_volume(&mut self, name: &Name) -> Result<OperatorReply, Refusal> {
        let volume = self.volume_id(name)?;
        if self.state.volume(volume).is_none_or(|v| v.importer.is_none()) {
            return Err(Refusal::new(RefusalKind::Invalid, format!("{name} is not being imported")));
        }
        self.record(Record::VolumePublish { volume });
        Ok(OperatorReply::Done)
    }

    fn rename_volume(&mut self, from: &Name, to: Name) -> Result<OperatorReply, Refusal> {
        let volume = self.volume_id(from)?;
        if self.state.volume_by_name(&to).is_some() || self.operations.names.contains(&to) {
            return Err(Refusal::new(
                RefusalKind::Exists,
                format!("volume {to} exists; choose another name"),
            ));
        }
        self.record(Record::VolumeRename { volume, name: to });
        Ok(OperatorReply::Done)
    }

    fn delete_volume(&mut self, name: &Name) -> Result<OperatorReply, Refusal> {
        let volume = self.volume_id(name)?;
        if let Some(holder) = self.state.writer_of(volume) {
            let reason =
                format!("{name} is attached on node {} (pid {}); detach it first", holder.node, holder.pid);
            return Err(Refusal::new(RefusalKind::Busy, reason));
        }
        let snapshots = self.state.snapshot_count(volume);
        if snapshots > 0 || self.creates.is_active(volume) {
            let reason = format!("{name} has {snapshots} snapshots; delete them first");
            return Err(Refusal::new(RefusalKind::Busy, reason));
        }
        self.record(Record::VolumeDelete { volume });
        Ok(OperatorReply::Done)
    }

    fn rename_snapshot(&mut self, target: &Target, to: Name) -> Result<OperatorReply, Refusal> {
        let (volume, epoch) = self.snapshot_id(target)?;
        if self.state.snapshot_by_name(volume, &to).is_some() {
            let reason = format!("{}@{to} exists; choose another name", target.volume);
            return Err(Refusal::new(RefusalKind::Exists, reason));
        }
        self.record(Record::SnapshotRename { volume, epoch, name: to });
        Ok(OperatorReply::Done)
    }

    /// Acknowledged as soon as its record is durable; what only it held is reaped in the background.
    fn delete_snapshot(&mut self, target: &Target, force: bool) -> Result<OperatorReply, Refusal> {
        let (volume, epoch) = self.snapshot_id(target)?;
        let readers: Vec<String> = self
            .state
            .readers_of(volume, epoch)
            .map(|s| format!("node {} (pid {})", s.node, s.pid))
            .collect();
        if !readers.is_empty() && !force {
            let reason = format!("{target} is read on {}; detach it, or use --force", readers.join(", "));
            return Err(Refusal::new(RefusalKind::Busy, reason));
        }
        self.break_all_marks(volume);
        self.grants.void_jobs(volume);
        self.record(Record::SnapshotDelete { volume, epoch });
        let gone = Attached::Snapshot(volume, epoch);
        let conns: Vec<ConnId> = self
            .connections
            .readers()
            .filter(|&(_, attached)| attached == gone)
            .map(|(conn, _)| conn)
            .collect();
        for conn in conns {
            self.send(conn, RequestId(0), FromServer::SnapshotGone);
        }
        Ok(OperatorReply::Done)
    }

    pub(super) fn volume_id(&self, name: &Name) -> Result<VolumeId, Refusal> {
        self.state.volume_by_name(name).map(|v| v.id).ok_or_else(|| self.no_volume(name))
    }

    pub(super) fn snapshot_id(&self, target: &Target) -> Result<(VolumeId, csnap_proto::Epoch), Refusal> {
        let volume = self.volume_id(&target.volume)?;
        let Some(name) = &target.snapshot else {
            return Err(Refusal::new(RefusalKind::Invalid, "a snapshot is named VOLUME@SNAPSHOT"));
        };
        let missing = || {
            Refusal::new(RefusalKind::NotFound, format!("{target} does not exist; see csnap snapshot list"))
        };
        self.state.snapshot_by_name(volume, name).map(|s| (volume, s.epoch)).ok_or_else(missing)
    }

    #[allow(clippy::unused_self)]
    pub(super) fn no_volume(&self, name: &Name) -> Refusal {
        Refusal::new(RefusalKind::NotFound, format!("volume {name} does not exist; see csnap volume list"))
    }
}
