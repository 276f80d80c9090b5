//! `--at`: which moment of a journal's history is meant.

use std::str::FromStr;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use journal::catalogue::CheckpointEntry;
use journal::view::Reader;

use super::text;
use crate::api::CheckpointId;
use crate::api::ids::CheckpointIdError;

/// A moment as a user names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    /// The newest checkpoint.
    Latest,
    /// The newest checkpoint with this tag.
    Tag(String),
    /// The checkpoint with this id.
    Id(CheckpointId),
    /// A sequence number.
    Seq(u64),
    /// The newest checkpoint at or before this time, µs since the Unix epoch.
    Time(u64),
}

/// A moment of a journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// The last record that counts.
    pub(super) seq: u64,
    /// The checkpoint, unless a number was asked for that is none's.
    pub(super) checkpoint: Option<CheckpointEntry>,
}

/// Why there is no such moment.
#[derive(Debug, thiserror::Error)]
pub(super) enum MomentError {
    #[error("{0:?} is no time: write 2026-11-22T17:30:00Z, or a local 2026-11-22T17:30")]
    Time(String),
    #[error("{0:?} is no sequence number")]
    Seq(String),
    #[error("--at is empty: give latest, a tag, a checkpoint's id, a sequence number or a time")]
    Empty,
    #[error("the journal has no checkpoint that can be opened: {0}")]
    NoCheckpoint(&'static str),
    #[error(transparent)]
    Id(#[from] CheckpointIdError),
    #[error(
        "the journal has no checkpoint {0} that can be opened; `vra-journal checkpoints` lists those that can"
    )]
    NoId(CheckpointId),
    #[error("no checkpoint has the tag {tag:?}; {nearest}")]
    NoTag { tag: String, nearest: String },
    #[error("no checkpoint is as old as {time}; the oldest is {oldest}")]
    TooOld { time: String, oldest: String },
    #[error("record {seq} cannot be opened: {reason}; {nearest}")]
    NotThere { seq: u64, reason: String, nearest: String },
}

impl FromStr for Moment {
    type Err = MomentError;

    /// What has no prefix is a number if it is all digits, a time if it reads as one, else a tag.
    fn from_str(text: &str) -> Result<Self, MomentError> {
        if let Some(tag) = text.strip_prefix("tag:") {
            return Ok(Self::Tag(tag.to_owned()));
        }
        if let Some(seq) = text.strip_prefix("seq:") {
            return seq.parse().map(Self::Seq).map_err(|_| MomentError::Seq(seq.to_owned()));
        }
        if let Some(time) = text.strip_prefix("time:") {
            return parse_time(time).map(Self::Time).ok_or_else(|| MomentError::Time(time.to_owned()));
        }
        if let Some(id) = text.strip_prefix("id:") {
            return Ok(Self::Id(id.parse()?));
        }
        if let Ok(id) = text.parse() {
            return Ok(Self::Id(id));
        }
        if text.is_empty() {
            return Err(MomentError::Empty);
        }
        if text == "latest" {
            return Ok(Self::Latest);
        }
        if let Ok(seq) = text.parse() {
            return Ok(Self::Seq(seq));
        }
        match parse_time(text) {
            Some(time_us) => Ok(Self::Time(time_us)),
            None if looks_like_a_date(text) => Err(MomentError::Time(text.to_owned())),
            None => Ok(Self::Tag(text.to_owned())),
        }
    }
}

/// Whether it begins with a year and a month: a tag of that form is given as `tag:`.
fn looks_like_a_date(text: &str) -> bool {
    let form = "dddd-dd-dd";
    let fits = |(expected, found): (char, char)| match expected {
        'd' => found.is_ascii_digit(),
        other => found == other,
    };
    text.len() >= form.len() && form.chars().zip(text.chars()).all(fits)
}

impl Moment {
    /// Finds it in a journal.
    pub(super) fn find(&self, reader: &Reader) -> Result<Found, MomentError> {
        let checkpoints = reader.catalogue().checkpoints();
        let of =
            |entry: &CheckpointEntry| Found { seq: entry.checkpoint.cut, checkpoint: Some(entry.clone()) };
        if let Self::Seq(seq) = *self {
            return match reader.view(seq) {
                Ok(_) => {
                    let mut same = checkpoints.iter().rev().filter(|entry| entry.checkpoint.cut == seq);
                    Ok(Found { seq, checkpoint: same.next().cloned() })
                }
                Err(error) => Err(MomentError::NotThere {
                    seq,
                    reason: error.to_string(),
                    nearest: nearest(checkpoints, |entry| entry.checkpoint.cut.abs_diff(seq)),
                }),
            };
        }
        let Some(newest) = checkpoints.last() else {
            let survey = &reader.survey;
            let is_damaged =
                survey.damage.is_some() || survey.hidden.is_some() || reader.gaps().next().is_some();
            return Err(MomentError::NoCheckpoint(if survey.superblock.state.is_base_sync() {
                "a full sync has not ended"
            } else if is_damaged {
                "records are lost; `vra-journal verify` names them"
            } else {
                "none was made since the last full sync ended"
            }));
        };
        match self {
            Self::Latest | Self::Seq(_) => Ok(of(newest)),
            Self::Tag(tag) => {
                let tagged = checkpoints.iter().rev().find(|entry| entry.checkpoint.tag == *tag);
                tagged.map(of).ok_or_else(|| MomentError::NoTag {
                    tag: tag.clone(),
                    nearest: nearest(checkpoints, |entry| distance(&entry.checkpoint.tag, tag)),
                })
            }
            Self::Id(id) => {
                let same = checkpoints.iter().rev().find(|entry| id_of(entry) == *id);
                same.map(of).ok_or(MomentError::NoId(*id))
            }
            Self::Time(time_us) => {
                let found = reader.catalogue().newest_until(*time_us);
                found.map(of).ok_or_else(|| MomentError::TooOld {
                    time: text::time(*time_us),
                    oldest: describe(&checkpoints[0]),
                })
            }
        }
    }
}

