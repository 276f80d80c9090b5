//! Where a journal's segments lie: what tells a reader beside a writer that what it knows of them may be old.

use journal::format::Superblock;
use journal::format::superblock::PairPlace;
use journal::recovery::{Content, Survey};

/// Where the segments were when a journal was read.
///
/// A VRA that opens a journal copies its newest segment into another slot and uses the old one again; promotion frees the oldest
/// segments. Either is in the superblock before a slot is used again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    open_count: u64,
    low_water_segment: u64,
    /// The list of what of the recovery disks can't be trusted, if there was one (C5).
    bad_list: Option<PairPlace>,
    /// Number, slot and opening of each segment.
    segments: Vec<(u64, u32, u64)>,
    /// The newest segment is an earlier opening's: its copy may not have been complete yet.
    is_unsettled: bool,
}

impl Layout {
    /// As a survey found it.
    pub fn of(survey: &Survey) -> Self {
        let open_count = survey.superblock.open_count;
        let of = |header: &journal::format::SegmentHeader| (header.number, header.slot, header.open_count);
        let newest = survey.segments.last();
        Self {
            open_count,
            low_water_segment: survey.superblock.low_water_segment,
            bad_list: survey.superblock.bad_list,
            segments: survey.segments.iter().map(|segment| of(&segment.header)).collect(),
            is_unsettled: newest.is_some_and(|newest| {
                matches!(newest.content, Content::Scanned(_)) && newest.header.open_count < open_count
            }),
        }
    }

    /// Whether segments may lie elsewhere by now. `now` was read after what raised the doubt.
    pub fn may_have_changed(&self, now: &Superblock) -> bool {
        self.is_unsettled
            || !self.knows_bad_ranges(now)
            || (self.open_count, self.low_water_segment) != (now.open_count, now.low_water_segment)
    }

    /// Whether what of the recovery disks can't be trusted is still what it was. If not, nothing that was promoted since may be read from
    /// them before the list was read anew: a record of the view's own may have been damaged when it was promoted (C5).
    pub fn knows_bad_ranges(&self, now: &Superblock) -> bool {
        self.bad_list == now.bad_list
    }
}
