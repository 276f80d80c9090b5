//! Virtual protection groups and their checkpoints.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    CheckpointId, FormerVm, GenerationId, JournalId, MemberSince, SetTrust, TimeUs, VmId, VolumeId, VpgId,
    VraId,
};

/// Most VMs of one VPG.
pub const MAX_VMS_PER_VPG: usize = 256;

/// Most source VRAs of one VPG.
pub const MAX_SOURCES_PER_VPG: usize = 64;

/// How much space a definition may give a VM's journal, in bytes: 64 MiB to 1 PiB.
pub const JOURNAL_LIMIT_BYTES: std::ops::RangeInclusive<u64> = 64 << 20..=1 << 50;

/// How much of its VM's disks a journal may be given, in percent.
pub const JOURNAL_PERCENT: std::ops::RangeInclusive<u32> = 1..=10_000;

/// A size of a VM's journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JournalSize {
    /// So many bytes.
    Bytes(u64),
    /// So much of the VM's disks together, in percent.
    Percent(u32),
}

impl JournalSize {
    /// What it is for disks of so many bytes together, in bytes.
    pub fn of(self, disks_bytes: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => {
                let bytes = u128::from(disks_bytes) * u128::from(percent) / 100;
                u64::try_from(bytes).unwrap_or(u64::MAX)
            }
        }
    }
}

/// A VPG, as every VRA of it gets it. A VRA is source of the VMs whose [`VmDefinition::source`] has its id, and target of those
/// whose [`VmDefinition::target`] has it.
///
/// Applying a definition again is harmless. One with a lower [`VpgDefinition::revision`] is refused as `stale`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VpgDefinition {
    /// Its id.
    pub id: VpgId,
    /// Its name, for people and for the datastore's folder.
    pub name: String,
    /// Raised at every change of the definition.
    pub revision: u64,
    /// Raised when VMs or volumes come or go; checkpoint records carry it (D1). [`MemberSince`] says what it means for them.
    pub member_set_version: u32,
    /// Time between checkpoints, in milliseconds: 1000 to 3,600,000.
    pub checkpoint_interval_ms: u32,
    /// Longest time that a checkpoint may hold the guests' writes, in milliseconds: 10 to 1000.
    pub hold_deadline_ms: u32,
    /// Target: encrypt journals and scratch at rest.
    #[serde(default)]
    pub encrypt: bool,
    /// Source: nothing is sent, and no checkpoints are made. The disks are served, and what their guests write is kept as long as there is
    /// room, as when the target is away.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// What the manager noted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notes: Option<VpgNotes>,
    /// Source VRAs in the order in which they coordinate the group's checkpoints: the first that is live does. Those that it doesn't
    /// name follow in the order of their ids.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub coordinators: Vec<VraId>,
    /// The VMs.
    pub vms: Vec<VmDefinition>,
    /// VMs that were taken out, for targets that have not heard of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former: Vec<FormerVm>,
}

/// What the manager noted of a group: its VRAs and journals keep it, so that a manager whose database is lost can be made again. VRAs use
/// the priority alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VpgNotes {
    /// For people.
    pub description: String,
    /// Which group goes first when there is not enough for all.
    pub priority: Priority,
    /// The RPO to be warned beyond, in seconds.
    pub rpo_target_s: Option<u64>,
    /// When the group was created.
    pub created_us: Option<TimeUs>,
    /// Another one for each revision that a manager makes: it tells two contents of one revision apart, which there are when an older database of
    /// the manager was restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stamp: Option<Uuid>,
    /// Settings that are the manager's alone, as it writes them; null without any.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub settings: serde_json::Value,
}

/// Which VPG goes first when there is not enough for all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Priority {
    /// Last.
    Low,
    /// Those that nothing is said of.
    #[default]
    Medium,
    /// First.
    High,
}

/// A word that is no [`Priority`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a priority: Low, Medium, High")]
pub struct BadPriority(pub String);

impl Priority {
    const ALL: [Self; 3] = [Self::Low, Self::Medium, Self::High];

    /// A word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Low => "Low",
            Self::Medium => "Medium",
            Self::High => "High",
        }
    }
}

impl std::fmt::Display for Priority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Priority {
    type Err = BadPriority;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|priority| text.eq_ignore_ascii_case(priority.name()));
        known.ok_or_else(|| BadPriority(text.to_owned()))
    }
}

/// Asks for definitions, in the order of their ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListDefinitions {
    /// The former page's [`DefinitionPage::next`].
    #[serde(default)]
    pub after: Option<VpgId>,
}

