//! Power loss: what may be left of everything that was not synced, enumerated or drawn.
//!
//! Each unsynced sector, size and name change is one choice, free of the others. Few choices are tried in every
//! combination; of many, a sample is drawn that favours the shapes that find mistakes: nothing lost, all lost, a
//! prefix in time, one change lost, one change kept.

use std::collections::BTreeSet;

use super::dir::Inode;
use super::rng::{Digest, Rng};
use super::state::{Node, State};

/// Up to so many combinations, all are tried.
pub const ENUMERATE_MAX: u64 = 1 << 12;
/// Draws in a row that gave nothing new, after which a sample is taken for complete.
const STALE_DRAWS_MAX: u32 = 256;

/// Something that a power loss decides.
#[derive(Clone, Copy, Debug)]
enum Subject {
    Sector { file: Inode, sector: u64 },
    Size { file: Inode },
    Name { dir: Inode, index: usize },
}

/// A subject with the position of each change that may have reached the medium. Choice 0 is "none of them".
#[derive(Clone, Debug)]
struct Decision {
    subject: Subject,
    changes: Vec<u64>,
}

/// All decisions of one power loss.
#[derive(Clone)]
pub(super) struct PowerLoss {
    state: State,
    decisions: Vec<Decision>,
}

impl PowerLoss {
    /// `state` must have no operation in flight any more.
    pub(super) fn of(state: State) -> Self {
        let mut decisions = Vec::new();
        for (inode, node) in state.nodes() {
            match node {
                Node::File(file) => {
                    for (sector, versions) in file.unsynced_sectors() {
                        let changes = versions.iter().map(|u| u.seq).collect();
                        decisions
                            .push(Decision { subject: Subject::Sector { file: inode, sector }, changes });
                    }
                    let changes: Vec<u64> = file.unsynced_sizes().iter().map(|u| u.seq).collect();
                    if !changes.is_empty() {
                        decisions.push(Decision { subject: Subject::Size { file: inode }, changes });
                    }
                }
                Node::Dir(dir) => {
                    for (index, change) in dir.unsynced().iter().enumerate() {
                        let subject = Subject::Name { dir: inode, index };
                        decisions.push(Decision { subject, changes: vec![change.seq] });
                    }
                }
            }
        }
        Self { state, decisions }
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
                all(&mut |decision| if rng.chance(kept) { 1 + rng.index(last(decision)) } else { 0 })
            }
        }
    }

    /// The state after the power loss, with a number that two of these results share if nothing tells them apart.
    pub(super) fn settle(&self, choices: &[usize]) -> (State, u64) {
        let mut state = self.state.clone();
        let mut touched = BTreeSet::new();
        let mut names: Vec<(Inode, Vec<bool>)> = Vec::new();
        for (decision, choice) in self.decisions.iter().zip(choices) {
            match decision.subject {
                Subject::Sector { file, sector } => {
                    state.file_mut(file).settle_sector(sector, *choice);
                    touched.insert(file);
                }
                Subject::Size { file } => {
                    state.file_mut(file).settle_size(*choice);
                    touched.insert(file);
                }
                Subject::Name { dir, index } => {
                    if index == 0 {
                        names.push((dir, Vec::new()));
                    }
                    let (_, survivors) =
                        names.last_mut().expect("the first change of a directory comes first");
                    survivors.push(*choice > 0);
                }
            }
        }
        for file in &touched {
            state.file_mut(*file).settled();
        }
        for (dir, survivors) in &names {
            state.dir_mut(*dir).settle(|index| survivors[index]);
        }
        state.forget_unreachable(std::iter::empty());
        let identity = self.identity(&state);
        (state, identity)
    }

    /// A hash over what the decisions left, of files that still have a name. What no decision touches is the same
    /// in every outcome.
    fn identity(&self, settled: &State) -> u64 {
        let mut digest = Digest::new();
        let reachable: BTreeSet<Inode> = settled.nodes().map(|(inode, _)| inode).collect();
        for inode in &reachable {
            digest.number(*inode);
            if let Some(dir) = settled.dir(*inode) {
                dir.digest(&mut digest);
            }
        }
        for decision in &self.decisions {
            match decision.subject {
                Subject::Sector { file, sector } if reachable.contains(&file) => {
                    digest.bytes(settled.file(file).durable_sector(sector));
                }
                Subject::Size { file } if reachable.contains(&file) => {
                    digest.number(settled.file(file).durable_size());
                }
                _ => {}
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
