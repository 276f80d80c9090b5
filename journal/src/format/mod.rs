//! The journal file, format version 1, as drawn in `docs/journal-format.md`: what is where, and the bytes of
//! superblock, manifest, segment header, footer and trailer. Everything that is read is checked strictly and bounded.

pub mod bad_list;
pub mod manifest;
pub mod segment;
pub mod superblock;

mod footer;
mod gap;

pub use footer::{ExtentEntry, Footer, FooterBuilder, FooterError, FooterEvent};
pub use gap::Gap;
pub use segment::{LowWater, PageError, SegmentHeader, SegmentTrailer};
pub use superblock::{JournalState, Superblock, SuperblockError, VolumeState};

/// Version of the file format.
pub const FORMAT_VERSION: u32 = 1;
/// Unit of all metadata, and alignment of all I/O, in bytes.
pub const PAGE_BYTES: usize = 4096;
/// Where the two copies of the superblock are, in bytes from the file's start.
pub const SUPERBLOCK_OFFSETS: [u64; 2] = [0, 64 << 10];
/// Where the two manifest slots are, in bytes from the file's start.
pub const MANIFEST_OFFSETS: [u64; 2] = [128 << 10, 512 << 10];
/// Length of a manifest slot, in bytes.
pub const MANIFEST_SLOT_BYTES: usize = 384 << 10;
/// Where the two slots of the list of bad ranges are, in bytes from the file's start.
pub const BAD_LIST_OFFSETS: [u64; 2] = [896 << 10, 960 << 10];
/// Length of such a slot, in bytes.
pub const BAD_LIST_SLOT_BYTES: usize = 64 << 10;
/// Where segment slot 0 begins, in bytes from the file's start.
pub const FIRST_SLOT_OFFSET_BYTES: u64 = 1 << 20;
/// Length of a segment slot unless set otherwise, in bytes.
pub const DEFAULT_SLOT_BYTES: u64 = 64 << 20;
/// Shortest segment slot, in bytes.
pub const MIN_SLOT_BYTES: u64 = 64 << 10;
/// Longest segment slot, in bytes.
pub const MAX_SLOT_BYTES: u64 = 1 << 30;
/// Most segment slots of one journal.
pub const MAX_SLOTS: u32 = 1 << 20;

/// Where a segment slot begins, in bytes from the file's start.
pub const fn slot_offset_bytes(slot: u32, slot_len_bytes: u64) -> u64 {
    FIRST_SLOT_OFFSET_BYTES + slot as u64 * slot_len_bytes
}

/// Where the pages are by which a slot is recognised, in bytes from the file's start: its first, the second, where its first batch begins,
/// and its last.
pub(crate) fn edge_pages(slot: u32, slot_len_bytes: u64) -> [u64; 3] {
    let (begin, page) = (slot_offset_bytes(slot, slot_len_bytes), PAGE_BYTES as u64);
    [begin, begin + page, begin + slot_len_bytes - page]
}

/// A place in the stream: its last record so far, and the CRC of the batch that holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ChainPoint {
    /// Number of the last record; 0 before the first.
    pub seq: u64,
    /// CRC of the stream's last batch; 0 before the first.
    pub batch_crc: u32,
}

/// CRC32C of a page, or of more, whose CRC field, at `crc_offset`, counts as zero.
pub fn page_crc(page: &[u8], crc_offset: usize) -> u32 {
    let crc = crc32c::crc32c(&page[..crc_offset]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &page[crc_offset + 4..])
}
