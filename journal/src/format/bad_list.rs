//! The list of bad ranges (C5): two slots; the superblock says which one counts, and nothing where there is none.

use std::mem::{offset_of, size_of};

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{BAD_LIST_SLOT_BYTES, FORMAT_VERSION, PAGE_BYTES};
use crate::bad_ranges::{BadRange, BadRanges};
use crate::batch::{MAX_VOLUME_BYTES, MAX_VOLUMES};

/// First eight bytes of a slot.
pub const BAD_LIST_MAGIC: [u8; 8] = *b"HFBADRNG";
/// Most ranges.
pub const MAX_BAD_RANGES: usize = (BAD_LIST_SLOT_BYTES - size_of::<Header>()) / size_of::<Entry>();

/// What a slot holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadList {
    /// The journal it belongs to.
    pub journal_id: Uuid,
    /// Goes up with each change: without superblocks, the higher valid one counts.
    pub sequence: u64,
    /// The ranges.
    pub ranges: BadRanges,
}

/// Why bytes are not a list of bad ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum BadListError {
    /// The slot doesn't begin as a list does.
    #[error("no list of bad ranges is here")]
    Magic,
    /// A newer format.
    #[error("version {0} of the list of bad ranges is not known: a newer release wrote it")]
    Version(u32),
    /// More ranges than there is room for.
    #[error("{0} bad ranges are more than a list has room for")]
    Count(usize),
    /// The checksum is wrong.
    #[error("the checksum of the list of bad ranges is wrong")]
    Crc,
    /// The disk can't give it back.
    #[error("the disk cannot give the list of bad ranges back")]
    Unreadable,
    /// A range is out of bounds, or overlaps another one, although the checksum is right.
    #[error("bad range {0} is out of bounds, or overlaps another one")]
    Range(usize),
}

impl BadList {
    /// The bytes to write at a slot's start, a multiple of [`PAGE_BYTES`], and their CRC.
    ///
    /// # Errors
    /// There are more than [`MAX_BAD_RANGES`].
    pub fn encode(&self) -> Result<(Vec<u8>, u32), BadListError> {
        if self.ranges.len() > MAX_BAD_RANGES {
            return Err(BadListError::Count(self.ranges.len()));
        }
        let mut header = Header {
            magic: BAD_LIST_MAGIC,
            version: FORMAT_VERSION.into(),
            crc: 0.into(),
            journal_id: *self.journal_id.as_bytes(),
            sequence: self.sequence.into(),
            count: (self.ranges.len() as u32).into(),
            reserved: [0; 20],
        };
        let entry = |bad: BadRange| Entry {
            offset_bytes: bad.offset_bytes.into(),
            len_bytes: bad.len_bytes.into(),
            seq: bad.seq.into(),
            volume: bad.volume.into(),
            reserved: [0; 6],
        };
        let entries: Vec<Entry> = self.ranges.iter().map(entry).collect();
        let crc = crc32c::crc32c_append(crc32c::crc32c(header.as_bytes()), entries.as_bytes());
        header.crc = crc.into();
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(entries.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(PAGE_BYTES), 0);
        Ok((bytes, crc))
    }

    /// Reads a slot; also gives its CRC.
    ///
    /// # Errors
    /// The bytes don't begin with a valid list.
    pub fn decode(bytes: &[u8]) -> Result<(Self, u32), BadListError> {
        let (header, rest) = Header::ref_from_prefix(bytes).map_err(|_| BadListError::Magic)?;
        if header.magic != BAD_LIST_MAGIC {
            return Err(BadListError::Magic);
        }
        let count = header.count.get() as usize;
        let entries = rest.get(..count.saturating_mul(size_of::<Entry>()));
        let entries = entries.filter(|_| count <= MAX_BAD_RANGES).ok_or(BadListError::Count(count))?;
        let without_crc = Header { crc: 0.into(), ..*header };
        let crc = crc32c::crc32c_append(crc32c::crc32c(without_crc.as_bytes()), entries);
        if crc != header.crc.get() {
            return Err(BadListError::Crc);
        }
        // As for a superblock: what the CRC doesn't fit is damaged, and no newer release's.
        if header.version.get() != FORMAT_VERSION {
            return Err(BadListError::Version(header.version.get()));
        }
        let entries = <[Entry]>::ref_from_bytes(entries).map_err(|_| BadListError::Count(count))?;
        let mut ranges = BadRanges::default();
        for (number, entry) in entries.iter().enumerate() {
            let (offset_bytes, len_bytes) = (entry.offset_bytes.get(), entry.len_bytes.get());
            let end = offset_bytes.checked_add(len_bytes).filter(|end| *end <= MAX_VOLUME_BYTES);
            let (volume, seq) = (entry.volume.get(), entry.seq.get());
            let is_free = |end| ranges.first_in(volume, offset_bytes..end).is_none();
            if !end.is_some_and(is_free) || len_bytes == 0 || usize::from(volume) >= MAX_VOLUMES {
                return Err(BadListError::Range(number));
            }
            ranges.add(BadRange { volume, offset_bytes, len_bytes, seq });
        }
        let journal_id = Uuid::from_bytes(header.journal_id);
        Ok((Self { journal_id, sequence: header.sequence.get(), ranges }, crc))
    }
}

/// The first 64 bytes of a slot; the entries follow.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    /// [`BAD_LIST_MAGIC`].
    magic: [u8; 8],
    /// [`FORMAT_VERSION`].
    version: U32,
    /// CRC32C of this header, with this field zero, and the entries.
    crc: U32,
    /// [`BadList::journal_id`].
    journal_id: [u8; 16],
    /// [`BadList::sequence`].
    sequence: U64,
    /// How many entries follow.
    count: U32,
    /// Zero.
    reserved: [u8; 20],
}

/// One range.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Entry {
    /// [`BadRange::offset_bytes`].
    offset_bytes: U64,
    /// [`BadRange::len_bytes`].
    len_bytes: U64,
    /// [`BadRange::seq`].
    seq: U64,
    /// [`BadRange::volume`].
    volume: U16,
    /// Zero.
    reserved: [u8; 6],
}

const _: () = {
    assert!(size_of::<Header>() == 64);
    assert!(size_of::<Entry>() == 32);
    assert!(offset_of!(Header, crc) == 12);
};

#[cfg(test)]
mod tests {
    use super::*;

    fn list(count: u64) -> BadList {
        let mut ranges = BadRanges::default();
        for number in 0..count {
            let volume = (number % 3) as u16;
            ranges.add(BadRange { volume, offset_bytes: number * 8192, len_bytes: 512, seq: number });
        }
        BadList { journal_id: Uuid::from_u128(5), sequence: 9, ranges }
    }

    #[test]
    fn a_full_list_fits_its_slot_and_one_more_is_refused() {
        let full = list(MAX_BAD_RANGES as u64);
        let (bytes, crc) = full.encode().expect("it fits");
        assert!(bytes.len() <= BAD_LIST_SLOT_BYTES);
        assert_eq!(BadList::decode(&bytes), Ok((full, crc)));
        assert_eq!(list(MAX_BAD_RANGES as u64 + 1).encode(), Err(BadListError::Count(MAX_BAD_RANGES + 1)));
    }

    #[test]
    fn damage_is_noticed() {
        let (bytes, _) = list(3).encode().expect("it fits");
        for at in 0..64 + 3 * 32 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 4;
            assert!(BadList::decode(&damaged).is_err(), "byte {at}");
        }
        assert_eq!(BadList::decode(&bytes[..100]), Err(BadListError::Count(3)));
    }
}
