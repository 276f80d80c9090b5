//! First and last page of a segment slot.

use std::mem::{offset_of, size_of};

use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::crypt::{SALT_BYTES, SegmentKey, WRAPPED_KEY_BYTES, WrappedKey};

use super::{ChainPoint, FORMAT_VERSION, MAX_SLOT_BYTES, MIN_SLOT_BYTES, PAGE_BYTES, page_crc};

/// First eight bytes of a segment's first page.
pub const HEADER_MAGIC: [u8; 8] = *b"HFSEGHDR";
/// First eight bytes of a sealed segment slot's last page.
pub const TRAILER_MAGIC: [u8; 8] = *b"HFSEGEND";

/// [`SegmentPage::encryption`]: AES-256-XTS.
const ENCRYPTION_XTS: u32 = 1;

/// A segment's first page, decoded. Batches follow at [`PAGE_BYTES`], one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The journal.
    pub journal_id: Uuid,
    /// The segment's number, counted from 1 over the journal's life.
    pub number: u64,
    /// The slot it lies in.
    pub slot: u32,
    /// The opening of the journal that wrote this copy of the segment (C1).
    pub open_count: u64,
    /// The stream's place before its first batch.
    pub after: ChainPoint,
    /// Batches before this place in the slot were copied from an older opening's copy of the segment; later ones carry
    /// this header's open count. In bytes from the slot's start; [`PAGE_BYTES`] if none was copied.
    pub carried_end_bytes: u64,
    /// When the target received its first batch, µs since the Unix epoch (C6).
    pub begin_time_us: u64,
    /// Length of a slot, in bytes: finds the other slots when no superblock is left.
    pub slot_len_bytes: u64,
    /// What batches and footer are encrypted with, if they are.
    pub encryption: Option<SegmentKey>,
    /// The superblock's low-water mark when this page was written: tells which segments count when no superblock is left. None where the
    /// journal's first writers left it out.
    pub low_water: Option<LowWater>,
}

/// Where a history begins: all before it is in the recovery disks, or was given up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct LowWater {
    /// Segments with a lower number don't count.
    pub segment: u64,
    /// Records up to this number are in the recovery disks.
    pub seq: u64,
}

/// A sealed segment's last page, decoded: written only after all its batches were durable, so that its presence
/// proves them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentTrailer {
    /// What the header says; either page can stand for the other.
    pub header: SegmentHeader,
    /// Where the batches end, in bytes from the slot's start: the footer begins there.
    pub data_end_bytes: u64,
    /// Length of the footer, in bytes, a multiple of [`PAGE_BYTES`].
    pub footer_len_bytes: u64,
    /// CRC32C of the footer.
    pub footer_crc: u32,
    /// The stream's place after its last batch.
    pub last: ChainPoint,
    /// When the target received its last batch, µs since the Unix epoch (C6).
    pub end_time_us: u64,
}

/// Why a page is not a segment's header or trailer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum PageError {
    /// The page doesn't begin as it should.
    #[error("no such page is here")]
    Magic,
    /// A newer format.
    #[error("version {0} is not known: a newer release wrote it")]
    Version(u32),
    /// The checksum is wrong.
    #[error("the page's checksum is wrong")]
    Crc,
    /// A field is out of bounds although the checksum is right.
    #[error("its field {0} is out of bounds")]
    Field(&'static str),
}

impl SegmentHeader {
    /// The page to write.
    pub fn encode(&self) -> [u8; PAGE_BYTES] {
        let mut page = SegmentPage::new_zeroed();
        page.fill(HEADER_MAGIC, self);
        page.seal()
    }

    /// Reads a page.
    ///
    /// # Errors
    /// The page is not a valid segment header for slots of this length.
    pub fn decode(bytes: &[u8], slot_len_bytes: u64) -> Result<Self, PageError> {
        SegmentPage::check(bytes, HEADER_MAGIC)?.header(slot_len_bytes)
    }

    /// Reads a page of a journal whose slots' length isn't known.
    ///
    /// # Errors
    /// The page is not a valid segment header that names that length.
    pub fn decode_of_any(bytes: &[u8]) -> Result<Self, PageError> {
        let page = SegmentPage::check(bytes, HEADER_MAGIC)?;
        let slot_len_bytes = page.slot_len_bytes.get();
        if !(MIN_SLOT_BYTES..=MAX_SLOT_BYTES).contains(&slot_len_bytes)
            || !slot_len_bytes.is_multiple_of(PAGE_BYTES as u64)
        {
            return Err(PageError::Field("slot_len_bytes"));
        }
        page.header(slot_len_bytes)
    }
}

