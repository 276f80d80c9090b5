//! The superblock: two copies, the valid one with the higher sequence counts.

use std::mem::{offset_of, size_of};

use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{
    ChainPoint, FIRST_SLOT_OFFSET_BYTES, FORMAT_VERSION, LowWater, MANIFEST_OFFSETS, MANIFEST_SLOT_BYTES,
    MAX_SLOT_BYTES, MAX_SLOTS, MIN_SLOT_BYTES, PAGE_BYTES, page_crc,
};
use crate::batch::{MAX_VOLUME_BYTES, MAX_VOLUMES};
use crate::crypt::{Encryption, WRAPPED_KEY_BYTES, WrappedKey};
use crate::planted::{Bug, planted};

/// First eight bytes of a superblock.
pub const SUPERBLOCK_MAGIC: [u8; 8] = *b"HFJOURNL";

/// What the journal as a whole is, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Goes up with each change; the higher valid copy counts.
    pub sequence: u64,
    /// The journal.
    pub journal_id: Uuid,
    /// The VM whose writes it keeps.
    pub vm_id: Uuid,
    /// The group that the VM belongs to.
    pub vpg_id: Uuid,
    /// Length of a segment slot, in bytes.
    pub slot_len_bytes: u64,
    /// How many slots the file has.
    pub slot_count: u32,
    /// How often the journal was opened for writing (C1).
    pub open_count: u64,
    /// Which manifest counts, if one was written.
    pub manifest: Option<PairPlace>,
    /// Which list of bad ranges counts, if there are any (C5).
    pub bad_list: Option<PairPlace>,
    /// Number of the oldest segment that counts; all below are free.
    pub low_water_segment: u64,
    /// The stream's place before that segment: everything up to it is in the recovery disks.
    pub low_water: ChainPoint,
    /// Whether there is a history.
    pub state: JournalState,
    /// Promotion through this number was announced (C2); 0 if none. Nothing below it may be opened.
    pub promotion_intent_seq: u64,
    /// The generation that owns the journal's tail (A5); nil before the first.
    pub tail_generation: Uuid,
    /// The generation before it; nil if none.
    pub parent_generation: Uuid,
    /// First number of the tail generation.
    pub generation_first_seq: u64,
    /// Where the tail generation forked off: the last number that records of older generations may have.
    pub generation_fork_seq: u64,
    /// Newest receive time known when this copy was written, µs since the Unix epoch (C6): never decreases.
    pub receive_time_us: u64,
    /// Whether segments are encrypted that are begun from now on.
    pub encryption: Encryption,
    /// The VM's volumes, by number.
    pub volumes: Vec<VolumeState>,
}

/// Which slot of a pair counts and what is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairPlace {
    /// 0 or 1: the slot at [`MANIFEST_OFFSETS`] or [`super::BAD_LIST_OFFSETS`].
    pub slot: u32,
    /// CRC in the slot's header, which covers the rest.
    pub crc: u32,
}

impl PairPlace {
    /// The slot that the next write goes to.
    pub fn other_slot(place: Option<Self>) -> u32 {
        place.map_or(0, |place| 1 - place.slot)
    }
}

/// Whether the journal has a history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JournalState {
    /// The first sync writes the recovery disks; there is no history yet (B6). The id is 0 until a sync has begun.
    FirstSync {
        /// The sync.
        sync_id: u64,
    },
    /// Recovery disks and segments together hold the history.
    Consistent,
    /// The history was given up so that a sync could go on (C5): inconsistent until that sync's end.
    HistoryGivenUp {
        /// The sync.
        sync_id: u64,
    },
}

impl JournalState {
    /// Whether records go straight to the recovery disks.
    pub fn is_base_sync(self) -> bool {
        self != Self::Consistent
    }
}

/// One volume of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeState {
    /// The volume.
    pub id: Uuid,
    /// Records up to this number are in its recovery disk and never applied or read again (B6); 0 before the first.
    pub base_seq: u64,
    /// Its size at the low-water mark, in bytes.
    pub size_bytes: u64,
    /// The recovery disk was made for this journal and reads zeroes where no record wrote: a sync may skip holes.
    pub fresh_image: bool,
}

/// Why a page is not a superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum SuperblockError {
    /// The page doesn't begin as a superblock does.
    #[error("no superblock is here")]
    Magic,
    /// A newer format.
    #[error("format version {0} is not known, only {FORMAT_VERSION}: a newer release wrote it, use that one")]
    Version(u32),
    /// The checksum is wrong.
    #[error("the superblock's checksum is wrong")]
    Crc,
    /// The disk can't give it back.
    #[error("the disk cannot give the superblock back")]
    Unreadable,
    /// It uses a feature that this release doesn't know.
    #[error("it needs features {0:#x} that this release doesn't know: use the release that wrote it")]
    Features(u64),
    /// A field is out of bounds although the checksum is right.
    #[error("its field {0} is out of bounds")]
    Field(&'static str),
}

