//! The numbering core under all kinds of interleavings: its real files, compiled against shuttle's locks and atomics,
//! with guests, a disk whose writes take several steps, a stream, syncs and checkpoints as threads.
//!
//! Each property is also run with the rule taken out that it proves: then it must fail.

mod primitives {
    pub(super) use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    pub(super) use shuttle::sync::{Mutex, MutexGuard};
}

#[allow(dead_code, unused_imports, unreachable_pub, reason = "a second copy of which the tests use a part")]
#[path = "numbering/mod.rs"]
mod numbering;

use std::panic::{AssertUnwindSafe, catch_unwind};

use bytes::Bytes;
use journal::batch::{Record, RecordKind};
use shuttle::sync::{Arc, Condvar, Mutex};
use shuttle::{rand::Rng, thread};
use ublk::arena::Arena;
use ublk::serve::{Wake, Waker};

use crate::capture::payload::{DENSE_CHUNK_BYTES, DenseWriter};
use crate::planted::{Planted, plant};
use numbering::{
    ByteRange, Confirmed, Consumer, CoreLimits, Drained, NewWrite, Offer, Received, SyncContent, VmCore,
    Wakeups, ring,
};

const BLOCK_BYTES: u64 = 512;
const BLOCKS: u64 = 4;
const RUNS: usize = 400;

/// One VM with a disk of a few blocks, each of which holds the id of its last write.
struct Vm {
    core: VmCore,
    consumer: Mutex<Consumer>,
    arena: Arena,
    disk: Mutex<[u64; BLOCKS as usize]>,
    /// Numbers by id of write.
    numbers: Mutex<Vec<(u64, u64)>>,
}

impl Vm {
    fn new() -> Arc<Self> {
        let (producer, consumer) = ring(256, 1);
        let limits = CoreLimits { writes_in_flight: 8, retained_bytes: 1 << 20 };
        let core = VmCore::new(producer, limits, 1, u64::MAX);
        core.with(|core, _| {
            core.add_volume();
            core.start_streaming().expect("an empty ring");
        });
        let arena = Arena::new(DENSE_CHUNK_BYTES, 8).expect("arena");
        let disk = Mutex::new([1000, 1001, 1002, 1003]);
        Arc::new(Self { core, consumer: Mutex::new(consumer), arena, disk, numbers: Mutex::new(Vec::new()) })
    }

    /// Everything published, in order.
    fn stream(&self) -> Vec<Record> {
        let mut records = Vec::new();
        self.consumer.lock().unwrap().walk(1, |entry| {
            records.push(entry.to_record());
            true
        });
        assert!(records.iter().zip(1..).all(|(record, seq)| record.seq == seq), "no gap");
        records
    }

    /// What the target's disk holds after the stream, beginning with `blocks`.
    fn replay(&self, mut blocks: [u64; BLOCKS as usize]) -> [u64; BLOCKS as usize] {
        for record in self.stream() {
            if record.kind.changes_data() {
                for (data, at) in
                    record.payload.chunks(BLOCK_BYTES as usize).zip(record.offset_bytes / BLOCK_BYTES..)
                {
                    blocks[at as usize] = id_of(data);
                }
            }
        }
        blocks
    }

    fn number_of(&self, id: u64) -> Option<u64> {
        self.stream()
            .into_iter()
            .find(|record| record.kind == RecordKind::Write && id_of(&record.payload) == id)
            .map(|record| record.seq)
    }
}

/// One queue of a guest with one request at a time.
struct Guest {
    vm: Arc<Vm>,
    bell: Arc<Bell>,
    lane: u32,
    writer: DenseWriter,
    drained: Drained,
}

impl Guest {
    fn new(vm: &Arc<Vm>) -> Self {
        let bell = Arc::new(Bell::default());
        let lane = vm.core.add_lane(std::sync::Arc::new(BellWaker(bell.clone())) as Waker);
        let writer = DenseWriter::new(vm.arena.clone());
        Self { vm: vm.clone(), bell, lane, writer, drained: Drained::default() }
    }

