//! What the `zvm` command asks of `zvm serve`: JSON frames over a unix socket, as VRAs use them (`vra::control`).

mod attaching;
mod inventory;
mod source;
mod transfer;
mod vpg;

pub use attaching::{DoorChoice, ServedDisk, VmProtected, VmUnprotected};
pub use inventory::{InventoryState, PlannedVm, SourceState};
pub use source::{Secret, SettingsEdit, SourceEdit, SourceShown};
pub use transfer::{ImportOutcome, ImportedVpg, VPG_EXPORT_VERSION, VpgExport};
pub use vpg::{DiskName, RecoveryEdit, VmSpec, VpgEdit, VpgSpec, defaults};

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vra::api::view::ViewInfo;
use vra::api::{ApiError, CheckpointId, CheckpointInfo, DoorRequest, TimeUs, VraStatus};

use crate::model::alert::Alert;
use crate::model::event::Event;
use crate::model::source::Source;
use crate::model::status::VpgReport;
use crate::model::task::Task;
use crate::model::test_run::TestRun;
use crate::model::vpg::Vpg;
use crate::model::vra::Vra;

/// Longest JSON message in either direction, in bytes.
pub const MAX_MESSAGE_BYTES: u32 = 64 << 20;

/// Most entries that a list request may ask for.
pub const MAX_LIST: u32 = 10_000;

/// What the command sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RequestFrame {
    /// The sender's number for the request, given back in [`ResponseFrame::id`].
    pub id: u64,
    /// The request.
    pub request: Request,
}

/// What the manager answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResponseFrame {
    /// [`RequestFrame::id`], or 0 when the request could not be read.
    pub id: u64,
    /// The answer.
    pub outcome: Outcome,
}

/// Success or failure of one request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was done, or begun.
    Ok(Box<Response>),
    /// It was not done.
    Error(ApiError),
}

