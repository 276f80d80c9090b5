//! A superblock made up from the segments, when both copies are lost: to read what is there, never to write.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use uuid::Uuid;

use super::OpenError;
use super::salvage::Salvage;
use super::survey::{Content, Damage, SegmentError, Survey, SurveyOptions, survey_as};
use crate::batch::{BatchView, RecordKind};
use crate::crypt::{Encryption, SiteKeys};
use crate::format::bad_list::{BadList, BadListError};
use crate::format::manifest::Manifest;
use crate::format::superblock::PairPlace;
use crate::format::{
    BAD_LIST_OFFSETS, BAD_LIST_SLOT_BYTES, FIRST_SLOT_OFFSET_BYTES, JournalState, MANIFEST_OFFSETS,
    MANIFEST_SLOT_BYTES, MIN_SLOT_BYTES, PAGE_BYTES, SegmentHeader, SegmentTrailer, Superblock, VolumeState,
    slot_offset_bytes,
};
use crate::storage::{AlignedBuf, Blocking, FileId, Op, Purpose, Storage, StorageError};
use crate::walk::walk;

/// What a journal's file says without its superblocks.
#[derive(Clone, Debug)]
pub struct Rebuilt {
    /// Everything that segments and manifest tell, as if a superblock told it.
    pub superblock: Superblock,
    /// The newest manifest.
    pub manifest: Option<Manifest>,
    /// Nothing tells that no segment before the oldest one is lost, which a promotion has freed or not: if one is, all that is read is wrong.
    pub is_unproven: bool,
    /// Records can't be read that are in no recovery disk, or may not be. An intent to promote may be lost with them, and nothing else tells how
    /// new the recovery disks are: nothing may be opened.
    pub gap: Option<Damage>,
    /// A list of bad ranges is damaged or can't be read, and may have been the newest: there may be more bad ranges than are known.
    pub bad_list_lost: Option<BadListError>,
}

impl Rebuilt {
    /// What the file holds by it.
    ///
    /// # Errors
    /// The file failed, or [`Self::gap`] says that nothing may be opened.
    pub fn survey<S: Storage>(
        self,
        storage: &mut S,
        file: FileId,
        options: &SurveyOptions,
    ) -> Result<Survey, OpenError> {
        if let Some(gap) = self.gap {
            return Err(OpenError::Damaged(gap));
        }
        let mut survey = survey_as(storage, file, self.superblock, options)?;
        survey.manifest = self.manifest;
        survey.bad_list_lost = survey.bad_list_lost.or(self.bad_list_lost);
        Ok(survey)
    }
}

/// The manifest of a file, whatever its superblocks say: of the valid ones the newest.
///
/// # Errors
/// The file failed.
pub fn newest_manifest<S: Storage>(storage: &mut S, file: FileId) -> Result<Option<Manifest>, StorageError> {
    let mut io = Blocking::new(storage, file, Purpose::Survey);
    let len_bytes = io.file_len_bytes()?;
    let mut newest: Option<Manifest> = None;
    for offset_bytes in MANIFEST_OFFSETS {
        if offset_bytes + MANIFEST_SLOT_BYTES as u64 > len_bytes {
            continue;
        }
        let Ok(bytes) = io.read(offset_bytes, MANIFEST_SLOT_BYTES) else { continue };
        if let Ok((manifest, _)) = Manifest::decode(&bytes)
            && newest.as_ref().is_none_or(|newest| newest.sequence < manifest.sequence)
        {
            newest = Some(manifest);
        }
    }
    Ok(newest)
}

