//! The bytes of a batch's head. All integers little-endian; identities in the byte order of RFC 9562.

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{
    BATCH_ALIGN_BYTES, BatchError, MAX_BATCH_BYTES, MAX_RECORD_PAYLOAD, MAX_RECORDS, PAYLOAD_ALIGN_BYTES,
    unit_count,
};

/// First eight bytes of every batch.
pub const BATCH_MAGIC: [u8; 8] = *b"HFBATCH\0";
/// Version of the batch format.
pub const BATCH_VERSION: u16 = 1;
/// [`BatchHeader::flags`]: the target made this batch; its records have number 0, and the chain passes it by.
pub const FLAG_LOCAL: u32 = 1;

/// The first 128 bytes of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct BatchHeader {
    /// [`BATCH_MAGIC`].
    pub magic: [u8; 8],
    /// [`BATCH_VERSION`].
    pub version: U16,
    /// Length of this header, 128.
    pub header_len_bytes: U16,
    /// [`FLAG_LOCAL`]; all other bits zero: a reader refuses what it doesn't know.
    pub flags: U32,
    /// Length of the whole batch, a multiple of 4096, at most [`MAX_BATCH_BYTES`].
    pub total_len_bytes: U32,
    /// How many records, 1 to [`MAX_RECORDS`].
    pub record_count: U32,
    /// How many CRCs the table after the record headers has.
    pub crc_count: U32,
    /// Where the first payload starts: the end of the CRC table rounded up to 512.
    pub payload_offset_bytes: U32,
    /// The journal that the batch is for.
    pub journal_id: [u8; 16],
    /// The source's generation.
    pub generation: [u8; 16],
    /// The target's count of openings, as granted with the stream.
    pub open_count: U64,
    /// Number of the first record. In a local batch: of the last stream record before it.
    pub first_seq: U64,
    /// Number of the last record: `first_seq + record_count - 1`. In a local batch equal to `first_seq`.
    pub last_seq: U64,
    /// [`BatchHeader::crc`] of the stream's batch before this one. In a local batch likewise.
    pub prev_batch_crc: U32,
    /// CRC32C of header (with this field zero), record headers and CRC table: so of all that the batch says.
    pub crc: U32,
    /// Zero.
    pub reserved: [u8; 32],
}

impl BatchHeader {
    /// Length in bytes.
    pub const LEN: usize = size_of::<Self>();

    /// How many bytes from the batch's start are needed to go on: [`Self::LEN`] while there are fewer, then the
    /// whole batch's length.
    ///
    /// # Errors
    /// The bytes cannot begin a batch of this version, or its length is out of bounds.
    pub fn needed(bytes: &[u8]) -> Result<usize, BatchError> {
        let Ok((header, _)) = Self::ref_from_prefix(bytes) else {
            let known = bytes.len().min(BATCH_MAGIC.len());
            return if bytes[..known] == BATCH_MAGIC[..known] {
                Ok(Self::LEN)
            } else {
                Err(BatchError::Magic)
            };
        };
        header.check_bounds()?;
        Ok(header.total_len_bytes.get() as usize)
    }

    /// Length of header, record headers and CRC table, in bytes. Only meaningful once the bounds are checked.
    pub(crate) fn head_len_bytes(&self) -> usize {
        Self::LEN
            + self.record_count.get() as usize * RecordHeader::LEN
            + self.crc_count.get() as usize * size_of::<U32>()
    }

    /// Checks everything that the header says by itself, so that sizes can be relied on.
    pub(crate) fn check_bounds(&self) -> Result<(), BatchError> {
        if self.magic != BATCH_MAGIC {
            return Err(BatchError::Magic);
        }
        if self.version.get() != BATCH_VERSION {
            return Err(BatchError::Version(self.version.get()));
        }
        if usize::from(self.header_len_bytes.get()) != Self::LEN
            || self.flags.get() & !FLAG_LOCAL != 0
            || self.reserved != [0; 32]
        {
            return Err(BatchError::Header);
        }
        let total_len_bytes = self.total_len_bytes.get() as usize;
        if total_len_bytes == 0
            || total_len_bytes > MAX_BATCH_BYTES
            || !total_len_bytes.is_multiple_of(BATCH_ALIGN_BYTES)
        {
            return Err(BatchError::Length(total_len_bytes));
        }
        let (record_count, crc_count) = (self.record_count.get() as usize, self.crc_count.get() as usize);
        if record_count == 0
            || record_count > MAX_RECORDS
            || crc_count > record_count.saturating_mul(unit_count(MAX_RECORD_PAYLOAD))
        {
            return Err(BatchError::Header);
        }
        let head_len_bytes = self.head_len_bytes().next_multiple_of(PAYLOAD_ALIGN_BYTES);
        if self.payload_offset_bytes.get() as usize != head_len_bytes || head_len_bytes > total_len_bytes {
            return Err(BatchError::Header);
        }
        Ok(())
    }
}

/// What is known of one record before its payload: 64 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RecordHeader {
    /// Sequence number; 0 in a local batch.
    pub seq: U64,
    /// When the source took it in, µs since the Unix epoch.
    pub time_us: U64,
    /// Place on the volume, in bytes.
    pub offset_bytes: U64,
    /// Length on the volume, in bytes, or the volume's size, by kind.
    pub len_bytes: U64,
    /// The sync that it belongs to, or 0.
    pub sync_id: U64,
    /// Kind's own number: a promotion intent's last sequence number. Otherwise 0.
    pub argument: U64,
    /// Where the payload starts, in bytes from the batch's start; 0 without payload.
    pub payload_offset_bytes: U32,
    /// Length of the payload, in bytes.
    pub payload_len_bytes: U32,
    /// Index of the payload's first CRC in the batch's table; 0 without payload.
    pub first_crc: U32,
    /// Volume of the VM.
    pub volume: U16,
    /// [`super::RecordKind`] as a number.
    pub kind: u8,
    /// Zero.
    pub flags: u8,
}

impl RecordHeader {
    /// Length in bytes.
    pub const LEN: usize = size_of::<Self>();
}

const _: () = {
    assert!(size_of::<BatchHeader>() == 128);
    assert!(offset_of!(BatchHeader, flags) == 12);
    assert!(offset_of!(BatchHeader, payload_offset_bytes) == 28);
    assert!(offset_of!(BatchHeader, journal_id) == 32);
    assert!(offset_of!(BatchHeader, open_count) == 64);
    assert!(offset_of!(BatchHeader, prev_batch_crc) == 88);
    assert!(offset_of!(BatchHeader, crc) == 92);
    assert!(offset_of!(BatchHeader, reserved) == 96);
    assert!(size_of::<RecordHeader>() == 64);
    assert!(offset_of!(RecordHeader, argument) == 40);
    assert!(offset_of!(RecordHeader, payload_offset_bytes) == 48);
    assert!(offset_of!(RecordHeader, volume) == 60);
    assert!(offset_of!(RecordHeader, kind) == 62);
};
