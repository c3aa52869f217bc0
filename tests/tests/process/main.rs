//! The shipped binary as an operator and a hypervisor see it: started, used by real clients, killed, frozen, fed garbage.
//!
//! Every test has a cluster of its own in a temporary directory, on free ports, and leaves nothing behind. Speed is
//! printed, never asserted. `CSNAP_BIN` names the binary (`./test` sets it); without it the one beside this test's own
//! build is used. Larger numbers for campaigns: `CSNAP_KILLS`, `CSNAP_MOVES`, `CSNAP_POINTS`, `CSNAP_HISTORY_SECONDS`,
//! `CSNAP_MUTEX_RUNS`.

#![allow(clippy::disallowed_methods, reason = "real processes take real time")]
#![allow(clippy::cast_possible_truncation, reason = "patterns and sizes of tests are what they are")]

mod certificates;
mod clients;
mod cluster;
mod descriptors;
mod disk;
mod failover;
mod flusher;
mod freeze;
mod full;
mod guest;
mod hostile;
mod inject;
mod inject_others;
mod lifecycle;
mod linearizable;
mod lock_load;
mod lockds;
mod locks;
mod lockspace;
mod messages;
mod mutex;
mod namespaces;
mod nbd;
mod placement;
mod quiet;
mod readers;
mod replicas;
mod service;
mod sizes;
mod slow;
mod steps;
mod story;
mod strace;
mod writer;
