//! What is said of a journal whose superblocks are both lost, and more with them.
#![cfg(feature = "sim")]

mod sim_target;

use journal::format::{SUPERBLOCK_OFFSETS, slot_offset_bytes};
use journal::recovery::{Rebuilt, SurveyOptions, rebuild};
use journal::storage::{Blocking, Purpose};
use journal::walk::walk;
use journal::writer::Change;

use sim_target::{SLOT_BYTES, Site};

const PAGE: u64 = 4096;

/// A journal with an intent in its open segment, behind a batch of the stream; `reopened` has it in the copy of an opening instead, whose
/// predecessor is still there.
fn half_promoted(encrypted: bool, reopened: bool) -> (Site, u64) {
    let site = if encrypted { Site::encrypted(6) } else { Site::new(6) };
    let mut target = site.target();
    target.base_sync();
    target.write(0, &[1, 2]);
    target.append();
    target.change(Change::Seal);
    let through = target.writer.closed_segments().last().expect("sealed").last;
    target.write(8192, &[3, 4]);
    target.append();
    if reopened {
        drop(target);
        target = site.target();
    }
    target.write(16384, &[5]);
    target.append();
    target.change(Change::AnnouncePromotion { through });
    drop(target);
    site.zero_pages(0, 1);
    site.zero_pages(64 << 10, 1);
    (site, through.seq)
}

/// The recovery disks may be as new as the intent says: who doesn't know of it gives wrong data.
#[test]
fn no_flipped_bit_hides_the_intent_of_a_journal_without_superblocks() {
    for (encrypted, reopened) in [(false, false), (false, true), (true, false), (true, true)] {
        let (site, announced) = half_promoted(encrypted, reopened);
        let says =
            |site: &Site| rebuild(&mut site.disk.storage(), site.journal, None, Vec::new(), site.keys.site());
        let whole = says(&site).expect("readable");
        assert_eq!((whole.superblock.promotion_intent_seq, whole.gap), (announced, None));
        let len_bytes = site.disk.contents(site.journal).len() as u64;
        let (mut told, mut refused) = (0, 0);
        for offset_bytes in (slot_offset_bytes(0, SLOT_BYTES)..len_bytes).step_by(61) {
            let page = offset_bytes / PAGE * PAGE;
            let mut storage = site.disk.storage();
            let mut io = Blocking::new(&mut storage, site.journal, Purpose::Append);
            let before = io.read(page, PAGE as usize).expect("readable").to_vec();
            if before.iter().all(|byte| *byte == 0) {
                continue;
            }
            let mut after = before.clone();
            after[(offset_bytes - page) as usize] ^= 1 << (offset_bytes % 8);
            io.write(page, after).expect("written");
            match says(&site) {
                Ok(rebuilt) if rebuilt.gap.is_none() => {
                    let intent_seq = rebuilt.superblock.promotion_intent_seq;
                    assert_eq!(
                        intent_seq, announced,
                        "encrypted {encrypted}, reopened {reopened}, bit at {offset_bytes}"
                    );
                    told += 1;
                }
                _ => refused += 1,
            }
            io.write(page, before).expect("written");
        }
        assert!(told > 0 && refused > 0, "{told} and {refused}");
    }
}

/// What was announced behind it proves that it was durable.
#[test]
fn a_damaged_payload_before_an_intent_is_no_torn_tail() {
    let site = Site::new(6);
    let mut target = site.target();
    target.base_sync();
    target.write(0, &[1]);
    target.append();
    target.change(Change::Seal);
    let through = target.writer.closed_segments().last().expect("sealed").last;
    target.write(0, &[2]);
    target.append();
    target.change(Change::AnnouncePromotion { through });
    drop(target);
    let open = site.survey().segments.last().expect("one").header.clone();
    let offset_bytes = slot_offset_bytes(open.slot, SLOT_BYTES);
    let mut storage = site.disk.storage();
    let mut io = Blocking::new(&mut storage, site.journal, Purpose::Append);
    let mut slot = io.read(offset_bytes, SLOT_BYTES as usize).expect("readable").to_vec();
    let payload = slot.windows(4096).position(|window| window.iter().all(|byte| *byte == 2)).expect("there");
    slot[payload + 9] ^= 1;
    let walked = walk(&slot, &open, None, &mut |_, _, _| Ok::<_, std::convert::Infallible>(()));
    let Ok(walked) = walked;
    assert_eq!(walked.torn_tail, None);
    assert_eq!(walked.findings.len(), 1, "{:?}", walked.findings);
}

/// What the stream tells was announced is promoted before anything further is announced: of two intents the older one has ended.
#[test]
fn an_announcement_that_reached_the_stream_alone_counts_from_the_next_opening_on() {
    let site = Site::new(8);
    let mut target = site.target();
    target.base_sync();
    let mut ends = Vec::new();
    for block in 1..=2 {
        target.write(0, &[block]);
        target.append();
        target.change(Change::Seal);
        ends.push(target.writer.closed_segments().last().expect("sealed").last);
    }
    target.write(8192, &[3]);
    target.append();
    let mut storage = site.disk.storage();
    let mut io = Blocking::new(&mut storage, site.journal, Purpose::Superblock);
    let before = SUPERBLOCK_OFFSETS.map(|place| io.read(place, PAGE as usize).expect("readable").to_vec());
    target.change(Change::AnnouncePromotion { through: ends[0] });
    drop(target);
    for (place, page) in SUPERBLOCK_OFFSETS.into_iter().zip(before) {
        io.write(place, page).expect("written");
    }

    assert_eq!(site.survey().superblock.promotion_intent_seq, 0, "no superblock tells");
    let mut target = site.target();
    assert_eq!(target.writer.superblock().promotion_intent_seq, ends[0].seq);
    let further = target.writer.change(Change::AnnouncePromotion { through: ends[1] });
    assert!(further.is_err(), "not before the first has ended");
    target.change(Change::AnnouncePromotion { through: ends[0] });
}

