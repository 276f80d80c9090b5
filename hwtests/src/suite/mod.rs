//! Rig tests as a table: each case has one idea, says what it needs, and leaves nothing behind.

pub mod context;
mod inside;
mod leftover;
mod report;
mod runner;
pub mod ublk;

use anyhow::Result;

pub use inside::{run_all_inside, run_one_inside};
pub use report::Report;
pub use runner::{Outside, Place, Runner};

use crate::suite::context::Context;

/// One test.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Its name, unique: `part-what-how`.
    pub name: &'static str,
    /// What it shows, in one sentence.
    pub idea: &'static str,
    /// Without these it is skipped, with a reason.
    pub needs: &'static [Need],
    /// Run only by `--long`, or when named.
    pub long: bool,
    /// Without `--long` it is run on the first kernel alone: others hardly differ in what it shows.
    pub once: bool,
    /// It fails when it takes longer: seconds, under emulation.
    pub limit_s: u64,
    /// The machine it wants. Cases that want the same one share it.
    pub machine: MachineNeeds,
    /// Parts of kernel messages that are expected, though they look like trouble.
    pub kernel_log_allowed: &'static [&'static str],
    /// The test.
    pub body: Body,
}

/// The code of a [`Case`].
#[derive(Clone, Copy, Debug)]
pub enum Body {
    /// Runs inside the machine, or on the host itself in native mode.
    Inside(fn(&mut Context) -> Result<()>),
    /// Runs on the host and drives machines of its own.
    Outside(fn(&Outside) -> Result<()>),
}

/// Something that a case can't do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A command.
    Tool(&'static str),
    /// A kernel module, which the case loads itself.
    Module(&'static str),
    /// A feature of the ublk driver, by the name that `vra-ublk features` prints.
    UblkFeature(&'static str),
}

/// The machine that a case wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineNeeds {
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Empty disks, `/dev/vda` first, of these sizes in MiB.
    pub disks_mib: &'static [u64],
    /// libvirtd and QEMU are in it, if this machine has them.
    pub runs_guests: bool,
}

impl MachineNeeds {
    /// 1500 MiB and no disk: what most cases want.
    pub const USUAL: Self = Self { memory_mib: 1500, disks_mib: &[], runs_guests: false };
}

impl Case {
    /// A short case for the usual machine, that needs nothing.
    pub const fn new(name: &'static str, idea: &'static str, body: Body) -> Self {
        Self {
            name,
            idea,
            needs: &[],
            long: false,
            once: false,
            limit_s: 60,
            machine: MachineNeeds::USUAL,
            kernel_log_allowed: &[],
            body,
        }
    }

    /// The same with needs.
    pub const fn needs(mut self, needs: &'static [Need]) -> Self {
        self.needs = needs;
        self
    }

    /// The same with another time limit, seconds.
    pub const fn limit_s(mut self, limit_s: u64) -> Self {
        self.limit_s = limit_s;
        self
    }

    /// The same for `--long` only.
    pub const fn long(mut self) -> Self {
        self.long = true;
        self
    }

    /// The same, on the first kernel alone without `--long`.
    pub const fn once(mut self) -> Self {
        self.once = true;
        self
    }

    /// The same in another machine.
    pub const fn machine(mut self, machine: MachineNeeds) -> Self {
        self.machine = machine;
        self
    }

    /// The same with expected kernel messages.
    pub const fn kernel_log_allowed(mut self, parts: &'static [&'static str]) -> Self {
        self.kernel_log_allowed = parts;
        self
    }
}

/// How a case ended.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Verdict {
    /// It showed its idea.
    Passed,
    /// It did not.
    Failed {
        /// Why.
        reason: String,
    },
    /// It could not run here.
    Skipped {
        /// What is missing.
        reason: String,
    },
}
