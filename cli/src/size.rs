//! Sizes as people write them: bytes, or a number with K, M, G or T, each 1024 times the one before.

/// Parses a size in bytes. The error is one line.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        other => {
            return Err(format!(
                "unit {other:?} is not known; use K, M, G or T (1024 each), or no unit for bytes"
            ));
        }
    };
    let number: u64 =
        digits.parse().map_err(|_| format!("{text:?} is not a size; write bytes, or 64K, 10G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is beyond 64 bits"))
}

/// Shows bytes in the largest unit that loses nothing a person would miss.
pub(crate) fn show(bytes: u64) -> String {
    let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
    let Some((shift, unit)) = units.into_iter().find(|(shift, _)| bytes >> shift > 0) else {
        return bytes.to_string();
    };
    let (whole, rest) = (bytes >> shift, bytes & ((1 << shift) - 1));
    if rest == 0 { format!("{whole}{unit}") } else { format!("{whole}.{}{unit}", (rest * 10) >> shift) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_powers_of_1024() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("64K", 65536), ("10G", 10 << 30), ("2T", 2 << 40), ("1m", 1 << 20)]
        {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused_in_one_line() {
        for text in ["", "G", "-1", "1.5G", "10GB", "10 G", "0x10", "99999999999999999999", "99999999T", "１"]
        {
            let error = parse(text).expect_err(text);
            assert!(!error.is_empty() && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn shown_sizes_are_short() {
        for (bytes, text) in [(0, "0"), (1023, "1023"), (1 << 30, "1G"), (1536, "1.5K"), (15 << 40, "15T")] {
            assert_eq!(show(bytes), text);
        }
    }
}
