//! What a writable view keeps of what was written to it: where each sector is, without I/O but for the opening of the file.
//!
//! [`map`] says where each sector is, [`pages`] what of that the file knows, [`commit`] in which order both become durable, and [`gate`]
//! which change comes first. [`file`] opens and makes the file, [`format`] has its bytes, [`words`] the memory that outlives the process.

pub(super) mod commit;
pub(super) mod error;
pub(super) mod file;
pub(super) mod format;
pub(super) mod gate;
pub(super) mod map;
pub(super) mod noted;
pub(super) mod pages;
pub(super) mod words;

/// Length of a chunk, in bytes.
pub const CHUNK_BYTES: u64 = 64 << 10;
/// Unit of everything, in bytes.
pub const SECTOR_BYTES: u64 = 512;
/// Sectors of a chunk: one bit each in a `u128`.
const SECTORS: u64 = CHUNK_BYTES / SECTOR_BYTES;
const _: () = assert!(SECTORS == 128);
/// Words of an entry of the map: chunk of the disk, chunk of the file, bits of sectors with data, bits of sectors that read zeroes.
const ENTRY_WORDS: usize = 6;
