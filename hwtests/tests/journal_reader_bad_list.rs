//! What `hwtests/peers/journal_reader.py` makes of recovery disks that have lost something (C5).

use anyhow::{Context, Result, ensure};
use hwtests::sample_journal::{Ended, SLOT_LEN_BYTES, SampleFolder, SampleJournal, peer};
use journal::format::BAD_LIST_OFFSETS;

/// What the reader says when it refuses.
fn refusal<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.expect_err("it is to refuse this").to_string()
}

#[test]
fn what_was_promoted_damaged_is_refused_until_it_is_written_again() -> Result<()> {
    if !peer::has_python() {
        return Ok(());
    }
    let folder = SampleFolder::new()?;
    let mut journal =
        SampleJournal::create(&folder, SLOT_LEN_BYTES, vec![vec![1; 64 << 10], vec![2; 32 << 10]])?;
    journal.write(0, 8192, &[0x5a; 8192])?;
    let damaged_seq = journal.seq();
    journal.write(1, 4096, &[0x5b; 4096])?;
    journal.seal_segment()?;
    folder.flip_bit(folder.place_of(&[0x5a; 8192])? + 5000)?;
    let ended = journal.promote(1, usize::MAX)?;
    ensure!(matches!(&ended, Ended::Whole(promoted) if promoted.bad_ranges.len() == 1), "{ended:?}");
    journal.write(0, 0, &[0x5c; 512])?;
    journal.checkpoint("lost", 1)?;
    journal.write(0, 12 << 10, &[0x5d; 2048])?;
    journal.checkpoint("in part", 2)?;
    journal.write(0, 14 << 10, &[0x5e; 4096])?;
    journal.checkpoint("written again", 3)?;
    let model = journal.close()?;
    assert_eq!(peer::list(&folder)?, model.checkpoints);
    for tag in ["lost", "in part"] {
        let said = refusal(peer::extract(&folder, tag, 0));
        let expected =
            format!("disk 0 is lost at 12288: record {damaged_seq} was damaged before it was promoted");
        assert!(said.contains(&expected), "{tag}: {said}");
    }
    for (tag, disk) in [("lost", 1), ("written again", 0), ("written again", 1)] {
        let checkpoint = model.checkpoints.iter().find(|one| one.tag == tag).context("a checkpoint")?;
        assert!(
            peer::extract(&folder, tag, disk)? == model.image(disk, checkpoint.cut),
            "disk {disk} at {tag}"
        );
    }

    let slot = folder.reader()?.survey.superblock.bad_list.context("a list")?.slot as usize;
    for byte in [0, 8, 20, 41, 70] {
        folder.flip_bit(BAD_LIST_OFFSETS[slot] + byte)?;
        let said = refusal(peer::list(&folder));
        assert!(
            said.contains("the list of what of the recovery disks is lost can't be read"),
            "{byte}: {said}"
        );
        folder.flip_bit(BAD_LIST_OFFSETS[slot] + byte)?;
    }
    assert_eq!(peer::list(&folder)?, model.checkpoints);
    Ok(())
}
