//! The journal alone, beside fio on the same filesystem: appending into slots that were used before, and promoting.

use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use journal::bad_ranges::BadRanges;
use journal::batch::{BatchLink, BatchSealer, BatchView, PushError, Record};
use journal::crypt::{Encryption, Keys, NewKey, SiteKey, SiteKeys};
use journal::format::VolumeState;
use journal::promotion::{Promotion, PromotionFile, TransferSizes};
use journal::recovery::{NewJournal, OpenOptions, SurveyOptions, create, open};
use journal::storage::ring::{Access, DirectFile, RingStorage};
use journal::storage::{AlignedBuf, Completion, FileId, Storage};
use journal::view::Reader;
use journal::writer::{Change, Limits, Writer, drive};
use nix::fcntl::{FallocateFlags, fallocate};
use uuid::Uuid;

use super::{BenchPlace, Benchmark, Better, Pair, in_turn};
use crate::suite::context::Context;

const fn append(name: &'static str, what: &'static str, gate: Option<f64>, pair: PairFn) -> Benchmark {
    Benchmark {
        name,
        what,
        peer: "fio, O_DIRECT",
        unit: "MiB/s",
        better: Better::Higher,
        gate,
        place: BenchPlace::Host,
        programs: &["fio"],
        pair,
    }
}

type PairFn = fn(&mut Context, u32) -> Result<Pair>;

pub(super) const BENCHMARKS: &[Benchmark] = &[
    append(
        "append-64k",
        "records of 64 KiB appended to used slots, durable at the end",
        Some(0.9),
        |context, number| append_pair(context, number, 64 << 10),
    ),
    append("append-1m", "the same with records of 1 MiB", Some(0.9), |context, number| {
        append_pair(context, number, 1 << 20)
    }),
    append("append-4k", "the same with records of 4 KiB", None, |context, number| {
        append_pair(context, number, 4 << 10)
    }),
    Benchmark {
        name: "append-64k-encrypted",
        what: "records of 64 KiB appended to used slots of an encrypted journal",
        peer: "the same, plain",
        unit: "MiB/s",
        better: Better::Higher,
        gate: None,
        place: BenchPlace::Host,
        programs: &[],
        pair: encrypted_pair,
    },
    Benchmark {
        name: "journal-memory",
        what: "memory of a writer that has taken records of 4 KiB, per million",
        peer: "an index of a view of them",
        unit: "MiB",
        better: Better::Lower,
        gate: None,
        place: BenchPlace::Host,
        programs: &[],
        pair: memory_pair,
    },
    append(
        "promote",
        "random 16 KiB blocks from the journal to the recovery disk, synced",
        Some(0.8),
        promote_pair,
    ),
    append(
        "promote-apart",
        "the same from a journal in memory: the disk has nothing to do but what fio's has",
        Some(0.8),
        promote_apart_pair,
    ),
    append(
        "promote-shared",
        "as promote, beside a fio whose disk is read as much meanwhile",
        Some(0.8),
        promote_shared_pair,
    ),
];

/// What one run appends: a virtual disk's pauses of some tens of milliseconds are a small part of it.
const RUN_BYTES: u64 = 3 << 29;
pub(super) const SLOT_BYTES: u64 = 64 << 20;
/// Batches are sealed at this length.
const BATCH_BYTES: usize = 1 << 20;
const SLOT_COUNT: u32 = 32;
pub(super) const JOURNAL_NAME: &str = "journal.hfj";
pub(super) const DISK_NAME: &str = "disk-0.raw";
/// What waits in front of the writer, as much as a target's memory for one stream.
const QUEUE_BYTES: usize = 32 << 20;
/// fio syncs as often as the writer: after each 8 MiB.
const FIO_SYNC_EVERY: &str = "--fdatasync=8";
/// The disk that is promoted to, and what of it is written.
const DISK_BYTES: u64 = 1 << 30;
const BLOCK_BYTES: u64 = 16 << 10;
const BLOCKS: u64 = 16 << 10;

fn append_pair(context: &mut Context, number: u32, record_bytes: usize) -> Result<Pair> {
    in_turn(number, || append_run(context, record_bytes, false), || fio_append(context))
}

