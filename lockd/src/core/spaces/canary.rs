//! Deliberate breaks of the rules by which lockspaces move, each of which `lockd/tests/spaces` must catch. They exist only
//! under the cargo feature `canary`, which no release build has; without it every question is `false`.

/// A rule to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Canary {
    /// Tell the destination to serve before it is durable at the source that it does no more.
    ActivateBeforeForward,
    /// Serve a lockspace again that is forwarded.
    ThawAfterForward,
    /// Answer operations on a frozen lockspace, whose table was sent away.
    ApplyWhileFrozen,
    /// Begin a session at its destination with less than its full lease.
    ShortenLeases,
}

impl Canary {
    /// All of them, with the names by which they are chosen.
    pub const ALL: [(Self, &'static str); 4] = [
        (Self::ActivateBeforeForward, "activate-before-forward"),
        (Self::ThawAfterForward, "thaw-after-forward"),
        (Self::ApplyWhileFrozen, "apply-while-frozen"),
        (Self::ShortenLeases, "shorten-leases"),
    ];
}

/// The one rule that these lockspaces break: none, outside tests.
pub type Broken = crate::broken::Broken<Canary>;
