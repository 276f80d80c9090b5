//! Groups as users describe them.

use serde::{Deserialize, Serialize};
use vra::api::vpg::{JournalSize, Priority};

use crate::model::recovery::{GroupRecovery, VmRecovery};
use crate::model::vpg::NewDisks;

/// A group to be created, as the user describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VpgSpec {
    /// Its name.
    pub name: String,
    /// For people.
    #[serde(default)]
    pub description: String,
    /// Which group goes first when there is not enough for all.
    #[serde(default)]
    pub priority: Priority,
    /// Name or id of the VRA that keeps the journals.
    pub target: String,
    /// Name of a datastore in the inventory, or the absolute path of a folder at the target.
    pub datastore: String,
    /// Space for each VM's journal, bytes.
    #[serde(default = "defaults::journal_limit_bytes")]
    pub journal_limit_bytes: u64,
    /// The same in percent of the VM's disks; the bytes mean nothing then.
    #[serde(default)]
    pub journal_limit_percent: Option<u32>,
    /// From where on the use of a journal is an alert.
    #[serde(default)]
    pub journal_warning: Option<JournalSize>,
    /// Space that each VM's journal keeps even if the history doesn't need it, bytes.
    #[serde(default)]
    pub journal_minimum_bytes: u64,
    /// How long history is wanted, seconds.
    #[serde(default = "defaults::history_s")]
    pub history_s: u64,
    /// Time between checkpoints, milliseconds.
    #[serde(default = "defaults::checkpoint_interval_ms")]
    pub checkpoint_interval_ms: u32,
    /// Longest time that a checkpoint may hold guests' writes, milliseconds.
    #[serde(default = "defaults::hold_deadline_ms")]
    pub hold_deadline_ms: u32,
    /// The RPO to be warned beyond, seconds.
    #[serde(default = "defaults::rpo_target_s")]
    pub rpo_target_s: u64,
    /// Give up old checkpoints rather than stop replicating when a full sync does not fit the journal.
    #[serde(default = "defaults::give_up_history")]
    pub give_up_history: bool,
    /// Encrypt journals and scratch at rest.
    #[serde(default)]
    pub encrypt: bool,
    /// Remind of a test so many days after the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test_reminder_days: Option<u32>,
    /// What becomes of disks that its VMs get.
    #[serde(default, skip_serializing_if = "NewDisks::is_default")]
    pub new_disks: NewDisks,
    /// How its VMs are to be recovered.
    #[serde(default, skip_serializing_if = "GroupRecovery::is_empty")]
    pub recovery: GroupRecovery,
    /// The VMs.
    pub vms: Vec<VmSpec>,
}

/// What is to be another one of a group. What isn't said stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VpgEdit {
    /// For people.
    #[serde(default)]
    pub description: Option<String>,
    /// Which group goes first when there is not enough for all.
    #[serde(default)]
    pub priority: Option<Priority>,
    /// Remind of a test so many days after the last one.
    #[serde(default)]
    pub test_reminder_days: Option<u32>,
    /// No such reminder any more.
    #[serde(default)]
    pub no_test_reminder: bool,
    /// What becomes of disks that its VMs get.
    #[serde(default)]
    pub new_disks: Option<NewDisks>,
    /// How its VMs are to be recovered, as a whole.
    #[serde(default)]
    pub recovery: Option<RecoveryEdit>,
    /// Disks that aren't protected and aren't meant to be.
    #[serde(default)]
    pub exclude: Vec<DiskName>,
    /// Disks that may be protected again.
    #[serde(default)]
    pub no_exclude: Vec<DiskName>,
    /// Protected disks that are swap from now on.
    #[serde(default)]
    pub swap: Vec<DiskName>,
    /// Those that aren't any more.
    #[serde(default)]
    pub no_swap: Vec<DiskName>,
    /// Although older checkpoints may have to be given up for a full sync that follows.
    #[serde(default)]
    pub give_up_history: bool,
    /// How long history is wanted, seconds.
    #[serde(default)]
    pub history_s: Option<u64>,
    /// Time between checkpoints, milliseconds.
    #[serde(default)]
    pub checkpoint_interval_ms: Option<u32>,
    /// Longest time that a checkpoint may hold guests' writes, milliseconds.
    #[serde(default)]
    pub hold_deadline_ms: Option<u32>,
    /// The RPO to be warned beyond, seconds.
    #[serde(default)]
    pub rpo_target_s: Option<u64>,
    /// When a full sync does not fit the journal, stop replicating rather than give up old checkpoints, or the other way round.
    #[serde(default)]
    pub keep_history: Option<bool>,
    /// Space for each VM's journal.
    #[serde(default)]
    pub journal_limit: Option<JournalSize>,
    /// From where on the use of a journal is an alert.
    #[serde(default)]
    pub journal_warning: Option<JournalSize>,
    /// No such alert any more.
    #[serde(default)]
    pub no_journal_warning: bool,
    /// Space that each VM's journal keeps, bytes.
    #[serde(default)]
    pub journal_minimum_bytes: Option<u64>,
    /// Names or ids of the VMs whose journals these are, and then nothing else may be said; without, all of the group.
    #[serde(default)]
    pub vms: Vec<String>,
}

/// How a group's VMs are to be recovered from now on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecoveryEdit {
    /// What goes for all.
    pub group: GroupRecovery,
    /// Names or ids of VMs, and what goes for each; nothing for those that aren't here.
    #[serde(default)]
    pub vms: Vec<(String, VmRecovery)>,
}

/// A disk of a VM of the inventory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskName {
    /// The VM's name or UUID.
    pub vm: String,
    /// The disk's name within the VM, such as `vdb`.
    pub disk: String,
}

/// A VM of a group to be created.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Its name or UUID in the inventory.
    pub vm: String,
    /// Another target than the group's.
    #[serde(default)]
    pub target: Option<String>,
    /// Another datastore than the group's.
    #[serde(default)]
    pub datastore: Option<String>,
    /// Another journal limit than the group's, bytes.
    #[serde(default)]
    pub journal_limit_bytes: Option<u64>,
    /// Another journal limit than the group's, in percent of the VM's disks.
    #[serde(default)]
    pub journal_limit_percent: Option<u32>,
    /// Another warning threshold than the group's.
    #[serde(default)]
    pub journal_warning: Option<JournalSize>,
    /// Another minimum than the group's, bytes.
    #[serde(default)]
    pub journal_minimum_bytes: Option<u64>,
    /// Names of its disks that are not to be protected.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Names or paths of its disks that are swap.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub swap: Vec<String>,
    /// How it is to be recovered.
    #[serde(default, skip_serializing_if = "VmRecovery::is_empty")]
    pub recovery: VmRecovery,
}

/// What a group gets that its user says nothing of.
pub mod defaults {
    /// 10 GiB.
    pub fn journal_limit_bytes() -> u64 {
        10 << 30
    }

    /// 4 hours.
    pub fn history_s() -> u64 {
        4 * 3_600
    }

    /// 5 seconds.
    pub fn checkpoint_interval_ms() -> u32 {
        5_000
    }

    /// 100 milliseconds.
    pub fn hold_deadline_ms() -> u32 {
        100
    }

    /// Half a minute.
    pub fn rpo_target_s() -> u64 {
        30
    }

    /// Yes: replication is worth more than old checkpoints.
    pub fn give_up_history() -> bool {
        true
    }
}
