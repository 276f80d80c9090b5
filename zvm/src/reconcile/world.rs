//! What the reconciler is given: what is wanted, and what was seen.

use std::collections::BTreeMap;

use vra::api::{SetSiteKeys, SetTrust, VolumeInfo, VpgId, VraId, VraStatus};

use crate::model::test_run::TestRun;
use crate::model::vpg::{Member, Vpg};
use crate::model::vra::Vra;

/// What should be.
#[derive(Debug, Clone, Default)]
pub struct Desired {
    /// Enrolled VRAs; revoked ones are not here.
    pub vras: BTreeMap<VraId, Vra>,
    /// Groups.
    pub vpgs: Vec<Vpg>,
    /// Tests.
    pub tests: Vec<TestRun>,
    /// Parts of groups at VRAs that have none in them any more.
    pub leftovers: Vec<Leftover>,
    /// Certificates that VRAs must not trust.
    pub trust: SetTrust,
    /// Keys for VRAs that keep encrypted journals.
    pub site_keys: SiteKeyWish,
}

/// The site's keys as they should be at a VRA.
#[derive(Debug, Clone)]
pub struct SiteKeyWish {
    /// Their names, as a VRA's status tells them.
    pub ids: Vec<String>,
    /// What is sent.
    pub request: SetSiteKeys,
}

impl Default for SiteKeyWish {
    fn default() -> Self {
        Self { ids: Vec::new(), request: SetSiteKeys { keys: Vec::new() } }
    }
}

/// A part of a group at a VRA that has none in it any more: the group was deleted by force while the VRA could not be reached, or its last VM
/// there was taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leftover {
    /// The group.
    pub vpg: VpgId,
    /// Where.
    pub vra: VraId,
    /// Its files stay.
    pub keep_files: bool,
}

/// What was seen of a VRA.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Whether it answered the last time it was asked.
    pub reachable: bool,
    /// Why it didn't.
    pub error: Option<String>,
    /// Since when it has been as it is, microseconds.
    pub since_us: u64,
    /// Its last answer.
    pub last: Option<LastStatus>,
}

impl Seen {
    /// Whether a VRA serves all protected disks of a VM, as volumes that it shares with others: the VM's guest can be migrated there, and
    /// protected from there.
    pub fn shares_disks_of(&self, member: &Member) -> bool {
        let Some(last) = &self.last else { return false };
        let mut volumes = member.volumes.iter().filter(|volume| !volume.left);
        volumes.all(|volume| {
            let is_it = |served: &VolumeInfo| served.volume == volume.id && served.door.is_some();
            last.status.volumes.iter().any(|served| is_it(served) && served.shared.is_some())
        })
    }
}

/// A VRA's answer and when it was asked.
#[derive(Debug, Clone)]
pub struct LastStatus {
    /// When the question was sent: what was done later may not be in the answer.
    pub asked_us: u64,
    /// The answer.
    pub status: VraStatus,
}

/// VRAs that have a definition of a group that the manager's database doesn't, which is an older one: a newer one, or another one of the same
/// revision. And its revision.
pub fn newer_at(vpg: &Vpg, observed: &Observed) -> BTreeMap<VraId, u64> {
    let newer = |seen: &Seen| {
        let status = &seen.last.as_ref()?.status;
        let told = status.vpgs.iter().find(|status| status.vpg == vpg.id)?;
        vpg.is_other_than(told.revision, told.stamp).then_some(told.revision)
    };
    observed.iter().filter_map(|(vra, seen)| Some((*vra, newer(seen)?))).collect()
}

/// What was seen of all VRAs.
pub type Observed = BTreeMap<VraId, Seen>;
