//! `hwtests/peers/journal_reader.py`, written from `docs/journal-format.md` alone, reads what the product wrote: so the document is enough.

use std::fs;

use anyhow::{Context, Result};
use hwtests::sample_journal::{
    SLOT_LEN_BYTES, SampleCheckpoint, SampleFolder, SampleJournal, SampleModel, peer,
};
use journal::catalogue::CheckpointEntry;
use journal::recovery::Content;
use journal::view::Reader;
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

const DISK_BYTES: [u64; 2] = [256 << 10, 96 << 10];

fn random_bytes(rng: &mut StdRng, len_bytes: u64) -> Vec<u8> {
    let mut bytes = vec![0; len_bytes as usize];
    rng.fill_bytes(&mut bytes);
    bytes
}

/// A journal with two disks of random bytes.
fn sample<'a>(folder: &'a SampleFolder, rng: &mut StdRng) -> Result<SampleJournal<'a>> {
    let disks = DISK_BYTES.iter().map(|len_bytes| random_bytes(rng, *len_bytes)).collect();
    SampleJournal::create(folder, SLOT_LEN_BYTES, disks)
}

/// Writes and zeroes that overlap, on both disks.
fn random_changes(journal: &mut SampleJournal<'_>, rng: &mut StdRng, count: usize) -> Result<()> {
    for _ in 0..count {
        let volume = rng.random_range(0..2_u16);
        let sectors = rng.random_range(1..=24_u64);
        let offset_bytes = rng.random_range(0..=DISK_BYTES[usize::from(volume)] / 512 - sectors) * 512;
        match rng.random_range(0..10) {
            0 => journal.void()?,
            1 | 2 => journal.zero(volume, offset_bytes, sectors * 512)?,
            3 => journal.flush()?,
            _ => journal.write(volume, offset_bytes, &random_bytes(rng, sectors * 512))?,
        }
    }
    Ok(())
}

/// What the product lists.
fn catalogue(reader: &Reader) -> Vec<SampleCheckpoint> {
    let entries = reader.catalogue().checkpoints().iter();
    let checkpoint = |entry: &CheckpointEntry| SampleCheckpoint {
        seq: entry.seq,
        cut: entry.checkpoint.cut,
        time_us: entry.checkpoint.time_us,
        tag: entry.checkpoint.tag.clone(),
    };
    entries.map(checkpoint).collect()
}

/// The checkpoints of the model but for those with these tags are what product and reader list, and the reader's images are right.
fn assert_read_right(folder: &SampleFolder, model: &SampleModel, void: &[&str]) -> Result<()> {
    let counting = model.checkpoints.iter().filter(|one| !void.contains(&one.tag.as_str()));
    let expected: Vec<SampleCheckpoint> = counting.cloned().collect();
    assert_eq!(catalogue(&folder.reader()?), expected);
    assert_eq!(peer::list(folder)?, expected);
    for checkpoint in &expected {
        for disk in 0..model.volume_count() {
            let found = peer::extract(folder, &checkpoint.seq.to_string(), disk)?;
            assert!(found == model.image(disk, checkpoint.cut), "disk {disk} at {checkpoint:?}");
        }
    }
    Ok(())
}

/// What the reader says when it refuses.
fn refusal<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.expect_err("it is to refuse this").to_string()
}

#[test]
fn every_checkpoint_of_random_journals_is_read() -> Result<()> {
    if !peer::has_python() {
        return Ok(());
    }
    let (mut sealed, mut carried) = (0, 0);
    for seed in 0..4 {
        let (folder, mut rng) = (SampleFolder::new()?, StdRng::seed_from_u64(seed));
        let mut journal = sample(&folder, &mut rng)?;
        for round in 0..6_u64 {
            random_changes(&mut journal, &mut rng, 12)?;
            journal.checkpoint(&format!("round {round}, ünï"), 1_700_000_000_000_000 + round)?;
            match rng.random_range(0..4) {
                0 => journal.seal_segment()?,
                1 => journal.reopen()?,
                2 => journal.fork(rng.random_range(0..3))?,
                _ => {}
            }
        }
        assert_read_right(&folder, &journal.close()?, &[])?;
        for segment in folder.reader()?.survey.segments {
            sealed += usize::from(matches!(segment.content, Content::Sealed(_)));
            carried += usize::from(segment.header.carried_end_bytes > 4096);
        }
    }
    assert!(sealed > 4 && carried > 0, "{sealed} sealed, {carried} carried");
    Ok(())
}

