//! The appender: batches in, operations out, completions in, "durable through" out. Sans-I/O: whoever drives it owns
//! the storage and hands over no clock but the batches' receive times.
//!
//! One step runs at a time: a group of batches (gathered, one write, one fdatasync), a superblock change, or growth. The
//! next group gathers what was offered meanwhile. While nothing is left of a group but its sync, the next group of the same
//! segment is written already: its own sync begins when the other one has ended, so groups become durable in order.

mod change;
mod drive;
mod segment;
mod step;

use std::collections::{BTreeSet, VecDeque};

use bytes::Bytes;
use uuid::Uuid;

use crate::batch::BatchView;
use crate::format::{ChainPoint, PAGE_BYTES, SegmentHeader, Superblock, slot_offset_bytes};
use crate::planted::{Bug, planted};
use crate::recovery::{Content, Opened, Segment};
use crate::storage::{Op, Purpose, StorageError};

pub use change::{Change, ChangeError, ClaimError, Grant};
pub use drive::drive;
use segment::OpenSegment;
use step::{Effect, Step};

/// How far a journal may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most slots that the file may have.
    pub max_slots: u32,
    /// How many slots it grows by.
    pub grow_slots: u32,
    /// Most bytes of batches in one write.
    pub group_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_slots: 1024, grow_slots: 4, group_bytes: 8 << 20 }
    }
}

/// An operation to run on the journal's file.
#[derive(Debug)]
pub struct Action {
    /// To be given back to [`Writer::done`].
    pub token: u64,
    /// What it is for.
    pub purpose: Purpose,
    /// What to do.
    pub op: Op,
}

/// Something that happened, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Everything up to here may be acknowledged.
    Durable(ChainPoint),
    /// A [`Change`] is durable.
    Changed {
        /// What [`Writer::change`] gave for it.
        ticket: u64,
    },
    /// A stream owns the journal's tail now.
    Granted {
        /// What [`Writer::change`] gave for its claim.
        ticket: u64,
        /// What its batches go by.
        grant: Grant,
    },
    /// A stream cannot own the tail after all: another one was faster.
    Refused {
        /// What [`Writer::change`] gave for its claim.
        ticket: u64,
        /// Why.
        reason: ClaimError,
    },
    /// No slot is free and the limit, or the datastore's end, is reached: batches wait (C5).
    Full {
        /// The datastore, not the journal's limit, is what is full.
        no_space: bool,
    },
    /// Batches go on after [`Event::Full`].
    Room,
    /// A write or sync failed: nothing more is written until the journal is opened again, with
    /// [`crate::recovery::OpenOptions::trusted_through`] at the last durable number, and not before
    /// [`Writer::under_way`] is 0: what is still under way would land in slots that the next opening uses.
    Poisoned(StorageError),
}

/// Whether batches go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// They do.
    Running,
    /// They wait for room.
    Full,
    /// They don't, until the journal is opened again.
    Poisoned,
}

/// Why a batch was not taken. The stream that sent it must be closed: none of these mends itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OfferError {
    /// It is for another journal.
    #[error("the batch is for journal {0}")]
    OtherJournal(Uuid),
    /// Its sender doesn't own the tail, or another stream is taking it over.
    #[error("the batch's generation or opening is not the one that owns the journal's tail")]
    NotOwner,
    /// It isn't the next one.
    #[error("batch {first_seq} doesn't follow record {after_seq}")]
    Order {
        /// Its first number.
        first_seq: u64,
        /// The last number taken.
        after_seq: u64,
    },
    /// Its predecessor is not the last batch taken.
    #[error("the batch's predecessor is not the batch that ended with record {after_seq}")]
    Chain {
        /// The last number taken.
        after_seq: u64,
    },
    /// It doesn't fit into an empty slot.
    #[error("a batch of {0} bytes doesn't fit into a slot")]
    TooLong(usize),
    /// Records go to the recovery disks now, or don't.
    #[error("the journal is in the wrong state for this batch: its first sync is under way, or over")]
    WrongState,
    /// The journal is poisoned.
    #[error("the journal failed and must be opened again")]
    Poisoned,
}

