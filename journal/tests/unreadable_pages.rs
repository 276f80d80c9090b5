//! Pages that the disk can't give back, of those by which a journal is recognised: each is there twice, or nothing needs it.
#![cfg(feature = "sim")]

mod sim_target;

use journal::format::{SUPERBLOCK_OFFSETS, Superblock};
use journal::recovery::{OpenError, Survey, SurveyOptions, survey};
use journal::storage::sim::Crash;
use journal::view::Reader;
use journal::writer::Change;

use sim_target::{SLOT_BYTES, Site, Target};

const PAGE: u64 = 4096;

/// Two sealed segments with a checkpoint each, and one that stays open with another one.
fn three_segments(target: &mut Target<'_>) {
    target.base_sync();
    for (round, tag) in (0_u8..).zip(["first", "second", "third"]) {
        target.write(0, &[round, 7]);
        target.append();
        target.checkpoint(tag);
        target.append();
        if tag != "third" {
            target.change(Change::Seal);
        }
    }
    target.drive();
}

fn site() -> Site {
    let site = Site::new(6);
    three_segments(&mut site.target());
    site
}

/// What a tool finds that saves what can be saved.
fn saved(site: &Site) -> Survey {
    let options = SurveyOptions { skip_unreadable: true, ..SurveyOptions::default() };
    survey(&mut site.disk.storage(), site.journal, &options).expect("something is there")
}

fn tags(site: &Site) -> Vec<String> {
    let reader = Reader::open(&mut site.disk.storage(), site.journal, &Default::default()).expect("readable");
    reader.catalogue().checkpoints().iter().map(|entry| entry.checkpoint.tag.clone()).collect()
}

fn copies(site: &Site) -> [Result<Superblock, journal::format::SuperblockError>; 2] {
    let bytes = site.disk.contents(site.journal);
    SUPERBLOCK_OFFSETS.map(|place| Superblock::decode(&bytes[place as usize..]))
}

#[test]
fn one_copy_of_the_superblock_is_enough_and_the_next_opening_mends_the_other() {
    for place in SUPERBLOCK_OFFSETS {
        let site = site();
        site.disk.break_pages(site.journal, place..place + 1);
        assert_eq!(tags(&site), ["first", "second", "third"]);
        let survey = site.survey();
        assert_eq!((survey.damage, survey.hidden, survey.unreadable), (None, None, vec![]));
        let before = survey.superblock.open_count;
        let opened = site.open().expect("the other copy says the same");
        assert_eq!(opened.tail, survey.tail);
        // What an opening may have written that died when only the lost copy was durable isn't taken for this one's.
        assert_eq!(opened.superblock.open_count, before + 2);
        let [first, second] = copies(&site).map(|copy| copy.expect("mended"));
        assert_eq!(first, second);
        assert!(!site.survey().superblock_is_alone);
        assert_eq!(site.open().expect("again").superblock.open_count, before + 3);
    }
}

#[test]
fn a_disk_that_gives_neither_copy_back_is_no_damaged_journal() {
    let site = site();
    for place in SUPERBLOCK_OFFSETS {
        site.disk.break_pages(site.journal, place..place + 1);
    }
    let error = site.open().expect_err("nothing to go by");
    assert!(matches!(error, OpenError::Storage(_)), "{error}");
}

#[test]
fn a_flipped_version_of_one_copy_is_damage_and_no_newer_release() {
    for place in SUPERBLOCK_OFFSETS {
        let site = site();
        assert!(site.disk.flip_bit(site.journal, place + 8..place + 12).is_some());
        assert_eq!(tags(&site), ["first", "second", "third"]);
        site.open().expect("the other copy says the same");
        assert!(copies(&site).iter().all(Result::is_ok), "mended");
    }
}

/// If a change counted with one copy alone, that one could be lost, and the other one would take the change back.
#[test]
fn a_change_counts_when_either_copy_alone_has_it() {
    let mut site = Site::new(6);
    let mut target = site.target();
    three_segments(&mut target);
    let through = target.writer.closed_segments().next().expect("a closed segment").last;
    target.change(Change::AnnouncePromotion { through });
    drop(target);
    let disk = site.disk.clone();
    for seed in 0..40 {
        for place in SUPERBLOCK_OFFSETS {
            site.disk = disk.copy(seed);
            site.disk.crash(Crash::PowerCut);
            site.disk.fence();
            site.disk.break_pages(site.journal, place..place + 1);
            assert_eq!(site.survey().superblock.promotion_intent_seq, through.seq, "seed {seed}, {place}");
        }
    }
}

