//! Promotion on real files: the disks afterwards, after it was cut short at any step, over damage, and beneath an open view.

use anyhow::{Result, ensure};
use hwtests::sample_journal::{Ended, SLOT_LEN_BYTES, SampleFolder, SampleJournal, peer};
use journal::bad_ranges::BadRange;
use journal::storage::ring::{Access, DirectFile, RingStorage};
use journal::storage::{Blocking, Purpose};
use journal::view::{Promoted, View, ViewError};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const DISK_BYTES: [u64; 2] = [256 << 10, 96 << 10];

/// A journal of random writes and zeroes of any sector, with a checkpoint after every tenth, several segments of which are sealed.
fn sample(folder: &SampleFolder, seed: u64) -> Result<SampleJournal<'_>> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut random = |len_bytes: u64| {
        let mut bytes = vec![0; len_bytes as usize];
        rng.fill_bytes(&mut bytes);
        bytes
    };
    let disks = DISK_BYTES.map(&mut random).to_vec();
    let mut journal = SampleJournal::create(folder, SLOT_LEN_BYTES, disks)?;
    for number in 0..90_u64 {
        let volume = (number % 3 / 2) as u16;
        let sectors = 1 + u64::from(random(1)[0]) % 24;
        let place = u64::from_le_bytes(random(8).try_into().expect("eight bytes"));
        let offset_bytes = place % (DISK_BYTES[usize::from(volume)] / 512 - sectors) * 512;
        if number % 7 == 3 {
            journal.zero(volume, offset_bytes, sectors * 512)?;
        } else {
            journal.write(volume, offset_bytes, &random(sectors * 512))?;
        }
        if number % 10 == 9 {
            journal.checkpoint(&format!("after {number}"), 1_000_000 * number)?;
        }
    }
    journal.flush()?;
    ensure!(journal.sealed_count() >= 4, "only {} segments are sealed", journal.sealed_count());
    Ok(journal)
}

/// A disk of a view.
fn image(folder: &SampleFolder, view: &View, volume: u16) -> Result<Vec<u8>, ViewError> {
    piece(folder, view, volume, 0, DISK_BYTES[usize::from(volume)] as usize)
}

/// A part of a disk of a view.
fn piece(
    folder: &SampleFolder,
    view: &View,
    volume: u16,
    offset_bytes: u64,
    len_bytes: usize,
) -> Result<Vec<u8>, ViewError> {
    let mut storage = RingStorage::new(64).expect("io_uring");
    let open = |path: std::path::PathBuf| DirectFile::open(&path, Access::ReadOnly).expect("a file");
    let journal = storage.add_file(open(folder.journal()));
    let disk = storage.add_file(open(folder.disk(volume)));
    let mut bytes = vec![0xee; len_bytes];
    view.volume(volume)?.read(&mut storage, journal, offset_bytes, &mut bytes, |storage, at, into| {
        let begin = at / 4096 * 4096;
        let len_bytes = (at + into.len() as u64).next_multiple_of(4096) - begin;
        let read = Blocking::new(storage, disk, Purpose::View).read(begin, len_bytes as usize)?;
        into.copy_from_slice(&read[(at - begin) as usize..][..into.len()]);
        Ok(())
    })?;
    Ok(bytes)
}

/// Exactly the checkpoints from a number on are listed, and right.
fn assert_right_from(folder: &SampleFolder, journal: &SampleJournal<'_>, oldest_seq: u64) -> Result<()> {
    let reader = folder.reader()?;
    let listed: Vec<u64> =
        reader.catalogue().checkpoints().iter().map(|entry| entry.checkpoint.cut).collect();
    let cuts = journal.model().checkpoints.iter().map(|checkpoint| checkpoint.cut);
    assert_eq!(listed, cuts.filter(|cut| *cut >= oldest_seq).collect::<Vec<_>>());
    for cut in listed {
        let view = reader.view(cut)?;
        for volume in 0..2 {
            assert!(
                image(folder, &view, volume)? == journal.model().image(volume, cut),
                "disk {volume} at {cut}"
            );
        }
    }
    Ok(())
}

