//! What the cases of this folder stand on: a site, a VM with one protected disk behind ublk, and a load on it.

use std::fs::{self, File};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use vra::api::status::{SourceMode, SourceVmStatus};

use super::load::{Load, RunningLoad};
use crate::cases::content::same_content;
use crate::cases::ublk::Mount;
use crate::site::{Binaries, DiskAt, Door, Side, Site, SiteSettings, Vm, time_of};
use crate::suite::context::Context;
use crate::suite::ublk::list;

/// Length of the protected disk, in bytes.
pub(super) const DISK_BYTES: u64 = 48 << 20;

/// Two queues for a disk, and memory that holds all that a [`Load`] writes.
pub(super) const SITE: SiteSettings = SiteSettings {
    arena_mib: 128,
    retained_per_vm_mib: 96,
    scratch_mib: 64,
    queues: 2,
    ..SiteSettings::SMALL
};

/// How long a site may take for anything that it does by itself, in an emulator on a busy host.
pub(super) const PATIENCE_S: u64 = 240;

/// The protected VM's group.
pub(super) const VPG: &str = "rig";

/// A site with one protected disk.
pub(super) struct Stand<'a> {
    context: &'a Context,
    /// The site.
    pub site: Site,
    vm: Vm,
    device: Option<String>,
    folder: String,
}

/// Where the source VRA's raw disk comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RawDisk {
    /// A sparse file.
    File,
    /// A block device.
    BlockDevice,
}

/// Runs a case on a stand of its own. Afterwards the daemons' logs may hold no warning or error without one of the `expected` parts, and
/// the group is deleted, the disk detached, and the site ended, each of which must leave nothing.
pub(super) fn with_stand(
    context: &Context,
    settings: &SiteSettings,
    raw: RawDisk,
    expected: &[&str],
    case: impl FnOnce(&mut Stand) -> Result<()>,
) -> Result<()> {
    let folder = context.path("site").to_string_lossy().into_owned();
    // Direct I/O needs a real filesystem below disks and journals, which the machine's own root is not.
    context.run(&["mkfs.ext4", "-q", "-F", context.disk(0)])?;
    let _mount = Mount::new(context, context.disk(0), &folder)?;
    let outcome = Stand::start(context, settings, raw, &folder)
        .and_then(|mut stand| case(&mut stand).and_then(|()| stand.end()))
        .and_then(|()| nothing_unexpected(&folder, expected));
    if outcome.is_err() {
        for name in LOGS {
            let text = fs::read_to_string(format!("{folder}/{name}")).unwrap_or_default();
            context.note(format_args!("end of {name}:\n{}", crate::tool::tail(&text, 30)));
        }
    }
    outcome
}

impl<'a> Stand<'a> {
    fn start(context: &'a Context, settings: &SiteSettings, raw: RawDisk, folder: &str) -> Result<Self> {
        let disk = match raw {
            RawDisk::BlockDevice => context.disk(1).to_owned(),
            RawDisk::File => {
                let path = format!("{folder}/disk.raw");
                File::create_new(&path)?.set_len(DISK_BYTES)?;
                path
            }
        };
        let uuid = "5a0e1d52-4a0b-4f5c-9a53-0f5d7b7d0b01".to_owned();
        let vm = Vm { name: "guest", uuid, disks: vec![disk.into()] };
        let site = Site::start(Binaries::beside_this_one()?, folder.as_ref(), settings)?;
        site.write_inventory(std::slice::from_ref(&vm))?;
        let mut stand = Self { context, site, vm, device: None, folder: folder.to_owned() };
        stand.attach()?;
        stand.protect()?;
        Ok(stand)
    }

    /// Attaches the disk at the source.
    pub(super) fn attach(&mut self) -> Result<()> {
        let DiskAt::Ublk { path, .. } = self.site.attach(&self.vm, 0, Door::Ublk)? else {
            bail!("not a ublk device");
        };
        self.device = Some(path.to_string_lossy().into_owned());
        Ok(())
    }