/// The appender of one journal.
#[derive(Debug)]
pub struct Writer {
    superblock: Superblock,
    limits: Limits,
    free_slots: BTreeSet<u32>,
    closed: VecDeque<ClosedSegment>,
    open: Option<OpenSegment>,
    next_number: u64,
    accepted: ChainPoint,
    durable: ChainPoint,
    queue: VecDeque<Queued>,
    queued_bytes: usize,
    changes: VecDeque<(u64, Change)>,
    claims_pending: usize,
    next_ticket: u64,
    /// Writes that need no sync of their own and go with the next step: footer and trailer, the other superblock copy.
    riders: Vec<(Purpose, Op)>,
    step: Option<Step>,
    /// The group after the one that is being synced, with the token of its first operation.
    ahead: Option<(Step, u64)>,
    next_token: u64,
    under_way: usize,
    events: VecDeque<Event>,
    receive_time_us: u64,
    /// Growth met the datastore's end; tried again on request.
    no_space: bool,
    full: bool,
    poisoned: bool,
}

/// A segment that takes no more batches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClosedSegment {
    /// Its first page.
    pub header: SegmentHeader,
    /// The stream's place after it.
    pub last: ChainPoint,
}

#[derive(Debug)]
struct Queued {
    batch: Bytes,
    last: ChainPoint,
    receive_time_us: u64,
}

impl Writer {
    /// Goes on where recovery ended.
    pub fn new(opened: Opened, limits: Limits) -> Self {
        let Opened { superblock, segments, tail, free_slots, .. } = opened;
        let next_number = segments.last().map_or(superblock.low_water_segment, |last| last.header.number + 1);
        let mut closed: VecDeque<ClosedSegment> = segments
            .iter()
            .map(|segment| ClosedSegment { header: segment.header.clone(), last: segment.last() })
            .collect();
        // The last segment is this opening's own copy if it isn't sealed: it takes more.
        let open = match segments.into_iter().next_back() {
            Some(Segment { header, content: Content::Scanned(scan) }) => {
                closed.pop_back();
                Some(OpenSegment::resume(header, *scan))
            }
            _ => None,
        };
        let receive_time_us = superblock.receive_time_us;
        Self {
            superblock,
            limits,
            free_slots: free_slots.into_iter().collect(),
            closed,
            open,
            next_number,
            accepted: tail,
            durable: tail,
            queue: VecDeque::new(),
            queued_bytes: 0,
            changes: VecDeque::new(),
            claims_pending: 0,
            next_ticket: 1,
            riders: Vec::new(),
            step: None,
            ahead: None,
            next_token: 1,
            under_way: 0,
            events: VecDeque::new(),
            receive_time_us,
            no_space: false,
            full: false,
            poisoned: false,
        }
    }

    /// Takes a batch that [`BatchView::parse`] gave `view` for. `batch` should be in aligned memory
    /// ([`crate::storage::AlignedBuf`]): then no byte is copied again. The caller bounds [`Self::queued_bytes`].
    ///
    /// # Errors
    /// The batch isn't the stream's next one, or the journal takes none now.
    pub fn offer(
        &mut self,
        batch: Bytes,
        view: &BatchView<'_>,
        receive_time_us: u64,
    ) -> Result<(), OfferError> {
        debug_assert_eq!(batch.len(), view.len_bytes());
        if self.superblock.state.is_base_sync() {
            return Err(OfferError::WrongState);
        }
        self.check_next(view)?;
        let longest = OpenSegment::longest_batch_bytes(view, self.superblock.slot_len_bytes);
        if longest.is_none_or(|longest| batch.len() as u64 > longest) {
            return Err(OfferError::TooLong(batch.len()));
        }
        let last = ChainPoint { seq: view.last_seq(), batch_crc: view.crc() };
        self.accepted = last;
        self.queued_bytes += batch.len();
        self.receive_time_us = self.receive_time_us.max(receive_time_us);
        self.queue.push_back(Queued { batch, last, receive_time_us: self.receive_time_us });
        Ok(())
    }

    /// Takes note of a batch whose records go to the recovery disks (B6). When they are durable there,
    /// [`Change::AdvanceBase`] moves the base.
    ///
    /// # Errors
    /// The batch isn't the stream's next one, or no base sync is under way.
    pub fn accept_for_base(
        &mut self,
        view: &BatchView<'_>,
        receive_time_us: u64,
    ) -> Result<ChainPoint, OfferError> {
        if !self.superblock.state.is_base_sync() {
            return Err(OfferError::WrongState);
        }
        self.check_next(view)?;
        self.accepted = ChainPoint { seq: view.last_seq(), batch_crc: view.crc() };
        self.receive_time_us = self.receive_time_us.max(receive_time_us);
        Ok(self.accepted)
    }

