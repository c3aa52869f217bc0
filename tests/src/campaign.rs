//! Many worlds, one a seed, on two threads; what they reached together, and which of them saw a law broken.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::plan::Plan;
use crate::tally::Tally;
use crate::world::{Outcome, World};

/// Worlds that are run at once.
const THREADS: usize = 2;

/// A world that went wrong.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Which.
    pub seed: u64,
    /// What was seen.
    pub what: String,
}

/// What a campaign came to.
#[derive(Debug, Default)]
pub struct Report {
    /// Worlds.
    pub worlds: u64,
    /// Virtual time of all worlds, microseconds.
    pub lasted: u64,
    /// Counts of all worlds.
    pub tally: Tally,
    /// Those that went wrong.
    pub failures: Vec<Failure>,
    /// The longest that a guest waited, microseconds.
    pub longest_wait: u64,
    /// The longest that a client stood in a queue for a lock, microseconds.
    pub longest_turn: u64,
    /// Worlds below what each is to see, and of what.
    pub thin: Vec<String>,
}

/// Runs the worlds of `seeds`, each made of its seed's plan by `shape`. Stops early once `enough` worlds went wrong.
#[must_use]
pub fn run(seeds: std::ops::Range<u64>, enough: usize, shape: impl Fn(Plan) -> Plan + Sync) -> Report {
    let next = AtomicU64::new(seeds.start);
    let report = Mutex::new(Report::default());
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let over = report.lock().is_ok_and(|report| report.failures.len() >= enough);
                    if seed >= seeds.end || over {
                        return;
                    }
                    let outcome = one(shape(Plan::of(seed)));
                    if let Ok(mut report) = report.lock() {
                        report.add(outcome, seed);
                    }
                }
            });
        }
    });
    let mut report = report.into_inner().unwrap_or_default();
    report.failures.sort_by_key(|failure| failure.seed);
    report
}

/// One world; a process that panicked is a law broken.
pub fn one(plan: Plan) -> Result<Outcome, String> {
    catch_unwind(AssertUnwindSafe(|| World::run(plan))).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
    })
}

impl Report {
    fn add(&mut self, outcome: Result<Outcome, String>, seed: u64) {
        self.worlds += 1;
        match outcome {
            Ok(outcome) => {
                self.lasted += outcome.lasted;
                self.longest_wait = self.longest_wait.max(outcome.longest_wait);
                self.longest_turn = self.longest_turn.max(outcome.longest_turn);
                self.tally.add(&outcome.tally);
                self.note_thin(&outcome);
                if let Some(what) = outcome.violation {
                    self.failures.push(Failure { seed, what });
                }
            }
            Err(panic) => self.failures.push(Failure { seed, what: format!("panic: {panic}") }),
        }
    }

    fn note_thin(&mut self, outcome: &Outcome) {
        let faults: u64 = outcome.tally.faults.values().sum();
        let seen = [
            ("simulated seconds", outcome.lasted / 1_000_000, 60),
            ("requests", outcome.tally.count("requests"), 2000),
            ("snapshots made", outcome.tally.count("snapshots made"), 3),
            ("faults", faults, 2),
        ];
        for (what, count, least) in seen {
            if count < least && outcome.violation.is_none() {
                self.thin.push(format!("seed {}: {count} {what}, fewer than {least}", outcome.seed));
            }
        }
    }

    /// The figures, a line each.
    #[must_use]
    pub fn figures(&self) -> String {
        let mut text = format!(
            "{} worlds, {} simulated seconds, longest wait of a guest {:.1} s, for a lock {:.1} s\n",
            self.worlds,
            self.lasted / 1_000_000,
            self.longest_wait as f64 / 1e6,
            self.longest_turn as f64 / 1e6
        );
        let tables =
            [("work", &self.tally.work), ("faults", &self.tally.faults), ("states", &self.tally.states)];
        for (title, table) in tables {
            text.push_str(&format!("{title}:\n"));
            for (name, count) in table {
                text.push_str(&format!("  {count:>9}  {name}\n"));
            }
        }
        text
    }
}
