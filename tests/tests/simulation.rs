//! The campaign: worlds full of faults, and no law broken in any of them. `CSNAP_SEEDS` worlds (200), from the seed
//! `CSNAP_SEED_FIRST` (1) on. One alone, with its trace: `CSNAP_SEEDS=1 CSNAP_SEED_FIRST=n CSNAP_TRACE=1`.

use csnap_tests::campaign;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Worlds in which every named state must be reached.
const WORLDS: u64 = 200;

#[test]
fn no_world_sees_a_law_broken() {
    let (first, count) = (number("CSNAP_SEED_FIRST", 1), number("CSNAP_SEEDS", WORLDS));
    let trace = std::env::var_os("CSNAP_TRACE").is_some();
    let report = campaign::run(first..first + count, 10, |plan| csnap_tests::plan::Plan {
        trace,
        print: trace,
        ..plan
    });
    println!("{}", report.figures());
    for failure in &report.failures {
        println!("seed {}: {}", failure.seed, failure.what);
        println!(
            "  alone: CSNAP_SEEDS=1 CSNAP_SEED_FIRST={} CSNAP_TRACE=1 cargo test -p csnap-tests --test simulation -- --nocapture",
            failure.seed
        );
    }
    assert!(report.failures.is_empty(), "{} worlds saw a law broken", report.failures.len());
    assert!(report.thin.is_empty(), "worlds too thin: {:?}", report.thin);
    if count <= WORLDS {
        assert_eq!(report.tally.count("histories undecided"), 0, "the judge of histories gave up");
    }
    if count >= WORLDS {
        assert_eq!(report.tally.missing(), Vec::<&str>::new(), "states that no world reached");
    }
}
