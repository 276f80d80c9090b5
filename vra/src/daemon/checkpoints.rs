//! The checkpoints of a group, put together from its VMs' journals.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Daemon;
use super::group_checkpoints::{GroupCheckpoints, MemberJournal};
use crate::api::status::{LastCheckpoint, VpgStatus};
use crate::api::vpg::VmDefinition;
use crate::api::{
    ApiError, CheckpointId, CheckpointInfo, CheckpointPage, ErrorCode, ListCheckpoints, LockCheckpoint,
    MAX_CHECKPOINTS_PER_PAGE, PointInTime, VmId, VpgDefinition,
};
use crate::receive::{TargetVm, error_chain};

/// A VM with this VRA as target; none while its journal is not open.
type TargetHere<'a> = (&'a VmDefinition, Option<Arc<TargetVm>>);

impl Daemon {
    /// A page of checkpoints.
    pub(super) async fn list_checkpoints(&self, list: ListCheckpoints) -> Result<CheckpointPage, ApiError> {
        if list.limit == 0 || list.limit > MAX_CHECKPOINTS_PER_PAGE {
            return Err(ApiError::new(
                ErrorCode::BadRequest,
                format!("limit is {}; it must be 1 to {MAX_CHECKPOINTS_PER_PAGE}", list.limit),
            ));
        }
        let vpg = self.vpg(list.vpg)?;
        let mut vms = self.target_vms_of(&vpg)?;
        if let Some(vm) = list.vm {
            vms.retain(|target| target.id() == vm);
            if vms.is_empty() {
                return Err(not_here(vm, &vpg));
            }
        }
        Ok(group_checkpoints(&vms).await?.page(&list))
    }

    /// Locks a checkpoint in all journals of its group, or in none; or unlocks it wherever it is locked.
    pub(super) async fn lock_checkpoint(&self, lock: LockCheckpoint) -> Result<CheckpointInfo, ApiError> {
        let vpg = self.vpg(lock.vpg)?;
        if !lock.locked {
            return self.unlock_checkpoint(&vpg, lock.checkpoint).await;
        }
        let vms = self.target_vms_of(&vpg)?;
        let at = PointInTime::Checkpoint { checkpoint: lock.checkpoint };
        let found = self.group_checkpoint_at(&vms, at).await?;
        let vms = members_at(vms, &found);
        let mut done: Vec<&Arc<TargetVm>> = Vec::new();
        for vm in &vms {
            let had = vm.locked_checkpoints().iter().any(|locked| locked.checkpoint == lock.checkpoint);
            match vm.lock_checkpoint(lock.checkpoint).await {
                Ok(()) if had => {}
                Ok(()) => done.push(vm),
                Err(error) => {
                    // The one that failed may have it nevertheless.
                    for vm in done.into_iter().chain((!had).then_some(vm)) {
                        if let Err(undoing) = vm.unlock_checkpoint(lock.checkpoint).await {
                            tracing::warn!(vm = %vm.id(), error = %error_chain(&undoing), "a checkpoint stays locked in one journal alone");
                        }
                    }
                    return Err(error.into());
                }
            }
        }
        Ok(CheckpointInfo { locked: true, partly_locked: false, ..found })
    }

    /// Unlocks a checkpoint in every journal that has it locked. It need not be complete any more, nor listed: VMs may have joined the group
    /// since, and a journal without room may have given up its own lock.
    async fn unlock_checkpoint(
        &self,
        vpg: &VpgDefinition,
        checkpoint: CheckpointId,
    ) -> Result<CheckpointInfo, ApiError> {
        let vms = self.targets_here(vpg)?;
        let open: Vec<_> = vms.iter().filter_map(|(_, vm)| vm.clone()).collect();
        let listed = group_checkpoints(&open).await.ok().and_then(|group| group.find(checkpoint));
        let (mut unlocked, mut result) = (None, Ok(()));
        for (definition, vm) in vms {
            match vm {
                Some(vm) => match vm.unlock_checkpoint(checkpoint).await {
                    Ok(released) => unlocked = unlocked.or(released),
                    Err(error) => result = result.and(Err(error.into())),
                },
                None => result = result.and(Err(not_open(definition))),
            }
        }
        result?;
        let unlisted = unlocked.map(|locked| CheckpointInfo {
            id: checkpoint,
            time_us: locked.time_us,
            kind: locked.kind,
            tag: locked.tag.map(Into::into),
            member_set_version: locked.member_set_version,
            complete: false,
            locked: false,
            partly_locked: false,
            vms: Vec::new(),
        });
        listed
            .map(|listed| CheckpointInfo { locked: false, partly_locked: false, ..listed })
            .or(unlisted)
            .ok_or_else(|| no_checkpoint(checkpoint))
    }

