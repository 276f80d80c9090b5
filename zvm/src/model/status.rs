//! How a group does, from facts.

use serde::{Deserialize, Serialize};
use vra::api::status::{Rpo, SourceMode, SyncProgress, TargetState};
use vra::api::{TimeUs, VmId, VpgId};

use super::named;
use super::test_run::TestState;

/// How a group does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VpgReport {
    /// Its id.
    pub vpg: VpgId,
    /// Its name.
    pub name: String,
    /// In one word.
    pub status: VpgStatus,
    /// What it is doing, or what is in its way.
    pub substatus: VpgSubstatus,
    /// Age of the newest state that could be recovered now, microseconds; none while nothing can.
    pub rpo_us: Option<u64>,
    /// The RPO that the user wants, seconds.
    pub rpo_target_s: u64,
    /// Where the oldest write that is not safe yet waits, and how long it has, over all VMs.
    pub slowest_stage: Option<(Stage, u64)>,
    /// How far a running sync is, percent.
    pub sync_percent: Option<u8>,
    /// When the running sync will be done at its present pace, microseconds from now.
    pub sync_remaining_us: Option<u64>,
    /// Time of the oldest checkpoint.
    pub history_from_us: Option<TimeUs>,
    /// Time of the newest checkpoint.
    pub history_to_us: Option<TimeUs>,
    /// How much history the user wants, seconds.
    pub history_wanted_s: u64,
    /// Complete checkpoints that can be opened.
    pub checkpoint_count: u64,
    /// A test, if one is under way.
    pub test: Option<TestState>,
    /// What is wrong, worst first.
    pub problems: Vec<Problem>,
    /// Its VMs.
    pub vms: Vec<VmReport>,
}

/// Something wrong and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What it is, naming the thing.
    pub description: String,
    /// What to do.
    pub remedy: String,
}

/// How a VM of a group does. What neither VRA tells is none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmReport {
    /// Its id.
    pub vm: VmId,
    /// Its name.
    pub name: String,
    /// Name of the VRA that it runs at.
    pub source: String,
    /// Name of the VRA that keeps its journal.
    pub target: String,
    /// What the source does.
    pub source_mode: Option<SourceMode>,
    /// What the target does.
    pub target_state: Option<TargetState>,
    /// Whether source and target are connected.
    pub connected: bool,
    /// How far behind the target is.
    pub rpo: Option<Rpo>,
    /// A sync that is running.
    pub sync: Option<SyncProgress>,
    /// Journal in use, bytes.
    pub journal_used_bytes: Option<u64>,
    /// Most that the journal may use, bytes.
    pub journal_limit_bytes: u64,
    /// How much history there is room for at today's write rate, seconds; none without writes.
    #[serde(default)]
    pub reachable_history_s: Option<u64>,
    /// When history will have to be shortened for room at that rate, seconds from now; none if it won't.
    #[serde(default)]
    pub limit_reached_in_s: Option<u64>,
}

named! {
    /// A group's status; names of VPGStatus.
    VpgStatus {
        /// Not protected yet.
        Initializing = "Initializing",
        /// All as wanted.
        MeetingSla = "MeetingSLA",
        /// Neither RPO nor history are as wanted, or something is broken.
        NotMeetingSla = "NotMeetingSLA",
        /// History is shorter than wanted.
        HistoryNotMeetingSla = "HistoryNotMeetingSLA",
        /// RPO is worse than wanted.
        RpoNotMeetingSla = "RpoNotMeetingSLA",
        /// It is being deleted.
        Deleting = "Deleting",
    }
}

named! {
    /// A group's substatus; names of VPGSubstatus.
    VpgSubstatus {
        /// Nothing to add.
        None = "None",
        /// The first sync runs.
        InitialSync = "InitialSync",
        /// Its VRAs do not have the definition yet.
        Creating = "Creating",
        /// A user must decide or set something right.
        NeedsConfiguration = "NeedsConfiguration",
        /// Something failed.
        Error = "Error",
        /// Source and target, or the manager and one of them, do not reach each other; nothing can be recovered.
        DisconnectedFromPeerNoRecoveryPoints = "DisconnectedFromPeerNoRecoveryPoints",
        /// The disks are read again as a whole.
        FullSync = "FullSync",
        /// It is being deleted.
        Deleting = "Deleting",
        /// Source and target, or the manager and one of them, do not reach each other.
        DisconnectedFromPeer = "DisconnectedFromPeer",
        /// A user has paused it.
        ReplicationPausedUserInitiated = "ReplicationPausedUserInitiated",
        /// The journal is full.
        ReplicationPausedSystemInitiated = "ReplicationPausedSystemInitiated",
        /// Journal or recovery disks could not be written.
        JournalStorageError = "JournalStorageError",
        /// Disks of a VM are not served by its VRA.
        VmNotProtectedError = "VmNotProtectedError",
    }
}

named! {
    /// Where a write can wait on its way.
    Stage {
        /// Writes aren't captured.
        Capture = "capture",
        /// At the source, before it is sent.
        Queue = "queue",
        /// On the network.
        Wire = "wire",
        /// In the target's memory.
        TargetMemory = "target memory",
        /// For the journal's disk.
        JournalDisk = "journal disk",
    }
}
