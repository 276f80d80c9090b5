//! Makes the corpora's seeds: what the product writes, whole and damaged. The fuzzers go on from there (`fuzz/README.md`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use hwtests::sample_journal::{
    SampleFolder, SampleJournal, SampleModel, decrypted_segments, encrypted_segments, first_sync,
    half_promoted, history_given_up, promoted_over_damage, three_segments,
};
use journal::batch::{BatchLink, BatchSealer, Checkpoint, CheckpointKind, Epoch, Record};
use journal::crypt::{SiteKey, SiteKeys};
use journal::format::{MANIFEST_OFFSETS, PAGE_BYTES, SUPERBLOCK_OFFSETS, SegmentTrailer, slot_offset_bytes};
use uuid::Uuid;

/// The shortest slot, which is what the harness takes.
const SLOT_BYTES: u64 = 64 << 10;

/// Writes a seed that isn't there yet.
fn seed(target: &str, name: &str, bytes: &[u8]) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(target)
        .join(format!("seed-{name}"));
    fs::create_dir_all(path.parent().context("a folder")?)?;
    if !path.exists() {
        fs::write(path, bytes)?;
    }
    Ok(())
}

fn flipped(bytes: &[u8], at: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at] ^= 1;
    bytes
}

fn checkpoint(tag: &str) -> Checkpoint {
    Checkpoint {
        epoch: Epoch { nonce: Uuid::from_u128(77), counter: 3 },
        cut: 8,
        member_set_version: 1,
        time_us: 4,
        kind: CheckpointKind::Application,
        tag: tag.to_owned(),
    }
}

fn sealed_batch(records: Vec<Record>, after_seq: u64) -> Result<Bytes> {
    let mut sealer = BatchSealer::new();
    records.into_iter().try_for_each(|record| sealer.push(record))?;
    let link = BatchLink {
        journal_id: Uuid::from_u128(1),
        generation: Uuid::from_u128(0x6e),
        open_count: 1,
        prev_batch_crc: 0,
    };
    Ok(sealer.seal(&link, after_seq).context("records")?.to_bytes())
}

fn batches() -> Result<()> {
    let payload = |len: usize, fill: u8| Bytes::from(vec![fill; len]);
    let all = vec![
        Record::write(1, 1, 0, 512, payload(512, 1)),
        Record::zeroes(2, 1, 1, 0, 1 << 40),
        Record::void(3, 1),
        Record::checkpoint(4, 1, &checkpoint("before the upgrade")),
        Record::sync_begin(5, 1, 0, 1 << 20, 9),
        Record::sync_data(6, 1, 0, 8192, 9, payload(9000 / 512 * 512, 2)),
        Record::resize(7, 1, 1, 2 << 40),
        Record::end_of_generation(8, 1, Some(Uuid::from_u128(0x6f))),
        Record::end_of_generation(9, 1, None),
        Record::sync_end(10, 1, 0, 1 << 20, 9),
    ];
    let all = sealed_batch(all, 0)?;
    seed("journal_batch", "all-kinds", &all)?;
    seed("journal_batch", "local-intent", &sealed_batch(vec![Record::promotion_intent(1, 7)], 9)?)?;
    seed("journal_batch", "torn", &all[..all.len() - PAGE_BYTES])?;
    seed("journal_batch", "damaged-payload", &flipped(&all, all.len() - 6000))?;
    seed(
        "journal_batch",
        "two-in-a-row",
        &[&all[..], &sealed_batch(vec![Record::void(11, 2)], 10)?].concat(),
    )?;
    let longest_tag = Record::checkpoint(1, 1, &checkpoint(&"\u{e4}".repeat(127)));
    seed("journal_batch", "longest-tag", &sealed_batch(vec![longest_tag], 0)?)?;
    let enormous = (1..=4).map(|seq| Record::zeroes(seq, 1, 63, 0, 1 << 60)).collect();
    seed("journal_batch", "enormous-zeroes", &sealed_batch(enormous, 0)?)
}

/// Two sealed segments and an open one, which has batches that an opening copied; all kinds of records that a source makes.
fn all_kinds<'a>(folder: &'a SampleFolder, site_key: Option<&SiteKey>) -> Result<SampleJournal<'a>> {
    let disks = vec![vec![1; 64 << 10], vec![2; 24 << 10]];
    let mut journal = match site_key {
        Some(site_key) => SampleJournal::create_encrypted(folder, SLOT_BYTES, disks, site_key)?,
        None => SampleJournal::create(folder, SLOT_BYTES, disks)?,
    };
    for round in 0..2 {
        journal.write(0, 8192, &[0x30 + round; 5120])?;
        journal.zero(0, 32 << 10, 3 * 512)?;
        journal.void()?;
        journal.flush()?;
        journal.sync_begin(1, 40)?;
        journal.sync_data(1, 40, 0, &[0x40 + round; 1024])?;
        journal.sync_end(1, 40)?;
        journal.resize(1, (25 + u64::from(round)) << 10)?;
        journal.checkpoint("in it", 5)?;
        journal.seal_segment()?;
    }
    journal.write(0, 0, &[0x51; 2048])?;
    journal.reopen()?;
    journal.write(0, 4096, &[0x52; 2048])?;
    journal.checkpoint("at the end", 6)?;
    journal.flush()?;
    Ok(journal)
}

