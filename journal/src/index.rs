//! Where each byte of a volume is at a sequence number: the newest of all extents up to it, as one sorted array.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::format::{ExtentEntry, Footer, slot_offset_bytes};

/// What a volume's range holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Place on the volume, in bytes.
    pub offset_bytes: u64,
    /// Length, in bytes.
    pub len_bytes: u64,
    /// The record that wrote it.
    pub seq: u64,
    /// Where its payload starts in the file, in bytes; nothing if it reads zeroes.
    pub payload_offset_bytes: Option<u64>,
    /// The payload's CRC if it has one unit, else where its CRCs begin in [`Index::crcs`].
    crc: u32,
}

/// A piece of a volume that one record wrote last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexPiece {
    /// Place on the volume, in bytes.
    pub offset_bytes: u64,
    /// End on the volume, in bytes.
    pub end_bytes: u64,
    /// Which extent.
    extent: u32,
}

/// One volume's index.
#[derive(Clone, Debug, Default)]
pub struct Index {
    pieces: Vec<IndexPiece>,
    extents: Vec<Extent>,
    crcs: Vec<u32>,
}

/// Gathers one volume's extents, then makes the index.
#[derive(Debug, Default)]
pub struct IndexBuilder {
    extents: Vec<Extent>,
    crcs: Vec<u32>,
}

impl IndexBuilder {
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
        let first = footer.extents.partition_point(|extent| extent.volume.get() < volume);
        for extent in footer.extents[first..].iter().take_while(|extent| extent.volume.get() == volume) {
            let seq = footer.base_seq + u64::from(extent.seq_delta.get());
            if seq <= base_seq || seq > through_seq {
                continue;
            }
            let crc = self.take_crcs(footer, extent);
            self.extents.push(Extent {
                offset_bytes: extent.offset_bytes.get(),
                len_bytes: extent.len_bytes(),
                seq,
                payload_offset_bytes: (!extent.is_zeroes())
                    .then(|| slot_offset + extent.payload_offset_bytes()),
                crc,
            });
        }
    }

    fn take_crcs(&mut self, footer: &Footer, extent: &ExtentEntry) -> u32 {
        match footer.extent_crcs(extent) {
            crcs if crcs.len() == 1 => crcs[0],
            crcs => {
                let first = self.crcs.len() as u32;
                self.crcs.extend(crcs);
                first
            }
        }
    }

    /// The index. Takes time in proportion to the extents (and the logarithm of how many overlap).
    pub fn build(mut self) -> Index {
        self.extents.sort_unstable_by_key(|extent| (extent.offset_bytes, extent.seq));
        let mut pieces: Vec<IndexPiece> = Vec::with_capacity(self.extents.len());
        // A sweep over the volume: of the extents that cover the current place, the newest is on top.
        let mut covering: BinaryHeap<(u64, Reverse<u64>, u32)> = BinaryHeap::new();
        let mut at = 0;
        let mut next = 0;
        while next < self.extents.len() || !covering.is_empty() {
            let begin = self.extents.get(next).map(|extent| extent.offset_bytes);
            let Some(&(_, Reverse(end_bytes), extent)) = covering.peek() else {
                at = begin.unwrap_or(at);
                next = self.enter(next, at, &mut covering);
                continue;
            };
            if end_bytes <= at {
                covering.pop();
                continue;
            }
            if begin == Some(at) {
                next = self.enter(next, at, &mut covering);
                continue;
            }
            let until = begin.map_or(end_bytes, |begin| begin.min(end_bytes));
            match pieces.last_mut() {
                Some(last) if last.extent == extent && last.end_bytes == at => last.end_bytes = until,
                _ => pieces.push(IndexPiece { offset_bytes: at, end_bytes: until, extent }),
            }
            at = until;
        }
        Index { pieces, extents: self.extents, crcs: self.crcs }
    }

    /// Takes in the extents that begin here.
    fn enter(&self, mut next: usize, at: u64, covering: &mut BinaryHeap<(u64, Reverse<u64>, u32)>) -> usize {
        while let Some(extent) = self.extents.get(next).filter(|extent| extent.offset_bytes == at) {
            covering.push((extent.seq, Reverse(at + extent.len_bytes), next as u32));
            next += 1;
        }
        next
    }
}

impl Index {
    /// The pieces that overlap a range, in order; what lies between them no record wrote.
    pub fn overlapping(
        &self,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> impl Iterator<Item = (IndexPiece, &Extent)> {
        let end_bytes = offset_bytes.saturating_add(len_bytes);
        let first = self.pieces.partition_point(|piece| piece.end_bytes <= offset_bytes);
        self.pieces[first..]
            .iter()
            .take_while(move |piece| piece.offset_bytes < end_bytes)
            .map(|piece| (*piece, &self.extents[piece.extent as usize]))
    }

    /// The CRC of one 4 KiB unit of an extent's payload.
    pub fn unit_crc(&self, extent: &Extent, unit: usize) -> u32 {
        if extent.len_bytes <= crate::batch::CRC_UNIT_BYTES as u64 {
            return extent.crc;
        }
        self.crcs[extent.crc as usize + unit]
    }

    /// One piece, by its place in the order.
    pub fn piece(&self, number: usize) -> Option<(IndexPiece, &Extent)> {
        let piece = *self.pieces.get(number)?;
        Some((piece, &self.extents[piece.extent as usize]))
    }

    /// How many pieces there are.
    pub fn piece_count(&self) -> usize {
        self.pieces.len()
    }

    /// All pieces in order.
    pub fn pieces(&self) -> impl Iterator<Item = (IndexPiece, &Extent)> {
        self.pieces.iter().map(|piece| (*piece, &self.extents[piece.extent as usize]))
    }
}
