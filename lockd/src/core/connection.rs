//! Connections: transports of sessions, told from each other by a number that the shell gives. Limits what strangers
//! can hold.

use std::collections::BTreeMap;
use std::time::Duration;

use csnap_proto::limits::HANDSHAKE_MS_MAX;
use csnap_proto::{Caller, SessionId, Time};

use super::spaces::SpaceId;

/// Connections at once. A few for each session that may be, so that reconnecting never waits for dead ones; strangers
/// beyond push out the oldest stranger.
pub const LOCKD_CONNECTIONS_MAX: usize = 1024;

/// A connection, numbered by the shell; numbers are not reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ConnectionId(pub u64);

/// A session in its lockspace. Ids of sessions are drawn by their owners, so the id alone does not tell two lockspaces
/// apart.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Attendee {
    pub(super) space: SpaceId,
    pub(super) session: SessionId,
}

/// How far a connection is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    /// Has not said who it is, or only asks about lockspaces; closed then.
    Stranger {
        until: Time,
        /// The lockspace that it is about to open or resume a session in.
        space: SpaceId,
    },
    /// Asked for a new session, whose command is on its way to the log.
    Opening,
    /// Speaks for a session.
    Owner(Attendee),
    /// Asked while nobody led; what it asked for is dropped, and it is told who leads as soon as that is known.
    Held,
    /// An operator's, being answered.
    Waiting,
}

/// The open connections.
#[derive(Debug, Default)]
pub(super) struct Connections {
    open: BTreeMap<ConnectionId, Role>,
    /// Who is at the other end of each.
    callers: BTreeMap<ConnectionId, Caller>,
}

impl Connections {
    /// Takes a new connection in. Gives the one that has to go for it, if there are too many; it may be the new one.
    pub(super) fn admit(&mut self, now: Time, id: ConnectionId, caller: Caller) -> Option<ConnectionId> {
        self.open.insert(id, Role::Stranger { until: Self::patience(now), space: SpaceId::DEFAULT });
        self.callers.insert(id, caller);
        if self.open.len() <= LOCKD_CONNECTIONS_MAX {
            return None;
        }
        // The oldest stranger: a good client introduces itself at once, so it is never the one for long.
        let stranger = self.open.iter().find(|(_, role)| matches!(role, Role::Stranger { .. }));
        let victim = stranger.map(|(id, _)| *id).expect("the new one is a stranger");
        self.remove(victim);
        Some(victim)
    }

    /// Until when somebody may stay who does not speak for a session.
    fn patience(now: Time) -> Time {
        now.after(Duration::from_millis(HANDSHAKE_MS_MAX))
    }

    /// An operator, or another group that a lockspace comes from, goes on asking.
    pub(super) fn stay(&mut self, now: Time, id: ConnectionId) {
        if let Some(Role::Stranger { until, .. }) = self.open.get_mut(&id) {
            *until = Self::patience(now);
        }
    }

    /// A stranger says which lockspace it is about.
    pub(super) fn enter(&mut self, id: ConnectionId, entered: SpaceId) {
        if let Some(Role::Stranger { space, .. }) = self.open.get_mut(&id) {
            *space = entered;
        }
    }

    pub(super) fn role(&self, id: ConnectionId) -> Option<Role> {
        self.open.get(&id).copied()
    }

    /// Who is at the other end, while it is open.
    pub(super) fn caller(&self, id: ConnectionId) -> Option<&Caller> {
        self.callers.get(&id)
    }

    pub(super) fn set_role(&mut self, id: ConnectionId, role: Role) {
        if let Some(known) = self.open.get_mut(&id) {
            *known = role;
        }
    }

    pub(super) fn remove(&mut self, id: ConnectionId) -> Option<Role> {
        self.callers.remove(&id);
        self.open.remove(&id)
    }

    /// An operator's request is under way, or answered; whoever speaks for a session goes on to.
    pub(super) fn set_waiting(&mut self, now: Time, id: ConnectionId, waits: bool) {
        let until = Self::patience(now);
        match self.open.get_mut(&id) {
            Some(role @ Role::Stranger { .. }) if waits => *role = Role::Waiting,
            Some(role @ Role::Waiting) if !waits => *role = Role::Stranger { until, space: SpaceId::DEFAULT },
            _ => {}
        }
    }

    /// Those who asked for a session. Operators are told by whoever answers them.
    pub(super) fn asking(&self) -> Vec<ConnectionId> {
        let asks = |role: &Role| matches!(role, Role::Opening | Role::Owner(_) | Role::Held);
        self.open.iter().filter(|(_, role)| asks(role)).map(|(id, _)| *id).collect()
    }

    /// Everyone who asked for something waits for the next leader.
    pub(super) fn hold_all(&mut self) {
        for role in self.open.values_mut().filter(|role| matches!(role, Role::Opening | Role::Owner(_))) {
            *role = Role::Held;
        }
    }

    /// Those who wait for the next leader.
    pub(super) fn held(&self) -> Vec<ConnectionId> {
        let held = self.open.iter().filter(|(_, role)| matches!(role, Role::Held));
        held.map(|(id, _)| *id).collect()
    }

    /// Strangers whose time is over.
    pub(super) fn overdue(&self, now: Time) -> Vec<ConnectionId> {
        let late = self
            .open
            .iter()
            .filter(|(_, role)| matches!(role, Role::Stranger { until, .. } if now >= *until));
        late.map(|(id, _)| *id).collect()
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        let deadlines = self.open.values().filter_map(|role| match role {
            Role::Stranger { until, .. } => Some(*until),
            Role::Opening | Role::Owner(_) | Role::Held | Role::Waiting => None,
        });
        deadlines.min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admit(connections: &mut Connections, now: u64, id: u64) -> Option<ConnectionId> {
        connections.admit(Time(now), ConnectionId(id), Caller::local())
    }

    #[test]
    fn strangers_push_out_strangers_and_never_an_owner() {
        let mut connections = Connections::default();
        let owner = ConnectionId(0);
        assert_eq!(admit(&mut connections, 0, 0), None);
        let attendee = Attendee { space: SpaceId::DEFAULT, session: SessionId([1; 16]) };
        connections.set_role(owner, Role::Owner(attendee));
        for n in 1..LOCKD_CONNECTIONS_MAX as u64 {
            assert_eq!(admit(&mut connections, n, n), None);
        }
        assert_eq!(admit(&mut connections, 9, 5000), Some(ConnectionId(1)));
        assert_eq!(admit(&mut connections, 9, 5001), Some(ConnectionId(2)));
        assert!(connections.role(owner).is_some());
    }
}
