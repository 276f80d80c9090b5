//! The target's machine for one VM: who may write, what comes, what is durable. No I/O, no clock.
//!
//! During a base sync a stream's batches go to the recovery disks ([`BaseApply`]), otherwise to the journal's writer. Both are sans-I/O too;
//! the receiver hands out their operations and takes their ends.

mod base_sync;
mod claim;
mod encrypting;
mod promoting;

use std::collections::VecDeque;

use bytes::Bytes;
use journal::batch::BatchView;
use journal::crypt::Encryption;
use journal::format::{ChainPoint, FooterEvent, JournalState};
use journal::storage::{AlignedBuf, Op, Purpose, StorageError};
use journal::writer::{Action, Change, ChangeError, Event, OfferError, RESERVED_SLOTS, Writer};

use super::base_apply::BaseApply;
use super::checkpoint_list::CheckpointList;
use super::forecast::{Forecast, WriteRate};
use super::history::History;
use super::intake::Intake;
use super::receiver_types::{
    Failure, Observed, Pins, ReceiverEvent, ReceiverOutput, ReceiverPolicy, ReceiverStatus, StreamId,
    VmIdentity,
};
use super::scrub::Sealed;
use crate::clock::Now;
use base_sync::BaseSync;
use promoting::Promoting;

use crate::planted::{Planted, is_planted};
use crate::wire::{Ack, Frame, Open, Refuse, RefuseCode, VolumeShape};

/// One VM's receiver.
#[derive(Debug)]
pub struct Receiver {
    identity: VmIdentity,
    policy: ReceiverPolicy,
    writer: Writer,
    base: BaseApply,
    history: History,
    stream: Option<Stream>,
    /// A stream that asked and waits until all that was taken before is durable.
    candidate: Option<Candidate>,
    base_sync: BaseSync,
    promoting: Promoting,
    pins: Pins,
    /// A promotion may begin: others share the worker and its memory.
    may_promote: bool,
    /// As last asked for: the journal's changes are made in their order.
    encryption: Encryption,
    /// Manifests that are not durable yet.
    manifest_tickets: VecDeque<u64>,
    /// A receive time and the monotonic time that it belongs to, both in microseconds (C6).
    stamp_base: Option<(u64, u64)>,
    /// When the journal last took a batch, by the monotonic clock.
    last_append_us: u64,
    /// The same of journals beside this one.
    neighbours_append_us: u64,
    rate: WriteRate,
    arrivals: VecDeque<Arrival>,
    /// When the group under way left memory, by the monotonic clock.
    group_began_us: u64,
    /// The same of groups of batches that are being written or synced, oldest first.
    groups_began_us: VecDeque<u64>,
    outputs: VecDeque<ReceiverOutput>,
    full: bool,
    /// The journal is full, and whether for lack of space on the datastore: to be told unless promotion makes room.
    full_told: Option<bool>,
    failed: bool,
    received_bytes: u64,
    last_receive_wall_us: Option<u64>,
}

#[derive(Debug)]
struct Stream {
    id: StreamId,
    intake: Intake,
    open_count: u64,
}

#[derive(Debug)]
struct Candidate {
    id: StreamId,
    open: Open,
    /// The claim for it, once the journal was asked.
    claim: Option<u64>,
}

#[derive(Debug)]
struct Arrival {
    last_seq: u64,
    mono_us: u64,
}

impl Receiver {
    /// Goes on where opening the journal ended. `events` are those of the journal, in the order of the stream; `reserved` says of each recovery
    /// disk whether its space is reserved.
    pub fn new(
        identity: VmIdentity,
        policy: ReceiverPolicy,
        writer: Writer,
        events: Vec<FooterEvent>,
        reserved: &[bool],
    ) -> Self {
        let sync_id = match writer.superblock().state {
            JournalState::FirstSync { sync_id } | JournalState::HistoryGivenUp { sync_id } => sync_id,
            JournalState::Consistent => 0,
        };
        Self {
            identity,
            policy,
            base: BaseApply::new(reserved),
            encryption: writer.superblock().encryption,
            history: History::new(&events, writer.superblock().oldest_seq()),
            writer,
            stream: None,
            candidate: None,
            promoting: Promoting::new(reserved),
            pins: Pins::default(),
            may_promote: true,
            manifest_tickets: VecDeque::new(),
            stamp_base: None,
            last_append_us: 0,
            neighbours_append_us: 0,
            rate: WriteRate::default(),
            base_sync: BaseSync { sync_id, ..BaseSync::default() },
            arrivals: VecDeque::new(),
            group_began_us: 0,
            groups_began_us: VecDeque::new(),
            outputs: VecDeque::new(),
            full: false,
            full_told: None,
            failed: false,
            received_bytes: 0,
            last_receive_wall_us: None,
        }
    }