/// Makes up a superblock from what the segments say. `volumes` are what the manifest says of the VM's volumes. Nothing below the newest
/// promotion intent of the stream can be opened by it, since the recovery disks may be newer (C2).
///
/// # Errors
/// The file failed, or no segment is left.
pub fn rebuild<S: Storage>(
    storage: &mut S,
    file: FileId,
    manifest: Option<Manifest>,
    volumes: Vec<VolumeState>,
    keys: &SiteKeys,
) -> Result<Rebuilt, OpenError> {
    let mut io = Blocking::new(storage, file, Purpose::Survey);
    let first = find_header(&mut io)?.ok_or(OpenError::NotAJournal)?;
    let headers = read_headers(&mut io, &first)?;
    // The one that was found may be in a slot that the file has a part of.
    let newest = headers.iter().max_by_key(|header| (header.number, header.open_count));
    let newest = newest.ok_or(OpenError::NoWholeSlot { slot_len_bytes: first.slot_len_bytes })?;
    // As each of them says it was, and never gets lower.
    let low_water = headers.iter().filter_map(|header| header.low_water).max();
    let first_number = low_water.map_or(1, |low_water| low_water.segment);
    let mut chain = oldest_of_chain(&headers, newest, first_number);
    let file_len_bytes = io.file_len_bytes()?;
    let mut superblock = Superblock {
        sequence: 0,
        journal_id: first.journal_id,
        vm_id: Uuid::nil(),
        vpg_id: Uuid::nil(),
        slot_len_bytes: first.slot_len_bytes,
        slot_count: slot_count(file_len_bytes, first.slot_len_bytes),
        open_count: newest_open_count(&mut io, &headers, &first)?,
        manifest: None,
        bad_list: None,
        low_water_segment: chain.number,
        low_water: chain.after,
        state: JournalState::Consistent,
        promotion_intent_seq: 0,
        tail_generation: Uuid::nil(),
        parent_generation: Uuid::nil(),
        generation_first_seq: 0,
        // Every generation counts: the chain of batches tells what follows what.
        generation_fork_seq: u64::MAX,
        receive_time_us: 0,
        // What the newest segment says: nothing is written by it.
        encryption: newest.encryption.map_or(Encryption::Never, |encryption| Encryption::On(encryption.key)),
        volumes,
    };
    let options = SurveyOptions { skip_unreadable: true, trusted_through: None, keys: keys.clone() };
    let mut hole = None;
    let survey = loop {
        let survey = survey_as(storage, file, superblock.clone(), &options)?;
        // What was promoted may be gone in part: a slot that was freed is used again, or its space given back, while an older copy of its
        // segment is left where an opening had found it.
        let Some(damage) = passed_over(&headers, &survey).or(survey.damage) else { break survey };
        let behind = headers.iter().filter(|header| header.after.seq == damage.resumes_after_seq);
        let behind = behind.filter(|header| header.number > superblock.low_water_segment);
        chain = behind.max_by_key(|header| header.open_count).ok_or(OpenError::Damaged(damage))?;
        (superblock.low_water_segment, superblock.low_water) = (chain.number, chain.after);
        hole = Some(damage);
    };
    let mut io = Blocking::new(storage, file, Purpose::Survey);
    let (mut intents, mut gap) = (BTreeSet::new(), None);
    // What is behind the end of the open segment counts, too: the batch that ends it may have been the intent's.
    let open = survey.segments.last().filter(|last| matches!(last.content, Content::Scanned(_)));
    let open = open.map(|last| (last.header.slot, last.header.number));
    if let Some((slot, number)) = survey.hidden.map(|hidden| (hidden.slot, hidden.segment)).or(open) {
        match all_intents(&mut io, &superblock, &survey, (slot, number))? {
            Some(found) => intents.extend(found),
            None => {
                let after_seq = survey.hidden.map_or(survey.tail.seq, |hidden| hidden.after_seq);
                let resumes_seq = survey.hidden.and_then(|hidden| hidden.resumes_seq);
                let until = resumes_seq.map_or(after_seq, |resumes_seq| resumes_seq - 1);
                gap = Some(Damage { after_seq, resumes_after_seq: until, stop: None });
            }
        }
    }
    // With the last number of its segment.
    let mut gaps = Vec::new();
    for segment in &survey.segments {
        let last_seq = segment.last().seq;
        let lost = |after_seq, resumes_after_seq| Damage { after_seq, resumes_after_seq, stop: None };
        let footer = match segment.footer(&mut io, &superblock) {
            Ok(footer) => footer,
            Err(SegmentError::Storage(error)) if !error.is_medium() => return Err(error.into()),
            Err(_) => {
                gaps.push((last_seq, lost(segment.header.after.seq, last_seq)));
                continue;
            }
        };
        gaps.extend(footer.gaps.first().map(|gap| (last_seq, lost(gap.first_seq - 1, gap.last_seq))));
        let found = footer.events.iter().filter(|event| event.record.kind == RecordKind::PromotionIntent);
        intents.extend(found.map(|event| event.record.argument));
    }
    let low_water_seq = low_water.map_or(0, |low_water| low_water.seq);
    let intent_seq = intents.pop_last().unwrap_or_default().max(low_water_seq);
    // Segments between the recovery disks and the oldest one found are lost, if a promotion ended before that one.
    let lost = (intent_seq > 0 || low_water.is_some()) && chain.after.seq > intent_seq;
    if lost {
        let (after_seq, resumes_after_seq) = (intent_seq, chain.after.seq);
        gap = gap.or(Some(Damage { after_seq, resumes_after_seq, stop: None }));
    }
    // A promotion is announced when the one before has ended: what that one promoted may still lie in slots that nobody has used since.
    // The last one may have ended or not: its segments are all there, or none of them is needed.
    let ended_seq = intents.pop_last().unwrap_or_default().max(low_water_seq);
    gap = gap.or(hole.filter(|hole| hole.resumes_after_seq > ended_seq));
    // What told of both intents came after the segments that they are about.
    gap = gap.or(gaps.into_iter().find(|(last_seq, _)| *last_seq > ended_seq).map(|(_, gap)| gap));
    for segment in survey.segments.iter().take_while(|segment| segment.last().seq <= ended_seq) {
        (superblock.low_water_segment, superblock.low_water) = (segment.header.number + 1, segment.last());
    }
    superblock.promotion_intent_seq = intent_seq;
    let (bad_list, mut bad_list_lost) = newest_bad_list(&mut io, first.journal_id)?;
    if manifest.is_none() && bad_list.is_none() {
        // What took superblocks and manifests may have taken it, too.
        bad_list_lost = bad_list_lost.or(Some(BadListError::Magic));
    }
    superblock.bad_list = bad_list;
    // Segments of the last promotion that are missing were freed by its end, or are lost before it.
    let is_unproven = chain.number > 1 && chain.after.seq > ended_seq;
    Ok(Rebuilt { superblock, manifest, is_unproven, gap, bad_list_lost })
}

