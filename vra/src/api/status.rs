//! What a VRA tells of itself.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{CheckpointId, GenerationId, JournalId, TimeUs, ViewInfo, VmId, VolumeInfo, VpgId, VraId, ZvmId};

/// The whole VRA.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VraStatus {
    /// Its id.
    pub vra: VraId,
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Its clock when it answered.
    pub now_us: TimeUs,
    /// When it started.
    pub started_us: TimeUs,
    /// The host.
    pub host: HostInfo,
    /// The site it belongs to; none before enrolment.
    pub site: Option<SiteInfo>,
    /// Names of the site keys that it has, the one that wraps new keys first.
    #[serde(default)]
    pub site_keys: Vec<String>,
    /// Journals stay closed until it has another site key.
    #[serde(default)]
    pub awaits_site_key: bool,
    /// Attached volumes.
    pub volumes: Vec<VolumeInfo>,
    /// VPGs it has a part in.
    pub vpgs: Vec<VpgStatus>,
    /// VMs whose guests' agents it was told of, wherever they run now.
    #[serde(default)]
    pub guest_agents: Vec<VmId>,
    /// VMs it is source of.
    pub source_vms: Vec<SourceVmStatus>,
    /// VMs it is target of.
    pub target_vms: Vec<TargetVmStatus>,
    /// Open views.
    pub views: Vec<ViewInfo>,
    /// What is wrong now.
    pub alerts: Vec<Alert>,
}

/// The host that a VRA runs on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Host name.
    pub hostname: String,
    /// Kernel release, as `uname -r`.
    pub kernel: String,
    /// Names of the ublk driver's features; none without the driver.
    pub ublk_features: Option<Vec<String>>,
}

/// The site that a VRA was enrolled into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteInfo {
    /// The ZVM that may control it.
    pub zvm: ZvmId,
    /// SHA-256 of the site CA's certificate, lower-case hex.
    pub ca_sha256: String,
    /// Serial number of the VRA's certificate, lower-case hex.
    pub certificate_serial: String,
    /// When that certificate ends.
    pub certificate_ends_us: TimeUs,
}

/// A VPG at this VRA.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VpgStatus {
    /// Its id.
    pub vpg: VpgId,
    /// Its name.
    pub name: String,
    /// The definition's revision in force.
    pub revision: u64,
    /// [`super::VpgNotes::stamp`] of that definition.
    #[serde(default)]
    pub stamp: Option<Uuid>,
    /// The newest checkpoint that this VRA made (source); of one that made none, the newest that it holds complete (target).
    pub last_checkpoint: Option<LastCheckpoint>,
    /// Target: the newest checkpoint that all journals of the group at this VRA hold.
    #[serde(default)]
    pub held_checkpoint: Option<LastCheckpoint>,
    /// Target: complete checkpoints held.
    pub checkpoint_count: u64,
    /// Source: epochs that ended without a checkpoint since the start (deadline, or a member that wasn't ready), of those that this VRA
    /// coordinated.
    pub aborted_epochs: u64,
    /// Source: who takes its checkpoints by the clock, as this VRA sees it.
    #[serde(default)]
    pub coordinator: Option<VraId>,
    /// Source: VRAs of the group that don't answer; without them there are no checkpoints (D3).
    #[serde(default)]
    pub missing: Vec<VraId>,
    /// Source: why the newest epoch without a checkpoint had none, of those that this VRA coordinated.
    #[serde(default)]
    pub last_failure: Option<String>,
    /// Source: how long checkpoints held the writes of guests on this host.
    #[serde(default)]
    pub hold: HoldTimes,
}

/// The newest checkpoint of a VPG.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastCheckpoint {
    /// Its id.
    pub id: CheckpointId,
    /// When it was taken.
    pub time_us: TimeUs,
    /// Its name, if it has one.
    pub tag: Option<String>,
}

/// A VM at its source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceVmStatus {
    /// Which VM.
    pub vm: VmId,
    /// Its name.
    pub name: String,
    /// Its VPG.
    pub vpg: VpgId,
    /// Where its data goes.
    pub target: VraId,
    /// What it is doing.
    pub mode: SourceMode,
    /// Connected to the target now.
    pub connected: bool,
    /// The run of numbering it is in.
    pub generation: GenerationId,
    /// Highest sequence number given.
    pub last_sequence: u64,
    /// The target has everything up to here on disk.
    pub durable_through: u64,
    /// How far behind the target is.
    pub rpo: Rpo,
    /// A sync that is running.
    pub sync: Option<SyncProgress>,
    /// Memory that holds what the target doesn't have yet, in bytes.
    pub retained_bytes: u64,
    /// Most that it may hold, in bytes.
    pub retained_limit_bytes: u64,
    /// Bytes that went to the target since the start.
    pub sent_bytes: u64,
    /// How long checkpoints held the guest's writes.
    pub hold: HoldTimes,
    /// Writes that failed on the local disk since the start.
    pub local_errors: u64,
}

/// What a source VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceMode {
    /// Volumes are missing: nothing is captured.
    WaitingForVolumes,
    /// The target hasn't granted the stream yet: nothing is captured.
    Connecting,
    /// Captured and sent.
    Streaming,
    /// A full sync runs; the guest's writes are sent with it.
    Syncing,
    /// Memory was full: what the guest writes is not kept, a full sync follows once the target has the rest.
    Overflowed,
    /// The target refused the stream; a human must choose.
    Refused,
    /// Its group is paused: nothing is sent. What the guest writes is kept as long as there is room.
    Paused,
    /// A mode of a newer VRA.
    #[serde(other)]
    Other,
}

