//! The numbering core of one VM: numbers, overlap detection, publication, mode, hold and the syncs' place in the order.
//!
//! A plain state machine without I/O, threads or clock. [`VmCore`](super::VmCore) puts it under the VM's one
//! lock; every method here is one critical section. What others must learn of it is collected as wake-ups, which are
//! given after the lock is gone.

use std::sync::Arc;

use journal::batch::RecordKind;
use ublk::serve::Waker;

use crate::capture::entry::{Entry, Payload};
use crate::capture::modes::{Mode, OverflowReason, PublishRefusal};
use crate::planted::{Planted, Step, is_planted, pass};

use super::hold_order::Hold;
use super::in_flight::{ByteRange, InFlight, InFlightWrite, Ticket};
use super::primitives::Ordering;
use super::ring::{Producer, void_entry};
use super::terms::{CoreLimits, Drained, Flags, Landed, NewWrite, Offer, Received, Wakeups};

/// Longest payload of one entry in bytes; a longer write takes several numbers in a row.
pub const MAX_PAYLOAD_BYTES: u64 = journal::batch::MAX_RECORD_PAYLOAD as u64;

/// Longest range of one zeroes entry in bytes.
pub const MAX_ZEROES_BYTES: u64 = 1 << 30;

/// Cells that data leaves free for checkpoints and the ends of syncs, or a quarter of a smaller ring.
pub const CONTROL_ENTRIES: u64 = 256;

/// Watches that a core keeps at once: reads that syncs have under way.
pub const MAX_WATCHES: usize = 32;

/// The core.
pub struct Core {
    producer: Producer,
    pub(super) flags: Arc<Flags>,
    limits: CoreLimits,
    next_seq: u64,
    /// The first number that isn't reserved durably.
    ceiling_seq: u64,
    last_time_us: u64,
    mode: Mode,
    /// When the last number was given before capture stopped, in µs since the Unix epoch.
    uncaptured_since_us: Option<u64>,
    /// The sync whose begin is published and whose end isn't.
    pub(super) sync_id: Option<u64>,
    pub(super) hold: Option<Hold>,
    pub(super) in_flight: InFlight,
    pub(super) volumes: Vec<Volume>,
    pub(super) lanes: Vec<Option<Lane>>,
    /// A lane was deferred because the in-flight set was full.
    room_wanted: bool,
    local_errors: u64,
    pub(super) watches: Vec<Option<Watch>>,
    pub(super) next_watch_serial: u64,
    pub(super) syncer: Sleeper,
}

impl Core {
    /// A core that captures nothing yet. Its first number will be `first_seq`; numbers from `ceiling_seq` on aren't
    /// reserved.
    pub fn new(
        producer: Producer,
        flags: Arc<Flags>,
        limits: CoreLimits,
        first_seq: u64,
        ceiling_seq: u64,
    ) -> Self {
        Self {
            producer,
            flags,
            limits,
            next_seq: first_seq,
            ceiling_seq,
            last_time_us: 0,
            mode: Mode::Stopped,
            uncaptured_since_us: None,
            sync_id: None,
            hold: None,
            in_flight: InFlight::new(limits.writes_in_flight),
            volumes: Vec::new(),
            lanes: Vec::new(),
            room_wanted: false,
            local_errors: 0,
            watches: Vec::with_capacity(MAX_WATCHES),
            next_watch_serial: 0,
            syncer: Sleeper::default(),
        }
    }

    /// Adds a volume and gives its number.
    pub fn add_volume(&mut self) -> u16 {
        self.in_flight.add_volume();
        self.volumes.push(Volume { open: true, held_range: None });
        (self.volumes.len() - 1) as u16
    }

    /// The volume takes no more writes here.
    pub fn close_volume(&mut self, volume: u16, wakeups: &mut Wakeups) {
        self.volumes[usize::from(volume)].open = false;
        self.release_range(volume, wakeups);
        self.wake_deferred(wakeups);
    }

    /// Whether no write of the volume is in flight or held.
    pub fn is_idle(&self, volume: u16) -> bool {
        self.in_flight.count_of(volume) == 0
    }

    /// Registers a lane.
    pub fn add_lane(&mut self, waker: Waker) -> u32 {
        let lane = Lane {
            waker,
            ready: Vec::with_capacity(64),
            deferred: false,
            retry: false,
            holds: false,
            recheck_held: false,
        };
        if let Some(at) = self.lanes.iter().position(Option::is_none) {
            self.lanes[at] = Some(lane);
            return at as u32;
        }
        self.lanes.push(Some(lane));
        (self.lanes.len() - 1) as u32
    }

    /// Forgets a lane that has nothing in flight.
    pub fn remove_lane(&mut self, lane: u32) {
        self.lanes[lane as usize] = None;
    }

