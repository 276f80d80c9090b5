//! A stretch of a recovery disk that is written at once: whole pages, put together from records and, between them, from the disk itself.

use std::ops::Range;

use crate::format::PAGE_BYTES;
use crate::planted::{Bug, planted};
use crate::storage::AlignedBuf;
use crate::view::{JournalPart, ViewError};

use super::{PromotionError, PromotionFile};

/// A stretch being put together.
#[derive(Debug)]
pub(super) struct Run {
    volume: u16,
    offset_bytes: u64,
    len_bytes: usize,
    /// Record contents, by the read that has them.
    parts: Vec<(usize, JournalPart)>,
    reads: Vec<Read>,
    buffers: Vec<Option<AlignedBuf>>,
    missing: usize,
    /// The first read is of the disk: records don't cover the stretch.
    has_base: bool,
    zeroes: Vec<Range<u64>>,
}

/// Something that a run needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Read {
    pub(super) file: PromotionFile,
    pub(super) offset_bytes: u64,
    pub(super) len_bytes: usize,
}

/// What is closer together in the journal than this is read at once, in bytes.
const JOIN_GAP_BYTES: u64 = 16 << 10;
/// Longest read of the journal that joins several records, in bytes.
const JOIN_MAX_BYTES: u64 = 1 << 20;

impl Run {
    /// Of whole pages from `offset_bytes`. Parts and zeroes are disjoint; what they leave out comes from the disk.
    pub(super) fn new(
        volume: u16,
        offset_bytes: u64,
        len_bytes: usize,
        mut journal_parts: Vec<JournalPart>,
        zeroes: Vec<Range<u64>>,
    ) -> Self {
        let covered: u64 = journal_parts.iter().map(|part| part.len_bytes).sum::<u64>()
            + zeroes.iter().map(|range| range.end - range.start).sum::<u64>();
        let has_base = covered < len_bytes as u64 && !planted(Bug::PromotionPastEdges);
        let mut reads = Vec::new();
        if has_base {
            reads.push(Read { file: PromotionFile::Disk(volume), offset_bytes, len_bytes });
        }
        journal_parts.sort_unstable_by_key(|part| part.read_offset_bytes);
        let first = reads.len();
        let mut parts = Vec::with_capacity(journal_parts.len());
        for part in journal_parts {
            let end = part.read_offset_bytes + part.read_len_bytes as u64;
            match reads[first..].last_mut() {
                Some(Read { offset_bytes, len_bytes, .. })
                    if part.read_offset_bytes <= *offset_bytes + *len_bytes as u64 + JOIN_GAP_BYTES
                        && end.saturating_sub(*offset_bytes) <= JOIN_MAX_BYTES =>
                {
                    *len_bytes = (*len_bytes).max((end - *offset_bytes) as usize);
                }
                _ => reads.push(Read {
                    file: PromotionFile::Journal,
                    offset_bytes: part.read_offset_bytes,
                    len_bytes: part.read_len_bytes,
                }),
            }
            parts.push((reads.len() - 1, part));
        }
        let buffers = reads.iter().map(|_| None).collect();
        let missing = reads.len();
        Self { volume, offset_bytes, len_bytes, parts, reads, buffers, missing, has_base, zeroes }
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

    pub(super) fn reads(&self) -> &[Read] {
        &self.reads
    }

    pub(super) fn take(&mut self, read: usize, buffer: AlignedBuf) {
        if self.buffers[read].replace(buffer).is_none() {
            self.missing -= 1;
        }
    }

    /// Whether all that it needs is there.
    pub(super) fn is_read(&self) -> bool {
        self.missing == 0
    }

    /// Compares the checksums of all that was read of the journal (C4).
    pub(super) fn check(&self) -> Result<(), PromotionError> {
        for (read, part) in &self.parts {
            if let Err(ViewError::Corrupt { seq, volume, offset_bytes }) = self.part_bytes(*read, part) {
                return Err(PromotionError::Record { seq, volume, offset_bytes });
            }
        }
        Ok(())
    }

    /// The pages to write; everything is read and checked.
    pub(super) fn content(&self) -> AlignedBuf {
        let mut content = AlignedBuf::zeroed(self.len_bytes);
        if self.has_base
            && let Some(base) = &self.buffers[0]
        {
            content.copy_from_slice(base);
        }
        for range in &self.zeroes {
            content[self.inside(range)].fill(0);
        }
        for (read, part) in &self.parts {
            let range = self.inside(&(part.offset_bytes..part.offset_bytes + part.len_bytes));
            if let Ok(bytes) = self.part_bytes(*read, part) {
                content[range].copy_from_slice(bytes);
            }
        }
        debug_assert!(content.len().is_multiple_of(PAGE_BYTES));
        content
    }

    fn inside(&self, range: &Range<u64>) -> Range<usize> {
        (range.start - self.offset_bytes) as usize..(range.end - self.offset_bytes) as usize
    }

    fn part_bytes(&self, read: usize, part: &JournalPart) -> Result<&[u8], ViewError> {
        let begin = (part.read_offset_bytes - self.reads[read].offset_bytes) as usize;
        let buffer = self.buffers[read].as_ref().expect("all reads have ended");
        part.check(&buffer[begin..begin + part.read_len_bytes])
    }
}
