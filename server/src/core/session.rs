//! Sessions: who may attach what, who comes back, who is gone for good.
//!
//! A session outlives its connections and its servers. It ends by its own Release, or because somebody *knows* that
//! its process is dead with its I/O returned (the agent that reaped it), or because the operator vouches for a fenced
//! node. A timeout ends nothing: an absent writer keeps its volume.

use std::collections::BTreeSet;

use csnap_proto::limits::SESSIONS_MAX;
use csnap_proto::message::operate::{Fenced, OperatorReply, Refusal, RefusalKind};
use csnap_proto::message::volume::{Attach, Forget, FromServer, Geometry, Identify, IdentifyOk};
use csnap_proto::{Epoch, FreeBatchId, InstanceId, Name, RequestId, SessionId, Target, Term, VolumeId};

use super::connection::Peer;
use super::{CloseReason, ConnId, Out, ServerCore};
use crate::state::{Attached, Record, Session};

/// Batches in one Renewed; the client comes back for more with its next Renew.
const FORGETS_PER_RENEW_MAX: usize = 16;

/// Extents in one Forget beyond which the client is told to forget everything: a quarter of a frame.
const EXTENTS_PER_FORGET_MAX: usize = 8192;

impl ServerCore {
    pub(super) fn on_identify(&mut self, conn: ConnId, id: RequestId, identify: Identify, out: Out) {
        let attached = match self.admit(&identify) {
            Ok(attached) => attached,
            Err(refusal) => {
                self.send(conn, id, FromServer::Refused(refusal));
                return self.part_with(conn, Some(CloseReason::Refused));
            }
        };
        let peer = Peer {
            session: identify.session,
            secret: identify.secret,
            instance: identify.instance,
            node: identify.node,
            pid: identify.pid,
            attached,
        };
        if attached != Attached::Operator && self.state.session(peer.session).is_none() {
            if self.state.sessions().count() >= SESSIONS_MAX {
                let reason = "too many sessions are open; see csnap status for who holds them";
                self.refuse(conn, id, RefusalKind::Busy, reason);
                return self.part_with(conn, Some(CloseReason::Refused));
            }
            self.open_session(&peer);
        }
        if let Some(older) = self.connections.identify(conn, peer) {
            self.drop_connection(older, CloseReason::Superseded, out);
        }
        self.welcome(conn, id, attached);
    }

    /// Whether the session may come, and what it has attached.
    fn admit(&self, identify: &Identify) -> Result<Attached, Refusal> {
        if let Some(known) = self.state.session(identify.session) {
            let same = known.secret == identify.secret;
            return if same { Ok(known.attached) } else { Err(denied()) };
        }
        if let Some(conn) = self.connections.of_session(identify.session) {
            let same = self.connections.peer(conn).is_some_and(|peer| peer.secret == identify.secret);
            if !same {
                return Err(denied());
            }
        }
        if identify.cached_epoch.is_some() {
            let reason = "the session is over: its node was fenced, or it was taken for dead; attach anew";
            return Err(Refusal::new(RefusalKind::NotFound, reason));
        }
        match &identify.attach {
            Attach::Operator => Ok(Attached::Operator),
            Attach::Snapshot(target) => self.snapshot_id(target).map(|(v, e)| Attached::Snapshot(v, e)),
            Attach::Writer(name) => {
                let volume = self.volume_id(name)?;
                self.check_import(volume, identify)?;
                match self.state.writer_of(volume) {
                    None => Ok(Attached::Writer(volume)),
                    Some(holder) => Err(self.held_by(name.as_str(), holder)),
                }
            }
        }
    }

    /// A volume that is being imported is its importer's alone.
    fn check_import(&self, volume: VolumeId, identify: &Identify) -> Result<(), Refusal> {
        let importer = self.state.volume(volume).and_then(|v| v.importer).and_then(|s| self.state.session(s));
        match importer {
            Some(importer) if importer.instance != identify.instance => Err(Refusal::new(
                RefusalKind::Busy,
                format!("it is being imported on node {}", importer.node),
            )),
            _ => Ok(()),
        }
    }

    fn held_by(&self, name: &str, holder: &Session) -> Refusal {
        let present = self.connections.of_session(holder.id).is_some();
        let state = if present {
            "attached"
        } else {
            "attached, and lost: it must come back, be reaped or be fenced,"
        };
        let reason = format!("{name} is {state} on node {} (pid {})", holder.node, holder.pid);
        Refusal::new(RefusalKind::Busy, reason)
    }

    fn open_session(&mut self, peer: &Peer) {
        self.record(Record::SessionOpen {
            session: peer.session,
            secret: peer.secret,
            instance: peer.instance,
            node: peer.node.clone(),
            pid: peer.pid,
            attached: peer.attached,
            opened: self.wall,
        });
    }

    /// Operators' sessions are recorded with their first change: asking leaves no trace.
    pub(super) fn open_operator_session(&mut self, peer: &Peer) {
        if self.state.session(peer.session).is_none() {
            self.open_session(peer);
        }
    }

