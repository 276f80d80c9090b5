//! What a promotion's segments hold: their footers tell, and where one can't be believed the heads of the batches.

use std::ops::Range;

use super::slot_read::SlotRead;
use super::{Doing, Promotion, PromotionError, PromotionFile, Stage};
use crate::batch::RecordKind;
use crate::catalogue::Catalogue;
use crate::format::{Footer, FooterEvent, SegmentHeader, slot_offset_bytes};
use crate::scan::{Ownership, Sealed, scan_heads};
use crate::storage::{AlignedBuf, Op, StorageError};
use crate::writer::ClosedSegment;

impl Promotion {
    pub(super) fn ask_for_footer(&mut self, segment: usize) {
        let ClosedSegment { header, trailer, .. } = &self.segments[segment];
        let Some(trailer) = trailer else { return self.ask_for_slot(segment) };
        let offset_bytes =
            slot_offset_bytes(header.slot, self.superblock.slot_len_bytes) + trailer.data_end_bytes;
        self.reading_bytes += trailer.footer_len_bytes;
        let op = Op::Read { offset_bytes, buffer: AlignedBuf::zeroed(trailer.footer_len_bytes as usize) };
        self.ready.push_back((Doing::ReadFooter { segment }, PromotionFile::Journal, op));
    }

    /// A segment without a footer that can be believed is read whole.
    fn ask_for_slot(&mut self, segment: usize) {
        let Stage::Footers { slots, .. } = &mut self.stage else { return };
        let slot_len_bytes = self.superblock.slot_len_bytes;
        let begin = slot_offset_bytes(self.segments[segment].header.slot, slot_len_bytes);
        slots.insert(segment, SlotRead::new(begin..begin + slot_len_bytes));
        self.reading_bytes += slot_len_bytes;
        self.read_slot(segment);
    }

    /// Asks for the next part of a slot; false if all is read.
    fn read_slot(&mut self, segment: usize) -> bool {
        let Stage::Footers { slots, .. } = &mut self.stage else { return false };
        let Some(range) = slots.get_mut(&segment).and_then(SlotRead::next) else { return false };
        let buffer = AlignedBuf::zeroed((range.end - range.start) as usize);
        let op = Op::Read { offset_bytes: range.start, buffer };
        self.ready.push_back((Doing::ReadSlot { segment, range }, PromotionFile::Journal, op));
        true
    }

    pub(super) fn footer_read(&mut self, segment: usize, bytes: Option<AlignedBuf>) {
        let trailer = self.segments[segment].trailer.as_ref();
        self.reading_bytes -= trailer.map_or(0, |trailer| trailer.footer_len_bytes);
        let footer = bytes.zip(trailer).and_then(|(mut bytes, trailer)| {
            self.segments[segment].cipher.decrypt(trailer.data_end_bytes, &mut bytes);
            Footer::decode(&bytes, trailer.footer_crc, trailer.data_end_bytes).ok()
        });
        match footer {
            Some(footer) => self.take_footer(segment, &footer),
            None => self.ask_for_slot(segment),
        }
    }

    pub(super) fn slot_read(
        &mut self,
        segment: usize,
        range: &Range<u64>,
        result: Result<Option<AlignedBuf>, StorageError>,
    ) -> Result<(), PromotionError> {
        let Stage::Footers { slots, .. } = &mut self.stage else { return Ok(()) };
        let Some(slot) = slots.get_mut(&segment) else { return Ok(()) };
        match result {
            Ok(part) => slot.take(range, part.expect("a read gives its buffer back")),
            Err(error) if error.is_medium() => slot.split(range),
            Err(error) => return Err(PromotionError::Journal(error)),
        }
        if self.read_slot(segment) {
            return Ok(());
        }
        self.walk_slot(segment)
    }

    /// All of a slot is read, as far as the disk gives it: the batches' heads tell what it holds. What of the payloads is lost is found out
    /// when they are carried.
    fn walk_slot(&mut self, segment: usize) -> Result<(), PromotionError> {
        let Stage::Footers { slots, .. } = &mut self.stage else { return Ok(()) };
        let Some(slot) = slots.remove(&segment) else { return Ok(()) };
        self.reading_bytes -= slot.len_bytes();
        let mut slot = slot.into_slot();
        let ClosedSegment { header, last, cipher, trailer } = &self.segments[segment];
        cipher.decrypt_slot(&mut slot);
        let data_end_bytes =
            trailer.as_ref().map_or(self.superblock.slot_len_bytes, |trailer| trailer.data_end_bytes);
        let volume_count = self.superblock.volumes.len() as u16;
        let sealed = Sealed { last: *last, data_end_bytes, volume_count };
        let found = scan_heads(&slot, header, Ownership::of(&self.superblock), &sealed);
        if found.last != *last {
            let first_seq = header.after.seq + 1;
            return Err(PromotionError::Gap { number: header.number, first_seq, last_seq: last.seq });
        }
        self.take_footer(segment, &found.footer());
        Ok(())
    }

    /// Whether what can't be read may be passed over: only where all of every volume was written again by a sync that began behind it and
    /// has ended, so that nothing of what was lost is missed.
    pub(super) fn check_gaps(&self) -> Result<(), PromotionError> {
        let Some(&(number, gap)) = self.gaps.iter().min_by_key(|(number, _)| *number) else { return Ok(()) };
        let catalogue = Catalogue::build(&self.superblock, self.syncs.values().flatten());
        if catalogue.is_consistent(self.through.seq) {
            return Ok(());
        }
        Err(PromotionError::Gap { number, first_seq: gap.first_seq, last_seq: gap.last_seq })
    }

    fn take_footer(&mut self, segment: usize, footer: &Footer) {
        let Stage::Footers { missing, builders, .. } = &mut self.stage else { return };
        *missing -= 1;
        let SegmentHeader { slot, number, .. } = self.segments[segment].header;
        self.gaps.extend(footer.gaps.iter().filter(|gap| gap.has_records()).map(|gap| (number, *gap)));
        let is_border =
            |event: &&FooterEvent| matches!(event.record.kind, RecordKind::SyncBegin | RecordKind::SyncEnd);
        self.syncs.insert(number, footer.events.iter().filter(is_border).cloned().collect());
        for (volume, builder) in (0_u16..).zip(builders) {
            let base_seq = self.superblock.volumes[usize::from(volume)].base_seq;
            builder.add(footer, slot, self.superblock.slot_len_bytes, volume, base_seq, self.through.seq);
        }
        for FooterEvent { record, .. } in &footer.events {
            if record.kind == RecordKind::Resize
                && let Some(size_bytes) = self.size_bytes.get_mut(usize::from(record.volume))
            {
                // Disks only grow (E3), so the largest is the last.
                *size_bytes = record.len_bytes.max(*size_bytes);
            }
        }
    }
}
