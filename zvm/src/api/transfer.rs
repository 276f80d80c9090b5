//! Definitions of groups that leave a manager as a file, and come to one.

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vra::api::{ApiError, TimeUs};

use super::VpgSpec;

/// The version of [`VpgExport`]. Raised when an old reader would misunderstand a new writer.
pub const VPG_EXPORT_VERSION: u32 = 1;

/// Definitions of groups, as `zvm vpg export` writes them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VpgExport {
    /// [`VPG_EXPORT_VERSION`] of the writer.
    pub version: u32,
    /// The site that they are of, for people.
    pub site: String,
    /// When they were written.
    pub exported_us: TimeUs,
    /// The groups: target VRAs by their names, VMs by their UUIDs.
    pub vpgs: Vec<VpgSpec>,
}

/// What became of a group that was to be imported.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ImportedVpg {
    /// Its name.
    pub name: String,
    /// How many VMs it has.
    pub vms: usize,
    /// What was done, or would be.
    pub outcome: ImportOutcome,
}

/// What was done with a group, or would be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", content = "value", rename_all = "snake_case")]
pub enum ImportOutcome {
    /// It would be created.
    WouldBeCreated,
    /// It is created; its VRAs get it by this task.
    Created(Uuid),
    /// It is not.
    Refused(ApiError),
}
