//! Which checkpoints are offered, and whether they show one moment.

use std::collections::BTreeMap;

use vra::api::{
    CheckpointId, CheckpointInfo, ListCheckpoints, MAX_CHECKPOINTS_PER_PAGE, MemberSince, VmId, VpgId,
};
use vra::daemon::{GroupCheckpoints, MemberJournal};

use super::group_vm::GroupVm;

/// What the journals of the group hold.
#[derive(Debug, Default)]
pub(super) struct Journals {
    /// Those that all hold, with their cuts.
    pub(super) offered: BTreeMap<CheckpointId, BTreeMap<VmId, u64>>,
    /// How many are in some alone.
    pub(super) in_some: u64,
}

impl Journals {
    /// Asks the targets, which have some of the journals each, as the manager does: what one lists counts if all others list it
    /// with the same time, and all say that it is complete.
    pub(super) fn of(vpg: VpgId, vms: &[GroupVm], target_count: usize) -> Result<Self, String> {
        let mut targets: Vec<Vec<CheckpointInfo>> = Vec::new();
        for target in 0..target_count {
            let here = vms.iter().skip(target).step_by(target_count);
            let since = MemberSince::default();
            let lists =
                here.map(|vm| MemberJournal { vm: vm.vm, since, list: vm.journal().clone() }).collect();
            targets.push(all_of(vpg, &GroupCheckpoints::new(lists, Default::default())));
        }
        let mut journals = Self::default();
        let Some((first, others)) = targets.split_first() else { return Ok(journals) };
        for info in first {
            let same = |other: &&CheckpointInfo| other.id == info.id && other.time_us == info.time_us;
            let found: Vec<&CheckpointInfo> =
                others.iter().filter_map(|target| target.iter().find(same)).collect();
            let complete = info.complete && found.len() == others.len() && found.iter().all(|at| at.complete);
            if !complete {
                journals.in_some += 1;
                continue;
            }
            let places = found.iter().flat_map(|info| &info.vms).chain(&info.vms);
            let cuts: BTreeMap<VmId, u64> = places.map(|place| (place.vm, place.cut)).collect();
            if cuts.len() != vms.len() {
                return Err(format!("checkpoint {} is offered with {} VMs", info.id, cuts.len()));
            }
            journals.offered.insert(info.id, cuts);
        }
        Ok(journals)
    }

    /// Checkpoints that all journals hold by their ids alone, as `vra-journal` finds them.
    pub(super) fn by_id_alone(vms: &[GroupVm]) -> Vec<(CheckpointId, BTreeMap<VmId, u64>)> {
        let Some(first) = vms.first() else { return Vec::new() };
        let cuts_of = |id| {
            let cut = |vm: &GroupVm| vm.journal().find(id).map(|listed| (vm.vm, listed.cut));
            vms.iter().map(cut).collect::<Option<BTreeMap<_, _>>>()
        };
        let ids = first.journal().iter_from(0).map(|listed| listed.id);
        ids.filter_map(|id| Some((id, cuts_of(id)?))).collect()
    }
}

fn all_of(vpg: VpgId, group: &GroupCheckpoints) -> Vec<CheckpointInfo> {
    let mut asked = ListCheckpoints {
        vpg,
        vm: None,
        from_us: None,
        to_us: None,
        tagged: false,
        newest_first: false,
        by_cut: false,
        after: None,
        limit: MAX_CHECKPOINTS_PER_PAGE,
    };
    let mut all = Vec::new();
    loop {
        let page = group.page(&asked);
        all.extend(page.checkpoints);
        if page.next.is_none() {
            return all;
        }
        asked.after = page.next;
    }
}