    /// Tells a client what it attached. Outside a drain this is also the Resume: the client may write again.
    fn welcome(&mut self, conn: ConnId, id: RequestId, attached: Attached) {
        let lease_ms = u64::try_from(self.config.client_lease.as_millis()).unwrap_or(u64::MAX);
        let mut answer = IdentifyOk {
            geometry: None,
            epoch: Epoch(0),
            all_unique: false,
            lease_ms,
            advice_follows: false,
        };
        match attached {
            Attached::Operator => {}
            Attached::Writer(volume) => {
                answer.geometry = self.geometry(volume, None);
                answer.epoch = self.state.volume(volume).map_or(Epoch(0), |v| v.epoch);
                answer.all_unique = self.state.youngest_live_snapshot(volume).is_none();
                answer.advice_follows = self.creates.is_active(volume);
            }
            Attached::Snapshot(volume, epoch) => {
                answer.geometry = self.geometry(volume, Some(epoch));
                answer.epoch = epoch;
            }
        }
        let advice_follows = answer.advice_follows;
        let gone = matches!(attached, Attached::Snapshot(..)) && answer.geometry.is_none();
        self.send(conn, id, FromServer::IdentifyOk(answer));
        match attached {
            Attached::Writer(volume) if advice_follows => self.advise_newcomer(volume, conn),
            // Not a refusal: the session still has to say that it forgot what it knew of the store.
            Attached::Snapshot(..) if gone => self.send(conn, RequestId(0), FromServer::SnapshotGone),
            _ => {}
        }
    }

    fn geometry(&self, volume: VolumeId, epoch: Option<Epoch>) -> Option<Geometry> {
        let v = self.state.volume(volume)?;
        let snapshot = match epoch {
            None => None,
            Some(epoch) => Some(self.state.snapshot(volume, epoch)?),
        };
        let head = super::show::head_of(&v.origin);
        let target = Target { volume: v.name.clone(), snapshot: snapshot.map(|s| s.name.clone()) };
        let size_bytes = snapshot.map_or(v.size_bytes, |s| s.size_bytes);
        Some(Geometry { volume, snapshot: epoch, target, size_bytes, chunk: v.chunk, head })
    }

    /// The volume that the session of this connection writes.
    pub(super) fn writes_to(&self, conn: ConnId) -> Option<VolumeId> {
        match self.connections.peer(conn)?.attached {
            Attached::Writer(volume) => Some(volume),
            Attached::Snapshot(..) | Attached::Operator => None,
        }
    }

    pub(super) fn on_renew(&mut self, conn: ConnId, id: RequestId, forgotten: FreeBatchId) {
        let Some(peer) = self.connections.peer(conn).cloned() else { return };
        let told = self.connections.get(conn).map_or(FreeBatchId(0), |c| c.told);
        let confirmed = self.state.session(peer.session).map(|s| s.confirmed);
        // A client confirms what it was told on this connection; anything else is not believed.
        if confirmed.is_some_and(|confirmed| forgotten > confirmed) && forgotten <= told {
            self.record(Record::FreesConfirmed { session: peer.session, upto: forgotten });
        }
        let forget = self.forgets(peer.session, told);
        if let (Some(last), Some(connection)) = (forget.last(), self.connections.get_mut(conn)) {
            connection.told = last.batch;
        }
        let (epoch, all_unique) = match peer.attached {
            Attached::Writer(v) => {
                (self.state.volume(v).map(|v| v.epoch), self.state.youngest_live_snapshot(v).is_none())
            }
            Attached::Snapshot(_, epoch) => (Some(epoch), false),
            Attached::Operator => (None, false),
        };
        let epoch = epoch.unwrap_or(Epoch(0));
        self.send(conn, id, FromServer::Renewed { forget, all_unique, epoch });
    }

    fn forgets(&self, session: SessionId, told: FreeBatchId) -> Vec<Forget> {
        let batches = self.state.unconfirmed_frees(session).filter(|(batch, _)| *batch > told);
        let forget = |(batch, extents): (FreeBatchId, &[csnap_proto::StoreExtent])| {
            let too_many = extents.len() > EXTENTS_PER_FORGET_MAX / FORGETS_PER_RENEW_MAX;
            Forget { batch, extents: if too_many { Vec::new() } else { extents.to_vec() } }
        };
        batches.take(FORGETS_PER_RENEW_MAX).map(forget).collect()
    }

    pub(super) fn on_release(&mut self, conn: ConnId, id: RequestId) {
        let Some(session) = self.connections.peer(conn).map(|peer| peer.session) else { return };
        self.end_session(session);
        self.send(conn, id, FromServer::Released);
        self.part_with(conn, None);
    }

