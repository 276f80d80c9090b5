//! A journal and its recovery disk on a simulated disk, and a stream into it: for tests of what a failing disk does.
#![allow(dead_code, reason = "each test uses a part of it")]

use bytes::Bytes;
use journal::bad_ranges::BadRanges;
use journal::batch::{BatchLink, BatchSealer, BatchView, Checkpoint, CheckpointKind, Epoch, Record};
use journal::crypt::{Encryption, Keys, NewKey, SiteKey, SiteKeys};
use journal::format::{VolumeState, slot_offset_bytes};
use journal::promotion::{Promoted, Promotion, PromotionError, PromotionFile, TransferSizes};
use journal::recovery::{
    NewJournal, OpenError, OpenOptions, Opened, Survey, SurveyOptions, create, open, survey,
};
use journal::storage::sim::{SimDisk, SimStorage};
use journal::storage::{Blocking, FileId, Op, Purpose, Storage};
use journal::writer::{Change, ClosedSegment, Event, Limits, Writer, drive};
use uuid::Uuid;

pub(crate) const SLOT_BYTES: u64 = 64 << 10;
pub(crate) const VOLUME_BYTES: u64 = 1 << 20;
const JOURNAL_ID: Uuid = Uuid::from_u128(1);
const GENERATION: Uuid = Uuid::from_u128(0x6e);
const LIMITS: Limits = Limits { max_slots: 12, min_slots: 0, grow_slots: 1, group_bytes: 1 << 20 };

/// The files.
pub(crate) struct Site {
    pub(crate) disk: SimDisk,
    pub(crate) journal: FileId,
    pub(crate) recovery_disk: FileId,
    pub(crate) keys: Keys,
}

impl Site {
    pub(crate) fn new(slot_count: u32) -> Self {
        Self::seeded(slot_count, 1)
    }

    /// One whose disk has other luck.
    pub(crate) fn seeded(slot_count: u32, seed: u64) -> Self {
        Self::of(slot_count, Encryption::Never, Keys::default(), seed)
    }

    pub(crate) fn encrypted(slot_count: u32) -> Self {
        let site_key = SiteKey::new([7; SiteKey::LEN_BYTES].into());
        let key = NewKey::seeded(4).wrap(JOURNAL_ID, &site_key);
        let keys = Keys::seeded(SiteKeys::new(vec![site_key]), 5);
        Self::of(slot_count, Encryption::On(key), keys, 1)
    }

    fn of(slot_count: u32, encryption: Encryption, keys: Keys, seed: u64) -> Self {
        let disk = SimDisk::new(seed);
        let (journal, recovery_disk) = (disk.add_file(), disk.add_file());
        let id = Uuid::from_u128(5);
        let volume = VolumeState { id, base_seq: 0, size_bytes: VOLUME_BYTES, fresh_image: true };
        let new = NewJournal {
            journal_id: JOURNAL_ID,
            vm_id: Uuid::from_u128(2),
            vpg_id: Uuid::from_u128(3),
            slot_len_bytes: SLOT_BYTES,
            slot_count,
            volumes: vec![volume],
            manifest: "{}".into(),
            encryption,
        };
        create(&mut disk.storage(), journal, &new).expect("create");
        let reserve = Op::Allocate { offset_bytes: 0, len_bytes: VOLUME_BYTES };
        Blocking::new(&mut disk.storage(), recovery_disk, Purpose::RecoveryDisk)
            .run(reserve)
            .expect("reserved");
        Self { disk, journal, recovery_disk, keys }
    }

    pub(crate) fn open(&self) -> Result<Opened, OpenError> {
        let options = OpenOptions { keys: self.keys.clone(), ..OpenOptions::default() };
        open(&mut self.disk.storage(), self.journal, &options)
    }

    pub(crate) fn survey(&self) -> Survey {
        let options = SurveyOptions { keys: self.keys.site().clone(), ..SurveyOptions::default() };
        survey(&mut self.disk.storage(), self.journal, &options).expect("readable")
    }