fn encrypted_pair(context: &mut Context, number: u32) -> Result<Pair> {
    in_turn(number, || append_run(context, 64 << 10, true), || append_run(context, 64 << 10, false))
}

/// Records of one run of `journal-memory`.
const MEMORY_COUNT: u64 = 250_000;

fn memory_pair(context: &mut Context, _number: u32) -> Result<Pair> {
    let folder = context.path("memory");
    let before_bytes = heap_bytes();
    let mut journal = Journal::create(&folder, 1 << 40, SLOT_COUNT)?;
    let mut left = MEMORY_COUNT;
    while left > 0 {
        let count = left.min(50_000);
        let batches =
            journal.batches(count, 4096, |seq| seq.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (1 << 28) * 4096)?;
        journal.append(&batches)?;
        left -= count;
    }
    let while_ingesting_bytes = heap_bytes().saturating_sub(before_bytes);
    let mut storage = RingStorage::new(64)?;
    let file = storage.add_file(DirectFile::open(&folder.join(JOURNAL_NAME), Access::ReadOnly)?);
    let reader = Reader::open(&mut storage, file, &SurveyOptions::default())?;
    let view_bytes = reader.view(reader.newest_seq())?.volume(0)?.index().memory_bytes();
    journal.remove()?;
    let per_million = |bytes: u64| bytes as f64 / f64::from(1 << 20) / (MEMORY_COUNT as f64 / 1e6);
    Ok(Pair { ours: per_million(while_ingesting_bytes), peer: per_million(view_bytes as u64) })
}

/// What the allocator has given out, in bytes.
fn heap_bytes() -> u64 {
    // SAFETY: it only reads the allocator's own counts (mallinfo2(3)).
    let heap = unsafe { libc::mallinfo2() };
    (heap.uordblks + heap.hblkhd) as u64
}

fn append_run(context: &Context, record_bytes: usize, is_encrypted: bool) -> Result<f64> {
    let mut journal = Journal::create(&context.path("append"), DISK_BYTES, SLOT_COUNT)?;
    if is_encrypted {
        journal.encrypt()?;
    }
    let places = |seq: u64| seq * record_bytes as u64 % DISK_BYTES;
    let count = RUN_BYTES / record_bytes as u64;
    let first = journal.batches(count, record_bytes, places)?;
    journal.append(&first)?;
    drop(first);
    journal.free_all()?;
    let second = journal.batches(count, record_bytes, places)?;
    let elapsed = journal.append(&second)?;
    journal.remove()?;
    Ok(rate(RUN_BYTES, elapsed))
}

fn fio_append(context: &Context) -> Result<f64> {
    let file = context.path("fio.raw");
    let (filename, size) = (format!("--filename={}", file.display()), format!("--size={RUN_BYTES}"));
    let options = [
        &filename,
        &size,
        "--rw=write",
        "--bs=1M",
        "--ioengine=io_uring",
        "--iodepth=8",
        "--direct=1",
        "--fallocate=native",
        "--overwrite=0",
        "--refill_buffers",
        FIO_SYNC_EVERY,
        "--end_fsync=1",
    ];
    // The first run writes the file's blocks, the second writes over them.
    context.fio(&options)?;
    let report = context.fio(&options)?;
    std::fs::remove_file(file)?;
    Ok(report.bytes_per_s / f64::from(1 << 20))
}

fn promote_pair(context: &mut Context, number: u32) -> Result<Pair> {
    in_turn(number, || promote_run(context, &context.path("promote"), place), || fio_sorted(context, place))
}

fn promote_apart_pair(context: &mut Context, number: u32) -> Result<Pair> {
    let folder = PathBuf::from(format!("/dev/shm/holdfast-promote-{}", std::process::id()));
    let promoted = in_turn(number, || promote_run(context, &folder, place), || fio_sorted(context, place));
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    promoted
}

fn promote_shared_pair(context: &mut Context, number: u32) -> Result<Pair> {
    in_turn(
        number,
        || promote_run(context, &context.path("promote"), place),
        || fio_sorted_beside_reads(context),
    )
}