/// Some of the definitions that a VRA has a part in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DefinitionPage {
    /// The definitions.
    pub vpgs: Vec<VpgDefinition>,
    /// Where the next page goes on, if there is one.
    pub next: Option<VpgId>,
    /// The list of revoked certificates that the VRA has.
    pub trust: SetTrust,
}

impl VpgDefinition {
    /// Its source VRAs in the order in which they coordinate, and the VMs of each.
    pub fn sources(&self) -> Vec<SourceVra<'_>> {
        let mut by_id: BTreeMap<VraId, SourceVra<'_>> = BTreeMap::new();
        for vm in &self.vms {
            let source = SourceVra { endpoint: &vm.source, vms: Vec::new() };
            by_id.entry(vm.source.id).or_insert(source).vms.push(vm);
        }
        let mut sources: Vec<SourceVra<'_>> =
            self.coordinators.iter().filter_map(|vra| by_id.remove(vra)).collect();
        sources.extend(by_id.into_values());
        sources
    }

    /// Source: whose data goes first over a connection that several VPGs share.
    pub fn priority(&self) -> Priority {
        self.notes.as_ref().map_or(Priority::default(), |notes| notes.priority)
    }

    /// What tells it from another content of the same revision; an older manager gave none.
    pub fn stamp(&self) -> Option<Uuid> {
        self.notes.as_ref().and_then(|notes| notes.stamp)
    }

    /// Whether a VRA is source or target of one of its VMs.
    pub fn has_member_at(&self, vra: VraId) -> bool {
        self.vms.iter().any(|vm| vm.source.id == vra || vm.target.id == vra)
    }
}

/// A source VRA of a VPG.
#[derive(Clone, Debug)]
pub struct SourceVra<'a> {
    /// The VRA and the way to it.
    pub endpoint: &'a VraEndpoint,
    /// Its VMs in the VPG, in the definition's order.
    pub vms: Vec<&'a VmDefinition>,
}

/// A VM of a VPG.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmDefinition {
    /// Its id.
    pub id: VmId,
    /// Its name, for people and for the datastore's folder.
    pub name: String,
    /// Its journal at the target. Another id means another journal: an initial sync into new files.
    pub journal: JournalId,
    /// Since when it is a member.
    #[serde(default, skip_serializing_if = "MemberSince::is_default")]
    pub member_since: MemberSince,
    /// Its disks, at least one, numbered from 0 without gaps.
    pub volumes: Vec<VolumeDefinition>,
    /// Where it runs.
    pub source: VraEndpoint,
    /// Source: what it continues, if another VRA was the source before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub takeover: Option<Takeover>,
    /// Where its journal lies.
    pub target: VraEndpoint,
    /// Target: absolute path of the datastore folder.
    pub datastore: PathBuf,
    /// Target: space for the journal, in bytes.
    pub journal_limit_bytes: u64,
    /// Target: the same in percent of the VM's disks together, within [`JOURNAL_LIMIT_BYTES`]; `journal_limit_bytes` means nothing then.
    #[serde(default)]
    pub journal_limit_percent: Option<u32>,
    /// Target: from here on the use of the journal is an alert, `journal-warning`; without, none is.
    #[serde(default)]
    pub journal_warning: Option<JournalSize>,
    /// Target: space that the journal keeps even if the history doesn't need it, in bytes.
    #[serde(default)]
    pub journal_minimum_bytes: u64,
    /// Target: how long history is kept if the journal is large enough, in seconds.
    pub history_s: u64,
    /// Target: when a full sync doesn't fit into the journal, give up the older checkpoints (with an alert) rather than stop
    /// replicating.
    pub give_up_history: bool,
}

/// What a new source of a VM continues (A5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Takeover {
    /// The generation at the journal's tail, another source's: it becomes an ancestor of the new source's.
    pub generation: GenerationId,
    /// No number of the former source is as high; up to [`MAX_TAKEOVER_SEQ`]. The new one's begin here or above.
    pub first_seq: u64,
}

/// The highest number that a new source may begin with.
pub const MAX_TAKEOVER_SEQ: u64 = 1 << 62;

/// How far above what the target had the numbers of a new source begin: more than a source can have given and sent since the target told,
/// and less than the 2^32 that the numbers of one journal segment may span.
const TAKEOVER_GAP: u64 = 1 << 22;

impl Takeover {
    /// Of a journal that has everything of this generation through a number.
    pub fn after(generation: GenerationId, durable_through: u64) -> Self {
        Self { generation, first_seq: durable_through.saturating_add(TAKEOVER_GAP).min(MAX_TAKEOVER_SEQ) }
    }
}

impl VmDefinition {
    /// Size of all its disks, in bytes.
    pub fn disks_bytes(&self) -> u64 {
        self.volumes.iter().fold(0, |sum, volume| sum.saturating_add(volume.size_bytes))
    }

