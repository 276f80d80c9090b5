//! `hwtests/peers/journal_reader.py`, written from `docs/journal-format.md` alone, reads what the product wrote: so the document is enough.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use hwtests::sample_journal::{JOURNAL_NAME, SampleCheckpoint, SampleJournal, SampleModel, place_of};
use journal::recovery::SurveyOptions;
use journal::storage::ring::{Access, DirectFile, RingStorage};
use journal::view::Reader;
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

const SLOT_LEN_BYTES: u64 = 64 << 10;
const DISK_BYTES: [u64; 2] = [256 << 10, 96 << 10];

/// A folder that goes when the test ends.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("holdfast-reader-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("a temporary folder");
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Whether the reader can run at all; says so if not.
fn has_python() -> bool {
    let has = Command::new("python3").arg("--version").output().is_ok_and(|output| output.status.success());
    if !has {
        eprintln!("skipped: python3 is missing; ./test installs it");
    }
    has
}

fn run_reader(arguments: &[&str]) -> Result<Output> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/journal_reader.py");
    Command::new("python3").arg("-B").arg(script).args(arguments).output().context("run python3")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary folders have names in UTF-8")
}

/// What `list` prints.
fn listed(folder: &Folder) -> Result<Vec<SampleCheckpoint>> {
    let output = run_reader(&["list", text(&folder.0)])?;
    ensure!(output.status.success(), "list: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout)?.lines().map(parse_line).collect()
}

fn parse_line(line: &str) -> Result<SampleCheckpoint> {
    let fields: Vec<&str> = line.split('\t').collect();
    let [seq, cut, time_us, tag] = fields[..] else { anyhow::bail!("not a checkpoint: {line:?}") };
    Ok(SampleCheckpoint { seq: seq.parse()?, cut: cut.parse()?, time_us: time_us.parse()?, tag: tag.to_owned() })
}

/// A disk's bytes as the reader gives them.
fn extracted(folder: &Folder, at: &str, disk: u16) -> Result<Vec<u8>> {
    let out = folder.0.join("extracted.raw");
    let output = run_reader(&[
        "extract",
        text(&folder.0),
        "--at",
        at,
        "--disk",
        &disk.to_string(),
        "--out",
        text(&out),
    ])?;
    ensure!(output.status.success(), "extract: {}", String::from_utf8_lossy(&output.stderr));
    Ok(fs::read(out)?)
}

/// What the product's own reader lists.
fn catalogue(folder: &Folder) -> Result<Vec<SampleCheckpoint>> {
    let mut storage = RingStorage::new(64)?;
    let file = storage.add_file(DirectFile::open(&folder.0.join(JOURNAL_NAME), Access::ReadOnly)?);
    let reader = Reader::open(&mut storage, file, SurveyOptions::default())?;
    let entries = reader.catalogue().checkpoints().iter();
    Ok(entries
        .map(|entry| SampleCheckpoint {
            seq: entry.seq,
            cut: entry.checkpoint.cut,
            time_us: entry.checkpoint.time_us,
            tag: entry.checkpoint.tag.clone(),
        })
        .collect())
}

/// The reader's list and images are those of the product and of the model.
fn assert_read_right(folder: &Folder, model: &SampleModel, void: &[&str]) -> Result<()> {
    let counting = model.checkpoints.iter().filter(|one| !void.contains(&one.tag.as_str()));
    let expected: Vec<SampleCheckpoint> = counting.cloned().collect();
    assert_eq!(listed(folder)?, expected);
    assert_eq!(catalogue(folder)?, expected);
    for checkpoint in &expected {
        for disk in 0..model.volume_count() {
            let found = extracted(folder, &checkpoint.tag, disk)?;
            let is_same = found == model.image(disk, checkpoint.cut);
            assert!(is_same, "disk {disk} at {checkpoint:?}");
        }
    }
    Ok(())
}

/// Fails with one line that has `what` in it, and leaves no file.
fn assert_refused(folder: &Folder, arguments: &[&str], what: &str) -> Result<()> {
    let output = run_reader(arguments)?;
    let said = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.starts_with("journal_reader.py: ") && said.trim_end().lines().count() == 1, "{said}");
    assert!(said.contains(what), "{what:?} is not in {said:?}");
    assert!(!folder.0.join("extracted.raw").exists());
    Ok(())
}

fn random_bytes(rng: &mut StdRng, len_bytes: u64) -> Vec<u8> {
    let mut bytes = vec![0; len_bytes as usize];
    rng.fill_bytes(&mut bytes);
    bytes
}

fn random_disks(rng: &mut StdRng) -> Vec<Vec<u8>> {
    DISK_BYTES.iter().map(|len_bytes| random_bytes(rng, *len_bytes)).collect()
}

/// Writes and zeroes that overlap, on both disks.
fn random_changes(journal: &mut SampleJournal, rng: &mut StdRng, count: usize) -> Result<()> {
    for _ in 0..count {
        let volume = rng.random_range(0..2_u16);
        let sectors = rng.random_range(1..=24_u64);
        let offset_bytes = rng.random_range(0..=DISK_BYTES[usize::from(volume)] / 512 - sectors) * 512;
        match rng.random_range(0..10) {
            0 => journal.void()?,
            1 | 2 => journal.zero(volume, offset_bytes, sectors * 512)?,
            3 => {
                journal.write(volume, offset_bytes, &random_bytes(rng, sectors * 512))?;
                journal.flush()?;
            }
            _ => journal.write(volume, offset_bytes, &random_bytes(rng, sectors * 512))?,
        }
    }
    Ok(())
}

#[test]
fn every_checkpoint_of_random_journals_is_read() -> Result<()> {
    if !has_python() {
        return Ok(());
    }
    for seed in 0..4 {
        let folder = Folder::new(&format!("random-{seed}"));
        let mut rng = StdRng::seed_from_u64(seed);
        let mut journal = SampleJournal::create(&folder.0, SLOT_LEN_BYTES, random_disks(&mut rng))?;
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
    }
    Ok(())
}
