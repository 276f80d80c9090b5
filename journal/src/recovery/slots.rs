//! The slots of a journal, and what they say of themselves.

use zerocopy::FromBytes;

use super::OpenError;
use super::decide::{self, SegmentFacts, Verdict};
use super::salvage::Salvage;
use super::survey::{Content, Hidden, Segment};
use crate::batch::{BATCH_MAGIC, BatchHeader, MAX_BATCH_BYTES};
use crate::crypt::{Cipher, Encryption, Keyring};
use crate::format::{ChainPoint, PAGE_BYTES, SegmentHeader, SegmentTrailer, Superblock, slot_offset_bytes};
use crate::scan::{Ownership, Scan, ScanStop, resume, scan};
use crate::storage::{AlignedBuf, Blocking, Op, Storage, StorageError};

/// How many slots' pages are read together.
pub(super) const SLOTS_AT_ONCE: usize = 256;

/// A slot that names a segment of this journal.
pub(super) struct Slot {
    pub(super) header: SegmentHeader,
    trailer: Option<SegmentTrailer>,
    /// Its first page is there.
    has_header: bool,
    scan: Option<Scan>,
    /// First number behind what stopped the scan.
    resumes_seq: Option<u64>,
    /// The scan ended at something that the disk can't give back.
    ends_unreadable: Option<StorageError>,
}

impl Slot {
    pub(super) fn scan<S: Storage>(
        &mut self,
        io: &mut Blocking<'_, S>,
        salvage: &mut Salvage,
        superblock: &Superblock,
        keyring: &Keyring,
        ownership: Ownership,
        trusted_through: Option<u64>,
    ) -> Result<(), OpenError> {
        if self.trailer.is_none() && self.scan.is_none() {
            let slot_len_bytes = superblock.slot_len_bytes;
            let cipher = keyring.cipher(&self.header)?;
            let offset_bytes = slot_offset_bytes(self.header.slot, slot_len_bytes);
            let mut pages = Salvage::new(true);
            let mut bytes = pages.read(io, offset_bytes, slot_len_bytes as usize)?;
            cipher.decrypt_slot(&mut bytes);
            let found = scan(&bytes, &self.header, ownership, trusted_through);
            self.ends_unreadable = pages.first_error_in(unread(&found, offset_bytes));
            salvage.take(pages);
            if matches!(found.stop, ScanStop::Damaged(_) | ScanStop::End) {
                let end_bytes = slot_len_bytes - PAGE_BYTES as u64;
                let next = resume(&bytes, found.end_bytes, end_bytes, &self.header, found.last.seq);
                self.resumes_seq = next.map(|(_, seq)| seq);
            }
            self.scan = Some(found);
        }
        Ok(())
    }

    /// What the disk couldn't give back where the scan ended: there may be a batch that was acknowledged. A page that can't be read behind
    /// the end is none of the history's.
    pub(super) fn ends_unreadable(&self) -> Option<StorageError> {
        self.ends_unreadable
    }

    /// The stream's place after it, once it is scanned.
    pub(super) fn last(&self) -> ChainPoint {
        let scanned = self.scan.as_ref().map(|scan| scan.last);
        self.trailer.as_ref().map(|trailer| trailer.last).or(scanned).unwrap_or(self.header.after)
    }

    pub(super) fn judge(&self, superblock: &Superblock, wanted: u64, tail: ChainPoint) -> Verdict {
        decide::judge(SegmentFacts {
            wanted: self.header.number == wanted,
            above: self.header.number > wanted,
            opened: self.header.open_count <= superblock.open_count,
            follows: self.header.after == tail,
            ahead: self.header.after.seq > tail.seq,
            sealed: self.trailer.is_some(),
            carried: self.scan.as_ref().is_some_and(|scan| {
                scan.end_bytes >= self.header.carried_end_bytes || scan.stop == ScanStop::Untrusted
            }),
        })
    }

    /// What is behind its end. Once another opening took the segment over, that opening decided where it ends.
    pub(super) fn hidden(&self, superblock: &Superblock) -> Option<Hidden> {
        let (Some(scan), Some(_)) = (&self.scan, self.resumes_seq) else { return None };
        let SegmentHeader { number: segment, slot, open_count, .. } = self.header;
        let after_seq = scan.last.seq;
        let resumes_seq = self.resumes_seq;
        (open_count == superblock.open_count).then_some(Hidden { segment, slot, after_seq, resumes_seq })
    }

