//! A real journal in a real file with its recovery disk, written through the journal's own writer, and a model of what the volume
//! was at each record.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use journal::batch::{BatchLink, BatchSealer, BatchView, Checkpoint, CheckpointKind, Epoch, Record};
use journal::crypt::{Encryption, Keys, NewKey, SiteKey, SiteKeys};
use journal::format::VolumeState;
use journal::promotion::{Promotion, PromotionFile, TransferSizes};
use journal::recovery::{NewJournal, OpenOptions, SurveyOptions, create, each_footer_mended, open};
use journal::storage::ring::{Access, DirectFile, RingStorage};
use journal::storage::{Blocking, FileId, Purpose};
use journal::view::{Reader, ViewError, VolumeView};
use journal::writer::{Change, Limits, Writer, drive};
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use uuid::Uuid;

const GENERATION: Uuid = Uuid::from_u128(0x6e);
const JOURNAL_ID: Uuid = Uuid::from_u128(1);
const LIMITS: Limits = Limits { max_slots: 64, min_slots: 0, grow_slots: 4, group_bytes: 1 << 20 };

/// The journal of a VM with one volume, in a folder of its own that goes with it.
pub(crate) struct TestJournal {
    pub(crate) folder: PathBuf,
    pub(crate) size_bytes: u64,
    pub(crate) seq: u64,
    storage: RingStorage,
    file: FileId,
    pub(crate) writer: Writer,
    sealer: BatchSealer,
    crc: u32,
    keys: Keys,
    /// The recovery disk, and what each record did to the volume.
    base: Vec<u8>,
    changes: Vec<(u64, u64, Vec<u8>)>,
}

impl TestJournal {
    /// A journal whose first sync has ended, in a fresh folder; `manifest` is its text.
    pub(crate) fn new(name: &str, size_bytes: u64, manifest: &str) -> Self {
        Self::in_folder(Self::fresh_folder(name), size_bytes, manifest)
    }

    /// The same, encrypted with a site key of its own.
    pub(crate) fn encrypted(name: &str, size_bytes: u64, manifest: &str) -> Self {
        let site_key = SiteKey::random().expect("random");
        Self::encrypted_by(Some(&site_key), Self::fresh_folder(name), size_bytes, manifest)
    }

    fn fresh_folder(name: &str) -> PathBuf {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("holdfast-view-{name}-{}-{count}", std::process::id());
        std::env::temp_dir().join(name)
    }

    pub(crate) fn in_folder(folder: PathBuf, size_bytes: u64, manifest: &str) -> Self {
        Self::encrypted_by(None, folder, size_bytes, manifest)
    }

