//! The guest's path of a protected disk: what it allocates (counted for this thread by the global allocator), which memory
//! it keeps, and what it asks of the local disk.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs::File;
use std::sync::Arc;

use ublk::arena::{Arena, Slot};
use ublk::serve::{
    Completion, Disk, Errno, FileIo, FileOp, Geometry, IoBuffer, Lane, Op, Port, Request, Wake, ZeroLimits,
};
use vra::api::GenerationId;
use vra::capture::modes::{Mode, OverflowReason};
use vra::capture::{
    CaptureLimits, ProtectedDisk, RetainedEntries, SequenceState, SequenceStore, SequenceStoreError,
    SourceAction, SourceVm,
};
use vra::clock::Now;
use vra::ship::Retained;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps `dealloc`'s contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct NoStore;

impl SequenceStore for NoStore {
    fn load(&self) -> Result<Option<SequenceState>, SequenceStoreError> {
        Ok(None)
    }

    fn save(&self, _state: &SequenceState) -> Result<(), SequenceStoreError> {
        Ok(())
    }
}

struct NoBell;

impl Wake for NoBell {
    fn wake(&self) {}
}

/// A door whose disk is done with everything at the next turn.
struct Door {
    arena: Arena,
    queue: Vec<FileIo>,
    slots: Vec<Slot>,
    answered: u64,
}

impl Port for Door {
    fn submit(&mut self, io: FileIo) {
        self.queue.push(io);
    }

    fn complete(&mut self, completion: Completion) {
        assert_eq!(completion.result, Ok(()));
        self.slots.extend(completion.slot);
        self.answered += 1;
    }

    fn take_slot(&mut self) -> Option<Slot> {
        self.arena.take()
    }
}

fn disk() -> Arc<ProtectedDisk> {
    let zeroes = ZeroLimits { granularity_bytes: 512, max_bytes: 1 << 20 };
    let geometry = Geometry {
        size_bytes: 1 << 30,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        volatile_cache: true,
        fua: true,
        read_only: false,
        discard: Some(zeroes),
        write_zeroes: Some(zeroes),
    };
    let file = File::open("/dev/null").expect("/dev/null");
    Arc::new(ProtectedDisk::new(file, geometry, Arc::new(|| 1)))
}

/// One round of 16 requests in flight together, some of which overlap.
fn round(lane: &mut dyn Lane, door: &mut Door, number: u64) {
    for n in 0..16_u64 {
        let (op, len_bytes) = match n {
            0..8 => (Op::Write, 4096),
            8..12 => (Op::Write, 64 << 10),
            12 => (Op::Discard, 4096),
            13 => (Op::Flush, 0),
            _ => (Op::Read, 4096),
        };
        let slot = matches!(op, Op::Read | Op::Write).then(|| door.slots.pop().expect("a slot for each tag"));
        let offset_bytes = (number * 3 + n / 2) * 4096;
        lane.request(Request { tag: n, op, offset_bytes, len_bytes, fua: n == 1, slot }, door);
    }
    while let Some(io) = door.queue.pop() {
        assert!(io.op != FileOp::Read || matches!(io.buffer, IoBuffer::Owned(_)));
        let result: Result<(), Errno> = Ok(());
        lane.file_done(io.token, result, io.buffer, door);
    }
}

/// A VM of one disk that is streaming.
fn streaming(dense_bytes: u64) -> (Arc<SourceVm>, Arc<ProtectedDisk>) {
    let disk = disk();
    let limits = CaptureLimits { ring_entries: 4096, dense_bytes, ..CaptureLimits::STANDARD };
    let vm = SourceVm::protect(vec![disk.clone()], limits, Arc::new(NoStore), GenerationId::random());
    let vm = Arc::new(vm.expect("memory"));
    vm.granted(vm.generation().generation, true);
    let actions = vm.tick(Now { mono_us: 1, wall_us: 1 }, &mut || 5);
    assert!(actions.iter().any(|action| matches!(action, SourceAction::BeginSync(_))));
    (vm, disk)
}

fn door(slot_count: u32, tags: usize) -> Door {
    let arena = Arena::new(64 << 10, slot_count).expect("arena");
    let slots = (0..tags).map(|_| arena.take().expect("a slot")).collect();
    Door { arena, queue: Vec::with_capacity(64), slots, answered: 0 }
}

#[test]
fn writes_are_captured_without_allocating() {
    let (vm, disk) = streaming(4 << 20);
    let mut retained = RetainedEntries(vm.clone());
    let mut door = door(128, 16);
    let mut lane = disk.lane(Arc::new(NoBell));
    let (mut counted, mut captured) = (0, 0);
    for number in 0..200 {
        let before = ALLOCATIONS.get();
        round(&mut *lane, &mut door, number);
        if number >= 10 {
            counted += ALLOCATIONS.get() - before;
        }
        let mut records = Vec::new();
        retained.take_ready(vm.snapshot().freed_through + 1, usize::MAX, usize::MAX, &mut records);
        captured += records.len();
        retained.free_through(u64::MAX);
    }
    assert_eq!(captured, 200 * 13 + 1, "13 of 16 are changes, and the sync's begin");
    assert_eq!(counted, 0, "allocations on the guest's path after the first rounds");
    assert_eq!(door.arena.free_count(), 128 - 16);
}

#[test]
fn retained_writes_use_all_memory_but_what_the_doors_need() {
    let (vm, disk) = streaming(4 * (64 << 10));
    let mut door = door(64, 4);
    let mut lane = disk.lane(Arc::new(NoBell));
    let mut written = 0;
    while matches!(vm.snapshot().mode, Mode::Streaming { .. }) {
        let slot = door.slots.pop();
        let (op, len_bytes) = (Op::Write, 64 << 10);
        let request = Request { tag: 0, op, offset_bytes: written << 16, len_bytes, fua: false, slot };
        lane.request(request, &mut door);
        let io = door.queue.pop().expect("the guest's write goes to its disk");
        lane.file_done(io.token, Ok(()), io.buffer, &mut door);
        assert_eq!(door.slots.len(), 4, "the guest has its slots");
        written += 1;
    }
    let reason = OverflowReason::MemoryFull;
    assert_eq!(vm.snapshot().last_seq, written, "the sync's begin, and all writes but the last one");
    assert_eq!(vm.snapshot().mode, Mode::Overflow { from_seq: written + 1, reason });
    assert_eq!(written, 52 + 4 + 1, "60 free slots but an eighth of 64, then four dense chunks");
    assert_eq!(door.arena.free_count(), 8);
    RetainedEntries(vm.clone()).free_through(u64::MAX);
    assert_eq!(door.arena.free_count(), 60);
}

#[test]
fn zeroes_that_must_be_durable_are_synced_before_they_complete() {
    let (_vm, disk) = streaming(64 << 10);
    let mut door = door(8, 0);
    let mut lane = disk.lane(Arc::new(NoBell));
    for (op, expected) in [
        (Op::WriteZeroes { unmap: false }, FileOp::ZeroRange),
        (Op::WriteZeroes { unmap: true }, FileOp::PunchHole),
        (Op::Discard, FileOp::PunchHole),
    ] {
        let answered = door.answered;
        let request = Request { tag: 0, op, offset_bytes: 0, len_bytes: 4096, fua: true, slot: None };
        lane.request(request, &mut door);
        for expected in [expected, FileOp::Sync] {
            assert_eq!(door.answered, answered);
            let io = door.queue.pop().expect("file I/O");
            assert_eq!(io.op, expected);
            lane.file_done(io.token, Ok(()), io.buffer, &mut door);
        }
        assert_eq!(door.answered, answered + 1);
    }
}
