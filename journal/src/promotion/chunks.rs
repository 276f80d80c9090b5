//! Cuts what is to be promoted into chunks: records that lie near one another in the journal, so that it is read in long pieces.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;

use crate::format::PAGE_BYTES;
use crate::index::Index;
use crate::storage::AlignedBuf;
use crate::view::JournalPart;

/// A piece of an index: ordered as on the disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PieceId {
    pub(super) volume: u16,
    pub(super) piece: u32,
}

/// All chunks, made one by one.
#[derive(Debug)]
pub(super) struct Chunks {
    indexes: Vec<Index>,
    /// Pieces that read zeroes, in the order of the disks: the first chunk, which needs no read.
    zeroes: Vec<PieceId>,
    /// Pieces with data, in the order of the journal's file.
    data: Vec<PieceId>,
    taken: usize,
    chunk_bytes: u64,
}

/// Pieces that are carried together.
#[derive(Debug)]
pub(super) struct Chunk {
    /// In the order of the disks.
    pub(super) pieces: Vec<PieceId>,
    /// What of the journal's file has them: disjoint or nearly so, in order.
    reads: Vec<Range<u64>>,
    buffers: Vec<Option<Bytes>>,
    /// Reads that are put together from pages, since the disk couldn't give all of them, with how many pages are missing.
    patched: BTreeMap<usize, (AlignedBuf, usize)>,
    next_read: usize,
    missing: usize,
}

/// What is closer together in the journal than this is read at once, in bytes.
const JOIN_GAP_BYTES: u64 = 64 << 10;
/// Longest read of the journal that joins several records, in bytes.
const JOIN_MAX_BYTES: u64 = 1 << 20;

impl Chunks {
    /// Of the newest records of each volume, with about so much of the journal in each chunk.
    pub(super) fn new(indexes: Vec<Index>, chunk_bytes: u64) -> Self {
        let (mut zeroes, mut data) = (Vec::new(), Vec::new());
        for (volume, index) in (0_u16..).zip(&indexes) {
            for (piece, at) in (0_u32..).zip(index.pieces()) {
                let pieces = if at.is_zeroes() { &mut zeroes } else { &mut data };
                pieces.push(PieceId { volume, piece });
            }
        }
        let mut chunks = Self { indexes, zeroes, data: Vec::new(), taken: 0, chunk_bytes };
        data.sort_unstable_by_key(|id| chunks.file_range(*id).start);
        chunks.data = data;
        chunks
    }

    pub(super) fn indexes(&self) -> &[Index] {
        &self.indexes
    }

    pub(super) fn is_done(&self) -> bool {
        self.zeroes.is_empty() && self.taken == self.data.len()
    }

    pub(super) fn next(&mut self) -> Option<Chunk> {
        if !self.zeroes.is_empty() {
            return Some(Chunk::new(std::mem::take(&mut self.zeroes), Vec::new()));
        }
        let (first, mut reads, mut len_bytes) = (self.taken, Vec::<Range<u64>>::new(), 0);
        while let Some(id) = self.data.get(self.taken) {
            let range = self.file_range(*id);
            match reads.last_mut() {
                Some(last)
                    if range.start <= last.end + JOIN_GAP_BYTES
                        && range.end.saturating_sub(last.start) <= JOIN_MAX_BYTES =>
                {
                    len_bytes += range.end.saturating_sub(last.end);
                    last.end = last.end.max(range.end);
                }
                _ if len_bytes >= self.chunk_bytes => break,
                _ => {
                    len_bytes += range.end - range.start;
                    reads.push(range);
                }
            }
            self.taken += 1;
        }
        let mut pieces = self.data[first..self.taken].to_vec();
        pieces.sort_unstable();
        (!pieces.is_empty()).then(|| Chunk::new(pieces, reads))
    }

    /// Where the journal's file has a piece with data.
    fn file_range(&self, id: PieceId) -> Range<u64> {
        let piece = &self.indexes[usize::from(id.volume)].pieces()[id.piece as usize];
        let range = piece.offset_bytes..piece.end_bytes();
        piece.payload().map_or(0..0, |payload| JournalPart::file_range(&payload, &range))
    }
}

impl Chunk {
    fn new(pieces: Vec<PieceId>, reads: Vec<Range<u64>>) -> Self {
        let missing = reads.len();
        Self { pieces, buffers: vec![None; missing], patched: BTreeMap::new(), reads, next_read: 0, missing }
    }

    /// The next read to begin, and its number.
    pub(super) fn next_read(&mut self) -> Option<(usize, Range<u64>)> {
        let range = self.reads.get(self.next_read)?.clone();
        self.next_read += 1;
        Some((self.next_read - 1, range))
    }

    pub(super) fn read_range(&self, read: usize) -> Range<u64> {
        self.reads[read].clone()
    }

    pub(super) fn take(&mut self, read: usize, buffer: AlignedBuf) {
        if self.buffers[read].replace(buffer.into_bytes()).is_none() {
            self.missing -= 1;
        }
    }

    /// A read failed: it comes by pages.
    pub(super) fn begin_again(&mut self, read: usize) {
        let len_bytes = (self.reads[read].end - self.reads[read].start) as usize;
        self.patched.insert(read, (AlignedBuf::zeroed(len_bytes), len_bytes / PAGE_BYTES));
    }

    /// A page of such a read; none if the disk can't give it.
    pub(super) fn take_page(&mut self, read: usize, offset_bytes: u64, page: Option<&[u8]>) {
        let Some((buffer, missing)) = self.patched.get_mut(&read) else { return };
        if let Some(page) = page {
            let begin = (offset_bytes - self.reads[read].start) as usize;
            buffer[begin..begin + PAGE_BYTES].copy_from_slice(page);
        }
        *missing -= 1;
        if *missing == 0
            && let Some((buffer, _)) = self.patched.remove(&read)
        {
            self.take(read, buffer);
        }
    }

    pub(super) fn has_read(&self, read: usize) -> bool {
        self.buffers[read].is_some()
    }

    /// Whether all of it is there.
    pub(super) fn is_read(&self) -> bool {
        self.missing == 0
    }

    /// What was read of the journal for a part of a piece. All of the chunk is read.
    pub(super) fn bytes(&self, part: &JournalPart) -> Bytes {
        // The last read that begins at or before the part has it: a later one that begins within it has its end alone.
        let end = part.read_offset_bytes + part.read_len_bytes as u64;
        let mut read = self.reads.partition_point(|range| range.start <= part.read_offset_bytes) - 1;
        while self.reads[read].end < end {
            read -= 1;
        }
        let begin = (part.read_offset_bytes - self.reads[read].start) as usize;
        let buffer = self.buffers[read].as_ref().expect("all reads have ended");
        buffer.slice(begin..begin + part.read_len_bytes)
    }
}
