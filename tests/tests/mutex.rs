//! A fenced mutex in simulated worlds: clients append under the term of a lock to a register that refuses old terms, while
//! holders are stopped past their lease and lockds die, stop and are cut off. `CSNAP_MUTEX_SEEDS` worlds (300), from the
//! seed `CSNAP_MUTEX_SEED_FIRST` (1) on.

use csnap_tests::mutex;
use csnap_tests::plan::{Canaries, Plan};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

#[test]
fn terms_never_decrease_and_no_acknowledged_append_is_lost() {
    let (first, count) = (number("CSNAP_MUTEX_SEED_FIRST", 1), number("CSNAP_MUTEX_SEEDS", 300));
    let trace = std::env::var_os("CSNAP_TRACE").is_some();
    let sum = mutex::run(first..first + count, 10, |seed| {
        let plan = mutex::plan(seed, Canaries::default());
        Plan { trace, print: trace, ..plan }
    });
    println!(
        "{} worlds: {} grants, {} appends acknowledged, {} with an old term refused, {} holders stopped, {} faults",
        sum.worlds, sum.grants, sum.acknowledged, sum.refused, sum.stopped, sum.faults
    );
    for (seed, what) in &sum.failures {
        println!("seed {seed}: {what}");
    }
    assert!(sum.failures.is_empty(), "{} worlds saw a law broken", sum.failures.len());
    if count >= 100 {
        assert!(sum.refused > 0 && sum.stopped > sum.worlds, "old terms were never tried");
    }
}

#[test]
fn the_same_seed_gives_the_same_world() {
    for seed in [3, 4] {
        let run = || format!("{:?}", mutex::one(mutex::plan(seed, Canaries::default())));
        assert_eq!(run(), run(), "seed {seed}");
    }
}
