//! What a journal's file holds, found out without writing.

use super::OpenError;
use super::decide::Verdict;
use super::salvage::Salvage;
use super::slots::{find_headless, read_slots, unread_header};
use super::superblocks::read_superblock;
use crate::bad_ranges::BadRanges;
use crate::crypt::{Cipher, Ciphers, Keyring, SiteKeys};
use crate::format::bad_list::{BadList, BadListError};
use crate::format::manifest::{MAX_MANIFEST_BYTES, Manifest, ManifestError};
use crate::format::{
    BAD_LIST_OFFSETS, BAD_LIST_SLOT_BYTES, ChainPoint, Footer, FooterError, MANIFEST_OFFSETS,
    MANIFEST_SLOT_BYTES, PAGE_BYTES, SegmentHeader, SegmentTrailer, Superblock, slot_offset_bytes,
};
use crate::scan::{Ownership, Scan, ScanStop, Sealed, scan_heads};
use crate::storage::{Blocking, FileId, Purpose, Storage, StorageError};

/// All that counts in a journal's file.
#[derive(Clone, Debug)]
pub struct Survey {
    /// The superblock that counts.
    pub superblock: Superblock,
    /// The segments that hold the history, oldest first.
    pub segments: Vec<Segment>,
    /// The stream's end.
    pub tail: ChainPoint,
    /// Set if later records are there that the segments don't reach.
    pub damage: Option<Damage>,
    /// Set if records are there behind the stream's end that no later segment vouches for.
    pub hidden: Option<Hidden>,
    /// Slots that hold nothing that counts, lowest first.
    pub free_slots: Vec<u32>,
    /// The manifest, if it can be read.
    pub manifest: Option<Manifest>,
    /// What of the recovery disks can't be trusted (C5).
    pub bad_ranges: BadRanges,
    /// Set if there may be more of those, since their list can't be read; only with [`SurveyOptions::skip_unreadable`].
    pub bad_list_lost: Option<BadListError>,
    /// How many of the last slots the file lacks: it was cut short.
    pub missing_slots: u32,
    /// Pages that the disk couldn't give back, in bytes from the file's start.
    pub unreadable: Vec<u64>,
    /// One copy of the superblock is damaged or can't be read: it may have been that of a change that had not come to count.
    pub superblock_is_alone: bool,
    /// A free slot with a copy of the last segment that is as long as the one that counts, and older: should the opening that made the
    /// newer one have failed, that may not be durable, and this one is.
    pub older_copy: Option<u32>,
    /// The journal's keys.
    pub keyring: Keyring,
}

impl Survey {
    /// What decrypts the segments, by place in the file.
    pub fn ciphers(&self) -> Ciphers {
        let slots = self.segments.iter().map(|segment| (segment.header.slot, &segment.cipher));
        Ciphers::new(self.superblock.slot_len_bytes, slots)
    }
}

/// A segment that counts.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Its first page, or what its last page says of it.
    pub header: SegmentHeader,
    /// What it holds.
    pub content: Content,
    /// What reads it.
    pub cipher: Cipher,
}

/// What a segment holds.
#[derive(Clone, Debug)]
pub enum Content {
    /// It is full and has a footer.
    Sealed(Box<SegmentTrailer>),
    /// It has none; its batches were read.
    Scanned(Box<Scan>),
}

impl Segment {
    /// The stream's place after it.
    pub fn last(&self) -> ChainPoint {
        match &self.content {
            Content::Sealed(trailer) => trailer.last,
            Content::Scanned(scan) => scan.last,
        }
    }

    /// When its last batch was received, µs since the Unix epoch, as far as it is known (C6).
    pub fn end_time_us(&self) -> Option<u64> {
        match &self.content {
            Content::Sealed(trailer) => Some(trailer.end_time_us),
            Content::Scanned(_) => None,
        }
    }

    /// Where its batches end, in bytes from the slot's start.
    pub fn data_end_bytes(&self) -> u64 {
        match &self.content {
            Content::Sealed(trailer) => trailer.data_end_bytes,
            Content::Scanned(scan) => scan.end_bytes,
        }
    }

