//! Opening a journal: finding out what is there, read-only or as its next writer (C1).

mod decide;
mod footers;
mod rebuild;
mod salvage;
mod slots;
mod superblocks;
mod survey;

use bytes::Bytes;
use uuid::Uuid;

pub use footers::{each_footer, each_footer_mended};
pub use rebuild::{Rebuilt, newest_manifest, rebuild};
pub use salvage::Salvage;
pub use superblocks::choose_superblock;
pub(crate) use superblocks::read_superblock;
pub use survey::{Content, Damage, Hidden, Segment, SegmentError, Survey, SurveyOptions, survey, survey_as};

use crate::bad_ranges::BadRanges;
use crate::batch::RecordKind;
use crate::crypt::{Encryption, KeyError, Keyring, Keys, SALT_BYTES, SegmentKey};
use crate::format::bad_list::BadListError;
use crate::format::manifest::{Manifest, ManifestError};
use crate::format::{
    ChainPoint, JournalState, MAX_SLOT_BYTES, MAX_SLOTS, MIN_SLOT_BYTES, PAGE_BYTES, SUPERBLOCK_OFFSETS,
    SegmentHeader, Superblock, SuperblockError, VolumeState, edge_pages, slot_offset_bytes,
};
use crate::planted::{Bug, planted};
use crate::scan::{Ownership, Scan, scan};
use crate::storage::{AlignedBuf, Blocking, FileId, Op, Purpose, Storage, StorageError};

/// What a new journal is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewJournal {
    /// The journal's id, random.
    pub journal_id: Uuid,
    /// The VM.
    pub vm_id: Uuid,
    /// Its group.
    pub vpg_id: Uuid,
    /// Length of a segment slot, in bytes; see [`crate::format::DEFAULT_SLOT_BYTES`].
    pub slot_len_bytes: u64,
    /// How many slots to begin with, at least 2: one is always kept free for recovery.
    pub slot_count: u32,
    /// The VM's volumes.
    pub volumes: Vec<VolumeState>,
    /// JSON.
    pub manifest: String,
    /// Whether segments are encrypted; another can be set later.
    pub encryption: Encryption,
}

/// Why a journal cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file failed.
    #[error("the journal's file failed")]
    Storage(#[from] StorageError),
    /// There is no journal in the file.
    #[error("the file is not a journal")]
    NotAJournal,
    /// A newer release wrote it.
    #[error("this release cannot read it")]
    Newer(#[source] SuperblockError),
    /// Both superblocks are damaged.
    #[error(
        "both superblocks are damaged: recover a checkpoint with vra-journal, which does without them, then move the folder away and replicate anew"
    )]
    SuperblocksDamaged(#[source] SuperblockError),
    /// The superblocks are of two journals: a part of the file is of another one, and nothing tells which.
    #[error(
        "its superblocks are of two journals, {} and {}: put back the whole file, or recover a checkpoint with vra-journal from a copy in which the wrong one is zeroed",
        _0[0], _0[1]
    )]
    TwoJournals([Uuid; 2]),
    /// It is another VM's.
    #[error(
        "it belongs to VM {found}, not to VM {expected}: put that VM's own journal back, or move the folder away and replicate anew"
    )]
    OtherVm {
        /// Whose it is.
        found: Uuid,
        /// Whose was wanted.
        expected: Uuid,
    },
    /// Records in the middle of the history cannot be read, though later ones are there.
    #[error("the journal is damaged after record {}: open it read-only to recover an older checkpoint, then replicate anew", _0.after_seq)]
    Damaged(Damage),
    /// The file is shorter than its slots: a file that grows is longer before it says so, and one that shrinks says so before.
    #[error(
        "the file is cut short, it has {len_bytes} bytes of {expected_bytes}: put back the whole file, or recover a checkpoint with vra-journal, then move the folder away and replicate anew"
    )]
    CutShort {
        /// Its length, in bytes.
        len_bytes: u64,
        /// What its superblock says, in bytes.
        expected_bytes: u64,
    },
    /// Without superblocks only segments tell, and the file is too short for one.
    #[error(
        "both superblocks are damaged, and the file is too short for a segment of {slot_len_bytes} bytes: put back the whole file"
    )]
    NoWholeSlot {
        /// How long a segment's slot is, in bytes.
        slot_len_bytes: u64,
    },
    /// A parameter of a new journal is out of bounds.
    #[error("a new journal cannot have this {0}")]
    Parameter(&'static str),
    /// The manifest doesn't fit.
    #[error("the manifest cannot be written")]
    Manifest(#[source] ManifestError),
    /// It isn't known which parts of the recovery disks are damaged.
    #[error(
        "the list of damaged parts of the recovery disks cannot be read: move the folder away and replicate anew"
    )]
    BadList(#[source] BadListError),
    /// What is encrypted can't be read or written.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// All slots are in use, even the one that is kept for recovery.
    #[error("no slot is free for recovery: the journal's file was not written by this software")]
    NoRecoverySlot,
}

