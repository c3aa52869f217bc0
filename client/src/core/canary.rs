//! Deliberate breaks of safety rules, by name, so that the tests can show that they would notice. Without the feature
//! `canary` the set is empty by construction and every question is a constant `false`.

#[cfg(feature = "canary")]
use std::collections::BTreeSet;

/// A safety rule to break.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Canary {
    /// Give a snapshot read's data to the caller after message 2.
    CompleteReadAtMessage2,
    /// Confirm a broken mark: take a Retry for an Ok.
    ConfirmBrokenMark,
    /// Send message 3 on whatever connection there is. Only a server that confirms elsewhere makes it harmful.
    FinishElsewhere,
    /// Answer an Advice at once.
    AdviceWithoutDrain,
    /// Answer an Advice whose id is known at once.
    AdviceNotAnew,
    /// Stop and wait on an Advice, but skip the syncs.
    DrainWithoutSync,
    /// Go on with the unique bits of the old epoch.
    KeepUniqueOverAdvice,
    /// Let a flush share a sync that was under way when it came.
    FlushSharesEarlierSync,
}

impl Canary {
    /// Every one, with the name that a command line knows it by.
    #[cfg(feature = "canary")]
    pub const ALL: [(&'static str, Self); 8] = [
        ("complete-read-at-message-2", Self::CompleteReadAtMessage2),
        ("confirm-broken-mark", Self::ConfirmBrokenMark),
        ("finish-elsewhere", Self::FinishElsewhere),
        ("advice-without-drain", Self::AdviceWithoutDrain),
        ("advice-not-anew", Self::AdviceNotAnew),
        ("drain-without-sync", Self::DrainWithoutSync),
        ("keep-unique-over-advice", Self::KeepUniqueOverAdvice),
        ("flush-shares-earlier-sync", Self::FlushSharesEarlierSync),
    ];
}

/// The breaks that are on.
#[derive(Clone, Default, Debug)]
pub struct Canaries {
    #[cfg(feature = "canary")]
    on: BTreeSet<Canary>,
}

impl Canaries {
    /// A set of breaks.
    #[cfg(feature = "canary")]
    #[must_use]
    pub fn of(canaries: &[Canary]) -> Self {
        Self { on: canaries.iter().copied().collect() }
    }

    #[cfg(feature = "canary")]
    pub(crate) fn has(&self, canary: Canary) -> bool {
        self.on.contains(&canary)
    }

    #[cfg(not(feature = "canary"))]
    #[expect(clippy::unused_self, reason = "same call with and without the feature")]
    pub(crate) const fn has(&self, _: Canary) -> bool {
        false
    }
}