/// The slot of one of a journal's segments.
fn slot(folder: &SampleFolder, index: usize, number_of_slots: usize) -> Result<Vec<u8>> {
    let bytes = folder.bytes()?;
    let slots = (0..number_of_slots as u32).map(|slot| slot_offset_bytes(slot, SLOT_BYTES) as usize);
    let is_of = |slot: &&[u8]| slot[..8] == *b"HFSEGHDR" && slot[32..40] == (index as u64 + 1).to_le_bytes();
    let slots = slots.filter_map(|place| bytes.get(place..place + SLOT_BYTES as usize));
    // Of a segment that was copied the copy.
    let found = slots.filter(is_of).max_by_key(|slot| slot[40]);
    Ok(found.context("the segment")?.to_vec())
}

fn segments() -> Result<()> {
    let site_key = SiteKeys::parse(&format!("holdfast-site-key-1 {}\n", "5e".repeat(32)))?;
    let (plain, encrypted) = (SampleFolder::new()?, SampleFolder::new()?);
    all_kinds(&plain, None)?.close()?;
    all_kinds(&encrypted, site_key.current())?.close()?;
    let (sealed, open) = (slot(&plain, 1, 6)?, slot(&plain, 2, 6)?);
    seed("journal_segment", "all-kinds", &sealed)?;
    seed("journal_segment", "copied-and-open", trimmed(&open))?;
    seed("journal_segment", "encrypted", &slot(&encrypted, 1, 6)?)?;
    seed("journal_segment", "damaged-payload", &flipped(&sealed, PAGE_BYTES + 1024))?;
    let second_batch = (2 * PAGE_BYTES..SLOT_BYTES as usize)
        .step_by(PAGE_BYTES)
        .find(|at| sealed[*at..].starts_with(b"HFBATCH"))
        .context("a second batch")?;
    seed("journal_segment", "damaged-batch", &flipped(&sealed, second_batch + 3))?;
    let trailer = SegmentTrailer::decode(&sealed[SLOT_BYTES as usize - PAGE_BYTES..], SLOT_BYTES)?;
    seed("journal_segment", "damaged-footer", &flipped(&sealed, trailer.data_end_bytes as usize + 70))?;
    let mut headless = sealed.clone();
    headless[..PAGE_BYTES].fill(0);
    seed("journal_segment", "without-header", &headless)?;
    let last = open.windows(7).rposition(|window| window == b"HFBATCH").context("a batch")?;
    seed("journal_segment", "torn", &open[..last + 300])?;
    // What a hostile source could make of a slot's few pages.
    let header = open[..PAGE_BYTES].to_vec();
    let mut enormous = header;
    let after_seq = u64::from_le_bytes(enormous[48..56].try_into()?);
    enormous[64..72].copy_from_slice(&(PAGE_BYTES as u64).to_le_bytes());
    enormous[40..48].copy_from_slice(&1_u64.to_le_bytes());
    enormous[56..60].fill(0);
    let zeroes = (1..=16).map(|number| Record::zeroes(after_seq + number, 1, 0, 0, 1 << 60)).collect();
    enormous.extend_from_slice(&sealed_batch(zeroes, after_seq)?);
    seed("journal_segment", "enormous-zeroes", &enormous)?;

    let footer = &sealed[trailer.data_end_bytes as usize..][..trailer.footer_len_bytes as usize];
    let of_slot = |footer: &[u8]| [&trailer.data_end_bytes.to_le_bytes(), footer].concat();
    seed("journal_footer", "all-kinds", &of_slot(footer))?;
    seed("journal_footer", "torn", &of_slot(&footer[..footer.len() / 8]))?;
    let mut more = footer.to_vec();
    more[12..16].copy_from_slice(&1000_u32.to_le_bytes());
    seed("journal_footer", "more-extents-than-there-are", &of_slot(&more))?;
    let mut events = footer.to_vec();
    events[20] += 1;
    seed("journal_footer", "more-events-than-there-are", &of_slot(&events))
}

/// Without the zeroes at its end.
fn trimmed(slot: &[u8]) -> &[u8] {
    let end = slot.iter().rposition(|byte| *byte != 0).map_or(0, |at| at + 1);
    &slot[..end.next_multiple_of(PAGE_BYTES).min(slot.len())]
}

type Sample = fn(&SampleFolder) -> Result<SampleModel>;