impl Superblock {
    /// Where the history begins, as segments tell it.
    pub fn low_water_mark(&self) -> LowWater {
        LowWater { segment: self.low_water_segment, seq: self.low_water.seq }
    }

    /// The page to write.
    ///
    /// # Panics
    /// With more than [`MAX_VOLUMES`] volumes.
    pub fn encode(&self) -> [u8; PAGE_BYTES] {
        assert!(self.volumes.len() <= MAX_VOLUMES, "the writer refuses more volumes");
        let (state, state_sync_id) = match self.state {
            JournalState::FirstSync { sync_id } => (1, sync_id),
            JournalState::Consistent => (2, 0),
            JournalState::HistoryGivenUp { sync_id } => (3, sync_id),
        };
        let mut page = SuperblockPage::new_zeroed();
        page.magic = SUPERBLOCK_MAGIC;
        page.version = FORMAT_VERSION.into();
        page.sequence = self.sequence.into();
        page.journal_id = *self.journal_id.as_bytes();
        page.vm_id = *self.vm_id.as_bytes();
        page.vpg_id = *self.vpg_id.as_bytes();
        page.slot_len_bytes = self.slot_len_bytes.into();
        page.first_slot_offset_bytes = FIRST_SLOT_OFFSET_BYTES.into();
        page.slot_count = self.slot_count.into();
        page.open_count = self.open_count.into();
        if let Some(manifest) = self.manifest {
            page.manifest_present = 1.into();
            page.manifest_slot = manifest.slot.into();
            page.manifest_crc = manifest.crc.into();
        }
        let mut features = 0;
        if let Some(bad_list) = self.bad_list {
            features |= FEATURE_BAD_RANGES;
            page.bad_list_slot = bad_list.slot.into();
            page.bad_list_crc = bad_list.crc.into();
        }
        match &self.encryption {
            Encryption::Never => {}
            Encryption::Off => page.encryption = ENCRYPTION_OFF.into(),
            Encryption::On(key) => {
                page.encryption = ENCRYPTION_XTS.into();
                page.encryption_key_id = *key.key_id.as_bytes();
                page.encryption_wrapped_key = key.bytes;
            }
        }
        if self.encryption != Encryption::Never {
            features |= FEATURE_ENCRYPTION;
        }
        page.required_features = features.into();
        page.low_water_segment = self.low_water_segment.into();
        page.low_water_seq = self.low_water.seq.into();
        page.low_water_batch_crc = self.low_water.batch_crc.into();
        page.state = U32::new(state);
        page.state_sync_id = state_sync_id.into();
        page.promotion_intent_seq = self.promotion_intent_seq.into();
        page.tail_generation = *self.tail_generation.as_bytes();
        page.parent_generation = *self.parent_generation.as_bytes();
        page.generation_first_seq = self.generation_first_seq.into();
        page.generation_fork_seq = self.generation_fork_seq.into();
        page.receive_time_us = self.receive_time_us.into();
        page.volume_count = (self.volumes.len() as u32).into();
        for (entry, volume) in page.volumes.iter_mut().zip(&self.volumes) {
            entry.id = *volume.id.as_bytes();
            entry.base_seq = volume.base_seq.into();
            entry.size_bytes = volume.size_bytes.into();
            entry.flags = U32::new(if volume.fresh_image { VOLUME_FRESH } else { 0 });
        }
        page.crc = page_crc(page.as_bytes(), offset_of!(SuperblockPage, crc)).into();
        zerocopy::transmute!(page)
    }

