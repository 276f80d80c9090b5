//! Identities and times, each a type of its own so that one cannot stand where another belongs.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

/// A text that is no id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no UUID: write one as 5d1f1f8e-6a0e-4f0b-9a6e-0d6a4b1c2d3e")]
pub struct BadId(String);

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A new id, 122 random bits.
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }

            /// The first eight hex digits, for file names and tables.
            pub fn short(&self) -> String {
                self.0.simple().to_string()[..8].to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = BadId;

            fn from_str(text: &str) -> Result<Self, BadId> {
                text.parse().map(Self).map_err(|_| BadId(text.to_owned()))
            }
        }
    };
}

id!(/// A VRA, as in its certificate's `urn:holdfast:vra:<uuid>`.
    VraId);
id!(/// A ZVM, as in its certificate's `urn:holdfast:zvm:<uuid>`.
    ZvmId);
id!(/// A virtual machine: its UUID in the inventory.
    VmId);
id!(/// A disk of a VM.
    VolumeId);
id!(/// A virtual protection group.
    VpgId);
id!(/// A journal.
    JournalId);
id!(/// One unbroken run of a source VM's numbering (A5).
    GenerationId);
id!(/// An open view.
    ViewId);

/// A moment: microseconds since the Unix epoch. Shown as RFC 3339 in UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TimeUs(pub u64);

impl TimeUs {
    /// The system's clock now.
    pub fn now() -> Self {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for TimeUs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match i64::try_from(self.0).ok().and_then(|us| jiff::Timestamp::from_microsecond(us).ok()) {
            Some(time) => write!(f, "{time:.3}"),
            None => write!(f, "{} us", self.0),
        }
    }
}

/// Reads RFC 3339 (`2026-11-22T16:00:05Z`).
impl FromStr for TimeUs {
    type Err = BadTime;

    fn from_str(text: &str) -> Result<Self, BadTime> {
        let bad = || BadTime(text.to_owned());
        let time: jiff::Timestamp = text.parse().map_err(|_| bad())?;
        u64::try_from(time.as_microsecond()).map(Self).map_err(|_| bad())
    }
}

/// A text that is no time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no time since 1970: write one as 2026-11-22T16:00:05Z")]
pub struct BadTime(String);

/// A checkpoint of a VPG: its epoch (D1). In JSON and on the command line `<nonce: 32 hex digits>-<counter>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CheckpointId {
    /// Random for each run of the coordinator.
    pub nonce: u128,
    /// Counts that run's epochs.
    pub counter: u64,
}

impl fmt::Display for CheckpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}-{}", self.nonce, self.counter)
    }
}

/// A text that is no checkpoint id.
#[derive(Debug, thiserror::Error)]
#[error(
    "\"{0}\" is no checkpoint id: it has the form <32 hex digits>-<number>, as the list of checkpoints shows it"
)]
pub struct CheckpointIdError(String);

impl FromStr for CheckpointId {
    type Err = CheckpointIdError;

    fn from_str(text: &str) -> Result<Self, CheckpointIdError> {
        let parse = || {
            let (nonce, counter) = text.split_once('-')?;
            if nonce.len() != 32 || !nonce.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return None;
            }
            Some(Self { nonce: u128::from_str_radix(nonce, 16).ok()?, counter: counter.parse().ok()? })
        };
        parse().ok_or_else(|| CheckpointIdError(text.chars().take(80).collect()))
    }
}

impl Serialize for CheckpointId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for CheckpointId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoint_ids_read_back_and_refuse_others() {
        let id = CheckpointId { nonce: 0xabc, counter: 17 };
        assert_eq!(id.to_string(), "00000000000000000000000000000abc-17");
        assert_eq!(id.to_string().parse::<CheckpointId>().expect("own form"), id);
        for text in
            ["", "17", "abc-17", "+0000000000000000000000000000abc-17", "00000000000000000000000000000abc-"]
        {
            text.parse::<CheckpointId>().expect_err(text);
        }
    }

    #[test]
    fn times_read_as_rfc_3339() {
        let time: TimeUs = "2026-11-22T16:00:05.25Z".parse().expect("time");
        assert_eq!(time.to_string(), "2026-11-22T16:00:05.250Z");
        "1969-01-01T00:00:00Z".parse::<TimeUs>().expect_err("before the epoch");
    }
}
