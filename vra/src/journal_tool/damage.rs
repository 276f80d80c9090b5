//! What is wrong with a journal, and where.

use journal::bad_ranges::BadRange;
use journal::format::BAD_LIST_OFFSETS;
use journal::walk::DiskPlace;
use serde::Serialize;

/// A part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct LostPlace {
    pub(super) volume: u16,
    pub(super) offset_bytes: u64,
    pub(super) len_bytes: u64,
}

impl From<DiskPlace> for LostPlace {
    fn from(DiskPlace { volume, offset_bytes, len_bytes }: DiskPlace) -> Self {
        Self { volume, offset_bytes, len_bytes }
    }
}

/// Something that cannot be read any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Damage {
    /// The record, where one is to blame; of a stretch the first.
    pub(super) seq: Option<u64>,
    pub(super) segment: Option<u64>,
    /// Where the record wrote what is damaged, if that is known.
    #[serde(flatten)]
    pub(super) place: Option<LostPlace>,
    /// Place in the journal's file, in bytes.
    pub(super) file_offset_bytes: u64,
    pub(super) what: String,
}

impl Damage {
    pub(super) fn at(file_offset_bytes: u64, what: String) -> Self {
        Self { seq: None, segment: None, place: None, file_offset_bytes, what }
    }

    pub(super) fn of(segment: u64, file_offset_bytes: u64, what: String) -> Self {
        Self { segment: Some(segment), ..Self::at(file_offset_bytes, what) }
    }

    /// A part of a recovery disk that the list in a slot names.
    pub(super) fn listed(slot: usize, bad: BadRange) -> Self {
        let BadRange { volume, offset_bytes, len_bytes, seq } = bad;
        let what = format!(
            "{len_bytes} bytes at {offset_bytes} of disk {volume} are lost: record {seq} was damaged before it was promoted"
        );
        let place = Some(LostPlace { volume, offset_bytes, len_bytes });
        Self { seq: Some(seq), place, ..Self::at(BAD_LIST_OFFSETS[slot], what) }
    }

    /// Whether it is a recovery disk's: at every checkpoint before the place was written again it is lost, also at those before the record.
    pub(super) fn is_on_recovery_disk(&self) -> bool {
        self.segment.is_none() && self.place.is_some()
    }
}