    /// The same, encrypted if there is a site key.
    pub(crate) fn encrypted_by(
        site_key: Option<&SiteKey>,
        folder: PathBuf,
        size_bytes: u64,
        manifest: &str,
    ) -> Self {
        let keys = Keys::seeded(SiteKeys::new(site_key.cloned().into_iter().collect()), 5);
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).expect("folder");
        let mut base = vec![0; size_bytes as usize];
        // The second half of the recovery disk is a hole.
        StdRng::seed_from_u64(size_bytes).fill_bytes(&mut base[..size_bytes as usize / 2]);
        let disk = File::create(folder.join("disk-0.raw")).expect("disk");
        disk.write_all_at(&base[..size_bytes as usize / 2], 0).expect("disk");
        disk.set_len(size_bytes).expect("disk");
        let path = folder.join("journal.hfj");
        let mut storage = RingStorage::new(64).expect("io_uring");
        let file = storage.add_file(DirectFile::open(&path, Access::Create).expect("create"));
        let volume = VolumeState { id: Uuid::from_u128(5), base_seq: 0, size_bytes, fresh_image: true };
        let new = NewJournal {
            journal_id: JOURNAL_ID,
            vm_id: Uuid::from_u128(2),
            vpg_id: Uuid::from_u128(3),
            slot_len_bytes: 1 << 20,
            slot_count: 4,
            volumes: vec![volume],
            manifest: manifest.to_owned(),
            encryption: match site_key {
                Some(site_key) => Encryption::On(NewKey::seeded(6).wrap(JOURNAL_ID, site_key)),
                None => Encryption::Never,
            },
        };
        create(&mut storage, file, &new).expect("journal");
        let options = OpenOptions { keys: keys.clone(), ..OpenOptions::default() };
        let opened = open(&mut storage, file, &options).expect("open");
        let writer = Writer::new(opened, LIMITS);
        let (sealer, changes) = (BatchSealer::new(), Vec::new());
        let mut journal =
            Self { folder, size_bytes, seq: 0, storage, file, writer, sealer, crc: 0, keys, base, changes };
        journal.change(Change::Claim { generation: GENERATION, parent: Uuid::nil(), first_seq: 1 });
        journal.crc = journal.writer.durable().batch_crc;
        journal.change(Change::BeginBaseSync { sync_id: 9 });
        journal.push(|seq| Record::sync_begin(seq, 1, 0, size_bytes, 9));
        journal.push(|seq| Record::sync_end(seq, 1, 0, size_bytes, 9));
        let batch = journal.seal();
        let view = BatchView::parse(&batch).expect("valid");
        let through = journal.writer.accept_for_base(&view, 1).expect("accepted");
        journal.change(Change::AdvanceBase { through, end: true });
        journal
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.join("journal.hfj")
    }

    /// Opens the journal for writing once more, as after the death of its writer.
    pub(crate) fn reopen(&mut self) {
        let options = OpenOptions { keys: self.keys.clone(), ..OpenOptions::default() };
        let opened = open(&mut self.storage, self.file, &options).expect("open");
        let mut io = Blocking::new(&mut self.storage, self.file, Purpose::Survey);
        each_footer_mended(&opened.segments, &mut io, &opened.superblock, |_| {}).expect("readable");
        self.writer = Writer::new(opened, LIMITS);
    }

    /// The writer as it is. Another one, of another opening, stays behind.
    pub(crate) fn take_writer(&mut self) -> Writer {
        let options = OpenOptions { keys: self.keys.clone(), ..OpenOptions::default() };
        let opened = open(&mut self.storage, self.file, &options).expect("open");
        std::mem::replace(&mut self.writer, Writer::new(opened, LIMITS))
    }

    pub(crate) fn change(&mut self, change: Change) {
        self.writer.change(change).expect("allowed");
        drive(&mut self.writer, &mut self.storage, self.file).expect("drive");
    }

    pub(crate) fn write(&mut self, offset_bytes: u64, data: Vec<u8>) {
        self.push(|seq| Record::write(seq, seq, 0, offset_bytes, data.clone().into()));
        self.changes.push((self.seq, offset_bytes, data));
    }

    pub(crate) fn zero(&mut self, offset_bytes: u64, len_bytes: u64) {
        self.push(|seq| Record::zeroes(seq, seq, 0, offset_bytes, len_bytes));
        self.changes.push((self.seq, offset_bytes, vec![0; len_bytes as usize]));
    }

    /// The volume grows; the recovery disk doesn't before a promotion.
    pub(crate) fn resize(&mut self, size_bytes: u64) {
        self.push(|seq| Record::resize(seq, seq, 0, size_bytes));
        let more_bytes = (size_bytes - self.size_bytes) as usize;
        self.changes.push((self.seq, self.size_bytes, vec![0; more_bytes]));
        self.size_bytes = size_bytes;
    }

    /// A checkpoint of all so far at `time_us`; its cut.
    #[allow(dead_code, reason = "for tests of the journal tool")]
    pub(crate) fn checkpoint(&mut self, tag: &str, time_us: u64) -> u64 {
        self.group_checkpoint(self.seq, tag, time_us)
    }

    /// The same as one of a group: all its journals have the same `counter`.
    #[allow(dead_code, reason = "for tests of the journal tool")]
    pub(crate) fn group_checkpoint(&mut self, counter: u64, tag: &str, time_us: u64) -> u64 {
        self.checkpoint_over(1, counter, tag, time_us)
    }

    /// The same over another member set.
    pub(crate) fn checkpoint_over(
        &mut self,
        member_set_version: u64,
        counter: u64,
        tag: &str,
        time_us: u64,
    ) -> u64 {
        let cut = self.seq;
        let epoch = Epoch { nonce: Uuid::from_u128(77), counter };
        let kind = if tag.is_empty() { CheckpointKind::Automatic } else { CheckpointKind::Tagged };
        let tag = tag.to_owned();
        let checkpoint = Checkpoint { epoch, cut, member_set_version, time_us, kind, tag };
        self.push(|seq| Record::checkpoint(seq, time_us, &checkpoint));
        cut
    }

    /// Random writes and zeroes of up to `sectors_max` sectors, many of them small and some side by side.
    pub(crate) fn random_changes(&mut self, seed: u64, count: usize, sectors_max: u64) {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut next = 0;
        for _ in 0..count {
            let sectors = if rng.random_bool(0.5) { 8 } else { rng.random_range(1..=sectors_max) };
            let all = self.size_bytes / 512 - sectors;
            let sector = if rng.random_bool(0.4) && next < all { next } else { rng.random_range(0..all) };
            next = sector + sectors;
            if rng.random_bool(0.2) {
                self.zero(sector * 512, sectors * 512);
            } else {
                let mut data = vec![0; sectors as usize * 512];
                rng.fill_bytes(&mut data);
                self.write(sector * 512, data);
            }
            if rng.random_bool(0.2) {
                self.flush();
            }
        }
        self.flush();
    }

    /// Makes everything so far durable.
    pub(crate) fn flush(&mut self) {
        if self.sealer.is_empty() {
            return;
        }
        let batch = self.seal();
        let view = BatchView::parse(&batch).expect("valid");
        self.writer.offer(batch.clone(), &view, 1000 + self.seq).expect("offered");
        drive(&mut self.writer, &mut self.storage, self.file).expect("drive");
        assert_eq!(self.writer.durable().seq, self.seq);
    }

    /// Promotes all sealed segments onto the recovery disk.
    pub(crate) fn promote(&mut self) {
        let segments: Vec<_> = self.writer.closed_segments().cloned().collect();
        let through = segments.last().expect("a sealed segment").last;
        self.change(Change::AnnouncePromotion { through });
        let disk = DirectFile::open(&self.folder.join("disk-0.raw"), Access::Exclusive).expect("disk");
        let disk = self.storage.add_file(disk);
        let sizes =
            TransferSizes { run_max_bytes: 16 << 10, punch_min_bytes: 8 << 10, chunk_bytes: 32 << 10 };
        let superblock = self.writer.superblock().clone();
        let mut promotion =
            Promotion::new(superblock, self.writer.bad_ranges().clone(), segments, vec![false], sizes);
        while let Some(action) = promotion.poll_action(1 << 20) {
            let file = match action.file {
                PromotionFile::Journal => self.file,
                PromotionFile::Disk(_) => disk,
            };
            let result = Blocking::new(&mut self.storage, file, action.purpose).run(action.op);
            promotion.done(action.token, result).expect("it goes on over damage");
        }
        let promoted = promotion.promoted().expect("it has ended");
        let (size_bytes, bad_ranges) = (promoted.size_bytes, promoted.bad_ranges);
        self.change(Change::EndPromotion { through, size_bytes, bad_ranges });
        self.storage.remove_file(disk);
    }

    /// The volume at a record.
    pub(crate) fn model(&self, seq: u64) -> Vec<u8> {
        let mut bytes = self.base.clone();
        for (_, offset_bytes, data) in self.changes.iter().take_while(|(at, _, _)| *at <= seq) {
            let end = *offset_bytes as usize + data.len();
            bytes.resize(bytes.len().max(end), 0);
            bytes[*offset_bytes as usize..end].copy_from_slice(data);
        }
        bytes
    }

    /// What the records after this one have changed of the volume, in order.
    #[allow(dead_code, reason = "for the unit tests")]
    pub(crate) fn changed(&self, after_seq: u64) -> Vec<std::ops::Range<u64>> {
        let changes = self.changes.iter().filter(|(seq, _, _)| *seq > after_seq);
        let mut ranges: Vec<_> =
            changes.map(|(_, offset_bytes, data)| *offset_bytes..offset_bytes + data.len() as u64).collect();
        ranges.sort_unstable_by_key(|range| range.start);
        ranges
    }

    /// The volume's view at a record, found out from the file.
    pub(crate) fn view(&self, seq: u64) -> Result<VolumeView, ViewError> {
        self.view_kept(seq, seq)
    }

    /// The same beneath a scratch that has what was changed up to `kept_seq`.
    pub(crate) fn view_kept(&self, seq: u64, kept_seq: u64) -> Result<VolumeView, ViewError> {
        let mut storage = RingStorage::new(64).expect("io_uring");
        let file = storage.add_file(DirectFile::open(&self.path(), Access::ReadOnly).expect("open"));
        let options = SurveyOptions { keys: self.keys.site().clone(), ..SurveyOptions::default() };
        Reader::open(&mut storage, file, &options)?.view_kept(seq, kept_seq)?.take_volume(0)
    }

    /// Flips a bit in the journal's file where `needle` first occurs, `at` bytes into it.
    pub(crate) fn flip_bit(path: &Path, needle: &[u8], at: usize) {
        let mut bytes = std::fs::read(path).expect("journal");
        let place =
            bytes.windows(needle.len()).position(|window| window == needle).expect("it is in the file");
        bytes[place + at] ^= 4;
        std::fs::write(path, bytes).expect("journal");
    }

    fn push(&mut self, make: impl Fn(u64) -> Record) {
        if self.sealer.push(make(self.seq + 1)).is_err() {
            self.flush();
            self.sealer.push(make(self.seq + 1)).expect("it fits into an empty batch");
        }
        self.seq += 1;
    }

    fn seal(&mut self) -> bytes::Bytes {
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
}

impl Drop for TestJournal {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
