//! Views beside the raw file: random reads through one, and opening one.

mod door;
mod synthetic;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use journal::recovery::SurveyOptions;
use journal::storage::ring::{Access, DirectFile, RingStorage};
use journal::view::Reader;
use vra::view::{Freshness, ViewDisk, ViewSettings, ViewSource};

use super::journal::{DISK_NAME, JOURNAL_NAME, Journal, SLOT_BYTES};
use super::{BenchPlace, Benchmark, Better, Pair, in_turn};
use crate::suite::context::Context;

const fn reads(name: &'static str, what: &'static str, pair: PairFn) -> Benchmark {
    Benchmark {
        name,
        what,
        peer: "fio, raw file",
        unit: "IOPS",
        better: Better::Higher,
        gate: Some(0.8),
        place: BenchPlace::Host,
        programs: &["fio"],
        pair,
    }
}

type PairFn = fn(&mut Context, u32) -> Result<Pair>;

const fn opening(
    name: &'static str,
    what: &'static str,
    peer: &'static str,
    gate: Option<f64>,
    pair: PairFn,
) -> Benchmark {
    let (unit, better, place) = ("s", Better::Lower, BenchPlace::Host);
    Benchmark { name, what, peer, unit, better, gate, place, programs: &[], pair }
}

pub(super) const BENCHMARKS: &[Benchmark] = &[
    opening(
        "view-open",
        "a view over 10 million records is opened once more",
        "the limit",
        Some(1.0),
        |context, number| open_pair(context, number, 64 << 30, false),
    ),
    opening(
        "view-open-cold",
        "the same after the kernel has dropped its caches",
        "the limit",
        None,
        |context, number| open_pair(context, number, 64 << 30, true),
    ),
    opening(
        "view-open-64t",
        "a view of a disk of 64 TiB over 10 million records",
        "a disk of 64 GiB",
        Some(0.9),
        open_sizes_pair,
    ),
    Benchmark {
        name: "view-memory",
        what: "memory of a view per million records of 4 KiB",
        peer: "their footers, on disk",
        unit: "MiB",
        better: Better::Lower,
        gate: None,
        place: BenchPlace::Host,
        programs: &[],
        pair: memory_pair,
    },
    reads(
        "view-read-1m",
        "random 4 KiB reads through a view over 1 million records of 4 KiB",
        |context, number| read_pair(context, number, &Records { count: 1 << 20, len_bytes: 4096 }),
    ),
    reads("view-read-4m", "the same over 4 million records of 4 KiB", |context, number| {
        read_pair(context, number, &Records { count: 4 << 20, len_bytes: 4096 })
    }),
    reads(
        "view-read-16m",
        "the same over 16 million records of 512 bytes, written in order",
        |context, number| read_pair(context, number, &Records { count: 16 << 20, len_bytes: 512 }),
    ),
];

/// What the journal holds: records that cover the disk once.
struct Records {
    count: u64,
    len_bytes: u64,
}

/// Reads of one run.
const READ_COUNT: u64 = 100_000;
const READ_BYTES: u64 = 4096;
/// Reads in flight at once.
const DEPTH: usize = 32;
/// What is made and appended together, in bytes of payload.
const PORTION_BYTES: u64 = 256 << 20;

impl Records {
    fn disk_bytes(&self) -> u64 {
        self.count * self.len_bytes
    }

    /// Where record `number` writes: short records in order, others anywhere, each place once.
    fn place(&self, number: u64) -> u64 {
        let place = if self.len_bytes < READ_BYTES { number } else { scattered(number, self.count) };
        place * self.len_bytes
    }
}

/// A place for each number below a power of two, each once, in no order.
fn scattered(number: u64, count: u64) -> u64 {
    number.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x1234_5671) % count
}

/// Records of the journals that are only opened.
const OPENED_COUNT: u64 = 10_000_000;
/// How long an opening may take, in seconds.
const OPEN_LIMIT_S: f64 = 1.0;

fn open_pair(context: &mut Context, number: u32, disk_bytes: u64, cold: bool) -> Result<Pair> {
    let path = context.path("synthetic");
    if number == 0 {
        synthetic::make(&path, OPENED_COUNT, disk_bytes)?;
        open_view(&path)?;
    }
    if cold {
        std::fs::write("/proc/sys/vm/drop_caches", "3").context("dropping caches needs root")?;
    }
    let (elapsed_s, _) = open_view(&path)?;
    Ok(Pair { ours: elapsed_s, peer: OPEN_LIMIT_S })
}

fn open_sizes_pair(context: &mut Context, number: u32) -> Result<Pair> {
    let (small, large) = (context.path("64g"), context.path("64t"));
    if number == 0 {
        synthetic::make(&small, OPENED_COUNT, 64 << 30)?;
        synthetic::make(&large, OPENED_COUNT, 64 << 40)?;
        open_view(&small)?;
        open_view(&large)?;
    }
    in_turn(number, || Ok(open_view(&large)?.0), || Ok(open_view(&small)?.0))
}

