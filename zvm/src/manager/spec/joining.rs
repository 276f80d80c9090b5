//! VMs that are to join a group that there is, and those that are to leave it.

use std::collections::{BTreeMap, BTreeSet};

use vra::api::volume::VolumeInfo;
use vra::api::vpg::MAX_VMS_PER_VPG;
use vra::api::{ApiError, ErrorCode, FormerVm, MAX_FORMER_VMS, MemberSince, VraId};

use super::{
    Context, Place, bad, check_sources, described, find_member, member, place, recovery, sources_of, twice,
};
use crate::api::VmSpec;
use crate::model::vpg::{Vpg, VpgSettings};
use crate::model::vra::Vra;

/// VMs whose names have been looked up, still without their disks.
#[derive(Debug)]
pub struct Joining<'a> {
    vpg: &'a Vpg,
    places: Vec<Place<'a>>,
}

/// Looks up every name and checks every limit. What a VM doesn't say is as the group's first VM has it.
pub fn join<'a>(vpg: &'a Vpg, vms: &[VmSpec], context: &Context<'a>) -> Result<Joining<'a>, ApiError> {
    let count = vpg.settings.vms.len() + vms.len();
    if vms.is_empty() || count > MAX_VMS_PER_VPG {
        return Err(bad(format!(
            "{} VMs are to join VPG {:?}, which would have {count} then; at least one, and {MAX_VMS_PER_VPG} in all are possible",
            vms.len(),
            vpg.name
        )));
    }
    let group = described(vpg, |vra| vra.to_string());
    let places = vms.iter().map(|vm| place(&group, vm, context)).collect::<Result<Vec<_>, _>>()?;
    twice(&places)?;
    let sources = vpg.sources().into_iter().chain(places.iter().map(|place| place.source.id)).collect();
    check_sources(&vpg.name, (group.checkpoint_interval_ms, group.hold_deadline_ms), &sources)?;
    Ok(Joining { vpg, places })
}

impl Joining<'_> {
    /// The VRAs that serve their disks.
    pub fn sources(&self) -> BTreeMap<VraId, &Vra> {
        sources_of(&self.places)
    }

    /// The group's settings with them, their disks found among those that each source serves now.
    pub fn into_settings(self, served: &BTreeMap<VraId, Vec<VolumeInfo>>) -> Result<VpgSettings, ApiError> {
        let mut settings = with_next_member_set(self.vpg)?;
        let since = MemberSince(settings.member_set_version);
        for place in &self.places {
            settings.vms.push(member(place, served, since)?);
        }
        recovery::check_together(&self.vpg.name, &settings)?;
        Ok(settings)
    }
}

/// The group's settings without these VMs, by name or id; its targets are told whether to keep their files.
pub fn without(vpg: &Vpg, vms: &[String], keep_files: bool) -> Result<VpgSettings, ApiError> {
    let mut settings = with_next_member_set(vpg)?;
    let mut leaving = BTreeSet::new();
    for name in vms {
        leaving.insert(find_member(vpg, name)?.vm);
    }
    settings.vms.retain(|member| !leaving.contains(&member.vm));
    if leaving.is_empty() || settings.vms.is_empty() {
        let message = format!("VPG {:?} must keep at least one VM, and at least one is to leave", vpg.name);
        return Err(bad(message).remedy(format!("`zvm vpg delete {}` ends the whole group", vpg.name)));
    }
    let left = vpg.settings.vms.iter().filter(|member| leaving.contains(&member.vm));
    settings.former.extend(left.map(|member| FormerVm {
        id: member.vm,
        name: member.name.clone(),
        journal: member.journal,
        target: member.target,
        datastore: member.datastore.clone(),
        keep_files,
        revision: vpg.revision + 1,
    }));
    if settings.former.len() > MAX_FORMER_VMS {
        let message = format!(
            "{} VMs have left VPG {:?}, and not all of its VRAs have heard of it",
            settings.former.len(),
            vpg.name
        );
        return Err(ApiError::new(ErrorCode::Busy, message)
            .remedy("wait until all have: `zvm status` shows who doesn't answer"));
    }
    Ok(settings)
}

pub(super) fn with_next_member_set(vpg: &Vpg) -> Result<VpgSettings, ApiError> {
    let next = vpg.settings.member_set_version.checked_add(1);
    let next =
        next.ok_or_else(|| bad(format!("the members of VPG {:?} were changed too often", vpg.name)))?;
    Ok(VpgSettings { member_set_version: next, ..vpg.settings.clone() })
}
