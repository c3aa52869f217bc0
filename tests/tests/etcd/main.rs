//! Nodes that elect their server on a real etcd, each daemon started from its configuration file alone.
//!
//! Needs `CSNAP_ETCD`, the `etcd` of Debian's package etcd-server, which `./test` unpacks (it is never installed, and no
//! service of it is started), and in `CSNAP_BIN_ETCD` a csnap that was built with `--features etcd`. Members listen on the
//! loopback address, on free ports, and go however the test ends. Times are printed, never asserted.

#![allow(clippy::disallowed_methods, reason = "real processes take real time")]
#![allow(clippy::cast_possible_truncation, reason = "patterns and sizes of tests are what they are")]

#[allow(dead_code, reason = "shared with the tests of whole processes")]
#[path = "../process/cluster.rs"]
mod cluster;
#[allow(dead_code, reason = "shared with the tests of whole processes")]
#[path = "../process/disk.rs"]
mod disk;
mod election;
mod etcd;
#[allow(dead_code, reason = "shared with the tests of whole processes")]
#[path = "../process/nbd.rs"]
mod nbd;
mod nodes;
mod outage;
#[allow(dead_code, reason = "shared with the tests of whole processes")]
#[path = "../process/writer.rs"]
mod writer;
