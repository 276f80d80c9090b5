//! Which groups have checkpoints, and by whom they are taken.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::sources::LiveSource;
use super::state::State;
use super::{Daemon, lock};
use crate::api::vpg::{SourceVra, VmDefinition, VraEndpoint};
use crate::api::{VmId, VpgDefinition, VraId};
use crate::checkpoint::hosts::{GroupHost, SpanningGroup};
use crate::checkpoint::{GroupSettings, Member};

impl Daemon {
    /// Tells who takes the checkpoints of the groups that this VRA is a source of: the checkpointer, if all of a group's VMs are here, else
    /// the VRAs of their hosts together. A group with a member that isn't protected now gets none (D3), nor does one
    /// that is paused.
    pub(super) fn follow_groups(&self, state: &State) {
        let sources = lock(&self.sources);
        let (mut here, mut spanning, mut ways) = (Vec::new(), Vec::new(), BTreeMap::new());
        for vpg in state.vpgs.values().filter(|vpg| !vpg.paused) {
            let of_vpg = vpg.sources();
            let Some(own) = of_vpg.iter().find(|source| source.endpoint.id == self.vra) else { continue };
            let members = members_of(&own.vms, &sources);
            if of_vpg.len() == 1 {
                here.extend(members.map(|members| (vpg, members)));
            } else {
                spanning.push(spanning_group(vpg, &of_vpg, members));
                ways.extend(of_vpg.iter().map(|source| way_of(source)));
            }
        }
        self.follow_groups_here(here);
        self.spanning.follow(spanning, &ways, &self.link);
    }

    fn follow_groups_here(&self, here: Vec<(&VpgDefinition, Vec<Member>)>) {
        let mut groups = lock(&self.groups);
        let mut whole = BTreeMap::new();
        for (vpg, members) in here {
            let key: Vec<usize> = members.iter().map(|member| Arc::as_ptr(&member.core).addr()).collect();
            let key = (vpg.revision, key);
            if groups.get(&vpg.id) != Some(&key) {
                let settings = GroupSettings {
                    members,
                    interval_us: u64::from(vpg.checkpoint_interval_ms) * 1000,
                    deadline_us: u64::from(vpg.hold_deadline_ms) * 1000,
                    member_set_version: vpg.member_set_version.into(),
                };
                self.checkpointer.set_group(vpg.id, settings);
            }
            whole.insert(vpg.id, key);
        }
        for vpg in groups.keys().filter(|vpg| !whole.contains_key(vpg)) {
            self.checkpointer.remove_group(*vpg);
        }
        *groups = whole;
    }
}

/// The VMs as members; none while one of them isn't protected.
fn members_of(vms: &[&VmDefinition], sources: &BTreeMap<VmId, Arc<LiveSource>>) -> Option<Vec<Member>> {
    vms.iter().map(|vm| sources.get(&vm.id).map(|live| live.member())).collect()
}

fn spanning_group(
    vpg: &VpgDefinition,
    sources: &[SourceVra<'_>],
    members: Option<Vec<Member>>,
) -> SpanningGroup {
    let host = |source: &SourceVra<'_>| {
        let vms: BTreeSet<VmId> = source.vms.iter().map(|vm| vm.id).collect();
        GroupHost { vra: source.endpoint.id, vms }
    };
    SpanningGroup {
        vpg: vpg.id,
        member_set_version: vpg.member_set_version.into(),
        interval_us: u64::from(vpg.checkpoint_interval_ms) * 1000,
        deadline_us: u64::from(vpg.hold_deadline_ms) * 1000,
        hosts: sources.iter().map(host).collect(),
        members,
    }
}

fn way_of(source: &SourceVra<'_>) -> (VraId, VraEndpoint) {
    (source.endpoint.id, source.endpoint.clone())
}
