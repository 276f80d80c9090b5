//! Disks that join or leave the protection of a group's VMs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use vra::api::volume::VolumeInfo;
use vra::api::vpg::VolumeDefinition;
use vra::api::{ApiError, ErrorCode, VolumeId, VraId};

use super::editing::find_vm;
use super::joining::with_next_member_set;
use super::{Context, bad, check_journal, find_member, set_swap, volumes_of};
use crate::api::DiskName;
use crate::inventory::{Inventory, Vm};
use crate::model::vpg::{ExcludedDisk, Member, Vpg, VpgSettings};
use crate::model::vra::Vra;

/// The group's settings without these disks, which the inventory may have or not. Those that are `in_no_journal`, and that no other disk was
/// numbered after, are gone then; the others have left.
pub fn without_disks(
    vpg: &Vpg,
    disks: &[DiskName],
    inventory: &Inventory,
    in_no_journal: &BTreeSet<VolumeId>,
) -> Result<VpgSettings, ApiError> {
    let mut settings = with_next_member_set(vpg)?;
    for DiskName { vm, disk } in disks {
        let id = find_member(vpg, vm)?.vm;
        let Some(member) = settings.vms.iter_mut().find(|member| member.vm == id) else { continue };
        // Whoever takes a disk from a VM may take it from the inventory first: then its path is its name.
        let in_inventory = find_vm(inventory, member).ok().and_then(|vm| {
            vm.disks.iter().find(|known| known.name == *disk || known.path.as_os_str() == disk.as_str())
        });
        let path = in_inventory.map_or_else(|| PathBuf::from(disk), |known| known.path.clone());
        let protected = member.volumes.iter().filter(|volume| !volume.left);
        let known: Vec<String> =
            protected.clone().map(|volume| volume.source_path.display().to_string()).collect();
        if !protected.clone().any(|volume| volume.source_path == path) {
            let message = format!("VM {:?} has no protected disk {disk:?}", member.name);
            return Err(ApiError::new(ErrorCode::NotFound, message)
                .remedy(format!("name it as the inventory does, or by its path: {}", known.join(", "))));
        }
        if known.len() == 1 {
            let message = format!("{} is the only protected disk of VM {:?}", path.display(), member.name);
            return Err(ApiError::new(ErrorCode::Unsupported, message)
                .remedy(format!("take the VM out: `zvm vpg remove-vm {} {}`", vpg.name, member.name)));
        }
        for volume in member.volumes.iter_mut().filter(|volume| volume.source_path == path) {
            volume.left = true;
        }
        if member.volumes.iter().all(|volume| volume.left || volume.swap) {
            let message = format!("only swap disks of VM {:?} would be left", member.name);
            return Err(ApiError::new(ErrorCode::Unsupported, message)
                .remedy(format!("take the VM out: `zvm vpg remove-vm {} {}`", vpg.name, member.name)));
        }
        while member.volumes.pop_if(|last| last.left && in_no_journal.contains(&last.id)).is_some() {}
        if let Some(known) = in_inventory {
            member.excluded.retain(|excluded| excluded.name != known.name);
            member.excluded.push(ExcludedDisk { name: known.name.clone(), path });
        }
    }
    Ok(settings)
}

/// The members whose disks these are.
pub fn members_of<'a>(vpg: &'a Vpg, disks: &[DiskName]) -> Result<Vec<&'a Member>, ApiError> {
    disks.iter().map(|disk| find_member(vpg, &disk.vm)).collect()
}

/// Members whose VMs may have more disks than are protected, still without those.
#[derive(Debug)]
pub struct Growing<'a> {
    vpg: &'a Vpg,
    members: Vec<(&'a Member, &'a Vm, &'a Vra)>,
}

/// Looks up members, by name or id.
pub fn grow<'a>(vpg: &'a Vpg, vms: &[String], context: &Context<'a>) -> Result<Growing<'a>, ApiError> {
    let mut members: Vec<(&Member, &Vm, &Vra)> = Vec::with_capacity(vms.len());
    for name in vms {
        let member = find_member(vpg, name)?;
        let source = context.vras.get(&member.source).ok_or_else(|| {
            let message =
                format!("the certificate of the VRA at the host of VM {:?} is revoked", member.name);
            ApiError::new(ErrorCode::Conflict, message)
                .remedy("take the VM out of the group, and add it again at a VRA that is enrolled")
        })?;
        if !members.iter().any(|(known, ..)| known.vm == member.vm) {
            members.push((member, find_vm(context.inventory, member)?, source));
        }
    }
    Ok(Growing { vpg, members })
}

impl Growing<'_> {
    /// The VRAs that serve their disks.
    pub fn sources(&self) -> BTreeMap<VraId, &Vra> {
        self.members.iter().map(|(_, _, source)| (source.id, *source)).collect()
    }

    /// The group's settings with all disks that the inventory has, found among those that each source serves now, and how many were added.
    pub fn into_settings(
        self,
        served: &BTreeMap<VraId, Vec<VolumeInfo>>,
    ) -> Result<(VpgSettings, usize), ApiError> {
        let mut settings = with_next_member_set(self.vpg)?;
        let mut added = 0;
        for (member, vm, source) in self.members {
            let left: Vec<VolumeDefinition> =
                member.volumes.iter().filter(|volume| volume.left).cloned().collect();
            let mut volumes = volumes_of(vm, source, &member.excluded, &left, served)?;
            for volume in member.volumes.iter().filter(|volume| volume.swap && !volume.left) {
                set_swap(&mut volumes, &member.name, &volume.source_path, true)?;
            }
            if !volumes.starts_with(&member.volumes) {
                let message =
                    format!("disks of VM {:?} that are protected are gone or have changed", member.name);
                return Err(ApiError::new(ErrorCode::Conflict, message).remedy(
                    "correct the inventory, or take the VM out of the group and add it again: its journal begins anew then",
                ));
            }
            if volumes.len() == member.volumes.len() {
                return Err(bad(format!(
                    "VM {:?} has no disk in the inventory that isn't protected or excluded",
                    member.name
                ))
                .remedy(format!(
                    "add the disk to the inventory, and attach it with `vra attach` on its host; for one that is excluded `zvm vpg edit {} --no-exclude {}:DISK`",
                    self.vpg.name, member.name
                )));
            }
            added += volumes.len() - member.volumes.len();
            check_journal(&member.name, &member.journal_size, Some(&volumes))?;
            if let Some(changed) = settings.vms.iter_mut().find(|changed| changed.vm == member.vm) {
                changed.volumes = volumes;
            }
        }
        Ok((settings, added))
    }
}
