//! Flags of lock requests, with the names and meanings that they have in the VMS and Linux lock managers.

use std::fmt;
use std::ops::BitOr;

use serde::{Deserialize, Serialize};

/// A set of flags. Which go together, and with what, is checked where the request is; a request with a set that makes no
/// sense is refused with the reason.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Flags(u16);

impl Flags {
    /// No flag.
    pub const NONE: Self = Self(0);
    /// Refuse rather than queue.
    pub const NOQUEUE: Self = Self(1);
    /// With NOQUEUE: holders that are in the way are told all the same.
    pub const NOQUEUEBAST: Self = Self(1 << 1);
    /// A conversion to a higher mode waits behind conversions that wait, instead of overtaking them.
    pub const QUECVT: Self = Self(1 << 2);
    /// A conversion that would be in a conversion deadlock gives its granted mode up (to NL) and waits on.
    pub const CONVDEADLK: Self = Self(1 << 3);
    /// A request that closes a circle of waits is queued and told so, rather than refused; and its own wait does not
    /// count in anybody's circle.
    pub const NODLCKWT: Self = Self(1 << 4);
    /// A new NL lock is granted whoever waits.
    pub const EXPEDITE: Self = Self(1 << 5);
    /// If it must wait, at the head of its queue.
    pub const HEADQUE: Self = Self(1 << 6);
    /// Granted as soon as no granted lock is in the way, whoever waits before it.
    pub const NOORDER: Self = Self(1 << 7);
    /// PR instead of the wanted mode, where that is grantable at once and the wanted one is not.
    pub const ALTPR: Self = Self(1 << 8);
    /// CW instead of the wanted mode, in the same way.
    pub const ALTCW: Self = Self(1 << 9);
    /// Unlock also what waits.
    pub const FORCEUNLOCK: Self = Self(1 << 10);

    /// Every flag with its name.
    pub const ALL: [(&'static str, Self); 11] = [
        ("NOQUEUE", Self::NOQUEUE),
        ("NOQUEUEBAST", Self::NOQUEUEBAST),
        ("QUECVT", Self::QUECVT),
        ("CONVDEADLK", Self::CONVDEADLK),
        ("NODLCKWT", Self::NODLCKWT),
        ("EXPEDITE", Self::EXPEDITE),
        ("HEADQUE", Self::HEADQUE),
        ("NOORDER", Self::NOORDER),
        ("ALTPR", Self::ALTPR),
        ("ALTCW", Self::ALTCW),
        ("FORCEUNLOCK", Self::FORCEUNLOCK),
    ];

    /// Whether all flags of `other` are in this set.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether any flag of `other` is in this set.
    #[must_use]
    pub const fn has_any(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// The set without the flags of `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// No bit beyond the flags that there are: what came over a wire may have others.
    #[must_use]
    pub fn is_known(self) -> bool {
        let known = Self::ALL.iter().fold(Self::NONE, |all, (_, flag)| all | *flag);
        self.without(known) == Self::NONE
    }
}

impl BitOr for Flags {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set = Self::ALL.iter().filter(|(_, flag)| self.has(*flag));
        let names: Vec<&str> = set.map(|(name, _)| *name).collect();
        f.write_str(&names.join("|"))
    }
}

impl fmt::Debug for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Flags({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flag_is_a_bit_of_its_own() {
        for (at, (name, flag)) in Flags::ALL.iter().enumerate() {
            assert!(flag.is_known(), "{name}");
            assert_eq!(flag.to_string(), *name);
            for (_, other) in &Flags::ALL[at + 1..] {
                assert!(!flag.has_any(*other), "{name}");
            }
        }
        assert!(!Flags(1 << 11).is_known());
    }
}
