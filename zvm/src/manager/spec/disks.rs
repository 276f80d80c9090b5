//! Disks that VMs of a group have got since they joined it.

use std::collections::BTreeMap;

use vra::api::volume::VolumeInfo;
use vra::api::{ApiError, ErrorCode, VraId};

use super::editing::find_vm;
use super::joining::with_next_member_set;
use super::{Context, bad, check_journal, find_member, volumes_of};
use crate::inventory::Vm;
use crate::model::vpg::{Member, Vpg, VpgSettings};
use crate::model::vra::Vra;

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
            let volumes = volumes_of(vm, source, &member.excluded, served)?;
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
                .remedy("add the disk to the inventory, and attach it with `vra attach` on its host"));
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
