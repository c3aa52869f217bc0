//! The lock service on etcd: what an agent's session asks of lockd, done with keys, transactions, a lease and a watch.
//!
//! [`Session`] is pure. Towards the agent it speaks the conversation of [`csnap_proto::message::lock`], as lockd would on a
//! connection, so the agent's core and its lockd client know nothing of etcd; towards etcd it asks for [`Call`]s and takes
//! in [`Answer`]s and [`News`]. `shell/etcd.rs` (feature `etcd`) carries them out. What it is not: a lock manager. It
//! does the one lock that agents elect their server with, and says of everything else that etcd cannot do it
//! (docs/etcd.md has the table).
//!
//! | key, after the prefix | written by | lease | content |
//! |---|---|---|---|
//! | `members/<session>` | its session | yes | [`MemberRecord`] |
//! | `lock` | whoever takes it, if it is absent | yes | [`LockRecord`] |
//! | `term` | together with `lock` | no | the term of the latest holder |
//! | `value` | the holder | no | [`ValueRecord`] |
//!
//! - `config`: where etcd is; `keys`: names and contents; `call`: what is asked of etcd; `mirror`: the keys as they were
//!   at a revision, and what that means; `goal`: an operation as a goal, with the transaction that comes next;
//!   `session`: the conversation.
//!
//! Invariants:
//! - every transaction of a holder is guarded by the create revision of its `lock` key: a deposed one changes nothing;
//! - a term is written only together with a new `lock`, above the term that is there, guarded by its revision;
//! - an operation is a goal, held against the keys as they are: sent twice, by whatever connection, it takes effect once,
//!   for what it writes is guarded by the revision of what it replaces;
//! - nothing is answered before the mirror is at the revision of the change, so answers and events keep the order of
//!   revisions;
//! - that the session is over, etcd alone decides: a lease that cannot be renewed is doubted in time
//!   ([`Output::Doubt`]), and the server goes on, for its gate fences it and no lease.

mod call;
mod canary;
mod config;
mod goal;
mod keys;
mod mirror;
mod session;
#[cfg(test)]
pub(crate) mod tests;

pub use self::call::{Answer, Call, Entry, Guard, LeaseId, Put, Revision, Txn};
pub use self::canary::{Broken, Canary};
pub use self::config::{EtcdConfig, lease_ms};
pub use self::keys::{Key, LockRecord, MemberRecord, ValueRecord};
pub use self::session::{Input, LEASE_S_MIN, News, Output, Session};
