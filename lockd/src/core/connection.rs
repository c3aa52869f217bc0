//! Connections: transports of sessions, told from each other by a number that the shell gives. Limits what strangers
//! can hold.

use std::collections::BTreeMap;
use std::time::Duration;

use csnap_proto::limits::HANDSHAKE_MS_MAX;
use csnap_proto::{SessionId, Time};

/// Connections at once. A few for each session that may be, so that reconnecting never waits for dead ones; strangers
/// beyond push out the oldest stranger.
pub const LOCKD_CONNECTIONS_MAX: usize = 1024;

/// A connection, numbered by the shell; numbers are not reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ConnectionId(pub u64);

/// How far a connection is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    /// Has not said who it is; closed then.
    Stranger { until: Time },
    /// Asked for a new session, whose command is on its way to the log.
    Opening,
    /// Speaks for a session.
    Owner(SessionId),
}

/// The open connections.
#[derive(Debug, Default)]
pub(super) struct Connections {
    open: BTreeMap<ConnectionId, Role>,
}

impl Connections {
    /// Takes a new connection in. Gives the one that has to go for it, if there are too many; it may be the new one.
    pub(super) fn admit(&mut self, now: Time, id: ConnectionId) -> Option<ConnectionId> {
        let until = now.after(Duration::from_millis(HANDSHAKE_MS_MAX));
        self.open.insert(id, Role::Stranger { until });
        if self.open.len() <= LOCKD_CONNECTIONS_MAX {
            return None;
        }
        // The oldest stranger: a good client introduces itself at once, so it is never the one for long.
        let stranger = self.open.iter().find(|(_, role)| matches!(role, Role::Stranger { .. }));
        let victim = stranger.map(|(id, _)| *id).expect("the new one is a stranger");
        self.open.remove(&victim);
        Some(victim)
    }

    pub(super) fn role(&self, id: ConnectionId) -> Option<Role> {
        self.open.get(&id).copied()
    }

    pub(super) fn set_role(&mut self, id: ConnectionId, role: Role) {
        if let Some(known) = self.open.get_mut(&id) {
            *known = role;
        }
    }

    pub(super) fn remove(&mut self, id: ConnectionId) -> Option<Role> {
        self.open.remove(&id)
    }

    /// All of them.
    pub(super) fn all(&self) -> Vec<ConnectionId> {
        self.open.keys().copied().collect()
    }

    /// Strangers whose time is over.
    pub(super) fn overdue(&self, now: Time) -> Vec<ConnectionId> {
        let late =
            self.open.iter().filter(|(_, role)| matches!(role, Role::Stranger { until } if now >= *until));
        late.map(|(id, _)| *id).collect()
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        let deadlines = self.open.values().filter_map(|role| match role {
            Role::Stranger { until } => Some(*until),
            Role::Opening | Role::Owner(_) => None,
        });
        deadlines.min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_push_out_strangers_and_never_an_owner() {
        let mut connections = Connections::default();
        let owner = ConnectionId(0);
        assert_eq!(connections.admit(Time(0), owner), None);
        connections.set_role(owner, Role::Owner(SessionId([1; 16])));
        for n in 1..LOCKD_CONNECTIONS_MAX as u64 {
            assert_eq!(connections.admit(Time(n), ConnectionId(n)), None);
        }
        assert_eq!(connections.admit(Time(9), ConnectionId(5000)), Some(ConnectionId(1)));
        assert_eq!(connections.admit(Time(9), ConnectionId(5001)), Some(ConnectionId(2)));
        assert!(connections.role(owner).is_some());
    }
}