/// The same places for all; some come twice.
fn place(seq: u64) -> u64 {
    seq.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (DISK_BYTES / BLOCK_BYTES) * BLOCK_BYTES
}

/// Promotes to a disk among the benchmark's files, wherever the journal is.
fn promote_run(context: &Context, folder: &Path, place: impl Fn(u64) -> u64) -> Result<f64> {
    let mut journal = Journal::create(folder, DISK_BYTES, SLOT_COUNT)?;
    let disk = context.path("promote-disk.raw");
    reserved_disk(&disk)?;
    let base = journal.seq;
    let batches = journal.batches(BLOCKS, BLOCK_BYTES as usize, |seq| place(seq - base))?;
    journal.append(&batches)?;
    drop(batches);
    let (written_bytes, elapsed) = journal.promote(&disk)?;
    journal.remove()?;
    std::fs::remove_file(disk)?;
    Ok(rate(written_bytes, elapsed))
}

fn fio_sorted(context: &Context, place: impl Fn(u64) -> u64) -> Result<f64> {
    let sorted = Sorted::make(context, place)?;
    let report = context.fio(&sorted.options())?;
    sorted.remove()?;
    Ok(report.bytes_per_s / f64::from(1 << 20))
}

/// The same while another job reads what is promoted.
fn fio_sorted_beside_reads(context: &Context) -> Result<f64> {
    let sorted = Sorted::make(context, place)?;
    let file = context.path("fio-read.raw");
    let filename = format!("--filename={}", file.display());
    let size = format!("--size={}", BLOCKS * BLOCK_BYTES);
    let reads = [&*filename, &size, "--bs=1M", "--ioengine=io_uring", "--iodepth=4", "--direct=1"];
    context.fio(&[&reads[..], &["--rw=write", "--refill_buffers", "--end_fsync=1"]].concat())?;
    let words = [
        &["fio", "--output-format=json", "--name=reads", "--rw=read"],
        &reads[..],
        &["--name=sorted"],
        &sorted.options().iter().map(|option| &**option).collect::<Vec<_>>()[..],
    ];
    let report: serde_json::Value = serde_json::from_str(&context.run(&words.concat())?)?;
    let jobs = report["jobs"].as_array().context("fio's jobs")?;
    let sorted_job = jobs.iter().find(|job| job["jobname"] == "sorted").context("fio's second job")?;
    let bytes_per_s = sorted_job["write"]["bw_bytes"].as_f64().context("its rate")?;
    sorted.remove()?;
    std::fs::remove_file(file)?;
    Ok(bytes_per_s / f64::from(1 << 20))
}

/// A disk and what fio does to it: the blocks of a promotion, in their order, durable at the end.
struct Sorted {
    file: PathBuf,
    read_iolog: String,
}

impl Sorted {
    fn make(context: &Context, place: impl Fn(u64) -> u64) -> Result<Self> {
        let (file, log) = (context.path("fio-sorted.raw"), context.path("fio.iolog"));
        reserved_disk(&file)?;
        let mut places: Vec<u64> = (1..=BLOCKS).map(place).collect();
        places.sort_unstable();
        places.dedup();
        let name = file.display();
        let mut text = format!("fio version 2 iolog\n{name} add\n{name} open\n");
        for place in places {
            writeln!(text, "{name} write {place} {BLOCK_BYTES}")?;
        }
        writeln!(text, "{name} datasync 0 0\n{name} close")?;
        std::fs::write(&log, text)?;
        Ok(Self { read_iolog: format!("--read_iolog={}", log.display()), file })
    }

    fn options(&self) -> [&str; 7] {
        [
            &self.read_iolog,
            "--replay_no_stall=1",
            "--ioengine=io_uring",
            "--iodepth=32",
            "--direct=1",
            "--refill_buffers",
            "--end_fsync=1",
        ]
    }

    fn remove(self) -> Result<()> {
        Ok(std::fs::remove_file(self.file)?)
    }
}