impl SegmentTrailer {
    /// The page to write.
    pub fn encode(&self) -> [u8; PAGE_BYTES] {
        let mut page = SegmentPage::new_zeroed();
        page.fill(TRAILER_MAGIC, &self.header);
        page.data_end_bytes = self.data_end_bytes.into();
        page.footer_len_bytes = self.footer_len_bytes.into();
        page.footer_crc = self.footer_crc.into();
        page.last_seq = self.last.seq.into();
        page.last_batch_crc = self.last.batch_crc.into();
        page.end_time_us = self.end_time_us.into();
        page.seal()
    }

    /// Reads a page.
    ///
    /// # Errors
    /// The page is not a valid segment trailer for slots of this length.
    pub fn decode(bytes: &[u8], slot_len_bytes: u64) -> Result<Self, PageError> {
        let page = SegmentPage::check(bytes, TRAILER_MAGIC)?;
        let header = page.header(slot_len_bytes)?;
        let (data_end_bytes, footer_len_bytes) = (page.data_end_bytes.get(), page.footer_len_bytes.get());
        let aligned = |value: u64| value.is_multiple_of(PAGE_BYTES as u64) && value >= PAGE_BYTES as u64;
        if !aligned(data_end_bytes) || data_end_bytes < header.carried_end_bytes {
            return Err(PageError::Field("data_end_bytes"));
        }
        let end = data_end_bytes.checked_add(footer_len_bytes);
        if !aligned(footer_len_bytes) || end.is_none_or(|end| end > slot_len_bytes - PAGE_BYTES as u64) {
            return Err(PageError::Field("footer_len_bytes"));
        }
        if page.last_seq.get() < header.after.seq || page.last_seq.get() == u64::MAX {
            return Err(PageError::Field("last_seq"));
        }
        Ok(Self {
            header,
            data_end_bytes,
            footer_len_bytes,
            footer_crc: page.footer_crc.get(),
            last: ChainPoint { seq: page.last_seq.get(), batch_crc: page.last_batch_crc.get() },
            end_time_us: page.end_time_us.get(),
        })
    }
}

/// Header or trailer as it lies in the file: one page. In a header the fields from `data_end_bytes` to `end_time_us`
/// are zero.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SegmentPage {
    /// [`HEADER_MAGIC`] or [`TRAILER_MAGIC`].
    magic: [u8; 8],
    /// [`FORMAT_VERSION`].
    version: U32,
    /// CRC32C of the page with this field zero.
    crc: U32,
    /// [`SegmentHeader::journal_id`].
    journal_id: [u8; 16],
    /// [`SegmentHeader::number`].
    number: U64,
    /// [`SegmentHeader::open_count`].
    open_count: U64,
    /// [`ChainPoint::seq`] of [`SegmentHeader::after`].
    after_seq: U64,
    /// [`ChainPoint::batch_crc`] of [`SegmentHeader::after`].
    after_batch_crc: U32,
    /// [`SegmentHeader::slot`].
    slot: U32,
    /// [`SegmentHeader::carried_end_bytes`].
    carried_end_bytes: U64,
    /// [`SegmentHeader::begin_time_us`].
    begin_time_us: U64,
    /// [`SegmentTrailer::data_end_bytes`].
    data_end_bytes: U64,
    /// [`SegmentTrailer::footer_len_bytes`].
    footer_len_bytes: U64,
    /// [`ChainPoint::seq`] of [`SegmentTrailer::last`].
    last_seq: U64,
    /// [`ChainPoint::batch_crc`] of [`SegmentTrailer::last`].
    last_batch_crc: U32,
    /// [`SegmentTrailer::footer_crc`].
    footer_crc: U32,
    /// [`SegmentTrailer::end_time_us`].
    end_time_us: U64,
    /// Of batches and footer: 0 none, [`ENCRYPTION_XTS`]. The superblock has the required feature then.
    encryption: U32,
    /// Zero.
    reserved_word: U32,
    /// [`WrappedKey::key_id`]; zero without encryption.
    encryption_key_id: [u8; 16],
    /// [`SegmentKey::salt`]; zero without encryption.
    encryption_salt: [u8; SALT_BYTES],
    /// [`SegmentHeader::slot_len_bytes`].
    slot_len_bytes: U64,
    /// [`WrappedKey::bytes`]; zero without encryption.
    encryption_wrapped_key: [u8; WRAPPED_KEY_BYTES],
    /// [`LowWater::segment`]; 0 where the journal's first writers left it out.
    low_water_segment: U64,
    /// [`LowWater::seq`].
    low_water_seq: U64,
    /// Zero.
    reserved: [u8; 3816],
}