    /// A stream asks for the VM. The caller has checked who the peer is.
    pub fn open(&mut self, id: StreamId, open: Open, now: Now) {
        if let Err(refuse) = self.check_open(&open) {
            return self.refuse(id, refuse);
        }
        let fenced =
            || Refuse { code: RefuseCode::Fenced, detail: 0, text: "a newer stream took over".into() };
        if let Some(candidate) = self.candidate.take() {
            self.refuse(candidate.id, fenced());
        }
        if let Some(stream) = &self.stream
            && !is_planted(Planted::OldStreamNotFenced)
        {
            let old = stream.id;
            self.stream = None;
            self.refuse(old, fenced());
        }
        self.candidate = Some(Candidate { id, open, claim: None });
        self.advance(now);
    }

    /// A batch came whole on a stream, in aligned memory.
    pub fn batch(&mut self, id: StreamId, bytes: Bytes, now: Now) {
        let Some(stream) = &mut self.stream else { return };
        // What still comes on a stream that was fenced is nobody's.
        if stream.id != id && !is_planted(Planted::OldStreamNotFenced) || self.failed {
            return;
        }
        let view = match stream.intake.check(&bytes) {
            Ok(view) => view,
            Err(error) => {
                let text = super::error_chain(&error);
                return self.end_stream(RefuseCode::BadBatch, text);
            }
        };
        self.received_bytes += bytes.len() as u64;
        self.last_receive_wall_us = Some(now.wall_us);
        self.arrivals.push_back(Arrival { last_seq: view.last_seq(), mono_us: now.mono_us });
        if is_planted(Planted::AckBeforeDurable) {
            let (received_through, open_count) = (view.last_seq(), stream.open_count);
            let ack = Ack {
                open_count,
                received_through,
                durable_through: received_through,
                memory_us: 0,
                disk_us: 0,
            };
            self.outputs.push_back(ReceiverOutput::Send { stream: id, frame: Frame::Ack(ack) });
        }
        let taken = if self.base_sync.ends || !self.base_sync.after_end.is_empty() {
            let stamp_us = self.stamp_us(now);
            self.base_sync.after_end.push_back((bytes, stamp_us));
            Ok(())
        } else if self.writer.superblock().state.is_base_sync() {
            self.take_for_base(&bytes, &view, now)
        } else {
            let stamp_us = self.stamp_us(now);
            self.last_append_us = now.mono_us;
            self.rate.taken(bytes.len() as u64);
            self.take_for_journal(&bytes, &view, stamp_us)
        };
        if let Err(error) = taken {
            return self.end_stream(RefuseCode::BadBatch, super::error_chain(&error));
        }
        self.advance(now);
    }

    /// A stream has ended by itself. What came whole on it stays.
    pub fn closed(&mut self, id: StreamId) {
        if self.stream.as_ref().is_some_and(|stream| stream.id == id) {
            self.stream = None;
        }
        if self.candidate.as_ref().is_some_and(|candidate| candidate.id == id) {
            self.candidate = None;
        }
    }

    /// The next thing to do.
    pub fn poll(&mut self, now: Now) -> Option<ReceiverOutput> {
        if let Some(output) = self.outputs.pop_front() {
            return Some(output);
        }
        if self.failed {
            return None;
        }
        if let Some(action) = self.base.poll_action() {
            return Some(ReceiverOutput::Disk(action));
        }
        self.rate.step(now.mono_us);
        self.promote(now);
        let action = loop {
            let action = self.writer.next_action();
            if let Some(Action { purpose: Purpose::Append, op: Op::Write { .. }, .. }) = &action {
                self.groups_began_us.push_back(now.mono_us);
            }
            // An idle writer may still have found that it is full, or refused a claim.
            self.take_events(now);
            if action.is_some() || !self.claims_again(now) {
                break action;
            }
        };
        // What guests' writes wait for goes before what promotion reads and writes.
        action
            .map(ReceiverOutput::Journal)
            .or_else(|| self.outputs.pop_front())
            .or_else(|| self.promotion_action(now).map(ReceiverOutput::Promotion))
            .or_else(|| self.outputs.pop_front())
    }

