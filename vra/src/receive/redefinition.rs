//! Whether a VM's files can follow another definition of its group. What is refused is refused here, before the definition is in force.

use std::path::PathBuf;

use journal::format::manifest::MAX_MANIFEST_BYTES;

use super::files;
use super::manifest::Manifest;
use super::receiver_types::VmIdentity;
use super::target_error::TargetError;
use crate::api::VmId;
use crate::api::vpg::{VmDefinition, VpgDefinition};
use crate::wire::VolumeShape;

/// A VM's files as they are.
pub(super) struct Present<'a> {
    pub(super) manifest: &'a Manifest,
    pub(super) identity: &'a VmIdentity,
    /// Where each volume's history begins.
    pub(super) bases: &'a [u64],
    /// Length of a slot of the journal, in bytes.
    pub(super) slot_bytes: u64,
    /// The journal's file.
    pub(super) journal: PathBuf,
}

/// What a definition needs of recovery disks that a VM's files don't have.
#[derive(Debug)]
pub(super) struct Wanted {
    /// Volumes that join.
    pub(super) added: Vec<VolumeShape>,
    /// Volumes that there are, and that are larger in the definition (E3).
    pub(super) grown: Vec<VolumeShape>,
}

impl Present<'_> {
    /// What is to be made for the volumes that join or grow; of the others some may leave.
    ///
    /// # Errors
    /// The definition is of another journal or other volumes, or asks for what the journal can't do.
    pub(super) fn check(&self, vpg: &VpgDefinition) -> Result<Wanted, TargetError> {
        let definition = definition_in(vpg, self.identity.vm)?;
        let wanted = files::identity(definition)?;
        let path = || self.journal.clone();
        if wanted.journal != self.identity.journal {
            let (found, expected) = (self.identity.journal, wanted.journal);
            return Err(TargetError::JournalDiffers { path: path(), found, expected });
        }
        let added = self.identity.volumes_added_in(&wanted);
        if added.is_empty() && !self.identity.may_become(&wanted.volumes) {
            let vm = self.identity.vm;
            let lacking = self.identity.volumes.get(wanted.volumes.len()).map(|volume| volume.volume);
            let mut both = self.identity.volumes.iter().zip(&wanted.volumes);
            let shrunk = both.find(|(known, wanted)| known.size_bytes > wanted.size_bytes);
            return Err(match (lacking, shrunk) {
                (Some(volume), _) => TargetError::VolumeLacking { vm, volume, path: path() },
                (None, Some((known, wanted))) => TargetError::VolumeShrunk {
                    vm,
                    volume: known.volume,
                    known_bytes: known.size_bytes,
                    wanted_bytes: wanted.size_bytes,
                },
                (None, None) => TargetError::VolumesDiffer { vm, path: path() },
            });
        }
        files::check_limit(definition.journal_limit(), self.slot_bytes)?;
        // As long as the manifest can get by that: the numbers aren't known yet.
        let mut manifest = self.manifest.redefined(vpg);
        if !added.is_empty() {
            manifest.add_disks(self.bases.iter().copied(), added.len(), u64::MAX);
        }
        manifest.note_left(definition, u64::MAX);
        check_length(&manifest)?;
        let grown = self.identity.volumes_grown_in(&wanted.volumes).copied().collect();
        Ok(Wanted { added: added.to_vec(), grown })
    }
}

/// A VM's definition in that of its group.
pub(super) fn definition_in(vpg: &VpgDefinition, vm: VmId) -> Result<&VmDefinition, TargetError> {
    let definition = vpg.vms.iter().find(|candidate| candidate.id == vm);
    definition.ok_or(TargetError::Definition("the VM is not in the group"))
}

/// A manifest that doesn't fit would be lost, and with it that a disk has left.
fn check_length(manifest: &Manifest) -> Result<(), TargetError> {
    if manifest.to_text().len() > MAX_MANIFEST_BYTES {
        return Err(TargetError::Definition(
            "the group's definition is too long for the manifest of its journals: unlock checkpoints, or divide the group",
        ));
    }
    Ok(())
}
