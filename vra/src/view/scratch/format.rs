//! The bytes of a scratch file, as drawn in `docs/scratch-format.md`: where things are, the header and the pages of the map.

use std::mem::offset_of;

use journal::crypt::{WRAPPED_KEY_BYTES, WrappedKey};
use journal::format::page_crc;
use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{CHUNK_BYTES, ENTRY_WORDS};

/// Unit of header and map, in bytes.
pub(in crate::view) const PAGE_BYTES: usize = 4096;
/// Version of the format.
const VERSION: u32 = 1;
/// Version of the header of a file whose data is encrypted: those who know only the first refuse it.
const VERSION_ENCRYPTED: u32 = 2;
const HEADER_MAGIC: [u8; 8] = *b"HFSCRATC";
const PAGE_MAGIC: [u8; 8] = *b"HFSCRMAP";
/// Where the two copies of the header are, in bytes.
pub(super) const HEADER_OFFSETS: [u64; 2] = [0, 64 << 10];
/// Where the map begins, in bytes.
const MAP_OFFSET_BYTES: u64 = 128 << 10;
/// What the data begins at a multiple of, in bytes.
const DATA_ALIGN_BYTES: u64 = 1 << 20;
/// Words of the map in one page.
pub(super) const PAGE_WORDS: usize = (PAGE_BYTES - PAGE_HEAD_BYTES) / 8;
const PAGE_HEAD_BYTES: usize = 64;
const _: () = assert!(PAGE_WORDS.is_multiple_of(ENTRY_WORDS));
/// Entries in one page.
const PAGE_ENTRIES: u64 = (PAGE_WORDS / ENTRY_WORDS) as u64;
/// Entries for chunks that have no data, at least.
const SPARE_ENTRIES_MIN: u64 = 4096;
/// Longest data, in chunks: 1 TiB, the most that the configuration allows.
const CHUNKS_MAX: u64 = 1 << 24;
/// Longest disk, in bytes: of a longer one the map would not fit into memory.
pub(in crate::view) const DISK_MAX_BYTES: u64 = 1 << 50;

/// Whose a scratch file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScratchOwner {
    /// The VRA.
    pub vra: Uuid,
    /// The view.
    pub view: Uuid,
    /// The VM.
    pub vm: Uuid,
    /// The VM's journal.
    pub journal: Uuid,
    /// The volume.
    pub volume: Uuid,
    /// The volume's number in the VM.
    pub number: u16,
    /// The last sequence number that the view shows of its journal.
    pub seq: u64,
    /// Size of the disk, in bytes.
    pub disk_bytes: u64,
    /// The disk's smallest unit, in bytes.
    pub logical_block_bytes: u32,
}

impl ScratchOwner {
    /// Whether this is `wanted`, whose disk may have grown since, as far as its journal tells (E3).
    pub(super) fn may_be(&self, wanted: &Self) -> bool {
        Self { disk_bytes: wanted.disk_bytes, ..*self } == *wanted && self.disk_bytes <= wanted.disk_bytes
    }
}

/// How long the parts are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::view) struct Shape {
    /// Size of the disk, in bytes.
    pub(in crate::view) disk_bytes: u64,
    /// Chunks of data.
    pub(in crate::view) places: u32,
    /// Entries of the map: one for each chunk of data, and those of chunks that have none.
    pub(in crate::view) entries: u32,
}

impl Shape {
    /// For a disk of which up to `limit_bytes` are to be written.
    pub(in crate::view) fn new(disk_bytes: u64, limit_bytes: u64) -> Self {
        let disk_chunks = disk_bytes.div_ceil(CHUNK_BYTES).max(1);
        let places = limit_bytes.div_ceil(CHUNK_BYTES).clamp(1, disk_chunks.min(CHUNKS_MAX));
        let spare = places.max(SPARE_ENTRIES_MIN).min(disk_chunks);
        let entries = (places + spare).next_multiple_of(PAGE_ENTRIES);
        Self { disk_bytes, places: places as u32, entries: entries as u32 }
    }

    /// Chunks of the disk.
    pub(super) fn disk_chunks(&self) -> u64 {
        self.disk_bytes.div_ceil(CHUNK_BYTES)
    }

    /// Word at which the bits of chunks that read zeroes begin.
    pub(super) fn zeroes_word(&self) -> usize {
        self.entries as usize * ENTRY_WORDS
    }

    /// Pages of the map.
    pub(super) fn pages(&self) -> u32 {
        let words = self.zeroes_word() as u64 + self.disk_chunks().div_ceil(64);
        words.div_ceil(PAGE_WORDS as u64) as u32
    }

