//! One sector of a volume: everything that it may hold, now, earlier, and after a power loss.
//!
//! A sector is *settled* while no write to it is under way. What it may hold is a set: one stamp as a rule, several after
//! a writer died under its writes or the power was lost, until somebody looks.

use super::spans::Spans;
use super::stamp::{Found, Stamp};

#[derive(Clone, Debug)]
struct Phase {
    from: u64,
    may_hold: Vec<Stamp>,
    settled: bool,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Sector {
    /// From the beginning of the volume on; never empty.
    phases: Vec<Phase>,
    /// What a power loss may leave, oldest first; never empty.
    survivors: Vec<Stamp>,
    /// So many of the first survivors were under a sync that failed: no later sync says anything about them.
    unsure: usize,
}

impl Sector {
    /// Of a new volume.
    #[must_use]
    pub fn new(now: u64) -> Self {
        let new = Phase { from: now, may_hold: vec![Stamp::NEW], settled: true };
        Self { phases: vec![new], survivors: vec![Stamp::NEW], unsure: 0 }
    }

    fn last(&self) -> &Phase {
        self.phases.last().expect("a sector has a phase")
    }

    fn begin(&mut self, from: u64, may_hold: Vec<Stamp>, settled: bool) {
        self.phases.push(Phase { from, may_hold, settled });
    }

    /// A write of it is under way.
    pub fn write_begins(&mut self, now: u64, stamp: Stamp) {
        let mut may_hold = self.last().may_hold.clone();
        may_hold.push(stamp);
        self.begin(now, may_hold, false);
        self.survivors.push(stamp);
    }

    /// It is done; or it is not known how far it came.
    pub fn write_ends(&mut self, now: u64, stamp: Stamp, done: bool) {
        let may_hold = if done { vec![stamp] } else { self.last().may_hold.clone() };
        self.begin(now, may_hold, true);
    }

    /// Whether a power loss could bring something else than what it holds.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.survivors.len() > 1
    }

    /// A flush was acknowledged that was asked for at `asked`: what it held then, or something younger, survives.
    pub fn flushed(&mut self, asked: u64) {
        let phase = self.phase_at(asked);
        let Some(at) = self.survivors.iter().position(|stamp| phase.may_hold.contains(stamp)) else { return };
        if at >= self.unsure {
            self.survivors.drain(..at);
            self.unsure = 0;
        }
    }

    /// A write with FUA was acknowledged: it or something younger survives.
    pub fn written_through(&mut self, stamp: Stamp) {
        if let Some(at) =
            self.survivors.iter().position(|known| *known == stamp).filter(|at| *at >= self.unsure)
        {
            self.survivors.drain(..at);
            self.unsure = 0;
        }
    }

    /// A sync of the head failed: what was not durable may be gone at once, or later.
    pub fn sync_failed(&mut self, now: u64) {
        if self.is_dirty() {
            let (may_hold, settled) = (self.survivors.clone(), self.last().settled);
            self.begin(now, may_hold, settled);
            self.unsure = self.survivors.len();
        }
    }

    /// The power was lost.
    pub fn power_lost(&mut self, now: u64) {
        if self.is_dirty() || !self.last().settled {
            let may_hold = self.survivors.clone();
            self.begin(now, may_hold, true);
        }
        self.unsure = 0;
    }

    /// Which of the stamps that it may have held between `from` and `now` was found, if any. What is seen while nothing
    /// else happens is what it holds from then on, unless a sync of it failed: then it may be what the cache has and the medium
    /// does not, and go with the next power loss, also from a snapshot that was made meanwhile.
    pub fn read(&mut self, from: u64, now: u64, found: Found) -> Result<(), String> {
        let first = self.index_at(from);
        let held = self.phases[first..].iter().flat_map(|phase| &phase.may_hold);
        let Some(stamp) = held.copied().find(|stamp| fits(found, *stamp)) else {
            let may = &self.phases[first..];
            return Err(format!("{found:?} was read, but it held {may:?}"));
        };
        let stays = self.unsure == 0 && self.last().settled;
        if first + 1 == self.phases.len() && stays && self.last().may_hold.len() > 1 {
            let kept: Vec<Stamp> =
                self.last().may_hold.iter().copied().filter(|stamp| fits(found, *stamp)).collect();
            debug_assert!(kept.contains(&stamp));
            self.begin(now, kept, true);
        }
        Ok(())
    }

