//! What `hwtests/peers/journal_reader.py` makes of damaged journals: it reads what can be read and refuses the rest, as
//! `docs/journal-format.md` says.

use anyhow::Result;
use hwtests::sample_journal::{
    SLOT_LEN_BYTES, SampleFolder, SampleJournal, SampleModel, peer, three_segments,
};
use journal::batch::BatchHeader;
use journal::format::{JournalState, SUPERBLOCK_OFFSETS, SegmentHeader, SegmentTrailer, slot_offset_bytes};
use journal::recovery::{Content, Segment};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// What the reader says when it refuses.
fn refusal<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.expect_err("it is to refuse this").to_string()
}

fn assert_refused<T: std::fmt::Debug>(result: Result<T>, what: &str) {
    let said = refusal(result);
    assert!(said.contains(what), "{what:?} is not in {said:?}");
}

/// The reader's images of both disks at these checkpoints of the model are right.
fn assert_right_at(folder: &SampleFolder, model: &SampleModel, tags: &[&str]) -> Result<()> {
    for checkpoint in model.checkpoints.iter().filter(|one| tags.contains(&one.tag.as_str())) {
        for disk in 0..model.volume_count() {
            let found = peer::extract(folder, &checkpoint.tag, disk)?;
            assert!(found == model.image(disk, checkpoint.cut), "disk {disk} at {checkpoint:?}");
        }
    }
    Ok(())
}

fn segment(folder: &SampleFolder, index: usize) -> Result<Segment> {
    Ok(folder.reader()?.survey.segments.swap_remove(index))
}

fn slot_place(segment: &Segment) -> u64 {
    slot_offset_bytes(segment.header.slot, SLOT_LEN_BYTES)
}

/// Where the batches of a segment begin in the file.
fn batch_places(folder: &SampleFolder, segment: &Segment) -> Result<Vec<u64>> {
    let (begin, end) = (slot_place(segment), slot_place(segment) + segment.data_end_bytes());
    let places = folder.places_of(b"HFBATCH\0")?;
    Ok(places.into_iter().filter(|place| (begin..end).contains(place)).collect())
}

type Forgery = fn(&mut BatchHeader);

const ALL: [&str; 4] = ["first", "second", "third", "fourth"];

#[test]
fn a_damaged_payload_is_named_where_nothing_overwrote_it() -> Result<()> {
    if !peer::has_python() {
        return Ok(());
    }
    let folder = SampleFolder::new()?;
    let model = three_segments(&folder)?;
    let second = &model.checkpoints[1];
    let unit = folder.place_of(&model.image(0, second.cut)[12 << 10..16 << 10])?;
    folder.flip_bit(unit + 4095)?;
    for tag in ["second", "third"] {
        let what = format!("the payload of record {} is damaged, at {unit} ", second.cut - 2);
        // Of the second checkpoint both units of the payload are read at once.
        let what =
            if tag == "second" { what.replace(&unit.to_string(), &(unit - 4096).to_string()) } else { what };
        assert_refused(peer::extract(&folder, tag, 0), &what);
    }
    assert!(peer::extract(&folder, "third", 1)? == model.image(1, model.checkpoints[2].cut));
    assert_right_at(&folder, &model, &["first", "fourth"])
}

#[test]
fn either_page_of_a_segment_stands_for_the_other_and_batches_for_a_footer() -> Result<()> {
    if !peer::has_python() {
        return Ok(());
    }
    let folder = SampleFolder::new()?;
    let model = three_segments(&folder)?;
    let sealed = segment(&folder, 1)?;
    let (header, trailer) = (slot_place(&sealed), slot_place(&sealed) + SLOT_LEN_BYTES - 4096);
    let footer = header + sealed.data_end_bytes() + 70;
    for places in [vec![header + 32], vec![trailer + 8], vec![footer], vec![footer, header]] {
        places.iter().try_for_each(|place| folder.flip_bit(*place))?;
        assert_right_at(&folder, &model, &ALL)?;
        assert_eq!(peer::list(&folder)?, model.checkpoints);
        places.iter().try_for_each(|place| folder.flip_bit(*place))?;
    }
    folder.flip_bit(footer)?;
    folder.flip_bit(batch_places(&folder, &sealed)?[1] + 130)?;
    // Nobody knows what the lost batch wrote: all that is before it is as ever.
    let seq = sealed.header.after.seq;
    let before: Vec<_> =
        model.checkpoints.iter().filter(|checkpoint| checkpoint.cut <= seq).cloned().collect();
    assert!(!before.is_empty() && before.len() < model.checkpoints.len());
    assert_right_at(&folder, &model, &["first"])?;
    let listed = peer::list(&folder)?;
    assert_eq!(listed[..before.len()], before);
    assert!(listed.len() < model.checkpoints.len());
    assert_refused(peer::extract(&folder, "fourth", 0), "isn't there");

    folder.flip_bit(header)?;
    folder.flip_bit(trailer)?;
    let seq = model.checkpoints[0].seq;
    let what = format!("there are records behind record {seq} that can't be reached");
    assert_refused(peer::list(&folder), &what);
    assert_refused(peer::extract(&folder, "latest", 0), &what);
    assert_refused(peer::extract(&folder, "second", 0), &what);
    assert_right_at(&folder, &model, &["first"])
}