    /// Reads a page.
    ///
    /// # Errors
    /// The bytes are not a valid superblock of this version.
    pub fn decode(bytes: &[u8]) -> Result<Self, SuperblockError> {
        let (page, _) = SuperblockPage::ref_from_prefix(bytes).map_err(|_| SuperblockError::Magic)?;
        if page.magic != SUPERBLOCK_MAGIC {
            return Err(SuperblockError::Magic);
        }
        // Every version has its CRC here: a version in a page that the CRC doesn't fit is no newer release's, but damage.
        if page.crc.get() != page_crc(page.as_bytes(), offset_of!(SuperblockPage, crc)) {
            return Err(SuperblockError::Crc);
        }
        if page.version.get() != FORMAT_VERSION {
            return Err(SuperblockError::Version(page.version.get()));
        }
        let features = page.required_features.get();
        if features & !(FEATURE_BAD_RANGES | FEATURE_ENCRYPTION) != 0 {
            return Err(SuperblockError::Features(features));
        }
        let check = |good: bool, field| if good { Ok(()) } else { Err(SuperblockError::Field(field)) };
        let slot_len_bytes = page.slot_len_bytes.get();
        check(
            (MIN_SLOT_BYTES..=MAX_SLOT_BYTES).contains(&slot_len_bytes)
                && slot_len_bytes.is_multiple_of(PAGE_BYTES as u64),
            "slot_len_bytes",
        )?;
        check(page.first_slot_offset_bytes.get() == FIRST_SLOT_OFFSET_BYTES, "first_slot_offset_bytes")?;
        check(page.slot_count.get() <= MAX_SLOTS, "slot_count")?;
        check(page.low_water_segment.get() < u64::MAX, "low_water_segment")?;
        check(page.low_water_seq.get() < u64::MAX, "low_water_seq")?;
        let sync_id = page.state_sync_id.get();
        let state = match page.state.get() {
            1 => JournalState::FirstSync { sync_id },
            2 => JournalState::Consistent,
            3 => JournalState::HistoryGivenUp { sync_id },
            _ => return Err(SuperblockError::Field("state")),
        };
        let manifest = match page.manifest_present.get() {
            0 => None,
            1 => Some(PairPlace { slot: page.manifest_slot.get(), crc: page.manifest_crc.get() }),
            _ => return Err(SuperblockError::Field("manifest_present")),
        };
        check(manifest.is_none_or(|place| (place.slot as usize) < MANIFEST_OFFSETS.len()), "manifest_slot")?;
        let bad_list = (features & FEATURE_BAD_RANGES != 0)
            .then(|| PairPlace { slot: page.bad_list_slot.get(), crc: page.bad_list_crc.get() });
        check(bad_list.is_none_or(|place| place.slot < 2), "bad_list_slot")?;
        let encryption = match (features & FEATURE_ENCRYPTION != 0, page.encryption.get()) {
            (false, 0) => Encryption::Never,
            (true, ENCRYPTION_OFF) => Encryption::Off,
            (true, ENCRYPTION_XTS) => Encryption::On(WrappedKey {
                key_id: Uuid::from_bytes(page.encryption_key_id),
                bytes: page.encryption_wrapped_key,
            }),
            _ => return Err(SuperblockError::Field("encryption")),
        };
        let volume_count = page.volume_count.get() as usize;
        check(volume_count <= MAX_VOLUMES, "volume_count")?;
        let mut volumes = Vec::with_capacity(volume_count);
        for entry in &page.volumes[..volume_count] {
            check(entry.size_bytes.get() <= MAX_VOLUME_BYTES, "size_bytes")?;
            volumes.push(VolumeState {
                id: Uuid::from_bytes(entry.id),
                base_seq: entry.base_seq.get(),
                size_bytes: entry.size_bytes.get(),
                fresh_image: entry.flags.get() & VOLUME_FRESH != 0,
            });
        }
        Ok(Self {
            sequence: page.sequence.get(),
            journal_id: Uuid::from_bytes(page.journal_id),
            vm_id: Uuid::from_bytes(page.vm_id),
            vpg_id: Uuid::from_bytes(page.vpg_id),
            slot_len_bytes,
            slot_count: page.slot_count.get(),
            open_count: page.open_count.get(),
            manifest,
            bad_list,
            low_water_segment: page.low_water_segment.get(),
            low_water: ChainPoint {
                seq: page.low_water_seq.get(),
                batch_crc: page.low_water_batch_crc.get(),
            },
            state,
            promotion_intent_seq: page.promotion_intent_seq.get(),
            tail_generation: Uuid::from_bytes(page.tail_generation),
            parent_generation: Uuid::from_bytes(page.parent_generation),
            generation_first_seq: page.generation_first_seq.get(),
            generation_fork_seq: page.generation_fork_seq.get(),
            receive_time_us: page.receive_time_us.get(),
            encryption,
            volumes,
        })
    }

    /// The oldest number at which the journal can be opened: nothing below it is whole (B6, C2).
    pub fn oldest_seq(&self) -> u64 {
        if planted(Bug::IntentIgnoredByViews) {
            return self.low_water.seq;
        }
        self.low_water.seq.max(self.promotion_intent_seq)
    }
}

/// Bit of [`SuperblockPage::required_features`]: parts of the recovery disks must not be read.
const FEATURE_BAD_RANGES: u64 = 1;
/// Bit of [`SuperblockPage::required_features`]: segments may be encrypted.
const FEATURE_ENCRYPTION: u64 = 2;
/// [`SuperblockPage::encryption`]: batches and footers of new segments under AES-256-XTS.
const ENCRYPTION_XTS: u32 = 1;
/// [`SuperblockPage::encryption`]: new segments are not, older ones may be.
const ENCRYPTION_OFF: u32 = 2;
/// [`VolumeEntry::flags`]: [`VolumeState::fresh_image`].
const VOLUME_FRESH: u32 = 1;

