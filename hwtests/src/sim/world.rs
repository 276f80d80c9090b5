//! One seed's world: what happens, in which order, and what must hold.

use std::collections::BTreeMap;

use journal::format::{FIRST_SLOT_OFFSET_BYTES, VolumeState};
use journal::planted::{Bug, planted};
use journal::recovery::{NewJournal, OpenError, OpenOptions, SurveyOptions, create, open};
use journal::storage::sim::{Crash, SimDisk, SimRng};
use journal::storage::{Blocking, FileId, Op, Purpose};
use journal::view::{Reader, View, ViewError};
use journal::writer::{Change, Event, Limits, State, Writer};
use uuid::Uuid;

use super::Coverage;
use super::model::{DISK_BYTES, Image, Model};
use super::target::{JOURNAL_ID, Target};

/// Something that a run can reach, besides faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Happening {
    /// A first sync went to the recovery disks and ended.
    BaseSyncEnded,
    /// History was given up.
    HistoryGivenUp,
    /// A new generation took over a journal with history, which was kept.
    ForkJournaled,
    /// A stream came back to the same opening.
    Reconnected,
    /// The journal was full.
    Full,
    /// Growth met the end of the datastore.
    NoSpace,
    /// The writer poisoned itself and was opened again by the same process.
    ReopenedAfterPoison,
    /// An opening copied an unsealed segment.
    Carried,
    /// An opening failed and the next one went on.
    OpenedAgain,
    /// A checkpoint was opened and compared while the target was writing.
    CheckpointComparedBesideWriter,
    /// A checkpoint was opened and compared.
    CheckpointCompared,
    /// A checkpoint was opened and compared that needed the recovery disk and the journal.
    CheckpointAfterBase,
    /// A point that is no checkpoint was opened and compared.
    PointCompared,
    /// A checkpoint inside a sync was not listed.
    CheckpointInsideSync,
    /// A flipped bit was noticed.
    FlipNoticed,
    /// A flipped bit hit nothing that counts.
    FlipHarmless,
}

impl Happening {
    /// All of them.
    pub const ALL: [Self; 16] = [
        Self::BaseSyncEnded,
        Self::HistoryGivenUp,
        Self::ForkJournaled,
        Self::Reconnected,
        Self::Full,
        Self::NoSpace,
        Self::ReopenedAfterPoison,
        Self::Carried,
        Self::OpenedAgain,
        Self::CheckpointComparedBesideWriter,
        Self::CheckpointCompared,
        Self::CheckpointAfterBase,
        Self::PointCompared,
        Self::CheckpointInsideSync,
        Self::FlipNoticed,
        Self::FlipHarmless,
    ];
}

const VM_ID: Uuid = Uuid::from_u128(0x71);
const SLOT_BYTES: u64 = 64 << 10;
const VOLUME_COUNT: usize = DISK_BYTES.len();

/// A world of one seed.
#[derive(Debug)]
pub struct World {
    rng: SimRng,
    disk: SimDisk,
    journal: FileId,
    recovery_disks: Vec<FileId>,
    model: Model,
    target: Option<Target>,
    limits: Limits,
    /// What the living process knows to be durable after its writer poisoned itself.
    trusted_through: Option<u64>,
    /// The sync that must go to the recovery disks, once a stream is granted.
    give_up: Option<u64>,
    happenings: BTreeMap<Happening, u64>,
}

impl World {
    /// The world of a seed.
    pub fn new(seed: u64) -> Self {
        let mut rng = SimRng::new(seed);
        let disk = SimDisk::new(seed);
        let journal = disk.add_file();
        let recovery_disks = DISK_BYTES.iter().map(|_| disk.add_file()).collect();
        let limits = Limits {
            max_slots: 3 + rng.below(12) as u32,
            grow_slots: 1 + rng.below(3) as u32,
            group_bytes: 4096 << rng.below(6),
        };
        Self {
            rng,
            disk,
            journal,
            recovery_disks,
            model: Model::new(seed),
            target: None,
            limits,
            trusted_through: None,
            give_up: None,
            happenings: BTreeMap::new(),
        }
    }

