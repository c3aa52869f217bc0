//! The six modes: which go together, which way the value block moves. Pure tables, as in the VMS and Linux lock
//! managers (`__dlm_compat_matrix` and `dlm_lvb_operations` of Linux's `fs/dlm/lock.c`).

use csnap_proto::message::lock::Mode;

/// Every mode, lowest first. CW and PR are not comparable: neither includes the other.
pub const MODES: [Mode; 6] = [Mode::Nl, Mode::Cr, Mode::Cw, Mode::Pr, Mode::Pw, Mode::Ex];

const COMPATIBLE: [[bool; 6]; 6] = {
    const Y: bool = true;
    const N: bool = false;
    [
        // NL CR CW PR PW EX
        [Y, Y, Y, Y, Y, Y], // NL
        [Y, Y, Y, Y, Y, N], // CR
        [Y, Y, Y, N, N, N], // CW
        [Y, Y, N, Y, N, N], // PR
        [Y, Y, N, N, N, N], // PW
        [Y, N, N, N, N, N], // EX
    ]
};

/// Whether locks of these two modes may be granted on one resource at once.
#[must_use]
pub fn compatible(a: Mode, b: Mode) -> bool {
    COMPATIBLE[a as usize][b as usize]
}

/// Whether the holder may write the value block: PW and EX. At most one such lock is granted on a resource.
#[must_use]
pub fn is_writer(mode: Mode) -> bool {
    matches!(mode, Mode::Pw | Mode::Ex)
}

/// What happens to the value block on a conversion.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// The resource's value goes to the lock's owner.
    Read,
    /// The owner's value goes to the resource.
    Write,
    /// Nothing.
    Nothing,
}

/// Direction of a conversion. New locks always read; unlocking writes from PW and EX.
#[must_use]
pub fn direction(from: Mode, to: Mode) -> Direction {
    if is_writer(from) {
        // PW to EX is the one conversion from a writer mode that goes up: it reads.
        return if from == Mode::Pw && to == Mode::Ex { Direction::Read } else { Direction::Write };
    }
    // CW to PR and to itself read, PR to CW does not: a lower row of the matrix is never read from a higher one.
    if to >= from { Direction::Read } else { Direction::Nothing }
}

/// Whether a conversion may ask to be queued (QUECVT): those to a higher mode, and those between CW and PR.
#[must_use]
pub fn queues_conversion(from: Mode, to: Mode) -> bool {
    to > from || (from, to) == (Mode::Pr, Mode::Cw)
}

const _: () = {
    let mut a = 0;
    while a < 6 {
        let mut b = 0;
        while b < 6 {
            assert!(COMPATIBLE[a][b] == COMPATIBLE[b][a]);
            b += 1;
        }
        a += 1;
    }
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_go_together_as_in_the_matrix() {
        let rows = ["yyyyyy", "yyyyy-", "yyy---", "yy-y--", "yy----", "y-----"];
        for (granted, row) in MODES.iter().zip(rows) {
            for (requested, cell) in MODES.iter().zip(row.chars()) {
                assert_eq!(compatible(*granted, *requested), cell == 'y', "{granted:?} with {requested:?}");
            }
        }
    }

    #[test]
    fn value_blocks_move_as_in_the_table() {
        // Columns NL CR CW PR PW EX; the rows "new" and "unlock" are in the table's own tests.
        let rows = ["RRRRRR", ".RRRRR", "..RRRR", "...RRR", "WWWWWR", "WWWWWW"];
        for (from, row) in MODES.iter().zip(rows) {
            for (to, cell) in MODES.iter().zip(row.chars()) {
                let expected = match cell {
                    'R' => Direction::Read,
                    'W' => Direction::Write,
                    _ => Direction::Nothing,
                };
                assert_eq!(direction(*from, *to), expected, "{from:?} to {to:?}");
            }
        }
    }

    #[test]
    fn a_conversion_that_writes_never_waits() {
        for from in MODES {
            for to in MODES {
                let widens = MODES.iter().any(|other| compatible(from, *other) && !compatible(to, *other));
                assert!(direction(from, to) != Direction::Write || !widens, "{from:?} to {to:?}");
            }
        }
    }
}
