//! Segments that take no more batches.

use std::collections::VecDeque;

use super::segment::OpenSegment;
use crate::crypt::Cipher;
use crate::format::{ChainPoint, SegmentHeader, SegmentTrailer};
use crate::recovery::{Content, Segment};
use crate::scan::Scan;
use crate::storage::{Op, Purpose};

/// A segment that takes no more batches.
#[derive(Clone, Debug)]
pub struct ClosedSegment {
    /// Its first page.
    pub header: SegmentHeader,
    /// The stream's place after it.
    pub last: ChainPoint,
    /// Its last page; none only in a file in which it has no room.
    pub trailer: Option<SegmentTrailer>,
    /// What reads it.
    pub cipher: Cipher,
}

impl ClosedSegment {
    pub(super) fn of(segment: &Segment) -> Self {
        let trailer = match &segment.content {
            Content::Sealed(trailer) => Some(SegmentTrailer::clone(trailer)),
            Content::Scanned(_) => None,
        };
        let (header, last, cipher) = (segment.header.clone(), segment.last(), segment.cipher.clone());
        Self { header, last, trailer, cipher }
    }

    /// When its last batch was received, µs since the Unix epoch; when its first was, if more isn't known (C6).
    pub fn end_time_us(&self) -> u64 {
        self.trailer.as_ref().map_or(self.header.begin_time_us, |trailer| trailer.end_time_us)
    }
}

/// Seals what a crash kept from being sealed: a segment that another one follows takes no more batches, and those that it has are durable, or
/// the other one would not have begun. Gives what is to be written; if that is lost too, the next opening does it again.
pub(super) fn seal_unsealed(
    segments: &[Segment],
    closed: &mut VecDeque<ClosedSegment>,
    slot_len_bytes: u64,
) -> Vec<(Purpose, Op)> {
    let mut writes = Vec::new();
    for ((segment, next), closed) in segments.iter().zip(&segments[1.min(segments.len())..]).zip(closed) {
        let Content::Scanned(scan) = &segment.content else { continue };
        // It was full when the next one began.
        let end_time_us = Some(next.header.begin_time_us);
        let (header, cipher) = (segment.header.clone(), segment.cipher.clone());
        let open = OpenSegment::resume(header, cipher, Scan::clone(scan), end_time_us);
        if open.can_be_sealed(slot_len_bytes) {
            let (sealed, seal) = open.seal(slot_len_bytes);
            *closed = sealed;
            writes.extend(seal);
        }
    }
    writes
}
