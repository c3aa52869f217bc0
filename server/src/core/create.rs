//! Making a snapshot: stop the volume's writer, have it drain, record, let it go on.
//!
//! A snapshot equals its volume at one instant between the create call and its OK. The instant is the drained writer:
//! it has stopped issuing, everything that it issued is durable, and it holds nothing as writable. The record follows
//! in the same step as its answer, so no write can come between. Without a writing session the server itself makes the
//! head durable first. A writer that (re)appears meanwhile is advised anew, whatever it answered before: only a drain
//! that this server asked for, on the connection that is open now, counts.
//!
//! A writer that is absent, or does not drain in time, fails the create, not the client: it is named, and resumed.
//!
//! Invariants: one create a volume at a time, others queue; a create that is resent (same token) joins the one in hand
//! or finds the snapshot made; `Resume` goes out after the record is durable, or when there will be none.

use std::collections::VecDeque;

use csnap_proto::message::operate::{OperatorReply, Refusal, RefusalKind};
use csnap_proto::message::volume::FromServer;
use csnap_proto::{Name, RequestId, RequestToken, Target, Time, VolumeId};

use super::canary::Canary;
use super::operate::{Purpose, RequestKey};
use super::timing::{CreateClock, Timing};
use super::{ByVolume, ConnId, ServerCore, Task, TaskDone};
use crate::state::Record;

/// Creates in hand, by volume; the first of each queue is the active one.
#[derive(Debug, Default)]
pub(super) struct Creates {
    queues: ByVolume<VecDeque<Create>>,
    /// Tells one Advice from another of the same create: an answer counts for the one that it names.
    last_advice: u64,
    /// A sync of these heads failed, and how: nothing is known of what was written to them since the last good one, and a
    /// second sync would not tell. A writer that drains vouches for its own.
    failed_syncs: ByVolume<String>,
    /// How long they took.
    pub(super) timing: Timing,
}

#[derive(Debug)]
struct Create {
    token: RequestToken,
    name: Name,
    requester: RequestKey,
    phase: Phase,
    clock: CreateClock,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Behind another create of the same volume.
    Queued,
    /// The writer is to drain by then; `asked` is the connection that carries the Advice, and the Advice, if it is there.
    Draining { by: Time, asked: Option<(ConnId, RequestId)> },
    /// No writer: the head is being synced.
    Syncing,
}

impl Creates {
    pub(super) fn next_deadline(&self) -> Option<Time> {
        let active = self.queues.values().filter_map(|queue| queue.front());
        let deadline = |c: &Create| if let Phase::Draining { by, .. } = c.phase { Some(by) } else { None };
        active.filter_map(deadline).min()
    }

    fn active(&mut self, volume: VolumeId) -> Option<&mut Create> {
        self.queues.get_mut(&volume)?.front_mut()
    }

    /// Whether a writer of `volume` that identifies itself now must wait for an Advice.
    pub(super) fn is_active(&self, volume: VolumeId) -> bool {
        self.queues.contains_key(&volume)
    }
}

impl ServerCore {
    pub(super) fn on_snapshot_create(&mut self, requester: RequestKey, target: &Target, token: RequestToken) {
        let Some((volume, importing)) =
            self.state.volume_by_name(&target.volume).map(|v| (v.id, v.importer.is_some()))
        else {
            return self.answer(requester, Err(self.no_volume(&target.volume)));
        };
        if importing {
            let refusal = Refusal::new(RefusalKind::Busy, format!("{} is being imported", target.volume));
            return self.answer(requester, Err(refusal));
        }
        let Some(name) = target.snapshot.clone() else {
            let refusal = Refusal::new(RefusalKind::Invalid, "a snapshot is named VOLUME@SNAPSHOT");
            return self.answer(requester, Err(refusal));
        };
        if let Some(snapshot) = self.state.snapshot_by_name(volume, &name) {
            let result = if snapshot.token == token {
                let epoch = snapshot.epoch;
                Ok(OperatorReply::Snapshot(self.snapshot_info(volume, epoch)))
            } else {
                let reason = format!("{target} exists; choose another name, or delete it first");
                Err(Refusal::new(RefusalKind::Exists, reason))
            };
            return self.answer(requester, result);
        }
        let queue = self.creates.queues.entry(volume).or_default();
        if queue.iter().any(|create| create.token == token) {
            let refusal = Refusal::new(RefusalKind::Busy, format!("{target} is being created already"));
            return self.answer(requester, Err(refusal));
        }
        let clock = CreateClock::start(self.now);
        queue.push_back(Create { token, name, requester, phase: Phase::Queued, clock });
        if queue.len() == 1 {
            self.begin_create(volume);
        }
    }

