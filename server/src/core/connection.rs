//! Connections: who is at the other end, and when it was heard last.
//!
//! A connection is only the transport of a session; it carries nothing that must outlive it. Marks must not: they go with
//! it (see [`super::read`]).

use std::collections::BTreeMap;

use csnap_proto::limits::{CONNECTIONS_MAX, HANDSHAKE_MS_MAX};
use csnap_proto::message::operate::RefusalKind;
use csnap_proto::message::volume::ToServer;
use csnap_proto::{Frame, FreeBatchId, InstanceId, Name, RequestId, Secret, SessionId, Time};

use super::{CloseReason, Config, ConnId, Out, Output, ServerCore};
use crate::state::Attached;

/// Who is at the other end.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    pub(super) session: SessionId,
    pub(super) secret: Secret,
    pub(super) instance: InstanceId,
    pub(super) node: Name,
    pub(super) pid: u32,
    pub(super) attached: Attached,
}

#[derive(Debug)]
pub(super) struct Connection {
    /// Absent until it identified itself.
    pub(super) peer: Option<Peer>,
    pub(super) heard: Time,
    /// Highest batch of freed locations that it was told to forget.
    pub(super) told: FreeBatchId,
}

/// Every open connection, and the one of each session.
#[derive(Debug, Default)]
pub(super) struct Connections {
    all: BTreeMap<ConnId, Connection>,
    by_session: BTreeMap<SessionId, ConnId>,
}

impl Connections {
    pub(super) fn get(&self, conn: ConnId) -> Option<&Connection> {
        self.all.get(&conn)
    }

    pub(super) fn get_mut(&mut self, conn: ConnId) -> Option<&mut Connection> {
        self.all.get_mut(&conn)
    }

    pub(super) fn peer(&self, conn: ConnId) -> Option<&Peer> {
        self.all.get(&conn)?.peer.as_ref()
    }

    /// The connection on which a session is present.
    pub(super) fn of_session(&self, session: SessionId) -> Option<ConnId> {
        self.by_session.get(&session).copied()
    }

    /// Binds a connection to its peer; the older connection of the same session, if there is one.
    pub(super) fn identify(&mut self, conn: ConnId, peer: Peer) -> Option<ConnId> {
        let older = self.by_session.insert(peer.session, conn).filter(|&older| older != conn);
        if let Some(connection) = self.all.get_mut(&conn) {
            connection.peer = Some(peer);
        }
        older
    }

    fn remove(&mut self, conn: ConnId) -> Option<Connection> {
        let connection = self.all.remove(&conn)?;
        if let Some(peer) = &connection.peer
            && self.by_session.get(&peer.session) == Some(&conn)
        {
            self.by_session.remove(&peer.session);
        }
        Some(connection)
    }

    /// Connections of sessions that read any snapshot, with what they read.
    pub(super) fn readers(&self) -> impl Iterator<Item = (ConnId, Attached)> + '_ {
        self.all.iter().filter_map(|(&conn, c)| Some((conn, c.peer.as_ref()?.attached)))
    }

    fn patience(connection: &Connection, config: &Config) -> std::time::Duration {
        match connection.peer {
            Some(_) => config.client_lease,
            None => std::time::Duration::from_millis(HANDSHAKE_MS_MAX),
        }
    }

    /// When the first connection becomes silent for too long. Every peer renews at a fraction of the lease, so one
    /// pass over all of them at that time is cheap.
    pub(super) fn next_deadline(&self, config: &Config) -> Option<Time> {
        self.all.values().map(|c| c.heard.after(Self::patience(c, config))).min()
    }

    fn silent(&self, now: Time, config: &Config) -> Vec<ConnId> {
        let late = |c: &Connection| c.heard.after(Self::patience(c, config)) <= now;
        self.all.iter().filter(|(_, c)| late(c)).map(|(&conn, _)| conn).collect()
    }
}

impl ServerCore {
    pub(super) fn on_accepted(&mut self, conn: ConnId, out: Out) {
        let full = self.connections.all.len() >= CONNECTIONS_MAX;
        if self.draining || full {
            // Whoever comes to a server that drains asks the next one.
            out.push(Output::Close { conn, reason: full.then_some(CloseReason::TooMany) });
            return;
        }
        let connection = Connection { peer: None, heard: self.now, told: FreeBatchId(0) };
        self.connections.all.insert(conn, connection);
    }

    /// The connection is gone, or must be treated as if: its marks are broken, its unprocessed requests forgotten.
    /// Its session lives on.
    pub(super) fn on_closed(&mut self, conn: ConnId) {
        if self.connections.remove(conn).is_some() {
            self.grants.forget(conn);
            self.marks.forget(conn);
        }
    }

    /// Forgets a connection now, and closes it after what was sent on it.
    pub(super) fn part_with(&mut self, conn: ConnId, reason: Option<CloseReason>) {
        self.on_closed(conn);
        self.pipeline.then(Output::Close { conn, reason });
    }

    pub(super) fn drop_connection(&mut self, conn: ConnId, reason: CloseReason, out: Out) {
        self.on_closed(conn);
        out.push(Output::Close { conn, reason: Some(reason) });
    }

    /// Connections that were silent for too long. Absent is not dead: sessions, and what they hold, stay.
    pub(super) fn drop_silent(&mut self, out: Out) {
        for conn in self.connections.silent(self.now, &self.config) {
            let known = self.connections.peer(conn).is_some();
            let reason = if known { CloseReason::Silent } else { CloseReason::Unidentified };
            self.drop_connection(conn, reason, out);
        }
    }

    pub(super) fn on_frame(&mut self, conn: ConnId, frame: Frame<ToServer>, out: Out) {
        if self.draining {
            return; // The peer asks the next server again.
        }
        let Some(connection) = self.connections.get_mut(conn) else { return };
        connection.heard = self.now;
        let id = frame.id;
        if id == RequestId(0) {
            // Unnumbered requests would not count against the limit of unanswered ones.
            return self.part_with(conn, Some(CloseReason::Unnumbered));
        }
        match (&connection.peer, frame.message) {
            (None, ToServer::Identify(identify)) => self.on_identify(conn, id, identify, out),
            (None, _) => self.refuse_order(conn, id, CloseReason::NotIdentified),
            (Some(_), ToServer::Identify(_)) => self.refuse_order(conn, id, CloseReason::IdentifiedTwice),
            (Some(_), ToServer::QueryWrite { ranges }) => self.on_query_write(conn, id, ranges),
            (Some(_), ToServer::QuerySnapshotRead { read, ranges }) => {
                self.on_query_snapshot_read(conn, id, read, &ranges);
            }
            (Some(_), ToServer::FinishSnapshotRead { read }) => self.on_finish_snapshot_read(conn, id, read),
            (Some(_), ToServer::SnapshotAdviceOk { advice }) => self.on_advice_ok(conn, id, advice),
            (Some(_), ToServer::Renew { forgotten }) => self.on_renew(conn, id, forgotten),
            (Some(_), ToServer::Release) => self.on_release(conn, id),
            (Some(_), ToServer::Operate { sequence, lowest_unanswered, request }) => {
                self.on_operate(conn, id, sequence, lowest_unanswered, request, out);
            }
        }
    }

    /// It did not come in the order that connections have: Identify first, and once.
    fn refuse_order(&mut self, conn: ConnId, id: RequestId, reason: CloseReason) {
        let told = "a connection starts with one Identify, and has no other";
        self.refuse(conn, id, RefusalKind::Invalid, told);
        self.part_with(conn, Some(reason));
    }
}
