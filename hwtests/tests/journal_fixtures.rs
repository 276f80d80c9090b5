//! The journals in `journal/tests/fixtures/v1`: how they are made, and what `hwtests/peers/journal_reader.py` makes of them.

use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use hwtests::sample_journal::{
    SLOT_LEN_BYTES, SampleFolder, SampleModel, decrypted_segments, encrypted_segments, first_sync,
    half_promoted, history_given_up, peer, promoted_over_damage, three_segments,
};
use journal::format::{PAGE_BYTES, SUPERBLOCK_OFFSETS};

const FILES: [&str; 3] = ["journal.hfj", "disk-0.raw", "disk-1.raw"];
const PAGE: u64 = PAGE_BYTES as u64;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../journal/tests/fixtures/v1")
}

fn gzip(arguments: &[&str], from: &Path, to: &Path) -> Result<()> {
    let mut gzip = Command::new("gzip");
    gzip.args(arguments).stdin(File::open(from)?).stdout(Stdio::from(File::create(to)?));
    ensure!(gzip.status().context("gzip")?.success(), "gzip of {}", from.display());
    Ok(())
}

/// Writes a journal.
type Write = fn(&SampleFolder) -> Result<SampleModel>;

/// Damages a journal.
type Damage = fn(&SampleFolder, &SampleModel) -> Result<Left>;

