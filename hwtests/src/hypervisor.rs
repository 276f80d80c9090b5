//! libvirt and QEMU of this machine, brought into a machine of the rig that is to run guests of its own.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::RigError;
use crate::initramfs::Job;
use crate::tool;

const PROGRAMS: [&str; 3] = ["libvirtd", "virsh", "qemu-system-x86_64"];

/// What libvirtd and QEMU load by themselves, where Debian has it. A host's devices, interfaces and packet filters are none of the rig's.
const PLUGINS: [&str; 6] = [
    "/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so",
    "/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_network.so",
    "/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_storage.so",
    "/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_secret.so",
    "/usr/lib/x86_64-linux-gnu/libvirt/storage-backend/libvirt_storage_backend_fs.so",
    "/usr/lib/x86_64-linux-gnu/libvirt/storage-file/libvirt_storage_file_fs.so",
];

/// Folders and files that they read.
const DATA: [&str; 5] = [
    "/usr/share/libvirt/cpu_map",
    "/usr/share/libvirt/schemas",
    "/usr/share/seabios",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/keymaps",
];

/// Adds them to what a machine has; nothing where this machine lacks one of the programs: a case that needs them is skipped there.
///
/// # Errors
/// Their folders can't be read.
pub fn add_to(job: &mut Job) -> Result<(), RigError> {
    let Some(programs) = PROGRAMS.into_iter().map(tool::find).collect::<Option<Vec<_>>>() else {
        return Ok(());
    };
    job.programs.extend(programs);
    // The machine's `/usr/lib` is its `/lib`.
    let plugins = PLUGINS.into_iter().filter(|plugin| Path::new(plugin).exists());
    job.plugins.extend(plugins.map(|plugin| (plugin.into(), plugin.replacen("/usr", "", 1))));
    let mut files = Vec::new();
    DATA.into_iter().try_for_each(|place| files_below(Path::new(place), &mut files))?;
    job.files.extend(files.into_iter().map(|file| (file.clone(), file.to_string_lossy().into_owned())));
    Ok(())
}

fn files_below(place: &Path, files: &mut Vec<PathBuf>) -> Result<(), RigError> {
    if place.is_file() {
        files.push(place.to_path_buf());
    }
    if place.is_dir() {
        let entries = fs::read_dir(place).map_err(RigError::io("reading", place))?;
        for entry in entries {
            let entry = entry.map_err(RigError::io("reading", place))?;
            files_below(&entry.path(), files)?;
        }
    }
    Ok(())
}
