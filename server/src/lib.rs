//! The csnap server: versioned chunk map, snapshots, journal, terms.

pub mod term;