/// A copy that an opening passed over has records that nobody trusted. When the one that counted was promoted and its slot given back, it is the
/// only one of its number, and longer than the segment behind it begins.
#[test]
fn a_copy_that_an_opening_passed_over_does_not_end_the_history() {
    for promoted in [1, 2] {
        let site = Site::new(10);
        let mut target = site.target();
        target.base_sync();
        // Whose slots are what the next openings and segments take, so that the copy stays.
        for fill in 6..10 {
            target.write(0, &[fill]);
            target.append();
            target.change(Change::Seal);
        }
        target.write(0, &[1]);
        target.append();
        target.promote(4);
        let trusted_seq = target.writer.durable().seq;
        target.write(4096, &[2]);
        target.append();
        drop(target);

        let mut target = site.target_that_trusts(trusted_seq);
        target.change(Change::Seal);
        for fill in 3..5 {
            target.write(8192, &[fill]);
            target.append();
            target.change(Change::Seal);
        }
        target.write(8192, &[5]);
        target.append();
        let counted: Vec<_> = target.writer.closed_segments().cloned().collect();
        for _ in 0..promoted {
            target.promote(1);
        }
        let tail = target.writer.durable();
        drop(target);
        site.zero_pages(Site::place(counted[0].header.slot, 0), 16);
        site.zero_pages(0, 1);
        site.zero_pages(64 << 10, 1);

        let rebuilt = rebuild(&mut site.disk.storage(), site.journal, None, Vec::new(), site.keys.site());
        let rebuilt = rebuilt.expect("readable");
        assert_eq!(rebuilt.superblock.promotion_intent_seq, counted[promoted - 1].last.seq);
        let seen = (rebuilt.gap, rebuilt.superblock.low_water, trusted_seq);
        assert_eq!(
            rebuilt.gap.is_some(),
            promoted == 1,
            "only a later promotion tells that one has ended: {seen:?}"
        );
        if promoted == 1 {
            continue;
        }
        let options = SurveyOptions { keys: site.keys.site().clone(), ..SurveyOptions::default() };
        let survey = rebuilt.survey(&mut site.disk.storage(), site.journal, &options).expect("readable");
        assert_eq!(survey.tail, tail);
    }
}

/// A journal of four segments, the last one open, without its superblocks. The first one is promoted while the given one is open, if any.
/// Gives the slots of those that are sealed.
fn of_four_segments(site: &Site, promoted_in: Option<u8>) -> Vec<u32> {
    let mut target = site.target();
    target.base_sync();
    let mut slots = Vec::new();
    for number in 1..=4 {
        target.write(u64::from(number) * 4096, &[number]);
        target.append();
        if promoted_in == Some(number) {
            target.promote(1);
        }
        if number < 4 {
            target.change(Change::Seal);
            slots.push(target.writer.closed_segments().last().expect("sealed").header.slot);
        }
    }
    drop(target);
    site.zero_pages(0, 1);
    site.zero_pages(64 << 10, 1);
    slots
}

/// What is left of a segment's slot when it is given back, or erased.
fn erase(site: &Site, slot: u32) {
    let begin = slot_offset_bytes(slot, SLOT_BYTES);
    site.zero_pages(begin, 2);
    site.zero_pages(begin + SLOT_BYTES - PAGE, 1);
}

fn rebuilt(site: &Site) -> Rebuilt {
    rebuild(&mut site.disk.storage(), site.journal, None, Vec::new(), site.keys.site()).expect("readable")
}

/// Segments say where the history began when they did: one behind that which isn't there is lost, if nothing tells of a promotion since.
#[test]
fn a_lost_segment_that_nothing_promoted_is_noticed_without_superblocks() {
    for lost in [&[0][..], &[1], &[0, 1], &[0, 1, 2]] {
        let site = Site::new(8);
        let slots = of_four_segments(&site, None);
        let whole = rebuilt(&site);
        assert_eq!((whole.gap, whole.is_unproven), (None, false));
        lost.iter().for_each(|index| erase(&site, slots[*index]));
        let gap = rebuilt(&site).gap.expect("a segment is missing");
        assert!(gap.after_seq < gap.resumes_after_seq, "{gap:?}");
    }
}

/// Nothing tells that a promotion has ended, until a segment begins after it.
#[test]
fn a_segment_that_was_promoted_is_not_missed_without_superblocks() {
    let site = Site::new(8);
    let slots = of_four_segments(&site, Some(4));
    let whole = rebuilt(&site);
    erase(&site, slots[0]);
    let found = rebuilt(&site);
    assert_eq!((whole.gap, found.gap), (None, None));
    assert_eq!((whole.is_unproven, found.is_unproven), (false, true));
    assert_eq!(whole.superblock.promotion_intent_seq, found.superblock.promotion_intent_seq);

    let site = Site::new(8);
    let slots = of_four_segments(&site, Some(3));
    let found = rebuilt(&site);
    assert_eq!((found.gap, found.is_unproven), (None, false), "the last one begins in slot {}", slots[0]);
    assert_eq!(found.superblock.promotion_intent_seq, found.superblock.low_water.seq);
}
