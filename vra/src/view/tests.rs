use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use journal::writer::Change;
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use ublk::arena::Slot;
use ublk::serve::{Completion, FileIo, FileOp, IoBuffer, Op, Port, Request, Wake};

use super::test_journal::TestJournal;
use super::*;

const SIZE_BYTES: u64 = 2 << 20;
const SLOT_BYTES: usize = 128 << 10;

/// Lanes of a view whose file I/O is done by this thread, one by one in a random order.
struct Guest {
    disk: Arc<ViewDisk>,
    lanes: Vec<(Box<dyn Lane>, Arc<Bell>)>,
    port: QueuePort,
    rng: StdRng,
    tag: u64,
}

#[derive(Default)]
struct Bell(AtomicBool);

impl Wake for Bell {
    fn wake(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

struct QueuePort {
    lane: usize,
    io: Vec<(usize, FileIo)>,
    done: BTreeMap<u64, Completion>,
}

impl Port for QueuePort {
    fn submit(&mut self, io: FileIo) {
        self.io.push((self.lane, io));
    }

    fn complete(&mut self, completion: Completion) {
        assert!(self.done.insert(completion.tag, completion).is_none(), "completed twice");
    }

    fn take_slot(&mut self) -> Option<Slot> {
        None
    }
}

impl Guest {
    fn new(disk: &Arc<ViewDisk>, lanes: usize, seed: u64) -> Self {
        let lane = || {
            let bell = Arc::new(Bell::default());
            (Arc::clone(disk).lane(Arc::clone(&bell) as _), bell)
        };
        let port = QueuePort { lane: 0, io: Vec::new(), done: BTreeMap::new() };
        let lanes = (0..lanes).map(|_| lane()).collect();
        Self { disk: Arc::clone(disk), lanes, port, rng: StdRng::seed_from_u64(seed), tag: 0 }
    }

    fn start(&mut self, op: Op, offset_bytes: u64, len_bytes: u64, slot: Option<Slot>) -> u64 {
        self.tag += 1;
        let request = Request { tag: self.tag, op, offset_bytes, len_bytes, fua: self.rng.random(), slot };
        self.port.lane = self.rng.random_range(0..self.lanes.len());
        self.lanes[self.port.lane].0.request(request, &mut self.port);
        self.tag
    }

    fn step(&mut self) -> bool {
        for (index, (lane, bell)) in self.lanes.iter_mut().enumerate() {
            if bell.0.swap(false, Ordering::SeqCst) {
                self.port.lane = index;
                lane.wake(&mut self.port);
            }
        }
        if self.port.io.is_empty() {
            return false;
        }
        let (lane, mut io) = self.port.io.swap_remove(self.rng.random_range(0..self.port.io.len()));
        let file = &self.disk.files()[io.file.0 as usize];
        let range = io.buffer_offset_bytes as usize..io.buffer_offset_bytes as usize + io.len_bytes as usize;
        let result = match (io.op, &mut io.buffer) {
            (FileOp::Read, IoBuffer::Owned(slot)) => file.read_exact_at(&mut slot[range], io.offset_bytes),
            (FileOp::Write { .. }, IoBuffer::Shared(slot)) => {
                file.write_all_at(&slot[range], io.offset_bytes)
            }
            (FileOp::Sync, IoBuffer::None) => file.sync_data(),
            (op, buffer) => panic!("{op:?} with {buffer:?}"),
        };
        let result = result.map_err(|error| ublk::serve::Errno(error.raw_os_error().unwrap_or(libc::EIO)));
        self.port.lane = lane;
        self.lanes[lane].0.file_done(io.token, result, io.buffer, &mut self.port);
        true
    }

    fn finish(&mut self) {
        while self.step() {}
        assert_eq!(self.port.done.len() as u64, self.tag, "a request was forgotten");
    }

    /// Reads a range at once; the errno if it failed.
    fn read(&mut self, offset_bytes: u64, len_bytes: u64) -> Result<Vec<u8>, i32> {
        let arena = Arena::new(SLOT_BYTES, 1).expect("arena");
        let mut slot = arena.take().expect("slot");
        slot.fill(0xA5);
        let tag = self.start(Op::Read, offset_bytes, len_bytes, Some(slot));
        self.finish();
        let completion = &self.port.done[&tag];
        completion.result.map_err(|errno| errno.0)?;
        Ok(completion.slot.as_ref().expect("slot")[..len_bytes as usize].to_vec())
    }

    /// Compares the whole disk with the model, in reads of all lengths.
    fn compare(&mut self, model: &[u8]) {
        let mut at = 0;
        while at < SIZE_BYTES {
            let len = (self.rng.random_range(1..=256_u64) * 512).min(SIZE_BYTES - at);
            let read = self.read(at, len).expect("readable");
            assert!(read == model[at as usize..(at + len) as usize], "different in {at}+{len}");
            at += len;
        }
    }
}

pub(super) fn view_source(journal: &TestJournal, seq: u64, freshness: Freshness) -> ViewSource {
    let direct = |name: &str| {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_DIRECT);
        options.open(journal.folder.join(name)).expect("open")
    };
    ViewSource {
        volume: journal.view(seq).expect("in the history"),
        journal: direct("journal.hfj"),
        recovery_disk: direct("disk-0.raw"),
        seq,
        freshness,
        keep: Box::new(()),
    }
}

fn view(journal: &TestJournal, seq: u64, scratch_bytes: u64) -> Arc<ViewDisk> {
    view_that(journal, seq, scratch_bytes, Freshness::Superblock)
}

fn view_that(journal: &TestJournal, seq: u64, scratch_bytes: u64, freshness: Freshness) -> Arc<ViewDisk> {
    let settings = ViewSettings { logical_block_bytes: 512, look_for_holes: true };
    let scratch = (scratch_bytes > 0)
        .then(|| ScratchFile::create(&journal.folder.join("scratch-0.raw"), scratch_bytes).expect("scratch"));
    ViewDisk::new(view_source(journal, seq, freshness), settings, scratch).expect("view")
}

#[test]
fn a_view_reads_as_the_volume_was_at_every_number() {
    let mut journal = TestJournal::new("numbers", SIZE_BYTES, "{}");
    journal.random_changes(1, 300, 400);
    for seq in [2, 3, 40, 150, journal.seq] {
        let disk = view(&journal, seq, 0);
        assert!(disk.geometry().read_only);
        Guest::new(&disk, 2, seq).compare(&journal.model(seq));
    }
}

#[test]
fn reads_that_the_recovery_disk_cannot_take_in_place_go_beside() {
    let mut journal = TestJournal::new("aligned", SIZE_BYTES, "{}");
    journal.random_changes(2, 100, 100);
    let mut disk = view(&journal, journal.seq, 0);
    Arc::get_mut(&mut disk).expect("alone").limits.disk_align_bytes = 4096;
    Guest::new(&disk, 1, 7).compare(&journal.model(journal.seq));
}

/// The recovery disk ends where the volume did before: it grows with the promotion of the resize.
#[test]
fn a_grown_volume_is_zero_behind_its_recovery_disk() {
    let mut journal = TestJournal::new("grown", SIZE_BYTES, "{}");
    journal.random_changes(9, 20, 100);
    let before = journal.seq;
    journal.resize(SIZE_BYTES + (1 << 20));
    journal.write(SIZE_BYTES + 65536, vec![0x3c; 8192]);
    journal.flush();
    for (seq, size_bytes) in [(before, SIZE_BYTES), (journal.seq, SIZE_BYTES + (1 << 20))] {
        let disk = view(&journal, seq, 0);
        assert_eq!(disk.geometry().size_bytes, size_bytes);
        let (model, mut guest) = (journal.model(seq), Guest::new(&disk, 1, 6));
        for at in (0..size_bytes).step_by(49152) {
            let len = 131_072.min(size_bytes - at);
            let read = guest.read(at, len).expect("readable");
            assert!(read == model[at as usize..(at + len) as usize], "different in {at}+{len} at {seq}");
        }
    }
}

#[test]
fn a_scratch_view_takes_changes_in_their_order_and_leaves_the_rest_alone() {
    let mut journal = TestJournal::new("scratch", SIZE_BYTES, "{}");
    journal.random_changes(3, 100, 200);
    let seq = journal.seq;
    let recovery_disk = std::fs::read(journal.folder.join("disk-0.raw")).expect("disk");
    let before = std::fs::read(journal.path()).expect("journal");
    let disk = view(&journal, seq, SIZE_BYTES);
    let mut model = journal.model(seq);
    let arena = Arena::new(SLOT_BYTES, 64).expect("arena");
    let mut guest = Guest::new(&disk, 3, 5);
    for _ in 0..12 {
        for _ in 0..40 {
            let sectors = guest.rng.random_range(1..=256_u64);
            let sector = guest.rng.random_range(0..=SIZE_BYTES / 512 - sectors);
            let (offset, len) = (sector * 512, sectors * 512);
            let range = offset as usize..(offset + len) as usize;
            match guest.rng.random_range(0..4) {
                0 => {
                    model[range].fill(0);
                    guest.start(Op::Discard, offset, len, None);
                }
                1 => {
                    guest.start(Op::Flush, 0, 0, None);
                }
                _ => {
                    let mut slot = arena.take().expect("slot");
                    guest.rng.fill_bytes(&mut slot[..len as usize]);
                    model[range].copy_from_slice(&slot[..len as usize]);
                    guest.start(Op::Write, offset, len, Some(slot));
                }
            }
            if guest.rng.random() {
                guest.step();
            }
        }
        guest.finish();
        assert!(guest.port.done.values().all(|completion| completion.result.is_ok()));
        guest.port.done.values_mut().for_each(|completion| completion.slot = None);
        assert_eq!(arena.free_count(), 64, "a slot was kept");
        guest.compare(&model);
    }
    assert!(std::fs::read(journal.folder.join("disk-0.raw")).expect("disk") == recovery_disk);
    assert!(std::fs::read(journal.path()).expect("journal") == before);
    drop(guest);
    drop(disk);
    assert!(!journal.folder.join("scratch-0.raw").exists());
}

#[test]
fn a_full_scratch_file_is_enospc_and_what_was_written_stays() {
    let mut journal = TestJournal::new("full", SIZE_BYTES, "{}");
    journal.random_changes(4, 10, 10);
    let disk = view(&journal, journal.seq, 2 * CHUNK_BYTES);
    assert!(!journal.folder.join("scratch-0.raw").exists(), "a process that is killed would leave it behind");
    let arena = Arena::new(SLOT_BYTES, 4).expect("arena");
    let mut guest = Guest::new(&disk, 1, 5);
    let mut results = Vec::new();
    for chunk in 0..3 {
        let mut slot = arena.take().expect("slot");
        slot.fill(chunk as u8 + 1);
        let tag = guest.start(Op::Write, chunk * CHUNK_BYTES, CHUNK_BYTES, Some(slot));
        guest.finish();
        results.push(guest.port.done[&tag].result.map_err(|errno| errno.0));
    }
    assert_eq!(results, [Ok(()), Ok(()), Err(libc::ENOSPC)]);
    assert_eq!(guest.read(CHUNK_BYTES, 512).expect("readable"), [2; 512]);
    assert_eq!(disk.scratch_used_bytes(), Some(2 * CHUNK_BYTES));
}

#[test]
fn damage_is_eio_where_it_is_and_nowhere_else() {
    let mut journal = TestJournal::new("damage", SIZE_BYTES, "{}");
    journal.write(0, vec![0x11; 16384]);
    journal.flush();
    journal.write(65536, vec![0x22; 16384]);
    journal.flush();
    journal.change(Change::Seal);
    let disk = view(&journal, journal.seq, 0);
    TestJournal::flip_bit(&journal.path(), &[0x22; 16384], 5000);
    let mut guest = Guest::new(&disk, 1, 1);
    assert_eq!(guest.read(65536, 4096).expect("whole"), [0x22; 4096]);
    assert_eq!(guest.read(65536 + 4096, 512), Err(libc::EIO));
    assert_eq!(guest.read(0, 131_072), Err(libc::EIO));
    assert_eq!(guest.read(0, 16384).expect("whole"), [0x11; 16384]);
    assert!(!disk.is_gone());
}

/// As another process than the journal's owner would have it.
fn collected(journal: &TestJournal, seq: u64) -> Freshness {
    let path = journal.path();
    let collect = move || {
        let mut storage = journal::storage::ring::RingStorage::new(64)?;
        let file = journal::storage::ring::DirectFile::open(&path, journal::storage::ring::Access::ReadOnly)?;
        let file = storage.add_file(file);
        let reader = journal::view::Reader::open(&mut storage, file, &Default::default())?;
        Ok((reader.view(seq)?.take_volume(0)?, Layout::of(&reader.survey)))
    };
    let (_, layout) = collect().map_err(|error: anyhow::Error| error.to_string()).expect("readable");
    Freshness::Collected { layout, collect: Box::new(collect) }
}

/// Another process opens the journal, which copies its newest segment elsewhere, and uses the old place again.
#[test]
fn a_view_finds_segments_again_that_another_process_moved() {
    let mut journal = TestJournal::new("moved", SIZE_BYTES, "{}");
    journal.random_changes(8, 10, 10);
    journal.change(Change::Seal);
    journal.write(0, vec![0x5a; 65536]);
    journal.flush();
    let (seq, path) = (journal.seq, journal.path());
    let model = journal.model(seq);
    let found = view_that(&journal, seq, 0, collected(&journal, seq));
    let lost = view(&journal, seq, 0);
    journal.reopen();
    for round in 0..40 {
        journal.random_changes(100 + round, 30, 200);
    }
    Guest::new(&found, 2, 3).compare(&model);
    assert_eq!(found.first_damage(), None);
    assert_eq!(Guest::new(&lost, 1, 3).read(0, 65536), Err(libc::EIO), "the old place was used again");

    // What is damaged is damaged wherever it lies.
    TestJournal::flip_bit(&path, &[0x5a; 16384], 5000);
    let mut guest = Guest::new(&found, 1, 4);
    assert_eq!(guest.read(4096, 4096), Err(libc::EIO));
    assert_eq!(guest.read(8192, 4096).expect("whole"), [0x5a; 4096]);
    assert_eq!(found.first_damage().map(|(record, _)| record), Some(seq));
    assert!(!found.is_gone());
}

#[test]
fn a_history_given_up_by_another_process_ends_the_view() {
    let mut journal = TestJournal::new("gone", SIZE_BYTES, "{}");
    journal.random_changes(6, 10, 10);
    let disk = view(&journal, journal.seq, 0);
    let mut guest = Guest::new(&disk, 1, 1);
    guest.read(0, 131_072).expect("there");
    journal.change(Change::GiveUpHistory { sync_id: 10 });
    let read: Vec<_> = (0..SIZE_BYTES / 131_072).map(|part| guest.read(part * 131_072, 131_072)).collect();
    assert!(read.contains(&Err(libc::EIO)), "no read noticed");
    assert!(disk.is_gone());
    assert_eq!(guest.read(0, 512), Err(libc::EIO));
}

/// C5: another process promotes a damaged record while the view is open. Its place on the recovery disk is wrong now.
#[test]
fn a_record_that_is_promoted_damaged_meanwhile_stays_eio() {
    let mut journal = TestJournal::new("promoted-damaged", SIZE_BYTES, "{}");
    journal.random_changes(5, 10, 10);
    journal.write(SIZE_BYTES / 4, vec![0x5a; 16384]);
    journal.flush();
    journal.change(Change::Seal);
    let seq = journal.seq;
    // An owner's own views learn of bad ranges from it: until then they may not take the recovery disk for right.
    let views = [collected(&journal, seq), Freshness::Superblock].map(|how| view_that(&journal, seq, 0, how));
    TestJournal::flip_bit(&journal.path(), &[0x5a; 16384], 5000);
    journal.promote();
    assert_eq!(journal.writer.bad_ranges().len(), 1);
    let model = journal.model(seq);
    for (number, disk) in views.iter().enumerate() {
        let mut guest = Guest::new(disk, 1, 7);
        // A read of the recovery disk, after which the superblock is looked at.
        guest.read(SIZE_BYTES - 4096, 4096).expect("whole");
        assert_eq!(guest.read(SIZE_BYTES / 4 + 4096, 4096), Err(libc::EIO), "view {number}");
        let place = SIZE_BYTES as usize / 4;
        for offset_bytes in [0, 8192, 12288] {
            let read = guest.read((place + offset_bytes) as u64, 4096).expect("whole");
            assert!(read == model[place + offset_bytes..][..4096], "view {number}, at {offset_bytes}");
        }
        assert!(!disk.is_gone());
    }
}

/// The other way round: what was bad when the view was opened is written over by a promotion.
#[test]
fn a_bad_range_that_is_promoted_over_meanwhile_is_read() {
    let mut journal = TestJournal::new("promoted-over", SIZE_BYTES, "{}");
    journal.write(SIZE_BYTES / 4, vec![0x5a; 16384]);
    journal.flush();
    journal.change(Change::Seal);
    TestJournal::flip_bit(&journal.path(), &[0x5a; 16384], 5000);
    journal.promote();
    let bad = view_that(&journal, journal.seq, 0, collected(&journal, journal.seq));
    assert_eq!(Guest::new(&bad, 1, 7).read(SIZE_BYTES / 4 + 4096, 4096), Err(libc::EIO));
    journal.write(SIZE_BYTES / 4 + 4096, vec![0x5b; 4096]);
    journal.flush();
    journal.change(Change::Seal);
    let seq = journal.seq;
    let disk = view_that(&journal, seq, 0, collected(&journal, seq));
    journal.promote();
    assert!(journal.writer.bad_ranges().is_empty());
    for seed in 0..3 {
        Guest::new(&disk, 2, seed).compare(&journal.model(seq));
    }
}

/// Somebody who copies the disk and leaves out what is called a hole must not take what is lost for zeroes.
#[test]
fn what_is_lost_is_no_hole() {
    let mut journal = TestJournal::new("no-hole", SIZE_BYTES, "{}");
    let place = SIZE_BYTES / 2 + 65536;
    journal.write(place, vec![0x5a; 65536]);
    journal.flush();
    journal.change(Change::Seal);
    TestJournal::flip_bit(&journal.path(), &[0x5a; 16384], 5000);
    journal.promote();
    // As a copy of the datastore that makes files sparse might leave it.
    let disk = OpenOptions::new().write(true).open(journal.folder.join("disk-0.raw")).expect("disk");
    let mode =
        nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    nix::fcntl::fallocate(&disk, mode, place as libc::off_t, 65536).expect("punched");
    let view = view(&journal, journal.seq, 0);
    let mut at = 0;
    let mut lost = Vec::new();
    for extent in view.extents(0, SIZE_BYTES, 100) {
        if extent.allocation == Allocation::Data && at >= SIZE_BYTES / 2 {
            lost.push((at, extent.len_bytes));
        }
        at += extent.len_bytes;
    }
    assert_eq!((lost, at), (vec![(place + 4096, 4096)], SIZE_BYTES));
}

#[test]
fn extents_say_where_nothing_is() {
    let mut journal = TestJournal::new("extents", SIZE_BYTES, "{}");
    journal.zero(0, 65536);
    journal.write(SIZE_BYTES / 2 + 65536, vec![7; 4096]);
    journal.flush();
    let disk = view(&journal, journal.seq, SIZE_BYTES);
    let model = journal.model(journal.seq);
    let extents = disk.extents(0, SIZE_BYTES, 100);
    assert_eq!(extents[0], Extent { len_bytes: 65536, allocation: Allocation::Hole });
    let mut at = 0;
    for extent in &extents {
        let end = at + extent.len_bytes;
        let zero = model[at as usize..end as usize].iter().all(|byte| *byte == 0);
        assert!(extent.allocation == Allocation::Data || zero, "data at {at} is called a hole");
        at = end;
    }
    assert_eq!(at, SIZE_BYTES);
    assert_eq!(disk.extents(0, SIZE_BYTES, 1), extents[..1]);
    let data: u64 = extents
        .iter()
        .filter(|extent| extent.allocation == Allocation::Data)
        .map(|extent| extent.len_bytes)
        .sum();
    assert!(data <= SIZE_BYTES / 2 + 65536, "the hole of the recovery disk was not seen: {extents:?}");
}
