//! A VM of two disks under one seed: real lanes over real files whose I/O completes in any order, guests that overlap and
//! discard, a stream that stalls, a target that restarts nothing and forgets nothing, local errors, syncs, checkpoints,
//! disks that grow, and moves in and out of protection. What the target holds is compared with the disks.

mod door;

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use journal::batch::{Checkpoint, CheckpointKind, Epoch, Record, RecordKind};
use ublk::arena::Arena;
use ublk::serve::{Disk, Errno, FileIo, FileOp, Geometry, IoBuffer, Lane, Op, Request, ZeroLimits};
use uuid::Uuid;

use super::modes::Mode;
use super::numbering::ByteRange;
use super::payload::Piece;
use super::{Brought, CaptureLimits, NewRange, ProtectedDisk, RetainedEntries, SourceAction, SourceVm};
use door::{Bell, Door, Random, Store, probe, unnamed_file};

use crate::api::{GenerationId, VmId};
use crate::checkpoint::{Freeze, HeldEpoch, LocalHold, Member};
use crate::clock::Now;
use crate::planted::{Planted, plant};
use crate::ship::Retained;
use crate::sync::{CHUNK_BYTES, Extent, FullSync, SyncLimits, SyncStep};

const DISK_BYTES: u64 = 1 << 20;
/// How far disks grow.
const GROWN_BYTES: u64 = DISK_BYTES + (256 << 10);
const SLOT_BYTES: usize = 64 << 10;
const LANES: usize = 4;
const DEPTH: usize = 6;

const LIMITS: CaptureLimits = CaptureLimits {
    ring_entries: 128,
    writes_in_flight: 16,
    retained_bytes: 4 << 20,
    dense_bytes: 256 << 10,
    sync: SyncLimits { pause_us: 1, retry_us: 5, bytes_per_second: u64::MAX, ..SyncLimits::STANDARD },
};

struct Guest {
    op: Op,
    lane: usize,
    id: u64,
}

/// A read of a sync that has been made and not yet been answered.
enum SyncAnswer {
    Probed(Extent),
    Read(Option<Piece>),
    Failed,
}

struct World {
    random: Random,
    time_us: Arc<AtomicU64>,
    disks: Vec<Arc<ProtectedDisk>>,
    lanes: Vec<Box<dyn Lane>>,
    bells: Vec<Arc<Bell>>,
    door: Door,
    waiting: HashMap<u64, Guest>,
    next_tag: u64,
    store: Arc<Store>,
    vm: Option<Arc<SourceVm>>,
    retained: Option<RetainedEntries>,
    shipped_through: u64,
    /// What the target holds, and whether it is inside a sync.
    images: Vec<Vec<u8>>,
    /// How large it has the disks, and how large they are to be.
    sizes: [u64; 2],
    wanted: [u64; 2],
    /// What is new of disks, and where the rest of it begins.
    new: Vec<(NewRange, u64)>,
    image_is_fresh: bool,
    /// The sync that each volume is in at the target, or zero.
    open_syncs: [u64; 2],
    stalled: bool,
    sync: Option<FullSync>,
    sync_answer: Option<SyncAnswer>,
    sync_buffers: Arena,
    hold: Option<(LocalHold, u64, Vec<u64>)>,
    /// Numbers of writes by id.
    numbers: HashMap<u64, u64>,
    /// Writes that completed to the guest while the VM was streaming and in no sync.
    completed: Vec<u64>,
    reached: Reached,
}

