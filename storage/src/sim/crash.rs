//! Power loss: what may be left of everything that was not synced, enumerated or drawn.
//!
//! Each unsynced sector, size and name change is one choice, free of the others. Few choices are tried in every
//! combination; of many, a sample is drawn that favours the shapes that find mistakes: nothing lost, all lost, a
//! prefix in time, one change lost, one change kept.

use std::collections::BTreeSet;

use super::SECTOR_BYTES;
use super::dir::Inode;
use super::rng::{Digest, Rng};
use super::state::{Node, State};

/// Up to so many combinations, all are tried.
pub const ENUMERATE_MAX: u64 = 1 << 12;
/// Draws in a row that gave nothing new, after which a sample is taken for complete.
const STALE_DRAWS_MAX: u32 = 256;

/// One thing that a power loss decides. Choice 0 is "as last synced", the others are the changes since.
#[derive(Clone, Debug)]
struct Decision {
    /// The position of each change in the history of the disk.
    changes: Vec<u64>,
    /// For each choice, the first that leaves the same.
    alike: Vec<usize>,
}

/// The decisions about one file or directory: a stretch of all.
#[derive(Clone, Debug)]
struct Subject {
    inode: Inode,
    first: usize,
    kind: SubjectKind,
}

#[derive(Clone, Debug)]
enum SubjectKind {
    /// A decision for each unsynced sector, with their numbers, and then one for the size.
    File(Vec<u64>),
    /// A decision for each change of names.
    Dir,
}

/// All decisions of one power loss.
#[derive(Clone)]
pub(super) struct PowerLoss {
    state: State,
    decisions: Vec<Decision>,
    subjects: Vec<Subject>,
}

impl Decision {
    /// One whose outcomes all differ.
    fn of(changes: Vec<u64>) -> Self {
        let alike = (0..=changes.len()).collect();
        Self { changes, alike }
    }
}

impl PowerLoss {
    /// `state` must have no operation in flight any more.
    pub(super) fn of(state: State) -> Self {
        let (mut decisions, mut subjects) = (Vec::new(), Vec::new());
        for (inode, node) in state.nodes() {
            let first = decisions.len();
            let kind = match node {
                Node::File(file) if file.is_synced() => continue,
                Node::Dir(dir) if dir.unsynced().is_empty() => continue,
                Node::File(file) => {
                    let mut sectors = Vec::new();
                    for (sector, versions) in file.unsynced_sectors() {
                        let changes = versions.iter().map(|u| u.seq).collect();
                        decisions.push(Decision { changes, alike: file.alike(sector, versions) });
                        sectors.push(sector);
                    }
                    decisions.push(Decision::of(file.unsynced_sizes().iter().map(|u| u.seq).collect()));
                    SubjectKind::File(sectors)
                }
                Node::Dir(dir) => {
                    decisions.extend(dir.unsynced().iter().map(|change| Decision::of(vec![change.seq])));
                    SubjectKind::Dir
                }
            };
            subjects.push(Subject { inode, first, kind });
        }
        Self { state, decisions, subjects }
    }

    /// Combinations of choices, if there are at most `max`.
    fn combinations(&self, max: u64) -> Option<u64> {
        self.decisions.iter().try_fold(1u64, |product, decision| {
            Some(product * (decision.changes.len() as u64 + 1)).filter(|product| *product <= max)
        })
    }

    /// The choices of the `index`th combination.
    fn combination(&self, mut index: u64) -> Vec<usize> {
        let digit = |decision: &Decision| {
            let options = decision.changes.len() as u64 + 1;
            let choice = index % options;
            index /= options;
            usize::try_from(choice).expect("no more than the changes, which are counted by a usize")
        };
        self.decisions.iter().map(digit).collect()
    }