/// Makes a journal in an empty file.
///
/// # Errors
/// A parameter is out of bounds or the file failed.
pub fn create<S: Storage>(storage: &mut S, file: FileId, new: &NewJournal) -> Result<(), OpenError> {
    let parameter = |good: bool, name| if good { Ok(()) } else { Err(OpenError::Parameter(name)) };
    let aligned = new.slot_len_bytes.is_multiple_of(PAGE_BYTES as u64);
    parameter(aligned && (MIN_SLOT_BYTES..=MAX_SLOT_BYTES).contains(&new.slot_len_bytes), "slot length")?;
    parameter((2..=MAX_SLOTS).contains(&new.slot_count), "slot count")?;
    parameter(new.volumes.len() <= crate::batch::MAX_VOLUMES, "number of volumes")?;
    let manifest = Manifest { journal_id: new.journal_id, sequence: 1, text: new.manifest.clone() };
    let (manifest_bytes, manifest_crc) = manifest.encode().map_err(OpenError::Manifest)?;
    let superblock = Superblock {
        sequence: 1,
        journal_id: new.journal_id,
        vm_id: new.vm_id,
        vpg_id: new.vpg_id,
        slot_len_bytes: new.slot_len_bytes,
        slot_count: new.slot_count,
        open_count: 0,
        manifest: Some(crate::format::superblock::PairPlace { slot: 0, crc: manifest_crc }),
        bad_list: None,
        low_water_segment: 1,
        low_water: ChainPoint::default(),
        state: JournalState::FirstSync { sync_id: 0 },
        promotion_intent_seq: 0,
        tail_generation: Uuid::nil(),
        parent_generation: Uuid::nil(),
        generation_first_seq: 0,
        generation_fork_seq: 0,
        receive_time_us: 0,
        encryption: new.encryption,
        volumes: new.volumes.clone(),
    };
    let mut io = Blocking::new(storage, file, Purpose::Create);
    let len_bytes = slot_offset_bytes(new.slot_count, new.slot_len_bytes);
    io.run(Op::Allocate { offset_bytes: 0, len_bytes })?;
    io.write(crate::format::MANIFEST_OFFSETS[0], manifest_bytes)?;
    io.sync()?;
    for offset_bytes in SUPERBLOCK_OFFSETS {
        io.write(offset_bytes, superblock.encode().to_vec())?;
    }
    io.sync()?;
    Ok(())
}

/// A journal opened for writing: everything that [`crate::writer::Writer`] begins with.
#[derive(Debug)]
pub struct Opened {
    /// As it is in the file now, with this opening counted.
    pub superblock: Superblock,
    /// What the history consists of, oldest first. If the last one is unsealed, it is this opening's own copy.
    pub segments: Vec<Segment>,
    /// The stream's durable end.
    pub tail: ChainPoint,
    /// The manifest's text, if it can be read.
    pub manifest: Option<Manifest>,
    /// What of the recovery disks can't be trusted (C5).
    pub bad_ranges: BadRanges,
    /// Records behind the stream's end that this opening leaves behind: their source sends them again, or notices that the journal
    /// lost what it had acknowledged.
    pub hidden: Option<Hidden>,
    /// Slots that hold nothing, lowest first.
    pub free_slots: Vec<u32>,
    /// The journal's keys.
    pub keyring: Keyring,
    /// What the salts of this opening's segments begin with: no other opening has it.
    pub salt: u64,
}