    /// Words of the map.
    pub(super) fn words(&self) -> usize {
        self.pages() as usize * PAGE_WORDS
    }

    /// Where a copy of a page of the map is, in bytes.
    pub(super) fn page_offset_bytes(page: u32, copy: u8) -> u64 {
        MAP_OFFSET_BYTES + (2 * u64::from(page) + u64::from(copy)) * PAGE_BYTES as u64
    }

    /// Where the data begins, in bytes.
    pub(in crate::view) fn data_offset_bytes(&self) -> u64 {
        Self::page_offset_bytes(self.pages(), 0).next_multiple_of(DATA_ALIGN_BYTES)
    }

    /// Length of the file, in bytes.
    pub(super) fn file_bytes(&self) -> u64 {
        self.data_offset_bytes() + u64::from(self.places) * CHUNK_BYTES
    }

    fn is_sound(&self) -> bool {
        let most = Self::new(self.disk_bytes, u64::MAX);
        (1..=DISK_MAX_BYTES).contains(&self.disk_bytes)
            && (1..=most.places).contains(&self.places)
            && self.entries >= self.places
            && u64::from(self.entries) <= CHUNKS_MAX * 2 + SPARE_ENTRIES_MIN + PAGE_ENTRIES
            && u64::from(self.entries).is_multiple_of(PAGE_ENTRIES)
    }
}

/// The header, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Goes up with each change; the higher valid copy counts.
    pub(super) sequence: u64,
    /// This very file.
    pub(super) file_id: Uuid,
    /// The run of the kernel in which the file was last opened for writing and not closed in order; nil if it was.
    pub(super) boot: Uuid,
    /// Whose it is.
    pub(super) owner: ScratchOwner,
    /// How long its parts are.
    pub(super) shape: Shape,
    /// What the key of its data comes from, if that is encrypted; the salt is the file's id.
    pub(super) key: Option<WrappedKey>,
    /// What the records up to here have written beneath the view is not beneath it any more, but in the scratch; 0 if nothing was copied.
    pub(super) kept_seq: u64,
}