/// Set if segments are there that the survey's end doesn't lead to: it ended in a copy with records that an opening didn't trust and passed
/// over, and which the copy that counted, gone by now, didn't have.
fn passed_over(headers: &[SegmentHeader], survey: &Survey) -> Option<Damage> {
    let last = survey.segments.last();
    let (number, open_count) = match last {
        Some(last) => (last.header.number, last.header.open_count),
        None => (survey.superblock.low_water_segment.saturating_sub(1), 0),
    };
    // Openings move the newest segment: what counts behind it is of the same opening or a later one.
    let mut behind: Vec<&SegmentHeader> = headers
        .iter()
        .filter(|header| {
            header.number > number && header.open_count >= open_count && header.after != survey.tail
        })
        .collect();
    behind.sort_by_key(|header| (header.number, Reverse(header.open_count)));
    let next = behind.first()?;
    let (after_seq, resumes_after_seq) = (survey.tail.seq.min(next.after.seq), next.after.seq);
    Some(Damage { after_seq, resumes_after_seq, stop: None })
}

/// The intents of the open segment, over payloads that are damaged; none if there may be others, since the head of a batch can't be read. Not
/// even of its last one: what was announced in it may have been carried out.
fn all_intents<S: Storage>(
    io: &mut Blocking<'_, S>,
    superblock: &Superblock,
    survey: &Survey,
    (slot_number, segment): (u32, u64),
) -> Result<Option<Vec<u64>>, StorageError> {
    let slot_len_bytes = superblock.slot_len_bytes;
    let offset_bytes = slot_offset_bytes(slot_number, slot_len_bytes);
    let mut slot = Salvage::new(true).read(io, offset_bytes, slot_len_bytes as usize)?;
    // It is none of the segments that count if its first batch is the damaged one.
    let open = SegmentHeader::decode(&slot[..PAGE_BYTES], slot_len_bytes).ok();
    let open = open.filter(|header| header.slot == slot_number && header.number == segment);
    let cipher = open.as_ref().and_then(|header| survey.keyring.cipher(header).ok());
    let (Some(open), Some(cipher)) = (open, cipher) else { return Ok(None) };
    cipher.decrypt_slot(&mut slot);
    let mut intents = Vec::new();
    let mut take = |batch: &BatchView<'_>| {
        let found = batch.records().filter(|record| record.kind() == RecordKind::PromotionIntent);
        intents.extend(found.map(|record| record.argument()));
    };
    let walked = walk(&slot, &open, None, &mut |batch, _, _| {
        take(batch);
        Ok::<_, std::convert::Infallible>(())
    });
    let Ok(walked) = walked;
    if walked.torn_tail.is_some() {
        let Ok((batch, _)) = BatchView::parse_damaged(&slot[walked.end_bytes as usize..]) else {
            return Ok(None);
        };
        take(&batch);
    }
    Ok(walked.findings.iter().all(|finding| finding.place.is_some()).then_some(intents))
}