    /// An agent saw the process dead, and had the locks of these volumes' heads. A head that it did not look at may still
    /// get I/O of the dead: then nothing ends.
    pub(super) fn on_reaped(
        &mut self,
        instance: InstanceId,
        looked_at: Vec<VolumeId>,
    ) -> Result<OperatorReply, Refusal> {
        let looked_at: BTreeSet<VolumeId> = looked_at.into_iter().collect();
        let sessions: Vec<(SessionId, Attached)> =
            self.state.sessions().filter(|s| s.instance == instance).map(|s| (s.id, s.attached)).collect();
        let unseen = sessions.iter().find_map(|(_, attached)| match *attached {
            Attached::Writer(volume) if looked_at.contains(&volume) || self.goes_with_importer(volume) => {
                None
            }
            Attached::Writer(volume) => Some(volume),
            Attached::Snapshot(..) | Attached::Operator => None,
        });
        if let Some(volume) = unseen {
            let shown = self.state.volume(volume).map_or_else(|| volume.to_string(), |v| v.name.to_string());
            let reason = format!(
                "the dead had {shown} open for writing too, and its head was not looked at; look again"
            );
            return Err(Refusal::new(RefusalKind::Busy, reason));
        }
        sessions.into_iter().for_each(|(session, _)| self.expel(session));
        Ok(OperatorReply::Done)
    }

    /// A volume that is being imported is on no list, and ends with the sessions of its importer: nobody else will ever
    /// have its head.
    fn goes_with_importer(&self, volume: VolumeId) -> bool {
        let importing = self.state.volume(volume).is_some_and(|v| v.importer.is_some());
        importing && self.state.youngest_live_snapshot(volume).is_none()
    }

    /// Ends a session that does not end itself, and its connection: nothing that it still says counts.
    fn expel(&mut self, session: SessionId) {
        let conn = self.connections.of_session(session);
        self.end_session(session);
        if let Some(conn) = conn {
            self.part_with(conn, Some(CloseReason::SessionEnded));
        }
    }

    /// The session is over: nothing of its I/O is under way, or its node is fenced.
    pub(super) fn end_session(&mut self, session: SessionId) {
        let Some(attached) = self.state.session(session).map(|s| s.attached) else { return };
        self.record(Record::SessionEnd { session });
        let orphans: Vec<VolumeId> =
            self.state.volumes().filter(|v| v.importer == Some(session)).map(|v| v.id).collect();
        for volume in orphans {
            if self.state.writer_of(volume).is_none() && self.state.youngest_live_snapshot(volume).is_none() {
                self.record(Record::VolumeDelete { volume });
            }
        }
        if let Attached::Writer(volume) = attached {
            let importer_gone = self
                .state
                .volume(volume)
                .and_then(|v| v.importer)
                .is_some_and(|s| self.state.session(s).is_none());
            if importer_gone && self.state.youngest_live_snapshot(volume).is_none() {
                self.record(Record::VolumeDelete { volume });
            }
            self.writer_left(volume);
        }
    }

    /// The operator's word: whoever is named cannot write any more. Of a node, neither can the servers that ran there.
    pub(super) fn fence(&mut self, whom: &Fenced) -> Result<OperatorReply, Refusal> {
        let (sessions, terms): (Vec<SessionId>, Vec<Term>) = match whom {
            Fenced::Session(session) => {
                (self.state.session(*session).map(|s| s.id).into_iter().collect(), vec![])
            }
            Fenced::Node(node) => (
                self.state.sessions().filter(|s| s.node == *node).map(|s| s.id).collect(),
                self.state.older_servers().filter(|(_, at)| *at == node).map(|(term, _)| term).collect(),
            ),
        };
        if sessions.is_empty() && terms.is_empty() {
            let reason = "nothing of it is attached and no server of it holds space, so there is nothing to end; see csnap status";
            return Err(Refusal::new(RefusalKind::NotFound, reason));
        }
        if let Fenced::Node(node) = whom {
            self.check_lost(node)?;
        }
        sessions.into_iter().for_each(|session| self.expel(session));
        terms.into_iter().for_each(|term| self.record(Record::TermDead { term }));
        Ok(OperatorReply::Done)
    }

    /// A node that is heard of is not fenced: the operator means another one. Soon after a takeover nobody has been heard
    /// of yet.
    fn check_lost(&self, node: &Name) -> Result<(), Refusal> {
        let is_connected = |s: &&Session| s.node == *node && self.connections.of_session(s.id).is_some();
        if let Some(session) = self.state.sessions().find(is_connected) {
            let reason = format!(
                "node {node} is connected (pid {}), so it is not fenced; check the name in csnap status, or cut it off",
                session.pid
            );
            return Err(Refusal::new(RefusalKind::Busy, reason));
        }
        let known = self.began.after(self.config.client_lease);
        if self.now < known {
            let reason =
                format!("the server has just started, and node {node} may still come back; try again soon");
            return Err(Refusal::new(RefusalKind::Busy, reason));
        }
        Ok(())
    }

    pub(super) fn on_server_reaped(&mut self, term: Term) -> Result<OperatorReply, Refusal> {
        if term >= self.term {
            return Err(Refusal::new(RefusalKind::Invalid, format!("term {term} is not an older one")));
        }
        if !self.state.is_term_dead(term) {
            self.record(Record::TermDead { term });
        }
        Ok(OperatorReply::Done)
    }
}

fn denied() -> Refusal {
    Refusal::new(RefusalKind::Denied, "the session belongs to somebody else")
}
