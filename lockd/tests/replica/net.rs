//! The network: it loses, delays, doubles, reorders, and is cut in either direction.

use std::collections::BTreeSet;

use csnap_storage::sim::Rng;

use crate::plan::Plan;

pub(crate) type Seat = usize;

#[derive(Default)]
pub(crate) struct Net {
    cut: BTreeSet<(Seat, Seat)>,
    healed: bool,
}

impl Net {
    /// When the copies of a message arrive, microseconds from now.
    pub(crate) fn ways(&self, plan: &Plan, from: Seat, to: Seat, rng: &mut Rng) -> Vec<u64> {
        if self.cut.contains(&(from, to)) {
            return Vec::new();
        }
        let way = |rng: &mut Rng| 50 + rng.below(if self.healed { 300 } else { plan.delay });
        if self.healed {
            return vec![way(rng)];
        }
        if rng.chance(plan.loss) {
            return Vec::new();
        }
        let copies = if rng.chance(plan.duplicates) { 2 } else { 1 };
        (0..copies).map(|_| way(rng)).collect()
    }

    /// Cuts some links: one replica off, one way or both, or any links.
    pub(crate) fn cut(&mut self, seats: usize, rng: &mut Rng) {
        self.cut.clear();
        let one = rng.index(seats);
        let shape = rng.below(4);
        for from in 0..seats {
            for to in 0..seats {
                let cut = match shape {
                    0 => from == one || to == one,
                    1 => from == one,
                    2 => to == one,
                    _ => rng.chance(0.4),
                };
                if cut {
                    self.cut.insert((from, to));
                }
            }
        }
    }

    pub(crate) fn mend(&mut self) {
        self.cut.clear();
    }

    /// Nothing goes wrong any more.
    pub(crate) fn heal(&mut self) {
        self.cut.clear();
        self.healed = true;
    }
}
