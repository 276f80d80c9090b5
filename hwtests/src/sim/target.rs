//! A target: files on a datastore, and a process with the product's receiver.

use journal::batch::BatchView;
use journal::crypt::{Encryption, Keys};
use journal::format::{FIRST_SLOT_OFFSET_BYTES, Superblock, VolumeState};
use journal::planted::{Bug, planted};
use journal::promotion::{PromotionAction, PromotionFile};
use journal::recovery::{
    Content, NewJournal, OpenError, OpenOptions, Opened, Segment, SegmentError, SurveyOptions, create, open,
};
use journal::storage::sim::{Crash, SimDisk, SimStorage};
use journal::storage::{Blocking, FileId, Op, Purpose, Storage};
use journal::view::{Promoted, View};
use journal::writer::Writer;
use vra::receive::{Pins, Receiver, ReceiverEvent, ReceiverOutput, ReceiverPolicy, StreamId, VmIdentity};
use vra::wire::Frame;

use super::ageing::Ageing;
use super::coverage::Happening;
use super::env::Env;
use super::kinds::{RARE_KINDS, RAREST};
use super::ledger::Ledger;
use super::shape::{SiteShape, any_encryption, site_keys};
use super::streams::{Arrival, StreamKey};

/// Length of a slot, in bytes: a source's longest batch fits beside what the journal keeps for its own.
pub(super) const SLOT_BYTES: u64 = 76 << 10;

pub(super) struct TargetSite {
    pub(super) disk: SimDisk,
    pub(super) journal: FileId,
    pub(super) recovery_disks: Vec<FileId>,
    identity: VmIdentity,
    policy: ReceiverPolicy,
    keys: Keys,
    /// The recovery disks' space stays reserved.
    reserved: bool,
    process: Option<Process>,
    /// What the living process knows to be durable after its storage failed.
    trusted_through: Option<u64>,
    /// A view that is open: the history must not be given up, nor promoted past it.
    pinned: Option<PinnedView>,
    /// Only a locked checkpoint keeps the history of that view, and may be given up.
    pinned_by_lock: bool,
    /// How long the file is, in slots.
    slot_count: u32,
    /// What that view follows.
    promoted: Promoted,
}

/// A view that stays open while the target goes on.
pub(super) struct PinnedView {
    pub(super) cut: u64,
    /// How far promotion had come when it was opened.
    pub(super) promoted_seq: u64,
    pub(super) view: View,
}

struct Process {
    journal_io: SimStorage,
    disk_io: SimStorage,
    receiver: Receiver,
    ageing: Ageing,
    promotion_io: SimStorage,
    journal_ops: usize,
    disk_ops: usize,
    promotion_ops: usize,
    /// The storage failed; everything up to here was durable.
    failed: Option<u64>,
    /// It was opened after a failure, by the same process: a later one may find more than it trusted.
    trusting: bool,
}

/// What the target says.
pub(super) enum Told {
    Frame(StreamKey, Frame),
    Close(StreamKey),
    Event(ReceiverEvent),
}

/// Whether the target's process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    Alive,
    Dead,
}

impl Process {
    fn all_ops(&self) -> usize {
        self.journal_ops + self.disk_ops + self.promotion_ops
    }
}

impl TargetSite {
    /// A datastore with files in which nothing is yet.
    pub(super) fn unmade(seed: u64, identity: VmIdentity, shape: SiteShape) -> Self {
        let disk = SimDisk::new(seed);
        let journal = disk.add_file();
        let recovery_disks = identity.volumes.iter().map(|_| disk.add_file()).collect();
        Self {
            disk,
            journal,
            recovery_disks,
            identity,
            policy: shape.policy,
            keys: Keys::seeded(site_keys(), seed),
            reserved: shape.reserved,
            process: None,
            trusted_through: None,
            pinned: None,
            pinned_by_lock: false,
            slot_count: 0,
            promoted: Promoted::default(),
        }
    }