    /// Writes `id` to the blocks and returns once the guest may know.
    fn write(&mut self, id: u64, first: u64, count: u64) {
        let mut wakeups = Wakeups::default();
        let range = ByteRange::new(first * BLOCK_BYTES, count * BLOCK_BYTES);
        let new = NewWrite { lane: self.lane, token: id, volume: 0, range };
        let mut data = vec![0; range.len_bytes() as usize];
        for block in data.chunks_mut(BLOCK_BYTES as usize) {
            block[..8].copy_from_slice(&id.to_le_bytes());
        }
        let mut offer = Offer::Data(self.writer.copy(&data).expect("room"));
        let ticket = loop {
            match self.vm.core.receive(&new, &mut offer, 0, &mut wakeups) {
                Received::Issue(ticket) => break ticket,
                Received::Wait(ticket) => {
                    self.wait_for(|drained| std::mem::take(&mut drained.ready) == [id]);
                    break ticket;
                }
                Received::Deferred => self.wait_for(|drained| std::mem::take(&mut drained.retry)),
                Received::PrepareFirst | Received::Moved => unreachable!("prepared, and the volume stays"),
            }
        };
        for block in first..first + count {
            self.vm.disk.lock().unwrap()[block as usize] = id;
        }
        if self.vm.core.landed(ticket, true, &mut wakeups).held {
            while !self.vm.core.complete_held(ticket, &mut wakeups) {
                self.wait_for(|drained| std::mem::take(&mut drained.recheck_held));
            }
        }
    }

    /// Reads a block and returns its id once the guest may know.
    fn read(&mut self, block: u64) -> u64 {
        let id = self.vm.disk.lock().unwrap()[block as usize];
        let range = ByteRange::new(block * BLOCK_BYTES, BLOCK_BYTES);
        while self.vm.core.read_is_held(self.lane, 0, range) {
            self.wait_for(|drained| std::mem::take(&mut drained.recheck_held));
        }
        id
    }

    fn wait_for(&mut self, come: impl Fn(&mut Drained) -> bool) {
        loop {
            self.vm.core.drain(self.lane, &mut self.drained);
            if come(&mut self.drained) {
                return;
            }
            self.bell.wait();
        }
    }
}

#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    ring: Condvar,
}

impl Bell {
    fn wait(&self) {
        let mut rung = self.rung.lock().unwrap();
        while !*rung {
            rung = self.ring.wait(rung).unwrap();
        }
        *rung = false;
    }
}

struct BellWaker(Arc<Bell>);

impl Wake for BellWaker {
    fn wake(&self) {
        *self.0.rung.lock().unwrap() = true;
        self.0.ring.notify_one();
    }
}

fn id_of(block: &[u8]) -> u64 {
    u64::from_le_bytes(block[..8].try_into().expect("eight bytes"))
}

/// A1, A2: what the stream says is what the disk holds, and a write that was submitted after another's completion has the
/// larger number.
fn disk_and_stream_agree() {
    let vm = Vm::new();
    let completed = Arc::new(Mutex::new(Vec::new()));
    let guests: Vec<_> = (0..3_u64)
        .map(|guest| {
            let (vm, completed) = (vm.clone(), completed.clone());
            thread::spawn(move || {
                let mut queue = Guest::new(&vm);
                for n in 1..=2 {
                    let id = guest * 10 + n;
                    let before = completed.lock().unwrap().clone();
                    let first = shuttle::rand::thread_rng().gen_range(0..BLOCKS - 1);
                    queue.write(id, first, 2);
                    vm.numbers.lock().unwrap().extend(before.iter().map(|&earlier| (earlier, id)));
                    completed.lock().unwrap().push(id);
                }
            })
        })
        .collect();
    for guest in guests {
        guest.join().unwrap();
    }
    assert_eq!(vm.replay([1000, 1001, 1002, 1003]), *vm.disk.lock().unwrap());
    for &(earlier, later) in &*vm.numbers.lock().unwrap() {
        assert!(vm.number_of(earlier) < vm.number_of(later), "{earlier} completed before {later} began");
    }
}

/// D2: a write that depends on another, which the guest knew from its completion or from a read, is in a checkpoint only
/// together with that other.
fn checkpoints_hold_no_effect_without_its_cause() {
    let (first, second) = (Vm::new(), Vm::new());
    let writer = {
        let (first, second) = (first.clone(), second.clone());
        thread::spawn(move || {
            Guest::new(&first).write(1, 0, 1);
            Guest::new(&second).write(2, 0, 1);
        })
    };
    let reader = {
        let (first, second) = (first.clone(), second.clone());
        thread::spawn(move || {
            if Guest::new(&first).read(0) == 1 {
                Guest::new(&second).write(3, 1, 1);
            }
        })
    };
    let cuts = [&first, &second].map(|vm| vm.core.hold(7).expect("streaming"));
    for vm in [&first, &second] {
        vm.core.commit(7, Bytes::from_static(b"checkpoint"), 0).expect("held");
        vm.core.release(7);
    }
    writer.join().unwrap();
    reader.join().unwrap();
    let cause = first.number_of(1).expect("written");
    for effect in [2, 3].into_iter().filter_map(|id| second.number_of(id)) {
        assert!(effect > cuts[1] || cause <= cuts[0], "effect {effect} <= {}, cause {cause}", cuts[1]);
    }
}