    /// The next writer, whose stream owns the tail.
    pub(crate) fn target(&self) -> Target<'_> {
        self.target_of(self.open().expect("open"))
    }

    /// The same after a failure of which no more is known to be durable than up to this number.
    pub(crate) fn target_that_trusts(&self, through_seq: u64) -> Target<'_> {
        let trusted_through = Some(through_seq);
        let options = OpenOptions { keys: self.keys.clone(), trusted_through, ..OpenOptions::default() };
        self.target_of(open(&mut self.disk.storage(), self.journal, &options).expect("open"))
    }

    fn target_of(&self, opened: Opened) -> Target<'_> {
        let writer = Writer::new(opened, LIMITS);
        let sealer = BatchSealer::new();
        let (storage, lost) = (self.disk.storage(), BadRanges::default());
        let mut target = Target { site: self, storage, writer, sealer, seq: 0, crc: 0, lost };
        let claim = Change::Claim { generation: GENERATION, parent: Uuid::nil(), first_seq: 1 };
        target.change(claim);
        let durable = target.writer.durable();
        (target.seq, target.crc) = (durable.seq, durable.batch_crc);
        target
    }

    /// Pages of the journal's file read zeroes, durably.
    pub(crate) fn zero_pages(&self, offset_bytes: u64, count: usize) {
        let mut storage = self.disk.storage();
        let mut io = Blocking::new(&mut storage, self.journal, Purpose::Append);
        io.write(offset_bytes, vec![0; count * 4096]).expect("written");
        io.sync().expect("synced");
    }

    /// How much space the journal's file takes, in bytes.
    pub(crate) fn journal_used_bytes(&self) -> u64 {
        self.disk.used_bytes() - VOLUME_BYTES
    }

    /// A place in a slot, as one of the file.
    pub(crate) fn place(slot: u32, slot_offset: u64) -> u64 {
        slot_offset_bytes(slot, SLOT_BYTES) + slot_offset
    }
}

/// A writer with its stream: batches follow one another as a source would send them.
pub(crate) struct Target<'a> {
    site: &'a Site,
    storage: SimStorage,
    pub(crate) writer: Writer,
    sealer: BatchSealer,
    pub(crate) seq: u64,
    crc: u32,
    /// What can't be trusted of the recovery disk, as the last promotion found it.
    pub(crate) lost: BadRanges,
}

