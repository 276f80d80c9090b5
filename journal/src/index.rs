//! Where each byte of a volume is at a sequence number: the newest of all extents up to it, as one sorted array.

mod order;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use crate::batch::CRC_UNIT_BYTES;
use crate::format::{ExtentEntry, Footer, slot_offset_bytes};

/// A range of a volume that one record wrote last: 32 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IndexPiece {
    /// Place on the volume, in bytes.
    pub offset_bytes: u64,
    /// The record that wrote it.
    pub seq: u64,
    place: PayloadPlace,
    len_sectors: u32,
    /// The payload's CRC if it has one unit, else where its CRCs begin in [`Index::crcs`].
    crc: u32,
}

/// Where a payload is in the file, how long it is, and where in it a piece begins; all in sectors, in one word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct PayloadPlace(u64);

/// What a piece needs of its record's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Payload {
    /// Where it starts in the file, in bytes.
    pub(crate) file_offset_bytes: u64,
    /// Its length, in bytes.
    pub(crate) len_bytes: u64,
    /// The record's place on the volume, in bytes.
    pub(crate) offset_bytes: u64,
}

/// One volume's index.
#[derive(Clone, Debug, Default)]
pub struct Index {
    pieces: Vec<IndexPiece>,
    crcs: Vec<u32>,
}

/// Gathers one volume's extents, then makes the index.
#[derive(Debug, Default)]
pub struct IndexBuilder {
    /// One for each extent: in each run in the order of places.
    pieces: Vec<IndexPiece>,
    /// Where runs begin.
    runs: Vec<usize>,
    crcs: Vec<u32>,
}

const SECTOR_BYTES: u64 = 512;

impl PayloadPlace {
    /// Of a piece without payload: it reads zeroes.
    const NONE: Self = Self(0);
    /// Bits of the length, less one, and of what is skipped: a payload has at most 2048 sectors.
    const LEN_BITS: u32 = 11;

    fn new(file_offset_bytes: u64, len_bytes: u64) -> Self {
        // No payload is in the file's first sector.
        Self(
            (file_offset_bytes / SECTOR_BYTES) << (2 * Self::LEN_BITS)
                | (len_bytes / SECTOR_BYTES - 1) << Self::LEN_BITS,
        )
    }

    fn file_offset_bytes(self) -> u64 {
        (self.0 >> (2 * Self::LEN_BITS)) * SECTOR_BYTES
    }

    fn len_bytes(self) -> u64 {
        ((self.0 >> Self::LEN_BITS & Self::mask()) + 1) * SECTOR_BYTES
    }

    fn skip_bytes(self) -> u64 {
        (self.0 & Self::mask()) * SECTOR_BYTES
    }

    fn skipping(self, bytes: u64) -> Self {
        if self == Self::NONE { self } else { Self(self.0 + bytes / SECTOR_BYTES) }
    }

    const fn mask() -> u64 {
        (1 << Self::LEN_BITS) - 1
    }
}

const _: () = {
    assert!(crate::batch::MAX_RECORD_PAYLOAD as u64 / SECTOR_BYTES <= 1 << PayloadPlace::LEN_BITS);
    let file_sectors = crate::format::MAX_SLOTS as u64 * (crate::format::MAX_SLOT_BYTES / SECTOR_BYTES) * 2;
    assert!(file_sectors <= 1 << (64 - 2 * PayloadPlace::LEN_BITS));
    assert!(size_of::<IndexPiece>() == 32);
};

impl IndexPiece {
    /// Length, in bytes.
    pub fn len_bytes(&self) -> u64 {
        u64::from(self.len_sectors) * SECTOR_BYTES
    }

    /// End on the volume, in bytes.
    pub fn end_bytes(&self) -> u64 {
        self.offset_bytes + self.len_bytes()
    }

    /// Whether it reads zeroes.
    pub fn is_zeroes(&self) -> bool {
        self.place == PayloadPlace::NONE
    }

    /// What has its data; nothing if it reads zeroes.
    pub(crate) fn payload(&self) -> Option<Payload> {
        (!self.is_zeroes()).then(|| Payload {
            file_offset_bytes: self.place.file_offset_bytes(),
            len_bytes: self.place.len_bytes(),
            offset_bytes: self.offset_bytes - self.place.skip_bytes(),
        })
    }

    /// A part of it.
    fn part(&self, range: Range<u64>) -> Self {
        Self {
            offset_bytes: range.start,
            len_sectors: ((range.end - range.start) / SECTOR_BYTES) as u32,
            place: self.place.skipping(range.start - self.offset_bytes),
            ..*self
        }
    }
}

impl IndexBuilder {
    /// With room for so many extents.
    pub fn with_capacity(extent_count: usize) -> Self {
        Self { pieces: Vec::with_capacity(extent_count), ..Self::default() }
    }

    /// Takes the volume's extents with numbers above `base_seq` and up to `through_seq` from a segment's footer.
    pub fn add(
        &mut self,
        footer: &Footer,
        slot: u32,
        slot_len_bytes: u64,
        volume: u16,
        base_seq: u64,
        through_seq: u64,
    ) {
        let slot_offset = slot_offset_bytes(slot, slot_len_bytes);
        let extents = footer.extents_of(volume);
        self.pieces.reserve(extents.len());
        self.runs.push(self.pieces.len());
        for extent in extents {
            let seq = footer.base_seq + u64::from(extent.seq_delta.get());
            if seq <= base_seq || seq > through_seq {
                continue;
            }
            let crc = self.take_crcs(footer, extent);
            let place = if extent.is_zeroes() {
                PayloadPlace::NONE
            } else {
                PayloadPlace::new(slot_offset + extent.payload_offset_bytes(), extent.len_bytes())
            };
            let (offset_bytes, len_sectors) = (extent.offset_bytes.get(), extent.len_sectors.get());
            self.pieces.push(IndexPiece { offset_bytes, seq, place, len_sectors, crc });
        }
    }

