//! All that a journal's file holds, part by part in the order in which a reader needs it, and all that is wrong with it. What
//! it does not need to hold in memory it doesn't: one segment at a time.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::time::Duration;

use journal::batch::{BatchError, BatchView};
use journal::crypt::{KeyError, Keyring, SiteKeyId, SiteKeys};
use journal::format::bad_list::{BadList, BadListError};
use journal::format::manifest::Manifest;
use journal::format::{
    BAD_LIST_OFFSETS, BAD_LIST_SLOT_BYTES, ChainPoint, MANIFEST_OFFSETS, MANIFEST_SLOT_BYTES, PAGE_BYTES,
    PageError, SUPERBLOCK_OFFSETS, SegmentHeader, SegmentTrailer, Superblock, SuperblockError,
    slot_offset_bytes,
};
use journal::recovery::{Hidden, OpenError, Salvage, SurveyOptions, survey};
use journal::storage::{AlignedBuf, Blocking, FileId, Purpose, StorageError};
use journal::walk::{Finding, Walked, walk};

use super::damage::{Damage, LostPlace};
use super::locked::{Locked, missing_key};
use super::place::{open_file, read_superblock, rebuilt};
use super::storage::ToolStorage;

/// A segment as its pages tell.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub(super) header: SegmentHeader,
    /// Of a sealed one.
    pub(super) trailer: Option<SegmentTrailer>,
}

/// A part of a journal's file.
pub(super) enum Part<'a> {
    Superblock {
        copy: usize,
        superblock: &'a Superblock,
        counts: bool,
    },
    Manifest {
        slot: usize,
        manifest: &'a Manifest,
        counts: bool,
    },
    /// What of the recovery disks is lost (C5).
    BadList {
        slot: usize,
        list: &'a BadList,
        counts: bool,
    },
    Segment(&'a Segment),
    /// The segment told last can't be read without a site key.
    Locked(SiteKeyId),
    Batch {
        segment: u64,
        file_offset_bytes: u64,
        batch: &'a BatchView<'a>,
        damage: &'a [BatchError],
    },
    /// All batches of a segment were told.
    EndOfSegment {
        segment: &'a Segment,
        walked: &'a Walked,
    },
    Damage(Damage),
    /// What is unusual but no damage.
    Note(String),
}

/// Is told the parts.
pub(super) trait Visitor {
    /// Whether batches are of interest.
    const WANTS_BATCHES: bool;

    /// One part.
    fn visit(&mut self, part: Part<'_>) -> anyhow::Result<()>;
}

/// How often segments are looked for anew because a VRA moved or freed them meanwhile.
const MOVES_MAX: u32 = 16;
/// How often a segment that is being written is read again, and how long after, before its damage is believed.
const READS: u32 = 4;
const READ_AGAIN_AFTER: Duration = Duration::from_millis(20);

/// Goes through a journal's file. `keys` are for what of it is encrypted.
pub(super) fn visit(path: &Path, keys: &SiteKeys, visitor: &mut impl Visitor) -> anyhow::Result<()> {
    let (storage, file) = open_file(path)?;
    let keys = keys.clone();
    let mut contents = Contents { path: path.to_owned(), storage, file, keys, visitor, is_rebuilt: false };
    let superblock = contents.superblocks()?;
    contents.manifests(&superblock)?;
    contents.bad_lists(&superblock)?;
    contents.segments(superblock)
}

struct Contents<'a, V> {
    path: PathBuf,
    storage: ToolStorage,
    file: FileId,
    keys: SiteKeys,
    visitor: &'a mut V,
    /// No superblock is left.
    is_rebuilt: bool,
}

type Found = BTreeMap<u64, Segment>;