/// The newest opening that left something in the file: slots that have lost their first page tell by their batches.
fn newest_open_count<S: Storage>(
    io: &mut Blocking<'_, S>,
    headers: &[SegmentHeader],
    first: &SegmentHeader,
) -> Result<u64, StorageError> {
    let mut newest = headers.iter().map(|header| header.open_count).max().unwrap_or_default();
    let slot_len_bytes = first.slot_len_bytes;
    let is_known = |slot: &u32| headers.iter().any(|header| header.slot == *slot);
    for slot in (0..slot_count(io.file_len_bytes()?, slot_len_bytes)).filter(|slot| !is_known(slot)) {
        let begin = slot_offset_bytes(slot, slot_len_bytes);
        let bytes = Salvage::new(true).read(io, begin, slot_len_bytes as usize)?;
        let batches = (0..bytes.len()).step_by(PAGE_BYTES);
        let batches = batches.filter_map(|at| BatchView::parse_damaged(&bytes[at..]).ok());
        let links = batches.map(|(batch, _)| batch.link());
        let own = links.filter(|link| link.journal_id == first.journal_id);
        newest = own.map(|link| link.open_count).fold(newest, u64::max);
    }
    Ok(newest)
}

/// Where the list of bad ranges is, if there are any: of the valid ones the newest. And what is wrong with one that may be newer.
fn newest_bad_list<S: Storage>(
    io: &mut Blocking<'_, S>,
    journal_id: Uuid,
) -> Result<(Option<PairPlace>, Option<BadListError>), StorageError> {
    let (mut newest, mut lost): (Option<(BadList, PairPlace)>, _) = (None, None);
    for (slot, offset_bytes) in (0_u32..).zip(BAD_LIST_OFFSETS) {
        let (decoded, is_zero) = match io.read(offset_bytes, BAD_LIST_SLOT_BYTES) {
            Ok(bytes) => (BadList::decode(&bytes), bytes.iter().all(|byte| *byte == 0)),
            Err(error) if error.is_medium() => (Err(BadListError::Unreadable), false),
            Err(error) => return Err(error),
        };
        match decoded {
            Ok((list, crc)) => {
                if list.journal_id == journal_id
                    && newest.as_ref().is_none_or(|(newest, _)| newest.sequence < list.sequence)
                {
                    newest = Some((list, PairPlace { slot, crc }));
                }
            }
            // None was ever written there.
            Err(BadListError::Magic) if is_zero => {}
            Err(error) => lost = Some(error),
        }
    }
    let place = newest.filter(|(list, _)| !list.ranges.is_empty()).map(|(_, place)| place);
    Ok((place, lost))
}

