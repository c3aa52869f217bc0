//! The live nodes as lockd tells of them, and the order in which they step forward at a vacancy.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use csnap_proto::message::local::{NodeInfo, NodeStatus, Wish};
use csnap_proto::message::lock::Member;
use csnap_proto::{Name, SessionId, Time};

use super::lock::Look;

/// Another node.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) node: Name,
    pub(super) info: NodeInfo,
    /// Since when it has been a ready standby without a break.
    ready_since: Option<Time>,
}

impl Peer {
    fn could_serve(&self) -> bool {
        self.info.standby_ready && self.info.priority > 0
    }

    /// Its takeovers failed, and it has not served since.
    fn is_in_trouble(&self) -> bool {
        self.info.trouble.is_some()
    }
}

/// Every live member but ourselves. Bounded by what lockd admits.
#[derive(Debug, Default)]
pub(super) struct Members {
    /// Lockd told who is there; before, nobody's absence means anything.
    pub(super) known: bool,
    /// At the list.
    pub(super) look: Look,
    peers: BTreeMap<SessionId, Peer>,
    /// Nodes that are better than ours, and do not get the server back for that alone: an operator chose us. It ends
    /// for a node when its session ends (it comes back as a new one) or its priority changes.
    overruled: BTreeSet<(SessionId, u32)>,
}

impl Members {
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// A session is open; nothing of an earlier one counts.
    pub(super) fn begin(&mut self) {
        *self = Self { look: Look::Due, ..Self::default() };
    }

    /// Who is there now, ours (`me`) left out: an earlier session of this very node says nothing about today.
    pub(super) fn reset(&mut self, now: Time, me: &Name, members: Vec<Member>) {
        let listed: BTreeSet<_> = members.iter().map(|member| member.session).collect();
        self.peers.retain(|session, _| listed.contains(session));
        for member in members {
            self.up(now, me, member);
        }
        self.known = true;
        self.look = Look::Done;
    }

    /// One came or changed. A description that does not decode is another version's: it does not take part.
    pub(super) fn up(&mut self, now: Time, me: &Name, member: Member) {
        let Ok(info) = postcard::from_bytes::<NodeInfo>(&member.info) else {
            self.down(member.session);
            return;
        };
        if member.node == *me {
            return;
        }
        let before = self.peers.get(&member.session);
        let changed = before.is_some_and(|peer| peer.info.priority != info.priority);
        let ready_since = before.and_then(|peer| peer.ready_since).filter(|_| !changed).unwrap_or(now);
        let ready_since = info.standby_ready.then_some(ready_since);
        self.peers.insert(member.session, Peer { node: member.node, info, ready_since });
        self.overruled.retain(|(session, priority)| {
            self.peers.get(session).is_some_and(|peer| peer.info.priority == *priority)
        });
    }

    pub(super) fn down(&mut self, session: SessionId) {
        self.peers.remove(&session);
        self.overruled.retain(|(overruled, _)| *overruled != session);
    }

    /// How many ready nodes rank before one of `priority` called `me`: the order of stepping forward. Whoever is in
    /// trouble goes after those that are not.
    pub(super) fn place(&self, me: &Name, priority: u32, in_trouble: bool) -> u32 {
        let mine = (!in_trouble, priority, Reverse(me));
        let rank = |peer: &Peer| (!peer.is_in_trouble(), peer.info.priority, Reverse(&peer.node)) > mine;
        let before = self.peers.values().filter(|peer| peer.could_serve() && rank(peer));
        u32::try_from(before.count()).unwrap_or(u32::MAX)
    }

    /// From now on nodes that rank higher than `priority` already do not count as better.
    pub(super) fn overrule_better(&mut self, priority: u32) {
        let better = self.peers.iter().filter(|(_, peer)| peer.info.priority > priority);
        self.overruled = better.map(|(session, peer)| (*session, peer.info.priority)).collect();
    }

    /// The best ready node above `priority` that has been so for a while: since when, and which. One that is in trouble is
    /// not better: a server that works is not drained for one that did not.
    pub(super) fn better_than(&self, priority: u32) -> Option<(Time, &Name)> {
        let counts = |(session, peer): &(&SessionId, &Peer)| {
            let overruled = self.overruled.contains(&(**session, peer.info.priority));
            peer.info.priority > priority && !overruled && !peer.is_in_trouble()
        };
        let best = self
            .peers
            .iter()
            .filter(counts)
            .filter_map(|(_, peer)| peer.ready_since.map(|since| (since, peer)));
        best.max_by(|(_, a), (_, b)| a.info.priority.cmp(&b.info.priority).then(b.node.cmp(&a.node)))
            .map(|(since, peer)| (since, &peer.node))
    }

    pub(super) fn find(&self, node: &Name) -> Option<&Peer> {
        self.peers.values().find(|peer| peer.node == *node)
    }

    pub(super) fn wishes(&self) -> impl Iterator<Item = (SessionId, &Wish)> {
        self.peers.iter().flat_map(|(session, peer)| peer.info.wishes.iter().map(|wish| (*session, wish)))
    }

    /// A node that may serve ranks higher, ready or not.
    pub(super) fn outranks(&self, priority: u32) -> bool {
        self.peers.values().any(|peer| peer.info.priority > priority)
    }

    pub(super) fn any_ready(&self) -> bool {
        self.peers.values().any(Peer::could_serve)
    }

    pub(super) fn any_ready_without_trouble(&self) -> bool {
        self.peers.values().any(|peer| peer.could_serve() && !peer.is_in_trouble())
    }

    pub(super) fn statuses(&self) -> impl Iterator<Item = NodeStatus> {
        self.peers.values().map(|peer| NodeStatus { node: peer.node.clone(), info: peer.info.clone() })
    }
}
