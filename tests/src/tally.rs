//! Counts: faults that struck, rare states that were reached, work that was done. A campaign that never gets into a
//! state that it is about has shown nothing, so the named states are listed and each must be reached.

use std::collections::BTreeMap;

/// Every state that a campaign must reach.
pub const STATES: &[&str] = &[
    "a grant was in flight when its server was replaced",
    "a snapshot read was under way when its server was replaced",
    "a finish met a broken mark",
    "a create was drained anew by another server",
    "a writer identified itself during a drain",
    "a deposed server attempted an append",
    "a deposed server attempted an answer",
    "a gate was found closed by its own server",
    "a server began to take over and found itself deposed",
    "a server was killed while it took over",
    "two servers took over at once",
    "a takeover walked over a term that never served",
    "a standby followed past a seal and loaded anew",
    "a journal segment was begun under load",
    "a checkpoint was written under load",
    "freed space was held for an absent session",
    "reaping was cut short by a takeover",
    "a resend was answered from a stored result",
    "an agent resumed its session by its secret",
    "lockd was killed with commands in flight",
    "an exporter outlived its agent",
    "an exporter was declared dead",
    "a dead server was declared",
    "a volume was refused because a lost session holds it",
    "a write was refused for want of space",
    "a head's sync failed and poisoned its attachment",
    "a server ended because storage failed it",
    "power was lost with writes in flight",
    "power was lost during a takeover",
    "a create failed because the writer did not drain",
    "a reader's snapshot was deleted by force",
    "a server was handed over by plan",
    "a fast write was waited for by a drain",
    "a session came back while its older connection was open",
    "a probe cleared a suspected server",
    "a connection broke on one side only",
    "a clock stood still",
    "freed space was reused",
    "several requests became one write",
    "lockd was killed with requests gathered and not settled",
    "a lockd came late and began every lease anew",
    "another lockd led",
    "a lockd ended because its disk failed it",
    "a lockd came back with an empty disk",
    "a lockd with an empty disk was added again and caught up",
    "no lockd led",
    "a client gave up an operation that may have happened",
];

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Named states, how often each was reached.
    pub states: BTreeMap<&'static str, u64>,
    /// Faults that were brought about, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Work that was done.
    pub work: BTreeMap<&'static str, u64>,
}

impl Tally {
    /// A named state was reached.
    ///
    /// # Panics
    /// If it is not one of [`STATES`].
    pub fn reached(&mut self, state: &'static str) {
        assert!(STATES.contains(&state), "{state:?} is not listed");
        *self.states.entry(state).or_default() += 1;
    }

    /// A fault was brought about.
    pub fn fault(&mut self, kind: &'static str) {
        *self.faults.entry(kind).or_default() += 1;
    }

    /// Some work was done.
    pub fn did(&mut self, what: &'static str, times: u64) {
        *self.work.entry(what).or_default() += times;
    }

    /// How often some work was done.
    #[must_use]
    pub fn count(&self, what: &str) -> u64 {
        self.work.get(what).copied().unwrap_or(0)
    }

    /// Adds another world's counts.
    pub fn add(&mut self, other: &Self) {
        let pairs = [
            (&mut self.states, &other.states),
            (&mut self.faults, &other.faults),
            (&mut self.work, &other.work),
        ];
        for (sums, counts) in pairs {
            for (name, count) in counts {
                *sums.entry(name).or_default() += count;
            }
        }
    }

    /// Listed states that were not reached.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        STATES.iter().filter(|state| !self.states.contains_key(*state)).copied().collect()
    }
}
