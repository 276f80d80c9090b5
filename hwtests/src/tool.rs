//! Runs the tools that the rig is made with (apt, dpkg, ldd, strip, …).

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::RigError;

/// Runs a command to its end and gives its standard output.
pub fn run(command: &mut Command) -> Result<String, RigError> {
    command.stdin(Stdio::null()).env("LC_ALL", "C.UTF-8").env("DEBIAN_FRONTEND", "noninteractive");
    let shown = shown(command);
    let output = command.output().map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => missing(&command.get_program().to_string_lossy()),
        _ => RigError::Command {
            command: shown.clone(),
            status: "not started".into(),
            stderr: source.to_string(),
        },
    })?;
    if !output.status.success() {
        return Err(RigError::Command {
            command: shown,
            status: output.status.to_string(),
            stderr: tail(&String::from_utf8_lossy(&output.stderr), 12),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Finds a tool in `PATH` or the folders of system tools.
pub fn find(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(system)
        .map(|folder| folder.join(tool))
        .find(|file| is_executable(file))
}

/// Finds a tool or says which package brings it.
pub fn require(tool: &str) -> Result<PathBuf, RigError> {
    find(tool).ok_or_else(|| missing(tool))
}

/// The last `lines` lines of a text.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn missing(tool: &str) -> RigError {
    RigError::MissingTool { tool: tool.to_owned(), package: package_of(tool).to_owned() }
}

/// The Debian package of a tool; most have its name.
fn package_of(tool: &str) -> &str {
    match tool {
        "busybox" => "busybox-static",
        "qemu-system-x86_64" => "qemu-system-x86",
        "ldd" => "libc-bin",
        "strip" => "binutils",
        "mkfs.ext4" | "mke2fs" | "e2fsck" | "debugfs" | "resize2fs" | "tune2fs" => "e2fsprogs",
        "mkfs.xfs" | "xfs_repair" | "xfs_io" => "xfsprogs",
        "ip" | "tc" => "iproute2",
        "nbdcopy" | "nbdinfo" => "libnbd-bin",
        "blockdev" | "losetup" | "lsblk" | "wipefs" | "blkdiscard" => "util-linux",
        other => other,
    }
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|arg| arg.to_string_lossy().into_owned()));
    words.join(" ")
}