    /// An operation on the journal has ended.
    pub fn journal_done(&mut self, token: u64, result: Result<(), StorageError>, now: Now) {
        self.writer.done(token, result);
        self.take_events(now);
        self.advance(now);
    }

    /// An operation on a recovery disk has ended.
    pub fn disk_done(&mut self, token: u64, result: Result<Option<AlignedBuf>, StorageError>, now: Now) {
        match self.base.done(token, result) {
            Ok(true) => self.group_applied(),
            Ok(false) => {}
            Err(error) => self.fail(Failure::Disk(error)),
        }
        self.take_events(now);
        self.advance(now);
    }

    /// Writes another manifest; gives the ticket for [`ReceiverOutput::ManifestWritten`].
    ///
    /// # Errors
    /// It doesn't fit, or the journal has failed.
    pub fn set_manifest(&mut self, text: String) -> Result<u64, ChangeError> {
        let ticket = self.writer.change(Change::SetManifest(text))?;
        self.manifest_tickets.push_back(ticket);
        Ok(ticket)
    }

    /// Other limits, from a changed definition. Batches that found no room may find some.
    pub fn set_policy(&mut self, policy: ReceiverPolicy) {
        self.writer.retry(policy.limits);
        self.policy = policy;
        // It may be to be given up now.
        self.tell_lock(None);
    }

    /// Some of the volumes have left or grown, as a changed definition says. A stream of a source that doesn't know yet that one has left ends.
    /// Recovery disks have grown already.
    pub fn set_volumes(&mut self, volumes: Vec<VolumeShape>) {
        if self.identity.volumes == volumes || !self.identity.may_become(&volumes) {
            return;
        }
        // Their space is given back as their history goes.
        for volume in volumes.iter().filter(|volume| volume.left) {
            self.base.keep_no_space(volume.volume);
            self.promoting.keep_no_space(volume.volume);
        }
        let has_left = self.identity.volumes.iter().zip(&volumes).any(|(known, now)| known.left != now.left);
        self.identity.volumes = volumes;
        if !has_left {
            return;
        }
        let text = "disks have left the VM's protection";
        if let Some(candidate) = self.candidate.take() {
            self.refuse(
                candidate.id,
                Refuse { code: RefuseCode::VolumesDiffer, detail: 0, text: text.into() },
            );
        }
        self.end_stream(RefuseCode::VolumesDiffer, text.into());
    }

    /// What is still needed. A number that is below [`Self::oldest_seq`] comes too late.
    pub fn set_pins(&mut self, pins: Pins) {
        self.pins = pins;
    }

    /// Checkpoints were locked or unlocked, whether or not that changes what is needed: one that is still in the way is told again.
    pub fn locks_changed(&mut self) {
        self.tell_lock(None);
    }

    /// Whether a promotion may begin now. One that the journal needs for room begins in any case.
    pub fn set_may_promote(&mut self, may_promote: bool) {
        self.may_promote = may_promote;
    }

    /// When the journal last took a batch, by the monotonic clock, in microseconds.
    pub fn last_append_us(&self) -> u64 {
        self.last_append_us
    }

    /// When a journal beside this one last took a batch: what promotion has under way gets in its way, too.
    pub fn note_neighbours_append(&mut self, mono_us: u64) {
        self.neighbours_append_us = self.neighbours_append_us.max(mono_us);
    }

    /// Whether a promotion is under way, with its memory.
    pub fn is_promoting(&self) -> bool {
        self.promoting.is_carrying() || self.promoting.is_looking()
    }

    /// Prepares a planned end: no promotion begins any more, and the open segment is sealed, so that the next opening has nothing to copy. To be
    /// polled until [`Self::is_idle`].
    pub fn close(&mut self) {
        self.stop_promoting();
        self.seal();
    }

    /// Seals the open segment.
    pub fn seal(&mut self) {
        // Refused only by a journal that has failed, which has nothing to seal.
        let _ = self.writer.change(Change::Seal);
    }

    /// Whether nothing is under way and nothing waits.
    pub fn is_idle(&self) -> bool {
        let base_idle = !self.base.is_busy() && self.base_sync.gathered.is_none();
        self.failed
            || base_idle && self.promoting.is_idle() && self.writer.is_idle() && self.outputs.is_empty()
    }

    /// Whether the journal writes a group while the one before is being synced.
    pub fn is_writing_ahead(&self) -> bool {
        self.writer.is_writing_ahead()
    }

