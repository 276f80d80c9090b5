//! Sample journals that several tests use. Their bytes are always the same.

use anyhow::{Context, Result, ensure};
use journal::crypt::{Encryption, SiteKey, SiteKeys};
use journal::writer::Change;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::{Ended, SampleFolder, SampleJournal, SampleModel};

/// Length of a slot: short, so that the files are small. The journal keeps 12 KiB of each for its own records.
pub const SLOT_LEN_BYTES: u64 = 76 << 10;

/// Two disks of 64 KiB and 24 KiB; two sealed segments with the checkpoints `first` and `second`; an unsealed one with `third` and
/// `fourth` and five batches, the first two of which an opening copied.
///
/// Of the 8 KiB that the second segment writes to 8192 of disk 0, the half is there at `third`, and nothing at `fourth`.
pub fn three_segments(folder: &SampleFolder) -> Result<SampleModel> {
    write_three_segments(folder, None, None)?.close()
}

/// The same journal, encrypted. The site's key is in `site.key` beside it.
pub fn encrypted_segments(folder: &SampleFolder) -> Result<SampleModel> {
    write_three_segments(folder, Some(&site_key(folder)?), None)?.close()
}

/// The same journal, of which the third segment is not encrypted any more.
pub fn decrypted_segments(folder: &SampleFolder) -> Result<SampleModel> {
    write_three_segments(folder, Some(&site_key(folder)?), Some(Change::SetEncryption(Encryption::Off)))?
        .close()
}

/// Puts a site key into the folder.
fn site_key(folder: &SampleFolder) -> Result<SiteKey> {
    let text = format!("# of a journal for tests\nholdfast-site-key-1 {}\n", "5e".repeat(SiteKey::LEN_BYTES));
    std::fs::write(folder.site_key(), &text)?;
    SiteKeys::parse(&text)?.current().cloned().context("one key")
}

/// The same journal, whose two sealed segments were to be promoted: the intent is durable, and of three writes to the recovery disks
/// one was made. A reader that took the recovery disks for those of the low-water mark would find `first` wrong.
pub fn half_promoted(folder: &SampleFolder) -> Result<SampleModel> {
    let mut journal = write_three_segments(folder, None, None)?;
    journal.flush()?;
    let ended = journal.promote(2, 1)?;
    ensure!(matches!(ended, Ended::Cut), "the promotion was not cut short: {ended:?}");
    journal.close()
}

/// The same journal, whose two sealed segments were promoted although the second one's write to disk 0 is damaged.
pub fn promoted_over_damage(folder: &SampleFolder) -> Result<SampleModel> {
    let mut journal = write_three_segments(folder, None, None)?;
    journal.flush()?;
    let second = &journal.model().checkpoints[1];
    let place = folder.place_of(&journal.model().image(0, second.cut)[12 << 10..16 << 10])?;
    folder.flip_bit(place)?;
    let ended = journal.promote(2, usize::MAX)?;
    ensure!(matches!(&ended, Ended::Whole(promoted) if promoted.bad_ranges.len() == 1), "{ended:?}");
    journal.close()
}

/// The same journal, whose history was given up for a sync that has not begun to write yet.
pub fn history_given_up(folder: &SampleFolder) -> Result<SampleModel> {
    let mut journal = write_three_segments(folder, None, None)?;
    journal.flush()?;
    journal.give_up_history(NEXT_SYNC_ID)?;
    journal.close()
}

/// Two disks of 64 KiB and 24 KiB in the middle of the first sync: the first one has its end, the second one has nothing.
pub fn first_sync(folder: &SampleFolder) -> Result<SampleModel> {
    let disks = vec![vec![0x51; 64 << 10], vec![0; 24 << 10]];
    SampleJournal::create_in_sync(folder, SLOT_LEN_BYTES, disks, 1)?.close()
}

/// The sync that a history was given up for.
const NEXT_SYNC_ID: u64 = 10;

fn write_three_segments<'a>(
    folder: &'a SampleFolder,
    site_key: Option<&SiteKey>,
    before_third: Option<Change>,
) -> Result<SampleJournal<'a>> {
    let mut rng = StdRng::seed_from_u64(77);
    // Each sector is one random number again and again, so that the files pack well.
    let mut random = move |len_bytes: usize| -> Vec<u8> {
        (0..len_bytes / 512).flat_map(|_| rng.random::<u64>().to_le_bytes().repeat(64)).collect()
    };
    let disks = vec![random(64 << 10), random(24 << 10)];
    let mut journal = match site_key {
        Some(site_key) => SampleJournal::create_encrypted(folder, SLOT_LEN_BYTES, disks, site_key)?,
        None => SampleJournal::create(folder, SLOT_LEN_BYTES, disks)?,
    };
    for (tag, time_us) in [("first", 1_000_000), ("second", 2_000_000)] {
        journal.write(0, 8192, &random(8192))?;
        journal.zero(0, 32 << 10, 3 * 512)?;
        journal.flush()?;
        journal.write(1, 512, &random(512))?;
        journal.checkpoint(tag, time_us)?;
        journal.seal_segment()?;
    }
    if let Some(change) = before_third {
        journal.change(change)?;
    }
    journal.write(0, 0, &random(12 << 10))?;
    journal.checkpoint("third", 3_000_000)?;
    journal.reopen()?;
    journal.write(0, 4096, &random(12 << 10))?;
    journal.zero(1, 0, 1024)?;
    journal.flush()?;
    journal.write(0, 60 << 10, &random(4096))?;
    journal.checkpoint("fourth", 4_000_000)?;
    Ok(journal)
}