/// Any segment's header that tells how long a slot is.
fn find_header<S: Storage>(io: &mut Blocking<'_, S>) -> Result<Option<SegmentHeader>, StorageError> {
    let len_bytes = io.file_len_bytes()?;
    let mut offset_bytes = FIRST_SLOT_OFFSET_BYTES;
    while offset_bytes + PAGE_BYTES as u64 <= len_bytes {
        // A slot begins at a multiple of its length, which is a multiple of a page: most are much longer.
        let pages = io.run_all(
            (0..PAGES_AT_ONCE)
                .map(|number| offset_bytes + number * PAGE_BYTES as u64)
                .filter(|offset_bytes| offset_bytes + PAGE_BYTES as u64 <= len_bytes)
                .map(|offset_bytes| Op::Read { offset_bytes, buffer: AlignedBuf::zeroed(PAGE_BYTES) })
                .collect(),
        );
        for (number, page) in (0_u64..).zip(pages) {
            let Ok(Some(page)) = page else { continue };
            let Ok(header) = SegmentHeader::decode_of_any(&page) else { continue };
            if slot_offset_bytes(header.slot, header.slot_len_bytes)
                == offset_bytes + number * PAGE_BYTES as u64
            {
                return Ok(Some(header));
            }
        }
        offset_bytes += PAGES_AT_ONCE * PAGE_BYTES as u64;
    }
    Ok(None)
}

/// How many pages are looked at together.
const PAGES_AT_ONCE: u64 = MIN_SLOT_BYTES / PAGE_BYTES as u64;

fn slot_count(file_len_bytes: u64, slot_len_bytes: u64) -> u32 {
    let slots = file_len_bytes.saturating_sub(FIRST_SLOT_OFFSET_BYTES) / slot_len_bytes;
    u32::try_from(slots).unwrap_or(u32::MAX).min(crate::format::MAX_SLOTS)
}

fn read_headers<S: Storage>(
    io: &mut Blocking<'_, S>,
    first: &SegmentHeader,
) -> Result<Vec<SegmentHeader>, StorageError> {
    let slot_len_bytes = first.slot_len_bytes;
    let slots = slot_count(io.file_len_bytes()?, slot_len_bytes);
    let mut headers = Vec::new();
    for slot in 0..slots {
        let begin = slot_offset_bytes(slot, slot_len_bytes);
        let header = io.read(begin, PAGE_BYTES).ok();
        let header = header.and_then(|page| SegmentHeader::decode(&page, slot_len_bytes).ok());
        // Either page can stand for the other.
        let trailer = io.read(begin + slot_len_bytes - PAGE_BYTES as u64, PAGE_BYTES).ok();
        let trailer = trailer.and_then(|page| SegmentTrailer::decode(&page, slot_len_bytes).ok());
        let header = header.or_else(|| trailer.map(|trailer| trailer.header));
        headers.extend(header.filter(|header| header.journal_id == first.journal_id && header.slot == slot));
    }
    Ok(headers)
}

/// The oldest segment from which numbers without a gap lead to the newest one; those below `first_number` don't count.
fn oldest_of_chain<'a>(
    headers: &'a [SegmentHeader],
    newest: &'a SegmentHeader,
    first_number: u64,
) -> &'a SegmentHeader {
    let mut oldest = newest;
    while oldest.number > first_number {
        let before = headers
            .iter()
            .filter(|header| header.number + 1 == oldest.number && header.after.seq <= oldest.after.seq);
        match before.max_by_key(|header| header.open_count) {
            Some(before) => oldest = before,
            None => break,
        }
    }
    oldest
}
