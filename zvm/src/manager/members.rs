//! The members of a group that there is: VMs join it and leave it.

use std::collections::{BTreeMap, BTreeSet};

use vra::api::volume::VolumeInfo;
use vra::api::vpg::{Takeover, VolumeDefinition};
use vra::api::{
    ApiError, ErrorCode, ListDefinitions, Request, Response, VmId, VolumeId, VpgDefinition, VpgId, VraId,
};

use super::engine::SLOW_ACTION_LIMIT;
use super::{Manager, changed_meanwhile, internal, spec};
use crate::api::{DiskName, VmSpec};
use crate::model::event::{Entity, EventKind};
use crate::model::task::{Task, TaskKind};
use crate::model::vpg::{Member, Vpg, VpgSettings, VpgState};
use crate::model::vra::Vra;
use crate::reconcile::{Desired, Leaving};
use crate::remote::CallError;
use crate::store::{self, StoreError};
use crate::units::format_bytes;

/// How a change of members is told.
struct Told {
    task: TaskKind,
    event: EventKind,
    description: String,
}

/// Why a change of members wasn't saved.
enum Unsaved {
    Tested,
    ChangedMeanwhile,
    Store(StoreError),
}

impl<E: Into<StoreError>> From<E> for Unsaved {
    fn from(error: E) -> Self {
        Self::Store(error.into())
    }
}

impl Manager {
    /// Adds VMs to a group; the engine takes its definition to the VRAs. Its checkpoints until then stay what they are; the next one comes
    /// when the first syncs of those VMs have ended.
    pub async fn add_vms(&self, name: &str, vms: &[VmSpec]) -> Result<Task, ApiError> {
        let (vpg, desired) = self.changeable(name).await?;
        let inventory = self.inventory();
        let context = spec::Context { inventory: &inventory, vras: &desired.vras, vpgs: &desired.vpgs };
        let joining = spec::join(&vpg, vms, &context)?;
        let served = self.served_by(joining.sources()).await?;
        let settings = joining.into_settings(&served)?;
        let names: Vec<&str> =
            settings.vms[vpg.settings.vms.len()..].iter().map(|member| member.name.as_str()).collect();
        let description = format!("VM {} joined VPG {}", names.join(", "), vpg.name);
        let told = Told { task: TaskKind::AddVm, event: EventKind::ProtectVm, description };
        self.change_members(&vpg, settings, &desired, told).await
    }

    /// Protects disks that VMs of a group have got since; the engine takes its definition to the VRAs. What was recovered before is without them.
    pub async fn add_disks(
        &self,
        name: &str,
        vms: &[String],
        give_up_history: bool,
    ) -> Result<Task, ApiError> {
        let (vpg, desired) = self.changeable(name).await?;
        let inventory = self.inventory();
        let context = spec::Context { inventory: &inventory, vras: &desired.vras, vpgs: &desired.vpgs };
        let growing = spec::grow(&vpg, vms, &context)?;
        let served = self.served_by(growing.sources()).await?;
        let (settings, added) = growing.into_settings(&served)?;
        spec::full_sync::check_change(&vpg.name, &vpg.settings, &settings, give_up_history)?;
        let description =
            format!("{added} more disks of VM {} are protected in VPG {}", vms.join(", "), vpg.name);
        let told = Told { task: TaskKind::ChangeDisks, event: EventKind::EditProtectionGroup, description };
        self.change_members(&vpg, settings, &desired, told).await
    }

    /// Protects disks no more; the engine takes its definition to the VRAs, whose sources serve them on. What was recovered before has them.
    pub async fn remove_disks(
        &self,
        name: &str,
        disks: &[DiskName],
        give_up_history: bool,
    ) -> Result<Task, ApiError> {
        let (vpg, desired) = self.changeable(name).await?;
        let members = spec::members_of(&vpg, disks)?;
        let in_no_journal = self.in_no_journal(&vpg, &members, &desired).await;
        let settings = spec::without_disks(&vpg, disks, &self.inventory(), &in_no_journal)?;
        spec::full_sync::check_change(&vpg.name, &vpg.settings, &settings, give_up_history)?;
        let names: Vec<String> = disks.iter().map(|disk| format!("{}:{}", disk.vm, disk.disk)).collect();
        let description = format!("disk {} is protected no more in VPG {}", names.join(", "), vpg.name);
        let told = Told { task: TaskKind::ChangeDisks, event: EventKind::EditProtectionGroup, description };
        self.change_members(&vpg, settings, &desired, told).await
    }