/// Why bytes are no header or no page of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScratchFormatError {
    /// They don't begin as one does.
    #[error("it does not begin as a scratch file does")]
    Magic,
    /// A newer format.
    #[error(
        "its format version {0} is not known, only {VERSION_ENCRYPTED} and older: a newer release wrote it, use that one"
    )]
    Version(u32),
    /// The checksum is wrong.
    #[error("a checksum is wrong")]
    Crc,
    /// A field is out of bounds although the checksum is right.
    #[error("its field {0} is out of bounds")]
    Field(&'static str),
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct HeaderPage {
    magic: [u8; 8],
    version: U32,
    crc: U32,
    sequence: U64,
    file_id: [u8; 16],
    boot: [u8; 16],
    vra: [u8; 16],
    view: [u8; 16],
    vm: [u8; 16],
    journal: [u8; 16],
    volume: [u8; 16],
    number: U16,
    reserved: [u8; 2],
    logical_block_bytes: U32,
    seq: U64,
    disk_bytes: U64,
    places: U32,
    entries: U32,
    encryption_key_id: [u8; 16],
    encryption_wrapped_key: [u8; WRAPPED_KEY_BYTES],
    kept_seq: U64,
    unused: [u8; 3808],
}
const _: () = assert!(size_of::<HeaderPage>() == PAGE_BYTES);

impl Header {
    /// The page to write.
    pub(super) fn encode(&self) -> [u8; PAGE_BYTES] {
        let mut page = HeaderPage::new_zeroed();
        page.magic = HEADER_MAGIC;
        page.version = if self.key.is_some() { VERSION_ENCRYPTED } else { VERSION }.into();
        page.sequence = self.sequence.into();
        page.file_id = self.file_id.into_bytes();
        page.boot = self.boot.into_bytes();
        page.vra = self.owner.vra.into_bytes();
        page.view = self.owner.view.into_bytes();
        page.vm = self.owner.vm.into_bytes();
        page.journal = self.owner.journal.into_bytes();
        page.volume = self.owner.volume.into_bytes();
        page.number = self.owner.number.into();
        page.logical_block_bytes = self.owner.logical_block_bytes.into();
        page.seq = self.owner.seq.into();
        page.disk_bytes = self.shape.disk_bytes.into();
        page.places = self.shape.places.into();
        page.entries = self.shape.entries.into();
        page.kept_seq = self.kept_seq.into();
        if let Some(key) = &self.key {
            page.encryption_key_id = key.key_id.into_bytes();
            page.encryption_wrapped_key = key.bytes;
        }
        page.crc = page_crc(page.as_bytes(), offset_of!(HeaderPage, crc)).into();
        zerocopy::transmute!(page)
    }

    /// Reads a page.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, ScratchFormatError> {
        let (page, _) = HeaderPage::ref_from_prefix(bytes).map_err(|_| ScratchFormatError::Magic)?;
        if page.magic != HEADER_MAGIC {
            return Err(ScratchFormatError::Magic);
        }
        let is_encrypted = match page.version.get() {
            VERSION => false,
            VERSION_ENCRYPTED => true,
            other => return Err(ScratchFormatError::Version(other)),
        };
        if page.crc.get() != page_crc(page.as_bytes(), offset_of!(HeaderPage, crc)) {
            return Err(ScratchFormatError::Crc);
        }
        let shape = Shape {
            disk_bytes: page.disk_bytes.get(),
            places: page.places.get(),
            entries: page.entries.get(),
        };
        if !shape.is_sound() {
            return Err(ScratchFormatError::Field("disk_size, chunks or entries"));
        }
        let logical_block_bytes = page.logical_block_bytes.get();
        if !matches!(logical_block_bytes, 512 | 4096) {
            return Err(ScratchFormatError::Field("logical_block"));
        }
        let owner = ScratchOwner {
            vra: Uuid::from_bytes(page.vra),
            view: Uuid::from_bytes(page.view),
            vm: Uuid::from_bytes(page.vm),
            journal: Uuid::from_bytes(page.journal),
            volume: Uuid::from_bytes(page.volume),
            number: page.number.get(),
            seq: page.seq.get(),
            disk_bytes: shape.disk_bytes,
            logical_block_bytes,
        };
        let (file_id, boot) = (Uuid::from_bytes(page.file_id), Uuid::from_bytes(page.boot));
        let key = is_encrypted.then(|| WrappedKey {
            key_id: Uuid::from_bytes(page.encryption_key_id),
            bytes: page.encryption_wrapped_key,
        });
        Ok(Self {
            sequence: page.sequence.get(),
            file_id,
            boot,
            owner,
            shape,
            key,
            kept_seq: page.kept_seq.get(),
        })
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct MapPage {
    magic: [u8; 8],
    version: U32,
    crc: U32,
    file_id: [u8; 16],
    page: U32,
    reserved: U32,
    sequence: U64,
    unused: [u8; 16],
    words: [U64; PAGE_WORDS],
}
const _: () = assert!(size_of::<MapPage>() == PAGE_BYTES);

/// Writes a page of the map into `into`, which is as long as one.
pub(super) fn encode_page(into: &mut [u8], file_id: Uuid, page: u32, sequence: u64, words: &[u64]) {
    let Ok(map) = MapPage::mut_from_bytes(into) else {
        debug_assert!(false, "a page is {PAGE_BYTES} bytes");
        return;
    };
    map.magic = PAGE_MAGIC;
    (map.version, map.page, map.sequence) = (VERSION.into(), page.into(), sequence.into());
    (map.reserved, map.unused) = (U32::ZERO, [0; 16]);
    map.file_id = file_id.into_bytes();
    for (into, word) in map.words.iter_mut().zip(words) {
        *into = (*word).into();
    }
    map.crc = page_crc(map.as_bytes(), offset_of!(MapPage, crc)).into();
}

/// Reads a copy of a page of the map: its sequence, and its words into `words`. Sequence 0 is a copy that was never written.
pub(super) fn decode_page(
    bytes: &[u8],
    file_id: Uuid,
    page: u32,
    words: &mut [u64],
) -> Result<u64, ScratchFormatError> {
    if bytes.iter().all(|byte| *byte == 0) {
        words.fill(0);
        return Ok(0);
    }
    let (map, _) = MapPage::ref_from_prefix(bytes).map_err(|_| ScratchFormatError::Magic)?;
    if map.magic != PAGE_MAGIC {
        return Err(ScratchFormatError::Magic);
    }
    if map.version.get() != VERSION {
        return Err(ScratchFormatError::Version(map.version.get()));
    }
    if map.crc.get() != page_crc(map.as_bytes(), offset_of!(MapPage, crc)) {
        return Err(ScratchFormatError::Crc);
    }
    if map.file_id != file_id.into_bytes() || map.page.get() != page {
        return Err(ScratchFormatError::Field("file or page"));
    }
    if map.sequence.get() == 0 || map.sequence.get() == u64::MAX {
        return Err(ScratchFormatError::Field("sequence"));
    }
    for (word, from) in words.iter_mut().zip(&map.words) {
        *word = from.get();
    }
    Ok(map.sequence.get())
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn headers()(
            (sequence, seq) in any::<(u64, u64)>(),
            ids in any::<[u128; 7]>(),
            number in any::<u16>(),
            disk_bytes in 1..=DISK_MAX_BYTES,
            limit_bytes in any::<u64>(),
            logical_block_bytes in prop::sample::select(vec![512, 4096]),
            key in prop::option::of((any::<u128>(), any::<[u8; 32]>())),
            kept_seq in any::<u64>(),
        ) -> Header {
            let [file_id, boot, vra, view, vm, journal, volume] = ids.map(Uuid::from_u128);
            let owner =
                ScratchOwner { vra, view, vm, journal, volume, number, seq, disk_bytes, logical_block_bytes };
            let key = key.map(|(id, random)| {
                let mut bytes = [0; WRAPPED_KEY_BYTES];
                bytes[..32].copy_from_slice(&random);
                WrappedKey { key_id: Uuid::from_u128(id), bytes }
            });
            Header { sequence, file_id, boot, owner, shape: Shape::new(disk_bytes, limit_bytes), key, kept_seq }
        }
    }

    proptest! {
        #[test]
        fn a_header_comes_back_and_no_flipped_bit_goes_unnoticed(header in headers(), bit in 0..PAGE_BYTES * 8) {
            let mut page = header.encode();
            prop_assert_eq!(Header::decode(&page), Ok(header));
            page[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Header::decode(&page).is_err());
        }

        #[test]
        fn a_page_comes_back_and_no_flipped_bit_goes_unnoticed(
            words in prop::collection::vec(any::<u64>(), PAGE_WORDS),
            (id, page, sequence) in (any::<u128>(), any::<u32>(), 1..u64::MAX),
            bit in 0..PAGE_BYTES * 8,
        ) {
            let id = Uuid::from_u128(id);
            let (mut bytes, mut found) = (vec![0xEE; PAGE_BYTES], vec![1; PAGE_WORDS]);
            encode_page(&mut bytes, id, page, sequence, &words);
            prop_assert_eq!(decode_page(&bytes, id, page, &mut found), Ok(sequence));
            prop_assert_eq!(&found, &words);
            prop_assert!(decode_page(&bytes, id, page ^ 1, &mut found).is_err());
            prop_assert!(decode_page(&bytes, Uuid::nil(), page, &mut found).is_err() || id.is_nil());
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(decode_page(&bytes, id, page, &mut found).is_err());
        }

        /// Any bytes, also with what is looked at first and a right checksum: refused or bounded.
        #[test]
        fn garbage_is_refused_without_a_panic(
            mut bytes in prop::collection::vec(any::<u8>(), 0..PAGE_BYTES + 9), as_header in any::<bool>()
        ) {
            let mut words = vec![0; PAGE_WORDS];
            let _ = (Header::decode(&bytes), decode_page(&bytes, Uuid::nil(), 0, &mut words));
            if bytes.len() >= PAGE_BYTES {
                bytes.truncate(PAGE_BYTES);
                bytes[..8].copy_from_slice(if as_header { &HEADER_MAGIC } else { &PAGE_MAGIC });
                bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
                let crc = page_crc(&bytes, 12);
                bytes[12..16].copy_from_slice(&crc.to_le_bytes());
                if let Ok(header) = Header::decode(&bytes) {
                    prop_assert!(header.shape.is_sound());
                }
                let _ = decode_page(&bytes, Uuid::nil(), 0, &mut words);
            }
        }
    }

    #[test]
    fn parts_of_a_file_do_not_overlap() {
        for (disk_bytes, limit_bytes) in [(1, 1), (1 << 30, 1 << 20), (DISK_MAX_BYTES, 1 << 40)] {
            let shape = Shape::new(disk_bytes, limit_bytes);
            assert!(shape.is_sound(), "{shape:?}");
            assert!(shape.zeroes_word() as u64 + shape.disk_chunks().div_ceil(64) <= shape.words() as u64);
            assert!(
                Shape::page_offset_bytes(shape.pages() - 1, 1) + PAGE_BYTES as u64
                    <= shape.data_offset_bytes()
            );
            assert!(shape.file_bytes() >= shape.data_offset_bytes() + limit_bytes.min(disk_bytes));
        }
    }
}
