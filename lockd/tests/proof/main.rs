//! The proof of the lock table: the real one against a naive model written from the tables of docs/lockd.md, over random
//! histories; every state of a small world; and breaks of the rules that both must notice.
//!
//! | variable | default | meaning |
//! |---|---|---|
//! | `CSNAP_LOCK_OPERATIONS` | 60,000 | random operations |
//! | `CSNAP_LOCK_SEED` | 1 | seed of the first history |
//! | `CSNAP_LOCK_DEPTH` | 5 | operations of the search without flags |
//! | `CSNAP_LOCK_FLAG_DEPTH` | 3 | operations of the searches with one flag each |
//! | `CSNAP_LOCK_MIXED_DEPTH` | 3 | operations of the search with all flags mixed |
//! | `CSNAP_LOCK_STATES` | unset | a search ends early with so many states; the one with all flags mixed must reach them |

#[cfg(feature = "canary")]
mod canaries;
mod model;
mod moved;
mod random;
mod search;
mod store;
mod tables;
