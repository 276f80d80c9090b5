//! A receiver with its files, driven one second at a time.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use journal::batch::{
    BatchLink, BatchSealer, Checkpoint, CheckpointKind, Epoch, MAX_RECORD_PAYLOAD, PushError, Record,
};
use journal::crypt::Encryption;
use journal::format::VolumeState;
use journal::promotion::{PromotionAction, PromotionFile, TransferSizes};
use journal::recovery::{NewJournal, OpenOptions, SurveyOptions, create, open};
use journal::storage::ring::{Access, DirectFile, RingStorage};
use journal::storage::{AlignedBuf, Blocking, Completion, FileId, Purpose, Storage};
use journal::view::Reader;
use journal::writer::{Limits, Writer};
use uuid::Uuid;
use vra::api::{GenerationId, JournalId, VmId, VolumeId, VpgId};
use vra::clock::Now;
use vra::receive::{Receiver, ReceiverEvent, ReceiverOutput, ReceiverPolicy, StreamId, VmIdentity};
use vra::wire::{Frame, Grant, Open, VolumeShape};

use super::CurveSettings;
use crate::sample_journal::SampleFolder;

const DISK_BYTES: u64 = 64 << 20;
const ID: Uuid = Uuid::from_u128(7);
const STREAM: StreamId = StreamId(1);
/// When the first second begins, in microseconds since the Unix epoch.
const START_US: u64 = 1_700_000_000_000_000;

pub(super) struct Target {
    folder: SampleFolder,
    storage: RingStorage,
    journal: FileId,
    disk: FileId,
    receiver: Receiver,
    routes: Vec<(u64, Part)>,
    next_token: u64,
    link: BatchLink,
    seq: u64,
    durable_seq: u64,
    elapsed_s: u64,
    /// What the last write put where.
    newest: (u64, Vec<u8>),
}

#[derive(Clone, Copy)]
enum Part {
    Journal(u64),
    Disk(u64),
    Promotion(u64),
}

impl Target {
    pub(super) fn create(settings: &CurveSettings) -> Result<Self> {
        let folder = SampleFolder::new()?;
        std::fs::File::create(folder.disk(0))?.set_len(DISK_BYTES)?;
        let mut storage = RingStorage::new(256).context("io_uring")?;
        let journal = storage.add_file(DirectFile::open(&folder.journal(), Access::Create)?);
        let volume = VolumeState { id: ID, base_seq: 0, size_bytes: DISK_BYTES, fresh_image: true };
        let new = NewJournal {
            journal_id: ID,
            vm_id: ID,
            vpg_id: ID,
            slot_len_bytes: settings.slot_len_bytes,
            slot_count: 4,
            volumes: vec![volume],
            manifest: "{}".into(),
            encryption: Encryption::Never,
        };
        create(&mut storage, journal, &new)?;
        let opened = open(&mut storage, journal, &OpenOptions::default())?;
        let disk = storage.add_file(DirectFile::open(&folder.disk(0), Access::Exclusive)?);
        let limits =
            Limits { max_slots: settings.max_slots, min_slots: 0, grow_slots: 1, group_bytes: 8 << 20 };
        let policy = ReceiverPolicy {
            limits,
            // As the product sets it for a checkpoint every second.
            history_us: (settings.history_s + 2) * 1_000_000,
            promotion: TransferSizes::default(),
            give_up_history: false,
            window_bytes: 64 << 20,
        };
        let shape = VolumeShape {
            volume: 0,
            id: VolumeId(ID),
            logical_block_bytes: 4096,
            size_bytes: DISK_BYTES,
            left: false,
        };
        let identity = VmIdentity { vm: VmId(ID), journal: JournalId(ID), volumes: vec![shape] };
        let writer = Writer::new(opened, limits);
        let receiver = Receiver::new(identity, policy, writer, Vec::new(), &[false]);
        let link = BatchLink { journal_id: ID, generation: ID, open_count: 0, prev_batch_crc: 0 };
        let mut target = Self {
            folder,
            storage,
            journal,
            disk,
            receiver,
            routes: Vec::new(),
            next_token: 0,
            link,
            seq: 0,
            durable_seq: 0,
            elapsed_s: 0,
            newest: (0, Vec::new()),
        };
        target.connect(shape)?;
        Ok(target)
    }

    /// Opens the stream, and ends the first sync.
    fn connect(&mut self, shape: VolumeShape) -> Result<()> {
        let open = Open {
            features_offered: 0,
            features_required: 0,
            vm: VmId(ID),
            vpg: VpgId(ID),
            journal: JournalId(ID),
            generation: GenerationId(ID),
            ancestors: Vec::new(),
            first_seq: 1,
            volumes: vec![shape],
        };
        self.receiver.open(STREAM, open, self.now());
        self.drive()?;
        ensure!(self.link.open_count > 0, "the stream was not granted");
        let mut sealer = BatchSealer::new();
        self.seq = 2;
        sealer.push(Record::sync_begin(1, START_US, 0, DISK_BYTES, 1))?;
        sealer.push(Record::sync_end(2, START_US, 0, DISK_BYTES, 1))?;
        self.send(&mut sealer)
    }

