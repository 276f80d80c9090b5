//! The built `vra-journal` on a datastore with two VMs of two disks each, with the real `qemu-img`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hwtests::sample_journal::{SLOT_LEN_BYTES, SampleFolder, SampleJournal, SampleModel};
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use serde_json::{Value, json};

const DISK_BYTES: [u64; 2] = [256 << 10, 96 << 10];
const PATIENCE: Duration = Duration::from_secs(60);

/// A temporary folder that goes when this is dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("holdfast-tool-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn tool() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_rig")).with_file_name("vra-journal");
    assert!(path.exists(), "{} is missing: run `cargo build --workspace --bins`", path.display());
    path
}

/// Runs it without a terminal.
fn run(arguments: &[&str]) -> Result<Output> {
    Ok(Command::new(tool()).args(arguments).stdin(Stdio::null()).output()?)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn has_qemu_img() -> bool {
    let has = Command::new("qemu-img").arg("--version").output().is_ok();
    if !has {
        eprintln!("skipped: qemu-img is missing (package qemu-utils); ./test installs it");
    }
    has
}

fn id(number: u128) -> String {
    uuid::Uuid::from_u128(number).to_string()
}

/// Of the first or the second VM of the VPG "shop".
fn manifest(vm: usize) -> String {
    let end = json!({ "id": id(9), "address": "vra:9710" });
    let volumes: Vec<Value> = DISK_BYTES
        .iter()
        .enumerate()
        .map(|(number, size_bytes)| {
            json!({
                "id": id(5 + number as u128), "number": number, "size_bytes": size_bytes, "logical_block_bytes": 512,
                "source_path": "/dev/vg/x"
            })
        })
        .collect();
    let vms: Vec<Value> = ["db", "web"]
        .iter()
        .enumerate()
        .map(|(number, name)| {
            json!({
                "id": id(20 + number as u128), "name": name, "journal": id(1), "source": end, "target": end,
                "datastore": "/datastore", "journal_limit_bytes": 1 << 30, "history_s": 3600, "give_up_history": true,
                "volumes": volumes,
            })
        })
        .collect();
    let vpg = json!({
        "id": id(3), "name": "shop", "revision": 1, "member_set_version": 1, "checkpoint_interval_ms": 5000,
        "hold_deadline_ms": 100, "vms": vms,
    });
    json!({ "vm": id(20 + vm as u128), "vpg": vpg }).to_string()
}

fn random(rng: &mut StdRng, len_bytes: u64) -> Vec<u8> {
    let mut bytes = vec![0; len_bytes as usize];
    rng.fill_bytes(&mut bytes);
    bytes
}

/// Two VMs with the group checkpoints "one" and "two"; their folders and models.
fn shop(store: &Path) -> Result<Vec<(SampleFolder, SampleModel)>> {
    let mut vms = Vec::new();
    for (vm, name) in ["db", "web"].into_iter().enumerate() {
        let folder = SampleFolder::at(store.join("shop-3").join(format!("{name}-2{vm}")))?;
        let mut rng = StdRng::seed_from_u64(vm as u64);
        let disks = DISK_BYTES.map(|len_bytes| random(&mut rng, len_bytes)).to_vec();
        let mut journal = SampleJournal::create_of(&folder, SLOT_LEN_BYTES, disks, &manifest(vm))?;
        for (counter, tag) in [(1, "one"), (2, "two")] {
            for _ in 0..30 {
                let volume = rng.random_range(0..2_u16);
                let sectors = rng.random_range(1..=24_u64);
                let place = rng.random_range(0..=DISK_BYTES[usize::from(volume)] / 512 - sectors) * 512;
                match rng.random_range(0..4) {
                    0 => journal.zero(volume, place, sectors * 512)?,
                    _ => journal.write(volume, place, &random(&mut rng, sectors * 512))?,
                }
            }
            journal.group_checkpoint(counter, tag, 1_000_000 * counter)?;
        }
        let model = journal.close()?;
        vms.push((folder, model));
    }
    Ok(vms)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}

#[test]
fn a_vpg_is_extracted_in_both_formats() -> Result<()> {
    let store = Folder::new("formats")?;
    let vms = shop(&store.0)?;
    let formats: &[&str] = if has_qemu_img() { &["raw", "qcow2"] } else { &["raw"] };
    for (index, tag) in ["one", "two"].into_iter().enumerate() {
        for format in formats {
            let out = store.0.join(format!("{tag}-{format}"));
            let output = run(&[
                "extract",
                text(&store.0)?,
                "--vpg",
                "shop",
                "--at",
                tag,
                "--out-dir",
                text(&out)?,
                "--format",
                format,
            ])?;
            ensure!(output.status.success(), "{}", said(&output));
            // Without a terminal, lines; and never on standard output.
            ensure!(said(&output).contains("100%: "), "no progress: {}", said(&output));
            let lines = String::from_utf8(output.stdout)?;
            ensure!(lines.lines().count() == 4 && !lines.contains("100%"), "{lines}");
            let mut names: Vec<String> = fs::read_dir(&out)?
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect::<Result<_>>()?;
            names.sort();
            let expected: Vec<String> = ["db-disk-0", "db-disk-1", "web-disk-0", "web-disk-1"]
                .iter()
                .map(|name| format!("{name}.{format}"))
                .collect();
            assert_eq!(names, expected);
            for ((_, model), vm) in vms.iter().zip(["db", "web"]) {
                for disk in 0..2 {
                    let image = out.join(format!("{vm}-disk-{disk}.{format}"));
                    let raw = as_raw(&image, format)?;
                    assert!(
                        raw == model.image(disk, model.checkpoints[index].cut),
                        "{} at {tag}",
                        image.display()
                    );
                }
            }
        }
    }
    Ok(())
}

/// The bytes of an image, whose format is what it is said to be.
fn as_raw(image: &Path, format: &str) -> Result<Vec<u8>> {
    if format == "raw" {
        return Ok(fs::read(image)?);
    }
    let check = Command::new("qemu-img").args(["check", "-q", "-f", format]).arg(image).status()?;
    ensure!(check.success(), "qemu-img check: {check}");
    let raw = image.with_extension("as-raw");
    let convert = ["convert", "-f", format, "-O", "raw"];
    let converted = Command::new("qemu-img").args(convert).arg(image).arg(&raw).status()?;
    ensure!(converted.success(), "qemu-img convert: {converted}");
    let bytes = fs::read(&raw)?;
    fs::remove_file(raw)?;
    Ok(bytes)
}

#[test]
fn damage_leaves_no_qcow2_behind() -> Result<()> {
    if !has_qemu_img() {
        return Ok(());
    }
    let store = Folder::new("damage")?;
    let vms = shop(&store.0)?;
    let (folder, model) = &vms[1];
    let newest = model.image(0, model.checkpoints[1].cut);
    // Any sector that the journal has in its newest state.
    let place =
        newest.chunks(512).find_map(|sector| folder.place_of(sector).ok()).context("nothing was written")?;
    folder.flip_bit(place)?;
    let out = store.0.join("out");
    let arguments = ["--at", "two", "--out-dir", text(&out)?, "--format", "qcow2", "--quiet"];
    let output = run(&[&["extract", text(&store.0)?, "--vpg", "shop"], &arguments[..]].concat())?;
    let said = said(&output);
    ensure!(output.status.code() == Some(2), "{:?}: {said}", output.status);
    ensure!(said.contains("disk 0 of web cannot be read") && said.contains("vra-journal verify"), "{said}");
    ensure!(!out.exists(), "something is left");
    Ok(())
}

#[test]
fn without_qemu_img_nothing_is_begun() -> Result<()> {
    let store = Folder::new("no-qemu")?;
    shop(&store.0)?;
    let out = store.0.join("out");
    let output = Command::new(tool())
        .args([
            "extract",
            text(&store.0)?,
            "--vpg",
            "shop",
            "--at",
            "latest",
            "--format",
            "qcow2",
            "--out-dir",
        ])
        .arg(&out)
        .env("PATH", store.0.join("nowhere"))
        .output()?;
    let said = said(&output);
    ensure!(output.status.code() == Some(2), "{:?}: {said}", output.status);
    ensure!(said.contains("qemu-img is not installed") && said.contains("qemu-utils"), "{said}");
    ensure!(!out.exists(), "the folder was made");
    Ok(())
}

/// A disk of 8 TiB takes a while, even if there is nothing in it; and so does a `qemu-img` that sleeps.
#[test]
fn an_interrupted_extraction_leaves_nothing_behind() -> Result<()> {
    let store = Folder::new("interrupted")?;
    let folder = SampleFolder::at(store.0.join("vm"))?;
    let mut journal = SampleJournal::create(&folder, SLOT_LEN_BYTES, vec![vec![1; 64 << 10]])?;
    journal.resize(0, 8 << 40)?;
    // The model would be as long as the disk.
    journal.checkpoint("large", 1)?;
    journal.flush()?;
    drop(journal);
    let slow = store.0.join("slow");
    fs::create_dir(&slow)?;
    let script = r#"#!/bin/sh
[ "$1" = --version ] && exit 0
for last; do :; done
echo "half of it" > "$last"
printf '    (50.00/100%%)\r'
exec sleep 600
"#;
    fs::write(slow.join("qemu-img"), script)?;
    fs::set_permissions(slow.join("qemu-img"), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let path = format!("{}:{}", slow.display(), std::env::var("PATH")?);
    for format in ["raw", "qcow2"] {
        let out = store.0.join(format!("large.{format}"));
        let partial = store.0.join(format!("large.{format}.partial"));
        let mut child = Command::new(tool())
            .args(["extract", text(folder.path())?, "--at", "large", "--format", format, "--out"])
            .arg(&out)
            .env("PATH", &path)
            .stderr(Stdio::piped())
            .spawn()?;
        let begun = Instant::now();
        while fs::metadata(&partial).map_or(0, |metadata| metadata.len()) == 0 {
            ensure!(begun.elapsed() < PATIENCE, "{format}: it never began");
            ensure!(child.try_wait()?.is_none(), "{format}: it has ended already");
            std::thread::sleep(Duration::from_millis(5));
        }
        ensure!(!out.exists(), "{format}: it has its name before it is complete");
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        let output = child.wait_with_output()?;
        ensure!(output.status.code() == Some(2), "{format}: {}", output.status);
        ensure!(
            said(&output).contains("error: ") && said(&output).contains("interrupted"),
            "{}",
            said(&output)
        );
        ensure!(!out.exists() && !partial.exists(), "{format}: something is left");
    }
    Ok(())
}