fn rate(bytes: u64, elapsed: Duration) -> f64 {
    bytes as f64 / f64::from(1 << 20) / elapsed.as_secs_f64()
}

fn site_key() -> SiteKey {
    SiteKey::new([7; SiteKey::LEN_BYTES].into())
}

/// A recovery disk with its space reserved.
fn reserved_disk(path: &Path) -> Result<()> {
    let file = File::create(path)?;
    fallocate(&file, FallocateFlags::empty(), 0, DISK_BYTES as i64).context("reserve a disk")
}

/// A journal that was opened by its writer, with its recovery disk.
pub(super) struct Journal {
    folder: PathBuf,
    storage: RingStorage,
    file: FileId,
    writer: Writer,
    link: BatchLink,
    seq: u64,
}

impl Journal {
    /// An empty one, whose disk has a length but no space yet.
    pub(super) fn create(folder: &Path, disk_bytes: u64, slot_count: u32) -> Result<Self> {
        const ID: Uuid = Uuid::from_u128(1);
        std::fs::create_dir(folder)?;
        File::create(folder.join(DISK_NAME))?.set_len(disk_bytes)?;
        let mut storage = RingStorage::new(256)?;
        let file = storage.add_file(DirectFile::open(&folder.join(JOURNAL_NAME), Access::Create)?);
        let volume = VolumeState { id: ID, base_seq: 0, size_bytes: disk_bytes, fresh_image: true };
        let new = NewJournal {
            journal_id: ID,
            vm_id: ID,
            vpg_id: ID,
            slot_len_bytes: SLOT_BYTES,
            slot_count,
            volumes: vec![volume],
            manifest: "{}".into(),
            encryption: Encryption::Never,
        };
        create(&mut storage, file, &new)?;
        let limits = Limits { max_slots: slot_count, min_slots: 0, grow_slots: 4, group_bytes: 8 << 20 };
        let options =
            OpenOptions { keys: Keys::new(SiteKeys::new(vec![site_key()])), ..OpenOptions::default() };
        let writer = Writer::new(open(&mut storage, file, &options)?, limits);
        let link = BatchLink { journal_id: ID, generation: ID, open_count: 1, prev_batch_crc: 0 };
        let mut journal = Self { folder: folder.to_owned(), storage, file, writer, link, seq: 2 };
        journal.change(Change::Claim { generation: ID, parent: Uuid::nil(), first_seq: 1 })?;
        journal.change(Change::BeginBaseSync { sync_id: 1 })?;
        let mut sealer = BatchSealer::new();
        sealer.push(Record::sync_begin(1, 1, 0, disk_bytes, 1))?;
        sealer.push(Record::sync_end(2, 1, 0, disk_bytes, 1))?;
        let batch = journal.seal(&mut sealer)?;
        let through = journal.writer.accept_for_base(&BatchView::parse(&batch)?, 1)?;
        journal.change(Change::AdvanceBase { through, end: true })?;
        Ok(journal)
    }

    /// From now on it is encrypted.
    fn encrypt(&mut self) -> Result<()> {
        let key = NewKey::random()?.wrap(self.link.journal_id, &site_key());
        self.change(Change::SetEncryption(Encryption::On(key)))
    }

    /// What comes next from the source, in memory as it is received.
    pub(super) fn batches(
        &mut self,
        count: u64,
        record_bytes: usize,
        place: impl Fn(u64) -> u64,
    ) -> Result<Vec<Bytes>> {
        let mut payload = vec![0; 64 << 20];
        rand::fill(&mut payload[..]);
        let payload = Bytes::from(payload);
        let (mut sealer, mut batches) = (BatchSealer::new(), Vec::new());
        for _ in 0..count {
            self.seq += 1;
            let begin = self.seq as usize * record_bytes % (payload.len() - record_bytes + 1);
            let data = payload.slice(begin..begin + record_bytes);
            let record = Record::write(self.seq, self.seq, 0, place(self.seq), data);
            if let Err(error) = sealer.push(record) {
                let PushError::Full(record) = error else { return Err(error.into()) };
                batches.push(self.seal(&mut sealer)?);
                sealer.push(*record)?;
            }
            if sealer.len_bytes() >= BATCH_BYTES {
                batches.push(self.seal(&mut sealer)?);
            }
        }
        if !sealer.is_empty() {
            batches.push(self.seal(&mut sealer)?);
        }
        Ok(batches)
    }