    /// What the journal holds that isn't data.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// The checkpoints that can be opened, without those that a promotion is only about to take away.
    pub fn checkpoints(&self) -> CheckpointList {
        let mut checkpoints = self.history.checkpoints().clone();
        checkpoints.forget_below(self.oldest_seq());
        checkpoints
    }

    /// The first sealed segment after a number, if it has been full for `cold_us`.
    pub(super) fn sealed_segment(&self, after_number: u64, cold_us: u64) -> Option<Sealed> {
        let oldest_number = self.writer.superblock().low_water_segment;
        let mut segment = self.writer.closed_segment_after(after_number)?;
        while segment.trailer.is_none() {
            // What is in it is checked by whoever needs it: without a seal it can't be told where it should end.
            segment = self.writer.closed_segment_after(segment.header.number)?;
        }
        let is_cold = segment.end_time_us().saturating_add(cold_us) <= self.writer.receive_time_us();
        let slot_len_bytes = self.writer.superblock().slot_len_bytes;
        is_cold.then(|| Sealed { segment: segment.clone(), oldest_number, slot_len_bytes })
    }

    /// The journal's writer, to look at.
    pub fn writer(&self) -> &Writer {
        &self.writer
    }

    /// Its state.
    pub fn status(&self) -> ReceiverStatus {
        let observed = Observed {
            connected: self.stream.is_some(),
            full: self.full,
            failed: self.failed,
            in_sync: self.history.is_in_sync(),
            history: self.history.span(),
            limits: self.policy.limits,
            received_bytes: self.received_bytes,
            last_receive_wall_us: self.last_receive_wall_us,
        };
        ReceiverStatus { forecast: self.forecast(), ..ReceiverStatus::of(&self.writer, &observed) }
    }

    /// How far the journal reaches at today's rate.
    fn forecast(&self) -> Forecast {
        let slot_len_bytes = self.writer.superblock().slot_len_bytes;
        // Besides the slots that are never filled, one is on its way to be promoted or filled.
        let kept_slots = RESERVED_SLOTS as u64 + 1;
        let room_slots = u64::from(self.policy.limits.max_slots).saturating_sub(kept_slots);
        let used_bytes =
            self.writer.closed_segments().len() as u64 * slot_len_bytes + self.writer.open_fill_bytes();
        self.rate.forecast(used_bytes, room_slots * slot_len_bytes, self.policy.history_us / 1_000_000)
    }

    /// Takes every step that nothing stands in the way of.
    fn advance(&mut self, now: Now) {
        if self.failed {
            return;
        }
        if self.candidate.is_some() && self.base_sync.is_between_ends() && !self.base.is_busy() {
            // The other ends won't come on the old stream: all since the base is sent again on the new one.
            self.base.forget();
            self.base_sync.gathered = None;
            self.base_sync.ended.clear();
        }
        self.begin_base_group(now);
        let base_idle = !self.base.is_busy()
            && self.base_sync.gathered.is_none()
            && self.base_sync.advance_ticket.is_none();
        let waits = self.candidate.as_ref().is_some_and(|candidate| {
            // It may give up the history, and write to the recovery disks itself.
            self.promoting.is_carrying()
                && candidate.open.generation.0 != self.writer.superblock().tail_generation
        });
        if base_idle && !waits && self.candidate.as_ref().is_some_and(|candidate| candidate.claim.is_none()) {
            self.claim();
        }
    }

    fn take_for_journal(
        &mut self,
        bytes: &Bytes,
        view: &BatchView<'_>,
        stamp_us: u64,
    ) -> Result<(), OfferError> {
        self.writer.offer(bytes.clone(), view, stamp_us)?;
        self.history.take(view);
        Ok(())
    }

    fn take_events(&mut self, now: Now) {
        while let Some(event) = self.writer.poll_event() {
            match event {
                Event::Durable(point) => self.durable(point, now),
                Event::Granted { ticket, grant } => self.granted(ticket, &grant),
                Event::Refused { ticket, .. } => self.claim_refused(ticket),
                Event::Changed { ticket } => self.changed(ticket, now),
                Event::Full { no_space } => {
                    self.full = true;
                    self.full_told = Some(no_space);
                }
                Event::Room => {}
                Event::Poisoned(error) => self.fail(Failure::Journal(error)),
            }
        }
    }

    /// Nothing makes room: whoever sends is told, and nothing more is taken.
    fn tell_full(&mut self) {
        let Some(no_space) = self.full_told.take() else { return };
        self.outputs.push_back(ReceiverOutput::Event(ReceiverEvent::Full { no_space }));
        let text = if no_space {
            "the target's datastore is full: free space there"
        } else {
            "the journal is full: raise the VM's journal limit"
        };
        self.end_stream(RefuseCode::JournalFull, text.to_owned());
        self.drop_waiting();
    }

