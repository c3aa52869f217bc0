//! Deliberate breaks of the rules of the core, and of the procedures that carry its outputs out, each of which the
//! simulated world or the crash exploration of operations must catch. They exist only under the cargo feature `canary`,
//! which no release build has; without it every question is `false`.

/// A rule to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Canary {
    /// Take a writer that comes back during a create for drained.
    NotDrainedAnew,
    /// Make a snapshot without asking the writer to drain.
    SkipDrain,
    /// Grant shared chunks at once, and copy them out afterwards.
    GrantBeforeCopy,
    /// Confirm a snapshot read whose mark a grant broke.
    ConfirmBrokenMark,
    /// Confirm a snapshot read that was begun on another connection.
    ConfirmElsewhere,
    /// Carry a resent request out again.
    ApplyTwice,
    /// Take freed space for reusable although clients may still read it.
    ReuseHeldSpace,
    /// Give freed space back before the record that freed it is durable.
    FreeBeforeRecord,
    /// Remove the head of a deleted volume before the record of the delete is durable.
    RemoveBeforeRecord,
    /// Record a volume whose head has no durable size.
    LeaveHeadUnsynced,
    /// Record a volume whose head has no durable name.
    LeaveHeadUnnamed,
    /// Record a head as removed whose name may come back.
    LeaveRemovalUnsynced,
    /// Record space in an arena that has no durable name.
    LeaveArenaUnnamed,
    /// Record a copy-out whose data is not durable.
    LeaveCopyUnsynced,
    /// Make a snapshot of a head that nobody synced.
    SkipHeadSync,
}

impl Canary {
    /// All of them, with the names by which they are chosen.
    pub const ALL: [(Self, &'static str); 15] = [
        (Self::NotDrainedAnew, "not-drained-anew"),
        (Self::SkipDrain, "skip-drain"),
        (Self::GrantBeforeCopy, "grant-before-copy"),
        (Self::ConfirmBrokenMark, "confirm-broken-mark"),
        (Self::ConfirmElsewhere, "confirm-elsewhere"),
        (Self::ApplyTwice, "apply-twice"),
        (Self::ReuseHeldSpace, "reuse-held-space"),
        (Self::FreeBeforeRecord, "free-before-record"),
        (Self::RemoveBeforeRecord, "remove-before-record"),
        (Self::LeaveHeadUnsynced, "leave-head-unsynced"),
        (Self::LeaveHeadUnnamed, "leave-head-unnamed"),
        (Self::LeaveRemovalUnsynced, "leave-removal-unsynced"),
        (Self::LeaveArenaUnnamed, "leave-arena-unnamed"),
        (Self::LeaveCopyUnsynced, "leave-copy-unsynced"),
        (Self::SkipHeadSync, "skip-head-sync"),
    ];
}

/// The one rule that this server breaks: none, outside tests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Broken {
    #[cfg(feature = "canary")]
    rule: Option<Canary>,
}

impl Broken {
    /// Breaks this one.
    #[cfg(feature = "canary")]
    #[must_use]
    pub fn rule(rule: Canary) -> Self {
        Self { rule: Some(rule) }
    }

    /// Whether to break `rule`.
    #[cfg(feature = "canary")]
    #[must_use]
    pub fn breaks(self, rule: Canary) -> bool {
        self.rule == Some(rule)
    }

    /// Whether to break `rule`: never.
    #[cfg(not(feature = "canary"))]
    #[must_use]
    #[allow(clippy::unused_self, reason = "the same call with and without the feature")]
    pub const fn breaks(self, _rule: Canary) -> bool {
        false
    }
}