/// B3: after a sync beside guests' writes the target holds what the disk holds.
fn a_sync_never_puts_old_over_new() {
    let vm = Vm::new();
    let guests: Vec<_> = (0..2_u64)
        .map(|guest| {
            let vm = vm.clone();
            thread::spawn(move || {
                let mut queue = Guest::new(&vm);
                for n in 1..=2 {
                    let first = shuttle::rand::thread_rng().gen_range(0..BLOCKS - 1);
                    queue.write(guest * 10 + n, first, 2);
                }
            })
        })
        .collect();
    sync(&vm);
    for guest in guests {
        guest.join().unwrap();
    }
    assert_eq!(vm.replay([0; BLOCKS as usize]), *vm.disk.lock().unwrap());
}

fn sync(vm: &Arc<Vm>) {
    let bell = Arc::new(Bell::default());
    let waker = std::sync::Arc::new(BellWaker(bell.clone()));
    vm.core.with(|core, wakeups| {
        core.set_syncer(waker);
        core.begin_sync(5, &[(0, BLOCKS * BLOCK_BYTES)], 0, wakeups).expect("streaming")
    });
    let mut writer = DenseWriter::new(vm.arena.clone());
    for chunk in 0..BLOCKS / 2 {
        let range = ByteRange::new(chunk * 2 * BLOCK_BYTES, 2 * BLOCK_BYTES);
        for attempt in 0.. {
            if attempt == 1 {
                vm.core.with(|core, _| core.hold_range(0, range)).expect("in a sync");
                while !vm.core.with(|core, _| core.is_range_drained(0, range)) {
                    bell.wait();
                }
            }
            let watch = vm.core.with(|core, _| core.watch(0, range)).expect("room for a watch");
            let mut data = vec![0; range.len_bytes() as usize];
            for (block, at) in data.chunks_mut(BLOCK_BYTES as usize).zip(chunk * 2..) {
                block[..8].copy_from_slice(&vm.disk.lock().unwrap()[at as usize].to_le_bytes());
            }
            let content = SyncContent::Data(writer.copy(&data).expect("room"));
            let confirmed = vm.core.with(|core, wakeups| core.confirm(watch, range, &content, 0, wakeups));
            if confirmed.expect("in a sync") == Confirmed::Done {
                break;
            }
            assert_eq!(attempt, 0, "a held range is clean");
        }
        vm.core.with(|core, wakeups| core.release_range(0, wakeups));
    }
    vm.core
        .with(|core, wakeups| core.end_sync(5, &[(0, BLOCKS * BLOCK_BYTES)], 0, wakeups))
        .expect("in a sync");
}

/// Whether random schedules break `property` with `bug` planted.
fn breaks(property: fn(), bug: Planted) -> bool {
    plant(Some(bug));
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        shuttle::check_random(property, RUNS * 10);
        shuttle::check_pct(property, RUNS * 10, 3);
    }));
    plant(None);
    outcome.is_err()
}

fn holds(property: fn()) {
    shuttle::check_random(property, RUNS);
    shuttle::check_pct(property, RUNS, 3);
}

#[test]
fn numbers_follow_the_disk() {
    holds(disk_and_stream_agree);
}

#[test]
fn numbers_outside_the_lock_are_caught() {
    assert!(breaks(disk_and_stream_agree, Planted::NumberOutsideLock));
}

#[test]
fn overlaps_ignored_are_caught() {
    assert!(breaks(disk_and_stream_agree, Planted::OverlapIgnored));
}

#[test]
fn checkpoints_are_causal() {
    holds(checkpoints_hold_no_effect_without_its_cause);
}

#[test]
fn a_flag_after_the_cut_is_caught() {
    assert!(breaks(checkpoints_hold_no_effect_without_its_cause, Planted::FlagAfterCut));
}

#[test]
fn reads_not_held_are_caught() {
    assert!(breaks(checkpoints_hold_no_effect_without_its_cause, Planted::ReadsNotHeld));
}

#[test]
fn syncs_run_beside_writes() {
    holds(a_sync_never_puts_old_over_new);
}

#[test]
fn a_sync_over_writes_is_caught() {
    assert!(breaks(a_sync_never_puts_old_over_new, Planted::SyncOverWrites));
}
