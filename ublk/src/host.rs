//! What the host offers: its kernel's version and its ublk driver.

use std::path::Path;

/// Oldest kernel that the ublk door supports (Debian 13).
pub const KERNEL_MIN: (u32, u32) = (6, 12);

/// Major and minor version of the running kernel, or none if it has a name that says neither.
pub fn kernel_version() -> Option<(u32, u32)> {
    parse_release(nix::sys::utsname::uname().ok()?.release().to_str()?)
}

/// Why the ublk door cannot be used here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// The kernel is too old.
    #[error(
        "kernel {release} is older than {}.{}, the oldest that is supported for ublk; upgrade it or use the NBD door",
        KERNEL_MIN.0, KERNEL_MIN.1
    )]
    KernelTooOld {
        /// `uname -r`.
        release: String,
    },
    /// No `/dev/ublk-control`.
    #[error(
        "this kernel ({release}) has no ublk driver loaded: run `modprobe ublk_drv` (the kernel needs \
         CONFIG_BLK_DEV_UBLK), or use the NBD door"
    )]
    NoUblk {
        /// `uname -r`.
        release: String,
    },
}

/// Checks the kernel's version and that the ublk driver is there.
///
/// # Errors
/// [`HostError`], with the remedy.
pub fn require_ublk() -> Result<(), HostError> {
    let release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    check(release, Path::new(CONTROL_PATH).exists())
}

/// The driver's control device.
pub(crate) const CONTROL_PATH: &str = "/dev/ublk-control";

/// How many ublk devices the driver allows, if it says so (module parameter `ublks_max`). Older kernels count every device,
/// those since 6.15 only unprivileged ones.
pub fn device_count_max() -> Option<u32> {
    let text = std::fs::read_to_string("/sys/module/ublk_drv/parameters/ublks_max").ok()?;
    text.trim().parse().ok()
}

fn check(release: String, has_control: bool) -> Result<(), HostError> {
    if parse_release(&release).is_some_and(|version| version < KERNEL_MIN) {
        return Err(HostError::KernelTooOld { release });
    }
    if !has_control {
        return Err(HostError::NoUblk { release });
    }
    Ok(())
}

fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_real_kernels_are_read() {
        assert_eq!(parse_release("6.12.95+deb13-cloud-amd64"), Some((6, 12)));
        assert_eq!(parse_release("7.3.4-1~bpo13+1-cloud-amd64"), Some((7, 3)));
        assert_eq!(parse_release("6.18-rc1"), Some((6, 18)));
        assert_eq!(parse_release("custom"), None);
    }

    #[test]
    fn each_want_has_its_remedy() {
        assert_eq!(check("6.12.1".into(), true), Ok(()));
        let old = check("6.1.0-37-amd64".into(), true).expect_err("too old");
        assert!(old.to_string().contains("6.1.0-37-amd64 is older than 6.12"), "{old}");
        let none = check("7.3.4".into(), false).expect_err("no driver");
        assert!(none.to_string().contains("modprobe ublk_drv"), "{none}");
    }
}