    /// Protects the VM and waits until the first sync has ended.
    pub(super) fn protect(&self) -> Result<()> {
        self.site.protect(VPG, std::slice::from_ref(&self.vm))?;
        self.site.wait_for_checkpoint(VPG, 0, PATIENCE_S).map(drop)
    }

    /// The guest's block device.
    pub(super) fn device(&self) -> Result<&str> {
        self.device.as_deref().context("the disk is not attached")
    }

    /// The raw disk below it.
    pub(super) fn raw_disk(&self) -> String {
        self.vm.disks[0].to_string_lossy().into_owned()
    }

    /// The VM as its source sees it.
    pub(super) fn source(&self) -> Result<SourceVmStatus> {
        let status = self.site.vra_status(Side::Source)?;
        status.source_vms.into_iter().next().context("the source VRA has no VM")
    }

    /// Waits until the VM streams and its target has all that was written.
    pub(super) fn wait_until_streaming(&self) -> Result<SourceVmStatus> {
        self.context.wait_for("the VM to stream with nothing left to send", PATIENCE_S, || {
            let vm = self.source()?;
            let is_quiet = vm.mode == SourceMode::Streaming && vm.durable_through == vm.last_sequence;
            Ok(is_quiet.then_some(vm))
        })
    }

    /// Waits until the stream runs again and what waited behind the gap has arrived.
    pub(super) fn wait_until_caught_up(&self) -> Result<()> {
        let newest = self.source()?.last_sequence;
        self.context.wait_for("the target to catch up", PATIENCE_S, || {
            let vm = self.source()?;
            Ok((vm.mode == SourceMode::Streaming && vm.durable_through >= newest).then_some(()))
        })
    }

    /// Waits until the guest has written `count` more times.
    pub(super) fn wait_for_writes(&self, count: u64) -> Result<()> {
        let from = self.source()?.last_sequence;
        self.context.wait_for("the guest's writes", PATIENCE_S, || {
            Ok((self.source()?.last_sequence >= from + count).then_some(()))
        })
    }

    /// Takes a checkpoint while nobody writes, and waits until the target has it.
    pub(super) fn checkpoint(&self, tag: &str) -> Result<()> {
        // The manager learns only by silence that a killed VRA's connection is gone.
        let tagged =
            self.context.wait_for("the manager to reach the source VRA", PATIENCE_S, || {
                match self.site.zvm_json(&["checkpoint", "tag", VPG, tag]) {
                    Ok(tagged) => Ok(Some(tagged)),
                    Err(error) if error.to_string().contains("does not answer") => Ok(None),
                    Err(error) => Err(error),
                }
            })?;
        let time_us = time_of(&tagged)?;
        // Checkpoints arrive in their order.
        self.site.wait_for_checkpoint(VPG, time_us - 1, PATIENCE_S).map(drop)
    }

    /// Opens the disk at a checkpoint, at the target, and compares the whole of it with what must be there.
    pub(super) fn view_equals(&self, tag: &str, door: Door, expected: &str) -> Result<()> {
        let disks = self.site.start_test(VPG, tag, door)?;
        let [disk] = disks.as_slice() else { bail!("the test shows {} disks instead of one", disks.len()) };
        match &disk.at {
            DiskAt::Ublk { path, .. } => same_content(&path.to_string_lossy(), expected, DISK_BYTES)?,
            DiskAt::Nbd { socket, export } => {
                let copy = format!("{}/from-nbd.raw", self.folder);
                let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
                self.context.run(&["nbdcopy", &uri, &copy])?;
                same_content(&copy, expected, DISK_BYTES)?;
                fs::remove_file(copy)?;
            }
        }
        self.context.note(format_args!("the view at \"{tag}\" equals {expected}"));
        self.site.stop_test(VPG)
    }

