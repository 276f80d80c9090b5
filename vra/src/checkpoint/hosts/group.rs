use std::collections::BTreeSet;

use crate::api::{VmId, VpgId, VraId};
use crate::checkpoint::Member;

/// A group whose VMs are on several hosts, as one of their VRAs needs it.
#[derive(Clone)]
pub struct SpanningGroup {
    /// Which group.
    pub vpg: VpgId,
    /// Version of the set of members.
    pub member_set_version: u64,
    /// Time between checkpoints, in µs.
    pub interval_us: u64,
    /// Longest time of a hold, in µs.
    pub deadline_us: u64,
    /// The VRAs that its VMs are at, this one too, in the order in which they coordinate.
    pub hosts: Vec<GroupHost>,
    /// This VRA's own VMs; none while one of them isn't protected (D3).
    pub members: Option<Vec<Member>>,
}

/// A source VRA of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupHost {
    /// Which VRA.
    pub vra: VraId,
    /// Its VMs in the group.
    pub vms: BTreeSet<VmId>,
}

impl SpanningGroup {
    pub(super) fn has_host(&self, vra: VraId) -> bool {
        self.hosts.iter().any(|host| host.vra == vra)
    }
}