/// The manifest tells from when on the VM didn't have a disk any more.
#[test]
fn a_disk_that_left_is_read_at_checkpoints_from_before() -> Result<()> {
    if !peer::has_python() {
        return Ok(());
    }
    let (folder, mut rng) = (SampleFolder::new()?, StdRng::seed_from_u64(60));
    let disks = DISK_BYTES.iter().map(|len_bytes| random_bytes(&mut rng, *len_bytes)).collect();
    let manifest = r#"{"vm":"sample","disks":["disk-0.raw","disk-1.raw"],"left":{"1":10}}"#;
    let mut journal = SampleJournal::create_of(&folder, SLOT_LEN_BYTES, disks, manifest)?;
    journal.write(1, 0, &random_bytes(&mut rng, 8192))?;
    journal.checkpoint("before", 1)?;
    while journal.seq() < 9 {
        journal.void()?;
    }
    journal.checkpoint("the last with it", 2)?;
    journal.zero(1, 0, DISK_BYTES[1])?;
    journal.checkpoint("after", 3)?;
    let model = journal.close()?;
    for tag in ["before", "the last with it"] {
        let cut = model.checkpoints.iter().find(|one| one.tag == tag).context("listed")?.cut;
        assert!(peer::extract(&folder, tag, 1)? == model.image(1, cut), "{tag}");
    }
    let cut = model.checkpoints[2].cut;
    assert!(cut >= 10 && model.checkpoints[1].cut == 9, "{:?}", model.checkpoints);
    assert_eq!(
        refusal(peer::extract(&folder, "after", 1)),
        format!("journal_reader.py: there is no disk 1 at record {cut}")
    );
    assert!(peer::extract(&folder, "after", 0)? == model.image(0, cut));
    Ok(())
}

#[test]
fn a_torn_tail_ends_the_history_before_it() -> Result<()> {
    if !peer::has_python() {
        return Ok(());
    }
    for seed in 10..13 {
        let (folder, mut rng) = (SampleFolder::new()?, StdRng::seed_from_u64(seed));
        let mut journal = sample(&folder, &mut rng)?;
        random_changes(&mut journal, &mut rng, 30)?;
        journal.checkpoint("before", 1)?;
        if seed == 11 {
            journal.reopen()?;
        }
        journal.flush()?;
        journal.checkpoint("lost", 2)?;
        journal.write(1, 0, &random_bytes(&mut rng, 8192))?;
        let model = journal.tear()?;
        assert_eq!(model.checkpoints.len(), 1);
        assert_read_right(&folder, &model, &[])?;
        assert!(refusal(peer::extract(&folder, "lost", 0)).ends_with("checkpoint lost isn't there"));
    }
    Ok(())
}

/// B5, also of a sync that another one takes over.
#[test]
fn a_cut_inside_a_sync_is_no_checkpoint() -> Result<()> {
    if !peer::has_python() {
        return Ok(());
    }
    let (folder, mut rng) = (SampleFolder::new()?, StdRng::seed_from_u64(20));
    let mut journal = sample(&folder, &mut rng)?;
    journal.write(0, 0, &[1; 4096])?;
    journal.checkpoint("before", 1)?;
    journal.checkpoint_of(journal.seq() + 2, "of the future", 1)?;
    journal.void()?;
    journal.sync_begin(1, 31)?;
    journal.checkpoint("inside", 2)?;
    journal.sync_data(1, 31, 4096, &random_bytes(&mut rng, 9 * 512))?;
    journal.sync_begin(1, 32)?;
    journal.sync_end(1, 31)?;
    journal.seal_segment()?;
    journal.checkpoint("still inside", 3)?;
    journal.sync_data(1, 32, 6144, &random_bytes(&mut rng, 4096))?;
    journal.sync_end(1, 32)?;
    journal.checkpoint("after", 4)?;
    journal.sync_begin(0, 33)?;
    journal.checkpoint("never ended", 5)?;
    assert_read_right(&folder, &journal.close()?, &["of the future", "inside", "still inside", "never ended"])
}

