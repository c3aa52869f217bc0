//! Client sessions as the journal knows them: what each has attached, what it confirmed, what it was answered.
//!
//! Whether a session is connected is not known here: that is volatile, and the core's.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use csnap_proto::ids::{Epoch, FreeBatchId, InstanceId, Name, Secret, Sequence, SessionId, VolumeId};
use csnap_proto::limits::RESULTS_PER_SESSION_MAX;
use csnap_proto::message::operate::{OperatorReply, Refusal};
use csnap_proto::units::WallMillis;

use super::Corrupt;
use super::record::Attached;

/// A stored answer.
pub type StoredResult = Result<OperatorReply, Refusal>;

/// A client session.
#[derive(Clone, Debug, PartialEq)]
pub struct Session {
    /// Identity.
    pub id: SessionId,
    /// Proof of ownership.
    pub secret: Secret,
    /// Run of the process.
    pub instance: InstanceId,
    /// Node of the process, for people.
    pub node: Name,
    /// Process on that node, for people.
    pub pid: u32,
    /// What it has open.
    pub attached: Attached,
    /// For people.
    pub opened: WallMillis,
    /// Highest batch of frees that it confirmed; 0 for none.
    pub confirmed: FreeBatchId,
    pub(super) results: BTreeMap<Sequence, StoredResult>,
}

impl Session {
    /// Whether answering so many requests with this lowest unanswered position keeps the limit of stored results.
    #[must_use]
    pub fn can_store(&self, answers: usize, lowest_unanswered: Sequence) -> bool {
        self.results.range(lowest_unanswered..).count() + answers <= RESULTS_PER_SESSION_MAX
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Sessions {
    all: BTreeMap<SessionId, Arc<Session>>,
    writers: BTreeMap<VolumeId, SessionId>,
    readers: BTreeSet<(VolumeId, Epoch, SessionId)>,
}

impl Sessions {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Session> {
        self.all.values().map(|session| &**session)
    }

    pub(super) fn get(&self, id: SessionId) -> Option<&Session> {
        self.all.get(&id).map(|session| &**session)
    }

    pub(super) fn get_mut(&mut self, id: SessionId) -> Result<&mut Session, Corrupt> {
        self.all.get_mut(&id).map(Arc::make_mut).ok_or_else(|| Corrupt::new(format!("no session {id}")))
    }

    pub(super) fn writer_of(&self, volume: VolumeId) -> Option<&Session> {
        self.get(*self.writers.get(&volume)?)
    }

    /// Readers of the volume's snapshots from one epoch to another, both included.
    pub(super) fn readers(&self, volume: VolumeId, from: Epoch, to: Epoch) -> impl Iterator<Item = &Session> {
        let first = (volume, from, SessionId([0; 16]));
        let last = (volume, to, SessionId([0xff; 16]));
        self.readers.range(first..=last).filter_map(|(_, _, id)| self.get(*id))
    }

    /// Everybody who reads, or read, a snapshot of the volume.
    pub(super) fn all_readers(&self, volume: VolumeId) -> impl Iterator<Item = &Session> {
        self.readers(volume, Epoch(0), Epoch(u64::MAX))
    }

    pub(super) fn open(&mut self, session: Session) -> Result<(), Corrupt> {
        let taken = match session.attached {
            Attached::Writer(volume) => self.writers.contains_key(&volume),
            Attached::Snapshot(..) | Attached::Operator => false,
        };
        if taken || self.all.contains_key(&session.id) {
            return Err(Corrupt::new(format!("session {} exists, or its volume has a writer", session.id)));
        }
        match session.attached {
            Attached::Writer(volume) => drop(self.writers.insert(volume, session.id)),
            Attached::Snapshot(volume, epoch) => drop(self.readers.insert((volume, epoch, session.id))),
            Attached::Operator => {}
        }
        self.all.insert(session.id, Arc::new(session));
        Ok(())
    }

    pub(super) fn end(&mut self, id: SessionId) -> Result<(), Corrupt> {
        let session = self.all.remove(&id).ok_or_else(|| Corrupt::new(format!("no session {id}")))?;
        match session.attached {
            Attached::Writer(volume) => drop(self.writers.remove(&volume)),
            Attached::Snapshot(volume, epoch) => drop(self.readers.remove(&(volume, epoch, id))),
            Attached::Operator => {}
        }
        Ok(())
    }

    pub(super) fn store(
        &mut self,
        id: SessionId,
        sequence: Sequence,
        lowest_unanswered: Sequence,
        result: &StoredResult,
    ) -> Result<(), Corrupt> {
        let session = self.get_mut(id)?;
        session.results = session.results.split_off(&lowest_unanswered);
        if session.results.len() >= RESULTS_PER_SESSION_MAX && !session.results.contains_key(&sequence) {
            return Err(Corrupt::new("more stored results than a session may have"));
        }
        session.results.insert(sequence, result.clone());
        Ok(())
    }

    /// Problems of the indexes.
    pub(super) fn check(&self, report: &mut dyn FnMut(String)) {
        let mut rebuilt = Self::default();
        for session in self.iter() {
            if let Err(Corrupt { what }) = rebuilt.open(session.clone()) {
                report(what);
            }
        }
        if rebuilt.writers != self.writers || rebuilt.readers != self.readers {
            report("the indexes of sessions do not match them".to_owned());
        }
    }
}
