//! What promotion and shrinking change in the journal's file (C2, C3).

use bytes::Bytes;

use crate::batch::{BatchLink, BatchSealer, Record};
use crate::format::{ChainPoint, slot_offset_bytes};
use crate::planted::{Bug, planted};
use crate::storage::{AlignedBuf, Op, Purpose};

use super::change::AfterChange;
use super::segment::OpenSegment;
use super::step::Step;
use super::{Change, Event, RESERVED_SLOTS, Writer};

impl Writer {
    /// Whether a closed segment of the history ends there, and no promotion further than that was announced.
    pub(super) fn can_promote(&self, through: ChainPoint) -> bool {
        let announced = self.superblock.promotion_intent_seq;
        let under_way = announced > self.superblock.low_water.seq;
        !self.superblock.state.is_base_sync()
            && self.closed.iter().any(|segment| segment.last == through)
            && if under_way { through.seq == announced } else { through.seq >= announced }
    }

    /// Number of the segment that begins at the end of a closed one.
    pub(super) fn segment_after(&self, through: ChainPoint) -> u64 {
        let ending = self.closed.iter().find(|segment| segment.last == through);
        ending.map_or(self.superblock.low_water_segment, |segment| segment.header.number + 1)
    }

    pub(super) fn free_promoted(&mut self, low_water_segment: u64) {
        while let Some(segment) =
            self.closed.pop_front_if(|segment| segment.header.number < low_water_segment)
        {
            self.free_slots.add_reserved([segment.header.slot]);
        }
    }

    /// The record of the intent and one copy of the superblock with one sync for both, then the other copy.
    pub(super) fn announce_promotion(&mut self, ticket: u64, through: ChainPoint) -> Option<Step> {
        let change = Change::AnnouncePromotion { through };
        if self.can_promote(through) && !self.has_room_for_intent() && !self.no_space {
            // The slots' space was given back: the announcement waits for one.
            let reserving = if self.free_slots.len() > 1 { self.reserve_slot() } else { None };
            if reserving.is_some() {
                self.changes.push_front((ticket, change));
                return reserving;
            }
        }
        if !self.can_promote(through) || !self.has_room_for_intent() {
            // A change before this one moved the history, or the last slot is an opening's.
            self.events.push_back(Event::Changed { ticket });
            return None;
        }
        let mut next = self.superblock.clone();
        next.promotion_intent_seq = through.seq;
        let mut writes = std::mem::take(&mut self.riders);
        if self.told_intent_seq < through.seq && !planted(Bug::IntentNotInStream) {
            writes.extend(self.intent_write(through)?);
            self.told_intent_seq = through.seq;
        }
        let then = AfterChange::Change { ticket, change: Box::new(change) };
        let before = if writes.is_empty() { Vec::new() } else { vec![writes] };
        Some(self.superblock_step(before, next, then))
    }

    /// The batch that announces it, in the open segment, or in a new one in a slot that is kept for this.
    fn intent_write(&mut self, through: ChainPoint) -> Option<Vec<(Purpose, Op)>> {
        let batch = self.intent_batch(through);
        let slot_len_bytes = self.superblock.slot_len_bytes;
        let mut writes = Vec::new();
        let mut first_page = None;
        if !self.open.as_ref().is_some_and(|open| open.fits_local(&batch, slot_len_bytes)) {
            if let Some(open) = self.open.take() {
                self.seal(open);
                writes.append(&mut self.riders);
            }
            first_page = Some(self.begin_segment(self.receive_time_us)?);
        }
        let last = self.durable;
        let open = self.open.as_mut()?;
        open.add(&batch, last, self.receive_time_us);
        writes.push((Purpose::Intent, open.write(first_page, vec![batch], slot_len_bytes)));
        Some(writes)
    }

    /// Whether an intent fits into the open segment, or a slot besides the one that an opening needs (C1) can take it.
    fn has_room_for_intent(&self) -> bool {
        let batch = self.intent_batch(self.durable);
        let fits = |open: &OpenSegment| open.fits_local(&batch, self.superblock.slot_len_bytes);
        self.open.as_ref().is_some_and(fits) || self.free_slots.spare_reserved() > 0
    }

    fn intent_batch(&self, through: ChainPoint) -> Bytes {
        let link = BatchLink {
            journal_id: self.superblock.journal_id,
            generation: self.superblock.tail_generation,
            open_count: self.superblock.open_count,
            prev_batch_crc: self.durable.batch_crc,
        };
        let mut sealer = BatchSealer::new();
        sealer
            .push(Record::promotion_intent(self.receive_time_us, through.seq))
            .expect("an intent alone fits into a batch");
        let batch = sealer.seal(&link, self.durable.seq).expect("it has a record");
        AlignedBuf::gather(&batch.pieces().cloned().collect::<Vec<_>>()).into_bytes()
    }

    /// The superblock first, if the file gets shorter: what lies behind its end is cut off only when nobody looks there any more.
    pub(super) fn shrink(&mut self, ticket: u64, spare_slots: u32) -> Option<Step> {
        let (slot_count, slot_len_bytes) = (self.superblock.slot_count, self.superblock.slot_len_bytes);
        let keep = RESERVED_SLOTS + spare_slots as usize;
        let Some(surplus) = self.free_slots.surplus(slot_count, keep) else {
            self.events.push_back(Event::Changed { ticket });
            return None;
        };
        self.free_slots.give_back(&surplus);
        let punch = |&slot: &u32| {
            let offset_bytes = slot_offset_bytes(slot, slot_len_bytes);
            (Purpose::Shrink, Op::Punch { offset_bytes, len_bytes: slot_len_bytes })
        };
        let mut gone: Vec<_> = surplus.punched.iter().map(punch).collect();
        let is_shorter = surplus.slot_count < slot_count;
        if is_shorter {
            let len_bytes = slot_offset_bytes(surplus.slot_count, slot_len_bytes);
            gone.push((Purpose::Shrink, Op::Truncate { len_bytes }));
        }
        let change = Box::new(Change::Shrink { spare_slots });
        let then = AfterChange::Change { ticket, change };
        let mut next = self.superblock.clone();
        next.slot_count = surplus.slot_count;
        let mut step = self.superblock_step(Vec::new(), next, then);
        step.push_phase(gone);
        Some(step)
    }
}
