//! The scratch of a view against a model, while its process is killed and its host loses power at any step.
//!
//! The file is simulated a sector at a time: what was written and not synced is there, lost, or older than what was written after it; what
//! is under way is torn. A sync covers only what was complete when it was submitted.

mod matrix;

use std::collections::BTreeMap;
use std::path::PathBuf;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use ublk::arena::Slot;
use ublk::serve::{Completion, FileIo, FileOp, IoBuffer, Op, Port, Request, Wake};
use uuid::Uuid;

use super::test_journal::TestJournal;
use super::tests::view_source;
use super::*;

const DISK_BYTES: u64 = 8 << 20;
const SLOT_BYTES: usize = 128 << 10;
const LANES: usize = 3;

type Sector = [u8; 512];

/// What a sector may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// What the journal and the recovery disk have.
    Below,
    Zeroes,
    /// Of the write of this number.
    Write(u64),
}

/// A change of a sector, and when it was answered.
#[derive(Clone, Copy, Debug)]
struct Version {
    content: Content,
    request: u64,
    answered: Option<u64>,
}

/// How the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Kill,
    Power,
}

/// The scratch file: as it reads, and of sectors that are not durable what they held since they were, with the time.
#[derive(Clone)]
struct SimFile {
    image: Vec<u8>,
    volatile: BTreeMap<u64, Vec<(u64, Sector)>>,
    is_honest: bool,
}

impl SimFile {
    fn new(image: Vec<u8>, is_honest: bool) -> Self {
        Self { image, volatile: BTreeMap::new(), is_honest }
    }

    fn write(&mut self, now: u64, offset_bytes: u64, bytes: &[u8], dsync: bool) {
        for (sector, bytes) in (offset_bytes / 512..).zip(bytes.chunks_exact(512)) {
            let place = &mut self.image[sector as usize * 512..][..512];
            if dsync {
                self.volatile.remove(&sector);
            } else {
                let before: Sector = (&*place).try_into().expect("a sector");
                let versions = self.volatile.entry(sector).or_insert_with(|| vec![(0, before)]);
                versions.push((now, bytes.try_into().expect("a sector")));
            }
            place.copy_from_slice(bytes);
        }
    }

    fn sync(&mut self, submitted: u64) {
        if !self.is_honest {
            return;
        }
        self.volatile.retain(|_, versions| {
            let durable = versions.iter().rposition(|(at, _)| *at <= submitted).unwrap_or(0);
            versions.drain(..durable);
            versions.len() > 1
        });
    }

    /// What a power cut leaves.
    fn cut(mut self, rng: &mut StdRng) -> Vec<u8> {
        let loses_all = rng.random_bool(0.3);
        for (sector, versions) in self.volatile {
            let kept = if loses_all { 0 } else { rng.random_range(0..versions.len()) };
            self.image[sector as usize * 512..][..512].copy_from_slice(&versions[kept].1);
        }
        self.image
    }
}

#[derive(Default)]
struct Bell(AtomicBool);