#[test]
fn a_disk_is_absent_before_its_base_and_grows_with_a_resize() -> Result<()> {
    if !peer::has_python() {
        return Ok(());
    }
    let (folder, mut rng) = (SampleFolder::new()?, StdRng::seed_from_u64(30));
    let mut journal = sample(&folder, &mut rng)?;
    random_changes(&mut journal, &mut rng, 10)?;
    journal.checkpoint("early", 1)?;
    random_changes(&mut journal, &mut rng, 10)?;
    journal.rebase(1, random_bytes(&mut rng, DISK_BYTES[1]))?;
    journal.checkpoint("base", 2)?;
    journal.resize(0, DISK_BYTES[0] + 20 * 512)?;
    journal.write(0, DISK_BYTES[0] + 8 * 512, &[7; 512])?;
    random_changes(&mut journal, &mut rng, 10)?;
    journal.checkpoint("late", 3)?;
    let model = journal.close()?;
    assert!(refusal(peer::extract(&folder, "early", 1)).contains("there is no disk 1 at record"));
    assert!(refusal(peer::extract(&folder, "late", 2)).contains("disk-2.raw"));
    let cut = |tag: &str| {
        let found = model.checkpoints.iter().find(|checkpoint| checkpoint.tag == tag);
        found.map(|checkpoint| checkpoint.cut).context("unknown tag")
    };
    for (tag, disk) in [("early", 0), ("base", 0), ("base", 1), ("late", 0), ("late", 1)] {
        assert!(peer::extract(&folder, tag, disk)? == model.image(disk, cut(tag)?), "disk {disk}, {tag}");
    }
    Ok(())
}

/// C2: what is announced to be promoted can't be opened any more; what was promoted is in the recovery disks.
#[test]
fn promotion_moves_the_beginning_of_the_history() -> Result<()> {
    if !peer::has_python() {
        return Ok(());
    }
    let (folder, mut rng) = (SampleFolder::new()?, StdRng::seed_from_u64(40));
    let mut journal = sample(&folder, &mut rng)?;
    random_changes(&mut journal, &mut rng, 8)?;
    journal.checkpoint("first", 1)?;
    let early_cut = journal.seq() - 3;
    journal.seal_segment()?;
    journal.checkpoint_of(early_cut, "told late", 2)?;
    random_changes(&mut journal, &mut rng, 8)?;
    journal.checkpoint("second", 3)?;
    let model = journal.close()?;
    let mut by_cut = model.clone();
    by_cut.checkpoints.sort_by_key(|checkpoint| checkpoint.cut);
    assert_read_right(&folder, &by_cut, &[])?;

    let first = folder.reader()?.survey.segments[0].last();
    folder.edit_superblock(|superblock| superblock.promotion_intent_seq = first.seq)?;
    assert_read_right(&folder, &model, &["first", "told late"])?;
    for disk in 0..model.volume_count() {
        fs::write(folder.disk(disk), model.image(disk, first.seq))?;
    }
    folder.edit_superblock(|superblock| {
        (superblock.low_water, superblock.low_water_segment) = (first, 2);
        superblock.promotion_intent_seq = 0;
        superblock.volumes.iter_mut().for_each(|volume| volume.base_seq = first.seq);
    })?;
    assert_read_right(&folder, &model, &["first", "told late"])
}