/// A request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// The whole at a glance. Answer: [`Response::Status`].
    Status,
    /// What there is to protect. Answer: [`Response::Inventory`].
    Inventory,
    /// Makes a one-time token. Answer: [`Response::Token`].
    VraTokenCreate {
        /// Name that the VRA will have.
        name: String,
        /// How long it can be used, seconds.
        ttl_s: u64,
    },
    /// All VRAs. Answer: [`Response::Vras`].
    VraList,
    /// One VRA. Answer: [`Response::Vra`].
    VraShow {
        /// Its name or id.
        vra: String,
    },
    /// Revokes a VRA's certificates. Answer: [`Response::Task`].
    VraRevoke {
        /// Its name or id.
        vra: String,
        /// Although groups still use it.
        force: bool,
    },
    /// Changes where a VRA is reached. Answer: [`Response::Vra`].
    VraSetAddress {
        /// Its name or id.
        vra: String,
        /// `host:port`.
        address: String,
    },
    /// Creates a group. Answer: [`Response::Task`].
    VpgCreate(VpgSpec),
    /// One group. Answer: [`Response::Vpg`].
    VpgShow {
        /// Its name or id.
        vpg: String,
    },
    /// Changes a group's settings. Answer: [`Response::Vpg`].
    VpgEdit {
        /// Its name or id.
        vpg: String,
        /// What changes.
        edit: VpgEdit,
    },
    /// Pauses a group's replication, or lets it go on. Answer: [`Response::Vpg`].
    VpgPause {
        /// Its name or id.
        vpg: String,
        /// Paused, or not any more.
        paused: bool,
    },
    /// Takes over the newest definition that a group's VRAs have. Answer: [`Response::Vpg`].
    VpgAdopt {
        /// Its name or id.
        vpg: String,
    },
    /// Begins full syncs of a group's VMs. Answer: [`Response::Task`].
    VpgForceSync {
        /// Its name or id.
        vpg: String,
        /// Only of this VM, by name or id.
        vm: Option<String>,
        /// Although older checkpoints may have to be given up for the full sync.
        #[serde(default)]
        give_up_history: bool,
    },
    /// Adds VMs to a group. Answer: [`Response::Task`].
    VpgAddVms {
        /// Its name or id.
        vpg: String,
        /// The VMs. What they don't say is as the group's first VM has it.
        vms: Vec<VmSpec>,
    },
    /// Protects the disks that VMs of a group have in the inventory and that are not protected yet. Answer: [`Response::Task`].
    VpgAddDisks {
        /// Its name or id.
        vpg: String,
        /// The VMs' names or ids.
        vms: Vec<String>,
        /// Although older checkpoints may have to be given up for the full sync.
        #[serde(default)]
        give_up_history: bool,
    },
    /// Takes disks out of the protection of a group's VMs. Answer: [`Response::Task`].
    VpgRemoveDisks {
        /// Its name or id.
        vpg: String,
        /// The disks, as the inventory names them, or by their paths.
        disks: Vec<DiskName>,
        /// Although older checkpoints may have to be given up for the full sync.
        #[serde(default)]
        give_up_history: bool,
    },
    /// Takes VMs out of a group. Answer: [`Response::Task`].
    VpgRemoveVms {
        /// Its name or id.
        vpg: String,
        /// Their names or ids.
        vms: Vec<String>,
        /// Leave their journals and recovery disks in the datastore.
        keep_disks: bool,
    },
    /// Definitions of groups. Answer: [`Response::Export`].
    VpgExport {
        /// Their names or ids; without any, all.
        vpgs: Vec<String>,
    },
    /// Creates groups of an export. Answer: [`Response::Imported`].
    VpgImport {
        /// The export.
        export: VpgExport,
        /// Only tell what would be done.
        dry_run: bool,
    },
    /// Deletes a group. Answer: [`Response::Task`].
    VpgDelete {
        /// Its name or id.
        vpg: String,
        /// Leave journals and recovery disks in the datastore.
        keep_disks: bool,
        /// Don't wait for VRAs that cannot be reached.
        force: bool,
    },
    /// A group's checkpoints, newest first. Answer: [`Response::Checkpoints`].
    CheckpointList {
        /// The group's name or id.
        vpg: String,
        /// Only named ones.
        tagged: bool,
        /// Only those taken at or after it.
        from_us: Option<TimeUs>,
        /// Only those taken at or before it.
        to_us: Option<TimeUs>,
        /// At most so many.
        limit: u32,
    },
    /// Makes a checkpoint now and names it. Answer: [`Response::Checkpoint`].
    CheckpointTag {
        /// The group's name or id.
        vpg: String,
        /// The name.
        tag: String,
        /// With the guests frozen by their agents.
        #[serde(default)]
        application: bool,
    },
    /// Keeps a checkpoint, or not any more. Answer: [`Response::Checkpoint`].
    CheckpointLock {
        /// The group's name or id.
        vpg: String,
        /// Which one.
        at: At,
        /// Kept, or not any more.
        locked: bool,
    },
    /// Opens a group's disks for a test. Answer: [`Response::Task`].
    TestStart {
        /// The group's name or id.
        vpg: String,
        /// As of when.
        at: At,
        /// How the disks are offered.
        door: DoorRequest,
    },
    /// Ends a group's test. Answer: [`Response::Task`].
    TestStop {
        /// The group's name or id.
        vpg: String,
    },
    /// A group's test with its disks. Answer: [`Response::Test`].
    TestShow {
        /// The group's name or id.
        vpg: String,
    },
    /// The newest tasks. Answer: [`Response::Tasks`].
    TaskList {
        /// At most so many.
        limit: u32,
    },
    /// One task. Answer: [`Response::Task`].
    TaskShow {
        /// Its id.
        task: Uuid,
    },
    /// The newest events. Answer: [`Response::Events`].
    EventList {
        /// At most so many.
        limit: u32,
    },
    /// Alerts. Answer: [`Response::Alerts`].
    AlertList {
        /// Also those that are over.
        all: bool,
        /// At most so many.
        limit: u32,
    },
    /// Names of the site's keys, for encrypted journals. Answer: [`Response::SiteKeys`].
    SiteKeyList,
    /// Makes a new one, which is used from now on. Answer: [`Response::SiteKeys`].
    SiteKeyRotate,
    /// What protecting VMs would take. Answer: [`Response::Plan`].
    Plan {
        /// Their names or UUIDs; none: all.
        vms: Vec<String>,
        /// How long history is wanted, seconds.
        history_s: u64,
    },
    /// Has a VM's disks served by its host's VRA. Answer: [`Response::VmProtected`].
    VmProtect {
        /// Its name or UUID.
        vm: String,
        /// Names of the disks; none: all.
        disks: Vec<String>,
        /// Names of disks that are left out.
        exclude: Vec<String>,
        /// How the guest gets them.
        door: DoorChoice,
        /// Other hosts, or their VRAs, that are to serve them, too.
        #[serde(default)]
        also_on: Vec<String>,
    },
    /// Gives a VM its own disks back. Answer: [`Response::VmUnprotected`].
    VmUnprotect {
        /// Its name or UUID.
        vm: String,
        /// Names of the disks; none: all.
        disks: Vec<String>,
    },
    /// Sources of inventory. Answer: [`Response::Sources`].
    SourceList,
    /// Adds a source of inventory. Answer: [`Response::Sources`].
    SourceAdd {
        /// The source.
        source: Source,
        /// Its password.
        password: Option<Secret>,
        /// Even if it can't be read now.
        unchecked: bool,
    },
    /// Changes a source of inventory. Answer: [`Response::Sources`].
    SourceEdit {
        /// Its name.
        source: String,
        /// What is to be different.
        edit: Box<SourceEdit>,
        /// Even if it can't be read now.
        unchecked: bool,
    },
    /// Forgets a source of inventory. Answer: [`Response::Sources`].
    SourceRemove {
        /// Its name.
        source: String,
        /// Although groups have VMs that only it tells of.
        force: bool,
    },
    /// Has sources of inventory read whole, now. Answer: [`Response::Sources`].
    SourceRead {
        /// The name of one; none for all.
        source: Option<String>,
    },
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", content = "value", rename_all = "snake_case")]
pub enum Response {
    /// To [`Request::Status`].
    Status(Status),
    /// To [`Request::Inventory`].
    Inventory(InventoryState),
    /// To [`Request::VraTokenCreate`].
    Token(NewToken),
    /// To [`Request::VraList`].
    Vras(Vec<VraState>),
    /// To [`Request::VraShow`] and [`Request::VraSetAddress`].
    Vra(Box<VraDetails>),
    /// To [`Request::VpgShow`].
    Vpg(Box<VpgDetails>),
    /// To [`Request::CheckpointList`].
    Checkpoints(Vec<CheckpointInfo>),
    /// To [`Request::CheckpointTag`].
    Tagged(TaggedCheckpoint),
    /// To [`Request::CheckpointLock`].
    Checkpoint(CheckpointInfo),
    /// To [`Request::VpgExport`].
    Export(VpgExport),
    /// To [`Request::VpgImport`].
    Imported(Vec<ImportedVpg>),
    /// To [`Request::TestShow`].
    Test(TestShown),
    /// To what takes time, and to [`Request::TaskShow`].
    Task(Task),
    /// To [`Request::TaskList`].
    Tasks(Vec<Task>),
    /// To [`Request::EventList`].
    Events(Vec<Event>),
    /// To [`Request::AlertList`].
    Alerts(Vec<Alert>),
    /// To [`Request::SiteKeyList`] and [`Request::SiteKeyRotate`].
    SiteKeys(SiteKeyList),
    /// To [`Request::Plan`].
    Plan(Vec<PlannedVm>),
    /// To [`Request::VmProtect`].
    VmProtected(VmProtected),
    /// To [`Request::VmUnprotect`].
    VmUnprotected(VmUnprotected),
    /// To all requests about sources.
    Sources(Vec<SourceShown>),
}

