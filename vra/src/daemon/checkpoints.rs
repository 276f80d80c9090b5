//! The checkpoints of a group, put together from its VMs' journals.

use std::collections::BTreeMap;
use std::sync::Arc;

use journal::batch::Checkpoint;

use super::Daemon;
use crate::api::status::{LastCheckpoint, VpgStatus};
use crate::api::vpg::CheckpointPlace;
use crate::api::{
    ApiError, CheckpointId, CheckpointInfo, CheckpointPage, ErrorCode, ListCheckpoints,
    MAX_CHECKPOINTS_PER_PAGE, PointInTime, TimeUs, VmId, VpgDefinition,
};
use crate::receive::TargetVm;

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
        Ok(page_of(self.group_checkpoints(&vms).await?, &list))
    }

    /// The target VMs of a VPG at this VRA.
    ///
    /// # Errors
    /// There is none, or one of them isn't open.
    pub(super) fn target_vms_of(&self, vpg: &VpgDefinition) -> Result<Vec<Arc<TargetVm>>, ApiError> {
        let mut vms = Vec::new();
        for vm in vpg.vms.iter().filter(|vm| vm.target.id == self.vra) {
            vms.push(self.targets.vm(vm.id).ok_or_else(|| {
                ApiError::new(ErrorCode::NotReady, format!("the journal of VM {} is not open", vm.name))
                    .remedy("`vra status` shows what is in the way")
            })?);
        }
        if vms.is_empty() {
            return Err(ApiError::new(
                ErrorCode::BadRequest,
                format!("this VRA is not a target of VPG \"{}\": its journals are elsewhere", vpg.name),
            )
            .remedy("ask the VPG's target VRA"));
        }
        Ok(vms)
    }

    /// All checkpoints that any of the journals has, oldest first.
    pub(super) async fn group_checkpoints(
        &self,
        vms: &[Arc<TargetVm>],
    ) -> Result<Vec<CheckpointInfo>, ApiError> {
        let mut group = Group { members: vms.len(), ..Group::default() };
        for vm in vms {
            for entry in vm.catalogue().await?.checkpoints() {
                group.add(vm.id(), &entry.checkpoint);
            }
        }
        Ok(group.into_list())
    }

    /// The complete checkpoint that a moment stands for.
    pub(super) async fn group_checkpoint_at(
        &self,
        vms: &[Arc<TargetVm>],
        at: PointInTime,
    ) -> Result<CheckpointInfo, ApiError> {
        let list = self.group_checkpoints(vms).await?;
        match at {
            PointInTime::Checkpoint { checkpoint } => {
                let found = list.into_iter().find(|info| info.id == checkpoint).ok_or_else(|| {
                    ApiError::new(ErrorCode::NotFound, format!("there is no checkpoint {checkpoint}"))
                        .remedy("see the list of checkpoints; an older one may be gone")
                })?;
                if found.complete {
                    return Ok(found);
                }
                Err(ApiError::new(
                    ErrorCode::NotReady,
                    format!("checkpoint {checkpoint} is not in every journal of the group"),
                )
                .remedy("open a complete one, or a single VM"))
            }
            PointInTime::Time { time_us } => newest(list, time_us).ok_or_else(|| {
                ApiError::new(
                    ErrorCode::NotFound,
                    format!("there is no complete checkpoint at or before {time_us}"),
                )
                .remedy("see the list of checkpoints")
            }),
            PointInTime::Latest => newest(list, TimeUs(u64::MAX)).ok_or_else(|| {
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
                && let Ok(list) = self.group_checkpoints(&vms).await
            {
                status.checkpoint_count = list.iter().filter(|info| info.complete).count() as u64;
                let held = newest(list, TimeUs(u64::MAX));
                status.last_checkpoint = status.last_checkpoint.or_else(|| {
                    held.map(|info| LastCheckpoint { id: info.id, time_us: info.time_us, tag: info.tag })
                });
            }
            statuses.push(status);
        }
        statuses
    }
}

#[derive(Default)]
struct Group {
    members: usize,
    by_id: BTreeMap<CheckpointId, CheckpointInfo>,
}

impl Group {
    fn add(&mut self, vm: VmId, checkpoint: &Checkpoint) {
        let id = CheckpointId { nonce: checkpoint.epoch.nonce.as_u128(), counter: checkpoint.epoch.counter };
        let info = self.by_id.entry(id).or_insert_with(|| CheckpointInfo {
            id,
            time_us: TimeUs(checkpoint.time_us),
            tag: Some(checkpoint.tag.clone()).filter(|tag| !tag.is_empty()),
            member_set_version: u32::try_from(checkpoint.member_set_version).unwrap_or(u32::MAX),
            complete: false,
            vms: Vec::new(),
        });
        if info.vms.iter().all(|place| place.vm != vm) {
            info.vms.push(CheckpointPlace { vm, cut: checkpoint.cut });
        }
        info.complete = info.vms.len() == self.members;
    }

    fn into_list(self) -> Vec<CheckpointInfo> {
        let mut list: Vec<_> = self.by_id.into_values().collect();
        list.sort_by_key(|info| (info.time_us, info.id));
        list
    }
}

fn newest(list: Vec<CheckpointInfo>, until: TimeUs) -> Option<CheckpointInfo> {
    list.into_iter().rev().find(|info| info.complete && info.time_us <= until)
}

fn page_of(mut list: Vec<CheckpointInfo>, asked: &ListCheckpoints) -> CheckpointPage {
    list.retain(|info| {
        asked.from_us.is_none_or(|from| info.time_us >= from)
            && asked.to_us.is_none_or(|to| info.time_us <= to)
            && (!asked.tagged || info.tag.is_some())
    });
    if asked.newest_first {
        list.reverse();
    }
    let total = list.len() as u64;
    // One that was given up since the last page: the page begins anew.
    let begin = asked.after.and_then(|after| list.iter().position(|info| info.id == after));
    let mut page = list.split_off(begin.map_or(0, |at| at + 1));
    let more = page.len() > asked.limit as usize;
    page.truncate(asked.limit as usize);
    let next = page.last().filter(|_| more).map(|info| info.id);
    CheckpointPage { checkpoints: page, total, next }
}

fn not_here(vm: VmId, vpg: &VpgDefinition) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("VM {vm} of VPG \"{}\" has no journal here", vpg.name))
        .remedy("ask the VM's target VRA")
}

