//! The group as an operator is shown it.

use csnap_proto::Term;
use csnap_proto::message::lock::{GroupView, ReplicaNumber, ReplicaView};

use super::Replicated;
use super::contact::Contact;
use crate::replica::{Member, ReplicaId};

impl Replicated {
    /// The group as this lockd sees it, also without a majority.
    #[must_use]
    pub fn view(&self) -> GroupView {
        let replica = &self.replica;
        let mut replicas: Vec<_> =
            replica.members().iter().map(|(id, member)| self.view_of(*id, Some(member))).collect();
        if !replica.members().contains_key(&replica.id()) {
            replicas.push(self.view_of(replica.id(), None));
        }
        GroupView {
            own: ReplicaNumber(replica.id().0),
            leads: self.lockd.leads(),
            leader: replica.leader().map(|leader| ReplicaNumber(leader.0)),
            replica_term: Term(replica.term()),
            has_group: replica.cluster().is_some(),
            replicas,
        }
    }

    fn view_of(&self, id: ReplicaId, member: Option<&Member>) -> ReplicaView {
        let own = id == self.replica.id();
        let presence = if own { Some(&self.own) } else { self.reached.presence(id) };
        let contact: Option<Contact> = member.and_then(|member| member.address.parse().ok());
        let known = presence.map(|presence| presence.node.clone());
        ReplicaView {
            replica: ReplicaNumber(id.0),
            node: known.or_else(|| contact.as_ref().and_then(|contact| contact.node.clone())),
            voter: member.is_some_and(|member| member.voter),
            peer: contact
                .map(|contact| contact.address)
                .or_else(|| presence.and_then(|presence| presence.peer)),
            reached: presence.is_some(),
            pid: presence.map(|presence| presence.pid),
            listens: presence.map(|presence| presence.clients.clone()).unwrap_or_default(),
            caught_up: self.replica.is_established().then(|| own || self.replica.has_caught_up(id)),
        }
    }
}
