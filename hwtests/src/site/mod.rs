//! A small site on one machine, set up as an operator does it: a ZVM, a source VRA and a target VRA as processes of their own, under a
//! folder that holds their configurations, state and logs. The demo and the cases of protected disks use it.

mod answers;
mod configure;
mod disks;
mod process;
mod setup;

pub use answers::{find, time_of};
pub use disks::{DiskAt, Door, RecoveredDisk};
pub use process::{Binaries, Daemon};
pub use setup::Site;

use std::path::PathBuf;

/// Which VRA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where the VMs run.
    Source,
    /// Where their journals are.
    Target,
}

impl Side {
    /// Both, in the order in which they are set up.
    pub const BOTH: [Self; 2] = [Self::Source, Self::Target];

    /// The VRA's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "host-a",
            Self::Target => "host-b",
        }
    }
}

/// A VM with its disks.
#[derive(Clone, Debug)]
pub struct Vm {
    /// Its name.
    pub name: &'static str,
    /// Its UUID.
    pub uuid: String,
    /// The raw files or block devices that hold its disks.
    pub disks: Vec<PathBuf>,
}

/// What may differ between sites.
#[derive(Clone, Debug)]
pub struct SiteSettings {
    /// Where the target keeps journals and recovery disks; none is a folder of the site's.
    pub datastore: Option<PathBuf>,
    /// Memory for guest data of each VRA, in MiB.
    pub arena_mib: u32,
    /// Retained writes of a VM at most, in MiB.
    pub retained_per_vm_mib: u32,
    /// Space that a view's writes may use, for each disk, in MiB.
    pub scratch_mib: u32,
    /// Queues of a ublk device.
    pub queues: u16,
    /// A relay lies between the VRAs, see [`Site::cut`].
    pub relayed: bool,
}

impl SiteSettings {
    /// Enough for small loads, little enough for the emulator.
    pub const SMALL: Self = Self {
        datastore: None,
        arena_mib: 96,
        retained_per_vm_mib: 32,
        scratch_mib: 1024,
        queues: 1,
        relayed: false,
    };
}
