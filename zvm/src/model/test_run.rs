//! Tests of a group: its disks, opened at a checkpoint at the targets.

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vra::api::{CheckpointId, DoorRequest, TimeUs, ViewId, VpgId, VraId};

use super::named;

/// A test of a group. It is gone when every trace of it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestRun {
    /// Its id.
    pub id: Uuid,
    /// The group.
    pub vpg: VpgId,
    /// How it stands.
    pub state: TestState,
    /// When it was started.
    pub started_us: TimeUs,
    /// The rest.
    pub details: TestDetails,
}

/// What a test opens and for whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestDetails {
    /// The checkpoint.
    pub checkpoint: CheckpointId,
    /// When the checkpoint was taken.
    pub checkpoint_time_us: TimeUs,
    /// The checkpoint's tag.
    pub checkpoint_tag: Option<String>,
    /// How disks are offered.
    pub door: DoorRequest,
    /// One view at each target VRA. The ids are the manager's, so that opening can be repeated.
    pub views: Vec<TestView>,
    /// The task that started it.
    pub start_task: Uuid,
    /// The task that stops it: the user's, or none when it is rolled back.
    pub stop_task: Option<Uuid>,
}

/// A test's view at one VRA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestView {
    /// Where.
    pub vra: VraId,
    /// Which one.
    pub view: ViewId,
}

named! {
    /// How a test stands.
    TestState {
        /// Views are being opened.
        Starting = "starting",
        /// All are open.
        Running = "running",
        /// They are being closed, because the user said so or because one could not be opened.
        Stopping = "stopping",
    }
}
