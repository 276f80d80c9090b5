//! Groups of which VRAs have a newer definition than the manager: it is taken over from them.

use uuid::Uuid;
use vra::api::{ApiError, ErrorCode, VpgDefinition};

use super::{Manager, changed_meanwhile, internal};
use crate::api::VpgDetails;
use crate::model::event::{Entity, EventKind};
use crate::model::kept::KeptSettings;
use crate::model::vpg::{Vpg, VpgState};
use crate::model::vra::Vra;
use crate::rebuild::vpg_of;
use crate::reconcile::{Desired, Leftover, newer_at};
use crate::store::{self, StoreError};

impl Manager {
    /// Makes the newest definition that VRAs have of a group, and the manager's database doesn't, the manager's own. A VRA is believed only in a
    /// group that it is a member of.
    pub async fn adopt_vpg(&self, name: &str) -> Result<VpgDetails, ApiError> {
        let vpg = self.find_vpg(name).await?;
        let desired = self.desired().await.map_err(internal)?;
        let newest = self.newest_definition(&vpg, &desired).await?;
        check_adoptable(&vpg, &newest, &desired)?;
        let kept = newest.notes.as_ref().map(|notes| KeptSettings::from_json(&notes.settings));
        let kept = kept.transpose().map_err(|error| {
            let message = format!("the settings of VPG {} can't be read: {error}", vpg.name);
            ApiError::new(ErrorCode::Unsupported, message)
                .remedy("run a manager of the release that wrote them")
        })?;
        let after = vpg_of(&newest, kept.unwrap_or_default(), vpg.applied_revision, vpg.created_us);
        let mut after = after.ok_or_else(|| {
            ApiError::new(ErrorCode::Corrupt, format!("the newest definition of VPG {} has no VMs", vpg.name))
        })?;
        // Addresses that the manager has noted otherwise go out with the next revision, and so does what other VRAs have with other content.
        let is_as_told = after.definition(|vra| desired.vras.get(&vra)).as_ref() == Some(&newest);
        if !is_as_told || newest.revision == vpg.revision {
            after.revision += 1;
            after.stamp = Some(Uuid::new_v4());
        }
        let members = after.vras();
        let gone =
            vpg.vras().into_iter().filter(|vra| !members.contains(vra) && desired.vras.contains_key(vra));
        let left = gone.map(|vra| {
            // What isn't said stays.
            let keep_files = after.keeps_files_at(vra) || after.former_revision_at(vra).is_none();
            Leftover { vpg: vpg.id, vra, keep_files }
        });
        let left: Vec<Leftover> = left.collect();
        let description = format!("the newer definition of VPG {} was taken over from its VRAs", vpg.name);
        let save = async {
            let mut tx = self.store.begin().await?;
            for vra in members.difference(&vpg.vras()) {
                store::leftovers::delete(&mut tx, vpg.id, *vra).await?;
            }
            for left in &left {
                store::leftovers::insert(&mut tx, left).await?;
            }
            let is_saved = store::vpgs::adopt(&mut tx, &after, vpg.revision).await?;
            if is_saved {
                let kind = EventKind::EditProtectionGroup;
                self.note(&mut tx, kind, true, Entity::vpg(vpg.id), description.clone(), None).await?;
                tx.commit().await?;
            }
            Ok::<_, StoreError>(is_saved)
        };
        if !save.await.map_err(internal)? {
            return Err(changed_meanwhile(&vpg));
        }
        tracing::warn!(vpg = %vpg.id, name = vpg.name, from = vpg.revision, revision = after.revision, "{description}");
        self.wake.notify_one();
        self.show_vpg(name).await
    }

    /// The newest definition that the VRAs have of a group.
    async fn newest_definition(&self, vpg: &Vpg, desired: &Desired) -> Result<VpgDefinition, ApiError> {
        let newer = newer_at(vpg, &self.observed());
        let newest = newer.values().max().copied();
        let (mut found, mut failed) = (None::<(&Vra, VpgDefinition)>, None);
        let those = newer.iter().filter(|(_, revision)| Some(**revision) == newest);
        for vra in those.filter_map(|(id, _)| desired.vras.get(id)) {
            let told = match self.definition_at(vra, vpg.id).await {
                Ok(told) => told,
                Err(error) => {
                    failed = Some(error);
                    continue;
                }
            };
            let is_meant = |told: &VpgDefinition| {
                told.has_member_at(vra.id) && vpg.is_other_than(told.revision, told.stamp())
            };
            let Some(told) = told.filter(is_meant) else { continue };
            match &found {
                Some((other, known)) if *known != told => {
                    let message = format!(
                        "VRA {} and VRA {} have different definitions of VPG {} with one revision",
                        vra.name, other.name, vpg.name
                    );
                    return Err(ApiError::new(ErrorCode::Conflict, message)
                        .remedy("restore the newest backup of the manager's state folder"));
                }
                Some(_) => {}
                None => found = Some((vra, told)),
            }
        }
        found.map(|(_, told)| told).ok_or_else(|| {
            failed.unwrap_or_else(|| {
                let message = format!("no VRA has a newer definition of VPG {} than this manager", vpg.name);
                ApiError::new(ErrorCode::NotFound, message)
            })
        })
    }
}

/// Whether a definition can be the manager's own.
fn check_adoptable(vpg: &Vpg, newest: &VpgDefinition, desired: &Desired) -> Result<(), ApiError> {
    if vpg.state != VpgState::Active {
        return Err(ApiError::new(ErrorCode::Conflict, format!("VPG {} is being deleted", vpg.name)));
    }
    if desired.tests.iter().any(|test| test.vpg == vpg.id) {
        return Err(ApiError::new(ErrorCode::Busy, format!("VPG {} is being tested", vpg.name))
            .remedy(format!("stop the test first: `zvm test stop {}`", vpg.name)));
    }
    let endpoints = newest.vms.iter().flat_map(|vm| [&vm.source, &vm.target]);
    if let Some(unknown) = endpoints.into_iter().find(|endpoint| !desired.vras.contains_key(&endpoint.id)) {
        let message = format!(
            "VRA {} at {} has a part in VPG {} and isn't enrolled at this manager",
            unknown.id, unknown.address, vpg.name
        );
        return Err(ApiError::new(ErrorCode::NotReady, message).remedy(
            "enrol it again, or restore the newest backup of the manager's state folder; `zvm rebuild` makes a new database from the VRAs",
        ));
    }
    let others = desired.vpgs.iter().filter(|other| other.id != vpg.id);
    let mut taken = others.flat_map(|other| other.settings.vms.iter().map(move |member| (other, member)));
    if let Some((other, member)) = taken.find(|(_, member)| newest.vms.iter().any(|vm| vm.id == member.vm)) {
        let message = format!(
            "VM {} is in VPG {} at the VRAs, and in VPG {} at this manager",
            member.name, vpg.name, other.name
        );
        return Err(ApiError::new(ErrorCode::Conflict, message).remedy(format!(
            "adopt VPG {0} first, if its VRAs have a newer definition of that, too: `zvm vpg adopt {0}`",
            other.name
        )));
    }
    Ok(())
}
