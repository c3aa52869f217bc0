//! Bytes that people gave or will read: values, ids.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, bail};
use csnap_proto::limits::VALUE_BLOCK_BYTES_MAX;
use csnap_proto::message::lock::ValueChange;
use serde_json::{Value, json};

use crate::args::lock::NewValue;

/// Characters of a value that a line for people shows.
const SHOWN_MAX: usize = 64;

/// Two digits a byte.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes everything");
        text
    })
}

/// The bytes of a text as [`hex`] writes it.
pub(super) fn unhex(text: &str) -> Option<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2);
    let byte = |pair: &[u8]| match pair {
        [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
        _ => None,
    };
    pairs.map(byte).collect()
}

fn digit(character: u8) -> Option<u8> {
    char::from(character).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

/// On one line, in quotes, cut where it is long: for people, not for scripts.
pub(super) fn quoted(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let short: String = text.chars().take(SHOWN_MAX).flat_map(char::escape_debug).collect();
    let more = if text.chars().nth(SHOWN_MAX).is_some() { "…" } else { "" };
    format!("\"{short}{more}\"")
}

/// A name as it is, or without what would break a line.
pub(super) fn shown(name: &str) -> String {
    let odd = |c: char| c.is_control() || c.is_whitespace();
    if name.chars().any(odd) { format!("\"{}\"", name.escape_debug()) } else { name.to_owned() }
}

/// As scripts see bytes: the text, where they are one, and always the digits.
pub(super) fn value_json(bytes: &[u8]) -> Value {
    json!({ "text": std::str::from_utf8(bytes).ok(), "hex": hex(bytes) })
}

/// At most `most` bytes of a file; `-` is stdin.
pub(super) fn read(path: &Path, most: usize, what: &str) -> anyhow::Result<Vec<u8>> {
    let shown = if path == OsStr::new("-") { "stdin".to_owned() } else { path.display().to_string() };
    let mut bytes = Vec::new();
    let limit = most as u64 + 1;
    let taken = if path == OsStr::new("-") {
        std::io::stdin().lock().take(limit).read_to_end(&mut bytes)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes))
    };
    taken.with_context(|| shown.clone())?;
    if bytes.len() > most {
        bail!("{shown} has more than the {most} bytes that {what} may have");
    }
    Ok(bytes)
}

/// A value from the command line, within its limit.
pub(super) fn given(value: &OsStr, most: usize, what: &str) -> anyhow::Result<Vec<u8>> {
    let bytes = value.as_bytes();
    if bytes.len() > most {
        bail!("the value has {} bytes; {what} may have {most}", bytes.len());
    }
    Ok(bytes.to_vec())
}

/// What is to become of a value block.
pub(super) fn change(new: &NewValue) -> anyhow::Result<ValueChange> {
    let what = "a value block";
    Ok(match new {
        NewValue { value: Some(value), .. } => ValueChange::Write(given(value, VALUE_BLOCK_BYTES_MAX, what)?),
        NewValue { value_file: Some(path), .. } => {
            ValueChange::Write(read(path, VALUE_BLOCK_BYTES_MAX, what)?)
        }
        NewValue { invalidate: true, .. } => ValueChange::Invalidate,
        NewValue { .. } => ValueChange::Keep,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_come_back_as_bytes() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(unhex(&hex(&bytes)), Some(bytes));
        for bad in ["0", "0g", "é", "+1"] {
            assert_eq!(unhex(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_value_never_breaks_a_line() {
        assert_eq!(quoted(b"a\nb\"\x1b\xff"), "\"a\\nb\\\"\\u{1b}\u{fffd}\"");
        assert_eq!(quoted(&[b'x'; 100]).chars().filter(|c| *c == 'x').count(), SHOWN_MAX);
        assert_eq!((shown("a/b"), shown("a b\n")), ("a/b".to_owned(), "\"a b\\n\"".to_owned()));
    }
}
