//! What a host offers and lacks, with remedies.

mod datastore;

use std::path::Path;

use nix::sys::resource::{Resource, getrlimit};

use crate::api::status::{Check, CheckState};
use crate::api::{DoctorReport, TimeUs};
use crate::config::Config;
use crate::pki::PkiDir;
use crate::report::chain;

/// Looks at this host with the rights of this process. Takes a few file operations on each datastore; blocks.
pub fn examine(config: &Config) -> DoctorReport {
    let mut checks =
        vec![kernel(), ublk(), device_count(), io_uring(), memory_lock(), io_flusher(), udp_buffers()];
    checks.extend([open_files(), clock(), certificate(config)]);
    checks.extend(config.datastores.iter().map(|folder| datastore::check(folder)));
    DoctorReport { checks }
}

impl DoctorReport {
    /// Whether nothing is missing.
    pub fn is_good(&self) -> bool {
        self.checks.iter().all(|check| check.state != CheckState::Missing)
    }
}

fn kernel() -> Check {
    let release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    let (major, minor) = ublk::host::KERNEL_MIN;
    match ublk::host::kernel_version() {
        Some(version) if version >= ublk::host::KERNEL_MIN => ok("kernel", release),
        Some(_) => missing(
            "kernel",
            format!("{release} is older than {major}.{minor}"),
            format!("upgrade to {major}.{minor} or newer; until then only the NBD door works"),
        ),
        None => {
            warning("kernel", format!("\"{release}\" tells no version"), "check that it is 6.12 or newer")
        }
    }
}

fn ublk() -> Check {
    match ublk::host::require_ublk() {
        Ok(()) => ok("ublk", "the driver is there".to_owned()),
        Err(error) => {
            missing("ublk", error.to_string(), "load the driver, or use the NBD door (`--door nbd`)")
        }
    }
}

fn device_count() -> Check {
    match ublk::host::device_count_max() {
        None => ok("ublk-devices", "no limit is told by the driver".to_owned()),
        Some(max) if max >= 64 => ok("ublk-devices", format!("ublks_max is {max}")),
        Some(max) => warning(
            "ublk-devices",
            format!("ublks_max is {max}"),
            "load ublk_drv with ublks_max=1024 if this host has more disks",
        ),
    }
}

fn io_uring() -> Check {
    match io_uring::IoUring::new(8) {
        Ok(_) => ok("io_uring", "rings can be made".to_owned()),
        Err(error) => missing(
            "io_uring",
            format!("no ring can be made: {error}"),
            "set sysctl kernel.io_uring_disabled=0, and let no seccomp filter stand against io_uring",
        ),
    }
}

fn memory_lock() -> Check {
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft);
    if has_capability(CAP_IPC_LOCK) {
        ok("memlock", "memory can be locked (CAP_IPC_LOCK)".to_owned())
    } else if limit == libc::RLIM_INFINITY {
        ok("memlock", "no limit".to_owned())
    } else {
        needed_for_ublk(
            "memlock",
            format!("at most {} MiB can be locked", limit >> 20),
            "run as root, or set LimitMEMLOCK=infinity in the unit (memory.lock=false is for tests only)",
        )
    }
}

fn io_flusher() -> Check {
    if has_capability(CAP_SYS_RESOURCE) {
        ok("io-flusher", "memory reclaim won't wait for the VRA's own disks (CAP_SYS_RESOURCE)".to_owned())
    } else {
        needed_for_ublk(
            "io-flusher",
            "no CAP_SYS_RESOURCE: under memory pressure the VRA could wait for disks that wait for it"
                .to_owned(),
            "run as root, or give the unit CAP_SYS_RESOURCE",
        )
    }
}