    /// Its footer, read from the file if it is sealed. A damaged footer is replaced by walking the batches' heads, over those that can't be
    /// read: what is lost then is in [`Footer::gaps`].
    ///
    /// # Errors
    /// The file failed, or the heads contradict the trailer.
    pub fn footer<S: Storage>(
        &self,
        io: &mut Blocking<'_, S>,
        superblock: &Superblock,
    ) -> Result<Footer, SegmentError> {
        let trailer = match &self.content {
            Content::Scanned(scan) => return Ok(scan.footer()),
            Content::Sealed(trailer) => trailer,
        };
        let slot_offset = slot_offset_bytes(self.header.slot, superblock.slot_len_bytes);
        let damaged = match io.read(slot_offset + trailer.data_end_bytes, trailer.footer_len_bytes as usize) {
            Ok(mut bytes) => {
                self.cipher.decrypt(trailer.data_end_bytes, &mut bytes);
                match Footer::decode(&bytes, trailer.footer_crc, trailer.data_end_bytes) {
                    Ok(footer) => return Ok(footer),
                    Err(error) => error,
                }
            }
            Err(error) if error.is_medium() => FooterError::Unreadable,
            Err(error) => return Err(error.into()),
        };
        let found = self.walk_heads(io, superblock, trailer)?;
        if found.last != trailer.last {
            return Err(SegmentError::Damaged {
                number: self.header.number,
                after_seq: found.last.seq,
                footer: damaged,
                stop: found.stop,
            });
        }
        Ok(found.footer())
    }

    /// Reads its batches' heads.
    fn walk_heads<S: Storage>(
        &self,
        io: &mut Blocking<'_, S>,
        superblock: &Superblock,
        trailer: &SegmentTrailer,
    ) -> Result<Scan, StorageError> {
        let slot_offset = slot_offset_bytes(self.header.slot, superblock.slot_len_bytes);
        // One page more than the batches, because a scan doesn't look at the slot's last page.
        let len_bytes = trailer.data_end_bytes as usize + PAGE_BYTES;
        let mut bytes = Salvage::new(true).read(io, slot_offset, len_bytes)?;
        self.cipher.decrypt_slot(&mut bytes);
        let (last, data_end_bytes) = (trailer.last, trailer.data_end_bytes);
        let sealed = Sealed { last, data_end_bytes, volume_count: superblock.volumes.len() as u16 };
        Ok(scan_heads(&bytes, &self.header, Ownership::of(superblock), &sealed))
    }
}

/// Why a segment cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// The file failed.
    #[error("the journal's file failed")]
    Storage(#[from] StorageError),
    /// The footer is damaged, and the batches are not those that the trailer tells of.
    #[error(
        "segment {number} ends otherwise than its trailer says, after record {after_seq} ({stop}), and its footer is damaged"
    )]
    Damaged {
        /// The segment.
        number: u64,
        /// The last record that was found.
        after_seq: u64,
        /// What is wrong with the footer.
        #[source]
        footer: FooterError,
        /// What is wrong with the batch after that record.
        stop: ScanStop,
    },
}

/// A hole in the history: records after it are there, and those in it were durable once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The last record before the hole.
    pub after_seq: u64,
    /// The first place after the hole that is known to have been reached.
    pub resumes_after_seq: u64,
    /// Where and why reading stopped, if in a segment.
    pub stop: Option<(u64, ScanStop)>,
}

/// Records behind an unreadable batch of the newest segment. Either they were never acknowledged, because a power cut tore the
/// group before theirs, or the batch was damaged since: the file can't tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hidden {
    /// The segment; 0 if its own pages can't say.
    pub segment: u64,
    /// Its slot.
    pub slot: u32,
    /// The last record that can be read.
    pub after_seq: u64,
    /// The first one that is known to lie behind what can't be read; none if nothing can be told, since what is there is encrypted.
    pub resumes_seq: Option<u64>,
}