/// The site's keys, without their secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteKeyList {
    /// The file that has them, at the manager.
    pub file: PathBuf,
    /// Their names, the one in use first.
    pub ids: Vec<String>,
}

/// A moment that a user names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum At {
    /// The newest complete checkpoint.
    Latest,
    /// A checkpoint by its id.
    Checkpoint {
        /// Its id.
        checkpoint: CheckpointId,
    },
    /// The newest complete checkpoint at or before a time (D4).
    Time {
        /// The time.
        time_us: TimeUs,
    },
    /// The newest complete checkpoint of that name.
    Tag {
        /// Its name.
        tag: String,
    },
}

/// A checkpoint that was just made. It isn't complete before all journals have it: until then it is lost if a source's VRA ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaggedCheckpoint {
    /// The checkpoint.
    #[serde(flatten)]
    pub checkpoint: CheckpointInfo,
    /// Of an application-consistent one, names of the VMs that it has as a power cut would leave them: their guests have no agent where they run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub without_agent: Vec<String>,
}

/// The whole at a glance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The site's name.
    pub site: String,
    /// The manager's version.
    pub version: String,
    /// The manager's clock.
    pub now_us: TimeUs,
    /// Groups.
    pub vpgs: Vec<VpgReport>,
    /// Enrolled VRAs.
    pub vras: Vec<VraState>,
    /// What is wrong.
    pub alerts: Vec<Alert>,
    /// How long the manager takes to bring the world to where it should be.
    #[serde(default)]
    pub passes: PassTimes,
}