    /// The first create in the queue becomes active.
    fn begin_create(&mut self, volume: VolumeId) {
        let writer = self.state.writer_of(volume).map(|session| session.id);
        let conn = writer.and_then(|session| self.connections.of_session(session));
        let by = self.now.after(self.config.drain_patience);
        let Some(token) = self.creates.active(volume).map(|create| create.token) else { return };
        if self.config.broken.breaks(Canary::SkipDrain) {
            return self.record_snapshot(volume, conn);
        }
        let phase = match writer {
            // An absent writer is advised when it comes back, and named when it does not.
            Some(_) => Phase::Draining { by, asked: conn.map(|conn| (conn, self.advise(conn, token))) },
            None => {
                let Some(origin) = self.state.volume(volume).map(|v| v.origin.clone()) else {
                    return self
                        .fail_create(volume, Refusal::new(RefusalKind::NotFound, "the volume is gone"));
                };
                if let Some(reason) = self.creates.failed_syncs.get(&volume) {
                    return self.fail_create(volume, failed_sync(reason));
                }
                self.start_task(Purpose::SyncForCreate { volume, token }, Task::SyncHead { volume, origin });
                Phase::Syncing
            }
        };
        let now = self.now;
        if let Some(create) = self.creates.active(volume) {
            create.phase = phase;
            match phase {
                Phase::Draining { .. } => create.clock.advise(now),
                Phase::Syncing | Phase::Queued => create.clock.writer_left(),
            }
        }
    }

    /// Asks a writer to drain; the id of the asking, which the answer carries.
    fn advise(&mut self, conn: ConnId, advice: RequestToken) -> RequestId {
        self.creates.last_advice += 1;
        let id = RequestId(self.creates.last_advice);
        self.send(conn, id, FromServer::SnapshotAdvice { advice });
        id
    }

    /// A writer identified itself while a create is active: it is asked to drain anew, whoever was asked before.
    pub(super) fn advise_newcomer(&mut self, volume: VolumeId, conn: ConnId) {
        let Some((token, phase)) = self.creates.active(volume).map(|create| (create.token, create.phase))
        else {
            return;
        };
        if self.config.broken.breaks(Canary::NotDrainedAnew) {
            return self.record_snapshot(volume, Some(conn));
        }
        let patience = self.now.after(self.config.drain_patience);
        let by = if let Phase::Draining { by, .. } = phase { by } else { patience };
        let asked = Some((conn, self.advise(conn, token)));
        let now = self.now;
        if let Some(create) = self.creates.active(volume) {
            create.phase = Phase::Draining { by, asked };
            create.clock.advise(now);
        }
    }

    pub(super) fn on_advice_ok(&mut self, conn: ConnId, id: RequestId, advice: RequestToken) {
        let Some(volume) = self.writes_to(conn) else { return };
        let Some(create) = self.creates.active(volume) else { return };
        let counts =
            matches!(create.phase, Phase::Draining { asked: Some(asked), .. } if asked == (conn, id));
        if create.token == advice && counts {
            self.record_snapshot(volume, Some(conn));
        }
    }

    pub(super) fn on_synced_for_create(&mut self, volume: VolumeId, token: RequestToken, done: TaskDone) {
        if let TaskDone::SyncFailed { reason } = &done {
            // Said once, whoever asked: the next sync would succeed over what was lost.
            self.creates.failed_syncs.insert(volume, reason.clone());
        }
        let Some(create) = self.creates.active(volume) else { return };
        if create.token != token || !matches!(create.phase, Phase::Syncing) {
            return; // A writer came meanwhile; its drain decides.
        }
        match done {
            TaskDone::SyncFailed { reason } => self.fail_create(volume, failed_sync(&reason)),
            TaskDone::Failed(refusal) => {
                let reason = format!(
                    "the server on {} cannot open the volume's head: {}; see to that, or move the server",
                    self.config.node, refusal.reason
                );
                self.fail_create(volume, Refusal::new(refusal.kind, reason));
            }
            _ => self.record_snapshot(volume, None),
        }
    }

