//! Records that nobody can read any more, in a segment whose footer is lost too.

use bytes::Bytes;

use super::FooterEvent;
use crate::batch::{Record, RecordKind};

/// A stretch of the stream of which nobody knows what it was: the heads of its batches are lost, and so is the segment's footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The first record.
    pub first_seq: u64,
    /// The last one; the one before the first if only batches of the target's own are lost.
    pub last_seq: u64,
}

impl Gap {
    /// Whether anything of the stream is lost.
    pub fn has_records(&self) -> bool {
        self.last_seq >= self.first_seq
    }

    /// What stands for the lost records. They may have written anything, and a sync's begin or end may be among them, so all volumes are as
    /// in a sync that began there (B5). No record ends a sync with the id 0: it takes one that begins behind the gap, and its end.
    pub(super) fn events(&self, volume_count: u16) -> impl Iterator<Item = FooterEvent> {
        let seq = self.first_seq;
        let event = move |volume| FooterEvent {
            record: Record {
                seq,
                time_us: 0,
                volume,
                kind: RecordKind::SyncBegin,
                offset_bytes: 0,
                len_bytes: 0,
                sync_id: 0,
                argument: 0,
                payload: Bytes::new(),
            },
            position_seq: seq,
        };
        (0..if self.has_records() { volume_count } else { 0 }).map(event)
    }
}
