//! A test of a group, started by the manager, while the VRA that serves its disks is killed and stopped.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hwtests::site::{Binaries, DiskAt, Door, RecoveredDisk, Side, Site, SiteSettings, Vm};

const DISK_BYTES: u64 = 32 << 20;
const VPG: &str = "shop";
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn a_test_goes_on_after_each_end_of_its_vra() -> Result<()> {
    if Command::new("qemu-io").arg("--version").output().is_err() {
        eprintln!("skipped: qemu-io is not installed (package qemu-utils)");
        return Ok(());
    }
    let folder = Folder::new()?;
    let disk = folder.0.join("disk.raw");
    std::fs::File::create_new(&disk)?.set_len(DISK_BYTES)?;
    let binaries = Path::new(env!("CARGO_BIN_EXE_durability")).parent().context("folder")?;
    let mut site = Site::start(Binaries::in_folder(binaries)?, &folder.0.join("site"), &SiteSettings::SMALL)?;
    let uuid = "5a0e1d52-4a0b-4f5c-9a53-0f5d7b7d0b02".to_owned();
    let vms = [Vm { name: "guest", uuid, disks: vec![disk] }];
    site.write_inventory(&vms)?;
    let attached = site.attach(&vms[0], 0, Door::Nbd)?;
    qemu_io(&attached, "none", &["write -P 1 0 1M"])?;
    site.protect(VPG, &vms)?;
    site.wait_for_checkpoint(VPG, 0, PATIENCE.as_secs())?;

    let disks = site.start_test(VPG, "latest", Door::Nbd)?;
    let [RecoveredDisk { at, .. }] = disks.as_slice() else { bail!("{disks:?}") };
    qemu_io(at, "none", &["read -P 1 0 1M", "write -P 2 64k 64k", "flush"])?;
    for (round, kill) in (3..).zip([true, false, true]) {
        // Answered, and never flushed.
        qemu_io(at, "unsafe", &[&format!("write -P {round} {round}M 64k")])?;
        if kill {
            site.kill(Side::Target)?;
        } else {
            site.stop_vra(Side::Target)?;
        }
        site.start_vra(Side::Target)?;
        let read = format!("read -P {round} {round}M 64k");
        qemu_io(at, "none", &["read -P 1 0 64k", "read -P 2 64k 64k", &read])?;
        shown_as_running(&site, at)?;
    }
    site.stop_test(VPG)?;
    let left = scratch_files(site.datastore())?;
    ensure!(left.is_empty(), "the test has left {left:?}");
    site.stop()
}

/// Waits until the manager reaches the VRA again: the test is what it was, and nothing was opened beside it.
fn shown_as_running(site: &Site, at: &DiskAt) -> Result<()> {
    let DiskAt::Nbd { export, .. } = at else { bail!("not NBD") };
    let deadline = Instant::now() + PATIENCE;
    let shown = loop {
        match site.zvm_json(&["test", "show", VPG]) {
            Ok(shown) => break shown.to_string(),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    };
    ensure!(shown.contains(export) && shown.contains("running"), "the test is shown as {shown}");
    let views = site.vra_status(Side::Target)?.views;
    ensure!(views.len() == 1 && views[0].problem.is_none(), "{views:?}");
    let alerts = site.zvm_json(&["alert", "list"])?.to_string();
    ensure!(!alerts.contains("test-view-lost"), "{alerts}");
    Ok(())
}

fn qemu_io(at: &DiskAt, cache: &str, commands: &[&str]) -> Result<()> {
    let DiskAt::Nbd { socket, export } = at else { bail!("not NBD") };
    let mut qemu_io = Command::new("qemu-io");
    qemu_io.args(["-f", "raw", "-t", cache]).arg(format!("nbd+unix:///{export}?socket={}", socket.display()));
    for command in commands {
        qemu_io.args(["-c", command]);
    }
    let output = qemu_io.output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success() && !text.contains("failed"),
        "{commands:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

fn scratch_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(scratch_files(&path)?);
        } else if path.to_string_lossy().contains("scratch-") {
            found.push(path);
        }
    }
    Ok(found)
}

struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("holdfast-test-run-{}", std::process::id()));
        std::fs::create_dir_all(path.join("site"))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