/// Whatever slot: used or free, sealed or open.
#[test]
fn no_page_by_which_a_slot_is_recognised_takes_the_journal_down() {
    let (whole, pages) = (site().survey(), [0, PAGE, SLOT_BYTES - PAGE]);
    let open_slot = whole.segments.last().expect("the open one").header.slot;
    let slots = 0..whole.superblock.slot_count;
    for (slot, page) in slots.flat_map(|slot| pages.map(|page| (slot, page))) {
        let (site, place) = (site(), Site::place(slot, page));
        site.disk.break_pages(site.journal, place..place + 1);
        if (slot, page) == (open_slot, PAGE) {
            // Its first batch was acknowledged, and a disk that fails for a while must not end the history before it.
            assert!(matches!(site.open(), Err(OpenError::Storage(_))));
            continue;
        }
        if (slot, page) == (open_slot, 0) {
            // No page stands for it yet, and its records were acknowledged: who saves what can be saved goes without them.
            let saved = saved(&site);
            assert_eq!((saved.damage, saved.hidden.map(|hidden| hidden.slot)), (None, Some(slot)));
            assert!(matches!(site.open(), Err(OpenError::Storage(_))));
            continue;
        }
        let survey = site.survey();
        assert_eq!(survey.damage, None, "page {page} of slot {slot}");
        assert_eq!((survey.tail, survey.hidden), (whole.tail, None), "page {page} of slot {slot}");
        assert_eq!(tags(&site), ["first", "second", "third"], "page {page} of slot {slot}");
        let mut target = site.target();
        assert_eq!(target.writer.durable(), whole.tail);
        target.write(0, &[9]);
        target.append();
    }
}

/// What can be read a moment later is not lost: of the newest segment that would be records that were acknowledged.
#[test]
fn a_read_that_fails_once_changes_nothing() {
    let whole = site().survey();
    for reads in 0..20 {
        let site = site();
        site.disk.arm_error(reads, "read");
        match survey(&mut site.disk.storage(), site.journal, &Default::default()) {
            Ok(found) => {
                assert_eq!(
                    (found.tail, found.damage, found.hidden),
                    (whole.tail, None, None),
                    "read {reads}"
                );
            }
            // The manifest, say: the next try finds it.
            Err(error) => assert!(matches!(error, OpenError::Storage(_)), "{error}"),
        }
    }
}

#[test]
fn a_used_slot_that_cannot_tell_what_it_holds_is_damage() {
    let site = site();
    let survey = site.survey();
    let first = &survey.segments[0];
    for page in [0, SLOT_BYTES - PAGE] {
        let place = Site::place(first.header.slot, page);
        site.disk.break_pages(site.journal, place..place + 1);
    }
    let damage = saved(&site).damage.expect("a segment is missed");
    assert_eq!(damage.after_seq, first.header.after.seq);
    // It may be there again in a while.
    assert!(matches!(site.open(), Err(OpenError::Storage(_))));
}

/// The slot of the newest segment was used before: its last page is of an earlier life, and says nothing of what is there now.
#[test]
fn a_newest_segment_without_its_first_page_is_noticed_in_a_slot_that_was_used_before() {
    let site = Site::new(4);
    let mut target = site.target();
    three_segments(&mut target);
    for round in 0..8 {
        target.change(Change::Seal);
        target.checkpoint("later");
        target.append();
        let closed = target.writer.closed_segments().len();
        if closed > 2 {
            target.promote(closed - 1);
        }
        target.write(0, &[round]);
        target.append();
    }
    drop(target);
    let survey = site.survey();
    let newest = survey.segments.last().expect("the open one").header.clone();
    let place = Site::place(newest.slot, 0);
    site.disk.break_pages(site.journal, place..place + 1);
    let found = saved(&site);
    assert!(found.tail.seq < survey.tail.seq);
    assert!(matches!(site.open(), Err(OpenError::Storage(_))));
    assert_eq!(found.hidden.map(|hidden| hidden.slot), Some(newest.slot));
}
