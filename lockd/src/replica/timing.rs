//! How long replicas wait for each other. All in ticks of a few milliseconds; what is drawn is drawn from a seed.

use std::time::Duration;

use super::ReplicaId;

/// Waits of a group; the same on every replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// The unit of the others.
    pub tick: Duration,
    /// Between two heartbeats of a leader, ticks.
    pub heartbeat_ticks: usize,
    /// A leader not heard of for so long, at least, is given up, ticks. A leader that did not hear of a majority for
    /// so long gives itself up.
    pub election_ticks_min: usize,
    /// The longest of the waits drawn, ticks.
    pub election_ticks_max: usize,
}

impl Timing {
    /// Heartbeats every 50 ms, elections after 150 to 300 ms: for disks whose syncs may take tens of milliseconds.
    pub const DEFAULT: Self = Self {
        tick: Duration::from_millis(10),
        heartbeat_ticks: 5,
        election_ticks_min: 15,
        election_ticks_max: 30,
    };

    /// Heartbeats every 15 ms, elections after 50 to 100 ms: for quiet machines with fast disks.
    pub const FAST: Self = Self {
        tick: Duration::from_millis(5),
        heartbeat_ticks: 3,
        election_ticks_min: 10,
        election_ticks_max: 20,
    };

    /// A snapshot on its way that nothing was heard of for so long is sent again, ticks.
    pub(super) fn snapshot_ticks(&self) -> u64 {
        10 * self.election_ticks_max as u64
    }

    /// The wait before the `campaign`th election of a replica in a term: drawn anew for each, evenly.
    pub(super) fn election_ticks(&self, seed: u64, id: ReplicaId, term: u64, campaign: u64) -> usize {
        let drawn = [id.0, term, campaign].iter().fold(mix(seed), |sum, part| mix(sum ^ part));
        let span = (self.election_ticks_max - self.election_ticks_min) as u64 + 1;
        let more = usize::try_from(drawn % span).expect("below a usize");
        self.election_ticks_min + more
    }
}

impl Default for Timing {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// The finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit.
fn mix(z: u64) -> u64 {
    let z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_drawn_anew_for_each_campaign_and_cover_their_range() {
        let timing = Timing::DEFAULT;
        let draw = |campaign| timing.election_ticks(7, ReplicaId(3), 5, campaign);
        let drawn: std::collections::BTreeSet<usize> = (0..1000).map(draw).collect();
        assert_eq!(drawn, (15..=30).collect());
        assert_eq!(draw(4), draw(4));
        let other = (0..100).filter(|n| draw(*n) != timing.election_ticks(7, ReplicaId(4), 5, *n)).count();
        assert!(other > 80, "two replicas seldom wait alike: {other}");
    }
}