    fn changed(&mut self, ticket: u64, now: Now) {
        if self.promotion_changed(ticket, now) {
            return;
        }
        if self.manifest_tickets.pop_front_if(|waiting| *waiting == ticket).is_some() {
            self.outputs.push_back(ReceiverOutput::ManifestWritten { ticket });
        }
        if self.base_sync.written_ticket == Some(ticket) {
            self.base_sync.written_ticket = None;
        }
        if self.base_sync.advance_ticket == Some(ticket) {
            self.base_sync.advance_ticket = None;
        }
        if self.base_sync.ends && !self.writer.superblock().state.is_base_sync() {
            self.base_sync =
                BaseSync { after_end: std::mem::take(&mut self.base_sync.after_end), ..BaseSync::default() };
            self.history.clear();
            self.outputs.push_back(ReceiverOutput::Event(ReceiverEvent::SyncEnded));
            while let Some((bytes, stamp_us)) = self.base_sync.after_end.pop_front() {
                let taken = match BatchView::parse(&bytes) {
                    Ok(view) => self
                        .take_for_journal(&bytes, &view, stamp_us)
                        .map_err(|error| super::error_chain(&error)),
                    Err(error) => Err(super::error_chain(&error)),
                };
                if let Err(text) = taken {
                    self.base_sync.after_end.clear();
                    self.end_stream(RefuseCode::BadBatch, text);
                }
            }
            self.group_began_us = now.mono_us;
        }
    }

    fn durable(&mut self, point: ChainPoint, now: Now) {
        let began_us = self.groups_began_us.pop_front().unwrap_or(self.group_began_us);
        let mut newest = None;
        while let Some(arrival) = self.arrivals.pop_front_if(|arrival| arrival.last_seq <= point.seq) {
            newest = Some(arrival.mono_us);
        }
        self.history.durable(point.seq);
        let told = self.full_told.take().is_none();
        if std::mem::take(&mut self.full) && told {
            self.outputs.push_back(ReceiverOutput::Event(ReceiverEvent::Room));
        }
        let Some(stream) = &self.stream else { return };
        let waited_us = began_us.saturating_sub(newest.unwrap_or(began_us));
        let disk_us = now.mono_us.saturating_sub(began_us);
        let frame = Frame::Ack(Ack {
            open_count: stream.open_count,
            received_through: (stream.intake.next_seq() - 1).max(point.seq),
            durable_through: point.seq,
            memory_us: u32::try_from(waited_us).unwrap_or(u32::MAX),
            disk_us: u32::try_from(disk_us).unwrap_or(u32::MAX),
        });
        self.outputs.push_back(ReceiverOutput::Send { stream: stream.id, frame });
    }

    /// The storage can't be trusted any more: nothing is acknowledged from now on.
    pub(super) fn fail(&mut self, failure: Failure) {
        if std::mem::replace(&mut self.failed, true) {
            return;
        }
        let text = format!("the target's storage failed: {}", super::error_chain(&failure));
        if let Some(candidate) = self.candidate.take() {
            self.refuse(candidate.id, Refuse { code: RefuseCode::Storage, detail: 0, text: text.clone() });
        }
        self.end_stream(RefuseCode::Storage, text);
        let durable_through = self.writer.durable().seq;
        self.outputs.push_back(ReceiverOutput::Event(ReceiverEvent::Failed { failure, durable_through }));
    }

    /// Gives back the memory of batches that find no room: other VMs' streams share it. They are sent again on the next stream.
    fn drop_waiting(&mut self) {
        let superblock = self.writer.superblock();
        let (generation, parent) = (superblock.tail_generation, superblock.parent_generation);
        let claim = Change::Claim { generation, parent, first_seq: superblock.generation_first_seq };
        // Refused only by a journal that has failed, which holds none.
        let _ = self.writer.change(claim);
    }

    fn end_stream(&mut self, code: RefuseCode, text: String) {
        if let Some(stream) = self.stream.take() {
            self.refuse(stream.id, Refuse { code, detail: 0, text });
        }
    }

    fn refuse(&mut self, stream: StreamId, refuse: Refuse) {
        self.outputs.push_back(ReceiverOutput::Send { stream, frame: Frame::Refuse(refuse) });
        self.outputs.push_back(ReceiverOutput::Close { stream });
    }
}