    /// Disks of these members that their targets never had: those refused every definition with them. What a target that doesn't answer has
    /// nobody knows.
    async fn in_no_journal(&self, vpg: &Vpg, members: &[&Member], desired: &Desired) -> BTreeSet<VolumeId> {
        let mut in_no_journal = BTreeSet::new();
        for member in members {
            let Some(target) = desired.vras.get(&member.target) else { continue };
            let Ok(definition) = self.definition_at(target, vpg.id).await else { continue };
            let known = definition.and_then(|known| known.vms.into_iter().find(|vm| vm.id == member.vm));
            let known = known.map(|vm| vm.volumes).unwrap_or_default();
            let is_unknown = |volume: &&VolumeDefinition| !known.iter().any(|known| known.id == volume.id);
            in_no_journal.extend(member.volumes.iter().filter(is_unknown).map(|volume| volume.id));
        }
        in_no_journal
    }

    /// The definition of a group that is in force at a VRA.
    pub(super) async fn definition_at(
        &self,
        vra: &Vra,
        vpg: VpgId,
    ) -> Result<Option<VpgDefinition>, ApiError> {
        let mut after = None;
        loop {
            let request = Request::ListDefinitions(ListDefinitions { after });
            let endpoint = vra.endpoint();
            let asked = self.remote.call(&endpoint, request, self.request_timeout());
            let page = match asked.await {
                Ok(Response::Definitions(page)) => page,
                Ok(_) => return Err(wrong_answer(vra)),
                Err(error) => return Err(error.into_api_error(&vra.name)),
            };
            if let Some(found) = page.vpgs.into_iter().find(|known| known.id == vpg) {
                return Ok(Some(found));
            }
            // A VRA that gave no later one would be asked for ever.
            after = page.next.filter(|next| Some(*next) > after);
            if after.is_none() {
                return Ok(None);
            }
        }
    }

    /// Takes VMs out of a group; the engine takes its definition to the VRAs, whose sources serve the disks on, and whose targets remove the
    /// VMs' files, or leave them.
    pub async fn remove_vms(&self, name: &str, vms: &[String], keep_disks: bool) -> Result<Task, ApiError> {
        let (vpg, desired) = self.changeable(name).await?;
        let settings = spec::without(&vpg, vms, keep_disks)?;
        let left =
            vpg.settings.vms.iter().filter(|member| settings.vms.iter().all(|stays| stays.vm != member.vm));
        let names: Vec<&str> = left.map(|member| member.name.as_str()).collect();
        let files = if keep_disks { "its files stay" } else { "its files are removed" };
        let description = format!("VM {} left VPG {}: {files}", names.join(", "), vpg.name);
        let told = Told { task: TaskKind::RemoveVm, event: EventKind::UnprotectVm, description };
        self.change_members(&vpg, settings, &desired, told).await
    }

    /// What each of these VRAs serves now.
    pub(super) async fn served_by(
        &self,
        sources: BTreeMap<VraId, &Vra>,
    ) -> Result<BTreeMap<VraId, Vec<VolumeInfo>>, ApiError> {
        let mut served = BTreeMap::new();
        for (id, source) in sources {
            let endpoint = source.endpoint();
            let asked = self.remote.call(&endpoint, Request::List, self.request_timeout());
            let volumes = match asked.await {
                Ok(Response::Volumes(volumes)) => volumes,
                Ok(_) => return Err(wrong_answer(source)),
                Err(error) => return Err(error.into_api_error(&source.name)),
            };
            served.insert(id, volumes);
        }
        Ok(served)
    }