impl<V: Visitor> Contents<'_, V> {
    fn io(&mut self) -> Blocking<'_, ToolStorage> {
        Blocking::new(&mut self.storage, self.file, Purpose::View)
    }

    /// Both copies; the newer whole one counts.
    fn superblocks(&mut self) -> anyhow::Result<Superblock> {
        let cannot = format!("cannot check {}", self.path.display());
        if self.io().file_len_bytes()? < SUPERBLOCK_OFFSETS[1] + PAGE_BYTES as u64 {
            return Err(anyhow::Error::new(OpenError::NotAJournal).context(cannot));
        }
        let mut copies = SUPERBLOCK_OFFSETS.map(|offset_bytes| {
            let page = self.io().read(offset_bytes, PAGE_BYTES).map_err(anyhow::Error::from);
            page.and_then(|page| Ok(Superblock::decode(&page)?))
        });
        let is_newer = |error: &anyhow::Error| {
            let error = error.downcast_ref::<SuperblockError>();
            matches!(error, Some(SuperblockError::Version(_) | SuperblockError::Features(_)))
        };
        if let Some(newer) = copies.iter_mut().find(|copy| copy.as_ref().is_err_and(is_newer)) {
            let newer = std::mem::replace(newer, Err(anyhow::anyhow!("told")));
            return newer.map_err(|error| error.context(cannot));
        }
        let newest = copies.iter().flatten().map(|copy| copy.sequence).max();
        // Without them the segments tell.
        let made_up = match newest {
            Some(_) => None,
            None => Some(rebuilt(&mut self.storage, self.file, &self.path, &self.keys)),
        };
        let (mut counting, mut last_error) = (None, None);
        for (number, copy) in copies.into_iter().enumerate() {
            match copy {
                Ok(superblock) => {
                    let counts = counting.is_none() && Some(superblock.sequence) == newest;
                    self.visitor.visit(Part::Superblock { copy: number, superblock: &superblock, counts })?;
                    if counts {
                        counting = Some(superblock);
                    }
                }
                Err(error) => {
                    let what = format!("superblock: {error:#}");
                    if made_up.as_ref().is_none_or(Result::is_ok) {
                        self.visitor.visit(Part::Damage(Damage::at(SUPERBLOCK_OFFSETS[number], what)))?;
                    }
                    last_error = Some(error);
                }
            }
        }
        if let Some(counting) = counting {
            return Ok(counting);
        }
        self.is_rebuilt = true;
        match (made_up, last_error) {
            (Some(Ok(rebuilt)), _) => Ok(rebuilt.superblock),
            // It is a journal, and nothing of it can be told.
            (Some(Err(error)), _) if missing_key(&error).is_some() => {
                Err(Locked::or(error, &self.path, &self.keys))
            }
            (Some(Err(error)), _) if !matches!(error.downcast_ref(), Some(OpenError::NotAJournal)) => {
                Err(error)
            }
            (_, Some(error)) => Err(error.context(cannot)),
            _ => Err(anyhow::anyhow!("no superblock").context(cannot)),
        }
    }

    fn manifests(&mut self, superblock: &Superblock) -> anyhow::Result<()> {
        let place = superblock.manifest;
        if place.is_none() && !self.is_rebuilt && superblock.sequence > 0 {
            self.visitor.visit(Part::Note("the journal has no manifest".to_owned()))?;
        }
        for (slot, offset_bytes) in MANIFEST_OFFSETS.into_iter().enumerate() {
            let is_named = place.is_some_and(|place| place.slot as usize == slot);
            let damage = match self.io().read(offset_bytes, MANIFEST_SLOT_BYTES) {
                Err(error) => format!("manifest: {error}"),
                Ok(bytes) => match Manifest::decode(&bytes) {
                    Err(error) => format!("manifest: {error}"),
                    Ok((manifest, crc)) => {
                        let counts = is_named && place.is_some_and(|place| place.crc == crc);
                        self.visitor.visit(Part::Manifest { slot, manifest: &manifest, counts })?;
                        if !is_named || counts {
                            continue;
                        }
                        "manifest: it is not the one that the superblock names".to_owned()
                    }
                },
            };
            if is_named {
                self.visitor.visit(Part::Damage(Damage::at(offset_bytes, damage)))?;
            }
        }
        Ok(())
    }

    /// Both lists of what of the recovery disks is lost (C5). All that the one that counts names is damage.
    fn bad_lists(&mut self, superblock: &Superblock) -> anyhow::Result<()> {
        let mut place = superblock.bad_list;
        for tries_left in (0..MOVES_MAX).rev() {
            let slots = BAD_LIST_OFFSETS.map(|offset_bytes| {
                let bytes = self.io().read(offset_bytes, BAD_LIST_SLOT_BYTES).map_err(ReadError::Disk);
                bytes.and_then(|bytes| BadList::decode(&bytes).map_err(ReadError::BadList))
            });
            let counts = |slot: usize| {
                let named = place.filter(|place| place.slot as usize == slot);
                matches!((named, &slots[slot]), (Some(named), Ok((list, crc)))
                    if named.crc == *crc && list.journal_id == superblock.journal_id)
            };
            let is_lost = place.is_some_and(|place| !counts(place.slot as usize));
            let now = if self.is_rebuilt { None } else { read_superblock(&mut self.storage, self.file) };
            if let Some(now) = now.filter(|now| is_lost && tries_left > 0 && now.bad_list != place) {
                // A promotion ended meanwhile.
                place = now.bad_list;
                continue;
            }
            for (slot, read) in slots.iter().enumerate() {
                let counts = counts(slot);
                if let Ok((list, _)) = read {
                    self.visitor.visit(Part::BadList { slot, list, counts })?;
                    if counts {
                        let ranges = list.ranges.iter();
                        ranges
                            .map(|bad| Part::Damage(Damage::listed(slot, bad)))
                            .try_for_each(|part| self.visitor.visit(part))?;
                    }
                }
                let is_named = place.is_some_and(|place| place.slot as usize == slot);
                let wrong = match read {
                    _ if counts => continue,
                    Ok(_) if is_named => "it is not the one that the superblock names".to_owned(),
                    Ok(_) => continue,
                    // None was ever written there.
                    Err(ReadError::BadList(BadListError::Magic)) if !is_named => continue,
                    Err(error) => error.to_string(),
                };
                let what = format!("list of bad ranges: {wrong}");
                let offset_bytes = BAD_LIST_OFFSETS[slot];
                // Without superblocks it may have been the one that counts; with them one that doesn't may be half written.
                let part = match is_named || self.is_rebuilt {
                    true => Part::Damage(Damage::at(
                        offset_bytes,
                        format!("{what}; so it is not known which parts of the recovery disks are lost"),
                    )),
                    false if matches!(read, Err(ReadError::Disk(_))) => {
                        Part::Damage(Damage::at(offset_bytes, format!("{what}; it is not in use")))
                    }
                    false => Part::Note(format!("{what}; it is not in use")),
                };
                self.visitor.visit(part)?;
            }
            return Ok(());
        }
        Ok(())
    }

    /// The segments of the history, and their batches.
    fn segments(&mut self, mut superblock: Superblock) -> anyhow::Result<()> {
        let keyring = Keyring::new(superblock.journal_id, self.keys.clone());
        let mut found = self.find(&superblock, true)?;
        let (mut last, mut wanted) = (superblock.low_water, superblock.low_water_segment);
        let mut moves_left = if self.is_rebuilt { 0 } else { MOVES_MAX };
        while let Some((number, segment)) = found.range(wanted..).next().map(|(n, s)| (*n, s.clone())) {
            let is_newest = found.last_key_value().is_some_and(|(newest, _)| *newest == number);
            let offset_bytes = slot_offset_bytes(segment.header.slot, superblock.slot_len_bytes);
            let missing = number != wanted || segment.header.after.seq != last.seq;
            let read = self.read(&segment, &keyring, offset_bytes, superblock.slot_len_bytes);
            let is_doubtful = missing
                || read.as_ref().map_or(true, |(slot, walked)| {
                    // Another segment may be in the slot by now, and none of its batches be taken for this one's.
                    let is_another = SegmentHeader::decode(slot, superblock.slot_len_bytes)
                        .is_ok_and(|header| header != segment.header);
                    is_another || !walked.findings.is_empty() || walked.torn_tail.is_some()
                });
            if is_doubtful
                && moves_left > 0
                && let Some(now) = self.moved(&superblock)
            {
                moves_left -= 1;
                superblock = now;
                if superblock.low_water_segment > wanted {
                    let what = format!(
                        "segments {wanted} to {} were promoted while this ran",
                        superblock.low_water_segment - 1
                    );
                    self.visitor.visit(Part::Note(what))?;
                    (last, wanted) = (superblock.low_water, superblock.low_water_segment);
                }
                found = self.find(&superblock, false)?;
                continue;
            }
            if missing {
                let (from, until) = (last.seq + 1, segment.header.after.seq);
                let what = format!("records {from} to {until} are missing before this segment");
                let damage = Damage { seq: Some(from), ..Damage::of(number, offset_bytes, what) };
                self.visitor.visit(Part::Damage(damage))?;
            }
            wanted = number + 1;
            self.visitor.visit(Part::Segment(&segment))?;
            match read {
                Err(Unread::Locked(site_key)) => {
                    self.visitor.visit(Part::Locked(site_key))?;
                    // Where an unsealed one ends only its batches tell.
                    last = segment.trailer.as_ref().map_or(segment.header.after, |trailer| trailer.last);
                }
                Err(Unread::Damaged(what)) => {
                    self.visitor.visit(Part::Damage(Damage::of(number, offset_bytes, what)))?;
                }
                Ok((slot, walked)) => {
                    last = last_of(&segment, &walked);
                    self.tell(&segment, offset_bytes, &slot, &walked, is_newest)?;
                }
            }
        }
        self.recovery_disks(&superblock)
    }

    /// The superblock, if it says that segments may lie elsewhere by now.
    fn moved(&mut self, then: &Superblock) -> Option<Superblock> {
        let now = read_superblock(&mut self.storage, self.file)?;
        let of = |superblock: &Superblock| (superblock.open_count, superblock.low_water_segment);
        (of(&now) != of(then)).then_some(now)
    }

    /// A segment's slot and what is in it. What may be written at this moment is read until it stays the same.
    fn read(
        &mut self,
        segment: &Segment,
        keyring: &Keyring,
        offset_bytes: u64,
        slot_len_bytes: u64,
    ) -> Result<(AlignedBuf, Walked), Unread> {
        let cipher = keyring.cipher(&segment.header).map_err(|error| match error {
            KeyError::Missing(site_key) => Unread::Locked(site_key),
            KeyError::Damaged(_) => Unread::Damaged(format!("cannot be read: {error}")),
        })?;
        let mut before: Option<Walked> = None;
        for read in 1.. {
            let mut salvage = Salvage::new(true);
            let slot = salvage.read(&mut self.io(), offset_bytes, slot_len_bytes as usize);
            let mut slot = slot.map_err(|error| Unread::Damaged(format!("cannot be read: {error}")))?;
            cipher.decrypt_slot(&mut slot);
            let Ok(mut walked) =
                walk::<Infallible>(&slot, &segment.header, segment.trailer.as_ref(), &mut |_, _, _| Ok(()));
            let unreadable = salvage.into_unreadable().into_iter();
            // Those come first: they are why the others are damaged.
            walked.findings.splice(0..0, unreadable.map(|at| Finding::unreadable(at - offset_bytes)));
            let is_whole = walked.findings.is_empty() && walked.torn_tail.is_none();
            let is_same = before.as_ref().is_some_and(|before| before.findings == walked.findings);
            if is_whole || segment.trailer.is_some() || is_same || read == READS {
                return Ok((slot, walked));
            }
            before = Some(walked);
            std::thread::sleep(READ_AGAIN_AFTER);
        }
        unreachable!("the last read is returned")
    }

    fn tell(
        &mut self,
        segment: &Segment,
        offset_bytes: u64,
        slot: &[u8],
        walked: &Walked,
        is_newest: bool,
    ) -> anyhow::Result<()> {
        let number = segment.header.number;
        if V::WANTS_BATCHES {
            walk(slot, &segment.header, segment.trailer.as_ref(), &mut |batch, damage, at| {
                let file_offset_bytes = offset_bytes + at;
                self.visitor.visit(Part::Batch { segment: number, file_offset_bytes, batch, damage })
            })?;
        }
        self.visitor.visit(Part::EndOfSegment { segment, walked })?;
        for finding in &walked.findings {
            let file_offset_bytes = offset_bytes + finding.slot_offset_bytes;
            let Finding { seq, place, what, .. } = finding.clone();
            let place = place.map(LostPlace::from);
            let damage = Damage { seq, place, ..Damage::of(number, file_offset_bytes, what) };
            self.visitor.visit(Part::Damage(damage))?;
        }
        if let Some(torn) = &walked.torn_tail {
            let what = format!("the newest batch was never written to its end: {torn}");
            self.visitor.visit(match is_newest {
                true => Part::Note(what),
                false => Part::Damage(Damage::of(number, offset_bytes, what)),
            })?;
        }
        Ok(())
    }

    /// The newest life of each segment of the history, by number. With `told` what is wrong with their pages is told.
    fn find(&mut self, superblock: &Superblock, told: bool) -> anyhow::Result<Found> {
        let mut parts = Vec::new();
        let mut found = self.pages(superblock, &mut parts)?;
        if !told {
            parts.clear();
        }
        for part in parts {
            self.visitor.visit(part)?;
        }
        let options =
            SurveyOptions { skip_unreadable: true, keys: self.keys.clone(), ..SurveyOptions::default() };
        if !self.is_rebuilt
            && let Ok(survey) = survey(&mut self.storage, self.file, &options)
        {
            if told && let Some(Hidden { slot, after_seq, resumes_seq: None, .. }) = survey.hidden {
                let offset_bytes = slot_offset_bytes(slot, superblock.slot_len_bytes);
                let what = format!(
                    "slot {slot}: an encrypted segment has lost its first page; if it was the newest, records from {} on are lost",
                    after_seq + 1
                );
                self.visitor.visit(Part::Damage(Damage::at(offset_bytes, what)))?;
            }
            // What a later opening passed over when it looked for the stream's end was never acknowledged.
            let counts = |slot: u32| survey.segments.iter().any(|segment| segment.header.slot == slot);
            found.retain(|_, Segment { header, trailer }| {
                trailer.is_some() || header.open_count == superblock.open_count || counts(header.slot)
            });
        }
        Ok(found)
    }

    fn pages(&mut self, superblock: &Superblock, parts: &mut Vec<Part<'_>>) -> anyhow::Result<Found> {
        let slot_len_bytes = superblock.slot_len_bytes;
        let mut found = Found::new();
        let file_len_bytes = self.io().file_len_bytes()?;
        for slot in 0..superblock.slot_count {
            let offset_bytes = slot_offset_bytes(slot, slot_len_bytes);
            if slot_offset_bytes(slot + 1, slot_len_bytes) > file_len_bytes {
                let what = format!(
                    "the file ends here: what was in the last {} of its {} slots is lost",
                    superblock.slot_count - slot,
                    superblock.slot_count
                );
                parts.push(Part::Damage(Damage::at(file_len_bytes, what)));
                break;
            }
            let last_page = offset_bytes + slot_len_bytes - PAGE_BYTES as u64;
            let ours = |header: &SegmentHeader| {
                header.journal_id == superblock.journal_id
                    && header.slot == slot
                    && header.number >= superblock.low_water_segment
                    && header.open_count <= superblock.open_count
            };
            let header = self.io().read(offset_bytes, PAGE_BYTES).map_err(ReadError::Disk);
            let header =
                header.and_then(|page| SegmentHeader::decode(&page, slot_len_bytes).map_err(ReadError::Page));
            let trailer = self.io().read(last_page, PAGE_BYTES).map_err(ReadError::Disk);
            let trailer = trailer
                .and_then(|page| SegmentTrailer::decode(&page, slot_len_bytes).map_err(ReadError::Page));
            match &trailer {
                Err(ReadError::Page(PageError::Crc)) if header.as_ref().is_ok_and(ours) => {
                    let what =
                        format!("slot {slot}: the segment's last page is torn, so its batches were read");
                    parts.push(Part::Note(what));
                }
                // With a header the page is told of again with the rest of the slot.
                Err(ReadError::Disk(error)) if !header.as_ref().is_ok_and(ours) => {
                    parts.push(Part::Damage(Damage::at(
                        last_page,
                        format!("last page of slot {slot}: {error}"),
                    )));
                }
                _ => {}
            }
            let trailer = trailer.ok().filter(|trailer| ours(&trailer.header));
            let header = match (header, &trailer) {
                (Ok(header), _) => header,
                (Err(ReadError::Page(PageError::Magic)), None) => continue,
                (Err(error), Some(trailer)) => {
                    let what = format!("segment header: {error}");
                    parts.push(Part::Damage(Damage::of(trailer.header.number, offset_bytes, what)));
                    trailer.header.clone()
                }
                (Err(error), None) => {
                    let what = format!("segment header of slot {slot}: {error}");
                    parts.push(Part::Damage(Damage::at(offset_bytes, what)));
                    continue;
                }
            };
            if !ours(&header) {
                continue;
            }
            let trailer = trailer.filter(|trailer| trailer.header == header);
            let other = found.get(&header.number);
            if other.is_none_or(|other| other.header.open_count < header.open_count) {
                found.insert(header.number, Segment { header, trailer });
            }
        }
        Ok(found)
    }

    fn recovery_disks(&mut self, superblock: &Superblock) -> anyhow::Result<()> {
        for (number, volume) in superblock.volumes.iter().enumerate() {
            let disk = self.path.with_file_name(format!("disk-{number}.raw"));
            let len_bytes = std::fs::metadata(&disk).map(|metadata| metadata.len());
            if !len_bytes.as_ref().is_ok_and(|len_bytes| *len_bytes >= volume.size_bytes) {
                let found =
                    len_bytes.map_or_else(|error| error.to_string(), |len| format!("it has {len} bytes"));
                let wanted = volume.size_bytes;
                let what = format!("{}: {found}, {wanted} are needed", disk.display());
                self.visitor.visit(Part::Damage(Damage::at(0, what)))?;
            }
        }
        Ok(())
    }
}

/// Why a part of the file can't be read.
#[derive(Clone, Copy, Debug, thiserror::Error)]
enum ReadError {
    #[error(transparent)]
    Disk(StorageError),
    #[error(transparent)]
    Page(PageError),
    #[error(transparent)]
    BadList(BadListError),
}

/// Why nothing of a segment can be read.
enum Unread {
    /// Without this key.
    Locked(SiteKeyId),
    Damaged(String),
}

/// The stream's place after all that a report was told of.
pub(super) fn last_of(segment: &Segment, walked: &Walked) -> ChainPoint {
    segment.trailer.as_ref().map_or(walked.last, |trailer| trailer.last)
}
