//! Virtual protection groups: what the user wants protected, and how.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vra::api::vpg::{
    JOURNAL_LIMIT_BYTES, JournalSize, Priority, Takeover, VmDefinition, VolumeDefinition, VpgDefinition,
};
use vra::api::{FormerVm, JournalId, MemberSince, TimeUs, VmId, VpgId, VpgNotes, VraId};

use super::kept::KeptSettings;
use super::named;
use super::recovery::{GroupRecovery, VmRecovery};
use super::vra::Vra;
use crate::inventory::Disk;

/// A group as the manager wants it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vpg {
    /// Its id.
    pub id: VpgId,
    /// Its name, unique.
    pub name: String,
    /// What should become of it.
    pub state: VpgState,
    /// Raised at every change of the definition.
    pub revision: u64,
    /// The newest revision that every VRA of the group has taken; 0 before the first.
    pub applied_revision: u64,
    /// When it was created.
    pub created_us: TimeUs,
    /// When all disks of a test of it were last open.
    pub last_test_us: Option<TimeUs>,
    /// Another one for each revision; none of one that an older manager made.
    #[serde(default)]
    pub stamp: Option<Uuid>,
    /// Everything that the user chose.
    pub settings: VpgSettings,
    /// How it goes, while it is being deleted.
    pub removal: Option<Removal>,
}

/// What the user chose for a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VpgSettings {
    /// For people.
    pub description: String,
    /// Which group goes first when there is not enough for all.
    pub priority: Priority,
    /// Raised when VMs or volumes come or go.
    pub member_set_version: u32,
    /// Time between checkpoints, milliseconds.
    pub checkpoint_interval_ms: u32,
    /// Longest time that a checkpoint may hold guests' writes, milliseconds.
    pub hold_deadline_ms: u32,
    /// How long history is wanted, seconds.
    pub history_s: u64,
    /// The RPO that the user wants to be warned beyond, seconds.
    pub rpo_target_s: u64,
    /// Give up old checkpoints rather than stop replicating when a full sync does not fit the journal.
    pub give_up_history: bool,
    /// Encrypt journals and scratch at rest.
    #[serde(default)]
    pub encrypt: bool,
    /// Replication is paused.
    #[serde(default)]
    pub paused: bool,
    /// Remind of a test so many days after the last one.
    #[serde(default)]
    pub test_reminder_days: Option<u32>,
    /// What becomes of disks that its VMs get.
    #[serde(default)]
    pub new_disks: NewDisks,
    /// How its VMs are to be recovered.
    #[serde(default)]
    pub recovery: GroupRecovery,
    /// The VMs.
    pub vms: Vec<Member>,
    /// VMs that were taken out, until all VRAs have heard of it.
    #[serde(default)]
    pub former: Vec<FormerVm>,
}

/// A VM of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its UUID in the inventory.
    pub vm: VmId,
    /// Its name when the group was defined.
    pub name: String,
    /// Its journal.
    pub journal: JournalId,
    /// Since when it is a member.
    #[serde(default)]
    pub member_since: MemberSince,
    /// VRA of the host that it runs on.
    pub source: VraId,
    /// What its source continues, if it has come from another host.
    #[serde(default)]
    pub takeover: Option<Takeover>,
    /// VRA that keeps its journal.
    pub target: VraId,
    /// The target's folder.
    pub datastore: PathBuf,
    /// How large its journal may and must be.
    #[serde(flatten)]
    pub journal_size: JournalBounds,
    /// Its protected disks.
    pub volumes: Vec<VolumeDefinition>,
    /// Its disks that aren't protected because the user said so.
    #[serde(default)]
    pub excluded: Vec<ExcludedDisk>,
    /// How it is to be recovered.
    #[serde(default)]
    pub recovery: VmRecovery,
}

/// A disk of a VM that isn't protected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExcludedDisk {
    /// Its name within the VM, such as `vdb`.
    pub name: String,
    /// The raw file or block device on the host, when it was excluded.
    pub path: PathBuf,
}

/// How large a VM's journal may and must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalBounds {
    /// Space for it, bytes.
    #[serde(rename = "journal_limit_bytes")]
    pub limit_bytes: u64,
    /// The same in percent of the VM's disks; the bytes mean nothing then.
    #[serde(rename = "journal_limit_percent", default)]
    pub limit_percent: Option<u32>,
    /// From where on its use is an alert.
    #[serde(rename = "journal_warning", default)]
    pub warning: Option<JournalSize>,
    /// Space that it keeps even if the history doesn't need it, bytes.
    #[serde(rename = "journal_minimum_bytes", default)]
    pub minimum_bytes: u64,
}

named! {
    /// What should become of a group.
    VpgState {
        /// It is protected.
        Active = "active",
        /// It is being removed from its VRAs.
        Deleting = "deleting",
    }
}

named! {
    /// What becomes of disks that VMs of a group get.
    #[derive(Default)]
    NewDisks {
        /// They are an alert until somebody protects or excludes them.
        #[default]
        Alert = "alert",
        /// They are protected by themselves, as soon as the guest can use the served device.
        Protect = "protect",
    }
}

/// How a group is deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removal {
    /// Leave journals and recovery disks in the datastore.
    pub keep_disks: bool,
    /// Don't wait for VRAs that cannot be reached.
    pub force: bool,
}

impl Member {
    /// Whether a disk of its VM is neither protected nor excluded.
    pub fn is_new(&self, disk: &Disk) -> bool {
        let is_protected = |volume: &VolumeDefinition| volume.source_path == disk.path && !volume.left;
        !self.volumes.iter().any(is_protected) && !self.excluded.iter().any(|excluded| excluded.is(disk))
    }