    /// Space for the journal, in bytes.
    pub fn journal_limit(&self) -> u64 {
        self.journal_limit_percent.map_or(self.journal_limit_bytes, |percent| {
            let bytes = JournalSize::Percent(percent).of(self.disks_bytes());
            bytes.clamp(*JOURNAL_LIMIT_BYTES.start(), *JOURNAL_LIMIT_BYTES.end())
        })
    }

    /// From where on the use of the journal is an alert, in bytes.
    pub fn journal_warning_bytes(&self) -> Option<u64> {
        self.journal_warning.map(|warning| warning.of(self.disks_bytes()))
    }
}

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeDefinition {
    /// Its id, as the source's [`super::VolumeInfo`] has it.
    pub id: VolumeId,
    /// Its number in the VM.
    pub number: u16,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Logical block size at the source, 512 or 4096.
    pub logical_block_bytes: u32,
    /// The raw file or block device at the source, for people.
    pub source_path: PathBuf,
    /// It is protected no more. Its number stays its own, and older checkpoints have it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub left: bool,
    /// Each full sync reads it, and nothing that is written to it between is captured: for swap and page files.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub swap: bool,
}

/// A VRA and the way to it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VraEndpoint {
    /// Its id: the peer's certificate must have it.
    pub id: VraId,
    /// `host:port` of its UDP port, as the other VRA reaches it.
    pub address: String,
}

/// What came of a definition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VpgApplied {
    /// Which VPG.
    pub vpg: VpgId,
    /// The revision in force.
    pub revision: u64,
    /// VMs that this VRA is source of.
    pub source_vms: Vec<VmId>,
    /// VMs that this VRA is target of.
    pub target_vms: Vec<VmId>,
    /// Volumes of source VMs that must be attached before the VM's replication starts.
    pub missing_volumes: Vec<VolumeId>,
}

/// Asks for a page of checkpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListCheckpoints {
    /// Of which VPG.
    pub vpg: VpgId,
    /// Only those of this VM's journal: they count as complete when this journal holds them.
    #[serde(default)]
    pub vm: Option<VmId>,
    /// Only those taken at or after it.
    #[serde(default)]
    pub from_us: Option<TimeUs>,
    /// Only those taken at or before it.
    #[serde(default)]
    pub to_us: Option<TimeUs>,
    /// Only those with a tag.
    #[serde(default)]
    pub tagged: bool,
    /// Newest first instead of oldest first.
    #[serde(default)]
    pub newest_first: bool,
    /// With `newest_first`: in the order of cuts instead of times, which a coordinator with a wrong clock puts out of order.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub by_cut: bool,
    /// The former page's [`CheckpointPage::next`].
    #[serde(default)]
    pub after: Option<CheckpointId>,
    /// Most of them in the answer, up to [`super::MAX_CHECKPOINTS_PER_PAGE`].
    pub limit: u32,
}

/// A page of checkpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointPage {
    /// In the order asked for.
    pub checkpoints: Vec<CheckpointInfo>,
    /// How many there are in all that fit the request, over all pages.
    pub total: u64,
    /// Where the next page goes on, if there is one.
    pub next: Option<CheckpointId>,
}

/// A checkpoint of a VPG.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// Its id.
    pub id: CheckpointId,
    /// When it was taken, by the coordinator's clock.
    pub time_us: TimeUs,
    /// Why it was taken, and how its disks are.
    #[serde(default)]
    pub kind: CheckpointKind,
    /// Its name, if it was asked for.
    pub tag: Option<String>,
    /// The members it was taken over.
    pub member_set_version: u32,
    /// Every journal that this VRA has of the VMs that it is of ([`MemberSince`]) holds it (D3). Only complete ones can be opened for the
    /// group.
    pub complete: bool,
    /// It is kept when it grows older than the history (C5), in every journal that it is of.
    #[serde(default)]
    pub locked: bool,
    /// It is kept in some of them alone, and holds history and room there: a lock that failed half-way, or was given up for want of room.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub partly_locked: bool,
    /// Its place in each VM's journal.
    pub vms: Vec<CheckpointPlace>,
}

impl CheckpointInfo {
    /// A word for whether it is kept.
    pub fn lock_name(&self) -> &'static str {
        match (self.locked, self.partly_locked) {
            (true, _) => "yes",
            (false, true) => "partly",
            (false, false) => "-",
        }
    }
}

/// Why a checkpoint was taken, and how its disks are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckpointKind {
    /// By the clock: as a power cut would leave the disks.
    #[default]
    Automatic,
    /// Asked for by a user: as a power cut would leave the disks.
    Tagged,
    /// Taken while the guests' filesystems were frozen.
    Application,
}

