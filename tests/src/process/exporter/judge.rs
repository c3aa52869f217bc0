//! What the model is told of the requests of guests, and asked of their answers; and which named states an attachment
//! came through.

use csnap_client::core::{Op, RequestError, RequestKey};
use csnap_proto::Frame;
use csnap_proto::message::operate::RefusalKind;
use csnap_proto::message::volume::{FromServer, ToServer};

use super::{Attachment, Running};
use crate::sim::{POOL, Sim};

impl Attachment {
    pub(super) fn write_begins(&mut self, sim: &mut Sim, key: RequestKey) {
        let running = self.requests.get_mut(&key).expect("writes belong to requests");
        running.writing = true;
        let now = sim.instant();
        let volume = &mut sim.model.volumes[self.what.volume];
        volume.write_begins(now, running.offset, running.len, running.stamp);
    }

    pub(super) fn write_ends(&mut self, sim: &mut Sim, key: RequestKey, done: bool) {
        let running = self.requests.get_mut(&key).expect("writes belong to requests");
        running.writing = false;
        let now = sim.instant();
        let volume = &mut sim.model.volumes[self.what.volume];
        volume.write_ends(now, running.offset, running.len, running.stamp, done);
    }

    pub(super) fn on_success(&mut self, sim: &mut Sim, running: &Running) {
        let now = sim.instant();
        let volume = &mut sim.model.volumes[self.what.volume];
        let verdict = match (running.op, self.what.snapshot) {
            (Op::Read, None) => volume.read(running.asked, now, running.offset, &running.buffer),
            (Op::Read, Some(token)) => volume.read_snapshot(token, running.offset, &running.buffer),
            (Op::Flush, None) => {
                volume.flushed(running.asked);
                Ok(())
            }
            (Op::Write { fua: true } | Op::Trim { fua: true } | Op::WriteZeroes { fua: true, .. }, _) => {
                volume.written_through(running.offset, running.len, running.stamp);
                Ok(())
            }
            _ => Ok(()),
        };
        sim.judge(verdict);
    }

    /// No request fails but for reasons that the world gave.
    pub(super) fn on_failure(&mut self, sim: &mut Sim, running: &Running, error: &RequestError) {
        sim.note(|| format!("{:?} of {} failed: {error}", running.op, self.what.target));
        let excused = match error {
            RequestError::NoSpace => {
                sim.tally.reached("a write was refused for want of space");
                sim.was_full
            }
            RequestError::Media(_) => sim.disks[POOL].faults_struck() > 0,
            RequestError::Refused(refusal) => {
                refusal.kind == RefusalKind::Media && sim.disks[POOL].faults_struck() > 0
            }
            RequestError::Lost(_) => self.may_be_lost(sim),
            RequestError::Released => true,
            RequestError::ReadOnly | RequestError::Invalid(_) => false,
        };
        if !excused {
            sim.violation(format!("{:?} of {} failed: {error}", running.op, self.what.target));
        }
    }

    /// A snapshot that was deleted by force, or a session that was fenced.
    fn may_be_lost(&self, sim: &Sim) -> bool {
        let volume = &sim.model.volumes[self.what.volume];
        self.what.snapshot.is_some_and(|token| volume.snapshots[&token].forced)
    }

    pub(super) fn note_end(&mut self, sim: &mut Sim, error: &RequestError) {
        match error {
            RequestError::Media(_) => sim.tally.reached("a head's sync failed and poisoned its attachment"),
            RequestError::Lost(_) if self.may_be_lost(sim) => {
                sim.tally.reached("a reader's snapshot was deleted by force");
            }
            RequestError::Refused(refusal) if refusal.kind == RefusalKind::Busy => {
                sim.tally.reached("a volume was refused because a lost session holds it");
            }
            _ => {}
        }
    }

    pub(super) fn on_conn_lost(&mut self) {
        self.lost_grant |= self.unanswered.values().any(|name| *name == "QueryWrite");
        self.lost_read |= self.unanswered.values().any(|name| name.ends_with("SnapshotRead"));
        self.unanswered.clear();
    }

    /// The next connection is to a newer server.
    pub(super) fn note_replaced(&mut self, sim: &mut Sim) {
        if std::mem::take(&mut self.lost_grant) {
            sim.tally.reached("a grant was in flight when its server was replaced");
        }
        if std::mem::take(&mut self.lost_read) {
            sim.tally.reached("a snapshot read was under way when its server was replaced");
        }
    }

    pub(super) fn note_request(&mut self, frame: &Frame<ToServer>) {
        if frame.id.0 != 0 {
            self.unanswered.insert(frame.id, frame.message.name());
        }
    }

    pub(super) fn note_answer(&mut self, sim: &mut Sim, frame: &Frame<FromServer>) {
        self.unanswered.remove(&frame.id);
        match &frame.message {
            FromServer::Retry { .. } => sim.tally.reached("a finish met a broken mark"),
            FromServer::IdentifyOk(ok) if ok.advice_follows => {
                sim.tally.reached("a writer identified itself during a drain");
            }
            FromServer::SnapshotAdvice { advice } => {
                if self.advised.is_some_and(|(token, term)| token == *advice && term != frame.term) {
                    sim.tally.reached("a create was drained anew by another server");
                }
                self.advised = Some((*advice, frame.term));
            }
            _ => {}
        }
    }
}
