//! A part of a read that the journal has: what of the file to read, and how to check it.

use std::ops::Range;

use super::ViewError;
use crate::batch::{CRC_UNIT_BYTES, unit_count, unit_matches};
use crate::format::PAGE_BYTES;
use crate::index::{Index, IndexPiece, Payload};
use crate::planted::{Bug, planted};

/// A part of a read that comes from the journal. More is read than is wanted, so that whole units can be checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalPart {
    /// Place on the volume, in bytes.
    pub offset_bytes: u64,
    /// How much of the volume, in bytes.
    pub len_bytes: u64,
    /// What to read of the journal's file: a multiple of [`PAGE_BYTES`], in bytes.
    pub read_offset_bytes: u64,
    /// How much to read, a multiple of [`PAGE_BYTES`], in bytes.
    pub read_len_bytes: usize,
    /// Where the wanted bytes are in what was read, in bytes.
    pub skip_bytes: usize,
    /// The record that wrote them.
    pub seq: u64,
    units_skip_bytes: usize,
    units_len_bytes: usize,
    crcs: UnitCrcs,
    volume: u16,
}

/// The CRCs of a part's units; most parts have one.
#[derive(Clone, Debug, PartialEq, Eq)]
enum UnitCrcs {
    One(u32),
    Many(Vec<u32>),
}

impl UnitCrcs {
    fn as_slice(&self) -> &[u32] {
        match self {
            Self::One(crc) => std::slice::from_ref(crc),
            Self::Many(crcs) => crcs,
        }
    }
}

impl JournalPart {
    /// Where the journal's file has a part of a piece with data: whole pages that hold whole units.
    pub(crate) fn file_range(payload: &Payload, range: &Range<u64>) -> Range<u64> {
        let (units, page) = (Self::units(payload, range), PAGE_BYTES as u64);
        (payload.file_offset_bytes + units.start) / page * page
            ..(payload.file_offset_bytes + units.end).next_multiple_of(page)
    }

    /// The whole units of the payload that hold a range of the volume, in bytes from the payload's start.
    fn units(payload: &Payload, range: &Range<u64>) -> Range<u64> {
        let unit = CRC_UNIT_BYTES as u64;
        let end = (range.end - payload.offset_bytes).next_multiple_of(unit).min(payload.len_bytes);
        (range.start - payload.offset_bytes) / unit * unit..end
    }

    /// What to read for a part of a piece with data.
    pub(crate) fn new(
        volume: u16,
        index: &Index,
        piece: &IndexPiece,
        payload: &Payload,
        range: Range<u64>,
    ) -> Self {
        let units = Self::units(payload, &range);
        let read = Self::file_range(payload, &range);
        let first_unit = units.start as usize / CRC_UNIT_BYTES;
        let in_payload = range.start - payload.offset_bytes;
        let crc_of = |unit: usize| index.unit_crc(piece, first_unit + unit);
        let units_len_bytes = (units.end - units.start) as usize;
        Self {
            offset_bytes: range.start,
            len_bytes: range.end - range.start,
            read_offset_bytes: read.start,
            read_len_bytes: (read.end - read.start) as usize,
            skip_bytes: (payload.file_offset_bytes + in_payload - read.start) as usize,
            seq: piece.seq,
            units_skip_bytes: (payload.file_offset_bytes + units.start - read.start) as usize,
            units_len_bytes,
            crcs: match unit_count(units_len_bytes) {
                1 => UnitCrcs::One(crc_of(0)),
                count => UnitCrcs::Many((0..count).map(crc_of).collect()),
            },
            volume,
        }
    }

    /// Checks what was read and gives the wanted bytes of it (C4).
    ///
    /// # Errors
    /// A checksum is wrong: the record is named.
    pub fn check<'a>(&self, read: &'a [u8]) -> Result<&'a [u8], ViewError> {
        self.check_units(&read[self.units_skip_bytes..self.units_skip_bytes + self.units_len_bytes])?;
        Ok(self.wanted(read))
    }

    fn check_units(&self, units: &[u8]) -> Result<(), ViewError> {
        let good = planted(Bug::ViewWithoutChecksums)
            || units
                .chunks(CRC_UNIT_BYTES)
                .zip(self.crcs.as_slice())
                .all(|(unit, crc)| unit_matches(unit, *crc));
        if !good {
            let (seq, volume, offset_bytes) = (self.seq, self.volume, self.offset_bytes);
            return Err(ViewError::Corrupt { seq, volume, offset_bytes });
        }
        Ok(())
    }

    /// Where the wanted bytes alone are in the journal's file, in bytes: nothing if more must be read to check them.
    pub fn exact_offset_bytes(&self) -> Option<u64> {
        let is_exact =
            self.skip_bytes == self.units_skip_bytes && self.len_bytes == self.units_len_bytes as u64;
        is_exact.then(|| self.read_offset_bytes + self.skip_bytes as u64)
    }

    /// Checks the wanted bytes alone, read from [`Self::exact_offset_bytes`] (C4).
    ///
    /// # Errors
    /// A checksum is wrong: the record is named.
    pub fn check_exact(&self, wanted: &[u8]) -> Result<(), ViewError> {
        self.check_units(wanted)
    }

    /// What of the wanted range of the volume is in units whose checksum is wrong, in bytes.
    pub(crate) fn damage<'a>(&'a self, read: &'a [u8]) -> impl Iterator<Item = Range<u64>> + use<'a> {
        let units = &read[self.units_skip_bytes..self.units_skip_bytes + self.units_len_bytes];
        let end = self.offset_bytes + self.len_bytes;
        // Where the first unit begins on the volume.
        let begin = self.offset_bytes - (self.skip_bytes - self.units_skip_bytes) as u64;
        let places = (begin..).step_by(CRC_UNIT_BYTES);
        let damaged = units.chunks(CRC_UNIT_BYTES).zip(self.crcs.as_slice()).zip(places);
        let damaged = damaged.filter(|((unit, crc), _)| !unit_matches(unit, **crc));
        damaged.map(move |(_, place)| place.max(self.offset_bytes)..(place + CRC_UNIT_BYTES as u64).min(end))
    }

    /// The wanted bytes of what was read, unchecked.
    pub(crate) fn wanted<'a>(&self, read: &'a [u8]) -> &'a [u8] {
        &read[self.skip_bytes..self.skip_bytes + self.len_bytes as usize]
    }
}
