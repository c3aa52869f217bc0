//! Which seeds a crash exploration goes through: what its environment asks for. Each exploration includes this file.

use std::ops::Range;

/// `CSNAP_CRASH_SEED=n`: exactly that one. Otherwise `CSNAP_CRASH_SEEDS` of them, `default` if it does not say.
pub(crate) fn seeds(default: u64) -> Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    match number("CSNAP_CRASH_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("CSNAP_CRASH_SEEDS").unwrap_or(default),
    }
}