    /// A group whose members may be changed now.
    async fn changeable(&self, name: &str) -> Result<(Vpg, Desired), ApiError> {
        let vpg = self.find_vpg(name).await?;
        if vpg.state != VpgState::Active {
            return Err(ApiError::new(ErrorCode::Conflict, format!("VPG {name} is being deleted")));
        }
        Ok((vpg, self.desired().await.map_err(internal)?))
    }

    /// Has a VM's protection follow it to the VRA of the host that it runs on now, which serves its disks: the engine takes the definition to the
    /// VRAs. It goes on in the same journal; a test of the group goes on, too. Gives the group's new revision.
    pub(super) async fn move_source(&self, name: &str, vm: VmId, to: VraId) -> Result<u64, ApiError> {
        let (vpg, desired) = self.changeable(name).await?;
        let vra_of = |id: VraId| {
            desired.vras.get(&id).ok_or_else(|| {
                ApiError::new(ErrorCode::NotReady, format!("VRA {id} of VPG {} is revoked", vpg.name))
            })
        };
        let member = vpg.settings.vms.iter().find(|member| member.vm == vm);
        let member = member.ok_or_else(|| {
            ApiError::new(ErrorCode::NotFound, format!("VM {vm} is not in VPG {} any more", vpg.name))
        })?;
        let (source, target) = (vra_of(to)?, vra_of(member.target)?);
        spec::check_moved(&vpg.settings, &vpg.name, vm, to)?;
        let former = desired.vras.get(&member.source).map_or("one that is revoked", |vra| vra.name.as_str());
        // What the target has of the former source's, which alone the new one may continue (A5).
        let asked = self.remote.call(&target.endpoint(), Request::Status, self.request_timeout()).await;
        let tail = match asked.map_err(|error| error.into_api_error(&target.name))? {
            Response::Status(status) => status.target_vms.into_iter().find(|status| status.vm == vm),
            _ => None,
        };
        let tail = tail.ok_or_else(|| {
            let message = format!("VRA {} doesn't tell how far VM {} is", target.name, member.name);
            ApiError::new(ErrorCode::NotReady, message).remedy("`zvm vra show` tells what is wrong there")
        })?;
        let takeover = tail.generation.map(|generation| Takeover::after(generation, tail.durable_through));
        let description = format!(
            "VM {} of VPG {} is protected by VRA {} now, where it runs; it was by VRA {former}",
            member.name, vpg.name, source.name
        );
        let mut settings = vpg.settings.clone();
        for member in settings.vms.iter_mut().filter(|member| member.vm == vm) {
            (member.source, member.takeover) = (to, takeover);
        }
        let told = Told { task: TaskKind::ChangeDisks, event: EventKind::EditProtectionGroup, description };
        self.save_members(&vpg, settings, &desired, told, true).await?;
        Ok(vpg.revision + 1)
    }

