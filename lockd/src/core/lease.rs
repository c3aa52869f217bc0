//! Leases: how long each session lives without a renewal. In memory only; after a restart everybody starts anew.
//!
//! A lease decides when lockd stops waiting for a holder, and nothing else: what makes a dead holder harmless is its
//! term. So a lease may end late, by drift or by a pause of lockd, but must not end because lockd itself slept. One that
//! ran out is looked at twice, [`RECHECK_MS`] apart, so that renewals that waited in sockets meanwhile are read first;
//! and a lockd that overslept its own deadline by [`OVERSLEPT_MS`] begins every lease anew, as after a restart, and
//! says so: where that goes on and on, nobody's lease ever ends.

use std::collections::BTreeMap;
use std::time::Duration;

use csnap_proto::Time;

use super::connection::Attendee;

/// Between the first and the second look at a lease that ran out, milliseconds: time to read every waiting socket.
const RECHECK_MS: u64 = 30;

/// So late, milliseconds, lockd was not merely busy: it was stopped, and its clients gave up their connections.
const OVERSLEPT_MS: u64 = 200;

/// A lease ends later by one part in this many: clocks of two machines may differ in speed by that.
const DRIFT_PARTS: u64 = 50;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Renewed not long ago.
    Safe,
    /// Two thirds passed; said so.
    Jeopardy,
    /// Ran out; to be looked at again then.
    Recheck(Time),
    /// The command that ends it is on its way.
    Ending,
}

#[derive(Clone, Copy, Debug)]
struct Lease {
    length: Duration,
    renewed_at: Time,
    stage: Stage,
}

impl Lease {
    fn warns_at(&self) -> Time {
        self.renewed_at.after(self.length * 2 / 3)
    }

    fn ends_at(&self) -> Time {
        let drift = self.length / u32::try_from(DRIFT_PARTS).expect("small");
        self.renewed_at.after(self.length + drift)
    }

    fn deadline(&self) -> Option<Time> {
        match self.stage {
            Stage::Safe => Some(self.warns_at()),
            Stage::Jeopardy => Some(self.ends_at()),
            Stage::Recheck(at) => Some(at),
            Stage::Ending => None,
        }
    }
}

/// Leases began anew, for lockd came late to them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Overslept {
    /// Behind its own deadline.
    pub late: Duration,
    /// How many.
    pub leases: usize,
}

/// What became due.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Due {
    /// Nothing, for now: all began anew.
    Overslept(Overslept),
    /// Two thirds of the lease passed.
    Jeopardy(Attendee),
    /// It is over.
    Expired(Attendee),
}

/// The leases of all sessions.
#[derive(Debug, Default)]
pub(super) struct Leases {
    leases: BTreeMap<Attendee, Lease>,
}

impl Leases {
    /// A full lease from now.
    pub(super) fn start(&mut self, now: Time, session: Attendee, lease_ms: u64) {
        let length = Duration::from_millis(lease_ms);
        self.leases.insert(session, Lease { length, renewed_at: now, stage: Stage::Safe });
    }

    pub(super) fn renew(&mut self, now: Time, session: Attendee) {
        if let Some(lease) = self.leases.get_mut(&session).filter(|lease| lease.stage != Stage::Ending) {
            (lease.renewed_at, lease.stage) = (now, Stage::Safe);
        }
    }

    /// No more deadlines: the session is ending.
    pub(super) fn set_ending(&mut self, session: Attendee) {
        if let Some(lease) = self.leases.get_mut(&session) {
            lease.stage = Stage::Ending;
        }
    }

    pub(super) fn remove(&mut self, session: Attendee) {
        self.leases.remove(&session);
    }

    /// What is due now; each is given once.
    pub(super) fn due(&mut self, now: Time) -> Vec<Due> {
        let mut due = Vec::new();
        let late = self.next_deadline().map(|at| now.since(at));
        if let Some(late) = late.filter(|late| *late >= Duration::from_millis(OVERSLEPT_MS)) {
            let leases = self.begin_anew(now);
            due.push(Due::Overslept(Overslept { late, leases }));
        }
        for (session, lease) in &mut self.leases {
            if lease.stage == Stage::Safe && now >= lease.warns_at() {
                lease.stage = Stage::Jeopardy;
                due.push(Due::Jeopardy(*session));
            }
            match lease.stage {
                Stage::Jeopardy if now >= lease.ends_at() => {
                    lease.stage = Stage::Recheck(now.after(Duration::from_millis(RECHECK_MS)));
                }
                Stage::Recheck(at) if now >= at => {
                    lease.stage = Stage::Ending;
                    due.push(Due::Expired(*session));
                }
                _ => {}
            }
        }
        due
    }

    /// All that can still be renewed; how many.
    fn begin_anew(&mut self, now: Time) -> usize {
        let begun = self.leases.values_mut().filter(|lease| lease.stage != Stage::Ending);
        begun.map(|lease| (lease.renewed_at, lease.stage) = (now, Stage::Safe)).count()
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        self.leases.values().filter_map(Lease::deadline).min()
    }
}

#[cfg(test)]
mod tests {
    use csnap_proto::SessionId;

    use super::*;
    use crate::core::spaces::SpaceId;

    const S: Attendee = attendee(1);

    const fn attendee(n: u8) -> Attendee {
        Attendee { space: SpaceId::DEFAULT, session: SessionId([n; 16]) }
    }

    fn ms(ms: u64) -> Time {
        Time(ms * 1000)
    }

    fn leases() -> Leases {
        let mut leases = Leases::default();
        leases.start(ms(0), S, 1000);
        leases
    }

    #[test]
    fn a_lease_warns_then_ends_and_each_once() {
        let mut leases = leases();
        assert_eq!(leases.due(ms(666)), []);
        assert_eq!(leases.due(ms(667)), [Due::Jeopardy(S)]);
        assert_eq!(leases.due(ms(1000)), []);
        assert_eq!(leases.due(ms(1020)), []);
        assert_eq!(leases.next_deadline(), Some(ms(1050)));
        assert_eq!(leases.due(ms(1050)), [Due::Expired(S)]);
        assert_eq!(leases.due(ms(9000)), []);
        assert_eq!(leases.next_deadline(), None);
    }

    #[test]
    fn a_lockd_that_dozed_reads_renewals_before_it_expires_anybody() {
        let mut leases = leases();
        assert_eq!(leases.due(ms(667)), [Due::Jeopardy(S)]);
        assert_eq!(leases.due(ms(1200)), []);
        leases.renew(ms(1201), S);
        assert_eq!(leases.due(ms(1230)), []);
        assert_eq!(leases.next_deadline(), Some(Time(1_867_666)));
    }

    #[test]
    fn a_lockd_that_was_stopped_begins_every_lease_anew() {
        let mut leases = leases();
        leases.start(ms(0), attendee(2), 60_000);
        leases.start(ms(0), attendee(3), 60_000);
        leases.set_ending(attendee(3));
        let overslept = Overslept { late: Duration::from_micros(50_000_000 - 666_666), leases: 2 };
        assert_eq!(leases.due(ms(50_000)), [Due::Overslept(overslept)]);
        assert_eq!(leases.next_deadline(), Some(Time(50_666_666)));
    }

    #[test]
    fn a_renewal_does_not_call_an_expiry_back() {
        let mut leases = leases();
        leases.due(ms(667));
        leases.due(ms(1020));
        assert_eq!(leases.due(ms(1050)), [Due::Expired(S)]);
        leases.renew(ms(1051), S);
        assert_eq!(leases.next_deadline(), None);
    }
}