/// A superblock as it lies in the file: one page.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SuperblockPage {
    /// [`SUPERBLOCK_MAGIC`].
    magic: [u8; 8],
    /// [`FORMAT_VERSION`].
    version: U32,
    /// CRC32C of the page with this field zero.
    crc: U32,
    /// [`Superblock::sequence`].
    sequence: U64,
    /// [`Superblock::journal_id`].
    journal_id: [u8; 16],
    /// [`Superblock::vm_id`].
    vm_id: [u8; 16],
    /// [`Superblock::vpg_id`].
    vpg_id: [u8; 16],
    /// [`Superblock::slot_len_bytes`].
    slot_len_bytes: U64,
    /// [`FIRST_SLOT_OFFSET_BYTES`].
    first_slot_offset_bytes: U64,
    /// [`Superblock::slot_count`].
    slot_count: U32,
    /// [`JournalState`]: 1 first sync, 2 consistent, 3 history given up.
    state: U32,
    /// The sync of states 1 and 3.
    state_sync_id: U64,
    /// Bits that a reader must know to read the file; a reader refuses the file otherwise.
    required_features: U64,
    /// [`Superblock::open_count`].
    open_count: U64,
    /// [`Superblock::low_water_segment`].
    low_water_segment: U64,
    /// [`ChainPoint::seq`] of the low-water mark.
    low_water_seq: U64,
    /// [`ChainPoint::batch_crc`] of the low-water mark.
    low_water_batch_crc: U32,
    /// 1 if a manifest was written.
    manifest_present: U32,
    /// [`PairPlace::slot`].
    manifest_slot: U32,
    /// [`PairPlace::crc`].
    manifest_crc: U32,
    /// [`Superblock::promotion_intent_seq`].
    promotion_intent_seq: U64,
    /// [`Superblock::tail_generation`].
    tail_generation: [u8; 16],
    /// [`Superblock::parent_generation`].
    parent_generation: [u8; 16],
    /// [`Superblock::generation_first_seq`].
    generation_first_seq: U64,
    /// [`Superblock::generation_fork_seq`].
    generation_fork_seq: U64,
    /// [`Superblock::receive_time_us`].
    receive_time_us: U64,
    /// [`Superblock::encryption`]: 0 never, [`ENCRYPTION_XTS`] or [`ENCRYPTION_OFF`] with [`FEATURE_ENCRYPTION`].
    encryption: U32,
    /// [`Superblock::volumes`]'s count.
    volume_count: U32,
    /// The key that segments begun from now on are encrypted with; zero without encryption.
    encryption_key_id: [u8; 16],
    /// That key, wrapped by the site's; zero without encryption.
    encryption_wrapped_key: [u8; WRAPPED_KEY_BYTES],
    /// [`PairPlace::slot`] of the list of bad ranges; means nothing without [`FEATURE_BAD_RANGES`].
    bad_list_slot: U32,
    /// [`PairPlace::crc`] of the list of bad ranges.
    bad_list_crc: U32,
    /// Zero.
    reserved: [u8; 680],
    /// The volumes by number; unused ones zero.
    volumes: [VolumeEntry; MAX_VOLUMES],
}

/// One volume in the superblock: 48 bytes.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct VolumeEntry {
    /// [`VolumeState::id`].
    id: [u8; 16],
    /// [`VolumeState::base_seq`].
    base_seq: U64,
    /// [`VolumeState::size_bytes`].
    size_bytes: U64,
    /// [`VOLUME_FRESH`].
    flags: U32,
    /// Zero.
    reserved: [u8; 12],
}

const _: () = {
    assert!(size_of::<SuperblockPage>() == PAGE_BYTES);
    assert!(size_of::<VolumeEntry>() == 48);
    assert!(offset_of!(SuperblockPage, crc) == 12);
    assert!(offset_of!(SuperblockPage, slot_len_bytes) == 72);
    assert!(offset_of!(SuperblockPage, open_count) == 112);
    assert!(offset_of!(SuperblockPage, promotion_intent_seq) == 152);
    assert!(offset_of!(SuperblockPage, encryption) == 216);
    assert!(offset_of!(SuperblockPage, volumes) == 1024);
    assert!(offset_of!(SuperblockPage, bad_list_slot) == 336);
    assert!(MANIFEST_OFFSETS[1] + MANIFEST_SLOT_BYTES as u64 <= super::BAD_LIST_OFFSETS[0]);
    assert!(super::BAD_LIST_OFFSETS[1] + super::BAD_LIST_SLOT_BYTES as u64 <= FIRST_SLOT_OFFSET_BYTES);
};