    /// The next operation to run, if one can begin now. Operations given out may run at the same time.
    pub fn next_action(&mut self) -> Option<Action> {
        if self.poisoned {
            return None;
        }
        if self.step.is_none() {
            self.step = self.begin_step();
        }
        let (purpose, op) = match self.step.as_mut()?.next_op() {
            Some(next) => next,
            None => self.next_op_ahead()?,
        };
        let token = self.next_token;
        self.next_token += 1;
        self.under_way += 1;
        Some(Action { token, purpose, op })
    }

    /// An operation has ended.
    pub fn done(&mut self, token: u64, result: Result<(), StorageError>) {
        self.under_way = self.under_way.saturating_sub(1);
        let (step, is_ahead) = match (&mut self.step, &mut self.ahead) {
            (_, Some((ahead, first_token))) if token >= *first_token => (ahead, true),
            (Some(step), _) => (step, false),
            (None, _) => return,
        };
        let result =
            if planted(Bug::FailedSyncForgotten) && result.is_err_and(|error| error.verb == "fdatasync") {
                Ok(())
            } else {
                result
            };
        match result {
            Ok(()) => {}
            Err(error) if step.is_growing() && error.is_no_space() => {
                self.step = None;
                self.no_space = true;
                self.report_full();
                return;
            }
            Err(_) if self.poisoned => return,
            Err(error) => {
                self.poisoned = true;
                self.queue.clear();
                self.queued_bytes = 0;
                self.events.push_back(Event::Poisoned(error));
                return;
            }
        }
        // What is written ahead has its sync before it still.
        if self.poisoned || !step.op_done() || is_ahead {
            return;
        }
        if let Some(step) = self.step.take() {
            self.apply(step.into_effect());
        }
        self.step = self.ahead.take().map(|(step, _)| step);
        if planted(Bug::AheadCountsAsSynced)
            && let Some(group) = self.step.take()
        {
            self.apply(group.into_effect());
        }
    }

    /// What happened since the last call, one by one.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Everything up to here may be acknowledged.
    pub fn durable(&self) -> ChainPoint {
        self.durable
    }

    /// The last batch taken.
    pub fn accepted(&self) -> ChainPoint {
        self.accepted
    }

    /// How many bytes wait to be written.
    pub fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// Whether batches go on.
    pub fn state(&self) -> State {
        match (self.poisoned, self.full) {
            (true, _) => State::Poisoned,
            (false, true) => State::Full,
            (false, false) => State::Running,
        }
    }

    /// Whether nothing is under way and nothing waits, but for batches if the journal is full.
    pub fn is_idle(&self) -> bool {
        let waiting =
            !self.changes.is_empty() || !self.riders.is_empty() || (!self.queue.is_empty() && !self.full);
        self.poisoned || (self.step.is_none() && !waiting)
    }

    /// Whether the group after the one that is being synced is being written.
    pub fn is_writing_ahead(&self) -> bool {
        self.ahead.is_some()
    }

    /// How many operations were given out and have not ended.
    pub fn under_way(&self) -> usize {
        self.under_way
    }

    /// The superblock as it is durable now.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The segments that take no more batches, oldest first.
    pub fn closed_segments(&self) -> impl ExactSizeIterator<Item = &ClosedSegment> {
        self.closed.iter()
    }

    /// How many slots are free. One of them is kept for recovery.
    pub fn free_slot_count(&self) -> usize {
        self.free_slots.len()
    }

    /// The datastore may have room again, or the limit was raised: waiting batches try once more.
    pub fn retry(&mut self, limits: Limits) {
        self.limits = limits;
        self.no_space = false;
    }

    fn check_next(&self, view: &BatchView<'_>) -> Result<(), OfferError> {
        if self.poisoned {
            return Err(OfferError::Poisoned);
        }
        let link = view.link();
        if link.journal_id != self.superblock.journal_id {
            return Err(OfferError::OtherJournal(link.journal_id));
        }
        if view.is_local()
            || self.claims_pending > 0
            || link.generation != self.superblock.tail_generation
            || link.open_count != self.superblock.open_count
        {
            return Err(OfferError::NotOwner);
        }
        let after_seq = self.accepted.seq;
        let next_seq = (after_seq + 1).max(self.superblock.generation_first_seq);
        if view.first_seq() != next_seq {
            return Err(OfferError::Order { first_seq: view.first_seq(), after_seq });
        }
        if link.prev_batch_crc != self.accepted.batch_crc {
            return Err(OfferError::Chain { after_seq });
        }
        Ok(())
    }

