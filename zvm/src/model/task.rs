//! User actions that take time, with their progress.

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vra::api::{TimeUs, VpgId};

use super::named;

/// A user's action.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Its id.
    pub id: Uuid,
    /// What kind of action.
    pub kind: TaskKind,
    /// How it stands.
    pub state: TaskState,
    /// 0 to 100.
    pub progress_percent: u8,
    /// What it is doing or waiting for; at the end, how it ended.
    pub step: String,
    /// What it is about, for people.
    pub subject: String,
    /// The group it is about.
    pub vpg: Option<VpgId>,
    /// When it began.
    pub started_us: TimeUs,
    /// When it ended.
    pub completed_us: Option<TimeUs>,
}

named! {
    /// Kinds of actions; names of TaskTypes.
    TaskKind {
        /// A group is created.
        CreateProtectionGroup = "CreateProtectionGroup",
        /// A group is deleted.
        RemoveProtectionGroup = "RemoveProtectionGroup",
        /// VMs are added to a group.
        AddVm = "AddVMToProtectionGroup",
        /// Disks of a group's VMs are protected that weren't, or no more.
        ChangeDisks = "UpdateProtectionGroup",
        /// VMs are taken out of a group.
        RemoveVm = "RemoveVMFromProtectionGroup",
        /// Full syncs are begun.
        InitFullSync = "InitFullSync",
        /// A group's disks are opened for a test.
        FailOverTest = "FailOverTest",
        /// A test is ended.
        StopFailOverTest = "StopFailOverTest",
        /// A checkpoint is named.
        InsertTaggedCp = "InsertTaggedCP",
        /// A VRA is revoked.
        UninstallVra = "UninstallVra",
    }
}

impl TaskKind {
    /// Those that are done when all VRAs of a group have its newest definition.
    pub const OF_DEFINITIONS: [Self; 4] =
        [Self::CreateProtectionGroup, Self::AddVm, Self::ChangeDisks, Self::RemoveVm];
}

named! {
    /// How a task stands; names of TaskStates.
    TaskState {
        /// Not ended.
        InProgress = "InProgress",
        /// Ended without success.
        Failed = "Failed",
        /// Ended as intended.
        Completed = "Completed",
    }
}
