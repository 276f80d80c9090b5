//! Protected disks of this host.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{DoorAddress, DoorRequest, VmId, VolumeId, VpgId};

/// Most volumes of one VM.
pub const MAX_VOLUMES_PER_VM: usize = 64;

/// Longest name of a VM, VPG or tag, in bytes of UTF-8.
pub const MAX_NAME_BYTES: usize = 128;

/// Whether a name, or a tag, which may be empty, is text of no more than [`MAX_NAME_BYTES`].
pub fn is_text(name: &str) -> bool {
    name.len() <= MAX_NAME_BYTES && !name.chars().any(char::is_control)
}

/// Serves a raw file or block device as a protected volume. The same disk for the same VM again answers with the volume at hand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// The VM it belongs to.
    pub vm: VmId,
    /// The VM's name, for people.
    pub vm_name: String,
    /// The volume's id, by default that of the volume which a VPG protects under this number and which isn't attached, else a new one.
    #[serde(default)]
    pub volume: Option<VolumeId>,
    /// The volume's number in its VM, by default that of the only volume which a VPG protects and which isn't attached, else the lowest free one.
    #[serde(default)]
    pub number: Option<u16>,
    /// Absolute path of the raw file or block device.
    pub path: PathBuf,
    /// How the guest gets it.
    pub door: DoorRequest,
    /// Take a disk whose first bytes look like an image format as raw.
    #[serde(default)]
    pub force_raw: bool,
    /// Several VRAs serve the disk, of which one at a time lets its guest write: for a file that their hosts share. With the NBD door.
    #[serde(default)]
    pub shared: Option<SharedRole>,
}

/// What a VRA is to a disk that several serve, when it is attached. Later the disk goes to whoever's guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SharedRole {
    /// It owns the disk.
    Owner,
    /// Another VRA owns it, and its volume's id and number are these.
    Standby,
}

/// What a VRA is to a disk that several serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SharedState {
    /// Its guest may write.
    Owner,
    /// Its guest may read.
    Standby,
    /// Its guest's writes wait until another VRA lets go of the disk.
    Waiting,
    /// A state of a newer VRA.
    #[serde(other)]
    Other,
}

/// Stops serving a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detach {
    /// Which one.
    pub volume: VolumeId,
    /// Also when a VPG protects it: its VM's protection then waits until it is attached again.
    #[serde(default)]
    pub force: bool,
}

/// An attached volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// Its id.
    pub volume: VolumeId,
    /// Its VM.
    pub vm: VmId,
    /// Its VM's name.
    pub vm_name: String,
    /// Its number in the VM.
    pub number: u16,
    /// The raw file or block device.
    pub path: PathBuf,
    /// Size in bytes.
    pub size_bytes: u64,
    /// What the local disk has now, in bytes, if that is more: its guest gets it once the VPG's definition says so.
    #[serde(default)]
    pub grown_bytes: Option<u64>,
    /// Logical block size, 512 or 4096.
    pub logical_block_bytes: u32,
    /// The VPG that protects it, if any.
    pub vpg: Option<VpgId>,
    /// The open door; none while it can't be served, for the reason in `problem`.
    pub door: Option<DoorAddress>,
    /// Of a ublk device: a path in `/dev` that is this volume's alone and leads to it, as long as it is served. Numbers of devices are given anew.
    #[serde(default)]
    pub link: Option<PathBuf>,
    /// Why it isn't served, for people.
    pub problem: Option<String>,
    /// What this VRA is to it, if several serve it.
    #[serde(default)]
    pub shared: Option<SharedState>,
}

impl VolumeInfo {
    /// Where a guest's definition may say that the disk is: an address that is never another disk's. None while there is none.
    pub fn device(&self) -> Option<DoorAddress> {
        match self.door.clone()? {
            DoorAddress::Ublk { device, .. } => Some(DoorAddress::Ublk { device, path: self.link.clone()? }),
            nbd => Some(nbd),
        }
    }
}