#[cfg(test)]
mod tests {
    use journal::batch::{CheckpointKind, Epoch};
    use uuid::Uuid;

    use super::*;
    use crate::api::VpgId;

    fn checkpoint(counter: u64, tag: &str) -> Checkpoint {
        Checkpoint {
            epoch: Epoch { nonce: Uuid::from_u128(5), counter },
            cut: counter * 10,
            member_set_version: 1,
            time_us: counter * 1000,
            kind: CheckpointKind::Automatic,
            tag: tag.to_owned(),
        }
    }

    fn list_of(complete: &[u64], partial: &[u64]) -> Vec<CheckpointInfo> {
        let (a, b) = (VmId::random(), VmId::random());
        let mut group = Group { members: 2, ..Group::default() };
        for counter in complete.iter().chain(partial) {
            group.add(a, &checkpoint(*counter, if *counter == 3 { "three" } else { "" }));
        }
        for counter in complete {
            group.add(b, &checkpoint(*counter, ""));
        }
        group.into_list()
    }

    fn ask(limit: u32) -> ListCheckpoints {
        ListCheckpoints {
            vpg: VpgId::random(),
            vm: None,
            from_us: None,
            to_us: None,
            tagged: false,
            newest_first: false,
            after: None,
            limit,
        }
    }

    #[test]
    fn only_what_every_journal_holds_is_complete() {
        let list = list_of(&[1, 2], &[3]);
        assert_eq!(list.iter().map(|info| info.complete).collect::<Vec<_>>(), [true, true, false]);
        assert_eq!(newest(list.clone(), TimeUs(u64::MAX)).map(|info| info.id.counter), Some(2));
        assert_eq!(newest(list.clone(), TimeUs(1999)).map(|info| info.id.counter), Some(1));
        assert!(newest(list, TimeUs(999)).is_none());
    }

    #[test]
    fn pages_cover_the_list_once_in_either_order() {
        for newest_first in [false, true] {
            let list = list_of(&[1, 2, 3, 4, 5], &[]);
            let mut asked = ListCheckpoints { newest_first, ..ask(2) };
            let mut seen = Vec::new();
            loop {
                let page = page_of(list.clone(), &asked);
                assert_eq!(page.total, 5);
                seen.extend(page.checkpoints.iter().map(|info| info.id.counter));
                let Some(next) = page.next else { break };
                asked.after = Some(next);
            }
            let expected = if newest_first { [5, 4, 3, 2, 1] } else { [1, 2, 3, 4, 5] };
            assert_eq!(seen, expected);
        }
        let tagged = ListCheckpoints { tagged: true, ..ask(10) };
        let page = page_of(list_of(&[1, 3], &[]), &tagged);
        assert_eq!(page.checkpoints.len(), 1);
        assert_eq!(page.checkpoints[0].tag.as_deref(), Some("three"));
    }
}
