//! Disks as they were.

use serde::{Deserialize, Serialize};

use super::{CheckpointId, CheckpointInfo, DoorAddress, DoorRequest, TimeUs, ViewId, VmId, VolumeId, VpgId};

/// Opens all disks of a VPG, or of one VM, as they were at a moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenView {
    /// Whose disks.
    pub subject: ViewSubject,
    /// As of when.
    pub at: PointInTime,
    /// Whether they can be written.
    pub mode: ViewMode,
    /// How they are offered. A unix socket or TCP address of the caller's choice is for a single disk only.
    pub door: DoorRequest,
    /// The id of the view to make, so that a repeated request doesn't open a second one; by default a new id.
    #[serde(default)]
    pub view: Option<ViewId>,
    /// What it is for, for people.
    #[serde(default)]
    pub label: Option<String>,
}

/// Whose disks a view shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ViewSubject {
    /// All VMs of a VPG.
    Vpg {
        /// The VPG.
        vpg: VpgId,
    },
    /// One VM.
    Vm {
        /// The VM.
        vm: VmId,
    },
}

/// A moment in a journal's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum PointInTime {
    /// The newest complete checkpoint.
    Latest,
    /// A checkpoint by its id.
    Checkpoint {
        /// Its id.
        checkpoint: CheckpointId,
    },
    /// The newest complete checkpoint at or before a time (D4).
    Time {
        /// The time, by the coordinator's clock.
        time_us: TimeUs,
    },
    /// A sequence number; of a single VM only (D4).
    Sequence {
        /// The last sequence number that the view shows.
        sequence: u64,
    },
}

/// Whether a view can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ViewMode {
    /// Writes are refused.
    ReadOnly,
    /// Writes go to scratch files in the datastore, which outlive a restart and are deleted when the view is closed.
    Scratch,
}

/// An open view.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewInfo {
    /// Its id.
    pub view: ViewId,
    /// The VPG.
    pub vpg: VpgId,
    /// What it is for.
    pub label: Option<String>,
    /// The checkpoint it shows; none for a view at a sequence number.
    pub checkpoint: Option<CheckpointInfo>,
    /// Whether it can be written.
    pub mode: ViewMode,
    /// When it was opened.
    pub opened_us: TimeUs,
    /// How long opening took, in microseconds.
    pub open_duration_us: u64,
    /// Its disks, by VM and number.
    pub disks: Vec<ViewDiskInfo>,
    /// Why disks of it are not there, after a restart of the VRA.
    #[serde(default)]
    pub problem: Option<String>,
}

/// A disk of a view.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewDiskInfo {
    /// Its VM.
    pub vm: VmId,
    /// Its VM's name.
    pub vm_name: String,
    /// The volume it shows.
    pub volume: VolumeId,
    /// The volume's number in the VM.
    pub number: u16,
    /// Size in bytes.
    pub size_bytes: u64,
    /// The last sequence number that it shows.
    pub sequence: u64,
    /// Where it is.
    pub door: DoorAddress,
}
