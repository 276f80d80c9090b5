//! The appender: batches in, operations out, completions in, "durable through" out. Sans-I/O: whoever drives it owns
//! the storage and hands over no clock but the batches' receive times.
//!
//! One step runs at a time: a group of batches (gathered, one write, one fdatasync), a superblock change, or growth. The
//! next group gathers what was offered meanwhile. While nothing is left of a group but its sync, the next group of the same
//! segment is written already: its own sync begins when the other one has ended, so groups become durable in order.

mod change;
mod closed;
mod drive;
mod group;
mod promotion;
mod segment;
mod slots;
mod step;

use std::collections::{BTreeSet, VecDeque};

use bytes::Bytes;
use uuid::Uuid;

use crate::bad_ranges::BadRanges;
use crate::batch::BatchView;
use crate::crypt::{Encryption, Keyring, SiteKeyId};
use crate::format::{ChainPoint, Superblock};
use crate::planted::{Bug, planted};
use crate::recovery::{Content, Opened, Segment};
use crate::storage::{Op, Purpose, StorageError};

pub use change::{Change, ChangeError, ClaimError, Grant};
pub use closed::ClosedSegment;
use closed::seal_unsealed;
pub use drive::drive;
use segment::OpenSegment;
use slots::FreeSlots;
use step::{Effect, Step};

/// How far a journal may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most slots that the file may have.
    pub max_slots: u32,
    /// So many slots keep their space, free or not.
    pub min_slots: u32,
    /// How many slots it grows by.
    pub grow_slots: u32,
    /// Most bytes of batches in one write.
    pub group_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_slots: 1024, min_slots: 0, grow_slots: 4, group_bytes: 8 << 20 }
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
    keyring: Keyring,
    /// What the salts of this opening's segments begin with.
    salt: u64,
    bad_ranges: BadRanges,
    limits: Limits,
    free_slots: FreeSlots,
    closed: VecDeque<ClosedSegment>,
    open: Option<OpenSegment>,
    next_number: u64,
    accepted: ChainPoint,
    durable: ChainPoint,
    queue: VecDeque<Queued>,
    queued_bytes: usize,
    changes: VecDeque<(u64, Change)>,
    claims_pending: usize,
    /// The newest intent that this opening has put into the stream.
    told_intent_seq: u64,
    next_ticket: u64,
    /// Writes that need no sync of their own and go with the next step: footer and trailer.
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

#[derive(Debug)]
struct Queued {
    batch: Bytes,
    last: ChainPoint,
    receive_time_us: u64,
}

impl Writer {
    /// Goes on where recovery ended.
    pub fn new(opened: Opened, limits: Limits) -> Self {
        let Opened { superblock, segments, tail, free_slots, bad_ranges, keyring, salt, .. } = opened;
        let next_number = segments.last().map_or(superblock.low_water_segment, |last| last.header.number + 1);
        let mut closed: VecDeque<ClosedSegment> = segments.iter().map(ClosedSegment::of).collect();
        let newest_us = closed.iter().map(ClosedSegment::end_time_us).max().unwrap_or_default();
        let riders = seal_unsealed(&segments, &mut closed, superblock.slot_len_bytes);
        // The last segment is this opening's own copy if it isn't sealed: it takes more.
        let open = match segments.into_iter().next_back() {
            Some(Segment { header, content: Content::Scanned(scan), cipher }) => {
                closed.pop_back();
                Some(OpenSegment::resume(header, cipher, *scan, None))
            }
            _ => None,
        };
        let receive_time_us = superblock.receive_time_us.max(newest_us);
        let mut writer = Self {
            superblock,
            keyring,
            salt,
            bad_ranges,
            limits,
            free_slots: FreeSlots::unknown(free_slots),
            closed,
            open,
            next_number,
            accepted: tail,
            durable: tail,
            queue: VecDeque::new(),
            queued_bytes: 0,
            changes: VecDeque::new(),
            claims_pending: 0,
            told_intent_seq: 0,
            next_ticket: 1,
            riders,
            step: None,
            ahead: None,
            next_token: 1,
            under_way: 0,
            events: VecDeque::new(),
            receive_time_us,
            no_space: false,
            full: false,
            poisoned: false,
        };
        // The seal of one that was begun with another key was lost: nothing more is written to it.
        if let Some(open) = writer.open.take_if(|open| !open.is_encrypted_by(&writer.superblock.encryption)) {
            writer.seal(open);
        }
        writer
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
                if let Some(Effect::Reserved(slot)) = self.step.take().map(Step::into_effect)
                    && self.free_slots.found_without_space(slot)
                {
                    return;
                }
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

    /// The newest receive time that the journal knows, µs since the Unix epoch (C6): never decreases.
    pub fn receive_time_us(&self) -> u64 {
        self.receive_time_us
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

    /// What of the recovery disks can't be trusted (C5).
    pub fn bad_ranges(&self) -> &BadRanges {
        &self.bad_ranges
    }

    /// The journal's keys.
    pub fn keyring(&self) -> &Keyring {
        &self.keyring
    }

    /// Names of the site keys without which the journal can't be read, or not be opened again for writing.
    pub fn site_key_ids(&self) -> BTreeSet<SiteKeyId> {
        let open = self.open.as_ref().map(OpenSegment::header);
        let headers = self.closed.iter().map(|segment| &segment.header).chain(open);
        let of_segments = headers.filter_map(|header| Some(header.encryption.as_ref()?.key.site_key_id()));
        let next = match &self.superblock.encryption {
            Encryption::On(key) => Some(key.site_key_id()),
            Encryption::Never | Encryption::Off => None,
        };
        of_segments.chain(next).collect()
    }

    /// The segments that take no more batches, oldest first.
    pub fn closed_segments(&self) -> impl ExactSizeIterator<Item = &ClosedSegment> {
        self.closed.iter()
    }

    /// The oldest segment that takes no more batches and has a number above this one.
    pub fn closed_segment_after(&self, number: u64) -> Option<&ClosedSegment> {
        let first = self.closed.front()?.header.number;
        let index = (number + 1).saturating_sub(first);
        // Their numbers have no gap.
        self.closed.get(usize::try_from(index).ok()?)
    }

    /// How far the open segment is filled, in bytes; 0 without one.
    pub fn open_fill_bytes(&self) -> u64 {
        self.open.as_ref().map_or(0, OpenSegment::end_bytes)
    }

    /// How many free slots [`Change::Shrink`] with so many spare ones would give back, or nearly so.
    pub fn surplus_slot_count(&self, spare_slots: u32) -> usize {
        self.free_slots.surplus_len(RESERVED_SLOTS + spare_slots as usize)
    }

    /// Whether the datastore had no room when the file last wanted to grow.
    pub fn lacks_space(&self) -> bool {
        self.no_space
    }

    /// How many slots are free, with or without their space; [`RESERVED_SLOTS`] of them are never filled.
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

    fn apply(&mut self, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Reserved(slot) => self.free_slots.add_reserved([slot]),
            Effect::Durable(point) => {
                self.durable = point;
                self.events.push_back(Event::Durable(point));
            }
            Effect::Superblock { superblock, then } => {
                let grown = self.superblock.slot_count..superblock.slot_count;
                self.free_slots.add_reserved(grown);
                self.superblock = *superblock;
                self.after_change(then);
            }
        }
    }
}

/// How many free slots are never filled with batches: an opening copies the last segment into one (C1), and the other takes the record
/// that announces a promotion (C2) when the journal is full and its last segment is sealed.
pub const RESERVED_SLOTS: usize = 2;
