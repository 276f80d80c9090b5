//! Cuts a chunk into stretches, in the order of the disks.

use crate::format::PAGE_BYTES;
use crate::index::Index;
use crate::planted::{Bug, planted};
use crate::view::JournalPart;

use super::chunks::Chunk;
use super::run::Run;

/// What to do next.
#[derive(Debug)]
pub(super) enum Work {
    /// Write a stretch.
    Run(Run),
    /// Whole pages that read zeroes from now on.
    Zeroes { volume: u16, offset_bytes: u64, len_bytes: u64 },
}

/// A chunk's stretches, made one by one.
#[derive(Debug)]
pub(super) struct Runs {
    chunk: Chunk,
    sizes: TransferSizes,
    at: usize,
    /// Everything before this place of the piece at hand's volume is done.
    done_bytes: u64,
}

/// How a promotion divides what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransferSizes {
    /// Longest stretch that is written at once, in bytes, a multiple of [`PAGE_BYTES`].
    pub run_max_bytes: u64,
    /// Zeroes of at least this many bytes are punched, shorter ones written.
    pub punch_min_bytes: u64,
    /// How much of the journal is read before it is written in the disks' order, in bytes: twice as much memory is taken.
    pub chunk_bytes: u64,
}

impl Default for TransferSizes {
    fn default() -> Self {
        Self { run_max_bytes: 512 << 10, punch_min_bytes: 64 << 10, chunk_bytes: 16 << 20 }
    }
}

const PAGE: u64 = PAGE_BYTES as u64;

impl Runs {
    /// Of a chunk that is read.
    pub(super) fn new(chunk: Chunk, sizes: TransferSizes) -> Self {
        Self { chunk, sizes, at: 0, done_bytes: 0 }
    }

    pub(super) fn is_done(&self) -> bool {
        self.at == self.chunk.pieces.len()
    }

    /// What to do next. `indexes` are those of the chunk's pieces.
    pub(super) fn next(&mut self, indexes: &[Index]) -> Option<Work> {
        let first_id = *self.chunk.pieces.get(self.at)?;
        let (volume, index) = (first_id.volume, &indexes[usize::from(first_id.volume)]);
        let first = &index.pieces()[first_id.piece as usize];
        let begin = first.offset_bytes.max(self.done_bytes);
        if first.is_zeroes() && begin.is_multiple_of(PAGE) {
            let end = first.end_bytes() / PAGE * PAGE;
            if end.saturating_sub(begin) >= self.sizes.punch_min_bytes {
                self.done_bytes = end;
                if end == first.end_bytes() {
                    self.next_piece(volume);
                }
                let end = if planted(Bug::PunchRoundedOut) {
                    first.end_bytes().next_multiple_of(PAGE)
                } else {
                    end
                };
                return Some(Work::Zeroes { volume, offset_bytes: begin, len_bytes: end - begin });
            }
        }
        let start = begin / PAGE * PAGE;
        let limit = start + self.sizes.run_max_bytes;
        let limit = if planted(Bug::PromotionSplitsPages) { begin + 512 } else { limit };
        let (mut end, mut parts, mut zeroes) = (begin, Vec::new(), Vec::new());
        while let Some(id) = self.chunk.pieces.get(self.at).filter(|id| id.volume == volume) {
            let piece = &index.pieces()[id.piece as usize];
            let from = piece.offset_bytes.max(self.done_bytes);
            // A page belongs to one stretch only, since it may be read before it is written.
            if from >= limit || (from > end && from >= end.next_multiple_of(PAGE)) {
                break;
            }
            let mut until = piece.end_bytes().min(limit);
            match piece.payload() {
                Some(payload) => {
                    parts.push(JournalPart::new(volume, index, piece, &payload, from..until));
                }
                None => {
                    let page_end = from.next_multiple_of(PAGE);
                    if (piece.end_bytes() / PAGE * PAGE).saturating_sub(page_end)
                        >= self.sizes.punch_min_bytes
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
            if until < piece.end_bytes() {
                break;
            }
            self.next_piece(volume);
        }
        let len_bytes = (end.next_multiple_of(PAGE) - start) as usize;
        Some(Work::Run(Run::new(volume, start, len_bytes, parts, zeroes, &self.chunk)))
    }

    fn next_piece(&mut self, volume: u16) {
        self.at += 1;
        if self.chunk.pieces.get(self.at).is_some_and(|id| id.volume != volume) {
            self.done_bytes = 0;
        }
    }
}

#[cfg(test)]
mod tests;