    pub(super) fn segment(&self, cipher: Cipher) -> Segment {
        let content = match (&self.trailer, &self.scan) {
            (Some(trailer), _) => Content::Sealed(Box::new(trailer.clone())),
            (None, Some(scan)) => Content::Scanned(Box::new(scan.clone())),
            (None, None) => unreachable!("a slot is scanned before it is used"),
        };
        Segment { header: self.header.clone(), content, cipher }
    }
}

/// Where in the file a scan would have gone on: the page that it ended at, or, if a batch begins there, all that such a batch may have.
fn unread(found: &Scan, slot_offset: u64) -> std::ops::Range<u64> {
    let begin = slot_offset + found.end_bytes;
    let len_bytes = if matches!(found.stop, ScanStop::Damaged(_)) { MAX_BATCH_BYTES } else { PAGE_BYTES };
    begin..begin + len_bytes as u64
}

/// What the first and last pages of all slots say. A page that the disk can't give back says nothing, like a damaged one: the other one of
/// its segment stands for it, or the segment is missed, or the slot is free.
pub(super) fn read_slots<S: Storage>(
    io: &mut Blocking<'_, S>,
    superblock: &Superblock,
    salvage: &mut Salvage,
) -> Result<Vec<Slot>, StorageError> {
    let slot_len_bytes = superblock.slot_len_bytes;
    let file_len_bytes = io.file_len_bytes()?;
    let page = |offset_bytes| Op::Read { offset_bytes, buffer: AlignedBuf::zeroed(PAGE_BYTES) };
    let mut slots = Vec::new();
    // A file cut short has lost its last slots; the survey finds out whether they are missed.
    let whole = |slot: &u32| slot_offset_bytes(slot + 1, slot_len_bytes) <= file_len_bytes;
    let present: Vec<u32> = (0..superblock.slot_count).filter(whole).collect();
    for chunk in present.chunks(SLOTS_AT_ONCE) {
        let edges = |slot: u32| {
            let offset = slot_offset_bytes(slot, slot_len_bytes);
            [offset, offset + slot_len_bytes - PAGE_BYTES as u64]
        };
        let places: Vec<u64> = chunk.iter().flat_map(|slot| edges(*slot)).collect();
        let pages = io.run_all(places.iter().map(|place| page(*place)).collect());
        let mut pages =
            places.into_iter().zip(pages).map(|(place, page)| salvage.page_again(io, place, page));
        for &index in chunk {
            let mut next = || pages.next().expect("two for each slot");
            let header = next()?.and_then(|page| SegmentHeader::decode(&page, slot_len_bytes).ok());
            let trailer = next()?.and_then(|page| SegmentTrailer::decode(&page, slot_len_bytes).ok());
            let ours =
                |header: &SegmentHeader| header.journal_id == superblock.journal_id && header.slot == index;
            let header = header.filter(ours);
            // A trailer under another header is one of the slot's earlier life.
            let trailer = trailer
                .filter(|trailer| ours(&trailer.header))
                .filter(|trailer| header.as_ref().is_none_or(|header| *header == trailer.header));
            let has_header = header.is_some();
            let header = header.or_else(|| trailer.as_ref().map(|trailer| trailer.header.clone()));
            if let Some(header) = header {
                slots.push(Slot {
                    header,
                    trailer,
                    has_header,
                    scan: None,
                    resumes_seq: None,
                    ends_unreadable: None,
                });
            }
        }
    }
    Ok(slots)
}

/// Why the first page of a slot couldn't be read of which nothing else tells what it holds now.
pub(super) fn unread_header(
    superblock: &Superblock,
    known: &[Slot],
    segments: &[Segment],
    pages: &Salvage,
) -> Option<StorageError> {
    let in_use = |slot: u32| segments.iter().any(|segment| segment.header.slot == slot);
    let has_header = |slot: u32| known.iter().any(|known| known.header.slot == slot && known.has_header);
    let error = |slot| {
        let offset_bytes = slot_offset_bytes(slot, superblock.slot_len_bytes);
        pages.first_error_in(offset_bytes..offset_bytes + PAGE_BYTES as u64)
    };
    (0..superblock.slot_count).filter(|slot| !in_use(*slot) && !has_header(*slot)).find_map(error)
}

