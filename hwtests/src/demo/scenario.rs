//! The main job, start to end: protect two VMs, lose the source, recover at a checkpoint, and check what came back.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::devices::{Device, Mount, check_ext4, run as run_program};
use super::production::Production;
use super::report::{Recovery, Report, Story};
use super::tree::{self, Manifest};
use super::workload::{self, Recovered, Step};
use crate::site::{Binaries, Door, Side, Site, SiteSettings, Vm, time_of};

/// Sizes of the demo.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Each disk, in bytes.
    pub disk_bytes: u64,
    /// Files copied onto the first disk, in bytes.
    pub files_bytes: u64,
    /// Transactions before the tag, and again after it.
    pub transactions: u64,
    /// How much longer than natively things may take.
    pub patience: u32,
}

/// Runs the whole job in `folder`, which it fills.
///
/// # Errors
/// The first thing that is not as it should be.
pub fn run(door: Door, size: Size, folder: &Path) -> Result<Report> {
    let mut story = Story::start();
    let vms = make_vms(folder, size.disk_bytes)?;

    story.tell("start a ZVM and two VRAs, each its own process; enrol the VRAs with one-time tokens")?;
    let mut site = Site::start(Binaries::beside_this_one()?, folder, &SiteSettings::SMALL)?;
    site.write_inventory(&vms)?;

    story.tell(&format!("attach 3 disks of 2 VMs at {}", describe(door)))?;
    let mut production = Production::attach(&site, door, &vms, folder)?;

    story.tell("make ext4 on each; copy real files onto the first disk")?;
    production.mount_all(folder)?;
    let files = production.folder(0).to_owned();
    let manifest = copy_files(&files, size.files_bytes)?;
    story.tell(&format!("copied {} files, {}", manifest.len(), mib(tree::total_bytes(&manifest))))?;

    story.tell(
        "start the application: each step appends to a log on one VM and commits to SQLite on the other",
    )?;
    let app = production.start_app()?;
    app.wait_for_more(5, 60 * u64::from(size.patience))?;

    story.tell("create the VPG: both VMs, a checkpoint every second; the initial sync runs while the application writes")?;
    let created = Instant::now();
    site.protect(VPG, &vms)?;
    site.wait_for_checkpoint(VPG, 0, 60 * u64::from(size.patience))?;
    story.tell(&format!(
        "initial sync done and first checkpoint made after {:.1} s",
        created.elapsed().as_secs_f64()
    ))?;

    app.wait_for_more(size.transactions, 120 * u64::from(size.patience))?;
    let before_tag = app.last_number();
    let tagged = site.zvm_json(&["checkpoint", "tag", VPG, TAG])?;
    let after_tag = app.last_number() + 1;
    let tagged_us = time_of(&tagged)?;
    story.tell(&format!("tagged checkpoint \"{TAG}\" between transactions {before_tag} and {after_tag}"))?;
    write_durably(&files.join(LATER_FILE), b"written after the tag\n")?;
    app.wait_for_more(size.transactions, 120 * u64::from(size.patience))?;
    site.wait_for_checkpoint(VPG, workload::now_us(), 60 * u64::from(size.patience))?;
    story.tell("the manager's view:")?;
    story.show(&site.zvm(&["status"])?);

    let killed_us = workload::now_us();
    site.kill(Side::Source)?;
    app.ask_to_stop();
    let steps = app.steps();
    story.tell(&format!(
        "DISASTER: kill -9 of the source VRA, after transaction {}",
        steps.last().map_or(0, |step| step.number)
    ))?;
    std::thread::sleep(Duration::from_millis(500) * size.patience);

    story.tell("checkpoints at the target, newest first:")?;
    story.show(&site.zvm(&["checkpoint", "list", VPG, "--limit", "5"])?);
    let latest = site.newest_checkpoint(VPG).context("the target lists no checkpoint")?;
    let latest_us = time_of(&latest)?;
    let application = Application { manifest: &manifest, steps: &steps };
    let mut recoveries = Vec::new();
    for (name, at_us, at_least, at_most, later_file) in [
        (TAG, tagged_us, before_tag, after_tag, false),
        ("latest", latest_us, committed_before(&steps, latest_us), started_before(&steps, latest_us), true),
    ] {
        story.tell(&format!("open \"{name}\" at the target and check it"))?;
        let recovery = recover(&site, door, folder, &application, name, at_least..=at_most, later_file)
            .with_context(|| format!("recovery at \"{name}\" (checkpoint of {at_us} us)"))?;
        story.tell(&format!(
            "\"{name}\": fsck clean, {} files equal, SQLite ok, {} transactions (must hold {at_least} to {at_most})",
            manifest.len(),
            recovery.found.transactions
        ))?;
        recoveries.push(recovery);
    }

    story.tell("clean up: no device, mount or process stays")?;
    let written_bytes = disk_bytes(&vms)?;
    let journal_bytes = allocated_bytes(site.datastore())?;
    production.end()?;
    site.stop()?;
    Ok(Report {
        door: describe(door),
        files: manifest.len() as u64,
        files_bytes: tree::total_bytes(&manifest),
        source_bytes: written_bytes,
        target_bytes: journal_bytes,
        transactions: steps.last().map_or(0, |step| step.number),
        rpo: Duration::from_micros(killed_us.saturating_sub(latest_us)),
        recoveries,
        took: story.elapsed(),
    })
}

/// What was running at the source and must be found again.
struct Application<'a> {
    manifest: &'a Manifest,
    steps: &'a [Step],
}

const VPG: &str = "shop";
const TAG: &str = "before-upgrade";
const LATER_FILE: &str = "after-the-tag.txt";