/// What is left of a journal.
struct Left {
    /// Which checkpoints.
    checkpoints: Range<usize>,
    /// A record of disk 0 that is damaged, and the tags of the checkpoints that need it.
    damaged: Option<(u64, [&'static str; 2])>,
}

impl Left {
    fn whole(checkpoints: usize) -> Self {
        Self { checkpoints: 0..checkpoints, damaged: None }
    }
}

const MADE: [(&str, Write, Damage); 12] = [
    ("good", three_segments, |_, _| Ok(Left::whole(4))),
    ("torn-tail", three_segments, |folder, _| {
        let newest = places(folder)?;
        folder.overwrite(newest.end - PAGE, &[0; PAGE_BYTES])?;
        Ok(Left::whole(3))
    }),
    ("corrupt-payload", three_segments, |folder, model| {
        let second = &model.checkpoints[1];
        folder.flip_bit(folder.place_of(&model.image(0, second.cut)[12 << 10..16 << 10])?)?;
        Ok(Left { checkpoints: 0..4, damaged: Some((second.cut - 2, ["second", "third"])) })
    }),
    ("corrupt-header", three_segments, |folder, _| {
        folder.flip_bit(places(folder)?.third_batch + 88)?;
        Ok(Left::whole(3))
    }),
    ("lost-segment", three_segments, |folder, _| {
        let begin = places(folder)?.second_segment;
        folder.flip_bit(begin + 32)?;
        folder.flip_bit(begin + SLOT_LEN_BYTES - PAGE + 32)?;
        Ok(Left::whole(1))
    }),
    ("damaged-superblock", three_segments, |folder, _| {
        folder.flip_bit(SUPERBLOCK_OFFSETS[0] + 300)?;
        Ok(Left::whole(4))
    }),
    ("encrypted", encrypted_segments, |_, _| Ok(Left::whole(4))),
    // `second` is gone, too: its cut is one below the last number of its segment.
    ("half-promoted", half_promoted, |folder, model| {
        let through = model.checkpoints[1].seq;
        let new =
            |disk: u16| -> Result<bool> { Ok(fs::read(folder.disk(disk))? == model.image(disk, through)) };
        ensure!(!new(0)? || !new(1)?, "all of it is on the recovery disks");
        let old = |disk: u16| -> Result<bool> { Ok(fs::read(folder.disk(disk))? == model.image(disk, 0)) };
        ensure!(!old(0)? || !old(1)?, "nothing of it is on the recovery disks");
        Ok(Left { checkpoints: 2..4, damaged: None })
    }),
    // Of what the damaged record wrote nothing is left at `fourth`.
    ("bad-list", promoted_over_damage, |_, model| {
        let second = &model.checkpoints[1];
        Ok(Left { checkpoints: 2..4, damaged: Some((second.cut - 2, ["third", "third"])) })
    }),
    ("decrypted", decrypted_segments, |_, _| Ok(Left::whole(4))),
    ("first-sync", first_sync, |_, _| Ok(Left::whole(0))),
    ("history-given-up", history_given_up, |_, _| Ok(Left::whole(0))),
];

/// Places in the file of [`three_segments`].
struct Places {
    second_segment: u64,
    /// Of the newest segment.
    third_batch: u64,
    /// Of the newest batch.
    end: u64,
}

fn places(folder: &SampleFolder) -> Result<Places> {
    let segments = folder.reader()?.survey.segments;
    let place =
        |index: usize| journal::format::slot_offset_bytes(segments[index].header.slot, SLOT_LEN_BYTES);
    let (begin, end) = (place(2), place(2) + segments[2].data_end_bytes());
    let mut batches = folder.places_of(b"HFBATCH\0")?.into_iter().filter(|at| (begin..end).contains(at));
    Ok(Places { second_segment: place(1), third_batch: batches.nth(2).context("too few batches")?, end })
}

#[test]
#[ignore = "writes those that are missing in journal/tests/fixtures/v1"]
fn make_the_fixtures() -> Result<()> {
    for (name, write, damage) in MADE {
        let (source, packed) = (SampleFolder::new()?, fixtures().join(name));
        if packed.exists() {
            // It is as an older release wrote it.
            continue;
        }
        let model = write(&source)?;
        let left = damage(&source, &model)?;
        fs::create_dir_all(&packed)?;
        for file in FILES {
            gzip(&["-9nc"], &source.path().join(file), &packed.join(format!("{file}.gz")))?;
        }
        if source.site_key().exists() {
            fs::copy(source.site_key(), packed.join("site.key"))?;
        }
        let mut lines = String::from("seq\tcut\ttime_us\ttag\tCRC32C of disk 0\tCRC32C of disk 1\n");
        for checkpoint in &model.checkpoints[left.checkpoints] {
            let disks = (0..model.volume_count()).map(|disk| match left.damaged {
                Some((seq, tags)) if disk == 0 && tags.contains(&checkpoint.tag.as_str()) => {
                    format!("\tdamaged record {seq}")
                }
                _ => format!("\t{:08x}", crc32c::crc32c(&model.image(disk, checkpoint.cut))),
            });
            let (seq, cut, time_us, tag) =
                (checkpoint.seq, checkpoint.cut, checkpoint.time_us, &checkpoint.tag);
            lines += &format!("{seq}\t{cut}\t{time_us}\t{tag}{}\n", disks.collect::<String>());
        }
        fs::write(packed.join("checkpoints.tsv"), lines)?;
    }
    Ok(())
}

fn unpack(name: &str) -> Result<SampleFolder> {
    let folder = SampleFolder::new()?;
    for file in FILES {
        gzip(&["-dc"], &fixtures().join(name).join(format!("{file}.gz")), &folder.path().join(file))?;
    }
    Ok(folder)
}

#[test]
fn the_reader_reads_what_can_be_read() -> Result<()> {
    if !peer::has_python() {
        return Ok(());
    }
    for (name, _, _) in MADE {
        let folder = unpack(name)?;
        let expected = fs::read_to_string(fixtures().join(name).join("checkpoints.tsv"))?;
        let listed = peer::list(&folder);
        if ["first-sync", "history-given-up"].contains(&name) {
            let said = listed.expect_err("there is no history").to_string();
            assert!(said.contains("the journal has no history"), "{name}: {said}");
            continue;
        }
        if ["encrypted", "decrypted"].contains(&name) {
            let said = listed.expect_err("it can't decrypt").to_string();
            assert!(said.contains("the journal is encrypted") && said.contains("--key-file"), "{said}");
            continue;
        }
        if ["corrupt-header", "lost-segment"].contains(&name) {
            let said = listed.as_ref().expect_err("records are missing").to_string();
            assert!(said.contains("that can't be reached"), "{name}: {said}");
        } else {
            assert_eq!(listed?.len(), expected.lines().count() - 1, "{name}");
        }
        for line in expected.lines().skip(1) {
            let fields: Vec<&str> = line.split('\t').collect();
            for (disk, expected) in (0..).zip(&fields[4..]) {
                let found = match peer::extract(&folder, fields[3], disk) {
                    Ok(image) => format!("{:08x}", crc32c::crc32c(&image)),
                    Err(error) => error.to_string(),
                };
                let said = if name == "bad-list" { "lost at 12288: record" } else { "the payload of record" };
                let expected = expected.replace("damaged record", said);
                assert!(found.contains(&expected), "{name}, {line}: {found}");
            }
        }
    }
    Ok(())
}

/// C2: what the intent covers is refused by name, not read from recovery disks that are neither old nor new.
#[test]
fn the_reader_opens_nothing_before_the_end_of_an_intent() -> Result<()> {
    if !peer::has_python() {
        return Ok(());
    }
    let folder = unpack("half-promoted")?;
    let tags: Vec<String> = peer::list(&folder)?.into_iter().map(|checkpoint| checkpoint.tag).collect();
    assert_eq!(tags, ["third", "fourth"]);
    for tag in ["first", "second"] {
        for disk in 0..2 {
            let said = peer::extract(&folder, tag, disk).expect_err("it was announced").to_string();
            assert!(said.contains(&format!("checkpoint {tag} isn't there")), "{said}");
        }
    }
    Ok(())
}
