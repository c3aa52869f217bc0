//! Deliberate breaks of the rules that a session keeps, each of which a test must catch. They exist only under the cargo
//! feature `canary`, which no release build has; without it every question is `false`.

/// A rule to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Canary {
    /// A holder writes without the guards that it is the holder still, and that nobody wrote meanwhile.
    WriteUnguarded,
    /// Whoever takes the lock does not look whether the term has moved on.
    TakeUnguarded,
    /// A session goes on though etcd's revisions went back.
    ResumeOverRestore,
}

/// The one rule that this session breaks: none, outside tests.
pub type Broken = csnap_lockd::broken::Broken<Canary>;
