//! What a disk that fails, loses what was not synced, or is full, does to a journal.
#![cfg(feature = "sim")]

mod sim_target;

use bytes::Bytes;
use journal::bad_ranges::BadRange;
use journal::batch::Record;
use journal::format::{JournalState, slot_offset_bytes};
use journal::promotion::PromotionError;
use journal::recovery::{Content, Hidden, OpenError, rebuild};
use journal::storage::sim::Crash;
use journal::storage::{Blocking, Op, Purpose};
use journal::view::Reader;
use journal::writer::{Change, ClosedSegment, Event, State};

use sim_target::{SLOT_BYTES, Site, Target};

const PAGE: u64 = 4096;

/// A sealed segment with three batches: two pages at 0, two at 64 KiB with a checkpoint, one at 128 KiB. Then a segment that stays open.
fn sealed(target: &mut Target<'_>) -> ClosedSegment {
    target.base_sync();
    target.write(0, &[1, 2]);
    target.append();
    target.write(64 << 10, &[3, 4]);
    target.checkpoint("kept");
    target.append();
    target.write(128 << 10, &[5]);
    target.append();
    target.change(Change::Seal);
    target.write(0, &[9]);
    target.append();
    target.writer.closed_segments().next().expect("a sealed segment").clone()
}

/// A file is never shorter than its slots by itself.
#[test]
fn a_file_that_was_cut_short_is_told_and_not_written() {
    let site = Site::new(6);
    let mut target = site.target();
    sealed(&mut target);
    drop(target);
    let slots = site.survey().superblock.slot_count;
    let cut = |len_bytes| {
        let mut storage = site.disk.storage();
        let cut = Op::Truncate { len_bytes };
        Blocking::new(&mut storage, site.journal, Purpose::Shrink).run(cut).expect("cut");
    };
    assert_eq!(site.survey().missing_slots, 0);
    let expected_bytes = slot_offset_bytes(slots, SLOT_BYTES);
    cut(expected_bytes - PAGE);
    assert_eq!(site.survey().missing_slots, 1);
    let error = site.open().expect_err("acknowledged records may be lost");
    let cut_short = OpenError::CutShort { len_bytes: expected_bytes - PAGE, expected_bytes };
    assert_eq!(error.to_string(), cut_short.to_string());
    cut(slot_offset_bytes(0, SLOT_BYTES) + PAGE);
    assert_eq!(site.survey().missing_slots, slots);
    assert!(matches!(site.open(), Err(OpenError::CutShort { .. })));
    // Without superblocks the one page that is left of a segment tells no more.
    site.zero_pages(0, 2);
    let rebuilt = rebuild(&mut site.disk.storage(), site.journal, None, Vec::new(), site.keys.site());
    assert!(matches!(rebuilt, Err(OpenError::NoWholeSlot { slot_len_bytes: SLOT_BYTES })), "{rebuilt:?}");
}

/// The last copy of the open segment is made where an older one lies that goes on otherwise, with batches that weren't trusted after a failed
/// sync; and one of its writes fails half-way. What came instead of them was acknowledged.
#[test]
fn a_copy_over_an_older_one_that_went_another_way_never_brings_that_way_back() {
    let mut cut = 0;
    for seed in 0..200 {
        let site = Site::seeded(3, seed);
        let mut target = site.target();
        target.base_sync();
        target.write(0, &[1]);
        target.append();
        let trusted = target.seq;
        target.write(4096, &[2]);
        target.offer();
        site.disk.arm_error(0, "fdatasync");
        let failed = target.drive().iter().any(|event| matches!(event, Event::Poisoned(_)));
        assert!(failed, "seed {seed}: the sync fails");
        drop(target);

        let mut target = site.target_that_trusts(trusted);
        assert_eq!(target.seq, trusted);
        target.write(4096, &[3]);
        target.append();
        let durable = target.writer.durable();
        drop(target);
        // Three of the superblock come first.
        site.disk.arm_error(3 + seed % 2, "write");
        cut += u64::from(site.open().is_err());
        site.disk.crash(Crash::Kill);
        site.disk.fence();
        let found = site.survey();
        assert_eq!(found.tail, durable, "seed {seed}: {:?}", found.segments);
    }
    assert!(cut >= 100, "{cut} openings were cut short");
}

