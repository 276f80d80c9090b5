use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use journal::bad_ranges::{BadRange, BadRanges};
use journal::writer::Change;
use rand::{Rng, RngExt};
use ublk::serve::{FileIo, FileOp, Op};
use uuid::Uuid;

use super::test_guest::{Guest, SLOT_BYTES};
use super::test_journal::TestJournal;
use super::*;

const SIZE_BYTES: u64 = 2 << 20;

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
        beneath: None,
        keep: Box::new(()),
    }
}

fn owner(seq: u64) -> ScratchOwner {
    ScratchOwner {
        vra: Uuid::from_u128(1),
        view: Uuid::from_u128(2),
        vm: Uuid::from_u128(3),
        journal: Uuid::from_u128(4),
        volume: Uuid::from_u128(5),
        number: 0,
        seq,
        disk_bytes: SIZE_BYTES,
        logical_block_bytes: 512,
    }
}

fn view(journal: &TestJournal, seq: u64, scratch_bytes: u64) -> Arc<ViewDisk> {
    view_that(journal, seq, scratch_bytes, Freshness::Superblock)
}

#[test]
fn an_encrypted_view_reads_what_was_written_and_neither_file_shows_it() {
    let mut journal = TestJournal::encrypted("encrypted", SIZE_BYTES, "{}");
    let secret = |number: u8| [b"no one else may read this ", &[number; 486][..]].concat();
    journal.random_changes(1, 200, 400);
    journal.write(0, secret(1));
    journal.flush();
    for seq in [2, 3, 40, 150, journal.seq] {
        Guest::new(&view(&journal, seq, 0), 2, seq).compare(&journal.model(seq));
    }
    let path = journal.folder.join("scratch-0.raw");
    let scratch = ScratchFile::create(&path, 1 << 20, true).expect("scratch");
    let settings = ViewSettings { logical_block_bytes: 512, look_for_holes: true };
    let source = view_source(&journal, journal.seq, Freshness::Superblock);
    let disk = ViewDisk::new(source, settings, Some(scratch)).expect("view");
    let mut guest = Guest::new(&disk, 2, 7);
    let mut model = journal.model(journal.seq);
    for (number, offset_bytes) in [(2, 512_u64), (3, 70_000 / 512 * 512), (4, 512)] {
        let bytes = secret(number);
        let mut slot = Arena::new(SLOT_BYTES, 1).expect("arena").take().expect("slot");
        slot[..bytes.len()].copy_from_slice(&bytes);
        guest.start(Op::Write, offset_bytes, bytes.len() as u64, Some(slot));
        guest.finish();
        model[offset_bytes as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    guest.compare(&model);
    let needle = b"no one else may read this";
    // It has no name any more.
    let scratch = PathBuf::from(format!("/proc/self/fd/{}", disk.files()[2].as_raw_fd()));
    // One that lasts needs the site's key as the journal does.
    assert_eq!(disk.site_key_id(), None);
    let keys =
        ScratchKeys { keyring: journal.writer.keyring(), encryption: journal.writer.superblock().encryption };
    let (path, live) = (journal.folder.join("scratch-1.raw"), journal.folder.join("scratch-1.map"));
    let lasting = ScratchFile::make(&path, &live, &owner(journal.seq), &keys, SIZE_BYTES).expect("scratch");
    let source = view_source(&journal, journal.seq, Freshness::Superblock);
    let lasting = ViewDisk::new(source, settings, Some(lasting)).expect("view");
    assert!(lasting.site_key_id().is_some_and(|id| journal.writer.site_key_ids().contains(&id)));
    for path in [journal.path(), scratch] {
        let bytes = std::fs::read(&path).expect("file");
        assert!(!bytes.windows(needle.len()).any(|window| window == needle), "{} shows it", path.display());
    }
}

fn view_that(journal: &TestJournal, seq: u64, scratch_bytes: u64, freshness: Freshness) -> Arc<ViewDisk> {
    let settings = ViewSettings { logical_block_bytes: 512, look_for_holes: true };
    let scratch = (scratch_bytes > 0).then(|| {
        ScratchFile::create(&journal.folder.join("scratch-0.raw"), scratch_bytes, false).expect("scratch")
    });
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
fn after_a_failed_sync_changes_are_refused_with_their_slots_and_reads_go_on() {
    let mut journal = TestJournal::new("sync-fails", SIZE_BYTES, "{}");
    journal.random_changes(10, 20, 50);
    let mut model = journal.model(journal.seq);
    let disk = view(&journal, journal.seq, SIZE_BYTES);
    let mut guest = Guest::new(&disk, 2, 5);
    assert_eq!(guest.change(Op::Write, false, 8192, 0x11), Ok(()));
    assert_eq!(guest.change(Op::Flush, false, 0, 0), Ok(()));
    model[8192..12288].fill(0x11);
    guest.fails = |io| io.op == FileOp::Sync;
    assert_eq!(guest.change(Op::Write, false, 16384, 0x22), Ok(()), "it asks for no sync");
    model[16384..20480].fill(0x22);
    assert_eq!(guest.change(Op::Flush, false, 0, 0), Err(libc::EIO));
    guest.is_failed_but_readable(&model);
}

#[test]
fn a_failed_write_is_its_own_and_a_failed_durable_one_is_the_last() {
    let mut journal = TestJournal::new("write-fails", SIZE_BYTES, "{}");
    journal.random_changes(11, 20, 50);
    let mut model = journal.model(journal.seq);
    let disk = view(&journal, journal.seq, SIZE_BYTES);
    let mut guest = Guest::new(&disk, 2, 6);
    guest.fails = |io| matches!(io.op, FileOp::Write { .. });
    assert_eq!(guest.change(Op::Write, false, 8192, 0x11), Err(libc::ENOSPC));
    assert!(!disk.is_scratch_failed());
    guest.fails = |_| false;
    guest.compare(&model);
    for fua in [false, true] {
        assert_eq!(guest.change(Op::Write, fua, 8192, 0x22), Ok(()));
    }
    model[8192..12288].fill(0x22);
    guest.fails = |io| matches!(io.op, FileOp::Write { .. });
    assert_eq!(guest.change(Op::Write, true, 8192, 0x33), Err(libc::ENOSPC));
    guest.is_failed_but_readable(&model);
}

/// The write of a page of the map, in a scratch that outlives its process.
#[test]
fn after_a_failed_write_of_the_map_changes_are_refused_with_their_slots() {
    let mut journal = TestJournal::new("map-fails", SIZE_BYTES, "{}");
    journal.random_changes(12, 20, 50);
    let mut model = journal.model(journal.seq);
    let owner = owner(journal.seq);
    let (path, live) = (journal.folder.join("scratch-0.raw"), journal.folder.join("scratch-0.map"));
    let keys =
        ScratchKeys { keyring: journal.writer.keyring(), encryption: journal.writer.superblock().encryption };
    let scratch = ScratchFile::make(&path, &live, &owner, &keys, SIZE_BYTES).expect("scratch");
    let settings = ViewSettings { logical_block_bytes: 512, look_for_holes: false };
    let source = view_source(&journal, journal.seq, Freshness::Superblock);
    let disk = ViewDisk::new(source, settings, Some(scratch)).expect("view");
    let mut guest = Guest::new(&disk, 2, 7);
    assert_eq!(guest.change(Op::Write, true, 8192, 0x11), Ok(()));
    guest.fails = |io| io.op == FileOp::Write { dsync: true };
    assert_eq!(guest.change(Op::Write, true, 16384, 0x22), Err(libc::EIO));
    // What it wrote has landed; that it may be lost is what the error says.
    model[8192..12288].fill(0x11);
    model[16384..20480].fill(0x22);
    guest.is_failed_but_readable(&model);
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

/// A datastore that can't be read for a while is not a checkpoint that is gone.
#[test]
fn a_view_outlives_reads_that_fail_for_a_while() {
    let mut journal = TestJournal::new("hiccup", SIZE_BYTES, "{}");
    journal.random_changes(3, 20, 60);
    let disk = view(&journal, journal.seq, 0);
    let (model, mut guest) = (journal.model(journal.seq), Guest::new(&disk, 1, 5));
    let all: fn(&FileIo) -> bool = |_| true;
    let superblocks: fn(&FileIo) -> bool =
        |io| io.file == plan::JOURNAL_FILE && SUPERBLOCK_OFFSETS.contains(&io.offset_bytes);
    for fails in [all, superblocks] {
        guest.fails = fails;
        guest.read(SIZE_BYTES - 4096, 4096).expect_err("nothing says what is right");
        assert!(!disk.is_gone());
        guest.fails = |_| false;
        guest.compare(&model);
    }
    // One copy says enough.
    guest.fails = |io| io.file == plan::JOURNAL_FILE && io.offset_bytes == SUPERBLOCK_OFFSETS[1];
    guest.compare(&model);
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
    journal.reopen();
    for round in 0..40 {
        journal.random_changes(100 + round, 30, 200);
    }
    Guest::new(&found, 2, 3).compare(&model);
    assert_eq!(found.first_damage(), None);

    // What is damaged is damaged wherever it lies.
    TestJournal::flip_bit(&path, &[0x5a; 16384], 5000);
    let mut guest = Guest::new(&found, 1, 4);
    assert_eq!(guest.read(4096, 4096), Err(libc::EIO));
    assert_eq!(guest.read(8192, 4096).expect("whole"), [0x5a; 4096]);
    assert_eq!(found.first_damage().map(|(record, _)| record), Some(seq));
    assert!(!found.is_gone());
}

/// This process opens the journal anew after its storage failed, which moves the newest segment too: the owner tells the view.
#[test]
fn a_view_that_is_repointed_outlives_the_places_that_it_read_from() {
    let mut journal = TestJournal::new("repointed", SIZE_BYTES, "{}");
    journal.random_changes(8, 10, 10);
    journal.change(Change::Seal);
    journal.write(0, vec![0x5a; 65536]);
    journal.flush();
    let seq = journal.seq;
    let model = journal.model(seq);
    let disk = view(&journal, seq, SIZE_BYTES);
    let mut guest = Guest::new(&disk, 2, 3);
    let arena = Arena::new(SLOT_BYTES, 1).expect("arena");
    // Planned by the old places and carried out when they are gone.
    let tag = guest.start(Op::Read, 4096, 8192, arena.take());
    journal.reopen();
    disk.repoint(journal.view(seq).expect("in the history"));
    for round in 0..40 {
        journal.random_changes(100 + round, 30, 200);
    }
    guest.finish();
    let late = &guest.port.done[&tag];
    assert_eq!(late.result, Ok(()));
    assert_eq!(late.slot.as_ref().expect("slot")[..8192], [0x5a; 8192]);
    guest.compare(&model);
    assert_eq!((disk.first_damage(), disk.is_gone()), (None, false));
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

/// What promotion changes past the view's number was copied before, and so was nothing else.
#[test]
fn a_view_that_was_kept_outlives_a_promotion_past_it() {
    let mut journal = TestJournal::encrypted("kept", SIZE_BYTES, "{}");
    journal.random_changes(21, 60, 100);
    let seq = journal.seq;
    let mut model = journal.model(seq);
    let owner = ScratchOwner {
        vra: Uuid::from_u128(1),
        view: Uuid::from_u128(2),
        vm: Uuid::from_u128(3),
        journal: Uuid::from_u128(4),
        volume: Uuid::from_u128(5),
        number: 0,
        seq,
        disk_bytes: SIZE_BYTES,
        logical_block_bytes: 512,
    };
    let (path, live) = (journal.folder.join("scratch-0.raw"), journal.folder.join("scratch-0.map"));
    let open = |journal: &TestJournal, made: bool, kept_seq: u64| {
        let writer = &journal.writer;
        let keys = ScratchKeys { keyring: writer.keyring(), encryption: writer.superblock().encryption };
        let scratch = match made {
            false => ScratchFile::make(&path, &live, &owner, &keys, SIZE_BYTES),
            true => ScratchFile::open(&path, &live, &owner, &keys, std::time::Instant::now()),
        };
        let settings = ViewSettings { logical_block_bytes: 512, look_for_holes: false };
        let source = ViewSource {
            volume: journal.view_kept(seq, kept_seq).expect("kept"),
            ..view_source(journal, journal.seq, Freshness::Superblock)
        };
        ViewDisk::new(ViewSource { seq, ..source }, settings, Some(scratch.expect("scratch"))).expect("view")
    };
    let disk = open(&journal, false, 0);
    let mut guest = Guest::new(&disk, 2, 3);
    let plain = view_that(&journal, seq, 0, Freshness::Superblock);
    for round in 0..3 {
        // The guest's own writes lie over what is copied, and are copied over by nothing.
        for at in [3 * 4096, 100 * 512, SIZE_BYTES / 2] {
            let at = at + round * 8192;
            assert_eq!(guest.change(Op::Write, false, at, 0x30 + round as u8), Ok(()));
            model[at as usize..at as usize + 4096].fill(0x30 + round as u8);
        }
        let after_seq = journal.seq;
        journal.random_changes(40 + round, 60, 100);
        journal.change(Change::Seal);
        let changed: Vec<_> = journal.changed(after_seq);
        let mut below = below(&journal);
        disk.preserve(journal.seq, &changed, &mut below).expect("kept");
        assert_eq!(disk.kept_seq(), journal.seq);
        assert!(both_copies_agree(&path) > 0);
        guest.compare(&model);
        journal.promote();
        guest.compare(&model);
        assert_eq!(disk.first_damage(), None);
    }
    assert_eq!(Guest::new(&plain, 1, 1).read(0, 4096), Err(libc::EIO), "what was not kept is gone");

    // And a restart: the file says how far it goes.
    let kept_seq = journal.seq;
    drop((guest, disk));
    assert_eq!(ScratchFile::kept_seq_at(&path, std::time::Instant::now()).expect("not open"), kept_seq);
    let disk = open(&journal, true, kept_seq);
    Guest::new(&disk, 2, 4).compare(&model);

    // One whose scratch is full can't be kept, and one without scratch neither.
    let none = view_that(&journal, journal.seq, 0, Freshness::Superblock);
    let refused = none
        .preserve(journal.seq + 1, std::slice::from_ref(&(0..512)), &mut below(&journal))
        .expect_err("no scratch");
    assert!(matches!(refused, PreserveError::NoScratch), "{refused}");
}

/// That no page of a scratch's map depends on one of its copies; how many were written.
fn both_copies_agree(scratch: &std::path::Path) -> usize {
    const PAGE: usize = 4096;
    let bytes = std::fs::read(scratch).expect("readable");
    let pages = bytes[128 << 10..1 << 20].chunks(2 * PAGE);
    let written = pages.filter(|copies| copies.iter().any(|byte| *byte != 0));
    let agree = |copies: &&[u8]| copies[64..PAGE] == copies[PAGE + 64..];
    let (good, bad): (Vec<_>, Vec<_>) = written.partition(agree);
    assert!(bad.is_empty(), "{} pages differ", bad.len());
    good.len()
}

fn below(journal: &TestJournal) -> Below {
    use journal::storage::ring::{Access, DirectFile};
    let open = |path: std::path::PathBuf| DirectFile::open(&path, Access::ReadOnly).expect("open");
    Below::new(open(journal.path()), &open(journal.folder.join("disk-0.raw"))).expect("io_uring")
}

/// A client that skips holes must come to the error that says that something is lost there.
#[test]
fn a_bad_range_of_a_hole_is_called_data() {
    let mut journal = TestJournal::new("bad-extents", SIZE_BYTES, "{}");
    journal.random_changes(13, 2, 2);
    let disk = view(&journal, journal.seq, 0);
    let lost = BadRange { volume: 0, offset_bytes: SIZE_BYTES - 65536, len_bytes: 8192, seq: 1 };
    let mut bad_ranges = BadRanges::default();
    bad_ranges.add(lost);
    disk.shown().volume.promoted().advance(0, &bad_ranges);
    let extents = disk.extents(SIZE_BYTES - 131_072, 131_072, 100);
    let told: Vec<_> = extents.iter().map(|extent| (extent.len_bytes, extent.allocation)).collect();
    assert_eq!(
        told,
        [(65536, Allocation::Hole), (8192, Allocation::Data), (57344, Allocation::Hole)],
        "the recovery disk is a hole there"
    );
    let mut guest = Guest::new(&disk, 1, 1);
    assert_eq!(guest.read(lost.offset_bytes, 512), Err(libc::EIO));
}
