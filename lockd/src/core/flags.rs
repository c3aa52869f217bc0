//! Which flags go with what: the argument checks of Linux's `set_lock_args` and `validate_lock_args`, and those that it
//! leaves out because the flag then means nothing.

use csnap_proto::message::lock::{Flags, Mode};

use super::mode::queues_conversion;

/// Flags that mean something only for a request that may wait.
const WAITING: [(Flags, &str); 3] = [
    (Flags::HEADQUE, "HEADQUE says where to wait, NOQUEUE not to wait: leave one out"),
    (Flags::NODLCKWT, "NODLCKWT says how to wait, NOQUEUE not to wait: leave one out"),
    (Flags::CONVDEADLK, "CONVDEADLK says how to wait, NOQUEUE not to wait: leave one out"),
];

/// Checks the flags of a request for a new lock; the error says what does not go together.
pub fn check_lock(mode: Mode, flags: Flags) -> Result<(), &'static str> {
    if flags.has(Flags::QUECVT) {
        return Err("QUECVT is for conversions");
    }
    if flags.has(Flags::CONVDEADLK) {
        return Err("CONVDEADLK is for conversions");
    }
    if flags.has(Flags::EXPEDITE) && mode != Mode::Nl {
        return Err("EXPEDITE is for new NL locks");
    }
    if flags.has(Flags::EXPEDITE | Flags::NOQUEUE) {
        return Err("EXPEDITE never waits: leave NOQUEUE out");
    }
    check_both(flags)
}

/// Checks the flags of a conversion.
pub fn check_convert(from: Mode, to: Mode, flags: Flags) -> Result<(), &'static str> {
    if flags.has(Flags::EXPEDITE) {
        return Err("EXPEDITE is for new NL locks");
    }
    if flags.has(Flags::QUECVT) && !queues_conversion(from, to) {
        return Err("QUECVT is for conversions to a higher mode, or between CW and PR");
    }
    check_both(flags)
}

/// Checks the flags of an unlock.
pub fn check_unlock(flags: Flags) -> Result<(), &'static str> {
    if flags.without(Flags::FORCEUNLOCK) == Flags::NONE {
        Ok(())
    } else {
        Err("an unlock takes FORCEUNLOCK and no other flag")
    }
}

fn check_both(flags: Flags) -> Result<(), &'static str> {
    if flags.has(Flags::FORCEUNLOCK) {
        return Err("FORCEUNLOCK is for unlocks");
    }
    if flags.has(Flags::NOQUEUEBAST) && !flags.has(Flags::NOQUEUE) {
        return Err("NOQUEUEBAST goes with NOQUEUE: who queues tells holders anyway");
    }
    if flags.has(Flags::ALTPR | Flags::ALTCW) {
        return Err("ALTPR and ALTCW are two alternatives: leave one out");
    }
    let idle = WAITING.iter().find(|(flag, _)| flags.has(*flag | Flags::NOQUEUE));
    idle.map_or(Ok(()), |(_, why)| Err(*why))
}

/// The mode that is as good as the wanted one, if the flags say so.
pub(super) fn alternative(wanted: Mode, flags: Flags) -> Option<Mode> {
    if flags.has(Flags::ALTPR) && wanted != Mode::Pr {
        Some(Mode::Pr)
    } else if flags.has(Flags::ALTCW) && wanted != Mode::Cw {
        Some(Mode::Cw)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::mode::MODES;

    #[test]
    fn queue_conversion_goes_with_the_conversions_of_the_table() {
        // Columns NL CR CW PR PW EX.
        let rows = ["-yyyyy", "--yyyy", "---yyy", "--y-yy", "-----y", "------"];
        for (from, row) in MODES.iter().zip(rows) {
            for (to, cell) in MODES.iter().zip(row.chars()) {
                assert_eq!(
                    check_convert(*from, *to, Flags::QUECVT).is_ok(),
                    cell == 'y',
                    "{from:?} to {to:?}"
                );
            }
        }
    }

    #[test]
    fn flags_that_say_nothing_together_are_refused() {
        let both = [
            Flags::NOQUEUEBAST,
            Flags::NOQUEUE | Flags::HEADQUE,
            Flags::NOQUEUE | Flags::NODLCKWT,
            Flags::ALTPR | Flags::ALTCW,
            Flags::FORCEUNLOCK,
        ];
        for flags in both {
            assert!(check_lock(Mode::Nl, flags).is_err(), "{flags}");
            assert!(check_convert(Mode::Nl, Mode::Ex, flags).is_err(), "{flags}");
        }
        for flags in [Flags::QUECVT, Flags::CONVDEADLK, Flags::EXPEDITE | Flags::NOQUEUE] {
            assert!(check_lock(Mode::Nl, flags).is_err(), "{flags}");
        }
        assert!(check_lock(Mode::Cr, Flags::EXPEDITE).is_err());
        assert!(check_lock(Mode::Nl, Flags::EXPEDITE).is_ok());
        assert!(check_convert(Mode::Nl, Mode::Cr, Flags::EXPEDITE).is_err());
        assert!(check_convert(Mode::Nl, Mode::Cr, Flags::CONVDEADLK | Flags::NOQUEUE).is_err());
        assert!(check_convert(Mode::Nl, Mode::Cr, Flags::NOQUEUE | Flags::NOQUEUEBAST).is_ok());
        for (_, flag) in Flags::ALL {
            assert_eq!(check_unlock(flag).is_ok(), flag == Flags::FORCEUNLOCK);
        }
    }
}