fn memory_pair(context: &mut Context, number: u32) -> Result<Pair> {
    let path = context.path("synthetic");
    let footers_bytes = synthetic::make(&path, OPENED_COUNT + u64::from(number), 64 << 30)?;
    let (_, memory_bytes) = open_view(&path)?;
    let per_million = |bytes: u64| bytes as f64 / f64::from(1 << 20) / (OPENED_COUNT as f64 / 1e6);
    Ok(Pair { ours: per_million(memory_bytes), peer: per_million(footers_bytes) })
}

/// Opens a view of the newest state: how long it took, in seconds, and the memory of its index, in bytes.
fn open_view(path: &Path) -> Result<(f64, u64)> {
    let began = Instant::now();
    let mut storage = RingStorage::new(64)?;
    let file = storage.add_file(DirectFile::open(path, Access::ReadOnly)?);
    let reader = Reader::open(&mut storage, file, &SurveyOptions::default())?;
    let view = reader.view(reader.newest_seq())?;
    let elapsed_s = began.elapsed().as_secs_f64();
    let index = view.volume(0)?.index();
    ensure!(index.pieces().len() as u64 >= OPENED_COUNT, "the view has {} pieces", index.pieces().len());
    Ok((elapsed_s, index.memory_bytes() as u64))
}

fn read_pair(context: &mut Context, number: u32, records: &Records) -> Result<Pair> {
    let (folder, raw) = (context.path("view"), context.path("raw"));
    if number == 0 {
        fill_journal(&folder, records)?;
        fill_raw(context, &raw, records.disk_bytes())?;
    }
    in_turn(number, || view_reads(&folder, records.disk_bytes()), || raw_reads(context, &raw))
}

fn fill_journal(folder: &Path, records: &Records) -> Result<()> {
    // Payload, headers and footers, and what an opening keeps free.
    let file_bytes = records.disk_bytes() + records.count * 128 + (512 << 20);
    let mut journal = Journal::create(folder, records.disk_bytes(), file_bytes.div_ceil(SLOT_BYTES) as u32)?;
    let (portion, base) = (PORTION_BYTES / records.len_bytes, journal.seq() + 1);
    for _ in 0..records.count / portion {
        let batches =
            journal.batches(portion, records.len_bytes as usize, |seq| records.place(seq - base))?;
        journal.append(&batches)?;
    }
    journal.seal_segment()
}

fn fill_raw(context: &Context, path: &Path, len_bytes: u64) -> Result<()> {
    let (filename, size) = (format!("--filename={}", path.display()), format!("--size={len_bytes}"));
    let options =
        ["--rw=write", "--bs=1M", "--ioengine=io_uring", "--iodepth=8", "--direct=1", "--end_fsync=1"];
    context.fio(&[&[filename.as_str(), size.as_str()], &options[..]].concat())?;
    Ok(())
}

fn view_reads(folder: &Path, disk_bytes: u64) -> Result<f64> {
    let paths = [folder.join(JOURNAL_NAME), folder.join(DISK_NAME)];
    let mut storage = RingStorage::new(64)?;
    let file = storage.add_file(DirectFile::open(&paths[0], Access::ReadOnly)?);
    let reader = Reader::open(&mut storage, file, &SurveyOptions::default())?;
    let mut view = reader.view(reader.newest_seq())?;
    let open = |path: &PathBuf| -> Result<File> {
        Ok(DirectFile::open(path, Access::ReadOnly)?.file().try_clone()?)
    };
    let source = ViewSource {
        volume: view.take_volume(0)?,
        journal: open(&paths[0])?,
        recovery_disk: open(&paths[1])?,
        seq: reader.newest_seq(),
        freshness: Freshness::Flag(Arc::default()),
        beneath: None,
        keep: Box::new(()),
    };
    drop(reader);
    let settings = ViewSettings { logical_block_bytes: 512, look_for_holes: false };
    let disk = ViewDisk::new(source, settings, None)?;
    let mut door = door::Door::new(disk, &paths, DEPTH)?;
    let mut seed = rand::random::<u64>();
    let mut any_place = || {
        seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (seed >> 20) % (disk_bytes / READ_BYTES) * READ_BYTES
    };
    let began = Instant::now();
    let done = door.read(READ_COUNT, READ_BYTES, &mut any_place)?;
    ensure!(done == READ_COUNT, "{done} reads of {READ_COUNT} were answered");
    Ok(READ_COUNT as f64 / began.elapsed().as_secs_f64())
}

fn raw_reads(context: &Context, raw: &Path) -> Result<f64> {
    let (filename, count) = (format!("--filename={}", raw.display()), format!("--number_ios={READ_COUNT}"));
    let (block, depth) = (format!("--bs={READ_BYTES}"), format!("--iodepth={DEPTH}"));
    let options = ["--rw=randread", "--ioengine=io_uring", "--direct=1", "--norandommap", "--randrepeat=0"];
    let report = context.fio(&[&[&*filename, &*count, &*block, &*depth], &options[..]].concat())?;
    report
        .bytes_per_s
        .is_normal()
        .then_some(report.bytes_per_s / READ_BYTES as f64)
        .context("fio read nothing")
}
