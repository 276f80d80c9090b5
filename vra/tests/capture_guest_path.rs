//! The guest's path of a protected disk doesn't allocate: counted for this thread by the global allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs::File;
use std::sync::Arc;

use ublk::arena::{Arena, Slot};
use ublk::serve::{
    Completion, Disk, Errno, FileIo, FileOp, Geometry, IoBuffer, Lane, Op, Port, Request, Wake, ZeroLimits,
};
use vra::api::GenerationId;
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
}

impl Port for Door {
    fn submit(&mut self, io: FileIo) {
        self.queue.push(io);
    }

    fn complete(&mut self, completion: Completion) {
        assert_eq!(completion.result, Ok(()));
        self.slots.extend(completion.slot);
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

#[test]
fn writes_are_captured_without_allocating() {
    let disk = disk();
    let limits = CaptureLimits { ring_entries: 4096, dense_bytes: 4 << 20, ..CaptureLimits::STANDARD };
    let vm = SourceVm::protect(vec![disk.clone()], limits, Arc::new(NoStore), GenerationId::random());
    let vm = Arc::new(vm.expect("memory"));
    let mut retained = RetainedEntries(vm.clone());
    vm.granted(vm.generation().generation, true);
    let actions = vm.tick(Now { mono_us: 1, wall_us: 1 }, &mut || 5);
    assert!(actions.iter().any(|action| matches!(action, SourceAction::BeginSync(_))));

    let arena = Arena::new(128 << 10, 128).expect("arena");
    let slots = (0..16).map(|_| arena.take().expect("a slot")).collect();
    let mut door = Door { arena, queue: Vec::with_capacity(64), slots };
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
