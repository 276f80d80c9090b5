//! VRAs in the way of VMs' disks: what is asked and answered.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vra::api::VolumeId;

/// How a guest gets its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DoorChoice {
    /// As a ublk device where the host has ublk, else over NBD.
    Auto,
    /// As a ublk device.
    Ublk,
    /// Over NBD.
    Nbd,
}

/// Disks that are served now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmProtected {
    /// The VM's name.
    pub vm: String,
    /// Its disks that are served.
    pub disks: Vec<ServedDisk>,
    /// The guest runs, and uses them from its next start on.
    pub at_next_start: bool,
    /// Names of the VRAs that serve them, too.
    #[serde(default)]
    pub also_on: Vec<String>,
}

/// A disk that is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServedDisk {
    /// Its name in the VM.
    pub disk: String,
    /// The disk itself.
    pub path: PathBuf,
    /// What the guest gets in its place.
    pub device: String,
    /// The VRA's volume.
    pub volume: VolumeId,
}

/// Disks that are the VM's own again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmUnprotected {
    /// The VM's name.
    pub vm: String,
    /// The names of the disks.
    pub disks: Vec<String>,
    /// The guest runs, and uses them from its next start on; until then they are served.
    pub at_next_start: bool,
}
