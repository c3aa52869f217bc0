//! The tables that the model goes by, as they stand in docs/lockd.md.

use csnap_proto::message::lock::Mode;

pub(crate) const MODES: [Mode; 6] = [Mode::Nl, Mode::Cr, Mode::Cw, Mode::Pr, Mode::Pw, Mode::Ex];

/// Row: granted; column: requested.
const COMPATIBLE: [&str; 6] = ["yyyyyy", "yyyyy-", "yyy---", "yy-y--", "yy----", "y-----"];

/// Row: granted; column: requested. R returned, W written.
const DIRECTION: [&str; 6] = ["RRRRRR", ".RRRRR", "..RRRR", "...RRR", "WWWWWR", "WWWWWW"];

/// Row: granted; column: requested.
const QUEUES_CONVERSION: [&str; 6] = ["-yyyyy", "--yyyy", "---yyy", "--y-yy", "-----y", "------"];

fn cell(table: &[&str; 6], row: Mode, column: Mode) -> u8 {
    let at = |mode: Mode| MODES.iter().position(|other| *other == mode).expect("one of six");
    table[at(row)].as_bytes()[at(column)]
}

pub(crate) fn compatible(granted: Mode, requested: Mode) -> bool {
    cell(&COMPATIBLE, granted, requested) == b'y'
}

pub(crate) fn reads(from: Option<Mode>, to: Mode) -> bool {
    from.is_none_or(|from| cell(&DIRECTION, from, to) == b'R')
}

pub(crate) fn writes(from: Mode, to: Mode) -> bool {
    cell(&DIRECTION, from, to) == b'W'
}

pub(crate) fn queues_conversion(from: Mode, to: Mode) -> bool {
    cell(&QUEUES_CONVERSION, from, to) == b'y'
}

/// PW and EX.
pub(crate) fn is_writer(mode: Option<Mode>) -> bool {
    matches!(mode, Some(Mode::Pw | Mode::Ex))
}