impl CheckpointKind {
    /// A word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Automatic => "automatic",
            Self::Tagged => "tagged",
            Self::Application => "application",
        }
    }
}

impl From<journal::batch::CheckpointKind> for CheckpointKind {
    fn from(kind: journal::batch::CheckpointKind) -> Self {
        match kind {
            journal::batch::CheckpointKind::Automatic => Self::Automatic,
            journal::batch::CheckpointKind::Tagged => Self::Tagged,
            journal::batch::CheckpointKind::Application => Self::Application,
        }
    }
}

impl From<CheckpointKind> for journal::batch::CheckpointKind {
    fn from(kind: CheckpointKind) -> Self {
        match kind {
            CheckpointKind::Automatic => Self::Automatic,
            CheckpointKind::Tagged => Self::Tagged,
            CheckpointKind::Application => Self::Application,
        }
    }
}

/// A checkpoint's place in one VM's journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointPlace {
    /// Which VM.
    pub vm: VmId,
    /// The sequence number up to which its writes belong to the checkpoint.
    pub cut: u64,
}

/// Locks a checkpoint, so that it is kept when it grows older than the history, or unlocks it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockCheckpoint {
    /// Of which VPG.
    pub vpg: VpgId,
    /// Which one.
    pub checkpoint: CheckpointId,
    /// Locked, or not any more.
    pub locked: bool,
}

/// Makes a named checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TagCheckpoint {
    /// Of which VPG.
    pub vpg: VpgId,
    /// The name, 1 to 128 bytes, and no text that means a moment by itself ([`is_moment`]). The same tag again makes another checkpoint.
    pub tag: String,
    /// With the guests frozen, so that their filesystems are clean in it. Those of a VPG with one source VRA are frozen for it; else they must
    /// have been frozen at all of its source VRAs.
    #[serde(default)]
    pub application: bool,
}

/// Whether a text means a moment by itself: `latest`, a time or a checkpoint's id. It is no name for a checkpoint.
pub fn is_moment(text: &str) -> bool {
    text == "latest" || text.parse::<TimeUs>().is_ok() || text.parse::<CheckpointId>().is_ok()
}

/// Shortest record that a full sync makes of data, in bytes: what its headers cost is estimated by it.
const SYNC_RECORD_BYTES: u64 = 64 << 10;

/// Room that a full sync of disks of so many bytes needs in a journal, in bytes. Besides headers and checksums, what the guest writes meanwhile
/// needs room too: an eighth is set aside for all of it. A target that hasn't got it gives up older checkpoints, or refuses, as the group says.
pub fn full_sync_bytes(data_bytes: u64) -> u64 {
    let headers_bytes = data_bytes / SYNC_RECORD_BYTES * 128;
    data_bytes.saturating_add(data_bytes / 8).saturating_add(headers_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_journals_follow_the_disks_and_older_definitions_have_none() {
        let old = serde_json::json!({
            "id": VmId::random(), "name": "db", "journal": JournalId::random(), "source": { "id": VraId::random(), "address": "a:1" },
            "target": { "id": VraId::random(), "address": "b:1" }, "datastore": "/ds", "journal_limit_bytes": 1_u64 << 30,
            "history_s": 3600, "give_up_history": true,
            "volumes": [
                { "id": VolumeId::random(), "number": 0, "size_bytes": 60_u64 << 30, "logical_block_bytes": 512, "source_path": "/a" },
                { "id": VolumeId::random(), "number": 1, "size_bytes": 40_u64 << 30, "logical_block_bytes": 512, "source_path": "/b" }
            ]
        });
        let mut vm: VmDefinition = serde_json::from_value(old).expect("an older release's");
        assert_eq!((vm.journal_limit(), vm.journal_warning_bytes()), (1 << 30, None));
        assert_eq!(vm.journal_minimum_bytes, 0);
        vm.journal_limit_percent = Some(25);
        vm.journal_warning = Some(JournalSize::Percent(20));
        assert_eq!((vm.journal_limit(), vm.journal_warning_bytes()), (25 << 30, Some(20 << 30)));
        vm.journal_limit_percent = Some(u32::MAX);
        assert_eq!(vm.journal_limit(), 1 << 50, "the most that there is");
        vm.volumes[1].size_bytes = 0;
        (vm.volumes[0].size_bytes, vm.journal_limit_percent) = (512, Some(1));
        assert_eq!(vm.journal_limit(), 64 << 20, "the least that there is");
        vm.journal_warning = Some(JournalSize::Bytes(5));
        assert_eq!(
            serde_json::to_value(vm.journal_warning).expect("JSON"),
            serde_json::json!({ "bytes": 5 })
        );
    }
}