/// How to open for writing.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Refuse another VM's journal.
    pub vm_id: Option<Uuid>,
    /// After a failed write or sync in this process: the last number that was known to be durable. Nothing after it is
    /// believed (C1).
    pub trusted_through: Option<u64>,
    /// For a journal that is encrypted, or is to be.
    pub keys: Keys,
}

/// Opens a journal for writing. The caller holds the file's lock (A4). When this returns, all that it found is durable
/// (C1): the records of an unsealed last segment were copied into a slot of this opening's own, so that neither a sync
/// that once failed nor a late write of a dead process can take them back.
///
/// # Errors
/// What is wrong with the file.
pub fn open<S: Storage>(storage: &mut S, file: FileId, options: &OpenOptions) -> Result<Opened, OpenError> {
    let look = SurveyOptions {
        trusted_through: options.trusted_through,
        skip_unreadable: false,
        keys: options.keys.site().clone(),
    };
    let found = survey(storage, file, &look)?;
    let Survey {
        mut superblock,
        mut segments,
        mut tail,
        damage,
        mut hidden,
        mut free_slots,
        mut older_copy,
        ..
    } = found;
    let (manifest, bad_ranges, keyring) = (found.manifest, found.bad_ranges, found.keyring);
    let is_alone = found.superblock_is_alone;
    if let Some(expected) = options.vm_id
        && expected != superblock.vm_id
    {
        return Err(OpenError::OtherVm { found: superblock.vm_id, expected });
    }
    let is_given_up = matches!(superblock.state, JournalState::HistoryGivenUp { .. });
    if let Some(damage) = damage.filter(|_| !is_given_up) {
        return Err(OpenError::Damaged(damage));
    }
    if found.missing_slots > 0 && !is_given_up {
        let expected_bytes = slot_offset_bytes(superblock.slot_count, superblock.slot_len_bytes);
        let len_bytes = Blocking::new(storage, file, Purpose::Survey).file_len_bytes()?;
        return Err(OpenError::CutShort { len_bytes, expected_bytes });
    }
    if is_given_up {
        // What is found is none of the history: what was not erased yet, or what an opening didn't trust and passed over, which the numbers of
        // segments would let in again.
        (tail, hidden, older_copy) = (superblock.low_water, None, None);
        segments.clear();
        free_slots = (0..superblock.slot_count).collect();
    }
    if let Encryption::On(key) = &superblock.encryption {
        keyring.check(key)?;
    }
    let salt = options.keys.opening_salt();
    let mut io = Blocking::new(storage, file, Purpose::Superblock);
    // What was read may not be durable, and the copy that is written next may be the durable one: the same bytes again,
    // synced, settle it.
    if !planted(Bug::SuperblockNotSettled) {
        let page = Bytes::copy_from_slice(&superblock.encode());
        io.write(SUPERBLOCK_OFFSETS[(superblock.sequence % 2) as usize], page)?;
        io.sync()?;
    }
    if !planted(Bug::OpenCountNotRaised) {
        // A copy that is lost may have been that of an opening that died before it counted, and what that one wrote has its count.
        superblock.open_count += if is_alone { 2 } else { 1 };
    }
    if !superblock.state.is_base_sync() {
        let told_seq = told_intent(&segments).unwrap_or_default();
        superblock.promotion_intent_seq = superblock.promotion_intent_seq.max(told_seq);
    }
    superblock.sequence += 1;
    let page = Bytes::copy_from_slice(&superblock.encode());
    let first = (superblock.sequence % 2) as usize;
    io.write(SUPERBLOCK_OFFSETS[first], page.clone())?;
    io.sync()?;
    io.purpose(Purpose::SuperblockMirror).write(SUPERBLOCK_OFFSETS[1 - first], page)?;
    // Both, before anything counts on this opening's count: should either be lost, no later opening takes the same count for another one.
    io.sync()?;

    if matches!(superblock.state, JournalState::HistoryGivenUp { .. }) {
        // The writer that gave it up may have died before it had erased all of it.
        erase_segments(&mut io, &superblock)?;
    }
    // A growth or a shrinking that was cut short may have left space behind the last slot.
    let len_bytes = slot_offset_bytes(superblock.slot_count, superblock.slot_len_bytes);
    if io.file_len_bytes()? > len_bytes {
        io.purpose(Purpose::Shrink).run(Op::Truncate { len_bytes })?;
    }
    if let Some(last) = segments.last_mut()
        && matches!(last.content, Content::Scanned(_))
        && !planted(Bug::AppendToForeignSegment)
    {
        let slot_len_bytes = superblock.slot_len_bytes;
        let slot = take_slot(io.purpose(Purpose::Reserve), &mut free_slots, older_copy, slot_len_bytes)?;
        let old_slot = last.header.slot;
        carry(io.purpose(Purpose::Carry), last, slot, &superblock)?;
        free_slots.push(old_slot);
        free_slots.sort_unstable();
    }
    if !planted(Bug::RecoveryWithoutSync) {
        io.purpose(Purpose::Carry).sync()?;
    }
    Ok(Opened { superblock, segments, tail, manifest, bad_ranges, hidden, free_slots, keyring, salt })
}