#[test]
fn a_damaged_batch_of_the_newest_segment_ends_the_history_with_a_word_if_later_ones_are_there() -> Result<()>
{
    if !peer::has_python() {
        return Ok(());
    }
    let folder = SampleFolder::new()?;
    let model = three_segments(&folder)?;
    let places = batch_places(&folder, &segment(&folder, 2)?)?;
    // The first two were copied by an opening; if they are damaged, the copied segment is still there.
    assert_eq!(places.len(), 5);
    for place in &places[2..4] {
        folder.flip_bit(place + 88)?;
        assert_refused(peer::list(&folder), "that can't be reached");
        assert_refused(peer::extract(&folder, "latest", 0), "that can't be reached");
        assert_right_at(&folder, &model, &ALL[..3])?;
        folder.flip_bit(place + 88)?;
    }
    for place in [places[4], places[0]] {
        folder.flip_bit(place + 88)?;
        assert_eq!(peer::list(&folder)?, model.checkpoints[..3]);
        folder.flip_bit(place + 88)?;
    }
    folder.flip_bit(places[4] + 88)?;
    assert_right_at(&folder, &model, &ALL[..3])
}

/// What is whole but belongs elsewhere ends the history, too.
#[test]
fn a_batch_that_does_not_follow_is_not_taken() -> Result<()> {
    if !peer::has_python() {
        return Ok(());
    }
    let folder = SampleFolder::new()?;
    let model = three_segments(&folder)?;
    let last = batch_places(&folder, &segment(&folder, 2)?)?[4];
    let forgeries: [(&str, Forgery); 7] = [
        ("another journal", |header| header.journal_id[3] ^= 1),
        ("another generation", |header| header.generation[15] ^= 1),
        ("an earlier opening", |header| header.open_count = (header.open_count.get() - 1).into()),
        ("another predecessor", |header| header.prev_batch_crc = (header.prev_batch_crc.get() ^ 1).into()),
        ("a later version", |header| header.version = 2.into()),
        ("an unknown flag", |header| header.flags = 2.into()),
        ("local, and yet with numbers", |header| header.flags = 1.into()),
    ];
    let good = folder.bytes()?[last as usize..][..BatchHeader::LEN].to_vec();
    for (what, forgery) in forgeries {
        folder.overwrite(last, &good)?;
        folder.forge_batch(last, forgery)?;
        assert_eq!(folder.reader()?.catalogue().checkpoints().len(), 3, "{what}");
        assert_eq!(peer::list(&folder)?, model.checkpoints[..3], "{what}");
    }
    folder.overwrite(last, &good)?;
    assert_eq!(peer::list(&folder)?, model.checkpoints);

    // A copied batch of a later opening than the copy's, and in what was copied it is missing.
    let copied = batch_places(&folder, &segment(&folder, 2)?)?[1];
    let same = folder.places_of(&folder.bytes()?[copied as usize..][..BatchHeader::LEN])?;
    same.iter().filter(|place| **place != copied).try_for_each(|place| folder.flip_bit(*place))?;
    assert_eq!((same.len(), peer::list(&folder)?), (2, model.checkpoints.clone()));
    folder.forge_batch(copied, |header| header.open_count = (header.open_count.get() + 7).into())?;
    assert_eq!(folder.reader()?.catalogue().checkpoints().len(), 2);
    assert_eq!(peer::list(&folder)?, model.checkpoints[..2]);
    Ok(())
}

/// C1: what an opening left out stays out, though it is whole again and follows in the slot.
#[test]
fn a_batch_that_an_opening_passed_over_is_not_taken() -> Result<()> {
    if !peer::has_python() {
        return Ok(());
    }
    let folder = SampleFolder::new()?;
    let mut journal = SampleJournal::create(&folder, SLOT_LEN_BYTES, vec![vec![7; 8192]])?;
    journal.checkpoint("kept", 1)?;
    journal.reopen()?;
    journal.write(0, 0, &[8; 512])?;
    journal.checkpoint("left out", 2)?;
    journal.flush()?;
    let place = folder.place_of(b"left out")?;
    folder.flip_bit(place)?;
    // Into another slot, and back over the first batch alone.
    journal.reopen()?;
    journal.reopen()?;
    folder.flip_bit(place)?;
    let newest = segment(&folder, 0)?;
    assert!((slot_place(&newest)..slot_place(&newest) + SLOT_LEN_BYTES).contains(&place));
    assert_eq!(peer::list(&folder)?, journal.close()?.checkpoints[..1]);
    Ok(())
}