/// The passes of the reconciler since the manager's start: each looks at all groups and VRAs, and notes what follows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassTimes {
    /// How many.
    pub count: u64,
    /// How long the last one took, in microseconds.
    pub last_us: u64,
    /// How long the longest one took, in microseconds.
    pub longest_us: u64,
}

impl PassTimes {
    /// Notes one more.
    pub(crate) fn note(&mut self, took: std::time::Duration) {
        self.count += 1;
        self.last_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.longest_us = self.longest_us.max(self.last_us);
    }
}

/// A VRA and whether it answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VraState {
    /// The VRA.
    #[serde(flatten)]
    pub vra: Vra,
    /// It answered the last time it was asked.
    pub reachable: bool,
    /// Why it didn't.
    pub error: Option<String>,
    /// VMs that it protects.
    pub source_vms: usize,
    /// VMs whose journals it keeps.
    pub target_vms: usize,
}

/// A VRA with all that it tells.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VraDetails {
    /// The VRA.
    pub state: VraState,
    /// Its last answer.
    pub status: Option<VraStatus>,
}

/// A group, wanted and as it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VpgDetails {
    /// As it is wanted.
    pub vpg: Vpg,
    /// As it is; none before the first look.
    pub report: Option<VpgReport>,
}

/// A new token.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewToken {
    /// The text for `vra enroll`. It is kept nowhere.
    pub token: String,
    /// Name that the VRA will have.
    pub name: String,
    /// Until when it can be used.
    pub ends_us: TimeUs,
}

impl std::fmt::Debug for NewToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewToken")
            .field("name", &self.name)
            .field("ends_us", &self.ends_us)
            .finish_non_exhaustive()
    }
}

/// A test and its disks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TestShown {
    /// The test.
    pub test: TestRun,
    /// Its views, by VRA.
    pub views: Vec<ViewShown>,
}

/// A test's view at one VRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ViewShown {
    /// The VRA's name.
    pub vra: String,
    /// The view; none while it isn't open.
    pub view: Option<ViewInfo>,
}

/// The unix socket and what to ask there.
#[derive(Debug)]
pub struct Client {
    stream: tokio::net::UnixStream,
    next_id: u64,
}

/// Why a request got no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing answers at the socket.
    #[error("cannot reach the manager at {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The manager said no.
    #[error(transparent)]
    Refused(#[from] ApiError),
    /// The connection broke.
    #[error("the connection to the manager broke")]
    Broken(#[from] vra::control::FrameError),
    /// The manager closed the connection before it answered.
    #[error("the manager closed the connection before it answered; see its log")]
    Closed,
}

impl Client {
    /// Connects to `zvm serve`.
    pub async fn connect(path: &std::path::Path) -> Result<Self, ClientError> {
        let stream = tokio::net::UnixStream::connect(path)
            .await
            .map_err(|source| ClientError::Connect { path: path.into(), source })?;
        Ok(Self { stream, next_id: 1 })
    }

    /// Sends a request and waits for its answer.
    ///
    /// Not cancel safe: after a dropped call the client is of no more use.
    pub async fn call(&mut self, request: Request) -> Result<Response, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        vra::control::write_frame(&mut self.stream, &RequestFrame { id, request }, MAX_MESSAGE_BYTES).await?;
        let frame: ResponseFrame = vra::control::read_frame(&mut self.stream, MAX_MESSAGE_BYTES)
            .await?
            .ok_or(ClientError::Closed)?;
        match frame.outcome {
            Outcome::Ok(response) => Ok(*response),
            Outcome::Error(error) => Err(error.into()),
        }
    }
}