    /// Protects volumes of a VM in these sizes, in bytes, which their local disks have: the engine takes the definition to the VRAs, targets first.
    /// What was recovered before keeps its size. A test of the group goes on. The VM's VRAs are asked before: a size that one of them can't take would
    /// be in the way of all later changes.
    pub(super) async fn grow_volumes(
        &self,
        name: &str,
        vm: VmId,
        volumes: &[(VolumeId, u64)],
    ) -> Result<(), ApiError> {
        let (vpg, desired) = self.changeable(name).await?;
        let mut settings = vpg.settings.clone();
        let mut told = Vec::new();
        let mut asked: BTreeSet<VraId> = BTreeSet::new();
        for member in settings.vms.iter_mut().filter(|member| member.vm == vm) {
            asked.extend([member.source, member.target]);
            for volume in &mut member.volumes {
                let wanted = volumes.iter().find(|(id, _)| *id == volume.id);
                if let Some((_, size_bytes)) =
                    wanted.filter(|(_, size_bytes)| *size_bytes > volume.size_bytes)
                {
                    let (from, to) = (format_bytes(volume.size_bytes), format_bytes(*size_bytes));
                    told.push(format!("{} from {from} to {to}", volume.source_path.display()));
                    volume.size_bytes = *size_bytes;
                }
            }
        }
        let after = Vpg { settings, revision: vpg.revision + 1, ..vpg.clone() };
        let (vra_of, targets) = (|vra: VraId| desired.vras.get(&vra), after.targets());
        let definition = after.definition(vra_of).ok_or_else(|| {
            ApiError::new(ErrorCode::NotReady, format!("a VRA of VPG {} is revoked", vpg.name))
        })?;
        for vra in asked.into_iter().filter_map(vra_of) {
            let request = Request::CheckVpg(definition.clone());
            match self.remote.call(&vra.endpoint(), request, SLOW_ACTION_LIMIT).await {
                Ok(_) => {}
                // A source that is dead is in nobody's way: its VM may run elsewhere.
                Err(CallError::Unreachable(_)) if !targets.contains(&vra.id) => {}
                Err(error) => return Err(error.into_api_error(&vra.name)),
            }
        }
        let settings = after.settings;
        let description = format!("disks of VPG {} have grown: {}", vpg.name, told.join(", "));
        self.save_settings(&vpg, &settings, EventKind::EditProtectionGroup, description).await
    }

    async fn change_members(
        &self,
        vpg: &Vpg,
        settings: VpgSettings,
        desired: &Desired,
        told: Told,
    ) -> Result<Task, ApiError> {
        self.save_members(vpg, settings, desired, told, false).await
    }

    async fn save_members(
        &self,
        vpg: &Vpg,
        settings: VpgSettings,
        desired: &Desired,
        told: Told,
        also_while_tested: bool,
    ) -> Result<Task, ApiError> {
        let Told { task, event, description } = told;
        self.check_is_newest(vpg).await?;
        // Whoever is revoked can be taken out.
        if task != TaskKind::RemoveVm {
            let after = Vpg { settings: settings.clone(), ..vpg.clone() };
            self.check_members_are_enrolled(&after).await?;
        }
        let task = self.new_task(task, &vpg.name, Some(vpg.id), "defined");
        let save = async {
            let mut tx = self.store.begin().await?;
            let tests = store::test_runs::list(&mut tx).await?;
            if !also_while_tested && tests.iter().any(|test| test.vpg == vpg.id) {
                return Err(Unsaved::Tested);
            }
            let mut after = Vpg { settings, ..vpg.clone() };
            let left = store::leftovers::list(&mut tx).await?;
            let leaving = Leaving::of(vpg, &mut after, &left, |vra| desired.vras.contains_key(&vra));
            for left in &leaving.left {
                store::leftovers::insert(&mut tx, left).await?;
            }
            for vra in leaving.back {
                store::leftovers::delete(&mut tx, vpg.id, vra).await?;
            }
            if !store::vpgs::set_settings(&mut tx, vpg.id, vpg.revision, &after.settings).await? {
                return Err(Unsaved::ChangedMeanwhile);
            }
            store::tasks::insert(&mut tx, &task).await?;
            self.note(&mut tx, event, true, Entity::vpg(vpg.id), description.clone(), Some(task.id)).await?;
            Ok(tx.commit().await.map_err(StoreError::from)?)
        };
        save.await.map_err(|unsaved| match unsaved {
            Unsaved::Tested => ApiError::new(ErrorCode::Busy, format!("VPG {} is being tested", vpg.name))
                .remedy(format!("stop the test first: `zvm test stop {}`", vpg.name)),
            Unsaved::ChangedMeanwhile => changed_meanwhile(vpg),
            Unsaved::Store(error) => internal(error),
        })?;
        tracing::info!(vpg = %vpg.id, name = vpg.name, "{description}");
        self.wake.notify_one();
        Ok(task)
    }
}

fn wrong_answer(vra: &Vra) -> ApiError {
    ApiError::new(ErrorCode::Other, format!("VRA {} gave a wrong answer", vra.name))
}