/// A segment whose first page is gone, and that had no last page yet: its first batch tells that it was there. In a journal that has been
/// encrypted that may be anything but zeroes: what is free is zeroed there, or has its segment's pages still.
pub(super) fn find_headless<S: Storage>(
    io: &mut Blocking<'_, S>,
    superblock: &Superblock,
    known: &[Slot],
    segments: &[Segment],
    tail: ChainPoint,
    salvage: &mut Salvage,
) -> Result<Option<Hidden>, StorageError> {
    let slot_len_bytes = superblock.slot_len_bytes;
    let file_len_bytes = io.file_len_bytes()?;
    let is_there = |slot: &u32| slot_offset_bytes(slot + 1, slot_len_bytes) <= file_len_bytes;
    // A last page may be one of the slot's earlier life: only a first page tells what is there now.
    let in_use = |slot: u32| segments.iter().any(|segment| segment.header.slot == slot);
    let has_header = |slot: u32| known.iter().any(|known| known.header.slot == slot && known.has_header);
    let is_known = |slot: u32| in_use(slot) || has_header(slot);
    // Without its first page nobody knows the key of an encrypted one. While a history is given up, what is left of it doesn't count.
    let may_be_encrypted = superblock.encryption != Encryption::Never && !superblock.state.is_base_sync();
    let unknown: Vec<u32> =
        (0..superblock.slot_count).filter(is_there).filter(|slot| !is_known(*slot)).collect();
    for chunk in unknown.chunks(SLOTS_AT_ONCE) {
        let second_page = |slot: &u32| slot_offset_bytes(*slot, slot_len_bytes) + PAGE_BYTES as u64;
        let read =
            |slot| Op::Read { offset_bytes: second_page(slot), buffer: AlignedBuf::zeroed(PAGE_BYTES) };
        let pages = io.run_all(chunk.iter().map(read).collect());
        for (slot, page) in chunk.iter().zip(pages) {
            let page = salvage.page_again(io, second_page(slot), page)?;
            let is_batch = page.as_ref().is_some_and(|page| {
                BatchHeader::ref_from_prefix(page).is_ok_and(|(batch, _)| {
                    batch.magic == BATCH_MAGIC && batch.journal_id == *superblock.journal_id.as_bytes()
                })
            });
            let first = slot_offset_bytes(*slot, slot_len_bytes);
            let is_unread = salvage.first_error_in(first..first + PAGE_BYTES as u64).is_some();
            if !is_batch {
                let is_empty = page.as_ref().is_some_and(|page| page.iter().all(|byte| *byte == 0));
                // Its last page may be one of the slot's earlier life.
                if may_be_encrypted && !is_empty {
                    let after_seq = tail.seq;
                    return Ok(Some(Hidden { segment: 0, slot: *slot, after_seq, resumes_seq: None }));
                }
                if page.is_some() {
                    continue;
                }
                // Its first batch can't be read: others may tell. Without its first page, too, nobody knows.
                if is_unread {
                    let after_seq = tail.seq;
                    return Ok(Some(Hidden { segment: 0, slot: *slot, after_seq, resumes_seq: None }));
                }
            }
            let offset_bytes = slot_offset_bytes(*slot, slot_len_bytes);
            let slot_bytes = salvage.read(io, offset_bytes, slot_len_bytes as usize)?;
            // Only what this opening wrote can be newer than what was found.
            let header = SegmentHeader {
                journal_id: superblock.journal_id,
                number: 0,
                slot: *slot,
                open_count: superblock.open_count,
                after: tail,
                // One that the disk doesn't give back may have been written by an earlier opening, whose records were acknowledged.
                carried_end_bytes: if is_unread { slot_len_bytes } else { PAGE_BYTES as u64 },
                begin_time_us: 0,
                slot_len_bytes,
                encryption: None,
                low_water: None,
            };
            let end_bytes = slot_len_bytes - PAGE_BYTES as u64;
            if let Some((_, seq)) = resume(&slot_bytes, 0, end_bytes, &header, tail.seq) {
                return Ok(Some(Hidden {
                    segment: 0,
                    slot: *slot,
                    after_seq: tail.seq,
                    resumes_seq: Some(seq + 1),
                }));
            }
        }
    }
    Ok(None)
}