    /// The volume is at rest and durable: this is the instant.
    fn record_snapshot(&mut self, volume: VolumeId, drained: Option<ConnId>) {
        let Some(create) = self.pop_active(volume) else { return };
        if drained.is_some() {
            self.creates.failed_syncs.remove(&volume);
        }
        let Some((epoch, size_bytes)) = self.state.volume(volume).map(|v| (v.epoch, v.size_bytes)) else {
            let refusal = Refusal::new(RefusalKind::NotFound, "the volume is gone");
            self.answer(create.requester, Err(refusal));
            return self.begin_create(volume);
        };
        if self.state.snapshot_by_name(volume, &create.name).is_some() {
            // Another create of this name was ahead in the queue.
            let refusal =
                Refusal::new(RefusalKind::Exists, format!("a snapshot {} exists by now", create.name));
            self.resume(volume, drained, create.token);
            self.answer(create.requester, Err(refusal));
        } else {
            self.record(Record::SnapshotCreate {
                volume,
                epoch,
                name: create.name,
                size_bytes,
                created: self.wall,
                token: create.token,
            });
            self.resume(volume, drained, create.token);
            let info = self.snapshot_info(volume, epoch);
            self.answer(create.requester, Ok(OperatorReply::Snapshot(info)));
            self.creates.timing.record(create.clock, self.now, self.pipeline.mark());
        }
        self.begin_create(volume);
    }

    fn fail_create(&mut self, volume: VolumeId, refusal: Refusal) {
        let Some(create) = self.pop_active(volume) else { return };
        if let Phase::Draining { asked, .. } = create.phase {
            self.resume(volume, asked.map(|(conn, _)| conn), create.token);
        }
        self.answer(create.requester, Err(refusal));
        self.begin_create(volume);
    }

    /// Creates that the writer did not let happen.
    pub(super) fn expire_creates(&mut self) {
        let late = |(&volume, queue): (&VolumeId, &VecDeque<Create>)| match queue.front()?.phase {
            Phase::Draining { by, .. } if by <= self.now => Some(volume),
            _ => None,
        };
        let late: Vec<VolumeId> = self.creates.queues.iter().filter_map(late).collect();
        for volume in late {
            let holder =
                self.state.writer_of(volume).map(|s| (s.id, format!("node {} (pid {})", s.node, s.pid)));
            let reason = match holder {
                Some((session, who)) if self.connections.of_session(session).is_some() => {
                    format!(
                        "the writer on {who} did not drain in time; try again, or look at that node's disk"
                    )
                }
                Some((_, who)) => format!(
                    "the writer on {who} is not reachable; its volume can be snapshotted when it is back, reaped or fenced"
                ),
                None => "the writer left while it was asked to drain; try again".to_owned(),
            };
            self.fail_create(volume, Refusal::new(RefusalKind::TimedOut, reason));
        }
    }

    /// The volume's writing session ended: the active create goes on without it.
    pub(super) fn writer_left(&mut self, volume: VolumeId) {
        let waits = self.creates.active(volume).is_some_and(|c| matches!(c.phase, Phase::Draining { .. }));
        if waits {
            self.begin_create(volume);
        }
    }

    fn pop_active(&mut self, volume: VolumeId) -> Option<Create> {
        let queue = self.creates.queues.get_mut(&volume)?;
        let create = queue.pop_front();
        if queue.is_empty() {
            self.creates.queues.remove(&volume);
        }
        create
    }

    fn resume(&mut self, volume: VolumeId, conn: Option<ConnId>, advice: RequestToken) {
        let Some(epoch) = self.state.volume(volume).map(|v| v.epoch) else { return };
        let all_unique = self.state.youngest_live_snapshot(volume).is_none();
        if let Some(conn) = conn {
            self.send(conn, RequestId(0), FromServer::Resume { advice, epoch, all_unique });
        }
    }
}

fn failed_sync(reason: &str) -> Refusal {
    let reason = format!(
        "a sync of the volume's head failed ({reason}): look at its disk, attach the volume and write it anew"
    );
    Refusal::new(RefusalKind::Media, reason)
}
