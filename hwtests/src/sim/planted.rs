//! The bugs that can be planted, of all parts.

use std::fmt;

use journal::planted::Bug;
use vra::planted::Planted;

/// A bug to plant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlantedBug {
    /// In the journal.
    Journal(Bug),
    /// Where a write meets the wire.
    Vra(Planted),
}

impl PlantedBug {
    /// All that the simulation must find.
    pub fn all() -> Vec<Self> {
        let journal = journal::planted::ALL.into_iter().map(Self::Journal);
        journal.chain(OF_VRA.into_iter().map(Self::Vra)).collect()
    }

    /// All that the simulation of checkpoints across hosts must find.
    pub fn of_hosts() -> Vec<Self> {
        OF_HOSTS.into_iter().map(Self::Vra).collect()
    }

    /// Plants one bug, or none, for code that this thread runs.
    pub(super) fn plant(bug: Option<Self>) {
        journal::planted::plant(match bug {
            Some(Self::Journal(bug)) => Some(bug),
            _ => None,
        });
        vra::planted::plant(match bug {
            Some(Self::Vra(bug)) => Some(bug),
            _ => None,
        });
    }
}

impl fmt::Display for PlantedBug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Journal(bug) => write!(f, "{bug:?}"),
            Self::Vra(bug) => write!(f, "{bug:?}"),
        }
    }
}

/// Those of the VRA that one thread can show; the others need threads that race (`vra::capture`'s interleavings).
const OF_VRA: [Planted; 12] = [
    Planted::OverlapIgnored,
    Planted::SyncOverWrites,
    Planted::ReadsNotHeld,
    Planted::ResendSkipped,
    Planted::AckBeforeDurable,
    Planted::OldStreamNotFenced,
    Planted::BaseMovedEarly,
    Planted::ApplySwapped,
    Planted::PromotionNotAnnounced,
    Planted::PromotionPastPin,
    Planted::PromotionEndsInSync,
    Planted::WallClockAges,
];

/// Those of checkpoints across hosts.
const OF_HOSTS: [Planted; 5] = [
    Planted::EpochWithoutNonce,
    Planted::WriteBetweenCutAndFlag,
    Planted::RecordAfterExpiry,
    Planted::ReleasedBeforeAllHold,
    Planted::MemberSubstituted,
];