/// A checkpoint's id, the same in all journals of its group (D1).
pub(super) fn id_of(entry: &CheckpointEntry) -> CheckpointId {
    let epoch = entry.checkpoint.epoch;
    CheckpointId { nonce: epoch.nonce.as_u128(), counter: epoch.counter }
}

/// A checkpoint in words.
pub(super) fn describe(entry: &CheckpointEntry) -> String {
    let checkpoint = &entry.checkpoint;
    let time = text::time(checkpoint.time_us);
    if checkpoint.tag.is_empty() {
        format!("{} ({time})", checkpoint.cut)
    } else {
        format!("{} ({time}, {:?})", checkpoint.cut, checkpoint.tag)
    }
}

/// The checkpoints that a user may have meant: the three nearest by `key`, of equally near ones the newest.
fn nearest(checkpoints: &[CheckpointEntry], key: impl Fn(&CheckpointEntry) -> u64) -> String {
    let mut sorted: Vec<&CheckpointEntry> = checkpoints.iter().rev().collect();
    sorted.sort_by_key(|entry| key(entry));
    let named: Vec<String> = sorted.into_iter().take(3).map(describe).collect();
    if named.is_empty() {
        "there is no checkpoint that can be opened".to_owned()
    } else {
        format!("the nearest are {}; `vra-journal checkpoints` lists all", named.join(", "))
    }
}

/// How unlike two tags are: edits, with untagged checkpoints last.
pub(super) fn distance(one: &str, other: &str) -> u64 {
    if one.is_empty() {
        return u64::MAX;
    }
    let other: Vec<char> = other.chars().take(256).collect();
    let mut row: Vec<u64> = (0..=other.len() as u64).collect();
    for (index, c) in one.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = index as u64 + 1;
        for (column, &d) in other.iter().enumerate() {
            let replaced = diagonal + u64::from(!c.eq_ignore_ascii_case(&d));
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[other.len()]
}

fn parse_time(text: &str) -> Option<u64> {
    let timestamp = Timestamp::from_str(text).ok().or_else(|| {
        let local = DateTime::from_str(text).ok()?;
        Some(local.to_zoned(TimeZone::system()).ok()?.timestamp())
    })?;
    u64::try_from(timestamp.as_microsecond()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_told_apart() {
        for (text, expected) in [
            ("latest", Moment::Latest),
            ("42", Moment::Seq(42)),
            ("seq:7", Moment::Seq(7)),
            ("00000000000000000000000000000abc-17", Moment::Id(CheckpointId { nonce: 0xabc, counter: 17 })),
            (
                "id:00000000000000000000000000000abc-17",
                Moment::Id(CheckpointId { nonce: 0xabc, counter: 17 }),
            ),
            ("id-17", Moment::Tag("id-17".to_owned())),
            ("before upgrade", Moment::Tag("before upgrade".to_owned())),
            ("tag:42", Moment::Tag("42".to_owned())),
            ("tag:latest", Moment::Tag("latest".to_owned())),
            ("2026-11-22T17:30:00Z", Moment::Time(1_795_368_600_000_000)),
            ("time:2026-11-22T17:30:00+01:00", Moment::Time(1_795_365_000_000_000)),
        ] {
            assert_eq!(text.parse::<Moment>().expect(text), expected);
        }
        assert!(matches!("2026-11-22T17:30".parse(), Ok(Moment::Time(_))));
        assert!("time:yesterday".parse::<Moment>().is_err());
        assert!("id:17".parse::<Moment>().is_err());
        assert!("seq:x".parse::<Moment>().is_err());
        assert!("".parse::<Moment>().is_err());
    }

    #[test]
    fn like_tags_are_near() {
        assert_eq!(distance("before upgrade", "before-upgrade"), 1);
        assert_eq!(distance("Nightly", "nightly"), 0);
        assert!(distance("nightly", "nigtly") < distance("weekly", "nigtly"));
    }
}