impl Target<'_> {
    pub(crate) fn drive(&mut self) -> Vec<Event> {
        drive(&mut self.writer, &mut self.storage, self.site.journal).expect("the process lives")
    }

    pub(crate) fn change(&mut self, change: Change) -> Vec<Event> {
        self.writer.change(change).expect("allowed");
        self.drive()
    }

    pub(crate) fn push(&mut self, make: impl FnOnce(u64) -> Record) {
        self.seq += 1;
        self.sealer.push(make(self.seq)).expect("fits");
    }

    /// A write of pages that have one byte each.
    pub(crate) fn write(&mut self, offset_bytes: u64, fills: &[u8]) {
        let bytes: Bytes = fills.iter().flat_map(|fill| [*fill; 4096]).collect::<Vec<_>>().into();
        self.push(|seq| Record::write(seq, seq, 0, offset_bytes, bytes));
    }

    pub(crate) fn checkpoint(&mut self, tag: &str) {
        let cut = self.seq;
        let epoch = Epoch { nonce: Uuid::from_u128(77), counter: cut };
        let (kind, tag) = (CheckpointKind::Tagged, tag.to_owned());
        let checkpoint =
            Checkpoint { epoch, cut, member_set_version: 1, time_us: 1_000_000 + cut, kind, tag };
        self.push(|seq| Record::checkpoint(seq, 1, &checkpoint));
    }

    fn seal_batch(&mut self) -> Bytes {
        let link = BatchLink {
            journal_id: JOURNAL_ID,
            generation: GENERATION,
            open_count: self.writer.superblock().open_count,
            prev_batch_crc: self.crc,
        };
        let batch = self.sealer.seal(&link, 0).expect("not empty");
        self.crc = batch.crc;
        batch.to_bytes()
    }

    /// What was pushed is offered as one batch that was received at `1000 · number of its last record`.
    pub(crate) fn offer(&mut self) {
        let batch = self.seal_batch();
        let view = BatchView::parse(&batch).expect("valid");
        self.writer.offer(batch.clone(), &view, 1000 * self.seq).expect("offered");
    }

    /// The same, and it is durable.
    pub(crate) fn append(&mut self) {
        self.offer();
        let events = self.drive();
        assert!(events.iter().any(|event| matches!(event, Event::Durable(point) if point.seq == self.seq)));
    }

    /// The first sync, of nothing, or one after the history was given up, and its end.
    pub(crate) fn base_sync(&mut self) {
        self.change(Change::BeginBaseSync { sync_id: 9 });
        self.push(|seq| Record::sync_begin(seq, 1, 0, VOLUME_BYTES, 9));
        self.push(|seq| Record::sync_end(seq, 1, 0, VOLUME_BYTES, 9));
        let batch = self.seal_batch();
        let view = BatchView::parse(&batch).expect("valid");
        let through = self.writer.accept_for_base(&view, 1).expect("accepted");
        self.change(Change::AdvanceBase { through, end: true });
    }

    /// Says whether the process lives on.
    pub(crate) fn drive_or_die(&mut self) -> bool {
        drive(&mut self.writer, &mut self.storage, self.site.journal).is_ok()
    }

    /// Until the process dies.
    pub(crate) fn drive_to_death(&mut self) {
        drive(&mut self.writer, &mut self.storage, self.site.journal).expect_err("a crash was armed");
    }

    /// Other limits: how many slots there may be, and how many keep their space.
    pub(crate) fn limit(&mut self, max_slots: u32, min_slots: u32) {
        self.writer.retry(Limits { max_slots, min_slots, ..LIMITS });
        self.drive();
    }

    /// Promotes the oldest closed segments.
    pub(crate) fn promote(&mut self, count: usize) {
        let Promoted { through, size_bytes, bad_ranges, .. } = self.carry(count).expect("promoted");
        self.change(Change::EndPromotion { through, size_bytes, bad_ranges });
    }

    /// Carries the oldest closed segments to the recovery disk.
    pub(crate) fn carry(&mut self, count: usize) -> Result<Promoted, PromotionError> {
        let segments: Vec<_> = self.writer.closed_segments().take(count).cloned().collect();
        let through = segments.last().expect("a closed segment").last;
        self.change(Change::AnnouncePromotion { through });
        let mut promotion = self.promotion(segments);
        let ended = self.run(&mut promotion);
        self.lost = promotion.bad_ranges_with_lost();
        ended?;
        Ok(promotion.promoted().expect("nothing is left to do"))
    }

    /// Finds out what the oldest closed segments hold, as before an announcement.
    pub(crate) fn look(&mut self, count: usize) -> Result<(), PromotionError> {
        let segments: Vec<_> = self.writer.closed_segments().take(count).cloned().collect();
        let mut promotion = self.promotion(segments).before_announcing();
        self.run(&mut promotion)?;
        assert!(promotion.waits_for_announcement() && promotion.promoted().is_none());
        Ok(())
    }

    fn promotion(&self, segments: Vec<ClosedSegment>) -> Promotion {
        let superblock = self.writer.superblock().clone();
        let (bad_ranges, sizes) = (self.writer.bad_ranges().clone(), TransferSizes::default());
        Promotion::new(superblock, bad_ranges, segments, vec![false], sizes)
    }

    /// Does what it wants done, until it wants nothing more.
    fn run(&mut self, promotion: &mut Promotion) -> Result<(), PromotionError> {
        let mut done = Vec::new();
        loop {
            while let Some(action) = promotion.poll_action(1 << 20) {
                let file = match action.file {
                    PromotionFile::Journal => self.site.journal,
                    PromotionFile::Disk(_) => self.site.recovery_disk,
                };
                self.storage.submit(file, action.token, action.purpose, action.op);
            }
            if !promotion.is_busy() {
                return Ok(());
            }
            self.storage.collect(true, &mut done).expect("the process lives");
            for completion in done.drain(..) {
                promotion.done(completion.token, completion.result)?;
            }
        }
    }
}
