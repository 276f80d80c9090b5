//! What runs at the source: disks, their filesystems and the application. It goes when the demo ends, however that ends.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::devices::{Device, Mount, make_ext4};
use super::workload::Workload;
use crate::site::{Binaries, Door, Site, Vm};

/// How long the application gets to end by itself while its disks may still answer.
const LAST_STEP_LIMIT: Duration = Duration::from_secs(1);

/// The source's side. Dropping it ends it.
#[derive(Default)]
pub(super) struct Production {
    devices: Vec<Device>,
    mounts: Vec<Mount>,
    app: Option<Workload>,
}

impl Production {
    /// Attaches all disks.
    ///
    /// # Errors
    /// What failed; the disks before it are let go of.
    pub(super) fn attach(site: &Site, door: Door, vms: &[Vm], folder: &Path) -> Result<Self> {
        let mut production = Self::default();
        for vm in vms {
            for number in 0..vm.disks.len() {
                let at = site.attach(vm, number, door)?;
                let fuse = folder.join(format!("fuse-{}-{number}", vm.name));
                production.devices.push(Device::open(at, &fuse)?);
            }
        }
        Ok(production)
    }

    /// Makes a filesystem on each disk and mounts it.
    ///
    /// # Errors
    /// What failed.
    pub(super) fn mount_all(&mut self, folder: &Path) -> Result<()> {
        for (at, device) in self.devices.iter().enumerate() {
            make_ext4(device.path())?;
            self.mounts.push(Mount::ext4(device.path(), &folder.join(format!("production-{at}")))?);
        }
        Ok(())
    }

    /// Where the filesystem of a disk is mounted.
    pub(super) fn folder(&self, disk: usize) -> &Path {
        self.mounts[disk].folder()
    }

    /// Starts the application on the second and third disk.
    ///
    /// # Errors
    /// When it doesn't come up.
    pub(super) fn start_app(&mut self) -> Result<&Workload> {
        let app = Workload::start(self.folder(1), self.folder(2))?;
        Ok(self.app.insert(app))
    }

    /// Ends it. A source VRA that was killed is gone for good, and its ublk devices wait for it with all that was sent to them. So everything
    /// at once: a mount goes only when its device has failed what waits, a device goes only when nothing has it open, and the application ends
    /// when its disks fail.
    ///
    /// # Errors
    /// What stayed.
    pub(super) fn end(&mut self) -> Result<()> {
        let app = self.app.take();
        if let Some(app) = &app {
            app.stop_within(LAST_STEP_LIMIT);
        }
        let mut under_way = Vec::new();
        let numbers: Vec<u32> = self.devices.iter().filter_map(Device::ublk_number).collect();
        if numbers.is_empty() {
            self.mounts.clear();
        } else {
            let tool = Binaries::beside_this_one()?;
            for mount in self.mounts.drain(..) {
                under_way.push(mount.detach()?);
            }
            for number in numbers {
                under_way.push(tool.start("vra-ublk", &["del", &number.to_string()])?);
            }
        }
        self.devices.clear();
        // The application's last step may have failed with its disk: that is the disaster, not an error of the demo.
        let _ = app.map(Workload::join);
        for mut child in under_way {
            let status = child.wait().context("wait for the clean-up of a device")?;
            ensure!(status.success(), "the clean-up of a device failed: {status}");
        }
        Ok(())
    }
}

impl Drop for Production {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("error: {error:#}");
        }
    }
}
