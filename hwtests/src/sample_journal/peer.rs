//! The reader of journals in Python, `hwtests/peers/journal_reader.py`, which shares no code with the product.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};

use super::{SampleCheckpoint, SampleFolder};

/// Whether it can run; says so if not.
pub fn has_python() -> bool {
    let output = Command::new("python3").arg("--version").output();
    let has = output.is_ok_and(|output| output.status.success());
    if !has {
        eprintln!("skipped: python3 is missing; ./test installs it");
    }
    has
}

/// Runs it with its arguments.
pub fn run(arguments: &[&str]) -> Result<Output> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/journal_reader.py");
    Command::new("python3").arg("-B").arg(script).args(arguments).output().context("python3")
}

/// The checkpoints that it lists.
///
/// # Errors
/// What it says if it refuses the journal.
pub fn list(folder: &SampleFolder) -> Result<Vec<SampleCheckpoint>> {
    let output = run(&["list", text(folder.path())?])?;
    succeeded(&output)?;
    String::from_utf8(output.stdout)?.lines().map(parse_line).collect()
}

/// A disk at a checkpoint: its tag, its number or `latest`.
///
/// # Errors
/// What it says if it refuses.
pub fn extract(folder: &SampleFolder, at: &str, disk: u16) -> Result<Vec<u8>> {
    let (out, disk) = (folder.path().join("extracted.raw"), disk.to_string());
    let output = run(&["extract", text(folder.path())?, "--at", at, "--disk", &disk, "--out", text(&out)?])?;
    ensure!(output.status.success() || !out.exists(), "a refusal leaves an image behind");
    succeeded(&output)?;
    let bytes = fs::read(&out)?;
    fs::remove_file(out)?;
    Ok(bytes)
}

/// A refusal is one line and exit status 1.
fn succeeded(output: &Output) -> Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        ensure!(said.is_empty(), "success, and yet: {said}");
        return Ok(());
    }
    let is_one_line = said.starts_with("journal_reader.py: ") && said.trim_end().lines().count() == 1;
    assert!(output.status.code() == Some(1) && is_one_line, "no clear refusal: {said}");
    anyhow::bail!("{}", said.trim_end());
}

fn parse_line(line: &str) -> Result<SampleCheckpoint> {
    let fields: Vec<&str> = line.split('\t').collect();
    let [seq, cut, time_us, tag] = fields[..] else { anyhow::bail!("not a checkpoint: {line:?}") };
    Ok(SampleCheckpoint {
        seq: seq.parse()?,
        cut: cut.parse()?,
        time_us: time_us.parse()?,
        tag: tag.to_owned(),
    })
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}
