//! The target: a process with the journal's writer, and the stream that reaches it.

use bytes::Bytes;
use journal::batch::{BatchLink, BatchSealer, BatchView, PushError, Record, RecordKind};
use journal::format::ChainPoint;
use journal::planted::{Bug, planted};
use journal::storage::sim::{SimRng, SimStorage};
use journal::storage::{Blocking, FileId, Purpose, Storage};
use journal::writer::{Change, Event, Grant, OfferError, State, Writer};
use uuid::Uuid;

use super::model::{DISK_BYTES, Model};

/// The journal that the world has.
pub(super) const JOURNAL_ID: Uuid = Uuid::from_u128(0x70);

/// Batches are kept short, so that a slot takes several.
const LONGEST_BATCH_BYTES: usize = 24 << 10;

/// The target's process is dead, or the storage failed in a way that ends what it was doing.
#[derive(Debug)]
pub(super) struct Broken;

#[derive(Debug)]
pub(super) struct Target {
    pub(super) storage: SimStorage,
    pub(super) writer: Writer,
    disk_storage: SimStorage,
    journal: FileId,
    disks: Vec<FileId>,
    under_way: usize,
    /// Set while a stream may send.
    pub(super) grant: Option<Grant>,
    sent_through: u64,
    prev_batch_crc: u32,
    /// How many volumes have ended the sync that goes to the recovery disks.
    ended: usize,
    /// A change that the stream waits for.
    awaited: Option<u64>,
    /// A recovery disk failed: the process ends itself.
    pub(super) gave_up: bool,
}

impl Target {
    pub(super) fn new(
        [storage, disk_storage]: [SimStorage; 2],
        writer: Writer,
        journal: FileId,
        disks: Vec<FileId>,
    ) -> Self {
        Self {
            storage,
            writer,
            disk_storage,
            journal,
            disks,
            under_way: 0,
            grant: None,
            sent_through: 0,
            prev_batch_crc: 0,
            ended: 0,
            awaited: None,
            gave_up: false,
        }
    }

    /// Lets the storage do at most `steps` operations; gives what happened.
    pub(super) fn pump(&mut self, steps: usize) -> Result<Vec<Event>, Broken> {
        let mut done = Vec::new();
        for _ in 0..steps {
            while let Some(action) = self.writer.next_action() {
                self.storage.submit(self.journal, action.token, action.purpose, action.op);
                self.under_way += 1;
            }
            if self.under_way == 0 {
                break;
            }
            self.storage.collect(true, &mut done).map_err(|_| Broken)?;
            for completion in done.drain(..) {
                self.under_way -= 1;
                self.writer.done(completion.token, completion.result.map(drop));
            }
        }
        Ok(std::iter::from_fn(|| self.writer.poll_event()).collect())
    }

    pub(super) fn is_idle(&self) -> bool {
        self.under_way == 0 && self.writer.is_idle()
    }

    /// A change is durable.
    pub(super) fn changed(&mut self, ticket: u64) {
        if self.awaited == Some(ticket) {
            self.awaited = None;
        }
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.awaited.is_some()
    }

    /// The stream waits for a change before it sends more.
    pub(super) fn wait_for(&mut self, ticket: u64) {
        self.awaited = Some(ticket);
    }

    /// The stream may send from here on.
    pub(super) fn granted(&mut self, grant: Grant) {
        self.grant = Some(grant);
        self.sent_through = grant.durable.seq;
        self.prev_batch_crc = grant.durable.batch_crc;
        self.ended = 0;
    }

    /// Sends a batch of the records that were not sent yet.
    pub(super) fn ship(&mut self, model: &mut Model, rng: &mut SimRng) -> Result<(), String> {
        let Some(grant) = self.grant else { return Ok(()) };
        let records = model.records_after(self.sent_through);
        if records.is_empty() || self.awaited.is_some() || self.writer.state() != State::Running {
            return Ok(());
        }
        let count = (1 + rng.below(model.most_records()) as usize).min(records.len());
        let mut sealer = BatchSealer::new();
        let mut last_time_us = 0;
        for record in &records[..count] {
            if !sealer.is_empty() && sealer.len_bytes() + record.payload.len() > LONGEST_BATCH_BYTES {
                break;
            }
            match sealer.push(record.clone()) {
                Ok(()) => last_time_us = record.time_us,
                Err(PushError::Full(_)) => break,
                Err(error) => return Err(format!("sealing: {error}")),
            }
        }
        let link = BatchLink {
            journal_id: JOURNAL_ID,
            generation: model.generation,
            open_count: grant.open_count,
            prev_batch_crc: self.prev_batch_crc,
        };
        let batch = sealer.seal(&link, 0).ok_or("an empty batch")?;
        let bytes = batch.to_bytes();
        let view = BatchView::parse(&bytes).map_err(|error| format!("parsing: {error}"))?;
        let offered = if self.writer.superblock().state.is_base_sync() {
            self.receive_for_base(&bytes, &view, last_time_us)
        } else {
            self.writer.offer(bytes.clone(), &view, last_time_us).map_err(Refusal::Offer)
        };
        match offered {
            Ok(()) => {
                (self.sent_through, self.prev_batch_crc) = (batch.last_seq, batch.crc);
                model.note_sent(ChainPoint { seq: batch.last_seq, batch_crc: batch.crc });
                Ok(())
            }
            // The process is about to be found dead or poisoned, or gives up because a recovery disk failed.
            Err(Refusal::Broken | Refusal::Offer(OfferError::Poisoned)) => {
                self.grant = None;
                self.gave_up = true;
                Ok(())
            }
            Err(Refusal::Offer(error)) => Err(format!("the target refused a good batch: {error}")),
        }
    }

    /// Records go to the recovery disks; the base moves when they are durable there (B6).
    fn receive_for_base(&mut self, bytes: &Bytes, view: &BatchView<'_>, time_us: u64) -> Result<(), Refusal> {
        let through = self.writer.accept_for_base(view, time_us).map_err(Refusal::Offer)?;
        for record in view.records() {
            let record = record.to_record(bytes);
            self.apply(&record)?;
            match record.kind {
                RecordKind::SyncBegin => self.ended = 0,
                RecordKind::SyncEnd => self.ended += 1,
                _ => {}
            }
        }
        if !planted(Bug::BaseBeforeDiskSync) {
            for disk in self.disks.clone() {
                self.blocking(disk).sync().map_err(|_| Refusal::Broken)?;
            }
        }
        let end = self.ended == DISK_BYTES.len();
        if self.ended > 0 && !end {
            // Which volumes have ended is known to this process only: the base stays before the first end.
            return Ok(());
        }
        let ticket = self.writer.change(Change::AdvanceBase { through, end }).map_err(|_| Refusal::Broken)?;
        if end {
            // What follows is journaled, once that is durable.
            self.awaited = Some(ticket);
        }
        Ok(())
    }

    fn apply(&mut self, record: &Record) -> Result<(), Refusal> {
        let data = match record.kind {
            RecordKind::Write | RecordKind::SyncData => record.payload.clone(),
            RecordKind::Zeroes => vec![0; record.len_bytes as usize].into(),
            _ => return Ok(()),
        };
        let disk = self.disks[usize::from(record.volume)];
        self.blocking(disk).write(record.offset_bytes, data).map_err(|_| Refusal::Broken)
    }

    fn blocking(&mut self, file: FileId) -> Blocking<'_, SimStorage> {
        Blocking::new(&mut self.disk_storage, file, Purpose::RecoveryDisk)
    }
}

enum Refusal {
    Broken,
    Offer(OfferError),
}