    /// Runs it; gives what was reached, or the promise that was broken.
    ///
    /// # Errors
    /// The promise.
    pub fn run(mut self) -> Result<Coverage, String> {
        self.create()?;
        let steps = 150 + self.rng.below(450);
        for _ in 0..steps {
            self.step()?;
        }
        self.end()?;
        Ok(Coverage { faults: self.disk.coverage(), happenings: self.happenings })
    }

    fn create(&mut self) -> Result<(), String> {
        let mut storage = self.disk.storage();
        let volume = |len_bytes: &usize| VolumeState {
            id: Uuid::from_u128(*len_bytes as u128),
            base_seq: 0,
            size_bytes: *len_bytes as u64,
            fresh_image: true,
        };
        let new = NewJournal {
            journal_id: JOURNAL_ID,
            vm_id: VM_ID,
            vpg_id: Uuid::from_u128(0x72),
            slot_len_bytes: SLOT_BYTES,
            slot_count: 2,
            volumes: DISK_BYTES.iter().map(volume).collect(),
            manifest: "{}".into(),
        };
        create(&mut storage, self.journal, &new).map_err(|error| format!("create: {error}"))?;
        for (file, len_bytes) in self.recovery_disks.iter().zip(DISK_BYTES) {
            let mut io = Blocking::new(&mut storage, *file, Purpose::RecoveryDisk);
            let len_bytes = len_bytes as u64;
            io.run(Op::Allocate { offset_bytes: 0, len_bytes }).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    fn step(&mut self) -> Result<(), String> {
        if self.target.is_none() {
            self.open_target()?;
        }
        if planted(Bug::OpenedWithoutFence) && self.rng.one_in(4) {
            self.disk.land_one();
        }
        match self.rng.below(100) {
            0..=29 => self.model.step(),
            30..=49 => self.ship()?,
            50..=84 => self.pump_some()?,
            85..=88 => self.arm(),
            89 | 90 => self.crash_now(),
            91 | 92 => self.reconnect()?,
            93 => self.fork()?,
            94 => self.change_something(),
            95 | 96 => self.compare_beside_writer()?,
            97 => self.make_room(),
            _ => self.reopen_politely(),
        }
        self.look_after_target();
        Ok(())
    }

    fn happened(&mut self, happening: Happening) {
        *self.happenings.entry(happening).or_default() += 1;
    }

    fn ship(&mut self) -> Result<(), String> {
        let Some(target) = self.target.as_mut() else { return Ok(()) };
        target.ship(&mut self.model, &mut self.rng)
    }

    fn pump_some(&mut self) -> Result<(), String> {
        let steps = 1 + self.rng.below(6) as usize;
        self.pump(steps)
    }

    fn pump(&mut self, steps: usize) -> Result<(), String> {
        let Some(target) = self.target.as_mut() else { return Ok(()) };
        let Ok(events) = target.pump(steps) else {
            self.forget_target();
            return Ok(());
        };
        for event in events {
            self.handle(event)?;
        }
        Ok(())
    }

    fn handle(&mut self, event: Event) -> Result<(), String> {
        let Some(target) = self.target.as_mut() else { return Ok(()) };
        match event {
            Event::Durable(point) => {
                if point.seq < self.model.acked {
                    return Err(format!("durable went back from {} to {}", self.model.acked, point.seq));
                }
                self.model.acked = point.seq;
            }
            Event::Granted { grant, .. } => {
                if grant.durable.seq < self.model.acked {
                    let (durable, acked) = (grant.durable.seq, self.model.acked);
                    return Err(format!("granted from {durable} on, but {acked} was acknowledged"));
                }
                self.model.acked = grant.durable.seq;
                target.granted(grant);
                if let Some(sync_id) = self.give_up.take() {
                    if let Ok(ticket) = target.writer.change(Change::GiveUpHistory { sync_id }) {
                        target.wait_for(ticket);
                    }
                    self.happened(Happening::HistoryGivenUp);
                }
            }
            Event::Refused { reason, .. } => return Err(format!("the source was refused: {reason}")),
            Event::Changed { ticket } => {
                let was_base = target.is_waiting() && !target.writer.superblock().state.is_base_sync();
                target.changed(ticket);
                if was_base {
                    self.happened(Happening::BaseSyncEnded);
                }
            }
            Event::Full { no_space } => {
                self.happened(if no_space { Happening::NoSpace } else { Happening::Full });
            }
            Event::Room | Event::Poisoned(_) => {}
        }
        Ok(())
    }

    /// Draws the consequences of a writer that poisoned itself, or of a process that gave up.
    fn look_after_target(&mut self) {
        let Some(target) = self.target.as_mut() else { return };
        if target.writer.state() == State::Poisoned {
            // What is still under way must end before anything else happens to the file.
            while target.writer.under_way() > 0 && target.pump(1).is_ok() {}
        }
        if self.disk.is_dead(&target.storage) {
            self.forget_target();
        } else if target.gave_up {
            self.disk.crash(Crash::Kill);
            self.forget_target();
        } else if target.writer.state() == State::Poisoned {
            if self.rng.one_in(2) {
                self.disk.crash(Crash::Kill);
                self.forget_target();
            } else {
                let durable = target.writer.durable().seq;
                self.forget_target();
                self.trusted_through = Some(durable);
                self.happened(Happening::ReopenedAfterPoison);
            }
        }
    }

    /// The target is gone; what it knew is gone too. Sometimes the next one won't get far either.
    fn forget_target(&mut self) {
        self.target = None;
        self.trusted_through = None;
        if self.rng.one_in(8) {
            let purpose = if self.rng.one_in(2) { Purpose::Superblock } else { Purpose::Carry };
            let (after_ops, crash) = (self.rng.below(4), self.any_crash());
            self.disk.arm_crash_at(purpose, after_ops, crash);
        }
    }

    fn open_target(&mut self) -> Result<(), String> {
        for _ in 0..20 {
            if !planted(Bug::OpenedWithoutFence) {
                self.disk.fence();
            }
            let mut storage = self.disk.storage();
            let options = OpenOptions { vm_id: Some(VM_ID), trusted_through: self.trusted_through };
            let opened = match open(&mut storage, self.journal, &options) {
                Ok(opened) => opened,
                Err(_) if self.disk.is_dead(&storage) => {
                    self.forget_target();
                    self.happened(Happening::OpenedAgain);
                    continue;
                }
                Err(OpenError::Storage(_)) => {
                    // The same process tries again, or another one does.
                    if self.rng.one_in(2) {
                        self.disk.crash(Crash::Kill);
                        self.trusted_through = None;
                    }
                    self.happened(Happening::OpenedAgain);
                    continue;
                }
                Err(error) => return Err(format!("the journal cannot be opened: {error:?}")),
            };
            if opened.tail.seq < self.model.acked {
                let (tail, acked) = (opened.tail.seq, self.model.acked);
                return Err(format!("recovered through {tail}, but {acked} was acknowledged"));
            }
            if !self.model.was_sent(opened.tail) {
                return Err(format!("recovered through {:?}, which the source never sent", opened.tail));
            }
            if opened.segments.last().is_some_and(|last| last.header.carried_end_bytes > 4096) {
                self.happened(Happening::Carried);
            }
            let writer = Writer::new(opened, self.limits);
            let storages = [storage, self.disk.storage()];
            self.target = Some(Target::new(storages, writer, self.journal, self.recovery_disks.clone()));
            return self.claim();
        }
        Err("twenty openings failed one after the other".into())
    }

    fn claim(&mut self) -> Result<(), String> {
        let Some(target) = self.target.as_mut() else { return Ok(()) };
        target.grant = None;
        let Model { generation, parent, first_seq, .. } = self.model;
        match target.writer.change(Change::Claim { generation, parent, first_seq }) {
            Ok(_) => Ok(()),
            Err(journal::writer::ChangeError::Poisoned) => Ok(()),
            Err(error) => Err(format!("claim refused: {error:?}")),
        }
    }

    fn reconnect(&mut self) -> Result<(), String> {
        if self.target.as_ref().is_some_and(|target| target.grant.is_some()) {
            self.happened(Happening::Reconnected);
            self.claim()?;
        }
        Ok(())
    }

    /// The source loses what it retained. A sync follows, through the journal or, if history is given up, to the disks.
    fn fork(&mut self) -> Result<(), String> {
        // Numbers go on after what the target has, which the source learns from it.
        for _ in 0..200 {
            let Some(target) = self.target.as_ref() else { return Ok(()) };
            if target.is_idle() || target.writer.state() == State::Full {
                break;
            }
            self.pump(1)?;
            self.look_after_target();
        }
        let Some(target) = self.target.as_mut() else { return Ok(()) };
        if target.grant.is_none() || self.disk.is_dead(&target.storage) {
            return Ok(());
        }
        let tail_seq = target.writer.durable().seq;
        let is_base = target.writer.superblock().state.is_base_sync();
        // Batches that wait for room were never acknowledged.
        let waiting = target.writer.accepted().seq > tail_seq;
        if waiting && !is_base {
            self.claim()?;
            self.pump(50)?;
            self.look_after_target();
            if self.target.as_ref().is_none_or(|target| target.grant.is_none()) {
                return Ok(());
            }
        }
        let sync_id = self.model.fork(tail_seq);
        if is_base {
            return self.claim();
        }
        if self.rng.one_in(2) {
            self.give_up = Some(sync_id);
        } else {
            self.happened(Happening::ForkJournaled);
        }
        self.claim()
    }

    fn arm(&mut self) {
        let after_ops = self.rng.below(12);
        match self.rng.below(10) {
            0 | 1 => self.disk.arm_crash(after_ops, Crash::Kill),
            2 | 3 => self.disk.arm_crash(after_ops, Crash::PowerCut),
            8 | 9 => {
                let (purpose, crash) = (self.any_purpose(), self.any_crash());
                self.disk.arm_crash_at(purpose, after_ops / 4, crash);
            }
            4 => self.disk.arm_error(after_ops / 2, "fdatasync"),
            5 => self.disk.arm_error(after_ops / 2, "write"),
            6 => {
                // The fault meets the next opening.
                self.crash_now();
                let verb = if self.rng.one_in(2) { "read" } else { "fdatasync" };
                self.disk.arm_error(self.rng.below(4), verb);
            }
            _ => {
                self.crash_now();
                let (after_ops, crash) = (self.rng.below(24), self.any_crash());
                self.disk.arm_crash(after_ops, crash);
            }
        }
        if self.rng.one_in(20) {
            self.disk.set_capacity_bytes(FIRST_SLOT_OFFSET_BYTES + 5 * SLOT_BYTES);
        }
    }

    fn any_purpose(&mut self) -> Purpose {
        let purposes = [
            Purpose::Append,
            Purpose::Seal,
            Purpose::Superblock,
            Purpose::Superblock,
            Purpose::SuperblockMirror,
            Purpose::Manifest,
            Purpose::Grow,
            Purpose::Carry,
            Purpose::RecoveryDisk,
        ];
        purposes[self.rng.below(purposes.len() as u64) as usize]
    }

    fn crash_now(&mut self) {
        let crash = self.any_crash();
        self.disk.crash(crash);
        self.forget_target();
        self.disk.disarm();
    }

    fn any_crash(&mut self) -> Crash {
        if self.rng.one_in(2) { Crash::Kill } else { Crash::PowerCut }
    }

    fn change_something(&mut self) {
        let Some(target) = self.target.as_mut() else { return };
        let change = if self.rng.one_in(3) {
            Change::Seal
        } else {
            Change::SetManifest(format!(r#"{{"made":{}}}"#, self.rng.next_u64()))
        };
        // A poisoned writer refuses, and is looked after.
        let _ = target.writer.change(change);
    }

    /// The datastore gets room, or the limit is raised a little.
    fn make_room(&mut self) {
        self.disk.set_capacity_bytes(u64::MAX);
        self.limits.max_slots = (self.limits.max_slots + 1).min(40);
        if let Some(target) = self.target.as_mut() {
            target.writer.retry(self.limits);
        }
    }

    /// The process ends with nothing under way.
    fn reopen_politely(&mut self) {
        if self.target.as_ref().is_some_and(Target::is_idle) {
            self.disk.crash(Crash::Kill);
            self.forget_target();
        }
    }

    fn compare_beside_writer(&mut self) -> Result<(), String> {
        let mut storage = self.disk.storage();
        let reader = match Reader::open(&mut storage, self.journal, SurveyOptions::default()) {
            Ok(reader) => reader,
            Err(_) if self.disk.is_dead(&storage) => return Ok(()),
            // What a dying or failing process leaves is only whole once an opener has put it right, but an armed read
            // error is the reader's own.
            Err(ViewError::Open(OpenError::Storage(_)) | ViewError::Storage(_)) => return Ok(()),
            Err(error) => return Err(format!("a reader beside the writer: {error:?}")),
        };
        let count = reader.catalogue().checkpoints().len() as u64;
        if count > 0 {
            let index = self.rng.below(count) as usize;
            let cut = reader.catalogue().checkpoints()[index].checkpoint.cut;
            let view = reader.view(cut).map_err(|error| format!("view beside the writer: {error:?}"))?;
            let found = match self.read_image(&view) {
                Ok(found) => found,
                // The same: a fault that was armed for the target met the reader.
                Err(ViewError::Storage(_)) => return Ok(()),
                Err(error) => return Err(format!("read beside the writer: {error:?}")),
            };
            self.compare(cut, &found)?;
            self.happened(Happening::CheckpointComparedBesideWriter);
        }
        Ok(())
    }

    /// Compares with the checkpoint that was published with this cut.
    fn compare(&self, cut: u64, found: &Image) -> Result<(), String> {
        let promise = self.model.promises().iter().find(|promise| promise.checkpoint.cut == cut);
        let Some(promise) = promise else {
            return Err(format!("a checkpoint with cut {cut} is listed, which was never published"));
        };
        if !promise.counts {
            return Err(format!("the checkpoint with cut {cut} is listed, but a sync was under way"));
        }
        differs(&promise.image, found).map_or(Ok(()), |place| {
            Err(format!("the checkpoint with cut {cut} differs from the guest's disk {place}"))
        })
    }

    fn read_image(&self, view: &View) -> Result<Image, ViewError> {
        let mut storage = self.disk.storage();
        let mut image = Image::new();
        for (volume, len_bytes) in (0_u16..).zip(DISK_BYTES) {
            let mut bytes = vec![0; len_bytes];
            let file = self.recovery_disks[usize::from(volume)];
            view.volume(volume)?.read(&mut storage, self.journal, 0, &mut bytes, |storage, at, into| {
                let read = Blocking::new(storage, file, Purpose::View).read(at, into.len())?;
                into.copy_from_slice(&read);
                Ok(())
            })?;
            image.push(bytes);
        }
        Ok(image)
    }

    /// The disaster, and what must be there afterwards.
    fn end(&mut self) -> Result<(), String> {
        let crash = self.any_crash();
        self.disk.crash(crash);
        self.forget_target();
        self.open_target()?;
        self.disk.crash(Crash::PowerCut);
        self.forget_target();
        self.disk.disarm();
        self.disk.fence();
        let mut storage = self.disk.storage();
        let options = SurveyOptions::default();
        let reader = Reader::open(&mut storage, self.journal, options)
            .map_err(|error| format!("the journal cannot be read at the end: {error:?}"))?;
        self.check_listed(&reader)?;
        for entry in reader.catalogue().checkpoints() {
            let cut = entry.checkpoint.cut;
            let view = reader.view(cut).map_err(|error| format!("view at {cut}: {error:?}"))?;
            let found = self.read_image(&view).map_err(|error| format!("read at {cut}: {error:?}"))?;
            self.compare(cut, &found)?;
            self.happened(Happening::CheckpointCompared);
            let oldest_seq = reader.survey.superblock.oldest_seq();
            if oldest_seq > 0 && cut > oldest_seq {
                self.happened(Happening::CheckpointAfterBase);
            }
        }
        self.compare_points(&reader)?;
        self.flip_a_bit()
    }

    /// Every checkpoint that must be listed is, and no other.
    fn check_listed(&mut self, reader: &Reader) -> Result<(), String> {
        let superblock = &reader.survey.superblock;
        let (oldest_seq, newest_seq) = (superblock.oldest_seq(), reader.newest_seq());
        if newest_seq < self.model.acked {
            return Err(format!(
                "the history ends at {newest_seq}, but {} was acknowledged",
                self.model.acked
            ));
        }
        let listed: Vec<u64> = reader.catalogue().checkpoints().iter().map(|entry| entry.seq).collect();
        let mut inside_sync = 0;
        for promise in self.model.promises() {
            let there = promise.seq <= newest_seq
                && promise.checkpoint.cut >= oldest_seq
                && promise.seq > oldest_seq
                && !superblock.state.is_base_sync();
            if there && promise.counts != listed.contains(&promise.seq) {
                let (cut, seq, counts) = (promise.checkpoint.cut, promise.seq, promise.counts);
                return Err(format!("checkpoint {seq} with cut {cut}: counts {counts}, listed {}", !counts));
            }
            inside_sync += u64::from(there && !promise.counts);
        }
        if inside_sync > 0 {
            self.happened(Happening::CheckpointInsideSync);
        }
        Ok(())
    }

    /// Any number of the history opens, not only a checkpoint's.
    fn compare_points(&mut self, reader: &Reader) -> Result<(), String> {
        if reader.survey.superblock.state.is_base_sync() {
            return Ok(());
        }
        for _ in 0..2 {
            let oldest_seq = reader.survey.superblock.oldest_seq();
            let seq = self.model.any_seq(oldest_seq, reader.newest_seq());
            let expected = self.model.replay(seq);
            match (reader.view(seq), expected) {
                (Ok(view), Some(expected)) => {
                    let found =
                        self.read_image(&view).map_err(|error| format!("read at {seq}: {error:?}"))?;
                    if let Some(place) = differs(&expected, &found) {
                        return Err(format!("the view at {seq} differs from the stream {place}"));
                    }
                    self.happened(Happening::PointCompared);
                }
                (Err(ViewError::InsideSync { .. }), None) => {}
                (Ok(_), None) => return Err(format!("a view opened at {seq}, inside a sync")),
                (Err(error), _) => return Err(format!("the view at {seq} doesn't open: {error:?}")),
            }
        }
        Ok(())
    }

    /// Whatever a flipped bit does, nothing wrong is shown.
    fn flip_a_bit(&mut self) -> Result<(), String> {
        let within =
            if self.rng.one_in(4) { 0..FIRST_SLOT_OFFSET_BYTES } else { FIRST_SLOT_OFFSET_BYTES..u64::MAX };
        if self.disk.flip_bit(self.journal, within).is_none() {
            return Ok(());
        }
        let mut storage = self.disk.storage();
        let Ok(reader) = Reader::open(&mut storage, self.journal, SurveyOptions::default()) else {
            self.happened(Happening::FlipNoticed);
            return Ok(());
        };
        let mut noticed = reader.newest_seq() < self.model.acked || reader.survey.damage.is_some();
        for entry in reader.catalogue().checkpoints() {
            let cut = entry.checkpoint.cut;
            let found = reader.view(cut).and_then(|view| self.read_image(&view));
            match found {
                Ok(found) => {
                    self.compare(cut, &found).map_err(|what| format!("after a bit flipped: {what}"))?;
                }
                Err(ViewError::Corrupt { .. }) => noticed = true,
                Err(error) => return Err(format!("after a bit flipped: {error:?}")),
            }
        }
        self.happened(if noticed { Happening::FlipNoticed } else { Happening::FlipHarmless });
        Ok(())
    }
}

/// Where two images differ.
fn differs(expected: &Image, found: &Image) -> Option<String> {
    for (volume, (expected, found)) in expected.iter().zip(found).enumerate() {
        if let Some(at) = expected.iter().zip(found).position(|(left, right)| left != right) {
            return Some(format!("at {at} of volume {volume}"));
        }
    }
    (expected.len() != found.len() || found.len() != VOLUME_COUNT).then(|| "in the number of volumes".into())
}