    /// Takes a write of the guest (A1): number, in-flight insertion and publication are this one step. On
    /// [`Received::Deferred`] and [`Received::Moved`] the offer is left as it was.
    pub fn receive(
        &mut self,
        new: &NewWrite,
        offer: &mut Offer,
        now_us: u64,
        wakeups: &mut Wakeups,
    ) -> Received {
        if let Some(refused) = self.admit(new, offer, wakeups) {
            return refused;
        }
        let first_seq = self.take_number(new, offer);
        self.enter(new, first_seq, offer, now_us, wakeups)
    }

    /// First part of [`receive`](Self::receive): may the write take a number, and is it captured?
    pub(super) fn admit(&mut self, new: &NewWrite, offer: &Offer, wakeups: &mut Wakeups) -> Option<Received> {
        let volume = &self.volumes[usize::from(new.volume)];
        if !volume.open {
            return Some(Received::Moved);
        }
        let range_held = volume.held_range.is_some_and(|held| held.overlaps(&new.range));
        if range_held || self.in_flight.is_full() {
            self.room_wanted |= !range_held;
            if let Some(lane) = self.lanes[new.lane as usize].as_mut() {
                lane.retry = false;
                lane.deferred = true;
            }
            return Some(Received::Deferred);
        }
        if self.is_streaming() {
            if matches!(offer, Offer::Nothing) {
                return Some(Received::PrepareFirst);
            }
            if let Some(reason) = self.lacks(new, offer) {
                self.overflow(reason, wakeups);
            }
        }
        None
    }

    /// Second part: the number, or zero for a write that isn't captured.
    pub(super) fn take_number(&mut self, new: &NewWrite, offer: &Offer) -> u64 {
        if !self.is_streaming() {
            return 0;
        }
        let first_seq = self.next_seq;
        self.next_seq += entries_of(new.range, offer);
        pass(Step::NumberTaken);
        first_seq
    }

    /// Third part: insertion and publication.
    pub(super) fn enter(
        &mut self,
        new: &NewWrite,
        first_seq: u64,
        offer: &mut Offer,
        now_us: u64,
        wakeups: &mut Wakeups,
    ) -> Received {
        for watch in self.watches.iter_mut().flatten() {
            watch.dirty |= watch.volume == new.volume && watch.range.overlaps(&new.range);
        }
        let count = if first_seq == 0 { 0 } else { entries_of(new.range, offer) };
        let write = InFlightWrite {
            volume: new.volume,
            lane: new.lane,
            token: new.token,
            last_seq: if first_seq == 0 { 0 } else { first_seq + count - 1 },
            range: new.range,
        };
        let (ticket, waits) = self.in_flight.insert(write, is_planted(Planted::OverlapIgnored));
        pass(Step::RangeInserted);
        if first_seq > 0 {
            self.publish_write(new, first_seq, count, std::mem::replace(offer, Offer::Nothing), now_us);
            wakeups.published = true;
        }
        if waits { Received::Wait(ticket) } else { Received::Issue(ticket) }
    }

    /// The local disk is done with a write; `ok` says whether it succeeded.
    pub fn landed(&mut self, ticket: Ticket, ok: bool, wakeups: &mut Wakeups) -> Landed {
        let write = self.in_flight.get(ticket);
        self.local_errors += u64::from(!ok);
        if !ok && write.last_seq > 0 && self.is_streaming() {
            // A6: what lies on the local disk now may be neither the old nor the new data.
            self.overflow(OverflowReason::LocalWriteError, wakeups);
        }
        let mut own_ready = false;
        let lanes = &mut self.lanes;
        self.in_flight.land(ticket, |_, waiter| {
            let Some(lane) = lanes[waiter.lane as usize].as_mut() else { return };
            lane.ready.push(waiter.token);
            if waiter.lane == write.lane {
                own_ready = true;
            } else {
                wakeups.add(&lane.waker);
            }
        });
        if self.volumes[usize::from(write.volume)].held_range.is_some_and(|held| held.overlaps(&write.range))
        {
            self.syncer.rouse(wakeups);
        }
        let held = self.hold.as_ref().is_some_and(|hold| write.last_seq > hold.cut);
        if held {
            self.remember_held(write.lane);
        } else {
            self.leave(ticket, wakeups);
        }
        Landed { held, own_ready }
    }

    /// Hands a lane what it has to do.
    pub fn drain(&mut self, lane: u32, drained: &mut Drained) {
        if let Some(lane) = self.lanes[lane as usize].as_mut() {
            drained.ready.append(&mut lane.ready);
            drained.retry |= std::mem::take(&mut lane.retry);
            drained.recheck_held |= std::mem::take(&mut lane.recheck_held);
        }
    }