/// What a run has come by.
#[derive(Clone, Copy, Debug, Default)]
struct Reached {
    overflows: u64,
    generations: u64,
    syncs_ended: u64,
    checkpoints: u64,
    expired: u64,
    held: u64,
    repeated_reads: u64,
    held_ranges: u64,
    local_errors: u64,
    reprotected: u64,
    grown: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let time_us = Arc::new(AtomicU64::new(1_000_000));
        let zeroes = ZeroLimits { granularity_bytes: 512, max_bytes: DISK_BYTES as u32 };
        let geometry = Geometry {
            size_bytes: DISK_BYTES,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            volatile_cache: true,
            fua: true,
            read_only: false,
            discard: Some(zeroes),
            write_zeroes: Some(zeroes),
        };
        let disks: Vec<Arc<ProtectedDisk>> = (0..2)
            .map(|_| {
                let clock = time_us.clone();
                let file = unnamed_file();
                file.write_all_at(&[0xaa; 64 << 10], 512 << 10).expect("written");
                let clock = Arc::new(move || clock.load(Ordering::Relaxed));
                Arc::new(ProtectedDisk::new(file, geometry.clone(), clock))
            })
            .collect();
        let bells: Vec<Arc<Bell>> = (0..LANES).map(|_| Arc::default()).collect();
        let lanes = (0..LANES).map(|lane| disks[lane % 2].clone().lane(bells[lane].clone())).collect();
        let arena = Arena::new(SLOT_BYTES, 48).expect("arena");
        let door = Door { arena, queue: Vec::new(), answers: Vec::new(), lane: 0 };
        Self {
            random: Random(seed),
            time_us,
            disks,
            lanes,
            bells,
            door,
            waiting: HashMap::new(),
            next_tag: 1,
            store: Arc::default(),
            vm: None,
            retained: None,
            shipped_through: 0,
            images: vec![vec![0; GROWN_BYTES as usize]; 2],
            sizes: [DISK_BYTES; 2],
            wanted: [DISK_BYTES; 2],
            new: Vec::new(),
            image_is_fresh: true,
            open_syncs: [0; 2],
            stalled: false,
            sync: None,
            sync_answer: None,
            sync_buffers: Arena::new(CHUNK_BYTES as usize, 4).expect("arena"),
            hold: None,
            numbers: HashMap::new(),
            completed: Vec::new(),
            reached: Reached::default(),
        }
    }

    fn now(&self) -> Now {
        let now_us = self.time_us.load(Ordering::Relaxed);
        Now { mono_us: now_us, wall_us: now_us }
    }

    fn step(&mut self) {
        self.time_us.fetch_add(1, Ordering::Relaxed);
        match self.random.below(100) {
            0..30 => self.request(),
            30..62 => self.disk_io(),
            62..74 => self.wake_lanes(),
            74..84 => self.ship(),
            84..86 => self.tick(),
            86..94 => {
                self.step_sync();
                self.bring_new();
            }
            94..98 => self.checkpoint(),
            98 => self.stalled = self.random.one_in(3),
            _ if self.random.one_in(60) => self.protect_anew(),
            _ if self.random.one_in(4) => self.grow(),
            _ => {}
        }
    }

    fn request(&mut self) {
        let lane = self.random.below(LANES as u64) as usize;
        if self.waiting.values().filter(|guest| guest.lane == lane).count() >= DEPTH {
            return;
        }
        let op = match self.random.below(20) {
            0..12 => Op::Write,
            12..16 => Op::Read,
            16 => Op::Discard,
            17 => Op::WriteZeroes { unmap: self.random.one_in(2) },
            _ => Op::Flush,
        };
        let len = match (op, self.random.below(4)) {
            (Op::Flush, _) => 0,
            (Op::Discard | Op::WriteZeroes { .. }, _) => 512 * (1 + self.random.below(64)),
            (_, 0) => 512 * (1 + self.random.below(127)),
            _ => 512 * (1 + self.random.below(16)),
        };
        // A hot region, so that much overlaps, and the rest.
        let size = self.disks[lane % 2].geometry().size_bytes;
        let region = if self.random.one_in(4) { size - len } else { 96 << 10 };
        let offset = if len == 0 { 0 } else { 512 * self.random.below(region / 512) };
        let id = self.next_tag;
        self.next_tag += 1;
        let slot = matches!(op, Op::Read | Op::Write).then(|| self.door.arena.take());
        let mut slot = match slot {
            Some(None) => return,
            Some(slot) => slot,
            None => None,
        };
        if let (Op::Write, Some(slot)) = (op, slot.as_mut()) {
            for sector in slot[..len as usize].chunks_mut(512) {
                sector.fill(id as u8);
                sector[..8].copy_from_slice(&id.to_le_bytes());
            }
        }
        self.waiting.insert(id, Guest { op, lane, id });
        let request =
            Request { tag: id, op, offset_bytes: offset, len_bytes: len, fua: self.random.one_in(8), slot };
        self.door.lane = lane;
        self.lanes[lane].request(request, &mut self.door);
        self.answers();
    }

    fn disk_io(&mut self) {
        if self.door.queue.is_empty() {
            return;
        }
        let at = self.random.below(self.door.queue.len() as u64) as usize;
        let (lane, mut io) = self.door.queue.swap_remove(at);
        let fails = self.random.one_in(4000);
        let result = if fails { Err(Errno(libc::EIO)) } else { self.perform(lane % 2, &mut io) };
        self.reached.local_errors += u64::from(fails && matches!(io.op, FileOp::Write { .. }));
        self.door.lane = lane;
        self.lanes[lane].file_done(io.token, result, io.buffer, &mut self.door);
        self.answers();
    }

    fn perform(&self, volume: usize, io: &mut FileIo) -> Result<(), Errno> {
        let file = &self.disks[volume].files()[0];
        let (len, offset) = (io.len_bytes as usize, io.offset_bytes);
        let done = match (io.op, &mut io.buffer) {
            (FileOp::Read, IoBuffer::Owned(slot)) => file.read_exact_at(&mut slot[..len], offset),
            (FileOp::Write { .. }, IoBuffer::Owned(slot)) => file.write_all_at(&slot[..len], offset),
            (FileOp::Write { .. }, IoBuffer::Shared(slot)) => file.write_all_at(&slot[..len], offset),
            (FileOp::Sync, IoBuffer::None) => Ok(()),
            (FileOp::PunchHole | FileOp::ZeroRange, IoBuffer::None) => {
                file.write_all_at(&vec![0; len], offset)
            }
            (op, buffer) => panic!("{op:?} with {buffer:?}"),
        };
        done.map_err(|error| Errno(error.raw_os_error().unwrap_or(libc::EIO)))
    }

    fn wake_lanes(&mut self) {
        for lane in 0..LANES {
            if self.bells[lane].0.swap(false, Ordering::Relaxed) {
                self.door.lane = lane;
                self.lanes[lane].wake(&mut self.door);
                self.answers();
            }
        }
    }

    fn answers(&mut self) {
        for completion in std::mem::take(&mut self.door.answers) {
            let guest = self.waiting.remove(&completion.tag).expect("each request is answered once");
            let brought_slot = matches!(guest.op, Op::Read | Op::Write);
            assert_eq!(completion.slot.is_some(), brought_slot, "a slot for a slot");
            let writes = guest.op == Op::Write && completion.result.is_ok();
            if writes && self.hold.is_none() && self.vm.as_ref().is_some_and(|vm| is_steady(vm)) {
                self.completed.push(guest.id);
            }
        }
    }

    fn ship(&mut self) {
        let (Some(retained), false) = (self.retained.as_mut(), self.stalled) else { return };
        let mut records = Vec::new();
        let count = 1 + self.random.below(24) as usize;
        retained.take_ready(self.shipped_through + 1, 256 << 10, count, &mut records);
        for record in records {
            assert_eq!(record.seq, self.shipped_through + 1, "no gap");
            self.shipped_through = record.seq;
            self.apply(&record);
        }
        if self.random.one_in(2) {
            let through = self.shipped_through - self.random.below(4).min(self.shipped_through);
            self.retained.as_mut().expect("present").free_through(through);
        }
    }

    fn apply(&mut self, record: &Record) {
        let image = &mut self.images[usize::from(record.volume)];
        let range = record.offset_bytes as usize..(record.offset_bytes + record.len_bytes) as usize;
        let size = &mut self.sizes[usize::from(record.volume)];
        if record.kind == RecordKind::Resize || record.kind == RecordKind::SyncBegin && self.image_is_fresh {
            *size = record.len_bytes.max(*size);
        }
        assert!(range.end as u64 <= *size, "the stream says first that a disk has grown (E3): {record:?}");
        match record.kind {
            RecordKind::Resize => {}
            RecordKind::Write | RecordKind::SyncData => image[range].copy_from_slice(&record.payload),
            RecordKind::Zeroes => image[range].fill(0),
            RecordKind::SyncBegin => self.open_syncs[usize::from(record.volume)] = record.sync_id,
            RecordKind::SyncEnd => {
                let open = std::mem::take(&mut self.open_syncs[usize::from(record.volume)]);
                assert_eq!(open, record.sync_id, "the end of the sync that is open");
            }
            RecordKind::Checkpoint => assert_eq!(self.open_syncs, [0; 2], "no checkpoint in a sync (B5)"),
            other => panic!("{other:?}"),
        }
        self.image_is_fresh &= record.kind == RecordKind::SyncBegin;
        if record.kind == RecordKind::Write {
            let id = u64::from_le_bytes(record.payload[..8].try_into().expect("eight bytes"));
            self.numbers.insert(id, record.seq);
        }
    }

    fn tick(&mut self) {
        let Some(vm) = self.vm.clone() else { return };
        let now = self.now();
        let random = &mut self.random;
        for action in vm.tick(now, &mut || u128::from(random.next()) << 64 | u128::from(random.next())) {
            match action {
                SourceAction::BeginGeneration(start) => {
                    assert_eq!(start.first_seq, self.shipped_through + 1, "drained before");
                    self.reached.generations += 1;
                }
                SourceAction::BeginSync(sync) => (self.sync, self.sync_answer) = (Some(sync), None),
                SourceAction::Bring(new) => self.new.push((new, new.range.start)),
                SourceAction::Grown { .. } => self.reached.grown += 1,
                SourceAction::Alert(_) => {}
            }
        }
        self.reached.overflows = self.reached.overflows.max(vm.snapshot().overflow_count);
        if self.random.one_in(3) {
            vm.granted(vm.generation().generation, self.image_is_fresh);
        }
    }

    fn step_sync(&mut self) {
        let (Some(vm), Some(sync)) = (&self.vm, self.sync.as_mut()) else { return };
        let now_us = self.time_us.load(Ordering::Relaxed);
        let now = Now { mono_us: now_us, wall_us: now_us };
        match self.sync_answer.take() {
            Some(SyncAnswer::Probed(extent)) => return sync.probed(vm.core(), extent, now),
            Some(SyncAnswer::Read(data)) => return sync.read(vm.core(), data, now),
            Some(SyncAnswer::Failed) => return sync.read_failed(vm.core(), now),
            None => {}
        }
        let buffer = self.sync_buffers.take();
        match sync.next(vm.core(), now, buffer.is_some()) {
            SyncStep::Probe { volume, range } => {
                let extent = probe(&self.disks[usize::from(volume)].files()[0], range.start);
                self.sync_answer = Some(SyncAnswer::Probed(extent));
            }
            SyncStep::Read { volume, range } => {
                let (mut slot, len) = (buffer.expect("asked for"), range.len_bytes() as usize);
                let file = &self.disks[usize::from(volume)].files()[0];
                file.read_exact_at(&mut slot[..len], range.start).expect("read");
                let is_zero = slot[..len].iter().all(|byte| *byte == 0);
                let data = (!is_zero).then(|| Piece::of_slot(slot.share(), len));
                let failed = self.random.one_in(50);
                self.sync_answer = Some(if failed { SyncAnswer::Failed } else { SyncAnswer::Read(data) });
            }
            SyncStep::Wait { .. } => {}
            SyncStep::Done | SyncStep::Aborted => {
                let counts = sync.counts();
                self.reached.repeated_reads += counts.reads_repeated;
                self.reached.held_ranges += counts.ranges_held;
                self.reached.syncs_ended += u64::from(counts.done_bytes == counts.total_bytes);
                self.sync = None;
            }
        }
    }

    fn checkpoint(&mut self) {
        let Some(vm) = self.vm.clone() else { return };
        let now = self.now();
        let Some((hold, cut, before)) = self.hold.take() else {
            let before = std::mem::take(&mut self.completed);
            let freeze = Freeze::default();
            let members = [Member { vm: VmId(Uuid::from_u128(1)), core: vm.core().clone(), freeze }];
            let mut cut = 0;
            let held = LocalHold::begin(&members, now, 60, &mut |held: &Arc<HeldEpoch>| cut = held.cut());
            self.hold = held.ok().map(|hold| (hold, cut, before));
            return;
        };
        self.reached.held += 1;
        if self.random.one_in(6) {
            return hold.abort();
        }
        let checkpoint = Checkpoint {
            epoch: Epoch { nonce: Uuid::from_u128(7), counter: 1 },
            cut: 0,
            member_set_version: 1,
            time_us: now.wall_us,
            kind: CheckpointKind::Automatic,
            tag: String::new(),
        };
        match hold.release(&checkpoint, now) {
            Ok(taken) => {
                self.reached.checkpoints += 1;
                assert_eq!(taken.members[0].cut, cut);
                assert!(taken.members[0].seq > cut);
                self.check_cut(cut, &before);
            }
            Err(_) => self.reached.expired += 1,
        }
    }

    /// What the guest knew to be completed before the hold lies below the cut.
    fn check_cut(&mut self, cut: u64, before: &[u64]) {
        let stalled = std::mem::replace(&mut self.stalled, false);
        while self.shipped_through < cut {
            self.ship();
        }
        self.stalled = stalled;
        for id in before {
            assert!(self.numbers.get(id).is_none_or(|seq| *seq <= cut), "write {id} above the cut {cut}");
        }
    }

    /// Makes a disk's file longer, and has its protection follow.
    fn grow(&mut self) {
        let volume = self.random.below(2) as usize;
        if self.wanted[volume] == GROWN_BYTES {
            return;
        }
        // As a block device has it, it may have anything there.
        let new = vec![0xbb; 64 << 10];
        self.disks[volume].files()[0].write_all_at(&new, self.wanted[volume]).expect("longer");
        self.wanted[volume] += 64 << 10;
        if let Some(vm) = &self.vm {
            vm.grow(self.wanted.to_vec());
        }
    }

    /// Brings a part of what is new of a disk, or gives it to the guest.
    fn bring_new(&mut self) {
        let (Some(vm), Some((new, at))) = (&self.vm, self.new.pop()) else { return };
        if at == new.range.end {
            self.reached.grown += u64::from(vm.give(&new));
            return;
        }
        let (range, len) = (ByteRange::new(at, 4096), 4096);
        let Some(mut slot) = self.sync_buffers.take() else { return self.new.push((new, at)) };
        let file = &self.disks[usize::from(new.volume)].files()[0];
        file.read_exact_at(&mut slot[..len], at).expect("read");
        match vm.bring(&new, range, Piece::of_slot(slot.share(), len), self.now()) {
            Brought::Done => self.new.push((new, range.end)),
            Brought::Later => self.new.push((new, at)),
            Brought::Ended => {}
        }
    }

    /// Ends the protection, if there is one, and begins it anew.
    fn protect_anew(&mut self) {
        if let Some((hold, ..)) = self.hold.take() {
            hold.abort();
        }
        if let (Some(mut sync), Some(vm)) = (self.sync.take(), &self.vm) {
            sync.cancel(vm.core());
        }
        if let Some(vm) = self.vm.take() {
            vm.unprotect();
            self.reached.reprotected += 1;
        }
        self.sync_answer = None;
        self.new.clear();
        let generation = GenerationId(Uuid::from_u128(u128::from(self.random.next())));
        let vm = SourceVm::protect(self.disks.clone(), LIMITS, self.store.clone(), generation)
            .expect("memory and a store");
        let vm = Arc::new(vm);
        vm.grow(self.wanted.to_vec());
        self.shipped_through = vm.generation().first_seq - 1;
        self.completed.clear();
        self.retained = Some(RetainedEntries(vm.clone()));
        self.vm = Some(vm);
    }

    /// Lets everything come to rest, and compares.
    fn end(&mut self) {
        self.stalled = false;
        if let Some((hold, ..)) = self.hold.take() {
            hold.abort();
        }
        for _ in 0..200_000 {
            self.time_us.fetch_add(1, Ordering::Relaxed);
            self.disk_io();
            self.wake_lanes();
            self.ship();
            self.tick();
            self.step_sync();
            self.bring_new();
            let vm = self.vm.as_ref().expect("protected");
            let snapshot = vm.snapshot();
            let has_grown =
                |(disk, wanted): (&Arc<ProtectedDisk>, &u64)| disk.geometry().size_bytes == *wanted;
            let grown = self.disks.iter().zip(&self.wanted).all(has_grown);
            let at_rest = self.waiting.is_empty() && self.sync.is_none() && grown;
            if at_rest && is_steady(vm) && snapshot.last_seq == self.shipped_through {
                for (disk, image) in self.disks.iter().zip(&self.images) {
                    let mut local = vec![0; disk.geometry().size_bytes as usize];
                    disk.files()[0].read_exact_at(&mut local, 0).expect("read");
                    let differs = local.chunks(512).zip(image.chunks(512)).position(|(a, b)| a != b);
                    assert_eq!(differs, None, "sector where disk and target differ");
                }
                self.retained.as_mut().expect("present").free_through(u64::MAX);
                assert_eq!(self.door.arena.free_count(), 48, "every slot came back");
                assert_eq!(self.sync_buffers.free_count(), 4, "every sync buffer came back");
                return;
            }
        }
        let waiting: Vec<u64> = self.waiting.keys().copied().collect();
        let io = self.door.queue.len();
        panic!(
            "no rest: {waiting:?} wait, {io} in I/O, in a sync: {}: {:?}",
            self.sync.is_some(),
            self.vm.as_ref().map(|vm| vm.snapshot())
        );
    }
}