    /// A write of the next group, while the sync of the one before is all that is under way. Only within the open segment, and not
    /// before a change or growth: these begin with everything durable.
    fn next_op_ahead(&mut self) -> Option<(Purpose, Op)> {
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

    fn begin_step(&mut self) -> Option<Step> {
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
        if self.riders.is_empty() {
            return None;
        }
        Some(Step::new(vec![std::mem::take(&mut self.riders)], Effect::None))
    }

    /// Gathers waiting batches into one write, or nothing if none waits or there is no room.
    fn begin_group(&mut self) -> Option<Step> {
        let front = self.queue.front()?;
        let fits =
            self.open.as_ref().is_some_and(|open| open.fits(&front.batch, self.superblock.slot_len_bytes));
        if !fits && let Some(open) = self.open.take() {
            self.seal(open);
        }
        let mut pieces = Vec::new();
        if self.open.is_none() {
            let Some(slot) = self.take_slot() else {
                if !self.wants_to_grow() {
                    self.report_full();
                }
                return None;
            };
            let header = SegmentHeader {
                journal_id: self.superblock.journal_id,
                number: self.next_number,
                slot,
                open_count: self.superblock.open_count,
                after: self.durable,
                carried_end_bytes: PAGE_BYTES as u64,
                begin_time_us: self.queue.front()?.receive_time_us,
            };
            self.next_number += 1;
            pieces.push(segment::page(&header.encode()));
            self.open = Some(OpenSegment::begin(header));
        }
        if std::mem::take(&mut self.full) {
            self.events.push_back(Event::Room);
        }
        let slot_len_bytes = self.superblock.slot_len_bytes;
        let open = self.open.as_mut()?;
        let begin_bytes =
            open.end_bytes() - pieces.iter().map(|piece: &Bytes| piece.len() as u64).sum::<u64>();
        let (mut group_bytes, mut last) = (0, self.durable);
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
            pieces.push(queued.batch);
        }
        self.queued_bytes -= group_bytes;
        let offset_bytes = slot_offset_bytes(open.header().slot, slot_len_bytes) + begin_bytes;
        if planted(Bug::SealedBeforeSync)
            && let Some(open) = self.open.take()
        {
            self.seal(open);
        }
        let mut writes = std::mem::take(&mut self.riders);
        writes.push((Purpose::Append, Op::Write { offset_bytes, pieces }));
        let mut phases = vec![writes];
        if !planted(Bug::SkippedSyncBeforeAck) {
            phases.push(vec![(Purpose::Append, Op::Sync)]);
        }
        Some(Step::new(phases, Effect::Durable(last)))
    }

    /// Writes footer and trailer with the next step. All batches of the segment are durable: steps end with a sync.
    fn seal(&mut self, open: OpenSegment) {
        let (closed, writes) = open.seal(self.superblock.slot_len_bytes);
        self.riders.extend(writes);
        self.closed.push_back(closed);
    }

    fn take_slot(&mut self) -> Option<u32> {
        if self.free_slots.len() > RESERVED_SLOTS { self.free_slots.pop_first() } else { None }
    }

    /// Growth is wanted when the next segment would find no slot.
    fn wants_to_grow(&self) -> bool {
        let open_fill = self.open.as_ref().map_or(u64::MAX, OpenSegment::end_bytes);
        self.free_slots.len() <= RESERVED_SLOTS
            && !self.superblock.state.is_base_sync()
            && !self.no_space
            && self.superblock.slot_count < self.limits.max_slots
            && (open_fill != u64::MAX || !self.queue.is_empty())
            && open_fill > self.superblock.slot_len_bytes / 2
    }

    fn report_full(&mut self) {
        let blocked = !self.queue.is_empty() && self.open.is_none();
        if blocked && !self.full {
            self.full = true;
            self.events.push_back(Event::Full { no_space: self.no_space });
        }
    }

    fn apply(&mut self, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Durable(point) => {
                self.durable = point;
                self.events.push_back(Event::Durable(point));
            }
            Effect::Superblock { superblock, mirror, then } => {
                self.riders.extend(mirror);
                let grown = self.superblock.slot_count..superblock.slot_count;
                self.free_slots.extend(grown);
                self.superblock = *superblock;
                self.after_change(then);
            }
        }
    }
}

/// How many free slots are never filled: an opening copies the last segment into one (C1).
pub const RESERVED_SLOTS: usize = 1;
