//! Deliberate breaks of the core's rules, each of which the simulated world must catch. They exist only under the cargo
//! feature `canary`, which no release build has; without it every question is `false`.

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
}

impl Canary {
    /// All of them, with the names by which they are chosen.
    pub const ALL: [(Self, &'static str); 7] = [
        (Self::NotDrainedAnew, "not-drained-anew"),
        (Self::SkipDrain, "skip-drain"),
        (Self::GrantBeforeCopy, "grant-before-copy"),
        (Self::ConfirmBrokenMark, "confirm-broken-mark"),
        (Self::ConfirmElsewhere, "confirm-elsewhere"),
        (Self::ApplyTwice, "apply-twice"),
        (Self::ReuseHeldSpace, "reuse-held-space"),
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