    /// Appends them; from the first one until all are durable.
    pub(super) fn append(&mut self, batches: &[Bytes]) -> Result<Duration> {
        // Checking them is the receipt's part.
        let views = batches.iter().map(|batch| BatchView::parse(batch)).collect::<Result<Vec<_>, _>>()?;
        let began = Instant::now();
        let (mut waiting, mut under_way) = (batches.iter().zip(&views), 0);
        let mut done = Vec::<Completion>::new();
        let mut next = waiting.next();
        loop {
            while let Some((batch, view)) = next.filter(|_| self.writer.queued_bytes() < QUEUE_BYTES) {
                self.writer.offer(batch.clone(), view, 1)?;
                next = waiting.next();
            }
            while let Some(action) = self.writer.next_action() {
                self.storage.submit(self.file, action.token, action.purpose, action.op);
                under_way += 1;
            }
            if under_way == 0 {
                ensure!(self.writer.durable() == self.writer.accepted(), "the writer stopped early");
                return Ok(began.elapsed());
            }
            self.storage.collect(true, &mut done)?;
            for completion in done.drain(..) {
                under_way -= 1;
                self.writer.done(completion.token, completion.result.map(drop));
            }
        }
    }

    /// The newest number.
    pub(super) fn seq(&self) -> u64 {
        self.seq
    }

    /// Seals the last segment.
    pub(super) fn seal_segment(&mut self) -> Result<()> {
        self.change(Change::Seal)
    }

    /// Frees all sealed segments' slots, as after their promotion.
    fn free_all(&mut self) -> Result<()> {
        let through = self.writer.closed_segments().last().context("no sealed segment")?.last;
        self.change(Change::AnnouncePromotion { through })?;
        self.change(Change::EndPromotion {
            through,
            size_bytes: vec![DISK_BYTES],
            bad_ranges: BadRanges::default(),
        })
    }

    /// Promotes all; how much was written, and from the first read until it is synced.
    fn promote(&mut self, disk: &Path) -> Result<(u64, Duration)> {
        self.change(Change::Seal)?;
        let segments: Vec<_> = self.writer.closed_segments().cloned().collect();
        let through = segments.last().context("no sealed segment")?.last;
        self.change(Change::AnnouncePromotion { through })?;
        let disk = DirectFile::open(disk, Access::Exclusive)?;
        let disk = self.storage.add_file(disk);
        let superblock = self.writer.superblock().clone();
        let began = Instant::now();
        let mut promotion =
            Promotion::new(superblock, BadRanges::default(), segments, vec![true], TransferSizes::default());
        let mut done = Vec::<Completion>::new();
        loop {
            while let Some(action) = promotion.poll_action(8 << 20) {
                let file = if action.file == PromotionFile::Journal { self.file } else { disk };
                self.storage.submit(file, action.token, action.purpose, action.op);
            }
            if let Some(promoted) = promotion.promoted() {
                return Ok((promoted.written_bytes, began.elapsed()));
            }
            self.storage.collect(true, &mut done)?;
            for completion in done.drain(..) {
                promotion.done(completion.token, completion.result)?;
            }
        }
    }

    fn seal(&mut self, sealer: &mut BatchSealer) -> Result<Bytes> {
        let batch = sealer.seal(&self.link, 0).context("an empty batch")?;
        self.link.prev_batch_crc = batch.crc;
        Ok(AlignedBuf::gather(&batch.pieces().cloned().collect::<Vec<_>>()).into_bytes())
    }

    fn change(&mut self, change: Change) -> Result<()> {
        self.writer.change(change)?;
        drive(&mut self.writer, &mut self.storage, self.file)?;
        Ok(())
    }

    fn remove(self) -> Result<()> {
        let folder = self.folder.clone();
        drop(self);
        Ok(std::fs::remove_dir_all(folder)?)
    }
}
