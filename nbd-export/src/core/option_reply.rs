//! What clients get during negotiation.

use super::limits::{MESSAGE_BYTES_MAX, PAYLOAD_BYTES_ADVERTISED, STRING_BYTES_MAX};
use super::option::Wanted;
use super::wire::{self, info, option_reply, transmission_flag};
use crate::export::{ExportInfo, Listed, OpenError};

/// The greeting.
pub fn greeting(out: &mut Vec<u8>) {
    out.extend_from_slice(&wire::GREETING_MAGIC.to_be_bytes());
    out.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
    let flags = wire::handshake_flag::FIXED_NEWSTYLE | wire::handshake_flag::NO_ZEROES;
    out.extend_from_slice(&flags.to_be_bytes());
}

fn put(out: &mut Vec<u8>, option: u32, kind: u32, parts: &[&[u8]]) {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    out.extend_from_slice(&wire::OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&u32::try_from(len).expect("texts are cut").to_be_bytes());
    parts.iter().for_each(|part| out.extend_from_slice(part));
}

/// `text`, cut to what the protocol allows.
fn cut(text: &str, bytes_max: usize) -> &[u8] {
    let end = (0..=bytes_max.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    &text.as_bytes()[..end]
}

/// Done.
pub fn ack(out: &mut Vec<u8>, option: u32) {
    put(out, option, option_reply::ACK, &[]);
}

/// Not done; `kind` is one of [`option_reply`]'s errors.
pub fn error(out: &mut Vec<u8>, option: u32, kind: u32, message: &str) {
    put(out, option, kind, &[cut(message, MESSAGE_BYTES_MAX)]);
}

/// An export is not given.
pub fn refusal(out: &mut Vec<u8>, option: u32, why: &OpenError) {
    let kind = match why {
        OpenError::NotFound(_) => option_reply::ERR_UNKNOWN,
        OpenError::Busy(_) | OpenError::Refused(_) => option_reply::ERR_POLICY,
        OpenError::ShuttingDown => option_reply::ERR_SHUTDOWN,
    };
    error(out, option, kind, &why.to_string());
}

/// The answer to LIST.
pub fn list(out: &mut Vec<u8>, option: u32, exports: &[Listed]) {
    for export in exports {
        let name = cut(&export.name, STRING_BYTES_MAX);
        let len = u32::try_from(name.len()).expect("cut to 4 KiB").to_be_bytes();
        put(out, option, option_reply::SERVER, &[&len, name, cut(&export.description, STRING_BYTES_MAX)]);
    }
    ack(out, option);
}

/// The context of a list (id 0) or a selection, without the ACK.
pub fn context(out: &mut Vec<u8>, option: u32, id: u32) {
    put(out, option, option_reply::META_CONTEXT, &[&id.to_be_bytes(), b"base:allocation"]);
}

/// What the export can do, as sent to a client that negotiated structured replies or not.
#[must_use]
pub fn transmission_flags(export: &ExportInfo, structured: bool) -> u16 {
    use transmission_flag as flag;
    let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::SEND_CACHE;
    let mut set = |condition: bool, bits: u16| flags |= if condition { bits } else { 0 };
    set(export.read_only, flag::READ_ONLY);
    set(!export.read_only, flag::SEND_TRIM | flag::SEND_WRITE_ZEROES);
    set(!export.read_only && export.fast_zero, flag::SEND_FAST_ZERO);
    set(export.multi_conn, flag::CAN_MULTI_CONN);
    set(structured, flag::SEND_DF);
    flags
}

/// The answer to INFO or GO.
pub fn describe(out: &mut Vec<u8>, option: u32, export: &ExportInfo, wanted: Wanted, structured: bool) {
    let flags = transmission_flags(export, structured).to_be_bytes();
    put(
        out,
        option,
        option_reply::INFO,
        &[&info::EXPORT.to_be_bytes(), &export.size_bytes.to_be_bytes(), &flags],
    );
    if wanted.name {
        put(
            out,
            option,
            option_reply::INFO,
            &[&info::NAME.to_be_bytes(), cut(&export.name, STRING_BYTES_MAX)],
        );
    }
    if wanted.description && !export.description.is_empty() {
        let text = cut(&export.description, STRING_BYTES_MAX);
        put(out, option, option_reply::INFO, &[&info::DESCRIPTION.to_be_bytes(), text]);
    }
    if wanted.block_size {
        let kind = info::BLOCK_SIZE.to_be_bytes();
        let preferred = export.block_preferred.to_be_bytes();
        let largest = PAYLOAD_BYTES_ADVERTISED.to_be_bytes();
        put(out, option, option_reply::INFO, &[&kind, &1u32.to_be_bytes(), &preferred, &largest]);
    }
    ack(out, option);
}

/// The answer to EXPORT_NAME, which has no header.
pub fn export_name(out: &mut Vec<u8>, export: &ExportInfo, structured: bool, no_zeroes: bool) {
    out.extend_from_slice(&export.size_bytes.to_be_bytes());
    out.extend_from_slice(&transmission_flags(export, structured).to_be_bytes());
    if !no_zeroes {
        out.extend_from_slice(&[0; 124]);
    }
}
