//! How replicas know each other: what the group remembers of each, and what each says of itself while it is reached.

// An address is a value; nothing is opened here.
use ::core::fmt;
use ::core::net::SocketAddr;
use ::core::str::FromStr;
use std::collections::BTreeMap;

use csnap_proto::Name;
use serde::{Deserialize, Serialize};

use crate::replica::{Members, ReplicaId};

/// What a group remembers of a replica beside its disk: `NODE@IP:PORT`, or `IP:PORT` of one whose node was not known. So a
/// replica that is gone can still be named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contact {
    /// Its node.
    pub node: Option<Name>,
    /// Where it listens for the others.
    pub address: SocketAddr,
}

impl fmt::Display for Contact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.node {
            Some(node) => write!(f, "{node}@{}", self.address),
            None => write!(f, "{}", self.address),
        }
    }
}

impl FromStr for Contact {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (node, address) = match text.split_once('@') {
            Some((node, address)) => (Some(Name::new(node).map_err(|_| "a node's name")?), address),
            None => (None, text),
        };
        Ok(Self { node, address: address.parse().map_err(|_| "an address")? })
    }
}

/// What a replica says of itself to those who reach it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Presence {
    /// Its node.
    pub node: Name,
    /// Its process.
    pub pid: u32,
    /// Where other replicas find it, if they do.
    pub peer: Option<SocketAddr>,
    /// Where clients find it; empty if it does not know under which address others see it.
    pub clients: Vec<SocketAddr>,
}

/// Which of the other replicas are reached. Whoever carries messages tells; where nobody does, nothing is known.
#[derive(Debug, Default)]
pub(super) struct Reached {
    known: BTreeMap<ReplicaId, Option<Presence>>,
}

impl Reached {
    pub(super) fn reached(&mut self, id: ReplicaId, presence: Presence) {
        self.known.insert(id, Some(presence));
    }

    /// What is not reached and no member is forgotten: whoever comes and goes leaves nothing.
    pub(super) fn lost(&mut self, id: ReplicaId, members: &Members) {
        self.known.insert(id, None);
        self.known.retain(|id, presence| presence.is_some() || members.contains_key(id));
    }

    pub(super) fn presence(&self, id: ReplicaId) -> Option<&Presence> {
        self.known.get(&id)?.as_ref()
    }

    /// It is known not to be reached, rather than not known at all.
    pub(super) fn is_lost(&self, id: ReplicaId) -> bool {
        matches!(self.known.get(&id), Some(None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_contact_is_read_as_it_is_written() {
        let address = SocketAddr::from(([10, 0, 0, 1], 7100));
        for node in [None, Some(Name::new("n1").expect("a name"))] {
            let contact = Contact { node, address };
            assert_eq!(contact.to_string().parse(), Ok(contact));
        }
        assert_eq!("[::1]:7".parse::<Contact>().expect("no node").node, None);
        for bad in ["", "n1@", "n1", "a/b@10.0.0.1:1", "n1@n2@10.0.0.1:1"] {
            assert!(bad.parse::<Contact>().is_err(), "{bad}");
        }
    }
}
