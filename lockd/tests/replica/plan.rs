//! What a world is like: drawn from its seed.

use csnap_lockd::canary::Broken;
use csnap_lockd::replica::Timing;
use csnap_storage::sim::Rng;

/// What may go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A process dies.
    Kill,
    /// A machine loses its power: what was not synced may be gone.
    PowerLoss,
    /// All of them.
    PowerLossOfAll,
    /// A process stands still for a while.
    Freeze,
    /// Some links are cut, one way or both ways.
    Cut,
    /// A sync fails.
    BadSync,
    /// A disk is full for a while.
    FullDisk,
    /// A disk is lost.
    Amnesia,
    /// The group changes.
    Membership,
    /// Another one is to lead.
    Transfer,
}

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    /// Replicas at the beginning.
    pub(crate) voters: usize,
    /// Seats, taken or not.
    pub(crate) seats: usize,
    pub(crate) faults: Vec<Fault>,
    /// Between two faults, microseconds.
    pub(crate) fault_every: u64,
    /// Between two proposals, microseconds.
    pub(crate) propose_every: u64,
    /// Longest command, bytes.
    pub(crate) command_bytes: u64,
    /// How long the storm lasts, microseconds.
    pub(crate) storm: u64,
    /// Longest way of a message, microseconds.
    pub(crate) delay: u64,
    pub(crate) loss: f64,
    pub(crate) duplicates: f64,
    /// Longest sync, microseconds.
    pub(crate) sync: u64,
    pub(crate) timing: Timing,
    pub(crate) broken: Broken,
}

impl Plan {
    pub(crate) fn draw(seed: u64, broken: Broken) -> Self {
        let mut rng = Rng::new(seed);
        let all = [
            Fault::Kill,
            Fault::PowerLoss,
            Fault::PowerLossOfAll,
            Fault::Freeze,
            Fault::Cut,
            Fault::BadSync,
            Fault::FullDisk,
            Fault::Amnesia,
            Fault::Membership,
            Fault::Transfer,
        ];
        let share = [0.3, 0.6, 1.0][rng.index(3)];
        let faults = all.into_iter().filter(|_| rng.chance(share)).collect();
        let voters = [1, 3, 3, 3, 5][rng.index(5)];
        let rough = rng.chance(0.5);
        Self {
            seed: rng.next_u64(),
            voters,
            seats: voters + 2,
            faults,
            fault_every: 100_000 + rng.below(600_000),
            propose_every: 500 + rng.below(20_000),
            command_bytes: [16, 600, 8000][rng.index(3)],
            storm: 6_000_000,
            delay: [300, 3_000, 30_000][rng.index(3)],
            loss: if rough { 0.05 } else { 0.0 },
            duplicates: if rough { 0.05 } else { 0.0 },
            sync: [500, 3_000, 15_000][rng.index(3)],
            timing: if rng.chance(0.3) { Timing::FAST } else { Timing::DEFAULT },
            broken,
        }
    }
}