    /// Captures from the next number on, in a ring that the target holds whole (B4: mode is a function of the number).
    pub fn start_streaming(&mut self) -> Result<u64, PublishRefusal> {
        if self.mode == Mode::Lost {
            return Err(PublishRefusal::NotStreaming);
        }
        if self.producer.freed_through() + 1 != self.next_seq {
            return Err(PublishRefusal::NotDrained);
        }
        self.mode = Mode::Streaming { from_seq: self.next_seq };
        self.uncaptured_since_us = None;
        self.flags.capturing.store(true, Ordering::SeqCst);
        Ok(self.next_seq)
    }

    /// Captures nothing from the next number on.
    pub fn overflow(&mut self, reason: OverflowReason, wakeups: &mut Wakeups) {
        if self.is_streaming() {
            self.stop(Mode::Overflow { from_seq: self.next_seq, reason }, wakeups);
        }
    }

    /// The overflow is over: everything before it is durable at the target. Nothing is captured until a grant.
    pub fn rest(&mut self) -> Result<(), PublishRefusal> {
        match self.mode {
            Mode::Overflow { .. } if self.producer.freed_through() + 1 == self.next_seq => {
                self.mode = Mode::Stopped;
                Ok(())
            }
            Mode::Stopped => Ok(()),
            _ => Err(PublishRefusal::NotDrained),
        }
    }

    /// After a thread died inside the lock: numbers that it took and didn't publish become `void` (A2), and capture
    /// stops until the process restarts, as what that thread left on its ring is unknown.
    pub fn repair(&mut self, wakeups: &mut Wakeups) {
        if self.mode == Mode::Lost {
            return;
        }
        self.stop(Mode::Lost, wakeups);
        for seq in self.producer.freed_through() + 1..self.next_seq {
            if !self.producer.is_published(seq) {
                self.producer.publish(void_entry(seq, self.last_time_us), || {});
            }
        }
        wakeups.published = true;
    }

    /// Numbers below `ceiling_seq` are reserved durably now.
    pub fn raise_ceiling(&mut self, ceiling_seq: u64) {
        self.ceiling_seq = self.ceiling_seq.max(ceiling_seq);
    }

    /// The next number, the first unreserved one.
    pub fn numbers(&self) -> (u64, u64) {
        (self.next_seq, self.ceiling_seq)
    }

    /// The mode.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Since when nothing is captured, in µs since the Unix epoch: when the last number was given before. None while writes are captured,
    /// and before any was.
    pub fn uncaptured_since_us(&self) -> Option<u64> {
        self.uncaptured_since_us
    }

    /// The sync that is under way.
    pub fn sync_id(&self) -> Option<u64> {
        self.sync_id
    }

    /// Writes that the local disks failed.
    pub fn local_errors(&self) -> u64 {
        self.local_errors
    }

    /// Entries and bytes that are retained.
    pub fn retained(&self) -> (u64, u64) {
        (self.next_seq - 1 - self.producer.freed_through(), self.producer.retained_bytes())
    }

    /// Share of the retained memory in use, in percent: the larger of entries and bytes.
    pub fn fill_percent(&self) -> u64 {
        let (entries, bytes) = self.retained();
        let by_bytes = bytes.saturating_mul(100).checked_div(self.limits.retained_bytes).unwrap_or(100);
        (entries * 100 / self.producer.capacity() as u64).max(by_bytes)
    }

    pub(super) fn is_streaming(&self) -> bool {
        matches!(self.mode, Mode::Streaming { .. })
    }

    fn lacks(&self, new: &NewWrite, offer: &Offer) -> Option<OverflowReason> {
        let last_seq = self.next_seq + entries_of(new.range, offer) - 1;
        let kept_bytes = match offer {
            Offer::Data(piece) => u64::from(piece.kept_bytes()),
            Offer::NoMemory => return Some(OverflowReason::MemoryFull),
            Offer::Zeroes | Offer::Nothing => 0,
        };
        if last_seq >= self.ceiling_seq {
            return Some(OverflowReason::NumbersExhausted);
        }
        if !self.producer.has_room_for(last_seq + self.data_reserve()) {
            return Some(OverflowReason::RingFull);
        }
        let over = self.producer.retained_bytes() + kept_bytes > self.limits.retained_bytes;
        over.then_some(OverflowReason::MemoryFull)
    }

    fn publish_write(&mut self, new: &NewWrite, first_seq: u64, count: u64, offer: Offer, now_us: u64) {
        let step_bytes = if matches!(offer, Offer::Zeroes) { MAX_ZEROES_BYTES } else { MAX_PAYLOAD_BYTES };
        let time_us = self.stamp(now_us);
        for part in 0..count {
            let start = part * step_bytes;
            let len_bytes = step_bytes.min(new.range.len_bytes() - start);
            let (kind, payload) = match &offer {
                Offer::Data(piece) if count == 1 => (RecordKind::Write, Payload::Piece(piece.clone())),
                Offer::Data(piece) => {
                    (RecordKind::Write, Payload::Piece(piece.part(start as usize, len_bytes as usize)))
                }
                _ => (RecordKind::Zeroes, Payload::None),
            };
            let entry = Entry {
                seq: first_seq + part,
                time_us,
                volume: new.volume,
                kind,
                offset_bytes: new.range.start + start,
                len_bytes,
                sync_id: 0,
                payload,
            };
            self.producer.publish(entry, || pass(Step::EntryStored));
            pass(Step::WordStored);
        }
    }

