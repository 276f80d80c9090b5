//! Sizes and durations as people write them: `10GiB`, `4h`, `500ms`.

use std::time::Duration;

use vra::api::vpg::JournalSize;

const BINARY_UNITS: [(&str, u64); 5] =
    [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];

/// Reads a size: a whole number with an optional unit `B`, `KiB`, `MiB`, `GiB` or `TiB`.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits_end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(digits_end);
    let unit = unit.trim();
    let factor = BINARY_UNITS
        .iter()
        .find(|(name, _)| unit.eq_ignore_ascii_case(name) || unit.is_empty() && *name == "B")
        .map(|(_, factor)| *factor);
    match (digits.parse::<u64>(), factor) {
        (Ok(number), Some(factor)) => {
            number.checked_mul(factor).ok_or_else(|| format!("{text} is larger than any disk"))
        }
        _ => Err(format!(
            "{text:?} is not a size; write a whole number and B, KiB, MiB, GiB or TiB, as in 10GiB"
        )),
    }
}

/// Reads the size of a journal: as [`parse_bytes`], or a part of the VM's disks such as `25%`.
pub fn parse_journal_size(text: &str) -> Result<JournalSize, String> {
    match text.trim().strip_suffix('%') {
        None => parse_bytes(text).map(JournalSize::Bytes),
        Some(percent) => percent.trim().parse().map(JournalSize::Percent).map_err(|_| {
            format!("{text:?} is not a part of the disks; write a whole number of percent, as in 25%")
        }),
    }
}

/// Reads a duration such as `500ms`, `30s`, `4h` or `1h 30m`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    text.trim()
        .parse::<jiff::SignedDuration>()
        .ok()
        .and_then(|duration| Duration::try_from(duration).ok())
        .ok_or_else(|| format!("{text:?} is not a duration; write one as 500ms, 30s, 15m, 4h or 2h 30m"))
}

/// `bytes` with the largest unit that keeps it above one, at most one decimal.
pub fn format_bytes(bytes: u64) -> String {
    let (name, factor) =
        BINARY_UNITS.iter().rev().find(|(_, factor)| bytes >= *factor).copied().unwrap_or(("B", 1));
    if bytes.is_multiple_of(factor) {
        format!("{} {name}", bytes / factor)
    } else {
        format!("{:.1} {name}", bytes as f64 / factor as f64)
    }
}

/// A duration given in microseconds, in the two largest units that matter.
pub fn format_duration_us(us: u64) -> String {
    let seconds = us / 1_000_000;
    match seconds {
        0 if us < 1_000 => format!("{us} us"),
        0 => format!("{} ms", us / 1_000),
        1..=9 => format!("{:.1} s", us as f64 / 1e6),
        10..=119 => format!("{seconds} s"),
        120..=7_199 => format!("{} min {} s", seconds / 60, seconds % 60),
        7_200..=172_799 => format!("{} h {} min", seconds / 3_600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3_600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!(parse_journal_size("25%"), Ok(JournalSize::Percent(25)));
        assert_eq!(parse_journal_size("2 GiB"), Ok(JournalSize::Bytes(2 << 30)));
        assert!(parse_journal_size("2.5%").is_err() && parse_journal_size("-1%").is_err());
        assert_eq!(parse_bytes("10GiB"), Ok(10 << 30));
        assert_eq!(parse_bytes(" 4 kib "), Ok(4096));
        assert_eq!(parse_bytes("512"), Ok(512));
        for wrong in ["", "GiB", "10GB", "-1", "1.5GiB", "99999999999TiB"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn durations_are_read() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("1h 30m"), Ok(Duration::from_secs(5_400)));
        for wrong in ["", "5", "-5s", "soon"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_shown_is_short() {
        assert_eq!(format_bytes(10 << 30), "10 GiB");
        assert_eq!(format_bytes(1536), "1.5 KiB");
        assert_eq!(format_bytes(0), "0 B");
        assert_eq!(format_duration_us(250_000), "250 ms");
        assert_eq!(format_duration_us(4_200_000), "4.2 s");
        assert_eq!(format_duration_us(3_700_000_000), "61 min 40 s");
    }
}
