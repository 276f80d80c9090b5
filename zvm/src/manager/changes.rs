//! Whether a change of a group would reach its VRAs.

use std::collections::BTreeSet;

use vra::api::{ApiError, ErrorCode, VraId};

use super::{Manager, internal};
use crate::conditions::newer_remedy;
use crate::model::vpg::{Member, Vpg};
use crate::reconcile::newer_at;

impl Manager {
    /// Refuses what a group is to be if some of its VRAs are revoked: its definition can't be told to anybody then.
    pub(super) async fn check_members_are_enrolled(&self, after: &Vpg) -> Result<(), ApiError> {
        let vras = self.desired().await.map_err(internal)?.vras;
        let Some(vra) = after.vras().into_iter().find(|vra| !vras.contains_key(vra)) else { return Ok(()) };
        let names = self.vra_names().await?;
        let name = names.get(&vra).cloned().unwrap_or_else(|| vra.to_string());
        let is_there = |vm: &&Member| vm.source == vra || vm.target == vra;
        let vms: Vec<&str> =
            after.settings.vms.iter().filter(is_there).map(|member| member.name.as_str()).collect();
        let message =
            format!("VRA {name} of VPG {} is revoked: no change of the group reaches its VRAs", after.name);
        Err(ApiError::new(ErrorCode::NotReady, message).remedy(format!(
            "take out the VMs that have a part there first, `zvm vpg remove-vm {0} {1}`, or delete the group",
            after.name,
            vms.join(" ")
        )))
    }

    /// Refuses to change a group of which VRAs have a definition that the manager doesn't have, whose database is an older one: what they have
    /// would be undone.
    pub(super) async fn check_is_newest(&self, vpg: &Vpg) -> Result<(), ApiError> {
        let newer: BTreeSet<VraId> = newer_at(vpg, &self.observed()).into_keys().collect();
        if newer.is_empty() {
            return Ok(());
        }
        let names = self.vra_names().await?;
        let names: Vec<&str> = newer.iter().filter_map(|vra| names.get(vra)).map(String::as_str).collect();
        let message = format!(
            "VRA {} has a definition of VPG {} that this manager doesn't have, whose database is an older one",
            names.join(", "),
            vpg.name
        );
        Err(ApiError::new(ErrorCode::Stale, message).remedy(newer_remedy(&vpg.name)))
    }
}
