//! Groups of batches: gathered, one write, one fdatasync; the next one is written while the one before is synced.

use bytes::Bytes;

use crate::format::{PAGE_BYTES, SegmentHeader, slot_offset_bytes};
use crate::planted::{Bug, planted};
use crate::recovery::segment_key;
use crate::storage::{Op, Purpose};

use super::segment::{self, OpenSegment};
use super::step::{Effect, Step};
use super::{Event, RESERVED_SLOTS, Writer};

impl Writer {
    /// A write of the next group, while the sync of the one before is all that is under way. Only within the open segment, and not
    /// before a change or growth: these begin with everything durable.
    pub(super) fn next_op_ahead(&mut self) -> Option<(Purpose, Op)> {
        if self.ahead.is_none() {
            let front = self.queue.front()?;
            let open = self.open.as_ref()?;
            if !self.step.as_ref()?.is_last_sync_of_group()
                || !self.changes.is_empty()
                || self.wants_to_grow()
                || !open.fits(&front.batch, self.superblock.slot_len_bytes)
            {
                return None;
            }
            let mut group = self.begin_group()?;
            let next = group.next_op_of_writes();
            self.ahead = Some((group, self.next_token));
            return next;
        }
        self.ahead.as_mut().and_then(|(group, _)| group.next_op_of_writes())
    }

    pub(super) fn begin_step(&mut self) -> Option<Step> {
        if let Some(step) = self.begin_change() {
            return Some(step);
        }
        if self.wants_to_grow() {
            return Some(self.grow());
        }
        if let Some(step) = self.begin_group() {
            return Some(step);
        }
        if self.wants_to_grow() {
            return Some(self.grow());
        }
        if !self.riders.is_empty() {
            return Some(Step::new(vec![std::mem::take(&mut self.riders)], Effect::None));
        }
        self.keep_minimum()
    }

    /// One more slot with its space, while the journal has fewer than it is to keep.
    fn keep_minimum(&mut self) -> Option<Step> {
        let with_space = self.superblock.slot_count as usize - self.free_slots.unreserved().count();
        if with_space >= self.limits.min_slots.min(self.limits.max_slots) as usize
            || self.superblock.state.is_base_sync()
            || self.no_space
        {
            return None;
        }
        if let Some(step) = self.reserve_slot() {
            return Some(step);
        }
        (self.superblock.slot_count < self.limits.max_slots).then(|| self.grow())
    }

    /// Gathers waiting batches into one write, or nothing if none waits or there is no room.
    fn begin_group(&mut self) -> Option<Step> {
        self.queue.front()?;
        if !self.front_fits() {
            if self.free_slots.len() <= RESERVED_SLOTS || self.free_slots.lacks_space() && self.no_space {
                // Without another one the open segment is the whole history: only a sealed segment can be promoted.
                if !self.wants_to_grow()
                    && self.closed.is_empty()
                    && let Some(open) = self.open.take()
                {
                    self.seal(open);
                }
                self.report_full();
                return None;
            }
            if self.free_slots.lacks_space() {
                return self.reserve_slot();
            }
            if let Some(open) = self.open.take() {
                self.seal(open);
            }
        }
        let mut first_page = None;
        if self.open.is_none() {
            let begin_time_us = self.queue.front()?.receive_time_us;
            first_page = Some(self.begin_segment(begin_time_us)?);
        }
        if std::mem::take(&mut self.full) {
            self.events.push_back(Event::Room);
        }
        let slot_len_bytes = self.superblock.slot_len_bytes;
        let open = self.open.as_mut()?;
        let (mut batches, mut group_bytes, mut last) = (Vec::new(), 0, self.durable);
        while let Some(front) = self.queue.front() {
            if group_bytes > 0 && group_bytes + front.batch.len() > self.limits.group_bytes
                || !open.fits(&front.batch, slot_len_bytes)
            {
                break;
            }
            let queued = self.queue.pop_front()?;
            open.add(&queued.batch, queued.last, queued.receive_time_us);
            group_bytes += queued.batch.len();
            last = queued.last;
            batches.push(queued.batch);
        }
        self.queued_bytes -= group_bytes;
        let write = open.write(first_page, batches, slot_len_bytes);
        if planted(Bug::SealedBeforeSync)
            && let Some(open) = self.open.take()
        {
            self.seal(open);
        }
        let mut writes = std::mem::take(&mut self.riders);
        writes.push((Purpose::Append, write));
        let mut phases = vec![writes];
        if !planted(Bug::SkippedSyncBeforeAck) {
            phases.push(vec![(Purpose::Append, Op::Sync)]);
        }
        Some(Step::new(phases, Effect::Durable(last)))
    }

    /// Writes footer and trailer with the next step. All batches of the segment are durable: steps end with a sync.
    pub(super) fn seal(&mut self, open: OpenSegment) {
        let (closed, writes) = open.seal(self.superblock.slot_len_bytes);
        self.riders.extend(writes);
        self.closed.push_back(closed);
    }

    /// Whether the next batch goes into the open segment.
    fn front_fits(&self) -> bool {
        let slot_len_bytes = self.superblock.slot_len_bytes;
        let front = self.queue.front();
        let fits = |open: &OpenSegment| front.is_none_or(|front| open.fits(&front.batch, slot_len_bytes));
        self.open.as_ref().is_some_and(fits)
    }

    /// Begins a segment in a slot that has its space; gives its first page.
    pub(super) fn begin_segment(&mut self, begin_time_us: u64) -> Option<Bytes> {
        let header = SegmentHeader {
            journal_id: self.superblock.journal_id,
            number: self.next_number,
            slot: self.free_slots.take()?,
            open_count: self.superblock.open_count,
            after: self.durable,
            carried_end_bytes: PAGE_BYTES as u64,
            begin_time_us,
            slot_len_bytes: self.superblock.slot_len_bytes,
            encryption: segment_key(&self.superblock, self.salt, self.next_number),
            low_water: Some(self.superblock.low_water_mark()),
        };
        let cipher = self.keyring.cipher(&header).expect("a key is opened before the superblock takes it");
        self.next_number += 1;
        let page = segment::page(&header.encode());
        self.open = Some(OpenSegment::begin(header, cipher));
        Some(page)
    }

    /// Gets a slot's space back before it is used (C3).
    pub(super) fn reserve_slot(&self) -> Option<Step> {
        let slot = self.free_slots.lowest_unreserved()?;
        let slot_len_bytes = self.superblock.slot_len_bytes;
        let allocate =
            Op::Allocate { offset_bytes: slot_offset_bytes(slot, slot_len_bytes), len_bytes: slot_len_bytes };
        let phases = vec![vec![(Purpose::Reserve, allocate)], vec![(Purpose::Reserve, Op::Sync)]];
        Some(Step::new(phases, Effect::Reserved(slot)).growing())
    }

    /// Growth is wanted when the next segment would find no slot, and may be needed soon.
    fn wants_to_grow(&self) -> bool {
        let is_half_full = self.open_fill_bytes() > self.superblock.slot_len_bytes / 2;
        let needs_another = !self.queue.is_empty() && !self.front_fits();
        self.free_slots.len() <= RESERVED_SLOTS
            && !self.superblock.state.is_base_sync()
            && !self.no_space
            && self.superblock.slot_count < self.limits.max_slots
            && (is_half_full || needs_another)
    }

    pub(super) fn report_full(&mut self) {
        let blocked = !self.queue.is_empty() && !self.front_fits();
        if blocked && !self.full && !self.wants_to_grow() {
            self.full = true;
            self.events.push_back(Event::Full { no_space: self.no_space });
        }
    }
}