#[test]
fn a_page_of_another_time_does_not_count() -> Result<()> {
    if !peer::has_python() {
        return Ok(());
    }
    let folder = SampleFolder::new()?;
    let model = three_segments(&folder)?;
    let newest = segment(&folder, 2)?;
    let place = slot_place(&newest);
    let of_earlier_life = SegmentTrailer {
        header: SegmentHeader { number: 1, ..newest.header.clone() },
        data_end_bytes: newest.header.carried_end_bytes,
        footer_len_bytes: 4096,
        footer_crc: 0,
        last: newest.header.after,
        end_time_us: 0,
    };
    folder.overwrite(place + SLOT_LEN_BYTES - 4096, &of_earlier_life.encode())?;
    assert_eq!(peer::list(&folder)?, model.checkpoints);

    // The opening that made the newest copy never got into the superblock: the copy before it counts.
    folder.edit_superblock(|superblock| superblock.open_count -= 1)?;
    assert_eq!(folder.reader()?.catalogue().checkpoints().len(), 3);
    assert_eq!(peer::list(&folder)?, model.checkpoints[..3]);
    folder.edit_superblock(|superblock| superblock.open_count += 1)?;

    let newest = folder.bytes()?[..4096].to_vec();
    folder.edit_superblock(|superblock| {
        superblock.sequence -= 1;
        superblock.state = JournalState::HistoryGivenUp { sync_id: 4 };
    })?;
    assert_refused(peer::list(&folder), "the journal has no history");
    for place in SUPERBLOCK_OFFSETS {
        let older = folder.bytes()?[place as usize..][..4096].to_vec();
        folder.overwrite(place, &newest)?;
        assert_eq!(peer::list(&folder)?, model.checkpoints);
        folder.overwrite(place, &older)?;
    }
    Ok(())
}

#[test]
fn a_superblock_is_chosen_or_refused() -> Result<()> {
    if !peer::has_python() {
        return Ok(());
    }
    let folder = SampleFolder::new()?;
    let model = three_segments(&folder)?;
    for place in SUPERBLOCK_OFFSETS {
        folder.flip_bit(place + 300)?;
        assert_right_at(&folder, &model, &ALL)?;
        folder.flip_bit(place + 8)?;
        assert_right_at(&folder, &model, &ALL)?;
        folder.flip_bit(place + 8)?;
        folder.flip_bit(place + 300)?;
    }
    SUPERBLOCK_OFFSETS.iter().try_for_each(|place| folder.flip_bit(place + 300))?;
    assert_refused(peer::list(&folder), "no superblock is valid");
    SUPERBLOCK_OFFSETS.iter().try_for_each(|place| folder.flip_bit(place + 300))?;

    let good = folder.bytes()?[..4096].to_vec();
    let newer = [
        (8, "a format version that this reader doesn't know"),
        (104, "needs features that this reader doesn't know"),
    ];
    for (place, what) in newer {
        let mut page = good.clone();
        page[place] = 4;
        let crc = crc32c::crc32c(&[&page[..12], &[0; 4], &page[16..]].concat());
        page[12..16].copy_from_slice(&crc.to_le_bytes());
        folder.overwrite(0, &page)?;
        assert_refused(peer::list(&folder), what);
    }
    folder.overwrite(0, &good)?;
    Ok(())
}

/// Whatever bit is wrong: what the reader gives is right, or it says clearly why it gives nothing.
#[test]
fn no_flipped_bit_makes_the_reader_lie() -> Result<()> {
    if !peer::has_python() {
        return Ok(());
    }
    let (folder, mut rng) = (SampleFolder::new()?, StdRng::seed_from_u64(5));
    let model = three_segments(&folder)?;
    let used: Vec<u64> =
        (0..).zip(folder.bytes()?).filter(|(_, byte)| *byte != 0).map(|(place, _)| place).collect();
    let (mut refused, mut right) = (0, 0);
    for round in 0..30 {
        let place = used[rng.random_range(0..used.len())];
        folder.flip_bit(place)?;
        if let Ok(listed) = peer::list(&folder) {
            assert_eq!(listed, model.checkpoints[..listed.len()], "a bit of byte {place}");
        }
        let checkpoint = &model.checkpoints[round % 4];
        match peer::extract(&folder, &checkpoint.tag, 0) {
            Ok(found) => {
                assert!(found == model.image(0, checkpoint.cut), "a bit of byte {place}");
                right += 1;
            }
            Err(_) => refused += 1,
        }
        folder.flip_bit(place)?;
    }
    assert!(refused > 2 && right > 2, "{refused} refused, {right} right");
    let last = segment(&folder, 2)?;
    assert!(matches!(last.content, Content::Scanned(_)) && last.header.carried_end_bytes > 4096);
    Ok(())
}
