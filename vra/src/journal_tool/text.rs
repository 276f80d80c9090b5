//! Numbers and times for people.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use journal::batch::CheckpointKind;
use journal::crypt::{Encryption, WrappedKey};
use journal::format::SegmentHeader;

/// A time in the local zone, to the millisecond.
pub(super) fn time(time_us: u64) -> String {
    let timestamp = i64::try_from(time_us).ok().and_then(|time_us| Timestamp::from_microsecond(time_us).ok());
    match timestamp {
        Some(timestamp) => {
            timestamp.to_zoned(TimeZone::system()).strftime("%Y-%m-%dT%H:%M:%S.%3f%:z").to_string()
        }
        None => format!("{time_us} µs"),
    }
}

/// What made a checkpoint, in a word.
pub(super) fn checkpoint_kind(kind: CheckpointKind) -> &'static str {
    match kind {
        CheckpointKind::Automatic => "automatic",
        CheckpointKind::Tagged => "tagged",
        CheckpointKind::Application => "application",
    }
}

/// How segments are encrypted that begin from now on: a word, and the key.
pub(super) fn encryption(encryption: &Encryption) -> (&'static str, Option<&WrappedKey>) {
    match encryption {
        Encryption::Never => ("none", None),
        Encryption::Off => ("none, but older segments may be", None),
        Encryption::On(key) => (XTS, Some(key)),
    }
}

/// How a segment is encrypted: a word, and the key.
pub(super) fn segment_encryption(header: &SegmentHeader) -> (&'static str, Option<&WrappedKey>) {
    header.encryption.as_ref().map_or(("none", None), |encryption| (XTS, Some(&encryption.key)))
}

const XTS: &str = "AES-256-XTS";

/// A length in the largest unit that leaves at least one.
pub(super) fn bytes(len_bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = len_bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{len_bytes} B") } else { format!("{value:.1} {}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_readable() {
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(64 << 30), "64.0 GiB");
    }
}
