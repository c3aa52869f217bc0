//! Who may be half-way in: connections that have not proved yet who they are. Pure.
//!
//! They cost memory and descriptors before anybody vouched for them, so there are [`HANDSHAKES_MAX`] at most. When one
//! more comes, the oldest of the *source with the most* goes: whoever fills the places from one machine only pushes
//! themselves out, and a good peer, who needs a place for milliseconds, is not the one.

use std::collections::BTreeMap;
use std::net::IpAddr;

/// Connections that are half-way in at once: every member of a large cluster after a power loss, with room.
pub const HANDSHAKES_MAX: usize = 128;

/// Where a stranger comes from. Of an IPv6 address the network counts: a machine has any number of addresses in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// A unix socket of this machine.
    Local,
    /// An IPv4 address, or the upper half of an IPv6 one.
    Network(u64),
}

impl From<IpAddr> for Source {
    fn from(ip: IpAddr) -> Self {
        match ip.to_canonical() {
            IpAddr::V4(ip) => Self::Network(u64::from(ip.to_bits())),
            IpAddr::V6(ip) => {
                Self::Network(u64::try_from(ip.to_bits() >> 64).expect("half of an address has 64 bits"))
            }
        }
    }
}

/// A place, in the order in which they were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

/// See the module.
#[derive(Debug, Default)]
pub struct Strangers {
    last: u64,
    inside: BTreeMap<Ticket, Source>,
}

impl Strangers {
    /// Takes one in, and names the one that has to go for it, if there are too many; it is never the new one.
    pub fn enter(&mut self, source: Source) -> (Ticket, Option<Ticket>) {
        self.last += 1;
        let ticket = Ticket(self.last);
        self.inside.insert(ticket, source);
        if self.inside.len() <= HANDSHAKES_MAX {
            return (ticket, None);
        }
        let mut counts: BTreeMap<Source, (usize, Ticket)> = BTreeMap::new();
        for (ticket, source) in &self.inside {
            counts.entry(*source).or_insert((0, *ticket)).0 += 1;
        }
        // Of equals the one whose oldest waits longest.
        let most = counts.values().max_by_key(|(count, oldest)| (*count, std::cmp::Reverse(*oldest)));
        let victim = most.expect("somebody is inside").1;
        self.inside.remove(&victim);
        (ticket, Some(victim))
    }

    /// One is through, or gone.
    pub fn leave(&mut self, ticket: Ticket) {
        self.inside.remove(&ticket);
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.inside.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &str) -> Source {
        text.parse::<IpAddr>().expect("an address").into()
    }

    #[test]
    fn a_flood_from_one_machine_pushes_out_nobody_else() {
        let mut strangers = Strangers::default();
        let (good, _) = strangers.enter(source("10.0.0.1"));
        let mut evil = std::collections::VecDeque::new();
        for _ in 0..10 * HANDSHAKES_MAX {
            let (ticket, victim) = strangers.enter(source("10.0.0.66"));
            evil.push_back(ticket);
            if let Some(victim) = victim {
                assert_eq!(Some(victim), evil.pop_front(), "its own oldest");
            }
            assert!(strangers.count() <= HANDSHAKES_MAX);
        }
        strangers.leave(good);
        assert_eq!(strangers.count(), HANDSHAKES_MAX - 1);
    }

    #[test]
    fn among_equals_the_oldest_goes() {
        let mut strangers = Strangers::default();
        let mut tickets = Vec::new();
        for n in 0..HANDSHAKES_MAX {
            let ip = IpAddr::from([
                10,
                0,
                u8::try_from(n / 256).expect("small"),
                u8::try_from(n % 256).expect("small"),
            ]);
            tickets.push(strangers.enter(ip.into()).0);
        }
        assert_eq!(strangers.enter(source("10.9.9.9")).1, Some(tickets[0]));
    }

    #[test]
    fn a_network_of_version_6_is_one_source() {
        assert_eq!(source("fe80::1"), source("fe80::2"));
        assert_ne!(source("fe80:1::1"), source("fe80:2::1"));
        assert_eq!(source("::ffff:10.0.0.1"), source("10.0.0.1"));
        assert_ne!(source("10.0.0.1"), Source::Local);
    }
}
