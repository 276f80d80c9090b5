//! A stretch of a recovery disk that is written at once: whole pages, put together from records and, between them, from the disk itself.

use std::ops::Range;

use bytes::Bytes;

use crate::bad_ranges::BadRange;
use crate::format::PAGE_BYTES;
use crate::planted::{Bug, planted};
use crate::storage::AlignedBuf;
use crate::view::JournalPart;

use super::chunks::Chunk;

/// A stretch, its records' contents read.
#[derive(Debug)]
pub(super) struct Run {
    volume: u16,
    offset_bytes: u64,
    len_bytes: usize,
    /// In the order of the disk, each with what was read for it.
    parts: Vec<(JournalPart, Bytes)>,
    zeroes: Vec<Range<u64>>,
    needs_base: bool,
}

impl Run {
    /// Of whole pages from `offset_bytes`. Parts and zeroes are disjoint; what they leave out comes from the disk.
    pub(super) fn new(
        volume: u16,
        offset_bytes: u64,
        len_bytes: usize,
        parts: Vec<JournalPart>,
        zeroes: Vec<Range<u64>>,
        chunk: &Chunk,
    ) -> Self {
        let covered: u64 = parts.iter().map(|part| part.len_bytes).sum::<u64>()
            + zeroes.iter().map(|range| range.end - range.start).sum::<u64>();
        let needs_base = covered < len_bytes as u64 && !planted(Bug::PromotionPastEdges);
        let read = |part| {
            let bytes = chunk.bytes(&part);
            (part, bytes)
        };
        let parts = parts.into_iter().map(read).collect();
        Self { volume, offset_bytes, len_bytes, parts, zeroes, needs_base }
    }

    pub(super) fn volume(&self) -> u16 {
        self.volume
    }

    pub(super) fn offset_bytes(&self) -> u64 {
        self.offset_bytes
    }

    pub(super) fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Whether records and zeroes leave something out, so that the disk must be read first.
    pub(super) fn needs_base(&self) -> bool {
        self.needs_base
    }

    /// What of a range neither records nor zeroes cover.
    pub(super) fn uncovered(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let parts = self.parts.iter().map(|(part, _)| part.offset_bytes..part.offset_bytes + part.len_bytes);
        let mut covered: Vec<Range<u64>> = parts.chain(self.zeroes.iter().cloned()).collect();
        covered.sort_unstable_by_key(|range| range.start);
        let (mut rest, mut at) = (Vec::new(), range.start);
        for part in covered.into_iter().filter(|part| part.end > range.start && part.start < range.end) {
            if at < part.start {
                rest.push(at..part.start);
            }
            at = at.max(part.end);
        }
        if at < range.end {
            rest.push(at..range.end);
        }
        rest
    }

    /// What of its records doesn't match its checksums (C4).
    pub(super) fn damage(&self) -> impl Iterator<Item = BadRange> {
        self.parts.iter().flat_map(|(part, bytes)| {
            part.damage(bytes).map(|range| BadRange {
                volume: self.volume,
                offset_bytes: range.start,
                len_bytes: range.end - range.start,
                seq: part.seq,
            })
        })
    }

    /// The pages to write. `base` is what the disk has there, if it was asked for.
    pub(super) fn content(&self, base: Option<AlignedBuf>) -> Vec<Bytes> {
        let is_whole = |part: &JournalPart| part.len_bytes.is_multiple_of(PAGE_BYTES as u64);
        if base.is_none() && self.zeroes.is_empty() && self.parts.iter().all(|(part, _)| is_whole(part)) {
            // Straight from where it was read.
            let wanted = |(part, bytes): &(JournalPart, Bytes)| {
                bytes.slice(part.skip_bytes..part.skip_bytes + part.len_bytes as usize)
            };
            return self.parts.iter().map(wanted).collect();
        }
        let mut content = base.unwrap_or_else(|| AlignedBuf::zeroed(self.len_bytes));
        for range in &self.zeroes {
            content[self.inside(range)].fill(0);
        }
        for (part, bytes) in &self.parts {
            let range = self.inside(&(part.offset_bytes..part.offset_bytes + part.len_bytes));
            content[range].copy_from_slice(part.wanted(bytes));
        }
        vec![content.into_bytes()]
    }

    fn inside(&self, range: &Range<u64>) -> Range<usize> {
        (range.start - self.offset_bytes) as usize..(range.end - self.offset_bytes) as usize
    }
}
