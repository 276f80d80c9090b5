//! Disks as the product offers them: attached ones and those of a test.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::answers::find;
use super::setup::Site;
use super::{Side, Vm};

/// How disks are offered to their users.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// `/dev/ublkbN`.
    Ublk,
    /// NBD on a unix socket.
    Nbd,
}

impl Door {
    /// As the commands' `--door` has it.
    pub fn argument(self) -> &'static str {
        match self {
            Self::Ublk => "ublk",
            Self::Nbd => "nbd",
        }
    }
}

/// Where a disk is offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskAt {
    /// A ublk device.
    Ublk {
        /// The block device.
        path: PathBuf,
        /// The device's number.
        device: u32,
    },
    /// An NBD export.
    Nbd {
        /// The server's socket.
        socket: PathBuf,
        /// The export's name.
        export: String,
    },
}

impl DiskAt {
    /// Reads a door as the product prints it, and waits for the block device's node.
    fn parse(door: &Value) -> Result<Self> {
        let text = |key: &str| door.get(key).and_then(Value::as_str).map(PathBuf::from);
        match door.get("kind").and_then(Value::as_str) {
            Some("ublk") => {
                let path = text("path").context("a ublk door without a path")?;
                let number = door.get("device").and_then(Value::as_u64);
                let device = number.context("a ublk door without a number")?;
                let deadline = Instant::now() + Duration::from_secs(10);
                while !path.exists() {
                    ensure!(Instant::now() < deadline, "{} did not appear within 10 s", path.display());
                    std::thread::sleep(Duration::from_millis(20));
                }
                Ok(Self::Ublk { path, device: u32::try_from(device).context("a device's number")? })
            }
            Some("nbd_unix") => {
                let socket = text("path").context("an NBD door without a socket")?;
                let export = door.get("export").and_then(Value::as_str).unwrap_or_default().to_owned();
                Ok(Self::Nbd { socket, export })
            }
            _ => bail!("an unexpected door: {door}"),
        }
    }
}

/// A disk of a test at the target.
#[derive(Clone, Debug)]
pub struct RecoveredDisk {
    /// Its VM's name.
    pub vm: String,
    /// Its number in the VM.
    pub number: u64,
    /// Where it is offered.
    pub at: DiskAt,
}

impl Site {
    /// Attaches disk `number` of a VM at the source.
    ///
    /// # Errors
    /// What `vra attach` said.
    pub fn attach(&self, vm: &Vm, number: usize, door: Door) -> Result<DiskAt> {
        let disk = vm.disks.get(number).with_context(|| format!("{} has no disk {number}", vm.name))?;
        let attached = self.vra_json(
            Side::Source,
            &[
                "attach",
                &disk.to_string_lossy(),
                "--vm-name",
                vm.name,
                "--vm",
                &vm.uuid,
                "--number",
                &number.to_string(),
                "--door",
                door.argument(),
            ],
        )?;
        DiskAt::parse(find(&attached, "door").context("`vra attach` shows no door")?)
    }

    /// Protects VMs as one VPG with a checkpoint every second.
    ///
    /// # Errors
    /// What `zvm vpg create` said.
    pub fn protect(&self, vpg: &str, vms: &[Vm]) -> Result<()> {
        let mut arguments = vec!["vpg", "create", vpg];
        for vm in vms {
            arguments.extend(["--vm", vm.name]);
        }
        arguments.extend(["--target", Side::Target.name(), "--datastore", "recovery-store"]);
        arguments.extend(["--journal-limit", "2GiB", "--checkpoint-interval", "1s", "--history", "1h"]);
        self.zvm(&arguments).map(drop)
    }

    /// Opens all disks of a VPG at a checkpoint, at the target: `latest`, a checkpoint's id or tag. They are ordered by VM and number;
    /// [`Site::stop_test`] closes them.
    ///
    /// # Errors
    /// What `zvm test start` said, or that it shows no disk.
    pub fn start_test(&self, vpg: &str, at: &str, door: Door) -> Result<Vec<RecoveredDisk>> {
        let shown = self.zvm_json(&["test", "start", vpg, "--at", at, "--door", door.argument()])?;
        let mut disks = Vec::new();
        collect_disks(&shown, &mut disks)?;
        ensure!(!disks.is_empty(), "`zvm test start` shows no disks: {shown}");
        disks.sort_by_key(|disk| (disk.vm.clone(), disk.number));
        Ok(disks)
    }

    /// Closes the disks of a VPG's test.
    ///
    /// # Errors
    /// What `zvm test stop` said.
    pub fn stop_test(&self, vpg: &str) -> Result<()> {
        self.zvm(&["test", "stop", vpg]).map(drop)
    }
}

fn collect_disks(value: &Value, disks: &mut Vec<RecoveredDisk>) -> Result<()> {
    match value {
        Value::Object(fields) => {
            let disk = (
                fields.get("vm_name").and_then(Value::as_str),
                fields.get("number").and_then(Value::as_u64),
                fields.get("door").filter(|door| door.get("kind").is_some()),
            );
            if let (Some(vm), Some(number), Some(door)) = disk {
                disks.push(RecoveredDisk { vm: vm.to_owned(), number, at: DiskAt::parse(door)? });
                return Ok(());
            }
            fields.values().try_for_each(|field| collect_disks(field, disks))
        }
        Value::Array(items) => items.iter().try_for_each(|item| collect_disks(item, disks)),
        _ => Ok(()),
    }
}
