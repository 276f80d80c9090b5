//! Bugs that can be switched on, one at a time, to prove that the simulation finds them. Without feature `sim` no switch
//! exists and [`planted`] is a constant.

/// A bug that a simulation must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Bug {
    /// A group of batches counts as durable without its fdatasync.
    SkippedSyncBeforeAck,
    /// A group that was written while the one before was synced counts as durable with it.
    AheadCountsAsSynced,
    /// After a failed sync the writer goes on as if nothing had happened.
    FailedSyncForgotten,
    /// The copy of the last segment is not synced before the first acknowledgement (C1).
    RecoveryWithoutSync,
    /// An opener goes on in the segment of the opener before it (C1).
    AppendToForeignSegment,
    /// A scan checks neither chain nor open count nor generation (C1).
    ChainNotChecked,
    /// A half-made copy of the last segment is taken for the segment.
    HalfCarriedSegmentTaken,
    /// A footer is written before the batches that it speaks of are durable.
    SealedBeforeSync,
    /// The superblock that was found is taken for durable.
    SuperblockNotSettled,
    /// The open count is not raised.
    OpenCountNotRaised,
    /// A new owner is granted before its generation is durable (A5).
    GrantBeforeGenerationDurable,
    /// A checkpoint inside a sync counts (B5).
    CheckpointInsideSyncCounted,
    /// A sync end may stand in the middle of a batch (B6).
    SyncEndInsideBatch,
    /// A journal is opened without waiting for the I/O of the process before (A4).
    OpenedWithoutFence,
    /// A view doesn't check what it read (C4).
    ViewWithoutChecksums,
    /// Slots are used again before the low-water mark is durable (C2).
    LowWaterNotSynced,
    /// A promotion is announced in the superblock alone (C2).
    IntentNotInStream,
    /// Zeroes are punched in whole pages around them, not within them.
    PunchRoundedOut,
    /// Two stretches that are promoted at once share a page.
    PromotionSplitsPages,
    /// A number below an announced promotion can be opened (C2).
    IntentIgnoredByViews,
    /// Of several segments that are promoted together one is left out.
    PromotionSkipsSegment,
    /// The low-water mark moves before the recovery disk was synced (C2).
    PromotionWithoutSync,
    /// An open view reads promoted records from slots that were freed (C3).
    ViewNotRepointed,
    /// A promotion writes whole pages where a record covers a part of one.
    PromotionPastEdges,
    /// What was damaged before it was promoted is read from the recovery disk (C5).
    BadRangesIgnored,
    /// The list of bad ranges is not written.
    BadRangesForgotten,
}

/// All of them.
pub const ALL: [Bug; 26] = [
    Bug::SkippedSyncBeforeAck,
    Bug::AheadCountsAsSynced,
    Bug::FailedSyncForgotten,
    Bug::RecoveryWithoutSync,
    Bug::AppendToForeignSegment,
    Bug::ChainNotChecked,
    Bug::HalfCarriedSegmentTaken,
    Bug::SealedBeforeSync,
    Bug::SuperblockNotSettled,
    Bug::OpenCountNotRaised,
    Bug::GrantBeforeGenerationDurable,
    Bug::CheckpointInsideSyncCounted,
    Bug::SyncEndInsideBatch,
    Bug::OpenedWithoutFence,
    Bug::ViewWithoutChecksums,
    Bug::LowWaterNotSynced,
    Bug::IntentNotInStream,
    Bug::PunchRoundedOut,
    Bug::PromotionSplitsPages,
    Bug::IntentIgnoredByViews,
    Bug::PromotionSkipsSegment,
    Bug::PromotionWithoutSync,
    Bug::ViewNotRepointed,
    Bug::PromotionPastEdges,
    Bug::BadRangesIgnored,
    Bug::BadRangesForgotten,
];

/// Whether the bug is switched on in this thread or everywhere.
#[cfg(not(feature = "sim"))]
#[inline(always)]
pub const fn planted(_bug: Bug) -> bool {
    false
}

/// Whether the bug is switched on in this thread or everywhere.
#[cfg(feature = "sim")]
pub fn planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug) || EVERYWHERE.get() == Some(&bug)
}

/// Switches a bug on in this thread, or all off.
#[cfg(feature = "sim")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// Switches a bug on in all threads of this process, for good: for programs that are the product with that bug. The first one stays.
#[cfg(feature = "sim")]
pub fn plant_everywhere(bug: Bug) {
    EVERYWHERE.get_or_init(|| bug);
}

#[cfg(feature = "sim")]
static EVERYWHERE: std::sync::OnceLock<Bug> = std::sync::OnceLock::new();

#[cfg(feature = "sim")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}