    /// The VMs of a VPG with this VRA as target.
    ///
    /// # Errors
    /// There is none.
    fn targets_here<'a>(&self, vpg: &'a VpgDefinition) -> Result<Vec<TargetHere<'a>>, ApiError> {
        let here = vpg.vms.iter().filter(|vm| vm.target.id == self.vra);
        let vms: Vec<_> = here.map(|vm| (vm, self.targets.vm(vm.id))).collect();
        if vms.is_empty() {
            return Err(ApiError::new(
                ErrorCode::BadRequest,
                format!("this VRA is not a target of VPG \"{}\": its journals are elsewhere", vpg.name),
            )
            .remedy("ask the VPG's target VRA"));
        }
        Ok(vms)
    }

    /// The target VMs of a VPG at this VRA.
    ///
    /// # Errors
    /// There is none, or one of them isn't open.
    pub(super) fn target_vms_of(&self, vpg: &VpgDefinition) -> Result<Vec<Arc<TargetVm>>, ApiError> {
        let vms = self.targets_here(vpg)?.into_iter();
        vms.map(|(definition, vm)| vm.ok_or_else(|| not_open(definition))).collect()
    }

    /// The complete checkpoint that a moment stands for.
    pub(super) async fn group_checkpoint_at(
        &self,
        vms: &[Arc<TargetVm>],
        at: PointInTime,
    ) -> Result<CheckpointInfo, ApiError> {
        let group = group_checkpoints(vms).await?;
        match at {
            PointInTime::Checkpoint { checkpoint } => {
                let found = group.find(checkpoint).ok_or_else(|| no_checkpoint(checkpoint))?;
                if found.complete {
                    return Ok(found);
                }
                Err(ApiError::new(
                    ErrorCode::NotReady,
                    format!("checkpoint {checkpoint} is not in every journal of the group"),
                )
                .remedy("open a complete one, or a single VM"))
            }
            PointInTime::Time { time_us } => group.newest_until(time_us).ok_or_else(|| {
                ApiError::new(
                    ErrorCode::NotFound,
                    format!("there is no complete checkpoint at or before {time_us}"),
                )
                .remedy("see the list of checkpoints")
            }),
            PointInTime::Latest => group.newest().ok_or_else(|| {
                ApiError::new(ErrorCode::NotReady, "there is no complete checkpoint yet")
                    .remedy("wait for the end of the first sync; `vra status` shows how far it is")
            }),
            PointInTime::Sequence { .. } => Err(ApiError::new(
                ErrorCode::BadRequest,
                "a sequence number is of a single VM, it says nothing of a group",
            )
            .remedy("name the VM, or a checkpoint")),
        }
    }

    /// The VPGs at this VRA, as target and as source.
    pub(super) async fn vpg_statuses(&self) -> Vec<VpgStatus> {
        let mut statuses = Vec::new();
        for vpg in self.seen().vpgs.values() {
            let mut status = self.source_vpg_status(vpg);
            if let Ok(vms) = self.target_vms_of(vpg)
                && let Ok(group) = group_checkpoints(&vms).await
            {
                status.checkpoint_count = group.complete_count();
                let held = group.newest();
                status.held_checkpoint =
                    held.map(|info| LastCheckpoint { id: info.id, time_us: info.time_us, tag: info.tag });
                // What it made itself may be on its way to other VRAs for long.
                status.last_checkpoint = status.last_checkpoint.or_else(|| status.held_checkpoint.clone());
            }
            statuses.push(status);
        }
        statuses
    }
}

/// What the journals list now.
async fn group_checkpoints(vms: &[Arc<TargetVm>]) -> Result<GroupCheckpoints, ApiError> {
    let (mut lists, mut locked) = (Vec::with_capacity(vms.len()), BTreeSet::new());
    for vm in vms {
        let since = vm.definition().member_since;
        lists.push(MemberJournal { vm: vm.id(), since, list: vm.checkpoints().await? });
        locked.extend(vm.locked_checkpoints().iter().map(|locked| (locked.checkpoint, vm.id())));
    }
    Ok(GroupCheckpoints::new(lists, locked))
}

/// Those of a group's VMs that a checkpoint is of.
pub(super) fn members_at(vms: Vec<Arc<TargetVm>>, checkpoint: &CheckpointInfo) -> Vec<Arc<TargetVm>> {
    let is_in = |vm: &Arc<TargetVm>| vm.definition().member_since.is_in(checkpoint.member_set_version);
    vms.into_iter().filter(is_in).collect()
}

fn no_checkpoint(checkpoint: CheckpointId) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("there is no checkpoint {checkpoint}"))
        .remedy("see the list of checkpoints; an older one may be gone")
}

fn not_open(vm: &VmDefinition) -> ApiError {
    ApiError::new(ErrorCode::NotReady, format!("the journal of VM {} is not open", vm.name))
        .remedy("`vra status` shows what is in the way")
}

fn not_here(vm: VmId, vpg: &VpgDefinition) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("VM {vm} of VPG \"{}\" has no journal here", vpg.name))
        .remedy("ask the VM's target VRA")
}
