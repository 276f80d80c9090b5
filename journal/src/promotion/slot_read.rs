//! The reading of a whole slot, over what the disk can't give back.

use std::ops::Range;

use crate::format::PAGE_BYTES;
use crate::storage::AlignedBuf;

/// A slot that is being read, one part after the other: all of it at once, and where that fails in ever smaller parts. Pages that the disk
/// can't give back read zeroes.
#[derive(Debug)]
pub(super) struct SlotRead {
    begin_bytes: u64,
    slot: AlignedBuf,
    /// What is left to read, the next part last.
    parts: Vec<Range<u64>>,
}

/// A part that can't be read is read again in parts of this length, and those that can't in pages, in bytes.
const PART_BYTES: u64 = 1 << 20;

impl SlotRead {
    /// Of a range of the file, whole pages.
    pub(super) fn new(range: Range<u64>) -> Self {
        let slot = AlignedBuf::zeroed((range.end - range.start) as usize);
        Self { begin_bytes: range.start, slot, parts: vec![range] }
    }

    pub(super) fn len_bytes(&self) -> u64 {
        self.slot.len() as u64
    }

    /// The next part to read, as a range of the file; none if all is read.
    pub(super) fn next(&mut self) -> Option<Range<u64>> {
        self.parts.pop()
    }

    pub(super) fn take(&mut self, range: &Range<u64>, part: AlignedBuf) {
        if part.len() == self.slot.len() {
            self.slot = part;
            return;
        }
        let begin = (range.start - self.begin_bytes) as usize;
        self.slot[begin..begin + part.len()].copy_from_slice(&part);
    }

    /// The disk can't give a part back: its parts are read, or it is a page that reads zeroes.
    pub(super) fn split(&mut self, range: &Range<u64>) {
        let len_bytes = range.end - range.start;
        let part_bytes = if len_bytes > PART_BYTES { PART_BYTES } else { PAGE_BYTES as u64 };
        if len_bytes > part_bytes {
            let starts = range.clone().step_by(part_bytes as usize);
            let parts: Vec<_> = starts.map(|start| start..(start + part_bytes).min(range.end)).collect();
            self.parts.extend(parts.into_iter().rev());
        }
    }

    pub(super) fn into_slot(self) -> AlignedBuf {
        self.slot
    }
}