/// The newest intent to promote that an unsealed segment tells of. Its announcement may have been cut short before a superblock told, too:
/// it counts all the same, so that whoever lost the superblocks can rely on it that each promotion that the stream tells of has ended
/// before the next one was announced.
fn told_intent(segments: &[Segment]) -> Option<u64> {
    let scans = segments.iter().filter_map(|segment| match &segment.content {
        Content::Scanned(scan) => Some(scan.footer()),
        Content::Sealed(_) => None,
    });
    let events = scans.flat_map(|footer| footer.events);
    let intents = events.filter(|event| event.record.kind == RecordKind::PromotionIntent);
    intents.map(|event| event.record.argument).max()
}

/// Zeroes the pages by which slots are recognised. Those that read zeroes are punched: their space may have been given back, and a full
/// datastore has none for them, but the zeroes may also be those of a writer whose sync failed, which no later sync makes durable.
fn erase_segments<S: Storage>(io: &mut Blocking<'_, S>, superblock: &Superblock) -> Result<(), StorageError> {
    let slot_len_bytes = superblock.slot_len_bytes;
    let file_len_bytes = io.file_len_bytes()?;
    let is_there = |offset_bytes: &u64| offset_bytes + PAGE_BYTES as u64 <= file_len_bytes;
    let slots: Vec<u32> = (0..superblock.slot_count).collect();
    for chunk in slots.chunks(slots::SLOTS_AT_ONCE) {
        let pages = chunk.iter().flat_map(|slot| edge_pages(*slot, slot_len_bytes)).filter(is_there);
        let pages: Vec<u64> = pages.collect();
        let read = |&offset_bytes: &u64| Op::Read { offset_bytes, buffer: AlignedBuf::zeroed(PAGE_BYTES) };
        let found = io.purpose(Purpose::Survey).run_all(pages.iter().map(read).collect());
        // What can't be read may be mended by the write.
        let is_zero = |page: &Result<Option<AlignedBuf>, _>| matches!(page, Ok(Some(page)) if page.iter().all(|byte| *byte == 0));
        let erase = |(offset_bytes, page)| match is_zero(&page) {
            true => Op::Punch { offset_bytes, len_bytes: PAGE_BYTES as u64 },
            false => Op::Write { offset_bytes, pieces: vec![AlignedBuf::zeroed(PAGE_BYTES).into_bytes()] },
        };
        let erased = pages.into_iter().zip(found).map(erase);
        let written = io.purpose(Purpose::Seal).run_all(erased.collect());
        written.into_iter().try_for_each(|result| result.map(drop))?;
    }
    Ok(())
}

/// What a segment that begins now is encrypted with. An opening begins a segment of one number once, so no two have one salt.
pub(crate) fn segment_key(superblock: &Superblock, opening_salt: u64, number: u64) -> Option<SegmentKey> {
    let Encryption::On(key) = superblock.encryption else { return None };
    let mut salt = [0; SALT_BYTES];
    salt[..8].copy_from_slice(&opening_salt.to_le_bytes());
    salt[8..].copy_from_slice(&number.to_le_bytes());
    Some(SegmentKey { key, salt })
}

