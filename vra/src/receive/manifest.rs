//! What a journal says of its VM.

use std::collections::{BTreeMap, BTreeSet};
use std::iter;

use journal::format::Superblock;
use serde::{Deserialize, Serialize};

use super::checkpoint_list::ListedCheckpoint;
use crate::api::{
    CheckpointId, TimeUs, VmId,
    vpg::{CheckpointKind, VmDefinition, VpgDefinition},
};

/// What a journal's manifest says: enough to recover the VM from its folder alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this text's form: 1.
    pub version: u32,
    /// Version of the software that wrote it.
    pub written_by: String,
    /// Which VM of the group the journal is for.
    pub vm: VmId,
    /// Names of the recovery disks' files in the journal's folder, by volume number.
    pub disks: Vec<String>,
    /// Where each disk's history begins, by volume number, as in the superblock when the last of them joined; empty as long as none has.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bases: Vec<u64>,
    /// Disks that are protected no more, by volume number: the first number at which the VM didn't have them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub left: BTreeMap<u16, u64>,
    /// The recovery disks' space is reserved.
    pub disks_reserved: bool,
    /// The whole group, as last defined.
    pub vpg: VpgDefinition,
    /// Checkpoints that are kept when they grow older than the history.
    #[serde(default)]
    pub locked: Vec<LockedCheckpoint>,
}

/// A checkpoint that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockedCheckpoint {
    /// Which one.
    pub checkpoint: CheckpointId,
    /// A view of it is a view at this number.
    pub cut: u64,
    /// When it was taken, by the coordinator's clock.
    pub time_us: TimeUs,
    /// The members it was taken over.
    #[serde(default)]
    pub member_set_version: u32,
    /// Why it was taken.
    #[serde(default)]
    pub kind: CheckpointKind,
    /// Its name, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<Box<str>>,
}

impl From<&ListedCheckpoint> for LockedCheckpoint {
    fn from(listed: &ListedCheckpoint) -> Self {
        let ListedCheckpoint { time_us, id: checkpoint, cut, member_set_version, kind, ref tag } = *listed;
        Self { checkpoint, cut, time_us, member_set_version, kind, tag: tag.clone() }
    }
}

/// Why a manifest's text can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is not JSON of this form.
    #[error("the journal's manifest is not what this software writes")]
    Form(#[source] serde_json::Error),
    /// A newer release wrote it.
    #[error("the journal's manifest has version {0}: use the release that wrote it")]
    Version(u32),
    /// The group has no such VM.
    #[error("the journal's manifest names VM {0}, which its group doesn't have")]
    NoVm(VmId),
}

impl Manifest {
    /// For one VM of a group.
    pub fn new(vpg: &VpgDefinition, vm: VmId, disk_count: usize, disks_reserved: bool) -> Self {
        Self {
            version: 1,
            written_by: env!("CARGO_PKG_VERSION").to_owned(),
            vm,
            disks: disk_names(disk_count),
            bases: Vec::new(),
            left: BTreeMap::new(),
            disks_reserved,
            vpg: vpg.clone(),
            locked: Vec::new(),
        }
    }

    /// Reads it.
    ///
    /// # Errors
    /// The text is of a newer release, or not a manifest.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        let head: Head = serde_json::from_str(text).map_err(ManifestError::Form)?;
        if head.version != 1 {
            return Err(ManifestError::Version(head.version));
        }
        let manifest: Self = serde_json::from_str(text).map_err(ManifestError::Form)?;
        manifest.vm().map(drop)?;
        Ok(manifest)
    }

    /// Its text.
    pub fn to_text(&self) -> String {
        serde_json::to_string_pretty(self).expect("ids, names and numbers always have a JSON form")
    }

    /// The same under another definition of the group, written by this software.
    pub fn redefined(&self, vpg: &VpgDefinition) -> Self {
        Self { written_by: env!("CARGO_PKG_VERSION").to_owned(), vpg: vpg.clone(), ..self.clone() }
    }

    /// Notes that `count` disks join those whose history begins at `bases`; theirs does at `base_seq`.
    pub fn add_disks(&mut self, bases: impl IntoIterator<Item = u64>, count: usize, base_seq: u64) {
        self.bases = bases.into_iter().chain(iter::repeat_n(base_seq, count)).collect();
        self.disks = disk_names(self.bases.len());
    }

    /// Notes which disks the definition has no more: those that it had until now are gone from number `from_seq` on.
    pub fn note_left(&mut self, definition: &VmDefinition, from_seq: u64) {
        for volume in definition.volumes.iter().filter(|volume| volume.left) {
            self.left.entry(volume.number).or_insert(from_seq);
        }
    }

    /// Forgets locks of checkpoints that can't be opened any more: the history was given up and that could not be noted here. Those that have
    /// overlays may be older than the history. Gives those that should be there.
    pub fn forget_stale_locks(
        &mut self,
        superblock: &Superblock,
        overlays: &BTreeSet<u64>,
    ) -> Vec<LockedCheckpoint> {
        if superblock.state.is_base_sync() {
            self.locked.clear();
            return Vec::new();
        }
        let is_stale = |locked: &mut LockedCheckpoint| {
            locked.cut < superblock.oldest_seq() && !overlays.contains(&locked.cut)
        };
        self.locked.extract_if(.., is_stale).collect()
    }

    /// The VM's definition.
    ///
    /// # Errors
    /// The group has no such VM.
    pub fn vm(&self) -> Result<&VmDefinition, ManifestError> {
        self.vpg.vms.iter().find(|vm| vm.id == self.vm).ok_or(ManifestError::NoVm(self.vm))
    }
}

fn disk_names(count: usize) -> Vec<String> {
    (0..count).map(|volume| format!("disk-{volume}.raw")).collect()
}
