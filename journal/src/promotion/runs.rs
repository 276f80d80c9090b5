//! Cuts what is to be promoted into stretches, in the order of the disks.

use crate::format::PAGE_BYTES;
use crate::index::Index;
use crate::planted::{Bug, planted};
use crate::view::JournalPart;

use super::run::Run;

/// What to do next.
#[derive(Debug)]
pub(super) enum Work {
    /// Write a stretch.
    Run(Run),
    /// Whole pages that read zeroes from now on.
    Zeroes { volume: u16, offset_bytes: u64, len_bytes: u64 },
}

/// All of it, made step by step.
#[derive(Debug)]
pub(super) struct Runs {
    indexes: Vec<Index>,
    sizes: TransferSizes,
    volume: usize,
    piece: usize,
    /// Everything before this place of the volume is done.
    done_bytes: u64,
}

/// How a promotion divides what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransferSizes {
    /// Longest stretch that is written at once, in bytes, a multiple of [`PAGE_BYTES`].
    pub run_max_bytes: u64,
    /// Zeroes of at least this many bytes are punched, shorter ones written.
    pub punch_min_bytes: u64,
}

impl Default for TransferSizes {
    fn default() -> Self {
        Self { run_max_bytes: 512 << 10, punch_min_bytes: 64 << 10 }
    }
}

const PAGE: u64 = PAGE_BYTES as u64;

impl Runs {
    /// Of the newest records of each volume.
    pub(super) fn new(indexes: Vec<Index>, sizes: TransferSizes) -> Self {
        Self { indexes, sizes, volume: 0, piece: 0, done_bytes: 0 }
    }

    pub(super) fn is_done(&self) -> bool {
        self.indexes[self.volume.min(self.indexes.len())..]
            .iter()
            .enumerate()
            .all(|(ahead, index)| index.piece_count() == if ahead == 0 { self.piece } else { 0 })
    }

    pub(super) fn next(&mut self) -> Option<Work> {
        while self.indexes.get(self.volume)?.piece(self.piece).is_none() {
            self.volume += 1;
            (self.piece, self.done_bytes) = (0, 0);
        }
        let (index, volume) = (&self.indexes[self.volume], self.volume as u16);
        let (first, extent) = index.piece(self.piece)?;
        let begin = first.offset_bytes.max(self.done_bytes);
        if extent.payload_offset_bytes.is_none() && begin.is_multiple_of(PAGE) {
            let end = first.end_bytes / PAGE * PAGE;
            if end.saturating_sub(begin) >= self.sizes.punch_min_bytes {
                self.done_bytes = end;
                self.piece += usize::from(end == first.end_bytes);
                let end =
                    if planted(Bug::PunchRoundedOut) { first.end_bytes.next_multiple_of(PAGE) } else { end };
                return Some(Work::Zeroes { volume, offset_bytes: begin, len_bytes: end - begin });
            }
        }
        let start = begin / PAGE * PAGE;
        let limit = start + self.sizes.run_max_bytes;
        let limit = if planted(Bug::PromotionSplitsPages) { begin + 512 } else { limit };
        let (mut end, mut parts, mut zeroes) = (begin, Vec::new(), Vec::new());
        while let Some((piece, extent)) = index.piece(self.piece) {
            let from = piece.offset_bytes.max(self.done_bytes);
            // A page belongs to one stretch only, since it may be read before it is written.
            if from >= limit || (from > end && from >= end.next_multiple_of(PAGE)) {
                break;
            }
            let mut until = piece.end_bytes.min(limit);
            match extent.payload_offset_bytes {
                Some(payload) => {
                    parts.push(JournalPart::new(volume, index, extent, payload, from..until));
                }
                None => {
                    let page_end = from.next_multiple_of(PAGE);
                    if (piece.end_bytes / PAGE * PAGE).saturating_sub(page_end) >= self.sizes.punch_min_bytes
                    {
                        // The long rest is punched.
                        until = page_end;
                    }
                    if from < until {
                        zeroes.push(from..until);
                    }
                }
            }
            (end, self.done_bytes) = (end.max(until), until);
            if until < piece.end_bytes {
                break;
            }
            self.piece += 1;
        }
        let len_bytes = (end.next_multiple_of(PAGE) - start) as usize;
        Some(Work::Run(Run::new(volume, start, len_bytes, parts, zeroes)))
    }
}

#[cfg(test)]
mod tests;