    /// Space for its journal, bytes.
    pub fn journal_limit_bytes(&self) -> u64 {
        let disks_bytes =
            self.volumes.iter().fold(0_u64, |sum, volume| sum.saturating_add(volume.size_bytes));
        self.journal_size.limit_for(disks_bytes)
    }
}

impl ExcludedDisk {
    /// Whether it is this one: another disk may have got its name since.
    pub fn is(&self, disk: &Disk) -> bool {
        self.name == disk.name && self.path == disk.path
    }
}

impl NewDisks {
    /// Whether it is what a group has that says nothing.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl JournalBounds {
    /// Space for the journal of disks of so many bytes, bytes.
    pub fn limit_for(&self, disks_bytes: u64) -> u64 {
        self.limit_percent.map_or(self.limit_bytes, |percent| {
            let bytes = JournalSize::Percent(percent).of(disks_bytes);
            bytes.clamp(*JOURNAL_LIMIT_BYTES.start(), *JOURNAL_LIMIT_BYTES.end())
        })
    }
}

impl Vpg {
    /// Every VRA that has a part in it.
    pub fn vras(&self) -> BTreeSet<VraId> {
        self.settings.vms.iter().flat_map(|member| [member.source, member.target]).collect()
    }

    /// Whether a definition of this revision and stamp was made by the manager with another database: a newer one, or one with other content under
    /// the same revision.
    pub fn is_other_than(&self, revision: u64, stamp: Option<Uuid>) -> bool {
        let has_other_stamp = || self.stamp.zip(stamp).is_some_and(|(own, told)| own != told);
        revision > self.revision || revision == self.revision && has_other_stamp()
    }

    /// The VRAs that hold its journals.
    pub fn targets(&self) -> BTreeSet<VraId> {
        self.settings.vms.iter().map(|member| member.target).collect()
    }

    /// The VRAs that its VMs run at.
    pub fn sources(&self) -> BTreeSet<VraId> {
        self.settings.vms.iter().map(|member| member.source).collect()
    }

    /// The VRAs that hold its journals, and since when each has had one that is a member's now: what is older, it knows nothing of.
    pub fn targets_since(&self) -> BTreeMap<VraId, MemberSince> {
        let mut targets = BTreeMap::new();
        for member in &self.settings.vms {
            let since = targets.entry(member.target).or_insert(member.member_since);
            *since = member.member_since.min(*since);
        }
        targets
    }

    /// Whether a VRA is to leave files of VMs that were taken out.
    pub fn keeps_files_at(&self, vra: VraId) -> bool {
        self.settings.former.iter().any(|former| former.target == vra && former.keep_files)
    }

    /// The revision that took the last VM out whose journal a VRA had.
    pub fn former_revision_at(&self, vra: VraId) -> Option<u64> {
        let former = self.settings.former.iter().filter(|former| former.target == vra);
        former.map(|former| former.revision).max()
    }

    /// Those VMs that have been members the longest: their journals alone hold all of the group's checkpoints.
    pub fn first_members(&self) -> impl Iterator<Item = &Member> {
        let vms = &self.settings.vms;
        let first = vms.iter().map(|member| member.member_since).min();
        vms.iter().filter(move |member| Some(member.member_since) == first)
    }

    /// The order in which its source VRAs coordinate checkpoints: that of their ids. A single one needs none.
    fn coordinators(&self) -> Vec<VraId> {
        let sources = self.sources();
        if sources.len() > 1 { sources.into_iter().collect() } else { Vec::new() }
    }

    /// The definition as its VRAs get it; none if one of them is not enrolled (any more).
    pub fn definition<'a>(&self, vra_of: impl Fn(VraId) -> Option<&'a Vra>) -> Option<VpgDefinition> {
        let settings = &self.settings;
        let vms = settings
            .vms
            .iter()
            .map(|member| {
                Some(VmDefinition {
                    id: member.vm,
                    name: member.name.clone(),
                    journal: member.journal,
                    member_since: member.member_since,
                    volumes: member.volumes.clone(),
                    source: vra_of(member.source)?.endpoint(),
                    takeover: member.takeover,
                    target: vra_of(member.target)?.endpoint(),
                    datastore: member.datastore.clone(),
                    journal_limit_bytes: member.journal_size.limit_bytes,
                    journal_limit_percent: member.journal_size.limit_percent,
                    journal_warning: member.journal_size.warning,
                    journal_minimum_bytes: member.journal_size.minimum_bytes,
                    history_s: settings.history_s,
                    give_up_history: settings.give_up_history,
                })
            })
            .collect::<Option<Vec<_>>>()?;
        Some(VpgDefinition {
            id: self.id,
            name: self.name.clone(),
            revision: self.revision,
            member_set_version: settings.member_set_version,
            checkpoint_interval_ms: settings.checkpoint_interval_ms,
            hold_deadline_ms: settings.hold_deadline_ms,
            encrypt: settings.encrypt,
            paused: settings.paused,
            notes: Some(VpgNotes {
                description: settings.description.clone(),
                priority: settings.priority,
                rpo_target_s: Some(settings.rpo_target_s),
                created_us: Some(self.created_us),
                stamp: self.stamp,
                settings: KeptSettings::of(settings).to_json(),
            }),
            coordinators: self.coordinators(),
            vms,
            former: settings.former.clone(),
        })
    }
}
