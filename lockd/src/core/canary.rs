//! Deliberate breaks of the table's rules, each of which the proof of the table must catch. They exist only under the
//! cargo feature `canary`, which no release build has; without it every question is `false`.

/// A rule to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Canary {
    /// Grant a new lock although conversions wait.
    PassTheConvertQueue,
    /// Grant nothing after a cancel.
    NoWakeupAfterCancel,
    /// Leave the value block valid when a writer's session ends.
    KeepValidityAtDeath,
    /// Forget the highest term with the last lock on a resource.
    ReuseTermAfterDelete,
    /// Adopt without looking at the secret.
    AdoptWithoutSecret,
    /// Adopt under the old term.
    AdoptWithoutNewTerm,
    /// Let go of persistent locks with the session.
    DropOrphans,
    /// Never look for circles of waits over several resources.
    IgnoreCircles,
    /// Take a resent operation for a new one.
    ApplyTwice,
    /// Begin a key that is made anew at version 1.
    ReuseVersionAfterDelete,
    /// Keep ephemeral keys when their session ends.
    KeepEphemerals,
}

impl Canary {
    /// All of them, with the names by which they are chosen.
    pub const ALL: [(Self, &'static str); 11] = [
        (Self::PassTheConvertQueue, "pass-the-convert-queue"),
        (Self::NoWakeupAfterCancel, "no-wakeup-after-cancel"),
        (Self::KeepValidityAtDeath, "keep-validity-at-death"),
        (Self::ReuseTermAfterDelete, "reuse-term-after-delete"),
        (Self::AdoptWithoutSecret, "adopt-without-secret"),
        (Self::AdoptWithoutNewTerm, "adopt-without-new-term"),
        (Self::DropOrphans, "drop-orphans"),
        (Self::IgnoreCircles, "ignore-circles"),
        (Self::ApplyTwice, "apply-twice"),
        (Self::ReuseVersionAfterDelete, "reuse-version-after-delete"),
        (Self::KeepEphemerals, "keep-ephemerals"),
    ];
}

/// The one rule that this table breaks: none, outside tests.
pub type Broken = crate::broken::Broken<Canary>;