    fn take_crcs(&mut self, footer: &Footer, extent: &ExtentEntry) -> u32 {
        if extent.len_bytes() <= CRC_UNIT_BYTES as u64 || extent.is_zeroes() {
            return extent.crc.get();
        }
        let first = self.crcs.len() as u32;
        self.crcs.extend(footer.extent_crcs(extent));
        first
    }

    /// The index. Takes time in proportion to the extents (and the logarithm of how many overlap).
    pub fn build(self) -> Index {
        let Self { mut pieces, runs, crcs } = self;
        let mut spare = Vec::new();
        order::sort_by_place(&mut pieces, &runs, &mut spare);
        let sorted = pieces;
        let mut pieces = spare;
        pieces.reserve(sorted.len());
        // A sweep over the volume: of the extents that cover the current place, the newest is on top.
        let mut covering: BinaryHeap<(u64, Reverse<u64>, usize)> = BinaryHeap::new();
        let (mut at, mut next) = (0, 0);
        while next < sorted.len() || !covering.is_empty() {
            let begin = sorted.get(next).map(|piece| piece.offset_bytes);
            if let Some(begin) = begin.filter(|begin| covering.is_empty() || *begin == at) {
                let entering = sorted[next..].iter().take_while(|piece| piece.offset_bytes == begin).count();
                let after = sorted.get(next + entering).map_or(u64::MAX, |piece| piece.offset_bytes);
                let group = &sorted[next..next + entering];
                if covering.is_empty()
                    && let Some(newest) = group.iter().max_by_key(|piece| piece.seq)
                    && newest.end_bytes() <= after
                    && group.iter().all(|piece| piece.len_sectors <= newest.len_sectors)
                {
                    // By far the most: nothing else overlaps it, or what does is older and hidden.
                    pieces.push(*newest);
                } else {
                    let enter =
                        |(index, piece): (usize, &IndexPiece)| (piece.seq, Reverse(piece.end_bytes()), index);
                    covering.extend((next..).zip(group).map(enter));
                    at = begin;
                }
                next += entering;
                continue;
            }
            let Some(&(_, Reverse(end_bytes), index)) = covering.peek() else { break };
            if end_bytes <= at {
                covering.pop();
                continue;
            }
            let until = begin.map_or(end_bytes, |begin| begin.min(end_bytes));
            let part = sorted[index].part(at..until);
            let joined = pieces.last_mut().filter(|last| last.seq == part.seq && last.end_bytes() == at);
            match joined.and_then(|last| Some((last.len_sectors.checked_add(part.len_sectors)?, last))) {
                Some((len_sectors, last)) => last.len_sectors = len_sectors,
                None => pieces.push(part),
            }
            at = until;
        }
        Index { pieces, crcs }
    }
}

impl Index {
    /// The pieces that overlap a range, in order; what lies between them no record wrote.
    pub fn overlapping(&self, offset_bytes: u64, len_bytes: u64) -> impl Iterator<Item = &IndexPiece> {
        let end_bytes = offset_bytes.saturating_add(len_bytes);
        self.pieces[self.count_before(offset_bytes)..]
            .iter()
            .take_while(move |piece| piece.offset_bytes < end_bytes)
    }

    /// How many pieces end at or before a place. Pieces are often spread evenly: looked for from where it would be then, since each step of a
    /// search through millions of them waits for memory.
    fn count_before(&self, offset_bytes: u64) -> usize {
        let is_before = |piece: &IndexPiece| piece.end_bytes() <= offset_bytes;
        let (Some(first), Some(last)) = (self.pieces.first(), self.pieces.last()) else { return 0 };
        let (count, span) = (self.pieces.len(), last.end_bytes() - first.offset_bytes);
        let ahead =
            u128::from(offset_bytes.saturating_sub(first.offset_bytes)) * count as u128 / u128::from(span);
        let guess = usize::try_from(ahead).unwrap_or(count).min(count - 1);
        let (mut low, mut high, mut reach) = (guess, guess, 4);
        if is_before(&self.pieces[guess]) {
            while high < count && is_before(&self.pieces[high]) {
                (low, high) = (high, high.saturating_add(reach));
                reach *= 2;
            }
        } else {
            while low > 0 && !is_before(&self.pieces[low]) {
                (low, high) = (low.saturating_sub(reach), low);
                reach *= 2;
            }
        }
        low + self.pieces[low..high.min(count)].partition_point(is_before)
    }

    /// The CRC of one 4 KiB unit of a piece's payload.
    pub(crate) fn unit_crc(&self, piece: &IndexPiece, unit: usize) -> u32 {
        if piece.place.len_bytes() <= CRC_UNIT_BYTES as u64 {
            return piece.crc;
        }
        self.crcs[piece.crc as usize + unit]
    }

    /// All pieces in order.
    pub fn pieces(&self) -> &[IndexPiece] {
        &self.pieces
    }

    /// Memory that it takes, in bytes.
    pub fn memory_bytes(&self) -> usize {
        self.pieces.capacity() * size_of::<IndexPiece>() + self.crcs.capacity() * size_of::<u32>()
    }
}

#[cfg(test)]
mod tests;