/// Where a page of the journal is that has this byte, in bytes from the file's start.
fn place_of(site: &Site, fill: u8) -> u64 {
    let contents = site.disk.contents(site.journal);
    let run = contents.windows(4096).position(|window| window.iter().all(|byte| *byte == fill));
    run.expect("it is in the file") as u64
}

fn footer_place(segment: &ClosedSegment) -> u64 {
    let trailer = segment.trailer.as_ref().expect("it is sealed");
    Site::place(segment.header.slot, trailer.data_end_bytes)
}

fn recovered(site: &Site, offset_bytes: u64) -> u8 {
    site.disk.contents(site.recovery_disk)[offset_bytes as usize]
}

#[test]
fn a_footer_and_payloads_that_cannot_be_read_stop_no_promotion() {
    let site = Site::new(4);
    let mut target = site.target();
    let segment = sealed(&mut target);
    let footer = footer_place(&segment);
    site.disk.break_pages(site.journal, footer..footer + 1);
    // The second page of the first record lies in two pages of the file.
    let place = place_of(&site, 2);
    site.disk.break_pages(site.journal, place..place + PAGE);
    let flipped = place_of(&site, 4);
    assert!(site.disk.flip_bit(site.journal, flipped..flipped + 1).is_some());
    let promoted = target.carry(1).expect("only the payloads are lost");
    assert_eq!(promoted.through, segment.last);
    let bad: Vec<BadRange> = promoted.bad_ranges.iter().collect();
    let covers = |offset: u64| {
        bad.iter().any(|bad| bad.offset_bytes <= offset && offset < bad.offset_bytes + bad.len_bytes)
    };
    assert!(covers(PAGE) && covers((64 << 10) + PAGE), "{bad:?}");
    assert!(!covers(64 << 10) && !covers(128 << 10), "{bad:?}");
    assert_eq!((recovered(&site, 64 << 10), recovered(&site, 128 << 10)), (3, 5));
}

#[test]
fn a_footer_and_a_flipped_bit_leave_views_what_is_whole() {
    let site = Site::new(4);
    let mut target = site.target();
    let segment = sealed(&mut target);
    drop(target);
    let footer = footer_place(&segment);
    site.disk.break_pages(site.journal, footer..footer + 1);
    let flipped = place_of(&site, 4);
    assert!(site.disk.flip_bit(site.journal, flipped..flipped + 1).is_some());
    let reader = Reader::open(&mut site.disk.storage(), site.journal, &Default::default()).expect("readable");
    assert_eq!(reader.catalogue().checkpoints().len(), 1, "its payload is whole");
    let view = reader.view(reader.newest_seq()).expect("the newest");
    let read = |offset_bytes: u64| {
        let mut bytes = vec![0; 4096];
        let volume = view.volume(0).expect("a volume");
        let read =
            volume.read(&mut site.disk.storage(), site.journal, offset_bytes, &mut bytes, |_, _, _| Ok(()));
        read.map(|()| bytes[0])
    };
    assert_eq!(read(64 << 10).expect("whole"), 3);
    assert!(read((64 << 10) + PAGE).is_err(), "damaged");
    assert_eq!(read(128 << 10).expect("behind it"), 5);
}

/// A write of a sector into a page that the recovery disk has lost: the write mends the page, and nothing would tell then that the rest of it
/// is not what was there. So that is noted before.
#[test]
fn a_page_that_a_recovery_disk_has_lost_is_noted_before_it_is_written_in_part() {
    let site = Site::new(6);
    let mut target = site.target();
    sealed(&mut target);
    target.change(Change::Seal);
    target.promote(2);
    let at = (64 << 10) + 512;
    target.push(|seq| Record::write(seq, seq, 0, at, Bytes::from_static(&[7; 512])));
    target.write(128 << 10, &[8]);
    target.checkpoint("later");
    target.append();
    target.change(Change::Seal);
    let page = 64 << 10;
    for lost in [page, 128 << 10] {
        site.disk.break_pages(site.recovery_disk, lost..lost + PAGE);
    }
    let low_water_seq = target.writer.superblock().low_water.seq;
    let before = site.disk.contents(site.recovery_disk)[page as usize..][..4096].to_vec();
    let error = target.carry(1).expect_err("the rest of the page is lost");
    assert!(matches!(error, PromotionError::DiskLost { volume: 0 }), "{error}");
    assert_eq!(site.disk.contents(site.recovery_disk)[page as usize..][..4096], before, "not written yet");
    let lost: Vec<BadRange> = target.lost.iter().collect();
    let range = |offset_bytes, len_bytes| BadRange { volume: 0, offset_bytes, len_bytes, seq: low_water_seq };
    // Nothing of a page that is written whole is missed.
    assert_eq!(lost, [range(page, 512), range(page + 1024, PAGE - 1024)]);

    target.change(Change::NoteBadRanges(target.lost.clone()));
    drop(target);
    site.disk.crash(Crash::PowerCut);
    site.disk.fence();
    let mut target = site.target();
    assert_eq!(target.writer.bad_ranges().iter().collect::<Vec<_>>(), lost);
    // Cut short after its writes, and done again when the page can be read.
    target.carry(1).expect("it is noted");
    assert_eq!(recovered(&site, at), 7);
    target.promote(1);
    assert_eq!(target.writer.bad_ranges().iter().collect::<Vec<_>>(), lost);
    assert_eq!(recovered(&site, 128 << 10), 8);
}