    /// Makes the journal and the recovery disks.
    pub(super) fn create(&self, encryption: Encryption) -> Result<(), String> {
        let mut storage = self.disk.storage();
        let volumes = self.identity.volumes.iter();
        let new = NewJournal {
            journal_id: self.identity.journal.0,
            vm_id: self.identity.vm.0,
            vpg_id: self.identity.vm.0,
            slot_len_bytes: SLOT_BYTES,
            slot_count: 2,
            volumes: volumes
                .map(|volume| VolumeState {
                    id: volume.id.0,
                    base_seq: 0,
                    size_bytes: volume.size_bytes,
                    fresh_image: true,
                })
                .collect(),
            manifest: "{}".into(),
            encryption,
        };
        create(&mut storage, self.journal, &new).map_err(|error| format!("create: {error}"))?;
        for (file, volume) in self.recovery_disks.iter().zip(&self.identity.volumes) {
            let mut io = Blocking::new(&mut storage, *file, Purpose::RecoveryDisk);
            let len_bytes = volume.size_bytes;
            io.run(Op::Allocate { offset_bytes: 0, len_bytes }).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// For an opening by the next writer.
    pub(super) fn open_options(&self) -> OpenOptions {
        OpenOptions { keys: self.keys.clone(), ..OpenOptions::default() }
    }

    /// For a reader.
    pub(super) fn survey_options(&self) -> SurveyOptions {
        SurveyOptions { keys: self.keys.site().clone(), ..SurveyOptions::default() }
    }

    pub(super) fn is_up(&self) -> bool {
        self.process.is_some()
    }

    pub(super) fn receiver(&self) -> Option<&Receiver> {
        self.process.as_ref().map(|process| &process.receiver)
    }

    pub(super) fn pinned(&self) -> Option<&PinnedView> {
        self.pinned.as_ref()
    }

    /// How far promotion has come, for views that follow it.
    pub(super) fn promoted(&self) -> &Promoted {
        &self.promoted
    }

    /// A view opens at this cut, or the last one is closed. The pin comes before the look at what can be opened (C2).
    pub(super) fn pin(&mut self, cut: Option<u64>, env: &mut Env) -> bool {
        self.pinned = None;
        let Some(process) = &mut self.process else { return false };
        self.pinned_by_lock = env.rng.one_in(3);
        process.receiver.set_pins(match self.pinned_by_lock {
            true => Pins { view: None, lock: cut, has_views: false },
            false => Pins { view: cut, lock: None, has_views: cut.is_some() },
        });
        cut.is_some_and(|cut| cut >= process.receiver.oldest_seq())
    }

    pub(super) fn opened(&mut self, pinned: PinnedView) {
        self.pinned = Some(pinned);
    }

    pub(super) fn arrived(&mut self, key: StreamKey, arrival: Arrival, env: &Env) {
        let Some(process) = &mut self.process else { return };
        let (id, now) = (StreamId(key), env.now());
        match arrival {
            Arrival::Open(open) => process.receiver.open(id, open, now),
            Arrival::Batch(bytes) => {
                if let Ok(view) = BatchView::parse(&bytes) {
                    process.ageing.received(view.last_seq(), now.mono_us);
                }
                process.receiver.batch(id, bytes, now);
            }
            Arrival::Closed => process.receiver.closed(id),
        }
    }

    /// Starts what the receiver wants done; gives what it says.
    pub(super) fn outputs(&mut self, env: &mut Env) -> Result<Vec<Told>, String> {
        let mut told = Vec::new();
        let Some(process) = &mut self.process else { return Ok(told) };
        while let Some(output) = process.receiver.poll(env.now()) {
            match output {
                ReceiverOutput::Journal(action) => {
                    process.journal_ops += 1;
                    process.journal_io.submit(self.journal, action.token, action.purpose, action.op);
                }
                ReceiverOutput::Disk(action) => {
                    process.disk_ops += 1;
                    let file = self.recovery_disks[usize::from(action.volume)];
                    process.disk_io.submit(file, action.token, Purpose::RecoveryDisk, action.op);
                }
                ReceiverOutput::Promotion(PromotionAction { token, file, purpose, op }) => {
                    process.promotion_ops += 1;
                    let file = match file {
                        PromotionFile::Journal => self.journal,
                        PromotionFile::Disk(volume) => self.recovery_disks[usize::from(volume)],
                    };
                    process.promotion_io.submit(file, token, purpose, op);
                }
                ReceiverOutput::Send { stream, frame } => told.push(Told::Frame(stream.0, frame)),
                ReceiverOutput::Close { stream } => told.push(Told::Close(stream.0)),
                ReceiverOutput::ManifestWritten { .. } => {}
                ReceiverOutput::Event(event) => {
                    process.ageing.told(&event, self.policy.history_us, env.now().mono_us)?;
                    match &event {
                        ReceiverEvent::Failed { durable_through, .. } => {
                            process.failed = Some(*durable_through);
                        }
                        ReceiverEvent::HistoryGivenUp { .. } if self.pinned_by_lock => self.pinned = None,
                        ReceiverEvent::LockInTheWay { .. } => {
                            // As the owner does: it is given up rather than the replication.
                            self.pinned = None;
                            process.receiver.set_pins(Pins::default());
                        }
                        ReceiverEvent::Promoted { through_seq, bad_ranges, .. } => {
                            self.promoted.advance(*through_seq, bad_ranges);
                        }
                        _ => {}
                    }
                    told.push(Told::Event(event));
                }
            }
        }
        let slot_count = process.receiver.writer().superblock().slot_count;
        if std::mem::replace(&mut self.slot_count, slot_count) > slot_count {
            env.happened(Happening::Shrunk);
        }
        Ok(told)
    }

    /// Whether an operation is under way.
    pub(super) fn is_busy(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.all_ops() > 0)
    }

    pub(super) fn is_idle(&self) -> bool {
        !self.is_busy() && self.receiver().is_none_or(Receiver::is_idle)
    }

    /// Lets the storage do one operation, any one.
    pub(super) fn run_one(&mut self, env: &mut Env) -> Life {
        let Some(process) = &mut self.process else { return Life::Alive };
        let all = process.all_ops();
        if all == 0 {
            return Life::Alive;
        }
        let index = env.any_index(all);
        let mut done = Vec::new();
        let io = if index < process.journal_ops {
            &mut process.journal_io
        } else if index < process.journal_ops + process.disk_ops {
            &mut process.disk_io
        } else {
            &mut process.promotion_io
        };
        if io.collect(true, &mut done).is_err() {
            self.forget_process(env);
            return Life::Dead;
        }
        for completion in done {
            if index < process.journal_ops {
                process.journal_ops -= 1;
                process.receiver.journal_done(completion.token, completion.result.map(drop), env.now());
            } else if index < process.journal_ops + process.disk_ops {
                process.disk_ops -= 1;
                process.receiver.disk_done(completion.token, completion.result, env.now());
            } else {
                process.promotion_ops -= 1;
                process.receiver.promotion_done(completion.token, completion.result, env.now());
            }
        }
        Life::Alive
    }

    /// Whether a later process may find more in the journal than this one trusts.
    pub(super) fn is_trusting(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.trusting)
    }