impl Wake for Bell {
    fn wake(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[derive(Default)]
struct QueuePort {
    lane: usize,
    now: u64,
    io: Vec<(usize, u64, FileIo)>,
    done: Vec<Completion>,
}

impl Port for QueuePort {
    fn submit(&mut self, io: FileIo) {
        self.io.push((self.lane, self.now, io));
    }

    fn complete(&mut self, completion: Completion) {
        self.done.push(completion);
    }

    fn take_slot(&mut self) -> Option<Slot> {
        None
    }
}

struct World {
    rng: StdRng,
    journal: TestJournal,
    below: Vec<u8>,
    path: PathBuf,
    live: PathBuf,
    owner: ScratchOwner,
    boot: u128,
    model: Vec<Vec<Version>>,
    now: u64,
    last_request: u64,
    is_honest: bool,
    arena: Arena,
    disk_bytes: u64,
    /// Crashes at each write and sync of the scratch, if they are wanted.
    strikes: Option<matrix::Matrix>,
}

/// A request that is not answered yet.
struct Open {
    op: Op,
    sectors: std::ops::Range<usize>,
    fua: bool,
    began: u64,
}

struct Process {
    disk: Arc<ViewDisk>,
    lanes: Vec<(Box<dyn Lane>, Arc<Bell>)>,
    port: QueuePort,
    file: SimFile,
    open: BTreeMap<u64, Open>,
}

fn pattern(request: u64, sector: usize) -> Sector {
    let mut bytes = [0; 512];
    for word in bytes.chunks_exact_mut(16) {
        word[..8].copy_from_slice(&request.to_le_bytes());
        word[8..].copy_from_slice(&(sector as u64).to_le_bytes());
    }
    bytes
}

impl World {
    fn new(seed: u64, is_honest: bool) -> Self {
        Self::sized(seed, is_honest, DISK_BYTES)
    }

    fn sized(seed: u64, is_honest: bool, disk_bytes: u64) -> Self {
        // Every other one is encrypted.
        let mut journal = match seed % 2 {
            0 => TestJournal::new("crash", disk_bytes, "{}"),
            _ => TestJournal::encrypted("crash", disk_bytes, "{}"),
        };
        journal.random_changes(seed, 40, 60);
        let owner = ScratchOwner {
            vra: Uuid::from_u128(1),
            view: Uuid::from_u128(2),
            vm: Uuid::from_u128(3),
            journal: Uuid::from_u128(4),
            volume: Uuid::from_u128(5),
            number: 0,
            seq: journal.seq,
            disk_bytes,
            logical_block_bytes: 512,
        };
        let below = journal.model(journal.seq);
        let (path, live) = (journal.folder.join("scratch-0.raw"), journal.folder.join("scratch-0.map"));
        let first = Version { content: Content::Below, request: 0, answered: Some(0) };
        Self {
            rng: StdRng::seed_from_u64(seed),
            journal,
            below,
            path,
            live,
            owner,
            boot: 1,
            model: vec![vec![first]; (disk_bytes / 512) as usize],
            now: 1,
            last_request: 0,
            is_honest,
            arena: Arena::new(SLOT_BYTES, 64).expect("arena"),
            disk_bytes,
            strikes: None,
        }
    }

    fn keys(&self) -> ScratchKeys<'_> {
        let writer = &self.journal.writer;
        ScratchKeys { keyring: writer.keyring(), encryption: writer.superblock().encryption }
    }

    fn run(&mut self, crashes: usize, limit_bytes: u64) -> Result<[usize; 2], String> {
        let boot = Uuid::from_u128(self.boot);
        let made =
            ScratchFile::make_in(boot, &self.path, Some(&self.live), &self.owner, &self.keys(), limit_bytes);
        let mut process = self.process(made.expect("made"));
        let mut ends = [0; 2];
        for _ in 0..crashes {
            let end = if self.rng.random() { End::Kill } else { End::Power };
            ends[end as usize] += 1;
            // Now and then a process closes the file in order.
            if self.rng.random_bool(0.15) {
                self.load(&mut process, 60);
                while self.step(&mut process) {}
                let Process { disk, lanes, .. } = process;
                // Its blocking I/O goes to the real file.
                drop(lanes);
                std::fs::write(&self.path, &process.file.image).expect("image");
                assert!(disk.close_scratch().expect("closed"), "a lane is left");
                assert!(!self.live.exists());
                drop(disk);
                for versions in &mut self.model {
                    versions.drain(..versions.len() - 1);
                }
                self.boot += u128::from(end == End::Power);
            } else {
                let steps = self.rng.random_range(1..250);
                self.load(&mut process, steps);
                self.crash(process, end);
            }
            let boot = Uuid::from_u128(self.boot);
            // Nobody has it.
            let now = std::time::Instant::now();
            let opened =
                ScratchFile::open_in(boot, &self.path, Some(&self.live), &self.owner, &self.keys(), now);
            process = self.process(opened.map_err(|error| error.to_string())?);
            self.compare(&mut process, end)?;
        }
        Ok(ends)
    }

    fn process(&self, scratch: ScratchFile) -> Process {
        // All that an opening leaves is durable.
        let image = std::fs::read(&self.path).expect("image");
        let settings = ViewSettings { logical_block_bytes: 512, look_for_holes: false };
        let source = view_source(&self.journal, self.journal.seq, Freshness::Superblock);
        let disk = ViewDisk::new(source, settings, Some(scratch)).expect("view");
        let lanes = (0..LANES)
            .map(|_| {
                let bell = Arc::new(Bell::default());
                (Arc::clone(&disk).lane(Arc::clone(&bell) as _), bell)
            })
            .collect();
        let file = SimFile::new(image, self.is_honest);
        Process { disk, lanes, port: QueuePort::default(), file, open: BTreeMap::new() }
    }

    /// Requests and steps in a random order.
    fn load(&mut self, process: &mut Process, steps: usize) {
        for _ in 0..steps {
            if process.open.len() < 24 && self.rng.random_bool(0.5) {
                self.request(process);
            } else {
                self.step(process);
            }
        }
    }

    fn request(&mut self, process: &mut Process) {
        let op = match self.rng.random_range(0..10) {
            0 | 1 => Op::Flush,
            2 => Op::Discard,
            3 => Op::WriteZeroes { unmap: false },
            _ => Op::Write,
        };
        let most = match op {
            Op::Discard if self.rng.random() => 1500,
            Op::Flush => 0,
            _ if self.rng.random_bool(0.8) => 12,
            _ => 256,
        };
        let count = if most == 0 { 0 } else { self.rng.random_range(1..=most) };
        // Often in the same few places.
        let space = if self.rng.random() { self.model.len().min(3000) } else { self.model.len() };
        let first = self.rng.random_range(0..=space - count);
        // Halves of chunks: together they make an entry of the map needless.
        let is_half = matches!(op, Op::Discard | Op::WriteZeroes { .. }) && self.rng.random_bool(0.6);
        let (first, count) = if is_half { (first / 64 * 64, 64) } else { (first, count) };
        let fua = self.rng.random_bool(0.2);
        self.last_request += 1;
        self.now += 1;
        let request = self.last_request;
        let mut slot = None;
        if op == Op::Write {
            let mut memory = self.arena.take().expect("slot");
            for (sector, bytes) in (first..first + count).zip(memory.chunks_exact_mut(512)) {
                bytes.copy_from_slice(&pattern(request, sector));
            }
            slot = Some(memory);
        }
        let content = if op == Op::Write { Content::Write(request) } else { Content::Zeroes };
        for versions in &mut self.model[first..first + count] {
            versions.push(Version { content, request, answered: None });
        }
        let open = Open { op, sectors: first..first + count, fua, began: self.now };
        process.open.insert(request, open);
        let lane = self.rng.random_range(0..LANES);
        (process.port.lane, process.port.now) = (lane, self.now);
        let (offset_bytes, len_bytes) = (first as u64 * 512, count as u64 * 512);
        let asked = Request { tag: request, op, offset_bytes, len_bytes, fua, slot };
        process.lanes[lane].0.request(asked, &mut process.port);
        self.take_answers(process);
    }

    /// Wakes lanes and ends one operation. False when there is none.
    fn step(&mut self, process: &mut Process) -> bool {
        self.now += 1;
        process.port.now = self.now;
        let mut has_woken = false;
        for (index, (lane, bell)) in process.lanes.iter_mut().enumerate() {
            if bell.0.swap(false, Ordering::SeqCst) {
                process.port.lane = index;
                lane.wake(&mut process.port);
                has_woken = true;
            }
        }
        if process.port.io.is_empty() {
            self.take_answers(process);
            return has_woken;
        }
        let chosen = self.rng.random_range(0..process.port.io.len());
        let (lane, submitted, mut io) = process.port.io.swap_remove(chosen);
        let range = io.buffer_offset_bytes as usize..io.buffer_offset_bytes as usize + io.len_bytes as usize;
        self.strike_at(process, &io, submitted);
        match (io.file, io.op, &mut io.buffer) {
            (plan::SCRATCH_FILE, FileOp::Write { dsync }, IoBuffer::Shared(slot)) => {
                process.file.write(self.now, io.offset_bytes, &slot[range], dsync);
            }
            (plan::SCRATCH_FILE, FileOp::Sync, _) => process.file.sync(submitted),
            (plan::SCRATCH_FILE, FileOp::Read, IoBuffer::Owned(slot)) => {
                let from = io.offset_bytes as usize;
                slot[range].copy_from_slice(&process.file.image[from..from + io.len_bytes as usize]);
            }
            (file, FileOp::Read, IoBuffer::Owned(slot)) => {
                let file = &process.disk.files()[file.0 as usize];
                file.read_exact_at(&mut slot[range], io.offset_bytes).expect("readable");
            }
            (file, op, buffer) => panic!("{op:?} of {file:?} with {buffer:?}"),
        }
        process.port.lane = lane;
        process.lanes[lane].0.file_done(io.token, Ok(()), io.buffer, &mut process.port);
        self.take_answers(process);
        true
    }

    fn take_answers(&mut self, process: &mut Process) {
        for Completion { tag, result, slot } in std::mem::take(&mut process.port.done) {
            assert_eq!(result, Ok(()), "request {tag}");
            drop(slot);
            let Some(open) = process.open.remove(&tag) else { continue };
            if open.op == Op::Flush {
                for versions in &mut self.model {
                    let is_flushed =
                        |version: &Version| version.answered.is_some_and(|answered| answered < open.began);
                    let durable = versions.iter().rposition(is_flushed).unwrap_or(0);
                    versions.drain(..durable);
                }
                continue;
            }
            for versions in &mut self.model[open.sectors] {
                let own = versions.iter().position(|version| version.request == tag);
                let Some(own) = own else { continue };
                versions[own].answered = Some(self.now);
                if open.fua {
                    versions.drain(..own);
                }
            }
        }
    }

    fn crash(&mut self, process: Process, end: End) {
        let Process { disk, lanes, port, mut file, .. } = process;
        // What is under way lands, is lost, or is torn.
        self.now += 1;
        for (_, _, io) in &port.io {
            let (FileOp::Write { .. }, IoBuffer::Shared(slot)) = (io.op, &io.buffer) else { continue };
            let whole = self.rng.random_bool(0.4);
            let from = io.buffer_offset_bytes as usize;
            for (number, bytes) in slot[from..from + io.len_bytes as usize].chunks_exact(512).enumerate() {
                if whole || self.rng.random() {
                    file.write(self.now, io.offset_bytes + number as u64 * 512, bytes, false);
                }
            }
        }
        drop((port, lanes, disk));
        let image = match end {
            End::Kill => file.image,
            End::Power => {
                self.boot += 1;
                file.cut(&mut self.rng)
            }
        };
        std::fs::write(&self.path, image).expect("image");
    }

    /// Every sector holds what it may, and from now on that is what it holds.
    fn compare(&mut self, process: &mut Process, end: End) -> Result<(), String> {
        let mut at = 0;
        while at < self.disk_bytes {
            let len_bytes = (self.rng.random_range(1..=256) * 512).min(self.disk_bytes - at);
            self.last_request += 1;
            let slot = self.arena.take();
            let (tag, op) = (self.last_request, Op::Read);
            process.port.lane = self.rng.random_range(0..LANES);
            let asked = Request { tag, op, offset_bytes: at, len_bytes, fua: false, slot };
            process.lanes[process.port.lane].0.request(asked, &mut process.port);
            let read = loop {
                if let Some(index) = process.port.done.iter().position(|completion| completion.tag == tag) {
                    break process.port.done.swap_remove(index);
                }
                let (lane, _, mut io) = process.port.io.pop().ok_or("a read is not answered")?;
                let IoBuffer::Owned(slot) = &mut io.buffer else { return Err("not a read".to_owned()) };
                let range = io.buffer_offset_bytes as usize..;
                let into = &mut slot[range][..io.len_bytes as usize];
                match io.file {
                    plan::SCRATCH_FILE => {
                        into.copy_from_slice(
                            &process.file.image[io.offset_bytes as usize..][..io.len_bytes as usize],
                        );
                    }
                    file => process.disk.files()[file.0 as usize]
                        .read_exact_at(into, io.offset_bytes)
                        .map_err(|error| error.to_string())?,
                }
                process.lanes[lane].0.file_done(io.token, Ok(()), io.buffer, &mut process.port);
            };
            if read.result.is_err() {
                return Err(format!("a read of {at}+{len_bytes} failed: {:?}", read.result));
            }
            let slot = read.slot.ok_or("no slot")?;
            for (number, bytes) in slot[..len_bytes as usize].chunks_exact(512).enumerate() {
                self.compare_sector((at / 512) as usize + number, bytes, end)?;
            }
            at += len_bytes;
        }
        Ok(())
    }

    fn compare_sector(&mut self, sector: usize, found: &[u8], end: End) -> Result<(), String> {
        let below = &self.below[sector * 512..][..512];
        let versions = &mut self.model[sector];
        let is = |version: &Version| match version.content {
            Content::Below => found == below,
            Content::Zeroes => found.iter().all(|byte| *byte == 0),
            Content::Write(request) => found == pattern(request, sector),
        };
        let first = match end {
            // All that was answered is there.
            End::Kill => versions.iter().rposition(|version| version.answered.is_some()).unwrap_or(0),
            End::Power => 0,
        };
        let Some(kept) = versions[first..].iter().rposition(is) else {
            let head = &found[..16];
            return Err(format!("{end:?}: sector {sector} begins with {head:?}, it may be {versions:?}"));
        };
        let mut kept = versions.remove(first + kept);
        kept.answered = Some(self.now);
        match end {
            // What is there is durable.
            End::Power => versions.clear(),
            // The file may not say yet where it is. What was under way may have landed where older data was that the file still points to:
            // until a flush a power cut may bring it back.
            End::Kill => {}
        }
        versions.push(kept);
        Ok(())
    }
}

fn seeds() -> std::ops::Range<u64> {
    match std::env::var("HOLDFAST_SCRATCH_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => seed..seed + 1,
        None if std::env::var_os("HOLDFAST_LONG").is_some() => 0..1000,
        None => 0..40,
    }
}

#[test]
fn what_was_answered_survives_the_process_and_what_was_flushed_the_host() {
    let mut ends = [0; 2];
    for seed in seeds() {
        match World::new(seed, true).run(8, DISK_BYTES) {
            Ok(more) => ends = [ends[0] + more[0], ends[1] + more[1]],
            Err(error) => panic!("HOLDFAST_SCRATCH_SEED={seed}: {error}"),
        }
    }
    // A seed alone may have one kind.
    assert!(seeds().count() == 1 || ends.iter().all(|count| *count > 0), "{ends:?}");
}

/// The model would notice: on a disk whose flush does nothing, map pages that are written durably point to data that isn't.
#[test]
fn a_disk_that_lies_about_its_flush_is_found_out() {
    let found = (0..40).filter(|seed| World::new(*seed, false).run(8, DISK_BYTES).is_err()).count();
    assert!(found > 10, "only in {found} of 40 seeds");
}