/// Footer and trailer go with the next group's write, and a power cut may lose them and keep the group.
#[test]
fn a_segment_whose_seal_was_lost_is_sealed_by_the_next_opening() {
    let site = Site::new(4);
    let mut target = site.target();
    let sealed = sealed(&mut target);
    drop(target);
    // As if the seal had never reached the disk: what lies there reads zeroes.
    let trailer = Site::place(sealed.header.slot, SLOT_BYTES - PAGE);
    site.zero_pages(trailer, 1);
    site.zero_pages(footer_place(&sealed), 1);
    let survey = site.survey();
    assert!(matches!(survey.segments[0].content, Content::Scanned(_)), "no seal");

    let mut target = site.target();
    let again = target.writer.closed_segments().next().expect("still there").clone();
    let next_begin_us = site.survey().segments[1].header.begin_time_us;
    let trailer = again.trailer.expect("sealed");
    assert_eq!((again.last, trailer.end_time_us), (sealed.last, next_begin_us));
    let survey = site.survey();
    assert!(matches!(survey.segments[0].content, Content::Sealed(_)), "in the file too");
    // A flipped bit in it is a damaged record now, and not the end of the history.
    drop(target);
    let flipped = place_of(&site, 4);
    assert!(site.disk.flip_bit(site.journal, flipped..flipped + 1).is_some());
    target = site.target();
    let promoted = target.carry(1).expect("promoted");
    assert_eq!(promoted.bad_ranges.iter().count(), 1);
}

#[test]
fn a_history_is_given_up_on_a_full_datastore_with_holes_in_the_file() {
    let site = Site::new(10);
    let mut target = site.target();
    sealed(&mut target);
    target.change(Change::Shrink { spare_slots: 1 });
    assert!(target.writer.superblock().slot_count < 10);
    // All slots but the last few are used and freed, so that there are holes before the end.
    for round in 0..6 {
        target.write(0, &[round, round, round, round, round, round]);
        target.append();
        target.change(Change::Seal);
    }
    target.promote(5);
    target.change(Change::Shrink { spare_slots: 0 });
    let holes = {
        let (len_bytes, used_bytes) =
            (site.disk.contents(site.journal).len() as u64, site.journal_used_bytes());
        len_bytes - used_bytes
    };
    assert!(holes >= SLOT_BYTES, "{holes} bytes of holes");

    site.disk.set_capacity_bytes(site.disk.used_bytes());
    let events = target.change(Change::GiveUpHistory { sync_id: 7 });
    assert!(matches!(events[..], [Event::Changed { .. }]), "{events:?}");
    assert_eq!(target.writer.state(), State::Running);
    assert!(matches!(target.writer.superblock().state, JournalState::HistoryGivenUp { .. }));
    drop(target);
    for crash in [Crash::Kill, Crash::PowerCut] {
        site.disk.crash(crash);
        site.disk.fence();
        let opened = site.open().expect("nothing of it takes space");
        assert!(opened.segments.is_empty());
    }
    // And the sync ends, in what space there is.
    let mut target = site.target();
    target.base_sync();
    target.write(0, &[7]);
    target.append();
}