/// How to look.
#[derive(Clone, Debug, Default)]
pub struct SurveyOptions {
    /// Nothing after this number is believed.
    pub trusted_through: Option<u64>,
    /// Pages that the disk can't give back count as empty instead of ending the survey, and a list of bad ranges that can't be read as
    /// [lost](Survey::bad_list_lost): for tools that save what can be saved, never for a writer, who would take the history's end to be
    /// earlier than it is. A page that is there twice, or of a slot in which nothing counts, ends no survey in any case.
    pub skip_unreadable: bool,
    /// For what is encrypted.
    pub keys: SiteKeys,
}

/// Finds out what a journal's file holds.
///
/// # Errors
/// The file failed or is not a journal that this release knows.
pub fn survey<S: Storage>(
    storage: &mut S,
    file: FileId,
    options: &SurveyOptions,
) -> Result<Survey, OpenError> {
    let mut io = Blocking::new(storage, file, Purpose::Survey);
    let chosen = read_superblock(&mut io, options.skip_unreadable)?;
    let found = survey_as(storage, file, chosen.superblock, options)?;
    Ok(Survey { superblock_is_alone: chosen.is_alone, ..found })
}

/// The same with a superblock that isn't read from the file.
///
/// # Errors
/// The file failed.
pub fn survey_as<S: Storage>(
    storage: &mut S,
    file: FileId,
    superblock: Superblock,
    options: &SurveyOptions,
) -> Result<Survey, OpenError> {
    let &SurveyOptions { trusted_through, skip_unreadable, ref keys } = options;
    let mut io = Blocking::new(storage, file, Purpose::Survey);
    let mut salvage = Salvage::new(skip_unreadable);
    let file_len_bytes = io.file_len_bytes()?;
    let keyring = Keyring::new(superblock.journal_id, keys.clone());
    let manifest = read_manifest(&mut io, &superblock, &mut salvage)?;
    let (bad_ranges, bad_list_lost) = match read_bad_list(&mut io, &superblock, &mut salvage) {
        // What a newer release wrote is not damaged.
        Err(OpenError::BadList(lost)) if skip_unreadable && !matches!(lost, BadListError::Version(_)) => {
            (BadRanges::default(), Some(lost))
        }
        read => (read?, None),
    };
    let mut pages = Salvage::new(true);
    let mut slots = read_slots(&mut io, &superblock, &mut pages)?;
    let (mut segments, mut tail) = (Vec::<Segment>::new(), superblock.low_water);
    let ownership = Ownership::of(&superblock);
    let mut hidden = None;
    let mut older_copy = None;
    loop {
        let wanted = segments.last().map_or(superblock.low_water_segment, |last| last.header.number + 1);
        let (mut next, mut broken): (Option<Segment>, Option<Hidden>) = (None, None);
        let mut copies: Vec<(ChainPoint, u64, u32)> = Vec::new();
        // Of the newest copy.
        let mut unreadable = (0, None);
        for slot in &mut slots {
            if slot.header.number != wanted {
                continue;
            }
            slot.scan(&mut io, &mut pages, &superblock, &keyring, ownership, trusted_through)?;
            let open_count = slot.header.open_count;
            if open_count <= superblock.open_count && slot.header.after == tail && open_count > unreadable.0 {
                unreadable = (open_count, slot.ends_unreadable());
            }
            if slot.judge(&superblock, wanted, tail) != Verdict::Use {
                // Its copied part is damaged, if batches of its own opening follow: a copy is finished before it takes any.
                broken = broken.or_else(|| slot.hidden(&superblock));
                continue;
            }
            copies.push((slot.last(), slot.header.open_count, slot.header.slot));
            if next.as_ref().is_none_or(|next| next.header.open_count < slot.header.open_count) {
                next = Some(slot.segment(keyring.cipher(&slot.header)?));
                hidden = slot.hidden(&superblock);
            }
        }
        if let (_, Some(error)) = unreadable
            && !skip_unreadable
        {
            return Err(error.into());
        }
        let is_older = |broken: &Hidden, next: &Option<Segment>| {
            next.as_ref().is_none_or(|next| {
                next.header.slot != broken.slot && next.header.open_count < superblock.open_count
            })
        };
        hidden = broken.filter(|broken| is_older(broken, &next)).or(hidden);
        let Some(next) = next else { break };
        if matches!(&next.content, Content::Scanned(scan) if scan.is_empty()) {
            break;
        }
        tail = next.last();
        let as_long = copies.into_iter().filter(|(last, _, slot)| *last == tail && *slot != next.header.slot);
        older_copy = as_long.min_by_key(|(_, open_count, _)| *open_count).map(|(_, _, slot)| slot);
        segments.push(next);
    }
    let wanted = segments.last().map_or(superblock.low_water_segment, |last| last.header.number + 1);
    let later = slots.iter().filter(|slot| slot.judge(&superblock, wanted, tail) == Verdict::Later);
    let resumes_after_seq = later.map(|slot| slot.header.after.seq).min();
    let damage = resumes_after_seq.map(|resumes_after_seq| Damage {
        after_seq: tail.seq,
        resumes_after_seq,
        stop: segments.last().and_then(|last| match &last.content {
            Content::Scanned(scan) => Some((last.header.number, scan.stop)),
            Content::Sealed(_) => None,
        }),
    });
    if hidden.is_none() && damage.is_none() {
        hidden = find_headless(&mut io, &superblock, &slots, &segments, tail, &mut pages)?;
    }
    if (hidden.is_some() || damage.is_some())
        && !skip_unreadable
        && let Some(error) = unread_header(&superblock, &slots, &segments, &pages)
    {
        // It may be that of the segment that is missed, and the disk may give it back later: what was acknowledged is not given up for that.
        return Err(error.into());
    }
    let whole_slots = (0..superblock.slot_count)
        .take_while(|slot| slot_offset_bytes(slot + 1, superblock.slot_len_bytes) <= file_len_bytes);
    let missing_slots = superblock.slot_count - whole_slots.count() as u32;
    let in_use = |slot: &u32| segments.iter().any(|segment| segment.header.slot == *slot);
    let free_slots = (0..superblock.slot_count).filter(|slot| !in_use(slot)).collect();
    salvage.take(pages);
    Ok(Survey {
        superblock_is_alone: false,
        superblock,
        segments,
        tail,
        damage,
        hidden,
        free_slots,
        manifest,
        bad_ranges,
        older_copy,
        missing_slots,
        bad_list_lost,
        unreadable: salvage.into_unreadable(),
        keyring,
    })
}