/// Age of the oldest write that the target doesn't have on disk, in microseconds, and where it waits. Zero when nothing waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rpo {
    /// The whole.
    pub total_us: u64,
    /// Since capture stopped, while it hasn't begun again; zero while writes are captured, since each is before it goes to the local disk.
    #[serde(default)]
    pub capture_us: u64,
    /// From capture until it was taken into a batch.
    pub queue_us: u64,
    /// From there until the target received it.
    pub wire_us: u64,
    /// From there until the journal's append began.
    pub target_memory_us: u64,
    /// Append and fdatasync.
    pub journal_disk_us: u64,
}

/// A sync's progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncProgress {
    /// Bytes of the disks that were read and sent, or found to be holes.
    pub done_bytes: u64,
    /// Bytes of all disks.
    pub total_bytes: u64,
    /// When it began.
    pub started_us: TimeUs,
}

/// Times for which checkpoints held the guest's writes since the start, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldTimes {
    /// How many holds.
    pub count: u64,
    /// The last one.
    pub last_us: u64,
    /// The longest one.
    pub max_us: u64,
    /// Half of the last thousand were not longer.
    #[serde(default)]
    pub median_us: u64,
    /// 99 of a hundred of the last thousand were not longer.
    #[serde(default)]
    pub p99_us: u64,
}

/// A VM at its target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetVmStatus {
    /// Which VM.
    pub vm: VmId,
    /// Its name.
    pub name: String,
    /// Its VPG.
    pub vpg: VpgId,
    /// Where its data comes from.
    pub source: VraId,
    /// What it is doing.
    pub state: TargetState,
    /// The source is connected now.
    pub connected: bool,
    /// The journal's id.
    pub journal: JournalId,
    /// The generation at the journal's tail; none while it is empty.
    pub generation: Option<GenerationId>,
    /// Everything up to here is on disk.
    pub durable_through: u64,
    /// The oldest checkpoint's time.
    pub history_from_us: Option<TimeUs>,
    /// The newest checkpoint's time.
    pub history_to_us: Option<TimeUs>,
    /// Checkpoints in the journal.
    pub checkpoint_count: u64,
    /// Bytes of the journal in use.
    pub journal_used_bytes: u64,
    /// Most that it may use.
    pub journal_limit_bytes: u64,
    /// What is journaled, as of about the last hour, in bytes per second.
    #[serde(default)]
    pub write_rate_bytes_per_s: u64,
    /// How much history the journal's limit has room for at that rate, in seconds; none without writes.
    #[serde(default)]
    pub reachable_history_s: Option<u64>,
    /// When history will have to be shortened for room at that rate, in seconds from now; none if it won't.
    #[serde(default)]
    pub limit_reached_in_s: Option<u64>,
    /// What is written to the journal now is encrypted with a key that this site key wraps; none if it isn't encrypted.
    #[serde(default)]
    pub site_key: Option<String>,
    /// What the scrub of the journal does; none before its first segment.
    #[serde(default)]
    pub scrub: Option<ScrubStatus>,
    /// Bytes received since the start.
    pub received_bytes: u64,
    /// The VM's folder in the datastore.
    pub folder: PathBuf,
}

/// The scrub of one journal: sealed segments are read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// When this pass began.
    pub pass_began_us: TimeUs,
    /// When the last one ended.
    pub last_pass_ended_us: Option<TimeUs>,
    /// Segments that this pass has read.
    pub segments: u64,
    /// Segments of the history that are damaged.
    pub damaged_segments: u64,
}

/// What a target VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetState {
    /// Nothing was received yet.
    Empty,
    /// An initial sync goes straight to the recovery disks: no checkpoint can be opened.
    InitialSync,
    /// Writes go to the journal; checkpoints count.
    Journaling,
    /// A sync goes through the journal; older checkpoints stay usable.
    JournalSync,
    /// The journal is full: nothing more is taken.
    PausedFull,
    /// A write or sync of the datastore failed: nothing more is taken until it is reopened.
    Poisoned,
    /// A state of a newer VRA.
    #[serde(other)]
    Other,
}

/// Something wrong, for as long as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alert {
    /// For programs: `journal-full`, `overflow`, `stream-refused`, ...
    pub code: String,
    /// How bad.
    pub severity: Severity,
    /// The VM, if it is about one.
    pub vm: Option<VmId>,
    /// The VPG, if it is about one.
    pub vpg: Option<VpgId>,
    /// For people.
    pub message: String,
    /// What to do.
    pub remedy: Option<String>,
    /// Since when.
    pub since_us: TimeUs,
}

/// How bad an alert is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Worth knowing.
    Info,
    /// Protection is reduced.
    Warning,
    /// There is no protection.
    Critical,
}

/// What a host offers and lacks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoctorReport {
    /// In the order looked at.
    pub checks: Vec<Check>,
}

/// One thing looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// For programs: `kernel`, `ublk`, `memlock`, ...
    pub name: String,
    /// How it is.
    pub state: CheckState,
    /// What was found.
    pub found: String,
    /// What to do about it.
    pub remedy: Option<String>,
}

/// How one thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckState {
    /// As it should be.
    Ok,
    /// Works, with a limit that is named.
    Warning,
    /// Something doesn't work without it.
    Missing,
}
