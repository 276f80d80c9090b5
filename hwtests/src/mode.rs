//! Where tests run: on this host itself where its kernel has ublk, in a machine under KVM where that really works,
//! else under QEMU's own emulation.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::cache::Cache;
use crate::error::RigError;
use crate::initramfs::Job;
use crate::kernel::Kernel;
use crate::machine::Machine;
use crate::qemu::Qemu;

/// How a machine's processors run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// By the host's processors.
    Kvm,
    /// By emulation: 15 to 20 times slower, works everywhere.
    Tcg,
}

impl Accel {
    /// Its name, also as `$RIG_MODE` inside the machine.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// What the command line asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ModeChoice {
    /// The best that works here.
    #[default]
    Auto,
    /// This host's own kernel.
    Native,
    /// Machines under KVM.
    Kvm,
    /// Emulated machines.
    Tcg,
}

/// Whether this host's own kernel has ublk and we may use it.
pub fn native_works() -> bool {
    let control = Path::new("/dev/ublk-control");
    if !nix::unistd::geteuid().is_root() {
        return false;
    }
    if !control.exists() {
        let modprobe = Command::new("modprobe").arg("ublk_drv").stderr(Stdio::null()).spawn();
        if let Ok(mut child) = modprobe {
            let started = Instant::now();
            while matches!(child.try_wait(), Ok(None)) && started.elapsed() < Duration::from_secs(5) {
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
    }
    control.exists()
}

/// Whether KVM boots our kernel. Asked once in each uptime of the host: the device may be there and hang.
pub fn kvm_works(cache: &Cache, qemu: &Qemu, kernel: &Kernel) -> Result<bool, RigError> {
    let openable = fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if !openable {
        return Ok(false);
    }
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let key = format!("{} {}", boot_id.trim(), qemu.version);
    let memory = cache.root().join("kvm-probe");
    if let Ok(known) = fs::read_to_string(&memory)
        && let Some(verdict) = known.strip_prefix(&key)
    {
        return Ok(verdict.trim() == "works");
    }
    let mut machine = Machine::new(cache, qemu, Accel::Kvm, kernel);
    machine.limit = Duration::from_secs(12);
    let job = Job { argv: vec!["true".into()], ..Job::default() };
    let works = machine.run(&job, &mut |_| {}).is_ok_and(|finished| finished.exit == 0);
    let verdict = if works { "works" } else { "fails" };
    fs::write(&memory, format!("{key} {verdict}")).map_err(RigError::io("writing", &memory))?;
    Ok(works)
}