    /// Whether the process has failed storage and must open its files again, as soon as nothing is under way.
    pub(super) fn has_failed(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.failed.is_some())
    }

    /// After a failure: the same process opens its files again, or dies.
    pub(super) fn end_failed(&mut self, env: &mut Env) {
        let Some(durable_through) = self.process.as_ref().and_then(|process| process.failed) else { return };
        if self.receiver().is_some_and(Receiver::is_writing_ahead) {
            env.happened(Happening::FailedWithGroupAhead);
        }
        if env.rng.one_in(2) {
            self.crash(Crash::Kill, env);
        } else {
            (self.process, self.pinned) = (None, None);
            self.trusted_through = Some(durable_through);
            env.happened(Happening::ReopenedAfterPoison);
        }
    }

    pub(super) fn crash(&mut self, crash: Crash, env: &mut Env) {
        self.disk.crash(crash);
        self.forget_process(env);
    }

    /// Whether a crash that was armed has struck outside of the process's own operations.
    pub(super) fn notice_death(&mut self, env: &mut Env) -> Life {
        let Some(process) = &self.process else { return Life::Alive };
        if !self.disk.is_dead(&process.journal_io) {
            return Life::Alive;
        }
        self.forget_process(env);
        Life::Dead
    }

    /// The process is gone; what it knew is gone too. Sometimes the next one won't get far either.
    fn forget_process(&mut self, env: &mut Env) {
        if self.receiver().is_some_and(Receiver::is_writing_ahead) && !self.has_failed() {
            env.happened(Happening::DiedWithGroupAhead);
        }
        (self.process, self.trusted_through, self.pinned) = (None, None, None);
        if env.is_rough() && env.rng.one_in(4) {
            let purpose = if env.rng.one_in(2) { Purpose::Superblock } else { Purpose::Carry };
            let (after_ops, crash) = (env.rng.below(4), env.any_crash());
            self.disk.arm_crash_at(purpose, after_ops, crash);
        }
    }

    pub(super) fn open(&mut self, ledger: &Ledger, env: &mut Env) -> Result<(), String> {
        for tries in 0..20 {
            if tries == 10 {
                // The slots that are free may have no space, and the datastore none to give: somebody makes room.
                self.disk.set_capacity_bytes(u64::MAX);
            }
            let storage = self.disk.storage();
            if self.try_open(ledger, env)? {
                return Ok(());
            }
            if self.disk.is_dead(&storage) {
                self.forget_process(env);
            } else if env.rng.one_in(2) {
                // The same process tries again, or another one does.
                self.crash(Crash::Kill, env);
            }
            env.happened(Happening::OpenedAgain);
        }
        Err("twenty openings failed one after the other".into())
    }

    /// One opening. False if the storage failed or the process died.
    pub(super) fn try_open(&mut self, ledger: &Ledger, env: &mut Env) -> Result<bool, String> {
        if !planted(Bug::OpenedWithoutFence) {
            self.disk.fence();
        }
        let mut storage = self.disk.storage();
        let vm_id = Some(self.identity.vm.0);
        let options = OpenOptions { vm_id, trusted_through: self.trusted_through, ..self.open_options() };
        let Some(receiver) = self.open_once(&mut storage, &options, ledger, env)? else { return Ok(false) };
        if env.is_rough() && env.rng.one_in(2) {
            // Whenever it comes about in this process's life.
            let kinds = if env.rng.one_in(2) { &RARE_KINDS[..] } else { &RARE_KINDS[..RAREST] };
            if env.rng.one_in(2) {
                self.disk.arm_error_at(kinds, 0);
            } else {
                let crash = env.any_crash();
                self.disk.arm_crash_at_kinds(kinds, 0, crash);
            }
        }
        self.process = Some(Process {
            journal_io: storage,
            disk_io: self.disk.storage(),
            ageing: Ageing::new(receiver.writer().superblock().promotion_intent_seq),
            receiver,
            promotion_io: self.disk.storage(),
            journal_ops: 0,
            disk_ops: 0,
            promotion_ops: 0,
            failed: None,
            trusting: self.trusted_through.is_some(),
        });
        Ok(true)
    }

    /// None if the storage failed or the process died.
    fn open_once(
        &self,
        storage: &mut SimStorage,
        options: &OpenOptions,
        ledger: &Ledger,
        env: &mut Env,
    ) -> Result<Option<Receiver>, String> {
        let opened = match open(storage, self.journal, options) {
            Ok(opened) => opened,
            Err(_) if self.disk.is_dead(storage) => return Ok(None),
            Err(OpenError::Storage(error)) => {
                env.note(|| format!("an opening failed: {error}"));
                return Ok(None);
            }
            Err(error) => return Err(format!("the journal cannot be opened: {error:?}")),
        };
        env.note(|| {
            let Superblock { open_count, low_water_segment, low_water, state, .. } = &opened.superblock;
            let segments: Vec<_> = opened.segments.iter().map(|found| (found.header.number, found.last().seq)).collect();
            format!(
                "opening {open_count}: {state:?}, low water {} before segment {low_water_segment}, then {segments:?}",
                low_water.seq
            )
        });
        if opened.tail.seq < ledger.acked() {
            let (tail, acked) = (opened.tail.seq, ledger.acked());
            let numbers: Vec<_> =
                opened.segments.iter().map(|segment| (segment.header.number, segment.last().seq)).collect();
            let (hidden, superblock) = (opened.hidden, &opened.superblock);
            return Err(format!(
                "recovered through {tail}, but {acked} was acknowledged; segments {numbers:?}, {hidden:?}, {superblock:?}"
            ));
        }
        if !ledger.was_sent(opened.tail) {
            return Err(format!("recovered through {:?}, which the source never sent", opened.tail));
        }
        let events = match events_of(&opened, storage, self.journal) {
            Ok(events) => events,
            Err(_) if self.disk.is_dead(storage) => return Ok(None),
            Err(SegmentError::Storage(_)) => return Ok(None),
            Err(error) => return Err(format!("a segment cannot be read: {error:?}")),
        };
        if let Some(last) = opened.segments.last().filter(|last| last.header.carried_end_bytes > 4096) {
            env.happened(Happening::Carried);
            if last.header.encryption.is_some() {
                env.happened(Happening::CarriedEncrypted);
            }
        }
        let unsealed = |segment: &Segment| matches!(segment.content, Content::Scanned(_));
        if opened.segments.iter().rev().skip(1).any(unsealed) {
            env.happened(Happening::SealedLate);
        }
        if opened.superblock.promotion_intent_seq > opened.superblock.low_water.seq {
            env.happened(Happening::PromotionResumed);
        }
        let writer = Writer::new(opened, self.policy.limits);
        if writer.closed_segments().any(|segment| segment.trailer.is_none()) {
            return Err("a segment that takes no more batches was opened without being sealed".into());
        }
        let reserved = vec![self.reserved; self.recovery_disks.len()];
        Ok(Some(Receiver::new(self.identity.clone(), self.policy, writer, events, &reserved)))
    }

    /// The datastore is nearly full.
    pub(super) fn fill_datastore(&mut self) {
        let disk_bytes: u64 = self.identity.volumes.iter().map(|volume| volume.size_bytes).sum();
        self.disk.set_capacity_bytes(FIRST_SLOT_OFFSET_BYTES + disk_bytes + 4 * SLOT_BYTES);
    }

    /// The datastore gets room, or the limit is raised a little.
    pub(super) fn make_room(&mut self) {
        self.disk.set_capacity_bytes(u64::MAX);
        self.policy.limits.max_slots = (self.policy.limits.max_slots + 1).min(40);
        if let Some(process) = &mut self.process {
            process.receiver.set_policy(self.policy);
        }
    }

    /// What the process is told from outside.
    pub(super) fn command(&mut self) -> Option<&mut Receiver> {
        self.process.as_mut().map(|process| &mut process.receiver)
    }

    /// What follows happens to a copy of the files and to no process, or to one that has just opened them; then all is as before.
    pub(super) fn on_copy<T>(&mut self, seed: u64, then: impl FnOnce(&mut Self) -> T) -> T {
        let copy = self.disk.copy(seed);
        let disk = std::mem::replace(&mut self.disk, copy);
        let process = self.process.take();
        let done = then(self);
        (self.disk, self.process) = (disk, process);
        done
    }

    /// Another limit, which the process follows at once.
    pub(super) fn limit_slots(&mut self, max_slots: u32) {
        self.policy.limits.max_slots = max_slots;
        if let Some(process) = &mut self.process {
            process.receiver.set_policy(self.policy);
        }
    }

    /// Another manifest, or the open segment is sealed.
    pub(super) fn change_something(&mut self, env: &mut Env) {
        let Some(process) = &mut self.process else { return };
        // A journal that has failed refuses, and is looked after.
        match env.rng.below(6) {
            0 | 1 => process.receiver.seal(),
            2 => {
                let was = process.receiver.writer().superblock().encryption;
                let encryption = any_encryption(&self.identity, env);
                if let (Encryption::On(_), Encryption::On(_)) = (was, encryption) {
                    env.happened(Happening::KeyRotated);
                }
                let _ = process.receiver.set_encryption(encryption);
            }
            _ => _ = process.receiver.set_manifest(format!(r#"{{"made":{}}}"#, env.rng.next_u64())),
        }
    }
}

/// What of the journal isn't data, as the product reads it at an opening.
fn events_of(
    opened: &Opened,
    storage: &mut SimStorage,
    journal: FileId,
) -> Result<Vec<journal::format::FooterEvent>, SegmentError> {
    let mut io = Blocking::new(storage, journal, Purpose::Survey);
    let mut events = Vec::new();
    for segment in &opened.segments {
        events.extend(segment.footer(&mut io, &opened.superblock)?.events);
    }
    Ok(events)
}