fn udp_buffers() -> Check {
    const WANTED_BYTES: u64 = 32 << 20;
    if has_capability(CAP_NET_ADMIN) {
        return ok("udp-buffers", "32 MiB, beyond the host's limit (CAP_NET_ADMIN)".to_owned());
    }
    let max = read_number("/proc/sys/net/core/rmem_max").unwrap_or(0);
    if max >= WANTED_BYTES {
        ok("udp-buffers", format!("net.core.rmem_max is {max}"))
    } else {
        warning(
            "udp-buffers",
            format!("net.core.rmem_max is {max}: fast links will lose packets"),
            "run as root, or set net.core.rmem_max and net.core.wmem_max to 33554432",
        )
    }
}

fn open_files() -> Check {
    const WANTED: u64 = 16_384;
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard);
    if limit >= WANTED {
        ok("open-files", format!("up to {limit}"))
    } else {
        warning("open-files", format!("up to {limit}"), "set LimitNOFILE=65536 in the unit")
    }
}

fn clock() -> Check {
    // 2026-01-01: no certificate of this product is older.
    const EARLIEST: TimeUs = TimeUs(1_767_225_600_000_000);
    let now = TimeUs::now();
    if now < EARLIEST {
        return missing(
            "clock",
            format!("it shows {now}"),
            "set the clock: certificates are not valid yet at that time",
        );
    }
    // SAFETY: an all-zero `timex` asks for nothing to be changed; the kernel fills it in.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `timex` is a valid, writable structure for the whole call.
    let state = unsafe { libc::adjtimex(&raw mut timex) };
    if state == libc::TIME_ERROR {
        warning(
            "clock",
            format!("{now}, not synchronised"),
            "run a time service (chrony, systemd-timesyncd): checkpoints are named by time",
        )
    } else {
        ok("clock", format!("{now}, synchronised"))
    }
}

fn certificate(config: &Config) -> Check {
    const SOON_US: u64 = 30 * 86_400 * 1_000_000;
    // A look makes no folder.
    let loaded = match config.pki_dir().try_exists() {
        Ok(false) => Ok(None),
        _ => PkiDir::open(&config.pki_dir())
            .and_then(|folder| if folder.is_enrolled() { folder.load().map(Some) } else { Ok(None) }),
    };
    let own = match loaded {
        Ok(Some(credentials)) => credentials.own,
        Ok(None) => {
            return warning(
                "certificate",
                "this VRA is not enrolled".to_owned(),
                "make a token at the ZVM and run `vra enroll`",
            );
        }
        Err(error) => {
            return missing("certificate", chain(&error), "run `vra doctor` as root, or enrol again");
        }
    };
    let found = format!("{}, serial {}, until {}", own.identity, own.serial, own.ends_us);
    let left = own.ends_us.0.saturating_sub(TimeUs::now().0);
    match left {
        0 => missing("certificate", found, "it has expired: enrol again, `vra enroll`"),
        1..SOON_US => warning("certificate", found, "it ends soon: enrol again, `vra enroll`"),
        _ => ok("certificate", found),
    }
}

// Bits of `CapEff` in /proc/self/status (linux/capability.h).
const CAP_NET_ADMIN: u32 = 12;
const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_RESOURCE: u32 = 24;

fn has_capability(bit: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    effective.is_some_and(|set| set >> bit & 1 == 1)
}

fn read_number(path: impl AsRef<Path>) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Missing where the VRA may serve block devices, else worth a word.
fn needed_for_ublk(name: &str, found: String, remedy: &str) -> Check {
    if ublk::host::require_ublk().is_ok() {
        missing(name, found, remedy)
    } else {
        warning(name, found, remedy)
    }
}

fn ok(name: &str, found: String) -> Check {
    Check { name: name.to_owned(), state: CheckState::Ok, found, remedy: None }
}

fn warning(name: &str, found: String, remedy: impl Into<String>) -> Check {
    Check { name: name.to_owned(), state: CheckState::Warning, found, remedy: Some(remedy.into()) }
}

fn missing(name: &str, found: String, remedy: impl Into<String>) -> Check {
    Check { name: name.to_owned(), state: CheckState::Missing, found, remedy: Some(remedy.into()) }
}