#[test]
fn an_erasure_that_was_cut_short_is_done_again() {
    let site = Site::new(6);
    let mut target = site.target();
    sealed(&mut target);
    site.disk.arm_crash_at(Purpose::Seal, 3, Crash::PowerCut);
    target.writer.change(Change::GiveUpHistory { sync_id: 7 }).expect("allowed");
    target.drive_to_death();
    drop(target);
    site.disk.fence();
    let opened = site.open().expect("open");
    assert!(matches!(opened.superblock.state, JournalState::HistoryGivenUp { .. }));
    assert_erased(&site, opened.superblock.slot_count);
}

/// Zeroes that are read after a failed sync aren't durable: an opening that left them alone would let the history come back while a sync writes to
/// the recovery disks.
#[test]
fn an_erasure_whose_sync_failed_is_done_again() {
    for seed in 0..20 {
        let site = Site::seeded(6, seed);
        let mut target = site.target();
        sealed(&mut target);
        site.disk.arm_error_at(&[(Purpose::Seal, "fdatasync")], 0);
        target.writer.change(Change::GiveUpHistory { sync_id: 7 }).expect("allowed");
        target.drive();
        assert_eq!(target.writer.state(), State::Poisoned);
        drop(target);
        drop(site.open().expect("open"));
        site.disk.crash(Crash::PowerCut);
        assert_erased(&site, site.survey().superblock.slot_count);
    }
}

/// No slot has a page by which it is recognised.
fn assert_erased(site: &Site, slot_count: u32) {
    let contents = site.disk.contents(site.journal);
    for slot in 0..slot_count {
        let begin = slot_offset_bytes(slot, SLOT_BYTES) as usize;
        let page =
            |at: usize| contents.get(at..at + 4096).is_none_or(|page| page.iter().all(|byte| *byte == 0));
        let last = begin + SLOT_BYTES as usize - 4096;
        assert!(page(begin) && page(begin + 4096) && page(last), "slot {slot}");
    }
}

#[test]
fn a_newest_encrypted_segment_without_its_first_page_is_noticed() {
    for site in [Site::encrypted(4), Site::new(4)] {
        let mut target = site.target();
        sealed(&mut target);
        drop(target);
        let survey = site.survey();
        let (newest, tail) = (survey.segments[1].header.clone(), survey.tail);
        assert_eq!(survey.hidden, None);
        let place = Site::place(newest.slot, 0);
        assert!(site.disk.flip_bit(site.journal, place..place + PAGE).is_some());
        let survey = site.survey();
        let Some(Hidden { slot, after_seq, resumes_seq, .. }) = survey.hidden else {
            panic!("records after {} are lost, and nothing tells", survey.tail.seq)
        };
        assert_eq!((slot, after_seq), (newest.slot, newest.after.seq));
        assert_eq!(resumes_seq.is_none(), newest.encryption.is_some());
        assert!(survey.tail.seq < tail.seq);
        assert_eq!(site.open().expect("open").hidden.map(|hidden| hidden.slot), Some(newest.slot));
    }
}

#[test]
fn what_an_encrypted_journal_gave_up_is_no_lost_segment() {
    let site = Site::encrypted(6);
    let mut target = site.target();
    sealed(&mut target);
    target.change(Change::GiveUpHistory { sync_id: 7 });
    target.base_sync();
    target.write(0, &[7]);
    target.append();
    drop(target);
    assert_eq!(site.survey().hidden, None);
}

#[test]
fn a_minimum_is_kept_allocated() {
    let site = Site::new(3);
    let mut target = site.target();
    sealed(&mut target);
    let with_space = |site: &Site| (site.journal_used_bytes() - (1 << 20)) / SLOT_BYTES;
    target.limit(12, 8);
    assert_eq!((target.writer.superblock().slot_count, with_space(&site)), (8, 8), "it grows to it");
    for round in 0..7 {
        target.write(0, &[round; 6]);
        target.append();
        target.change(Change::Seal);
    }
    assert!(target.writer.superblock().slot_count > 8);
    let closed = target.writer.closed_segments().len();
    target.promote(closed);
    target.change(Change::Shrink { spare_slots: 0 });
    target.drive();
    assert_eq!(with_space(&site), 8, "what a shrinking took is there again");
    target.limit(12, 0);
    target.change(Change::Shrink { spare_slots: 0 });
    assert!(with_space(&site) < 8);
}