fn read_manifest<S: Storage>(
    io: &mut Blocking<'_, S>,
    superblock: &Superblock,
    salvage: &mut Salvage,
) -> Result<Option<Manifest>, StorageError> {
    let Some(place) = superblock.manifest else { return Ok(None) };
    let offset_bytes = MANIFEST_OFFSETS[place.slot as usize];
    // Most are short, and openings are many.
    let mut decoded = Manifest::decode(&salvage.read(io, offset_bytes, PAGE_BYTES)?);
    if let Err(ManifestError::Length(text_bytes)) = decoded
        && text_bytes as usize <= MAX_MANIFEST_BYTES
    {
        decoded = Manifest::decode(&salvage.read(io, offset_bytes, MANIFEST_SLOT_BYTES)?);
    }
    let manifest = decoded.ok();
    Ok(manifest.filter(|(_, crc)| *crc == place.crc).map(|(manifest, _)| manifest))
}

fn read_bad_list<S: Storage>(
    io: &mut Blocking<'_, S>,
    superblock: &Superblock,
    salvage: &mut Salvage,
) -> Result<BadRanges, OpenError> {
    let Some(place) = superblock.bad_list else { return Ok(BadRanges::default()) };
    let bytes = salvage.read(io, BAD_LIST_OFFSETS[place.slot as usize], BAD_LIST_SLOT_BYTES)?;
    let (list, crc) = BadList::decode(&bytes).map_err(OpenError::BadList)?;
    if crc != place.crc || list.journal_id != superblock.journal_id {
        return Err(OpenError::BadList(BadListError::Crc));
    }
    Ok(list.ranges)
}
