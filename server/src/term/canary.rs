//! Deliberate breaks of the rules of terms, each of which the crash exploration must catch. They exist only under the
//! cargo feature `canary`, which no release build has; without it [`Canaries`] is empty and every question is `false`.

/// A rule to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Canary {
    /// Answer before the journal is synced.
    AcknowledgeBeforeSync,
    /// Answer without a look at the gate.
    ActWithoutGate,
    /// Look at the gate, then make the record durable.
    GateBeforeSync,
    /// Look for a term's Seal, then close its gate.
    SealBeforeGate,
    /// Replace a `successor` that is there.
    TwoSuccessors,
    /// Begin the walk at the term below one's own, sealed or not.
    StartAnywhere,
    /// Walk on past a later term.
    PassHigherTerm,
    /// Cut off damage wherever it lies.
    CorruptAsTorn,
    /// Take the last frame of the base for durable because it can be read.
    TrustTheCache,
}

impl Canary {
    /// All of them, with the names by which they are chosen.
    pub const ALL: [(Self, &'static str); 9] = [
        (Self::AcknowledgeBeforeSync, "acknowledge-before-sync"),
        (Self::ActWithoutGate, "act-without-gate"),
        (Self::GateBeforeSync, "gate-before-sync"),
        (Self::SealBeforeGate, "seal-before-gate"),
        (Self::TwoSuccessors, "two-successors"),
        (Self::StartAnywhere, "start-anywhere"),
        (Self::PassHigherTerm, "pass-higher-term"),
        (Self::CorruptAsTorn, "corrupt-as-torn"),
        (Self::TrustTheCache, "trust-the-cache"),
    ];

    /// The rule of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known)| *known == name).map(|(canary, _)| *canary)
    }
}

/// The rules that this process breaks: none, outside tests.
#[derive(Clone, Debug, Default)]
pub struct Canaries {
    #[cfg(feature = "canary")]
    broken: std::collections::BTreeSet<Canary>,
}

impl Canaries {
    /// Breaks these.
    #[cfg(feature = "canary")]
    #[must_use]
    pub fn breaking(broken: impl IntoIterator<Item = Canary>) -> Self {
        Self { broken: broken.into_iter().collect() }
    }

    /// Whether to break this one.
    #[cfg(feature = "canary")]
    #[must_use]
    pub fn breaks(&self, canary: Canary) -> bool {
        self.broken.contains(&canary)
    }

    /// Whether to break this one: never.
    #[cfg(not(feature = "canary"))]
    #[must_use]
    #[allow(clippy::unused_self, reason = "the same call with and without the feature")]
    pub const fn breaks(&self, _canary: Canary) -> bool {
        false
    }
}
