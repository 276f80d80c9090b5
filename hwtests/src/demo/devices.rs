//! Block devices, filesystems and mounts of the demo, each undone when dropped.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::site::DiskAt;

/// A block device, however it came to be.
pub(super) enum Device {
    /// One of the ublk driver, which its VRA makes and deletes.
    Ublk {
        /// `/dev/ublkbN`.
        path: PathBuf,
        /// N.
        number: u32,
    },
    /// One made of an NBD export, which goes when this is dropped.
    Nbd(NbdDevice),
}

impl Device {
    /// The disk that the product offers there; `folder` is a scratch folder for a FUSE mount.
    ///
    /// # Errors
    /// As [`NbdDevice::attach`].
    pub(super) fn open(at: DiskAt, folder: &Path) -> Result<Self> {
        match at {
            DiskAt::Ublk { path, device } => Ok(Self::Ublk { path, number: device }),
            DiskAt::Nbd { socket, export } => NbdDevice::attach(&socket, &export, folder).map(Self::Nbd),
        }
    }

    /// The block device.
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Ublk { path, .. } => path,
            Self::Nbd(device) => device.path(),
        }
    }

    /// Its number, if it is one of the ublk driver.
    pub(super) fn ublk_number(&self) -> Option<u32> {
        match self {
            Self::Ublk { number, .. } => Some(*number),
            Self::Nbd(_) => None,
        }
    }
}

/// A block device made from an NBD socket without a kernel NBD client: `nbdfuse` shows it as a file, a loop device
/// with direct I/O makes that a block device.
pub(super) struct NbdDevice {
    path: PathBuf,
    fuse_folder: PathBuf,
    fuse: Child,
}

impl NbdDevice {
    /// Attaches an export of the NBD server behind `socket`; `folder` is a scratch folder for the FUSE mount.
    ///
    /// # Errors
    /// When `nbdfuse` or `losetup` fail, with what they said.
    pub(super) fn attach(socket: &Path, export: &str, folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        let mut fuse = Command::new("nbdfuse")
            .arg(folder)
            .arg(format!("nbd+unix:///{export}?socket={}", socket.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Out of reach of the terminal's Ctrl-C: it goes after what uses it.
            .process_group(0)
            .spawn()
            .context("start nbdfuse (Debian package nbdfuse)")?;
        let file = folder.join("nbd");
        let deadline = Instant::now() + Duration::from_secs(10);
        while !file.exists() {
            if let Some(status) = fuse.try_wait().context("wait for nbdfuse")? {
                bail!("nbdfuse on {} ended: {status}", socket.display());
            }
            if Instant::now() > deadline {
                let _ = fuse.kill();
                bail!("nbdfuse on {} showed no file within 10 s", socket.display());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let attached = run("losetup", &["--find", "--show", "--direct-io=on", &file.to_string_lossy()]);
        match attached {
            Ok(path) => {
                Ok(Self { path: PathBuf::from(path.trim()), fuse_folder: folder.to_path_buf(), fuse })
            }
            Err(error) => {
                let _ = run("umount", &["-l", &folder.to_string_lossy()]);
                let _ = fuse.kill();
                let _ = fuse.wait();
                Err(error)
            }
        }
    }

    /// The block device.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for NbdDevice {
    fn drop(&mut self) {
        let _ = run("losetup", &["--detach", &self.path.to_string_lossy()]);
        let deadline = Instant::now() + Duration::from_secs(5);
        while loop_is_attached(&self.path) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = run("umount", &["-l", &self.fuse_folder.to_string_lossy()]);
        let deadline = Instant::now() + Duration::from_secs(5);
        while matches!(self.fuse.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                let _ = self.fuse.kill();
                let _ = self.fuse.wait();
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A mounted filesystem, unmounted when dropped.
pub(super) struct Mount {
    folder: PathBuf,
}

impl Mount {
    /// Mounts the ext4 filesystem of `device` on `folder`, which replays its journal as a booting guest does.
    ///
    /// # Errors
    /// What mount said.
    pub(super) fn ext4(device: &Path, folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        run("mount", &["-t", "ext4", &device.to_string_lossy(), &folder.to_string_lossy()])?;
        Ok(Self { folder: folder.to_path_buf() })
    }

    /// Where it is mounted.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Takes the filesystem out of the tree and unmounts it as soon as nothing uses it; the process that is returned ends then.
    pub(super) fn detach(self) -> Result<Child> {
        let folder = self.folder.clone();
        std::mem::forget(self);
        Command::new("umount").arg("-l").arg(folder).stdin(Stdio::null()).spawn().context("start umount")
    }

    /// Unmounts, and says so when that fails.
    ///
    /// # Errors
    /// What umount said.
    pub(super) fn unmount(self) -> Result<()> {
        let folder = self.folder.clone();
        std::mem::forget(self);
        run("umount", &[&folder.to_string_lossy()]).map(drop)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let folder = self.folder.to_string_lossy().into_owned();
        if run("umount", &[&folder]).is_err() {
            let _ = run("umount", &["-l", &folder]);
        }
    }
}

/// Makes an ext4 filesystem.
///
/// # Errors
/// What mkfs said.
pub(super) fn make_ext4(device: &Path) -> Result<()> {
    run("mkfs.ext4", &["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", &device.to_string_lossy()])
        .map(drop)
}

/// Checks an unmounted ext4 filesystem without changing it.
///
/// # Errors
/// What fsck found.
pub(super) fn check_ext4(device: &Path) -> Result<()> {
    run("e2fsck", &["-f", "-n", &device.to_string_lossy()]).map(drop)
}

/// Runs a program to its end and returns what it printed.
///
/// # Errors
/// When it cannot be started or fails, with the end of what it said.
pub(super) fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        // Out of reach of the terminal's Ctrl-C: a mount that was made must be known as one.
        .process_group(0)
        .output()
        .with_context(|| format!("start {program}"))?;
    ensure!(
        output.status.success(),
        "{program} {}: {} {}{}",
        arguments.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stdout).trim(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn loop_is_attached(device: &Path) -> bool {
    let Some(name) = device.file_name() else { return false };
    Path::new("/sys/block").join(name).join("loop/backing_file").exists()
}