fn superblocks() -> Result<()> {
    let samples: [(&str, Sample); 7] = [
        ("consistent", three_segments),
        ("encrypted", encrypted_segments),
        ("decrypted", decrypted_segments),
        ("promotion-announced", half_promoted),
        ("bad-list", promoted_over_damage),
        ("history-given-up", history_given_up),
        ("first-sync", first_sync),
    ];
    for (name, write) in samples {
        let folder = SampleFolder::new()?;
        write(&folder)?;
        let bytes = folder.bytes()?;
        let page = &bytes[SUPERBLOCK_OFFSETS[0] as usize..][..PAGE_BYTES];
        seed("journal_superblock", name, &[&[0], page].concat())?;
        if name == "consistent" {
            let slot = &bytes[MANIFEST_OFFSETS[0] as usize..][..128];
            seed("journal_superblock", "manifest-of-a-journal", &[&[1], slot].concat())?;
            seed("journal_manifest", "of-a-journal", slot)?;
            seed("journal_manifest", "torn", &slot[..70])?;
            seed("journal_manifest", "not-utf-8", &[slot, &[0xff, 0xfe]].concat())?;
            let mut longer = slot.to_vec();
            longer[40..44].copy_from_slice(&u32::MAX.to_le_bytes());
            seed("journal_manifest", "longer-than-its-slot", &longer)?;
            let mut newer = page.to_vec();
            newer[8] = 2;
            seed("journal_superblock", "version-2", &[&[0], &newer[..]].concat())?;
            let mut unknown = page.to_vec();
            unknown[111] = 0x80;
            seed("journal_superblock", "unknown-feature", &[&[0], &unknown[..]].concat())?;
            let mut volumes = page.to_vec();
            volumes[220] = 64;
            seed("journal_superblock", "64-volumes", &[&[0], &volumes[..]].concat())?;
            seed("journal_superblock", "torn", &[&[0], &page[..1536]].concat())?;
        }
    }
    Ok(())
}

/// The pages of a scratch file that are looked at, as the harness takes them.
fn scratch_pages(packed: &Path) -> Result<Vec<u8>> {
    let output = Command::new("gzip").arg("-dc").arg(packed).output().context("gzip")?;
    ensure!(output.status.success(), "gzip of {}", packed.display());
    let (bytes, map) = (output.stdout, 128 << 10);
    let page = |at: usize| &bytes[at..at + PAGE_BYTES];
    Ok([page(0), page(64 << 10), &bytes[map..map + 4 * PAGE_BYTES]].concat())
}

fn scratches() -> Result<()> {
    let fixture = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../journal/tests/fixtures/v1/locked");
    let overlay = scratch_pages(&fixture.join("lock-8-0.raw.gz"))?;
    let scratch = scratch_pages(&fixture.join("scratch-00000000-0000-0000-0000-000000000007-0.raw.gz"))?;
    seed("view_scratch", "overlay", &overlay)?;
    seed("view_scratch", "scratch", &scratch)?;
    seed("view_scratch", "one-header", &flipped(&overlay, 30))?;
    seed("view_scratch", "no-header", &flipped(&flipped(&overlay, 0), PAGE_BYTES))?;
    let map = 2 * PAGE_BYTES;
    seed("view_scratch", "torn-page", &overlay[..map + PAGE_BYTES + 700])?;
    let written = if overlay[map..map + 8] == *b"HFSCRMAP" { map } else { map + PAGE_BYTES };
    ensure!(overlay[written..written + 8] == *b"HFSCRMAP", "the map was written");
    let words = written + 64;
    let edited = |edits: &[(usize, u64)]| {
        let mut bytes = overlay.clone();
        edits
            .iter()
            .for_each(|(word, value)| bytes[words + word * 8..][..8].copy_from_slice(&value.to_le_bytes()));
        bytes
    };
    // Chunk of the disk plus one, chunk of the file plus one, sectors with data.
    seed(
        "view_scratch",
        "two-entries-of-one-chunk",
        &edited(&[(0, 1), (1, 1), (2, 1), (6, 1), (7, 2), (8, 1)]),
    )?;
    seed(
        "view_scratch",
        "two-entries-with-one-place",
        &edited(&[(0, 1), (1, 1), (2, 1), (6, 2), (7, 1), (8, 1)]),
    )?;
    seed("view_scratch", "behind-the-disk", &edited(&[(0, 5)]))?;
    seed("view_scratch", "behind-the-file", &edited(&[(1, 1 << 40)]))?;
    seed("view_scratch", "data-without-a-place", &edited(&[(1, 0)]))?;
    let mut encrypted = overlay.clone();
    encrypted[8] = 2;
    encrypted[PAGE_BYTES + 8] = 2;
    seed("view_scratch", "key-of-nobody", &encrypted)?;
    let mut longer = overlay.clone();
    (longer[162], longer[PAGE_BYTES + 162]) = (1, 1);
    seed("view_scratch", "longer-than-its-disk", &longer)
}

#[test]
#[ignore = "writes those that are missing in fuzz/corpus"]
fn make_the_seeds() -> Result<()> {
    batches()?;
    segments()?;
    superblocks()?;
    scratches()
}