    /// One second of the load, and a checkpoint at its end.
    pub(super) fn second(&mut self, bytes: u64) -> Result<()> {
        let mut sealer = BatchSealer::new();
        let mut left_bytes = bytes;
        while left_bytes > 0 {
            let len_bytes = left_bytes.min(64 << 10);
            left_bytes -= len_bytes;
            self.seq += 1;
            // All over the disk, in an order that is no disk's.
            let place = self.seq.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
            let offset_bytes = place % ((DISK_BYTES - len_bytes) / 4096) * 4096;
            let data = self.seq.to_le_bytes().repeat(len_bytes as usize / 8);
            debug_assert!(data.len() <= MAX_RECORD_PAYLOAD);
            self.newest = (offset_bytes, data.clone());
            let record = Record::write(self.seq, self.now().wall_us, 0, offset_bytes, data.into());
            if let Err(error) = sealer.push(record) {
                let PushError::Full(record) = error else { bail!(error) };
                self.send(&mut sealer)?;
                sealer.push(*record)?;
            }
        }
        let (cut, time_us) = (self.seq, self.now().wall_us);
        let epoch = Epoch { nonce: ID, counter: cut };
        let kind = CheckpointKind::Automatic;
        let checkpoint = Checkpoint { epoch, cut, member_set_version: 1, time_us, kind, tag: String::new() };
        self.seq += 1;
        let record = Record::checkpoint(self.seq, time_us, &checkpoint);
        if let Err(error) = sealer.push(record) {
            let PushError::Full(record) = error else { bail!(error) };
            self.send(&mut sealer)?;
            sealer.push(*record)?;
        }
        self.send(&mut sealer)?;
        self.elapsed_s += 1;
        self.drive()?;
        ensure!(self.durable_seq == self.seq, "durable is {}, sent {}", self.durable_seq, self.seq);
        Ok(())
    }

    pub(super) fn occupied_bytes(&self) -> Result<u64> {
        Ok(std::fs::metadata(self.folder.journal())?.blocks() * 512)
    }

    /// When the oldest checkpoint was taken, in seconds since the load's begin.
    pub(super) fn oldest_checkpoint_s(&self) -> Option<u64> {
        self.receiver.status().history.map(|history| (history.from_us - START_US) / 1_000_000)
    }

    /// Whether the last write is in a view of the newest checkpoint.
    pub(super) fn is_whole(&mut self) -> Result<bool> {
        let reader = Reader::open(&mut self.storage, self.journal, &SurveyOptions::default())?;
        let newest = reader.catalogue().checkpoints().last().context("no checkpoint")?.checkpoint.cut;
        let view = reader.view(newest)?.take_volume(0)?;
        let (offset_bytes, expected) = &self.newest;
        let (mut found, disk) = (vec![0; expected.len()], self.disk);
        view.read(&mut self.storage, self.journal, *offset_bytes, &mut found, |storage, at, into| {
            into.copy_from_slice(&Blocking::new(storage, disk, Purpose::View).read(at, into.len())?);
            Ok(())
        })?;
        Ok(found == *expected)
    }

    fn now(&self) -> Now {
        let elapsed_us = self.elapsed_s * 1_000_000;
        Now { mono_us: elapsed_us, wall_us: START_US + elapsed_us }
    }

    fn send(&mut self, sealer: &mut BatchSealer) -> Result<()> {
        let batch = sealer.seal(&self.link, 0).context("an empty batch")?;
        self.link.prev_batch_crc = batch.crc;
        let bytes: Bytes = AlignedBuf::gather(&batch.pieces().cloned().collect::<Vec<_>>()).into_bytes();
        self.receiver.batch(STREAM, bytes, self.now());
        self.drive()
    }

    /// Runs everything that the receiver wants, until it wants nothing more.
    fn drive(&mut self) -> Result<()> {
        let mut done = Vec::<Completion>::new();
        loop {
            while let Some(output) = self.receiver.poll(self.now()) {
                self.output(output)?;
            }
            if self.routes.is_empty() {
                return Ok(());
            }
            self.storage.collect(true, &mut done)?;
            for Completion { token, result } in done.drain(..) {
                let index =
                    self.routes.iter().position(|(id, _)| *id == token).context("an unknown operation")?;
                let now = self.now();
                match self.routes.swap_remove(index).1 {
                    Part::Journal(token) => self.receiver.journal_done(token, result.map(drop), now),
                    Part::Disk(token) => self.receiver.disk_done(token, result, now),
                    Part::Promotion(token) => self.receiver.promotion_done(token, result, now),
                }
            }
        }
    }

    fn output(&mut self, output: ReceiverOutput) -> Result<()> {
        let (file, part, purpose, op) = match output {
            ReceiverOutput::Journal(action) => {
                (self.journal, Part::Journal(action.token), action.purpose, action.op)
            }
            ReceiverOutput::Disk(action) => {
                (self.disk, Part::Disk(action.token), Purpose::RecoveryDisk, action.op)
            }
            ReceiverOutput::Promotion(PromotionAction { token, file, purpose, op }) => {
                let file = if file == PromotionFile::Journal { self.journal } else { self.disk };
                (file, Part::Promotion(token), purpose, op)
            }
            ReceiverOutput::ManifestWritten { .. } => return Ok(()),
            ReceiverOutput::Send { frame: Frame::Grant(Grant { open_count, .. }), .. } => {
                self.link.open_count = open_count;
                return Ok(());
            }
            ReceiverOutput::Send { frame: Frame::Ack(ack), .. } => {
                self.durable_seq = ack.durable_through;
                return Ok(());
            }
            ReceiverOutput::Event(ReceiverEvent::Failed { failure, .. }) => bail!(failure),
            ReceiverOutput::Send { frame, .. } => bail!("the target says {frame:?}"),
            ReceiverOutput::Close { .. } | ReceiverOutput::Event(_) => return Ok(()),
        };
        let token = self.next_token;
        self.next_token += 1;
        self.routes.push((token, part));
        self.storage.submit(file, token, purpose, op);
        Ok(())
    }
}

/// Where the files are, for whoever looks while it runs.
impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let folder: PathBuf = self.folder.path().to_path_buf();
        f.debug_struct("Target").field("folder", &folder).field("seq", &self.seq).finish_non_exhaustive()
    }
}