    /// Whether it may hold `found` after a power loss.
    #[must_use]
    pub fn may_survive(&self, found: Found) -> bool {
        self.survivors.iter().any(|stamp| fits(found, *stamp))
    }

    /// What may survive, for people.
    #[must_use]
    pub fn survivors(&self) -> &[Stamp] {
        &self.survivors
    }

    /// Instants, from `from` on, at which it may have held `found` with no write under way.
    #[must_use]
    pub fn when_held(&self, found: Found, within: (u64, u64)) -> Spans {
        let mut spans = Spans::default();
        let mut index = self.index_at(within.0);
        // Several phases may begin at the same instant.
        while index > 0 && self.phases[index].from >= within.0 {
            index -= 1;
        }
        while let Some(phase) = self.phases.get(index).filter(|phase| phase.from <= within.1) {
            let to = self.phases.get(index + 1).map_or(u64::MAX, |next| next.from);
            if phase.settled && phase.may_hold.iter().any(|stamp| fits(found, *stamp)) {
                spans.push(phase.from, to);
            }
            index += 1;
        }
        spans
    }

    fn index_at(&self, at: u64) -> usize {
        self.phases.partition_point(|phase| phase.from <= at).saturating_sub(1)
    }

    fn phase_at(&self, at: u64) -> &Phase {
        &self.phases[self.index_at(at)]
    }
}

fn fits(found: Found, stamp: Stamp) -> bool {
    match found {
        Found::Zeros => stamp.is_zero(),
        Found::Stamp { stamp: seen, .. } => seen == stamp,
        Found::Garbage => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(stamp: Stamp) -> Found {
        if stamp.is_zero() { Found::Zeros } else { Found::Stamp { volume: 0, sector: 0, stamp } }
    }

    fn stamp(n: u64) -> Stamp {
        Stamp::new(n, false)
    }

    fn written(sector: &mut Sector, from: u64, n: u64) {
        sector.write_begins(from, stamp(n));
        sector.write_ends(from + 1, stamp(n), true);
    }

    #[test]
    fn an_acknowledged_flush_leaves_no_way_back() {
        let mut sector = Sector::new(0);
        written(&mut sector, 10, 1);
        written(&mut sector, 20, 2);
        sector.flushed(15);
        assert!(!sector.may_survive(Found::Zeros));
        assert!(sector.may_survive(found(stamp(1))) && sector.may_survive(found(stamp(2))));
        sector.flushed(30);
        assert!(!sector.may_survive(found(stamp(1))));
    }

    #[test]
    fn once_seen_it_does_not_go_back() {
        let mut sector = Sector::new(0);
        sector.write_begins(10, stamp(1));
        sector.write_ends(20, stamp(1), false);
        assert!(sector.read(30, 31, found(stamp(1))).is_ok());
        assert!(sector.read(40, 41, Found::Zeros).is_err());
    }

    #[test]
    fn a_failed_sync_says_nothing_about_what_it_covered() {
        let mut sector = Sector::new(0);
        written(&mut sector, 10, 1);
        sector.sync_failed(20);
        sector.flushed(30);
        assert!(sector.may_survive(Found::Zeros));
        written(&mut sector, 40, 2);
        sector.flushed(50);
        assert!(!sector.may_survive(Found::Zeros) && sector.may_survive(found(stamp(2))));
    }

    #[test]
    fn what_is_read_after_a_failed_sync_may_be_gone_later_until_it_is_written_again() {
        let mut sector = Sector::new(0);
        written(&mut sector, 10, 1);
        sector.sync_failed(20);
        assert!(sector.read(30, 31, found(stamp(1))).is_ok());
        // A snapshot was made, which shares it; the power is lost.
        assert!(!sector.when_held(Found::Zeros, (40, 50)).is_empty());
        written(&mut sector, 60, 2);
        assert!(sector.when_held(Found::Zeros, (70, 80)).is_empty());
    }

    #[test]
    fn what_was_held_when_is_known_exactly() {
        let mut sector = Sector::new(0);
        written(&mut sector, 10, 1);
        written(&mut sector, 30, 2);
        assert_eq!(sector.when_held(found(stamp(1)), (0, 100)), Spans::one(11, 30));
        assert_eq!(sector.when_held(Found::Zeros, (5, 100)), Spans::one(0, 10));
        assert!(sector.when_held(found(stamp(2)), (0, 20)).is_empty());
    }
}