/// The lowest free slot that has its space or gets it: that of some was given back to the datastore (C3). The one with an older copy of
/// the segment comes last, for the newer one may not be durable: if the journal has no other, the copy's bytes are written over the same
/// bytes.
fn take_slot<S: Storage>(
    io: &mut Blocking<'_, S>,
    free_slots: &mut Vec<u32>,
    older_copy: Option<u32>,
    slot_len_bytes: u64,
) -> Result<u32, OpenError> {
    let is_older_copy = |slot: &u32| Some(*slot) == older_copy;
    let (spare, last): (Vec<u32>, Vec<u32>) = free_slots.iter().partition(|slot| !is_older_copy(slot));
    let mut last_error = OpenError::NoRecoverySlot;
    for slot in spare.into_iter().chain(last) {
        let offset_bytes = slot_offset_bytes(slot, slot_len_bytes);
        match io.run(Op::Allocate { offset_bytes, len_bytes: slot_len_bytes }) {
            Ok(_) => {
                free_slots.retain(|free| *free != slot);
                return Ok(slot);
            }
            Err(error) if error.is_no_space() => last_error = error.into(),
            Err(error) => return Err(error.into()),
        }
    }
    Err(last_error)
}

/// Copies an unsealed segment into a free slot as this opening's own, under a header that says so. Its batches stay encrypted as they are.
///
/// The header is written when all of it is durable. The slot may hold an older copy, whose first batches are the same and whose next ones were
/// not trusted after a failed sync: under the new header, before the batches that replace them, they would be taken for the copied ones.
fn carry<S: Storage>(
    io: &mut Blocking<'_, S>,
    segment: &mut Segment,
    slot: u32,
    superblock: &Superblock,
) -> Result<(), OpenError> {
    let Content::Scanned(scan) = &segment.content else { return Ok(()) };
    let slot_len_bytes = superblock.slot_len_bytes;
    let header = SegmentHeader {
        slot,
        open_count: superblock.open_count,
        carried_end_bytes: scan.end_bytes,
        low_water: Some(superblock.low_water_mark()),
        ..segment.header.clone()
    };
    let from = slot_offset_bytes(segment.header.slot, slot_len_bytes);
    let bytes = io.read(from, scan.end_bytes as usize)?;
    check_carried(&bytes, segment, scan, superblock)?;
    let batches = bytes.into_bytes().slice(PAGE_BYTES..);
    let offset_bytes = slot_offset_bytes(slot, slot_len_bytes);
    // The planted bug: what is half-made has its header.
    if planted(Bug::HalfCarriedSegmentTaken) {
        io.write(offset_bytes, header.encode().to_vec())?;
    }
    if !batches.is_empty() {
        io.write(offset_bytes + PAGE_BYTES as u64, batches)?;
        io.sync()?;
    }
    io.write(offset_bytes, header.encode().to_vec())?;
    segment.header = header;
    Ok(())
}

/// Whether what was read to be copied is what was found. If it weren't, the copy would look whole, and the next opening find it broken.
fn check_carried(
    bytes: &[u8],
    segment: &Segment,
    scanned: &Scan,
    superblock: &Superblock,
) -> Result<(), OpenError> {
    // A scan doesn't look at the last page.
    let mut slot = vec![0; bytes.len() + PAGE_BYTES];
    slot[..bytes.len()].copy_from_slice(bytes);
    segment.cipher.decrypt_slot(&mut slot);
    let trusted_through = Some(scanned.last.seq);
    let found = scan(&slot, &segment.header, Ownership::of(superblock), trusted_through);
    if (found.end_bytes, found.last) == (scanned.end_bytes, scanned.last) {
        return Ok(());
    }
    Err(OpenError::Damaged(Damage {
        after_seq: found.last.seq,
        resumes_after_seq: scanned.last.seq,
        stop: Some((segment.header.number, found.stop)),
    }))
}