/// Captured whole, and in no sync.
fn is_steady(vm: &SourceVm) -> bool {
    let snapshot = vm.snapshot();
    matches!(snapshot.mode, Mode::Streaming { .. }) && snapshot.sync_id.is_none()
}

fn run(seed: u64) -> Reached {
    let mut world = World::new(seed);
    for step in 0..4000 {
        if step == 300 {
            world.protect_anew();
        }
        world.step();
    }
    world.end();
    world.reached
}

#[test]
fn whatever_happens_the_target_ends_equal_to_the_disks() {
    let mut sum = Reached::default();
    for seed in 0..100 {
        let reached = catch_unwind(|| run(seed)).unwrap_or_else(|_| panic!("seed {seed}"));
        sum.overflows += reached.overflows;
        sum.generations += reached.generations;
        sum.syncs_ended += reached.syncs_ended;
        sum.checkpoints += reached.checkpoints;
        sum.expired += reached.expired;
        sum.held += reached.held;
        sum.repeated_reads += reached.repeated_reads;
        sum.held_ranges += reached.held_ranges;
        sum.local_errors += reached.local_errors;
        sum.reprotected += reached.reprotected;
        sum.grown += reached.grown;
    }
    let counts = [
        sum.overflows,
        sum.generations,
        sum.syncs_ended,
        sum.checkpoints,
        sum.expired,
        sum.held,
        sum.repeated_reads,
        sum.held_ranges,
        sum.local_errors,
        sum.reprotected,
        sum.grown,
    ];
    assert!(counts.iter().all(|count| *count > 0), "something was never reached: {sum:?}");
}

#[test]
fn planted_bugs_are_caught() {
    for bug in [Planted::OverlapIgnored, Planted::SyncOverWrites] {
        plant(Some(bug));
        let caught = (0..40).any(|seed| catch_unwind(AssertUnwindSafe(|| run(seed))).is_err());
        plant(None);
        assert!(caught, "{bug:?}");
    }
}
