//! Which one rule is broken on purpose: none, outside tests. Who owns rules lists them in a `canary` module of its own.

#[cfg(not(feature = "canary"))]
use std::marker::PhantomData;

/// The one of the rules `C` that is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken<C> {
    #[cfg(feature = "canary")]
    rule: Option<C>,
    #[cfg(not(feature = "canary"))]
    rule: PhantomData<C>,
}

impl<C> Broken<C> {
    /// None.
    pub const NONE: Self = Self {
        #[cfg(feature = "canary")]
        rule: None,
        #[cfg(not(feature = "canary"))]
        rule: PhantomData,
    };
}

impl<C> Default for Broken<C> {
    fn default() -> Self {
        Self::NONE
    }
}

impl<C: Copy + PartialEq> Broken<C> {
    /// Breaks this one.
    #[cfg(feature = "canary")]
    #[must_use]
    pub fn rule(rule: C) -> Self {
        Self { rule: Some(rule) }
    }

    /// Whether to break `rule`.
    #[cfg(feature = "canary")]
    #[must_use]
    pub fn breaks(self, rule: C) -> bool {
        self.rule == Some(rule)
    }

    /// Whether to break `rule`: never.
    #[cfg(not(feature = "canary"))]
    #[must_use]
    #[allow(clippy::unused_self, reason = "the same call with and without the feature")]
    pub fn breaks(self, _rule: C) -> bool {
        false
    }
}