fn describe(door: Door) -> &'static str {
    match door {
        Door::Ublk => "ublk block devices",
        Door::Nbd => "NBD exports (block devices by nbdfuse and losetup)",
    }
}

fn make_vms(folder: &Path, disk_bytes: u64) -> Result<Vec<Vm>> {
    let disks = folder.join("production-disks");
    fs::create_dir_all(&disks).with_context(|| format!("create {}", disks.display()))?;
    let mut vms = Vec::new();
    for (name, uuid, count) in [
        ("shop-app", "5a0e1d52-4a0b-4f5c-9a53-0f5d7b7d0a01", 2),
        ("shop-db", "5a0e1d52-4a0b-4f5c-9a53-0f5d7b7d0a02", 1),
    ] {
        let mut paths = Vec::new();
        for number in 0..count {
            let path = disks.join(format!("{name}-{number}.raw"));
            let file = File::create_new(&path).with_context(|| format!("create {}", path.display()))?;
            file.set_len(disk_bytes).with_context(|| format!("size {}", path.display()))?;
            paths.push(path);
        }
        vms.push(Vm { name, uuid: uuid.to_owned(), disks: paths });
    }
    Ok(vms)
}

fn copy_files(target: &Path, limit_bytes: u64) -> Result<Manifest> {
    let sources = ["/usr/bin", "/usr/lib", "/usr/share", "/usr", "/bin", "/lib"].map(Path::new);
    let present: Vec<&Path> = sources.into_iter().filter(|source| source.is_dir()).collect();
    tree::copy(&present, target, limit_bytes)
}

/// The disks of a test at the target, closed when dropped.
struct OpenTest<'a> {
    /// None once it is closed.
    site: Option<&'a Site>,
    devices: Vec<Device>,
    mounts: Vec<Mount>,
}

impl OpenTest<'_> {
    fn close(&mut self) -> Result<()> {
        self.mounts.clear();
        self.devices.clear();
        self.site.take().map_or(Ok(()), |site| site.stop_test(VPG))
    }
}

impl Drop for OpenTest<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            eprintln!("error: {error:#}");
        }
    }
}

fn recover(
    site: &Site,
    door: Door,
    folder: &Path,
    application: &Application<'_>,
    name: &str,
    expected: std::ops::RangeInclusive<u64>,
    later_file: bool,
) -> Result<Recovery> {
    let started = Instant::now();
    let disks = site.start_test(VPG, name, door)?;
    let opened_in = started.elapsed();
    let mut test = OpenTest { site: Some(site), devices: Vec::new(), mounts: Vec::new() };
    ensure!(disks.len() == 3, "the test shows {} disks instead of 3: {disks:?}", disks.len());
    for disk in disks {
        let fuse = folder.join(format!("fuse-{name}-{}-{}", disk.vm, disk.number));
        test.devices.push(Device::open(disk.at, &fuse)?);
    }
    for (at, device) in test.devices.iter().enumerate() {
        test.mounts.push(Mount::ext4(device.path(), &folder.join(format!("recovered-{name}-{at}")))?);
    }
    let usable_in = started.elapsed();
    tree::verify(application.manifest, test.mounts[0].folder())?;
    ensure!(
        test.mounts[0].folder().join(LATER_FILE).exists() == later_file,
        "{LATER_FILE}, written after the tag, {} there",
        if later_file { "is not" } else { "is" }
    );
    let found: Recovered = workload::inspect(test.mounts[1].folder(), test.mounts[2].folder())?;
    ensure!(
        expected.contains(&found.transactions),
        "{} transactions came back, but this checkpoint must hold {} to {} (the application had made {})",
        found.transactions,
        expected.start(),
        expected.end(),
        application.steps.len()
    );
    for mount in test.mounts.drain(..) {
        mount.unmount()?;
    }
    for device in &test.devices {
        check_ext4(device.path())?;
    }
    test.close()?;
    Ok(Recovery { name: name.to_owned(), expected, found, opened_in, usable_in })
}

/// Highest transaction that the application knew to be committed before a moment: a checkpoint of it must hold it.
fn committed_before(steps: &[Step], time_us: u64) -> u64 {
    steps.iter().filter(|step| step.committed_us < time_us).map(|step| step.number).max().unwrap_or(0)
}

/// Highest transaction that had been begun before a moment: a checkpoint of it can hold none later. The step after the
/// last finished one may have been under way.
fn started_before(steps: &[Step], time_us: u64) -> u64 {
    let started =
        steps.iter().filter(|step| step.started_us <= time_us).map(|step| step.number).max().unwrap_or(0);
    let under_way = steps.last().is_none_or(|last| last.number == started);
    started + u64::from(under_way)
}

fn write_durably(path: &Path, content: &[u8]) -> Result<()> {
    fs::write(path, content).with_context(|| format!("write {}", path.display()))?;
    let folder = path.parent().context("a file has a folder")?;
    let root = File::open(folder).with_context(|| format!("open {}", folder.display()))?;
    nix::unistd::syncfs(&root).with_context(|| format!("sync {}", folder.display()))
}

fn disk_bytes(vms: &[Vm]) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut bytes = 0;
    for disk in vms.iter().flat_map(|vm| &vm.disks) {
        bytes += fs::metadata(disk).with_context(|| format!("look at {}", disk.display()))?.blocks() * 512;
    }
    Ok(bytes)
}

fn allocated_bytes(folder: &Path) -> Result<u64> {
    let printed = run_program("du", &["-sk", &folder.to_string_lossy()])?;
    let kib: u64 = printed
        .split_whitespace()
        .next()
        .and_then(|word| word.parse().ok())
        .context("du printed no number")?;
    Ok(kib * 1024)
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