    /// Choices drawn at random, of a shape drawn at random.
    pub(super) fn draw(&self, rng: &mut Rng) -> Vec<usize> {
        let all = |choose: &mut dyn FnMut(&Decision) -> usize| self.decisions.iter().map(choose).collect();
        let last = |decision: &Decision| decision.changes.len();
        let odd_one = rng.index(self.decisions.len().max(1));
        let mut position = 0;
        let mut is_odd_one = || {
            position += 1;
            position - 1 == odd_one
        };
        match rng.below(8) {
            0 => all(&mut |_| 0),
            1 => all(&mut |decision| last(decision)),
            2 => {
                let positions: Vec<u64> = self.decisions.iter().flat_map(|d| d.changes.clone()).collect();
                let cut = positions.get(rng.index(positions.len().max(1))).copied().unwrap_or(0);
                all(&mut |decision| decision.changes.iter().filter(|seq| **seq <= cut).count())
            }
            3 => all(&mut |decision| if is_odd_one() { 0 } else { last(decision) }),
            4 => all(&mut |decision| if is_odd_one() { last(decision) } else { 0 }),
            _ => {
                let kept = [0.1, 0.5, 0.9][rng.index(3)];
                all(&mut |decision| match last(decision) {
                    0 => 0,
                    last => {
                        if rng.chance(kept) {
                            1 + rng.index(last)
                        } else {
                            0
                        }
                    }
                })
            }
        }
    }

    /// The state after the power loss, with a number that two of these results share if nothing tells them apart.
    pub(super) fn settle(&self, choices: &[usize]) -> (State, u64) {
        let mut state = self.state.clone();
        for Subject { inode, first, kind } in &self.subjects {
            match kind {
                SubjectKind::File(sectors) => {
                    let size = first + sectors.len();
                    let file = state.file(*inode).after_power_loss(&choices[*first..size], choices[size]);
                    state.replace_file(*inode, file);
                }
                SubjectKind::Dir => state.dir_mut(*inode).settle(|index| choices[first + index] > 0),
            }
        }
        state.forget_unreachable(std::iter::empty());
        let identity = self.identity(choices, &state);
        (state, identity)
    }

    /// A hash over names, and over what the decisions left of files that have one. What no decision touches is the
    /// same in every outcome.
    fn identity(&self, choices: &[usize], settled: &State) -> u64 {
        let mut digest = Digest::new();
        let reachable: BTreeSet<Inode> = settled.nodes().map(|(inode, _)| inode).collect();
        for Subject { inode, first, kind } in self.subjects.iter().filter(|s| reachable.contains(&s.inode)) {
            digest.number(*inode);
            match kind {
                SubjectKind::File(sectors) => {
                    let size = settled.file(*inode).durable_size();
                    digest.number(size);
                    for (index, sector) in sectors.iter().enumerate() {
                        if sector * (SECTOR_BYTES as u64) < size {
                            let index = first + index;
                            digest.number(self.decisions[index].alike[choices[index]] as u64);
                        }
                    }
                }
                SubjectKind::Dir => {
                    settled.dir(*inode).into_iter().for_each(|dir| dir.digest(&mut digest));
                }
            }
        }
        digest.finish()
    }
}

/// Distinct states that a power loss may leave.
pub(super) struct Outcomes {
    loss: PowerLoss,
    plan: Plan,
    seen: BTreeSet<u64>,
}

enum Plan {
    Every { next: u64, end: u64 },
    Sample { rng: Rng, left: u64 },
}

impl Outcomes {
    pub(super) fn new(loss: PowerLoss, max: u64, seed: u64) -> Self {
        let plan = match loss.combinations(max.min(ENUMERATE_MAX)) {
            Some(end) => Plan::Every { next: 0, end },
            None => Plan::Sample { rng: Rng::new(seed), left: max },
        };
        Self { loss, plan, seen: BTreeSet::new() }
    }

    /// The next outcome that was not given before, of one combination after the other.
    fn next_enumerated(&mut self) -> Option<State> {
        loop {
            let Plan::Every { next, end } = &mut self.plan else { return None };
            if next == end {
                return None;
            }
            let index = *next;
            *next += 1;
            let (state, identity) = self.loss.settle(&self.loss.combination(index));
            if self.seen.insert(identity) {
                return Some(state);
            }
        }
    }

    fn next_sampled(&mut self) -> Option<State> {
        let Plan::Sample { rng, left } = &mut self.plan else { return None };
        if *left == 0 {
            return None;
        }
        for _ in 0..STALE_DRAWS_MAX {
            let (state, identity) = self.loss.settle(&self.loss.draw(rng));
            if self.seen.insert(identity) {
                *left -= 1;
                return Some(state);
            }
        }
        *left = 0;
        None
    }
}

impl Iterator for Outcomes {
    type Item = State;

    fn next(&mut self) -> Option<State> {
        match self.plan {
            Plan::Every { .. } => self.next_enumerated(),
            Plan::Sample { .. } => self.next_sampled(),
        }
    }
}
