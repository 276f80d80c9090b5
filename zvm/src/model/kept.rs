//! Settings that are the manager's alone, as VRAs and journals keep them for it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use vra::api::VmId;

use super::recovery::{GroupRecovery, VmRecovery};
use super::vpg::{ExcludedDisk, NewDisks, VpgSettings};

/// Longest JSON text of a group's, bytes: with it the definition of a large group still fits the manifest of its journals.
pub const MAX_KEPT_BYTES: usize = 48 << 10;

/// What VRAs have no use for, and `zvm rebuild` brings back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptSettings {
    /// Remind of a test so many days after the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test_reminder_days: Option<u32>,
    /// What becomes of disks that its VMs get.
    #[serde(default, skip_serializing_if = "NewDisks::is_default")]
    pub new_disks: NewDisks,
    /// How its VMs are to be recovered.
    #[serde(default, skip_serializing_if = "GroupRecovery::is_empty")]
    pub recovery: GroupRecovery,
    /// What each VM has of its own; those that have nothing aren't here.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub vms: BTreeMap<VmId, KeptMember>,
}

/// What one VM has of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptMember {
    /// How it is to be recovered.
    #[serde(default, skip_serializing_if = "VmRecovery::is_empty")]
    pub recovery: VmRecovery,
    /// Disks that aren't protected.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub excluded: Vec<ExcludedDisk>,
}

impl KeptSettings {
    /// Those of a group.
    pub fn of(settings: &VpgSettings) -> Self {
        let own = settings.vms.iter().map(|member| {
            let kept = KeptMember { recovery: member.recovery.clone(), excluded: member.excluded.clone() };
            (member.vm, kept)
        });
        Self {
            test_reminder_days: settings.test_reminder_days,
            new_disks: settings.new_disks,
            recovery: settings.recovery.clone(),
            vms: own.filter(|(_, kept)| *kept != KeptMember::default()).collect(),
        }
    }

    /// As VRAs keep them.
    pub fn to_json(&self) -> serde_json::Value {
        match *self == Self::default() {
            true => serde_json::Value::Null,
            false => serde_json::to_value(self).expect("names, numbers and addresses have a JSON form"),
        }
    }

    /// From what VRAs kept.
    ///
    /// # Errors
    /// Another manager wrote it.
    pub fn from_json(value: &serde_json::Value) -> Result<Self, serde_json::Error> {
        if value.is_null() { Ok(Self::default()) } else { Self::deserialize(value) }
    }
}