    /// Checkpoint, view, comparison with the raw disk: after a load, when nobody writes.
    pub(super) fn recovers(&self, tag: &str) -> Result<()> {
        self.wait_until_streaming()?;
        self.checkpoint(tag)?;
        self.view_equals(tag, Door::Ublk, &self.raw_disk())
    }

    /// Fills the first 32 MiB of the disk with 0xa5, durably.
    pub(super) fn fill(&self) -> Result<()> {
        let filename = format!("--filename={}", self.device()?);
        let pattern = ["--rw=write", "--bs=256k", "--size=32m", "--buffer_pattern=0xa5", "--end_fsync=1"];
        self.context.fio(&[&[filename.as_str(), "--direct=1"], &pattern[..]].concat()).map(drop)
    }

    /// A copy of the raw disk as it is now.
    pub(super) fn copy_of_disk(&self) -> Result<String> {
        let copy = format!("{}/copy.raw", self.folder);
        self.context.run(&["cp", &self.raw_disk(), &copy])?;
        Ok(copy)
    }

    /// Starts a load on the guest's device.
    pub(super) fn start_load(&self, load: Load) -> Result<RunningLoad> {
        load.start(self.context, self.device()?)
    }

    /// Deletes the group, which must take its journal and recovery disk along.
    pub(super) fn unprotect(&self) -> Result<()> {
        self.site.zvm(&["vpg", "delete", VPG])?;
        let left = fs::read_dir(self.site.datastore())?
            .map(|entry| Ok(entry?.path().display().to_string()))
            .collect::<Result<Vec<_>>>()?;
        ensure!(left.is_empty(), "the deleted group left {left:?} in the datastore");
        Ok(())
    }

    /// Detaches the protected disk.
    pub(super) fn detach_by_force(&mut self) -> Result<()> {
        self.detach_with(&["--force"])
    }

    /// Detaches the disk, which must take its device along.
    fn detach_with(&mut self, how: &[&str]) -> Result<()> {
        self.site.vra(Side::Source, &[&["detach", "guest:0"], how].concat())?;
        self.device = None;
        let left = list()?;
        ensure!(left.is_empty(), "the detached disk left {left:?}");
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        self.unprotect()?;
        self.detach_with(&[])?;
        self.site.stop()
    }
}

/// Now, µs since the Unix epoch.
pub(super) fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

/// Sleeps until `started` is `after` ago.
pub(super) fn sleep_until(started: Instant, after: Duration) {
    std::thread::sleep(after.saturating_sub(started.elapsed()));
}

impl Drop for Stand<'_> {
    /// Only after a failure is there anything left.
    fn drop(&mut self) {
        delete_devices();
    }
}

/// Deletes our ublk devices, whoever waits for them.
pub(super) fn delete_devices() {
    let _ = Command::new("vra-ublk").args(["del", "--ours", "--force"]).output();
}

/// Warnings of what each case does, the first sync and the end of a VRA before that of its manager, and of what an emulator on a busy host
/// makes: answers that come too late.
const ALWAYS_EXPECTED: [&str; 6] = [
    "code=\"full-sync\"",
    "code=\"not-connected\"",
    "the VRA does not answer",
    "a connection was refused",
    "slow statement",
    "time to acquire exceeded slow threshold",
];

const LOGS: [&str; 3] = ["host-a.log", "host-b.log", "zvm.log"];

fn nothing_unexpected(folder: &str, expected: &[&str]) -> Result<()> {
    for name in LOGS {
        let text = fs::read_to_string(format!("{folder}/{name}"))?;
        let unexpected: Vec<&str> = text
            .lines()
            .filter(|line| line.contains(" WARN ") || line.contains(" ERROR "))
            .filter(|line| !expected.iter().chain(&ALWAYS_EXPECTED).any(|part| line.contains(part)))
            .collect();
        ensure!(unexpected.is_empty(), "{name} holds what nobody expected:\n{}", unexpected.join("\n"));
    }
    Ok(())
}