impl SegmentPage {
    fn fill(&mut self, magic: [u8; 8], header: &SegmentHeader) {
        self.magic = magic;
        self.version = FORMAT_VERSION.into();
        self.journal_id = *header.journal_id.as_bytes();
        self.number = header.number.into();
        self.open_count = header.open_count.into();
        self.after_seq = header.after.seq.into();
        self.after_batch_crc = header.after.batch_crc.into();
        self.slot = header.slot.into();
        self.carried_end_bytes = header.carried_end_bytes.into();
        self.begin_time_us = header.begin_time_us.into();
        self.slot_len_bytes = header.slot_len_bytes.into();
        if let Some(low_water) = header.low_water {
            self.low_water_segment = low_water.segment.into();
            self.low_water_seq = low_water.seq.into();
        }
        if let Some(SegmentKey { key, salt }) = &header.encryption {
            self.encryption = ENCRYPTION_XTS.into();
            self.encryption_key_id = *key.key_id.as_bytes();
            self.encryption_salt = *salt;
            self.encryption_wrapped_key = key.bytes;
        }
    }

    fn seal(mut self) -> [u8; PAGE_BYTES] {
        self.crc = page_crc(self.as_bytes(), offset_of!(Self, crc)).into();
        zerocopy::transmute!(self)
    }

    fn check(bytes: &[u8], magic: [u8; 8]) -> Result<&Self, PageError> {
        let (page, _) = Self::ref_from_prefix(bytes).map_err(|_| PageError::Magic)?;
        if page.magic != magic {
            return Err(PageError::Magic);
        }
        if page.version.get() != FORMAT_VERSION {
            return Err(PageError::Version(page.version.get()));
        }
        if page.crc.get() != page_crc(page.as_bytes(), offset_of!(Self, crc)) {
            return Err(PageError::Crc);
        }
        Ok(page)
    }

    fn header(&self, slot_len_bytes: u64) -> Result<SegmentHeader, PageError> {
        let carried_end_bytes = self.carried_end_bytes.get();
        if carried_end_bytes < PAGE_BYTES as u64
            || carried_end_bytes > slot_len_bytes - PAGE_BYTES as u64
            || !carried_end_bytes.is_multiple_of(PAGE_BYTES as u64)
        {
            return Err(PageError::Field("carried_end_bytes"));
        }
        let encryption = match self.encryption.get() {
            0 => None,
            ENCRYPTION_XTS => {
                let key_id = Uuid::from_bytes(self.encryption_key_id);
                let key = WrappedKey { key_id, bytes: self.encryption_wrapped_key };
                Some(SegmentKey { key, salt: self.encryption_salt })
            }
            _ => return Err(PageError::Field("encryption")),
        };
        if self.number.get() == 0 || self.number.get() == u64::MAX {
            return Err(PageError::Field("number"));
        }
        if self.after_seq.get() == u64::MAX {
            return Err(PageError::Field("after_seq"));
        }
        // The first writers of this version left it zero.
        if ![0, slot_len_bytes].contains(&self.slot_len_bytes.get()) {
            return Err(PageError::Field("slot_len_bytes"));
        }
        let low_water = LowWater { segment: self.low_water_segment.get(), seq: self.low_water_seq.get() };
        let is_left_out = low_water.segment == 0;
        if low_water.segment > self.number.get()
            || low_water.seq > self.after_seq.get()
            || is_left_out && low_water.seq != 0
        {
            return Err(PageError::Field("low_water"));
        }
        Ok(SegmentHeader {
            slot_len_bytes,
            journal_id: Uuid::from_bytes(self.journal_id),
            number: self.number.get(),
            slot: self.slot.get(),
            open_count: self.open_count.get(),
            after: ChainPoint { seq: self.after_seq.get(), batch_crc: self.after_batch_crc.get() },
            carried_end_bytes,
            begin_time_us: self.begin_time_us.get(),
            encryption,
            low_water: (!is_left_out).then_some(low_water),
        })
    }
}

const _: () = {
    assert!(size_of::<SegmentPage>() == PAGE_BYTES);
    assert!(offset_of!(SegmentPage, crc) == 12);
    assert!(offset_of!(SegmentPage, after_seq) == 48);
    assert!(offset_of!(SegmentPage, carried_end_bytes) == 64);
    assert!(offset_of!(SegmentPage, data_end_bytes) == 80);
    assert!(offset_of!(SegmentPage, encryption) == 120);
    assert!(offset_of!(SegmentPage, slot_len_bytes) == 160);
    assert!(offset_of!(SegmentPage, encryption_wrapped_key) == 168);
    assert!(offset_of!(SegmentPage, low_water_segment) == 264);
};
