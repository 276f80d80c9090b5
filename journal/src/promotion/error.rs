//! Why a promotion cannot go on.

use super::PromotionFile;
use crate::storage::StorageError;

/// Why a promotion cannot go on. The journal and the recovery disks stay as they are: announced, not promoted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PromotionError {
    /// A recovery disk failed.
    #[error("recovery disk {volume} failed")]
    Disk {
        /// Its volume.
        volume: u16,
        /// Why.
        #[source]
        source: StorageError,
    },
    /// A recovery disk can't give back pages of which records cover a part. Nothing was written there: what is lost
    /// ([`Promotion::bad_ranges_with_lost`]) is noted first ([`crate::writer::Change::NoteBadRanges`]), then the promotion is done again.
    #[error("recovery disk {volume} can't give back places that are to be written in part")]
    DiskLost {
        /// Its volume.
        volume: u16,
    },
    /// The journal's file failed.
    #[error("the journal's file failed")]
    Journal(#[source] StorageError),
    /// A segment's footer and heads of its batches are damaged: it isn't known what these records wrote, and no sync that began behind them
    /// has ended since.
    #[error(
        "records {first_seq} to {last_seq} of segment {number} cannot be read, and neither can its footer"
    )]
    Gap {
        /// The segment.
        number: u64,
        /// The first of them.
        first_seq: u64,
        /// The last of them.
        last_seq: u64,
    },
}

impl PromotionError {
    pub(super) fn of(file: PromotionFile, source: StorageError) -> Self {
        match file {
            PromotionFile::Journal => Self::Journal(source),
            PromotionFile::Disk(volume) => Self::Disk { volume, source },
        }
    }
}