    /// Publishes what isn't a guest's write: `entries` all together or none, leaving `reserve` cells free. The numbers and
    /// the time are filled in here. Returns the first number.
    pub(super) fn publish_own(
        &mut self,
        entries: impl ExactSizeIterator<Item = Entry>,
        reserve: u64,
        now_us: u64,
        wakeups: &mut Wakeups,
    ) -> Result<u64, PublishRefusal> {
        if !self.is_streaming() {
            return Err(PublishRefusal::NotStreaming);
        }
        let first_seq = self.next_seq;
        let last_seq = first_seq + entries.len() as u64 - 1;
        if last_seq >= self.ceiling_seq || !self.producer.has_room_for(last_seq + reserve) {
            return Err(PublishRefusal::NoRoom);
        }
        let time_us = self.stamp(now_us);
        for entry in entries {
            let seq = self.next_seq;
            self.next_seq += 1;
            self.producer.publish(Entry { seq, time_us, ..entry }, || {});
        }
        wakeups.published = true;
        Ok(first_seq)
    }

    /// Cells that data leaves free.
    pub(super) fn data_reserve(&self) -> u64 {
        CONTROL_ENTRIES.min(self.producer.capacity() as u64 / 4)
    }

    fn stamp(&mut self, now_us: u64) -> u64 {
        self.last_time_us = self.last_time_us.max(now_us);
        self.last_time_us
    }

    pub(super) fn leave(&mut self, ticket: Ticket, wakeups: &mut Wakeups) {
        self.in_flight.remove(ticket);
        if self.room_wanted {
            self.wake_deferred(wakeups);
        }
    }

    pub(super) fn remember_held(&mut self, lane: u32) {
        if let Some(lane) = self.lanes[lane as usize].as_mut() {
            lane.holds = true;
        }
    }

    pub(super) fn wake_deferred(&mut self, wakeups: &mut Wakeups) {
        self.room_wanted = false;
        for lane in self.lanes.iter_mut().flatten().filter(|lane| lane.deferred) {
            lane.deferred = false;
            lane.retry = true;
            wakeups.add(&lane.waker);
        }
    }

    fn stop(&mut self, mode: Mode, wakeups: &mut Wakeups) {
        self.mode = mode;
        self.uncaptured_since_us = self.uncaptured_since_us.or(Some(self.last_time_us).filter(|us| *us > 0));
        self.flags.capturing.store(false, Ordering::SeqCst);
        self.sync_id = None;
        self.watches.clear();
        for volume in &mut self.volumes {
            volume.held_range = None;
        }
        if self.hold.is_some() {
            self.end_hold(wakeups);
        }
        self.wake_deferred(wakeups);
        wakeups.published = true;
        self.syncer.rouse(wakeups);
    }
}

pub(super) struct Volume {
    /// Takes writes here.
    open: bool,
    /// Writes to it are deferred.
    pub(super) held_range: Option<ByteRange>,
}

pub(super) struct Lane {
    pub(super) waker: Waker,
    /// Tokens of its writes that may be issued now.
    ready: Vec<u64>,
    /// It keeps deferred writes.
    deferred: bool,
    /// Deferred writes may be offered again.
    retry: bool,
    /// It keeps held completions.
    pub(super) holds: bool,
    /// Held completions may go.
    pub(super) recheck_held: bool,
}

/// A range that a sync is reading.
pub struct Watch {
    pub(super) serial: u64,
    pub(super) volume: u16,
    pub(super) range: ByteRange,
    /// A write overlapped the range since the read began, or was in flight then.
    pub(super) dirty: bool,
}

/// Someone who sleeps until the core has something.
#[derive(Default)]
pub(super) struct Sleeper {
    pub(super) waker: Option<Waker>,
    pub(super) asleep: bool,
}

impl Sleeper {
    fn rouse(&mut self, wakeups: &mut Wakeups) {
        if std::mem::take(&mut self.asleep)
            && let Some(waker) = &self.waker
        {
            wakeups.add(waker);
        }
    }
}

/// How many numbers a write takes.
fn entries_of(range: ByteRange, offer: &Offer) -> u64 {
    let step_bytes = if matches!(offer, Offer::Zeroes) { MAX_ZEROES_BYTES } else { MAX_PAYLOAD_BYTES };
    range.len_bytes().div_ceil(step_bytes).max(1)
}