#[test]
fn what_is_promoted_is_on_the_disks_and_its_space_is_given_back() -> Result<()> {
    for seed in 0..4 {
        let folder = SampleFolder::new()?;
        let mut journal = sample(&folder, seed)?;
        let len_bytes = || std::fs::metadata(folder.journal()).map(|metadata| metadata.len());
        let before = len_bytes()?;
        while journal.sealed_count() > 1 {
            let count = 1 + seed as usize % 2;
            let through = journal.sealed_end(count.min(journal.sealed_count()) - 1).expect("sealed");
            let ended = journal.promote(count, usize::MAX)?;
            assert!(matches!(&ended, Ended::Whole(promoted) if promoted.through.seq == through), "{ended:?}");
            assert_right_from(&folder, &journal, through)?;
        }
        journal.shrink()?;
        assert!(len_bytes()? < before, "{} bytes, before {before}", len_bytes()?);
        journal.write(0, 0, &[7; 4096])?;
        journal.reopen()?;
        let oldest_seq = folder.reader()?.survey.superblock.oldest_seq();
        assert_right_from(&folder, &journal, oldest_seq)?;
        if peer::has_python() {
            for checkpoint in folder.reader()?.catalogue().checkpoints() {
                let found = peer::extract(&folder, &checkpoint.seq.to_string(), 0)?;
                assert!(found == journal.model().image(0, checkpoint.checkpoint.cut), "{checkpoint:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_promotion_that_was_cut_short_is_done_again() -> Result<()> {
    for most_writes in 0..12 {
        let folder = SampleFolder::new()?;
        let mut journal = sample(&folder, 40 + most_writes as u64)?;
        let through = journal.sealed_end(2).expect("sealed");
        let ended = journal.promote(3, most_writes)?;
        assert!(matches!(ended, Ended::Cut), "{ended:?}");
        assert_right_from(&folder, &journal, through)?;
        journal.reopen()?;
        assert_right_from(&folder, &journal, through)?;
        let ended = journal.promote(3, usize::MAX)?;
        assert!(matches!(ended, Ended::Whole(_)), "{ended:?}");
        assert_right_from(&folder, &journal, through)?;
    }
    Ok(())
}

#[test]
fn segments_without_data_are_promoted_too() -> Result<()> {
    let folder = SampleFolder::new()?;
    let mut journal =
        SampleJournal::create(&folder, SLOT_LEN_BYTES, vec![vec![3; 64 << 10], vec![4; 64 << 10]])?;
    for number in 0..20 {
        journal.void()?;
        journal.checkpoint(&format!("idle {number}"), number)?;
        journal.flush()?;
    }
    journal.seal_segment()?;
    journal.checkpoint("after it", 100)?;
    journal.flush()?;
    let ended = journal.promote(journal.sealed_count(), usize::MAX)?;
    assert!(matches!(&ended, Ended::Whole(promoted) if promoted.written_bytes == 0), "{ended:?}");
    let listed = folder.reader()?.catalogue().checkpoints().len();
    assert!((1..=2).contains(&listed), "{listed} checkpoints are left");
    Ok(())
}

#[test]
fn a_damaged_record_stops_nothing_and_its_place_reads_as_an_error_until_it_is_written_again() -> Result<()> {
    let folder = SampleFolder::new()?;
    let mut journal = sample(&folder, 77)?;
    let (place, marked) = (64_u64 << 10, [0xb7; 16 << 10]);
    journal.write(0, place, &marked)?;
    let damaged_seq = journal.seq();
    journal.checkpoint("damaged", 900)?;
    journal.seal_segment()?;
    journal.write(1, 0, &[1; 512])?;
    journal.checkpoint("still damaged", 1000)?;
    journal.seal_segment()?;
    // In the second unit of four.
    folder.flip_bit(folder.place_of(&marked[..4096])? + 5000)?;
    let before = folder.reader()?.view(journal.seq())?;
    let followed = Promoted::default();
    let mut before = before;
    before.follow(&followed);
    let Ended::Whole(promoted) = journal.promote(journal.sealed_count() - 1, usize::MAX)? else {
        panic!("a damaged record stops nothing");
    };
    let bad = BadRange { volume: 0, offset_bytes: place + 4096, len_bytes: 4096, seq: damaged_seq };
    assert_eq!(promoted.bad_ranges.iter().collect::<Vec<_>>(), [bad]);
    followed.advance(promoted.through.seq, &promoted.bad_ranges);
    let assert_lost = |view: &View, journal: &SampleJournal<'_>| {
        let all = image(&folder, view, 0);
        assert!(matches!(all, Err(ViewError::Corrupt { seq, .. }) if seq == damaged_seq), "{:?}", all.err());
        let model = journal.model().image(0, view.seq());
        for (at, good) in [(0, true), (place, true), (place + 4096, false), (place + 8192, true)] {
            let found = piece(&folder, view, 0, at, 4096);
            match good {
                true => assert!(found.expect("it is whole") == model[at as usize..][..4096], "at {at}"),
                false => assert!(found.is_err(), "at {at}"),
            }
        }
    };
    assert_lost(&before, &journal);
    let newest = |folder: &SampleFolder| -> Result<View> {
        let reader = folder.reader()?;
        let seq = reader.newest_seq();
        Ok(reader.view(seq)?)
    };
    assert_lost(&newest(&folder)?, &journal);
    journal.reopen()?;
    assert_lost(&newest(&folder)?, &journal);
    let superblocks = folder.take_superblocks()?;
    assert_lost(&folder.rebuilt_reader()?.view(journal.seq())?, &journal);
    folder.put_superblocks(&superblocks)?;

    // Half of it is mended by the journal at once, and by promotion for good.
    journal.write(0, place + 4096, &[5; 2048])?;
    journal.checkpoint("half mended", 1100)?;
    journal.flush()?;
    let view = newest(&folder)?;
    assert_eq!(piece(&folder, &view, 0, place + 4096, 2048)?, [5; 2048]);
    assert!(piece(&folder, &view, 0, place + 6144, 512).is_err());
    journal.seal_segment()?;
    let Ended::Whole(promoted) = journal.promote(journal.sealed_count(), usize::MAX)? else {
        panic!("it goes through");
    };
    let rest = BadRange { offset_bytes: place + 6144, len_bytes: 2048, ..bad };
    assert_eq!(promoted.bad_ranges.iter().collect::<Vec<_>>(), [rest]);
    journal.write(0, place, &[6; 16 << 10])?;
    journal.checkpoint("mended", 1200)?;
    journal.seal_segment()?;
    let Ended::Whole(promoted) = journal.promote(journal.sealed_count(), usize::MAX)? else {
        panic!("it goes through");
    };
    assert!(promoted.bad_ranges.is_empty());
    let view = newest(&folder)?;
    assert!(image(&folder, &view, 0)? == journal.model().image(0, view.seq()));
    Ok(())
}

#[test]
fn without_superblocks_a_promotion_that_was_cut_short_is_read_from_the_journal() -> Result<()> {
    for most_writes in [0, 3, 7] {
        let folder = SampleFolder::new()?;
        let mut journal = sample(&folder, 140 + most_writes as u64)?;
        let Ended::Whole(_) = journal.promote(1, usize::MAX)? else { panic!("it goes through") };
        let through = journal.sealed_end(1).expect("sealed");
        assert!(matches!(journal.promote(2, most_writes)?, Ended::Cut));
        folder.take_superblocks()?;
        let reader = folder.rebuilt_reader()?;
        assert_eq!(reader.survey.superblock.oldest_seq(), through);
        for entry in reader.catalogue().checkpoints() {
            let cut = entry.checkpoint.cut;
            for volume in 0..2 {
                let found = image(&folder, &reader.view(cut)?, volume)?;
                assert!(found == journal.model().image(volume, cut), "disk {volume} at {cut}");
            }
        }
    }
    Ok(())
}

#[test]
fn an_open_view_is_right_while_what_it_shows_is_promoted_and_its_slots_are_used_again() -> Result<()> {
    let folder = SampleFolder::new()?;
    let mut journal = sample(&folder, 99)?;
    let checkpoint = journal.model().checkpoints[6].clone();
    let mut view = folder.reader()?.view(checkpoint.cut)?;
    let followed = Promoted::default();
    view.follow(&followed);
    let mut beneath = 0;
    while journal.sealed_end(0).is_some_and(|end| end <= checkpoint.cut) {
        let Ended::Whole(promoted) = journal.promote(1, usize::MAX)? else { panic!("it goes through") };
        followed.advance(promoted.through.seq, &promoted.bad_ranges);
        beneath += 1;
        // The freed slot is written over.
        for number in 0..8 {
            journal.write(1, number * 4096, &[number as u8; 8192])?;
        }
        journal.flush()?;
        for volume in 0..2 {
            let found = image(&folder, &view, volume)?;
            assert!(
                found == journal.model().image(volume, checkpoint.cut),
                "disk {volume}, {beneath} promoted"
            );
        }
    }
    assert!(beneath >= 2, "{beneath}");
    Ok(())
}
